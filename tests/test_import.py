"""`import kvstrata` patches nothing, starts nothing, touches no GPU, and needs no transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, os, sys, threading
{before}
tasks = len(os.listdir("/proc/self/task"))
import kvstrata
print(json.dumps({{
    "modules": sorted(sys.modules),
    "threads": threading.active_count(),
    "new_tasks": len(os.listdir("/proc/self/task")) - tasks,
    "cuda": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(),
    "extra": {extra},
}}))
"""


def probe(before: str = "", extra: str = "None") -> dict:
    code = PROBE.format(before=before, extra=extra)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_alone_brings_no_transformers_and_no_gpu() -> None:
    seen = probe(extra="'kvstrata.registry' in sys.modules")  # which registers ops with torch
    heavy = {"transformers", "accelerate", "huggingface_hub", "matplotlib", "triton"} & set(seen["modules"])
    assert not heavy
    assert not seen["cuda"] and not seen["extra"]
    assert seen["threads"] == 1


def test_import_starts_no_thread() -> None:
    assert probe(before="import numpy, torch")["new_tasks"] == 0


def test_import_registers_no_attention_function() -> None:
    pytest.importorskip("transformers")
    registry = "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions"
    before = f"{registry}\nnames = sorted(functions.valid_keys())"
    extra = "[names, sorted(functions.valid_keys())]"
    names, after = probe(before, extra)["extra"]
    assert names == after


@pytest.mark.parametrize("module", ["kvstrata._C", "kvstrata"])
def test_import_without_torch(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['torch'] = None; import {module}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["budget", "policy", "recall", "episodes"])
def test_any_module_may_be_the_first(module: str) -> None:
    code = f"import kvstrata.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
