"""What a reader needs to repeat a run."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvstrata import __version__
from kvstrata.backend import processor


def of(config: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, machine, configuration."""
    versions = {"kvstrata": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"schema": 1, "config": config, "versions": versions, "machine": machine, "commit": _commit()}


def _commit() -> str | None:
    """Of the checkout that this package runs from, if it is one."""
    here = Path(__file__).parent
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return said.stdout.strip() or None if said.returncode == 0 else None
