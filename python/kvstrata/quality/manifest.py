"""The manifest of a run: what a reader needs to repeat it. And how its files are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvstrata import __version__
from kvstrata.backend import processor

MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def of(config: dict[str, Any], packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, machine, configuration."""
    versions = {"kvstrata": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"schema": 1, "config": config, "versions": versions, "machine": machine, "commit": _commit()}


def settle(folder: Path, config: dict[str, Any], packages: Sequence[str] = PACKAGES) -> None:
    """Writes the manifest of a new run into its folder. ValueError if that holds a run of another configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.exists():
        write(path, json.dumps(of(config, packages), indent=2) + "\n")
        return
    held = json.loads(path.read_text())["config"]
    other = [k for k in config if held.get(k) != config[k]]
    if other:
        said = ", ".join(f"{k}: {held.get(k)!r}, not {config[k]!r}" for k in other)
        raise ValueError(f"{folder} holds a run of another configuration ({said}): name another folder")


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file of records; one that a kill cut short is cut off the file. None yet: no lines."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write(path, whole)
    return whole.splitlines()


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
