#!/usr/bin/env bash
# One session on a machine with a GPU, in under ten minutes: build, CUDA tests, benches, sanitizers.
#
#   bash bench/gpu_session.sh [RESULTS]        default: $OUT, else bench/results/<gpu>/<date>
#
# Needs nvcc, torch with CUDA, scikit-build-core, cmake, ninja, pybind11, pytest and rich already there, transformers for
# some steps: nothing is fetched, nothing is installed beside RESULTS. bench/session.py says what it does, step by step.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" bench/session.py "$@"
