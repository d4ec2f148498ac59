"""Write-once files of rows indexed by digest: the storage of the feature caches.

A shard is a safetensors file with `hashes` (n, 32) bytes, other tensors with n rows each, and a checksum. Truncated or
damaged shards are deleted, since their content can be computed again. A shard with a valid checksum is not checked
again while its file does not change. The indexes of many shards are files too, memory-mapped like the shards, and pages
that were read are given back: memory does not grow with the number of rows.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.file_notes import FileNotes, file_mark, settled
from al_pipeline.files import sha256_bytes, write_bytes

_OTHER_FILES = 256
"""Files that a process may have open besides shards, about."""
Digests = NDArray[np.uint8]
"""SHA-256 digests as raw bytes, (n, 32)."""
Tensors = Mapping[str, NDArray[Any]]

SUFFIX = ".safetensors"
INDEX_PREFIX = ".index-"
"""Prefix of the names of index files."""
INDEXED = 128
"""An index file covers so many shards; shards that are not in one are indexed in memory."""
_DTYPES = {"F32": np.float32, "U8": np.uint8, "I32": np.int32, "U64": np.uint64}


@dataclass(frozen=True)
class HashIndex:
    """The keys of digests in sorted order, each with its row."""

    keys: NDArray[np.uint64]
    """The first 8 bytes of each digest."""
    rows: NDArray[np.integer[Any]]
    first: int = 0
    """Added to `rows`."""

    def find(self, digests: Digests, digests_at: Callable[[NDArray[np.int64]], Digests]) -> NDArray[np.int64]:
        """The row of each digest, (n,); -1 for an unknown digest. `digests_at`: the digests of some rows."""
        found = np.full(len(digests), -1, np.int64)
        keys = _keys(digests)
        open_ = np.argsort(keys)
        at = np.searchsorted(self.keys, keys[open_])
        while len(open_):
            inside = at < len(self.keys)
            open_, at = open_[inside], at[inside]
            alike = self.keys[at] == keys[open_]
            open_, at = open_[alike], at[alike]
            rows = self.rows[at].astype(np.int64) + self.first
            same = (digests_at(rows) == digests[open_]).all(axis=1)
            found[open_[same]] = rows[same]
            open_, at = open_[~same], at[~same] + 1  # another digest with the same first 8 bytes: try the next
        return found


@dataclass(frozen=True, slots=True)
class Shard:
    """An opened shard: its tensors, memory-mapped."""

    name: str
    tensors: Tensors
    checksum: str
    mapped: mmap.mmap = field(repr=False)

    def __len__(self) -> int:
        return len(self.tensors["hashes"])

    def give_back(self) -> None:
        """Unmap the pages that were read; they are read again, mostly from the kernel's cache, when needed."""
        with contextlib.suppress(AttributeError, OSError):  # a system without it keeps them
            self.mapped.madvise(mmap.MADV_DONTNEED)


