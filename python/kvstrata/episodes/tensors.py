"""Files of tensors in the safetensors format, written in parts and read in rows, so that pages need no second copy."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from math import prod

import torch
from torch import Tensor

TYPES = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in TYPES.items()}
MOST_HEAD = 1 << 20
"""Bytes of a head, at the most."""

Described = tuple[torch.dtype, Sequence[int]]


def head(tensors: Mapping[str, Described]) -> bytes:
    """What stands before the data of these tensors, which follow one behind the other in this order."""
    found, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + prod(shape) * dtype.itemsize
        found[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, not copied where it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def parts(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """A whole file."""
    described = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    return [head(described), *(data(t) for t in tensors.values() if t.numel())]


class TensorFile:
    """A file of tensors that is open for reading. RuntimeError, with the name, for one that is none."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._name = str(file.name)
        self._size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(MOST_HEAD, self._size - 8):
            raise RuntimeError(f"{self._name}: its head has {length} bytes, expected at most {self._size - 8}")
        self._data = 8 + length
        try:
            self._tensors = {
                name: (TYPES[t["dtype"]], tuple(map(int, t["shape"])), int(t["data_offsets"][0]))
                for name, t in json.loads(self._read(8, length)).items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise RuntimeError(f"{self._name}: its head is {error!r}, expected that of tensors") from error
        for name, (dtype, shape, at) in self._tensors.items():
            if min(shape, default=0) < 0 or not 0 <= at <= self._size - self._data - prod(shape) * dtype.itemsize:
                raise RuntimeError(f"{self._name}: {name} {list(shape)} lies beyond its {self._size} bytes")

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def name(self) -> str:
        """Of the file."""
        return self._name

    @property
    def descriptor(self) -> int:
        """Of the file, as long as that is open."""
        return self._file.fileno()

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """One of them, whole. shape: as it must be, None: any."""
        dtype, found, at = self._of(name, shape)
        out = torch.empty(found, dtype=dtype)
        self._fill(out, self._data + at)
        return out

    def offset(self, name: str, *shape: int | None) -> int:
        """Bytes of the file before one of them. shape: as of :meth:`tensor`."""
        return self._data + self._of(name, shape)[2]

    def books(self, content: str) -> str:
        """sha256 of the file but for the tensors whose names end so."""
        seen = hashlib.sha256(self._read(0, self._data))
        at = self._data
        for name, (dtype, shape, first) in sorted(self._tensors.items(), key=lambda item: item[1][2]):
            size = prod(shape) * dtype.itemsize
            seen.update(
                self._read(at, max(0, self._data + first - at))
            )  # between tensors: nothing, as they were written
            if not name.endswith(content):
                seen.update(self._read(self._data + first, size))
            at = self._data + first + size
        seen.update(self._read(at, self._size - at))
        return seen.hexdigest()

    def rows(self, name: str, first: int, out: Tensor) -> None:
        """Rows from ``first`` on of one of them into ``out`` [n, ...], contiguous."""
        dtype, found, at = self._of(name, (None, *out.shape[1:]))
        if out.dtype != dtype or not 0 <= first <= found[0] - len(out):
            raise RuntimeError(
                f"{self._name}: {name} is {dtype} {list(found)}, expected {out.dtype} rows {first} to {first + len(out) - 1}"
            )
        self._fill(out, self._data + at + first * prod(found[1:]) * dtype.itemsize)

    def _of(self, name: str, shape: Sequence[int | None]) -> tuple[torch.dtype, tuple[int, ...], int]:
        found = self._tensors.get(name)
        if found is None:
            raise RuntimeError(f"{self._name}: there is no {name}, expected one beside {self.names}")
        fits = len(found[1]) == len(shape) and all(s in (None, n) for s, n in zip(shape, found[1], strict=True))
        if not fits:
            raise RuntimeError(f"{self._name}: {name} is {list(found[1])}, expected {list(shape)} (None: any)")
        return found

    def _fill(self, out: Tensor, at: int) -> None:
        if not out.numel():
            return
        to = data(out)
        done = 0
        while done < len(to):
            if not (n := os.preadv(self._file.fileno(), [to[done:]], at + done)):
                raise RuntimeError(f"{self._name}: it ends at {at + done} bytes, expected {at + len(to)}")
            done += n

    def _read(self, at: int, size: int) -> bytes:
        found = os.pread(self._file.fileno(), size, at)
        if len(found) != size:
            raise RuntimeError(f"{self._name}: it ends at {at + len(found)} bytes, expected {at + size}")
        return found
