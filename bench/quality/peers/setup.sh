#!/usr/bin/env bash
# Makes bench/quality/peers/.venv, in which kvpress_run.py runs: kvpress pins an older transformers than kvstrata's own.
# Done again it returns at once, unless constraints.txt has changed. PYTHON names the interpreter (3.11 or newer).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
pins=$here/constraints.txt
stamp=$venv/installed # a copy of the pins that were installed
if cmp -s "$pins" "$stamp"; then
  echo "peers: $venv is up to date"
  exit 0
fi

export PIP_CONSTRAINT=$pins PIP_BUILD_CONSTRAINT=$pins PIP_DISABLE_PIP_VERSION_CHECK=1
"${PYTHON:-python3}" -m venv "$venv"
# torch first, by exactly its version, before anything can pull in another.
"$venv/bin/python" -m pip install --quiet torch==2.13.0
"$venv/bin/python" -m pip install --quiet kvpress==0.5.5
"$venv/bin/python" -c "import kvpress"
cp "$pins" "$stamp"
echo "peers: installed in $venv"