class Shards:
    """The shards in one folder, opened on first use. `fits` tells whether the tensors of a file are a valid shard."""

    def __init__(self, folder: Path, fits: Callable[[Tensors], bool]) -> None:
        self._folder = folder
        self._fits = fits
        self._opened: list[Shard] | None = None
        self._starts: list[int] = []
        """The first row of each shard."""
        self._indexes: list[HashIndex] = []
        """Index files, then indexes in memory, each less than half as long as the one before, so that adding is cheap.
        """
        self._filed = 0
        """The number of shards that index files cover: the first ones."""
        self._index_files: list[Shard] = []
        """The files of the first indexes."""
        self._last = 0
        """The index in which the last digests were found: the next ones are mostly there, too."""
        self._used: list[Shard] = []
        """Shards whose tensors the last caller of `split` may hold."""
        self._written: list[tuple[str, list[int], str]] = []
        """Path, mark and checksum of files that this process has written and read back."""

    def __len__(self) -> int:
        return sum(map(len, self.shards()))

    def shards(self) -> list[Shard]:
        """All shards, those covered by index files first, else in the order in which they were written."""
        if self._opened is None:
            self._opened = []
            self._read_all(self._opened)
            self._file_indexes()
            for number in range(self._filed, len(self._opened)):
                self._index(number)
        return self._opened

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """The row of each digest, numbered across all shards, (n,); -1 for an unknown digest."""
        self.shards()
        found = np.full(len(digests), -1, np.int64)
        indexes = self._indexes
        last = self._last if self._last < len(indexes) else 0
        for number in [*range(last, len(indexes)), *range(last)]:
            open_ = np.flatnonzero(found < 0)
            if len(open_) == 0:
                break
            found[open_] = rows = indexes[number].find(digests[open_], self._digests)
            unused = number
            if (rows >= 0).any():
                unused, self._last = self._last, number
            if unused != self._last and unused < self._files:
                self._index_files[unused].give_back()
        return found

    @property
    def _files(self) -> int:
        return len(self._index_files)

    def _digests(self, rows: NDArray[np.int64]) -> Digests:
        found = np.empty((len(rows), 32), np.uint8)
        for shard, places, own in self.split(rows):
            found[places] = shard["hashes"][own]
        return found

    def split(self, rows: NDArray[np.int64]) -> Iterator[tuple[Tensors, NDArray[np.intp], NDArray[np.int64]]]:
        """For each shard with some of `rows`: its tensors, positions in `rows`, and row numbers within the shard."""
        opened = self.shards()
        for shard in self._used:
            shard.give_back()
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        numbers = np.searchsorted(self._starts, sorted_rows, side="right") - 1
        bounds = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(rows)]
        chosen = [int(numbers[start]) for start in bounds[:-1]]
        self._used = [opened[number] for number in chosen]
        for number, start, stop in zip(chosen, bounds, bounds[1:], strict=False):
            places = order[start:stop]
            yield opened[number].tensors, places, rows[places] - self._starts[number]
            opened[number].give_back()  # a caller may still hold its tensors, which are then read again

    def add(self, tensors: Tensors) -> None:
        """Write a shard atomically. Raises OSError if reading it back gives something else."""
        data = shard_bytes(tensors)
        path = self._folder / shard_name(data)
        shards, start = self.shards(), len(self)
        write_bytes(path, data)
        mark, shard = file_mark(path), _open_shard(path)
        if shard is None or not np.array_equal(np.frombuffer(shard.mapped, np.uint8), np.frombuffer(data, np.uint8)):
            raise OSError(f"reading {path} back gave other content than was written; check the disk")
        self._written.append((_key(path), mark, shard.checksum))
        shard.give_back()
        shards.append(shard)
        self._starts.append(start)
        self._index(len(shards) - 1)
        if len(shards) - self._filed >= INDEXED:
            self._file_indexes()

    def _index(self, number: int) -> None:
        """Index a shard in memory."""
        shard = self.shards()[number]
        keys = _keys(shard.tensors["hashes"])
        order = np.argsort(keys, kind="stable")
        self._indexes.append(HashIndex(keys[order], (order + self._starts[number]).astype(np.int64)))
        shard.give_back()
        while len(self._indexes) - self._files > 1 and (len(self._indexes[-2].keys) < 2 * len(self._indexes[-1].keys)):
            self._indexes[-2:] = [_merged(*self._indexes[-2:])]

    def _file_indexes(self) -> None:
        """Write index files as long as there are enough shards for one; they replace the indexes in memory."""
        shards = self.shards()
        while len(shards) - self._filed >= INDEXED:
            some = shards[self._filed : self._filed + INDEXED]
            index = read_shard(_write_index(self._folder, some))
            if index is None:
                return  # the disk gives something else back: they stay indexed in memory
            del self._indexes[self._files :]
            self._use(index, INDEXED)

    def _use(self, index: Shard, shards: int) -> None:
        """Use an index file, of so many shards, after those in use."""
        index.give_back()
        self._indexes.append(HashIndex(index.tensors["keys"], index.tensors["rows"], self._starts[self._filed]))
        self._index_files.append(index)
        self._filed += shards

    def remember_written(self) -> None:
        """Remember that the files written by this process are intact: the next one need not check them.

        Those of the last moment are remembered by a later call: another write might leave their times unchanged.
        """
        notes, later = FileNotes(_notes_of(self._folder)), []
        for key, mark, checksum in self._written:
            if not settled(mark):
                later.append((key, mark, checksum))
                continue
            with contextlib.suppress(OSError):
                if file_mark(Path(key)) == mark:
                    notes.remember(key, mark, checksum)
        notes.save()
        self._written = later

    def _read_all(self, opened: list[Shard]) -> None:
        """Add the valid shards to `opened`, use the index files of some; delete what is damaged or of no use."""
        folder = Path(os.path.realpath(self._folder))
        notes = FileNotes(_notes_of(folder))
        found: list[tuple[int, str, Shard]] = []
        _allow_open(len(os.listdir(folder)) if folder.is_dir() else 0)
        for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):
                shard, written = read_shard(path, notes), path.stat().st_mtime_ns
                if shard is not None and self._fits(shard.tensors):
                    found.append((written, path.name, shard))
                    shard.give_back()
                    continue
            path.unlink(missing_ok=True)
        unfiled = {name: shard for _, name, shard in sorted(found, key=lambda one: one[:2])}
        filed: list[tuple[Shard, list[Shard]]] = []
        for path in sorted(folder.glob(f"{INDEX_PREFIX}*{SUFFIX}")):
            index = read_shard(path, notes)
            names = [] if index is None else _names_in(index)
            some = [unfiled[name] for name in dict.fromkeys(names) if name in unfiled]
            if index is None or len(some) < len(names) or not _fits_index(index, some):
                path.unlink(missing_ok=True)
                continue
            filed.append((index, [unfiled.pop(name) for name in names]))
        notes.save()
        opened += [*(shard for _, some in filed for shard in some), *unfiled.values()]
        self._starts = [0, *accumulate(map(len, opened))][:-1]
        for index, some in filed:
            self._use(index, len(some))


