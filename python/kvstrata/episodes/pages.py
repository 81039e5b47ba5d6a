"""Pages on disk: which of a sequence's pages some file holds already, the files of those that none does, and the way back.

A page is known by the sha256 of its payload and positions: ids of pages are used again, what a page holds is not changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache as cached
from functools import lru_cache
from io import FileIO
from typing import NamedTuple

import torch
from torch import Tensor

from kvstrata import stored
from kvstrata.adopted import PageFile, checksums
from kvstrata.cache import Cache
from kvstrata.config import SLOTS
from kvstrata.episodes.folder import Facts, Folder
from kvstrata.episodes.tensors import Described, TensorFile, data, head
from kvstrata.policy.base import LESSER_HALF, PENDING
from kvstrata.stored import StoredRow

BLOCK = 256
"""Pages that are copied out at a time."""
MOST_FILES = 64
"""Beyond so many files of pages, the smaller half is joined."""
HASH = 32
COLUMNS = 5
"""Of an entry: file, kind, place in the file among pages of its kind, alive, set."""

Key = tuple[str, bytes]
"""Kind (:func:`kvstrata.stored.kinds`) and hash of a page."""
Place = tuple[str, int]
"""File, and place among its pages of one kind."""


class Held(NamedTuple):
    """A page of a sequence: number of its row, its entry there, its set."""

    row: int
    entry: int
    tag: int
    key: Key


class PageFiles:
    """The pages of one sequence, and the files that hold some of them.

    files: those there are, with their bytes. After :meth:`write`, the names of those that hold all.
    """

    def __init__(self, cache: Cache, seq: int, folder: Folder, files: Mapping[str, int]) -> None:
        self._cache = cache
        self._seq = seq
        self._folder = folder
        self._places = stored.places(cache)
        self._kinds = stored.kinds(cache)
        self.rows = [stored.row_of(cache, seq, *place) for place in self._places]
        self._held = [page for number in range(len(self.rows)) for page in self._look(number)]
        self._there = self._known(files)

    def write(self, generation: int, facts: Facts) -> None:
        """The files of pages that no file holds. facts: of the files that are written."""
        new: dict[int, dict[Key, Held]] = defaultdict(dict)
        for page in self._held:
            if page.key not in self._there:
                new[page.tag].setdefault(page.key, page)
        given: set[Key] = set()
        for tag in sorted(new):
            pages = {key: page for key, page in new[tag].items() if key not in given}
            given |= set(pages)
            if pages:
                name = f"pages-{generation}-{'pending' if tag == PENDING else tag}.safetensors"
                self._books = hashlib.sha256()
                self._folder.write(name, self._parts(name, pages), facts)
                facts[name]["books"] = self._books.hexdigest()

    @property
    def files(self) -> list[str]:
        """Those that hold a page of the sequence."""
        return sorted({file for file, _ in self._there.values()})

    @property
    def kinds(self) -> list[str]:
        return self._kinds

    def entries(self) -> Tensor:
        """Of all rows, one behind the other: i32 [entries, 5], file and kind by their numbers in ``files`` and ``kinds``."""
        numbers = {name: i for i, name in enumerate(self.files)}
        found = []
        for page in self._held:
            file, place = self._there[page.key]
            row, e = self.rows[page.row], page.entry
            found.append((numbers[file], row.pools[e], place, row.alive[e], row.sets[e]))
        return torch.tensor(found, dtype=torch.int32).view(-1, COLUMNS)

    # --- what is there ----------------------------------------------------------------------------------------------------

    def _look(self, number: int) -> Iterator[Held]:
        row = self.rows[number]
        keys: dict[int, Key] = {}
        for pool in sorted(set(row.pools)):
            for entries, payload, positions in self._blocks(number, [e for e, p in enumerate(row.pools) if p == pool]):
                for entry, page, at in zip(entries, payload.numpy(), positions.numpy(), strict=True):
                    content = hashlib.sha256(page)
                    content.update(at)
                    keys[entry] = self._kinds[pool], content.digest()
        for entry, tag in enumerate(row.sets):
            yield Held(number, entry, tag if tag == PENDING else tag & ~LESSER_HALF, keys[entry])

    def _blocks(self, number: int, entries: Sequence[int]) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
        """Pages of one row and pool."""
        for first in range(0, len(entries), BLOCK):
            block = entries[first : first + BLOCK]
            pool = self.rows[number].pools[block[0]]
            yield block, *stored.pages_of(self._cache, self._seq, *self._places[number], block, pool)

    def _known(self, files: Mapping[str, int]) -> dict[Key, Place]:
        """Where the sequence's pages are, in files that are kept: those more than half of whose pages are of the sequence, and
        not more than MOST_FILES. One that is gone or of another size holds none."""
        wanted = {page.key for page in self._held}
        found: dict[str, dict[Key, Place]] = {}
        total: Counter[str] = Counter()
        taken: set[Key] = set()
        for file in sorted(files, key=_generation):
            found[file] = {}
            if not self._folder.has(file, files[file]):
                continue
            for key, place in hashes(self._folder, file):
                total[file] += 1
                if key in wanted and key not in taken:
                    taken.add(key)
                    found[file][key] = file, place
        kept = [file for file in found if 2 * len(found[file]) >= max(total[file], 1)]
        if len(kept) > MOST_FILES:
            kept = sorted(kept, key=lambda file: (-len(found[file]), file))[: MOST_FILES // 2]
        return {key: place for file in kept for key, place in found[file].items()}

    # --- writing ----------------------------------------------------------------------------------------------------------

    def _parts(self, name: str, pages: dict[Key, Held]) -> Iterator[bytes | memoryview]:
        """A file of these pages, by kind; notes their places."""
        by_kind: dict[int, list[tuple[Key, Held]]] = defaultdict(list)
        for key, page in pages.items():
            by_kind[self.rows[page.row].pools[page.entry]].append((key, page))
        described: dict[str, Described] = {}
        for pool, some in by_kind.items():
            kind, n = self._kinds[pool], len(some)
            described[f"{kind}.payload"] = torch.uint8, (n, stored.page_bytes(self._cache, pool))
            described[f"{kind}.positions"] = torch.int32, (n, SLOTS)
            described[f"{kind}.sha256"] = torch.uint8, (n, HASH)
            described[f"{kind}.sums"] = torch.int64, (n,)
        yield self._noted(head(described))
        for some in by_kind.values():
            at, sums = [], []
            for number, entries in _by_row(page for _, page in some):
                for _, payload, positions in self._blocks(number, entries):
                    at.append(positions)
                    sums.append(checksums(payload))
                    yield data(payload)
            yield self._noted(data(torch.cat(at)))
            yield self._noted(b"".join(content for (_, content), _ in some))
            yield self._noted(data(torch.cat(sums)))
            self._there |= {key: (name, i) for i, (key, _) in enumerate(some)}

    def _noted(self, part: bytes | memoryview) -> bytes | memoryview:
        """What is not payload, by which the file is known before pages are read."""
        self._books.update(part)
        return part


def _generation(file: str) -> tuple[int, str]:
    return int(file.split("-")[1].split(".")[0]), file


def _by_row(pages: Iterable[Held]) -> Iterator[tuple[int, list[int]]]:
    """Entries of consecutive pages of one row."""
    number, entries = -1, list[int]()
    for page in pages:
        if page.row != number and entries:
            yield number, entries
            entries = []
        number = page.row
        entries.append(page.entry)
    yield number, entries


def hashes(folder: Folder, file: str) -> Iterator[tuple[Key, int]]:
    """Keys and places of the pages of a file. Not checked: a wrong one is that of no page."""
    with FileIO(str(folder.path / file)) as opened:
        tensors = TensorFile(opened)
        for name in tensors.names:
            kind, _, what = name.rpartition(".")
            if what == "sha256":
                content = bytes(data(tensors.tensor(name, None, HASH)))
                for place in range(len(content) // HASH):
                    yield (kind, content[place * HASH : (place + 1) * HASH]), place


# --- the way back -----------------------------------------------------------------------------------------------------------


class Shelf:
    """Rows as files hold them: for :func:`kvstrata.stored.restore`.

    cache: of the same shape and policy as that of the pages; files: open, as ``entries`` numbers them; check(i): asked before
    the first page of a file is read here, pages that stay there have checksums; kinds: as files; entries: i32 [entries, 5] of
    all rows; rows: i64 [rows, 3], of each entries, those sealed, and 0, or 1 where its centre is frozen, 2 with means, which
    are f32 [D] each in ``means``. RuntimeError for what does not fit together.
    """

    def __init__(
        self,
        cache: Cache,
        files: Sequence[TensorFile],
        check: Callable[[int], None],
        kinds: Sequence[str],
        entries: Tensor,
        rows: Tensor,
        means: Tensor,
    ) -> None:
        self._files = files
        self._check = cached(check)
        self._kinds = kinds
        self._entries = entries
        there = stored.kinds(cache)
        lacking = sorted(set(kinds) - set(there))
        if lacking or int(rows[:, 0].sum()) != len(entries):
            raise RuntimeError(
                f"pages: kinds {kinds} and {int(rows[:, 0].sum())} entries, expected some of {there} and {len(entries)}"
            )
        if len(entries):
            low, high = entries.amin(0).tolist(), entries.amax(0).tolist()
            fits = high[0] < len(files) and high[1] < len(kinds) and max(high[3:]) <= PENDING
            if min(low) < 0 or not fits:
                raise RuntimeError(f"pages: entries are {low} to {high}, of {len(files)} files and {len(kinds)} kinds")
        self._lying = cached(self._opened)
        self._table = lru_cache(1)(self._row)
        self._pools = [there.index(kind) for kind in kinds]
        self._bytes = [stored.page_bytes(cache, pool) for pool in self._pools]
        self._firsts = [0, *rows[:, 0].cumsum(0).tolist()]
        self.rows: list[StoredRow] = []
        used = 0
        for number, (layer, _) in enumerate(stored.places(cache)):
            _, sealed, frozen = rows[number].tolist()
            dim = cache.shape.layers[layer].head_dim if frozen == 2 else 0
            mean = tuple(means[used : used + dim].tolist())
            used += dim
            table = entries[self._firsts[number] : self._firsts[number + 1]].T.tolist()
            pools = [self._pools[kind] for kind in table[1]]
            self.rows.append(StoredRow(pools, table[3], table[4], sealed, frozen > 0, mean))

    def pages(self, number: int, entries: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Payload u8 of some entries and positions i32 [entries, 16] of one row."""
        table = self._table(number)
        wanted = [table[e] for e in entries]
        payload = torch.empty(sum(self._bytes[kind] for _, kind, *_ in wanted), dtype=torch.uint8)
        positions = torch.empty(len(table), SLOTS, dtype=torch.int32)
        for first, n, (file, kind, place) in _runs(table):
            self._files[file].rows(f"{self._kinds[kind]}.positions", place, positions[first : first + n])
        at = 0
        for _, n, (file, kind, place) in _runs(wanted):
            self._check(file)
            size = n * self._bytes[kind]
            self._files[file].rows(f"{self._kinds[kind]}.payload", place, payload[at : at + size].view(n, -1))
            at += size
        return payload, positions

    def lies(self, number: int, entry: int) -> tuple[PageFile, int]:
        """The file that holds a page, and its place there."""
        file, kind, place, *_ = self._table(number)[entry]
        found = self._lying(file, kind)
        if place >= len(found.sums):
            raise RuntimeError(f"{found.name}: it holds {len(found.sums)} pages, expected one at {place}")
        return found, place

    def _row(self, number: int) -> list[list[int]]:
        """Entries of one row."""
        found: list[list[int]] = self._entries[self._firsts[number] : self._firsts[number + 1]].tolist()
        return found

    def _opened(self, file: int, kind: int) -> PageFile:
        tensors, name = self._files[file], self._kinds[kind]
        positions = tensors.tensor(f"{name}.positions", None, SLOTS)
        n = len(positions)
        offset, sums = tensors.offset(f"{name}.payload", n, self._bytes[kind]), tensors.tensor(f"{name}.sums", n)
        if positions.dtype != torch.int32 or sums.dtype != torch.int64:
            raise RuntimeError(f"{tensors.name}: {name} has positions {positions.dtype}, sums {sums.dtype}")
        return PageFile(tensors.name, tensors.descriptor, offset, positions, sums)


def _runs(table: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Entries whose pages lie one behind the other: the first, how many, and (file, kind, place) of the first."""
    first = 0
    while first < len(table):
        file, kind, place = table[first][:3]
        n = 1
        while first + n < len(table) and list(table[first + n][:3]) == [file, kind, place + n]:
            n += 1
        yield first, n, (file, kind, place)
        first += n
