"""What is run on a machine with a GPU: a build into a folder of its own, then tests and benches, most telling ones first.

    python bench/session.py [RESULTS] [--seconds 570] [--only NAME,..] [--no-build]        (bash bench/gpu_session.sh)

Every step has its own time limit, and all have one together: what is late is stopped with its children, what has no time left
is not begun, and neither loses the others. RESULTS holds, whole after each step, session.json: versions and the outcome of
each step; benches.json: what each bench printed, by step; session.log: the end of what each step said. The exit code is 1
where a step failed, was stopped or was left out, and where torch sees no device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 200_000
"""Of a step's output in session.log, its end."""
LEAST_SECONDS = 5
"""No step is begun with less."""
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "-rfE", "-m", "cuda", "-p", "no:cacheprovider"]
SANITIZED = ["tests/store/test_device.py", "tests/cuda/test_merge.py", "-k", "full or kivi or snapkv or 7-64", "-x"]
"""Tests that the sanitizers run: each goes through append, attend, plans and their ops with a few tokens."""
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
"""Every tensor is an allocation of its own: what is written beyond one is seen."""


@dataclass(frozen=True)
class Step:
    """A command. json: its standard output is a bench's one object. needs: a program; without it the step is absent."""

    name: str
    seconds: int
    command: list[str]
    json: bool = False
    needs: str | None = None


@dataclass(frozen=True)
class Outcome:
    """status: an exit code, "stopped", "left out" or "absent"; said: the last line of the output."""

    name: str
    status: int | str
    seconds: float
    said: str

    @property
    def good(self) -> bool:
        return self.status in (0, "absent")


def bench(name: str, *options: str) -> list[str]:
    return [PYTHON, "-m", "kvstrata.cli", "bench", name, "--device", "cuda", *options, "--json"]


def script(name: str, *options: str) -> list[str]:
    return [PYTHON, f"bench/{name}.py", "--device", "cuda", *options, "--json"]


def steps() -> list[Step]:
    """All of them, in order."""
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
    decode = ["--shape", "qwen3-0.6b", "--policies", "full,kivi,arkv,snapkv", "--steps", "32"]
    return [
        Step("doctor", 30, [PYTHON, "-m", "kvstrata.cli", "doctor", "--json"], json=True),
        Step("store", 60, [*PYTEST, "tests/cuda", "tests/store/test_device.py", "tests/store/test_dense.py"]),
        Step("attend", 60, bench("attend"), json=True),
        Step("attend_batch", 60, bench("attend", "--kv-rows", "64", "--reps", "30"), json=True),
        Step("ops", 150, [*PYTEST, *workers, "--maxfail", "40", "tests/ops"]),
        Step("hf", 60, [*PYTEST, "tests/hf/test_device.py"]),
        Step("decode", 90, bench("decode", *decode, "--context", "4096,32768"), json=True),
        Step(
            "memcheck", 90, ["env", UNCACHED, *sanitizer, "--tool", "memcheck", *PYTEST, *SANITIZED], needs=sanitizer[0]
        ),
        Step("racecheck", 90, [*sanitizer, "--tool", "racecheck", *PYTEST, *SANITIZED], needs=sanitizer[0]),
        Step("step", 30, script("step"), json=True),
        Step("append", 40, bench("append"), json=True),
        Step("quantize", 40, bench("quantize"), json=True),
        Step("prefill", 40, bench("prefill"), json=True),
        Step("attend_mass", 30, bench("attend", "--format", "bf16,int8", "--mass"), json=True),
        Step("select", 40, bench("select", "--tokens", "32768"), json=True),
        Step("score_window", 30, script("ops/score_window", "--tokens", "32768"), json=True),
        Step("score_keys", 30, script("ops/score_keys", "--tokens", "32768"), json=True),
        Step("merge", 20, script("ops/merge"), json=True),
        Step("accumulate", 20, script("ops/accumulate"), json=True),
        Step("summarize", 30, script("ops/summarize"), json=True),
    ]


def build(site: Path, code: str) -> Step:
    """The package into a folder, with the CUDA library for one kind of GPU."""
    options = [f"-Ccmake.define.KVSTRATA_CUDA_CODE={code}", "-Ccmake.define.KVSTRATA_CUDA=on"]
    where = ["--target", str(site), "--upgrade"]
    pip = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--disable-pip-version-check"]
    return Step("build", 270, [*pip, *options, *where, "."])


