"""What slabs are made of: memory as torch tensors, and the files of the Far tier."""

from __future__ import annotations

import os

import torch

from kvstrata._C import Store
from kvstrata.config import MachineError


def taken(nbytes: int, device: torch.device) -> torch.Tensor:
    """u8 [nbytes]. MachineError where there is no such memory."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise MachineError(f"slab: no memory for {nbytes} bytes on {device}: {error}") from error


def close(store: Store, files: dict[tuple[int, int], tuple[int, int]]) -> None:
    """Descriptors and bytes by slab: the space of files without a name is free at once. Nothing is read any more."""
    store.stop_reading()
    while files:
        os.close(files.popitem()[1][0])
