"""A folder that is replaced as a whole: cut off at any moment, it is what it was, or what it became."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from kvstrata.testing import fault_point

FORMAT = 4
MANIFEST, WRITTEN, LOCK = "MANIFEST.json", "MANIFEST.tmp", "LOCK"
NAME = re.compile(r"(?:turns|index|pages)-(\d+)(?:-\w+)?\.(?:jsonl|safetensors)", re.ASCII)
REMEMBERED = 64
"""Manifests by which a conversation knows a folder as its own."""
PART = 1 << 20
"""Bytes read at a time."""

Facts = dict[str, dict[str, Any]]
"""bytes and sha256 of files, by name."""


@dataclass(frozen=True)
class Kept:
    """What a conversation was saved as, or loaded from. manifests: their sha256, the last ones; nbytes: of all files, at last;
    damaged: the manifest whose pages were not whole."""

    manifests: tuple[str, ...] = ()
    nbytes: int = 0
    damaged: str = ""

    def to(self, manifest: str) -> Kept:
        """With another one, that may be there from now on."""
        return replace(self, manifests=(*self.manifests, manifest)[-REMEMBERED:])


class Folder:
    """Files, and a manifest that names them with their sizes and hashes. Files are written under new names, and are there
    once a new manifest is; what that does not name goes then. Mode 0700."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    # --- the lock ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Makes the folder where there is none. ValueError for one of other files; RuntimeError while another has it open."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"save: {self.path} is a file, expected a folder, or none")
        if not self.path.exists():
            self.path.mkdir(mode=0o700)
            _sync_folder(self.path.absolute().parent)
        others = os.listdir(self.path)
        if others and LOCK not in others:
            raise ValueError(
                f"save: {self.path} holds {sorted(others)[0]!r}, expected a new folder or a conversation's"
            )
        os.chmod(self.path, 0o700)
        with self._locked(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX):
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """RuntimeError while another writes to it. A folder without a lock, a copy, has no writer."""
        if not (self.path / LOCK).exists():
            yield
            return
        with self._locked(os.O_RDONLY, fcntl.LOCK_SH):
            yield

    @contextmanager
    def _locked(self, flags: int, how: int) -> Iterator[None]:
        lock = os.open(self.path / LOCK, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(lock, how | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"{self.path}: it is open elsewhere, expected one writer at a time") from None
            yield
        finally:
            os.close(lock)

    # --- reading ----------------------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any] | None:
        """None where there is none. RuntimeError for a damaged one; ValueError for another format, and for a name that is no
        file of this folder."""
        path = self.path / MANIFEST
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = json.loads(text)
            whole = isinstance(found, dict) and encoded(found) == text
        except (ValueError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise RuntimeError(f"{path}: its content is damaged, expected one of the sha256 that it names")
        if found.get("format") != FORMAT:
            raise ValueError(f"load: format is {found.get('format')!r}, expected {FORMAT}")
        files = found.get("files")
        for name in files if isinstance(files, dict) else [files]:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(f"load: {path} names the file {name!r}, expected one of the folder, as turns-1.jsonl")
        return dict(found)

    def open(self, name: str, facts: Mapping[str, Any], *, whole: bool = True) -> FileIO:
        """A file whose bytes are those that the manifest speaks of; RuntimeError for any others. whole: without, it is of so
        many bytes, and :meth:`check` is the caller's."""
        path = self.path / name
        try:
            file = FileIO(path, opener=_no_link)
        except OSError as error:
            raise RuntimeError(f"{path}: {error.strerror}, expected a file of {facts.get('bytes')} bytes") from error
        found = os.fstat(file.fileno()).st_size
        if found != facts.get("bytes"):
            file.close()
            raise RuntimeError(f"{path}: it has {found} bytes, expected {facts.get('bytes')}")
        try:
            if whole:
                self.check(file, facts)
        except BaseException:
            file.close()
            raise
        return file

    @staticmethod
    def check(file: FileIO, facts: Mapping[str, Any]) -> None:
        """RuntimeError for a file of other bytes than the manifest speaks of."""
        seen = hashlib.sha256()
        file.seek(0)
        while part := file.read(PART):
            seen.update(part)
        if seen.hexdigest() != facts.get("sha256"):
            raise RuntimeError(f"{file.name!s}: its sha256 is {seen.hexdigest()}, expected {facts.get('sha256')}")
        file.seek(0)

    def has(self, name: str, size: int) -> bool:
        """Whether there is a file of so many bytes."""
        path = self.path / name
        return path.is_file() and path.stat().st_size == size

    # --- writing ----------------------------------------------------------------------------------------------------------

    def generation(self) -> int:
        """One that no file is of."""
        found = (NAME.fullmatch(name) for name in os.listdir(self.path))
        return 1 + max((int(match[1]) for match in found if match), default=0)

    @contextmanager
    def new(self) -> Iterator[Facts]:
        """Files written inside, as :meth:`write` notes them: they go again where that fails."""
        facts: Facts = {}
        try:
            yield facts
        except Exception:
            for name in (*facts, WRITTEN):
                with suppress(FileNotFoundError):
                    os.unlink(self.path / name)
            raise

    def write(self, name: str, parts: Iterable[bytes | memoryview], facts: Facts) -> None:
        """A new file, on disk as this returns."""
        size, seen = 0, hashlib.sha256()
        facts[name] = {}
        fd = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for part in parts:
                view = memoryview(part)
                _write(fd, view)
                seen.update(view)
                size += view.nbytes
            _sync(fd)
        finally:
            os.close(fd)
        facts[name] |= {"bytes": size, "sha256": seen.hexdigest()}

    def prepare(self, manifest: dict[str, Any]) -> str:
        """Writes what is to be the manifest. Returns its sha256."""
        _sync_folder(self.path)
        text = encoded(manifest)
        fd = os.open(self.path / WRITTEN, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _write(fd, memoryview(text))
            _sync(fd)
        finally:
            os.close(fd)
        return str(json.loads(text)["sha256"])

    def switch(self) -> None:
        """The prepared manifest is the manifest."""
        fault_point("disk.rename")
        os.rename(self.path / WRITTEN, self.path / MANIFEST)
        _sync_folder(self.path)

    def clean(self, files: Iterable[str]) -> None:
        """Files of other generations go."""
        for name in sorted({n for n in os.listdir(self.path) if NAME.fullmatch(n)} - set(files)):
            fault_point("disk.remove")
            os.unlink(self.path / name)


def encoded(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as text, with its own sha256 in it."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    plain = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    content["sha256"] = hashlib.sha256(plain.encode()).hexdigest()
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _sync(fd)
    finally:
        os.close(fd)


def _write(fd: int, view: memoryview) -> None:
    fault_point("disk.write")
    view = view.cast("B") if view.nbytes else view
    while view.nbytes:
        view = view[os.write(fd, view) :]


def _sync(fd: int) -> None:
    fault_point("disk.sync")
    os.fsync(fd)
