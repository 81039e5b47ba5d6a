#!/usr/bin/env bash
# One session on a machine with a GPU, in under ten minutes: build, CUDA tests, sanitizers, benches.
#
#   bash bench/gpu_session.sh [RESULTS]        default: bench/results/<gpu>/<date>
#
# Needs nvcc, torch with CUDA, scikit-build-core, pybind11 and pytest already there: nothing is fetched. Every step has
# its own time limit, and its outcome stands in RESULTS/session.json beside the versions it ran with. Any failed step
# fails the script, after the others have run. SANITIZED names the tests that the sanitizers run.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
short=$(tr '[:upper:]' '[:lower:]' <<<"$gpu" | grep -oE '(gh|gb|[ahblv])[0-9]{2,3}' | head -n 1 || true)
results=${1:-bench/results/${short:-gpu}/$(date +%F)}
mkdir -p "$results"
steps=$results/steps.tsv
: >"$steps"

# step NAME SECONDS COMMAND...: runs it under a limit, keeps its output and its exit status.
step() {
    local name=$1 limit=$2 status=0 began=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$results/$name.log" 2>&1 || status=$?
    tail -n 5 "$results/$name.log"
    printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - began))" >>"$steps"
}

sanitizer() {
    local tool=$1 tests=${SANITIZED:-"tests/cuda/test_merge.py -k 7-64"}
    # shellcheck disable=SC2086  # SANITIZED is a list of arguments
    step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -m cuda -p no:cacheprovider $tests
}

step install 240 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall \
    -C cmake.define.KVSTRATA_CUDA=on .
step tests 150 "$python" -m pytest -q -m cuda -rs tests
if command -v compute-sanitizer >/dev/null; then
    sanitizer memcheck
    sanitizer racecheck
else
    printf 'memcheck\tabsent\t0\nracecheck\tabsent\t0\n' >>"$steps"
fi
for bench in bench/cuda/*.py; do
    [ -e "$bench" ] || continue
    name=bench_$(basename "$bench" .py)
    step "$name" 60 "$python" "$bench" --json "$results/$name.json"
done

GPU=$gpu "$python" - "$results" <<'PYTHON'
import json, os, platform, subprocess, sys
from pathlib import Path

import torch


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


results = Path(sys.argv[1])
rows = [line.split("\t") for line in (results / "steps.tsv").read_text().splitlines()]
session = {
    "schema": 1,
    "run": {
        "gpu": os.environ["GPU"],
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version").splitlines()[-1:],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": said("git", "rev-parse", "HEAD"),
    },
    "steps": [{"name": n, "status": int(s) if s.isdigit() else s, "seconds": int(t)} for n, s, t in rows],
}
(results / "session.json").write_text(json.dumps(session, indent=2) + "\n")
(results / "steps.tsv").unlink()
failed = [row["name"] for row in session["steps"] if row["status"] not in (0, "absent")]
print(f"{len(rows) - len(failed)} of {len(rows)} steps passed", *(["failed:", *failed] if failed else []))
sys.exit(1 if failed else 0)
PYTHON
