"""Say what this machine, this installation and, if one is named, a model can do, with the reason where they cannot.

With MODEL (a folder, else a hub id): whether kvstrata serves it, what its layers are like, bytes per token by format,
and the largest difference of its logits to transformers' dense cache over 64 tokens.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvstrata.cli.output import Output

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "rich")
COPY_BYTES = 256 << 20
REPS = 5


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?")


def run(args: argparse.Namespace, out: Output) -> int:
    result: dict[str, Any] = {"schema": 1, "versions": versions(), "machine": machine(), "backends": backends()}
    with out.busy("measuring memory bandwidth"):
        from kvstrata.cli import cuda_facts

        result["bandwidth"] = bandwidth()
        result["cuda"] = cuda_facts.examine()
    result["advice"] = advice(result["machine"])
    _show(result, out)
    code = 0
    if args.model is not None:
        from kvstrata.cli import model_facts

        result["model"] = model_facts.examine(args.model, out)
        model_facts.show(result["model"], out)
        code = 1 if result["model"]["reasons"] else 0
    out.result(result)
    return code


def versions() -> dict[str, str | None]:
    import kvstrata

    found: dict[str, str | None] = {"kvstrata": kvstrata.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    import torch

    from kvstrata.backend import processor

    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch_threads": torch.get_num_threads(),
        "environment": {k: os.environ[k] for k in sorted(os.environ) if k.startswith(("KVSTRATA_", "OMP_"))},
    }


def backends() -> dict[str, Any]:
    """Each backend as plain data; a backend that is absent is its reason."""
    import kvstrata

    return {name: _plain(backend) for name, backend in kvstrata.backends().items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        fields = {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
        return {"absent": fields["reason"]} if set(fields) == {"reason"} else fields
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def bandwidth() -> dict[str, Any]:
    """GB/s of memory, by torch, best of a few: a quick look, not a benchmark."""
    import torch

    source = torch.ones(COPY_BYTES // 8, dtype=torch.int64)
    target = torch.empty_like(source)
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(REPS))
    read = min(_seconds(lambda: source.max()) for _ in range(REPS))
    return {
        "copy_gbps": round(2 * COPY_BYTES / copy / 1e9, 1),
        "read_gbps": round(COPY_BYTES / read / 1e9, 1),
        "note": f"torch, {COPY_BYTES >> 20} MiB, best of {REPS}; copy counts bytes read plus written",
    }


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def advice(seen: dict[str, Any]) -> list[str]:
    """What the user could change, in sentences."""
    said = []
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    if seen["load"] > seen["cores"] and not passive:
        said.append(
            f"The machine is busier ({seen['load']:.1f}) than its {seen['cores']} cores: waiting threads spin against "
            "working ones. OMP_WAIT_POLICY=passive helps."
        )
    if seen["torch_threads"] > seen["cores"]:
        said.append(f"torch uses {seen['torch_threads']} threads on {seen['cores']} cores.")
    return said


def _show(result: dict[str, Any], out: Output) -> None:
    out.table("Versions", ["package", "version"], [(k, v or "not installed") for k, v in result["versions"].items()])
    seen = result["machine"]
    rows = [(k, seen[k]) for k in ("system", "processor", "cores", "torch_threads")] + [("load", f"{seen['load']:.2f}")]
    rows += list(seen["environment"].items())
    out.table("Machine", ["what", "value"], rows)
    from kvstrata.cli import cuda_facts

    backend_rows = [*_backend_rows(result["backends"]), *cuda_facts.rows(result["cuda"])]
    out.table("Backends", ["backend", "what", "value"], backend_rows)
    speed = result["bandwidth"]
    out.line(f"\nMemory: copy {speed['copy_gbps']} GB/s, read {speed['read_gbps']} GB/s ({speed['note']})")
    for sentence in result["advice"]:
        out.line(f"Advice: {sentence}", style="yellow")


def _backend_rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows: list[tuple[str, str, str]] = []
    for name, facts in found.items():
        for what, value in facts.items():
            if what == "levels":
                rows += [(name, f"level {level['name']}", _level(level)) for level in value]
            else:
                rows.append((name, what, str(value)))
    return rows


def _level(level: dict[str, Any]) -> str:
    if not level["available"]:
        return f"no: {level['reason']}"
    return "yes" if level["kernels"] == level["name"] else f"yes, with the kernels of {level['kernels']}"