def shard_name(data: bytes) -> str:
    """The name of the file of a shard: it says what the shard holds."""
    return f"{sha256_bytes(data)[:32]}{SUFFIX}"


def shard_bytes(tensors: Tensors) -> bytes:
    """A safetensors file with a checksum of its tensors (float32, int32, uint8 or uint64)."""
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return save(whole, {"crc32": _checksum(whole)})


def read_shard(path: Path, notes: FileNotes | None = None) -> Shard | None:
    """A file of `shard_bytes`, memory-mapped; None for a missing, truncated or damaged file.

    `notes`: remembers which files have a valid checksum.
    """
    try:
        mark = file_mark(path)
    except FileNotFoundError:
        return None  # another process found it damaged and deleted it
    found = _open_shard(path)
    if found is None or (notes is not None and notes.known(_key(path), mark) == found.checksum):
        return found
    if _checksum(found.tensors) != found.checksum:
        return None
    if notes is not None and settled(mark):
        notes.remember(_key(path), mark, found.checksum)
    return found


def _open_shard(path: Path) -> Shard | None:
    """A file of `shard_bytes`, memory-mapped, without comparing its checksum; None for one of another form."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tensors, expected = _parsed(np.frombuffer(mapped, np.uint8))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Shard(path.name, tensors, expected, mapped)


def shard_tensors(data: bytes) -> dict[str, NDArray[Any]] | None:
    """The tensors in the bytes of `shard_bytes`; None if they are truncated or damaged."""
    try:
        found, expected = _parsed(np.frombuffer(data, np.uint8))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if _checksum(found) == expected else None


def digest_rows(hashes: list[str]) -> Digests:
    """Hex hashes as bytes, (n, 32). Raises ValueError if one is not a SHA-256 in hex."""
    wrong = next((name for name in hashes if len(name) != 64), None)
    if wrong is not None:
        raise ValueError(f"not a SHA-256 in hex: {wrong!r}")
    raw = bytes.fromhex("".join(hashes))
    if len(raw) != 32 * len(hashes):  # fromhex skips whitespace
        raise ValueError("not a SHA-256 in hex: one of the hashes contains blanks")
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)


def _parsed(data: NDArray[np.uint8]) -> tuple[dict[str, NDArray[Any]], str]:
    """The tensors of a shard and the checksum that it names. Raises ValueError, KeyError or TypeError if it is none."""
    size = int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size].tobytes())
    body = data[8 + size :]
    expected = header.pop("__metadata__")["crc32"]
    found = {name: _tensor(body, entry) for name, entry in header.items()}
    if len(body) != sum(tensor.nbytes for tensor in found.values()):
        raise ValueError("not the length that its header says")
    return found, expected


def _checksum(tensors: Tensors) -> str:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].data, found)
    return f"{found:08x}"


def _tensor(body: NDArray[np.uint8], entry: dict[str, Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    return body[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _write_index(folder: Path, shards: Sequence[Shard]) -> Path:
    """Write an index file of `shards`, and return its path."""
    keys = np.concatenate([_keys(shard.tensors["hashes"]) for shard in shards])
    for shard in shards:
        shard.give_back()
    order = np.argsort(keys, kind="stable")
    names = "\n".join(shard.name for shard in shards).encode()
    tensors = {"keys": keys[order], "rows": order.astype(np.int32), "names": np.frombuffer(names, np.uint8)}
    path = folder / f"{INDEX_PREFIX}{sha256_bytes(names)[:32]}{SUFFIX}"
    write_bytes(path, shard_bytes(tensors))
    return path


def _names_in(index: Shard) -> list[str]:
    """The names of the shards that an index file covers."""
    names = index.tensors.get("names")
    return [] if names is None else names.tobytes().decode(errors="replace").split("\n")


def _fits_index(index: Shard, shards: Sequence[Shard]) -> bool:
    """Whether a file is an index of just these shards."""
    rows = (sum(map(len, shards)),)
    tensors = index.tensors
    return (
        bool(shards)
        and tensors.keys() == {"keys", "rows", "names"}
        and tensors["keys"].shape == tensors["rows"].shape == rows
    )


def _allow_open(files: int) -> None:
    """Raise this process's limit of open files, as far as it may: a memory-mapped file counts as one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * files + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _notes_of(folder: Path) -> Path:
    return Path(os.path.realpath(folder)) / ".notes"


def _key(path: Path) -> str:
    """The key of a file in the notes."""
    return os.path.realpath(path)


def _merged(first: HashIndex, second: HashIndex) -> HashIndex:
    keys = np.concatenate([first.keys, second.keys])
    order = np.argsort(keys, kind="stable")
    return HashIndex(keys[order], np.concatenate([first.rows, second.rows])[order])


def _keys(digests: Digests) -> NDArray[np.uint64]:
    """The first 8 bytes of each digest as a number."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)
