"""``Far``: a cheaper tier for pages. On the CPU, files without a name, which end with the process."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvstrata.budget.sizes import size
from kvstrata.config import MachineError

MAX_TIMEOUT = 86400.0
"""Seconds."""


@dataclass(frozen=True)
class Far:
    """A Far tier of at most ``limit`` bytes ("64GiB" or an int; None: what the disk holds) in files of the folder ``path``
    (None: the system's for temporary files).

    Where it is full, or the disk fails, a prompt is refused and withdrawn; plans after decoded tokens are put off, which then
    stay Near as long as there is room (``report().counts``: "plans put off", of them "plans failed").

    A step of one token, and one that reads all, goes on while the disk brings what the system does not hold in memory: two
    threads read it, beside whose memory, some pages, no limit counts. timeout: seconds that a page may take, from when it is
    waited for; then the step fails.

    The files have no name: nothing is left behind however the process ends. ValueError for a limit below 1, a path that is no
    folder or a timeout that is not above 0.
    """

    limit: int | str | None = None
    path: str | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        size("Far: limit", self.limit, least=1)
        if self.path is not None and not Path(self.path).is_dir():
            raise ValueError(f"Far: path is {self.path!r}, expected an existing folder")
        if not 0.0 < self.timeout <= MAX_TIMEOUT:
            raise ValueError(f"Far: timeout is {self.timeout}, expected seconds above 0, at most {MAX_TIMEOUT}")

    @property
    def bytes(self) -> int | None:
        """The limit in bytes."""
        return size("Far: limit", self.limit, least=1)

    def open(self, size: int) -> int:
        """A file of ``size`` bytes whose space is there: its descriptor. MachineError with its reason."""
        folder = tempfile.gettempdir() if self.path is None else self.path
        try:
            file = _nameless(folder)
        except OSError as error:
            raise MachineError(f"far tier: no file can be made in {folder}: {error}") from error
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            os.close(file)
            raise MachineError(f"far tier: {folder} has no room for {size} bytes: {error}") from error
        return file


def _nameless(folder: str) -> int:
    """A file that no folder lists."""
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            pass  # some file systems have none
    file, name = tempfile.mkstemp(prefix="kvstrata-", dir=folder)
    os.unlink(name)
    return file