class Session:
    """The steps of one call, and what has come of them."""

    def __init__(self, results: Path, seconds: float, facts: dict[str, Any], environment: dict[str, str]) -> None:
        self.results, self.environment, self.facts = results, environment, facts
        self.until = time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self.benches: dict[str, Any] = {}
        results.mkdir(parents=True, exist_ok=True)
        (results / "session.log").write_text("")

    def run(self, step: Step) -> Outcome:
        """One step, within its limit and what is left of all."""
        left = self.until - time.monotonic()
        if step.needs is not None and shutil.which(step.needs) is None:
            return self._note(Outcome(step.name, "absent", 0.0, f"{step.needs} is not on PATH"), "")
        if left < LEAST_SECONDS:
            return self._note(Outcome(step.name, "left out", 0.0, "no time was left"), "")
        began = time.monotonic()
        code, out, log = ran(step.command, min(step.seconds, left), self.environment)
        status: int | str = "stopped" if code is None else code
        if step.json:
            status = self._keep(step.name, out, status)
        text = log if step.json else out + log
        said = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        return self._note(Outcome(step.name, status, round(time.monotonic() - began, 1), said.strip()[:200]), text)

    def _keep(self, name: str, out: str, status: int | str) -> int | str:
        try:
            self.benches[name] = json.loads(out)
        except ValueError:
            return status or "no JSON"
        return status

    def _note(self, outcome: Outcome, text: str) -> Outcome:
        self.outcomes.append(outcome)
        line = f"{outcome.name:14s} {outcome.status!s:>8s} {outcome.seconds:6.1f} s  {outcome.said}"
        print(line, flush=True)
        with (self.results / "session.log").open("a") as log:
            log.write(f"==== {line}\n{text[-LOG_BYTES:]}\n")
        made = {"schema": 1, "run": self.facts, "steps": [asdict(o) for o in self.outcomes]}
        write(self.results / "session.json", made)
        write(self.results / "benches.json", self.benches)
        return outcome


def ran(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str, str]:
    """Exit code (None: stopped, with all that it had started), standard output and standard error."""
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        out, log = child.communicate(timeout=seconds)
        return child.returncode, out, log
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        out, log = child.communicate()
        return None, out, log


def write(path: Path, value: Any) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def said(*command: str) -> str:
    """Standard output of a program; empty where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def facts_of() -> dict[str, Any]:
    """What the session runs on. torch is asked in a process of its own: this one touches no GPU."""
    packages = {}
    for name in ("torch", "transformers", "flash_attn", "flashinfer-python", "numpy", "pytest"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    query = ("nvidia-smi", "--format=csv,noheader", "--query-gpu")
    code = "import torch; print(torch.version.cuda, '%d%d' % torch.cuda.get_device_capability())"
    cuda, _, capability = said(PYTHON, "-c", code).partition(" ")
    return {
        "gpu": said(*query[:2], query[2] + "=name").partition("\n")[0],
        "memory": said(*query[:2], query[2] + "=memory.total").partition("\n")[0],
        "driver": said(*query[:2], query[2] + "=driver_version").partition("\n")[0],
        "capability": capability,
        "nvcc": (said("nvcc", "--version").splitlines() or [""])[-1],
        "torch_cuda": cuda,
        "packages": packages,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": said("git", "rev-parse", "HEAD") or None,
    }


def folder_of(gpu: str) -> Path:
    """Where results go by default: by the GPU's short name, as h100."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    short = re.search(r"(gh|gb|[ahblv])\d{2,3}", gpu.lower())
    return ROOT / "bench" / "results" / (short.group() if short else "gpu") / date.today().isoformat()


def summary(session: Session) -> None:
    """The numbers that one looks for first."""
    for name in ("attend", "attend_batch", "prefill", "attend_mass"):
        for r in session.benches.get(name, {}).get("rows", []):
            print(
                f"{name:14s} {r['format']:5s} {r['ms_p50']:.4f} ms {r['gbps']:7.0f} GB/s {r['share_read']:6.1%} of read,"
                f" {r['speedup_vs_sdpa']:.2f} x SDPA, host {r['host_us']:.1f} us, error {r['err_rel']:.1e}"
            )
    for name in ("append", "quantize"):
        for r in session.benches.get(name, {}).get("rows", []):
            case = f"{r['kind']} {r['format']} of {r['from']} {r['tokens']} tokens {r.get('order', '')}"
            print(f"{case:44s} {r['ms_p50']:.4f} ms {r['gbps']:7.0f} GB/s {r['share_copy']:6.1%} of copy")
    for r in session.benches.get("decode", {}).get("rows", []):
        print(
            f"decode {r['context']:6d} {r['cache']:14s} {r['ms_p50']:7.2f} ms, {r['speedup'] or 1:.2f} x DynamicCache"
        )
    bad = [o.name for o in session.outcomes if not o.good]
    print(
        f"{len(session.outcomes) - len(bad)} of {len(session.outcomes)} steps passed",
        *(["failed:", *bad] if bad else []),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", metavar="RESULTS")
    parser.add_argument("--seconds", type=float, default=570, help="for all steps together; default: %(default)s")
    parser.add_argument("--only", metavar="NAME,..", help=f"of {', '.join(s.name for s in steps())}")
    parser.add_argument("--no-build", action="store_true", help="run the package as it is installed")
    args = parser.parse_args()
    facts = facts_of()
    if not facts["capability"]:
        print("no session: torch sees no CUDA device here")
        return 1
    results = (args.results or folder_of(facts["gpu"])).resolve()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    chosen = [s for s in steps() if args.only is None or s.name in args.only.split(",")]
    session = Session(results, args.seconds, facts, environment)
    print(f"{facts['gpu']}, driver {facts['driver']}, results in {results}", flush=True)
    if not args.no_build:
        site = ROOT / "build" / "site"
        environment["PYTHONPATH"] = str(site)
        code = "sm_90a" if facts["capability"] == "90" else "sm_80" if facts["capability"] == "80" else "compute_80"
        if session.run(build(site, code)).status != 0:
            print((results / "session.log").read_text()[-6000:])
            chosen = []
    for step in chosen:
        session.run(step)
    summary(session)
    return 0 if all(o.good for o in session.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
