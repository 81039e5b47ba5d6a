"""The performance table of the README: attention, decoding and memory beside torch and transformers, by one command.

    python bench/performance.py --out bench/results/cpu --into README.md        (make bench)

Runs `kvstrata bench attend`, `prefill`, `decode` and `memory` one after another, each as a user would, and says ratios of one
run. Writes OUT/performance.md with the commands, OUT/attend.json, prefill.json, decode.json, memory.json, and the plots.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvstrata.cli.output import Output
from kvstrata.quality import manifest
from kvstrata.quality.contenders import label
from kvstrata.quality.manifest import write
from kvstrata.quality.markdown import table
from kvstrata.quality.report import placed

MARK = "performance"


def asked(args: argparse.Namespace) -> dict[str, list[str]]:
    """The options of each bench."""
    model = ["--shape", args.shape, "--policies", args.policies, "--peers", args.peers, "--out", str(args.out)]
    return {
        "attend": ["--reps", str(args.reps)],
        "prefill": ["--queries", "128", "--kv-rows", "2", "--reps", "5"],
        "decode": [*model, "--context", args.context],
        "memory": [*model, "--context", args.context.split(",")[-1]],
    }


def run(name: str, options: list[str], folder: Path) -> dict[str, Any]:
    """The object that a bench prints, also written to FOLDER/NAME.json. RuntimeError where it fails."""
    words = [sys.executable, "-m", "kvstrata.cli", "bench", name, *options, "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"kvstrata bench {name}: exit {done.returncode}, {done.stdout.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    return found


def attention(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line per format: a decode step's attention and a chunk's, beside torch SDPA in the same run."""
    one, many = found["attend"], {r["format"]: r for r in found["prefill"]["rows"]}
    first, chunk = one["rows"][0], found["prefill"]["rows"][0]
    rows = []
    for r in one["rows"]:
        share, size = f"{100 * r['share_read']:.0f}", f"{r['bytes_read'] / first['bytes_read']:.2f}"
        rows.append(
            [r["format"], f"{r['speedup_vs_sdpa']:.2f}", share, size, f"{many[r['format']]['speedup_vs_sdpa']:.2f}"]
        )
    facts = one["run"]
    said = (
        f"Attention over {first['tokens']} stored tokens, {first['kv_rows']} KV heads x {first['group']} query heads x "
        f"{first['head_dim']}, random pages, {facts['isa']}, {facts['threads']} threads; beside torch SDPA in bfloat16 with "
        f"the group packed as query rows, in the same run; read bandwidth of that run; {chunk['queries']} queries: "
        f"{chunk['kv_rows']} KV heads:\n"
    )
    header = ["format", "x SDPA", "% of read bandwidth", "bytes to bf16", f"{chunk['queries']} queries, x SDPA"]
    return [said, *table(header, rows)]


def decoding(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line per context and cache."""
    rows = []
    for r in found["decode"]["rows"]:
        near, peak = (f"{100 * r[f] / r['dense_bytes']:.1f}" for f in ("near_bytes", "peak_bytes"))
        speed = "-" if r["speedup"] is None else f"{r['speedup']:.2f}"
        rows.append(
            [str(r["context"]), label(r["cache"], r["budget"]), speed, f"{r['ms_p99'] / r['ms_p50']:.2f}", near, peak]
        )
    shape = found["decode"]["run"]["config"]["shape"]
    text = (
        f"Decoding with all layers and matrix products, {shape} with random weights, bfloat16, batch 1, caches filled with "
        "random tokens; tokens per second relative to `DynamicCache` in the same run; bytes in per cent of a dense cache:\n"
    )
    return [text, *table(["context", "cache", "x DynamicCache", "p99 to p50", "KV bytes", "peak"], rows)]


def memory(found: dict[str, dict[str, Any]]) -> list[str]:
    """One line per cache: its peak while the prompt comes in."""
    last = [r for r in found["memory"]["rows"] if r["tokens"] == r["context"]]
    rows = [
        [
            label(r["cache"], r["budget"]),
            *(f"{100 * r[f] / r['dense_bytes']:.1f}" for f in ("near_bytes", "peak_bytes")),
        ]
        for r in last
    ]
    text = f"A prompt of {last[0]['context']} tokens put in chunk by chunk; bytes in per cent of the dense cache's:\n"
    return [text, *table(["cache", "KV bytes", "peak"], rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--context", default="4096,16384,32768")
    parser.add_argument("--policies", default="full,kivi,arkv")
    parser.add_argument("--peers", default="DynamicCache")
    parser.add_argument("--reps", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"), metavar="DIR")
    parser.add_argument("--into", type=Path, metavar="FILE", help="puts the tables between the marks of a README")
    args, out = parser.parse_args(), Output(json=False)
    options = asked(args)
    found: dict[str, dict[str, Any]] = {}
    with out.progress("benches", len(options)) as advance:
        for name, words in options.items():
            found[name] = run(name, words, args.out)
            advance(name)
    facts = manifest.of({})
    machine, versions = facts["machine"], ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    how = f"{datetime.date.today().isoformat()}, commit {facts['commit']}; {machine['processor']}, {machine['cores']} cores"
    commands = [shlex.join(["kvstrata", "bench", name, *words]) for name, words in options.items()]
    tables = [*attention(found), *decoding(found), *memory(found)]
    made = [*tables, f"{how}; {versions}; by `make bench`:\n", "```bash", *commands, "```"]
    write(args.out / "performance.md", "\n".join(["# Performance\n", *made, ""]))
    if args.into is not None:
        write(args.into, placed(args.into.read_text("utf-8"), MARK, "\n".join(made)))
    for line in made:
        out.line(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
