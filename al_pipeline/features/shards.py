"""Write-once files of rows indexed by digest: the storage of the feature caches.

A shard is a safetensors file with `hashes` (n, 32) bytes, other tensors with n rows each, and a checksum. Truncated or
damaged shards are deleted, since their content can be computed again. A shard with a valid checksum is not checked
again while its file does not change.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.file_notes import FileNotes, file_mark, settled
from al_pipeline.files import TEMPORARY_PREFIX, sha256_bytes, write_bytes

Digests = NDArray[np.uint8]
"""SHA-256 digests as raw bytes, (n, 32)."""
Tensors = Mapping[str, NDArray[Any]]

SUFFIX = ".safetensors"
_STALE_SECONDS = 24 * 3600
_DTYPES = {"F32": np.float32, "U8": np.uint8, "I32": np.int32}


@dataclass(frozen=True)
class HashIndex:
    """Digests in sorted order, each with its row."""

    keys: NDArray[np.uint64]
    """The first 8 bytes of each digest."""
    digests: Digests
    rows: NDArray[np.int64]

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """The row of each digest, (n,); -1 for an unknown digest."""
        found = np.full(len(digests), -1, np.int64)
        keys = _keys(digests)
        at = np.searchsorted(self.keys, keys)
        open_ = np.arange(len(digests))
        while len(open_):
            open_ = open_[at[open_] < len(self.keys)]
            open_ = open_[self.keys[at[open_]] == keys[open_]]
            same = (self.digests[at[open_]] == digests[open_]).all(axis=1)
            found[open_[same]] = self.rows[at[open_[same]]]
            open_ = open_[~same]  # another digest with the same first 8 bytes: try the next
            at[open_] += 1
        return found


class Shards:
    """The shards in one folder, opened on first use. `fits` tells whether the tensors of a file are a valid shard."""

    def __init__(self, folder: Path, fits: Callable[[Tensors], bool]) -> None:
        self._folder = folder
        self._fits = fits
        self._opened: list[Tensors] | None = None
        self._starts: list[int] = []
        """The first row of each shard."""
        self._indexes: list[HashIndex] = []
        """Indexes of the shards, each less than half as long as the one before, so that adding a shard is cheap."""

    def __len__(self) -> int:
        return sum(len(shard["hashes"]) for shard in self.shards())

    def shards(self) -> list[Tensors]:
        """The tensors of every shard, memory-mapped."""
        if self._opened is None:
            self._opened = self._read_all()
            sizes = [len(shard["hashes"]) for shard in self._opened]
            self._starts = [0, *accumulate(sizes)][:-1]
            if sizes:
                self._indexes = [_index(np.concatenate([shard["hashes"] for shard in self._opened]), 0)]
        return self._opened

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """The row of each digest, numbered across all shards, (n,); -1 for an unknown digest."""
        self.shards()
        found = np.full(len(digests), -1, np.int64)
        for index in self._indexes:
            open_ = np.flatnonzero(found < 0)
            found[open_] = index.find(digests[open_])
        return found

    def split(self, rows: NDArray[np.int64]) -> Iterator[tuple[Tensors, NDArray[np.intp], NDArray[np.int64]]]:
        """For each shard with some of `rows`: its tensors, positions in `rows`, and row numbers within the shard."""
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], [*self._starts, np.iinfo(np.int64).max])
        for number, shard in enumerate(self.shards()):
            places = order[bounds[number] : bounds[number + 1]]
            if len(places):
                yield shard, places, rows[places] - self._starts[number]

    def add(self, tensors: Tensors) -> None:
        """Write a shard atomically. Raises OSError if reading it back gives something else."""
        data = shard_bytes(tensors)
        path = self._folder / shard_name(data)
        shards, start = self.shards(), len(self)
        write_bytes(path, data)
        shard = read_shard(path)
        if shard is None:
            raise OSError(f"reading {path} back gave other content than was written; check the disk")
        shards.append(shard)
        self._starts.append(start)
        self._indexes.append(_index(shard["hashes"], start))
        while len(self._indexes) > 1 and len(self._indexes[-2].keys) < 2 * len(self._indexes[-1].keys):
            self._indexes[-2:] = [_merged(*self._indexes[-2:])]

    def remove_leftovers(self) -> None:
        """Delete temporary files that are more than a day old, left by killed writers."""
        for path in self._folder.glob(f"{TEMPORARY_PREFIX}*"):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                path.unlink(missing_ok=True)

    def _read_all(self) -> list[Tensors]:
        folder = Path(os.path.realpath(self._folder))
        notes = FileNotes(folder / ".notes")
        found: list[Tensors] = []
        for path in sorted(folder.glob(f"[!.]*{SUFFIX}")):
            shard = read_shard(path, notes)
            if shard is not None and self._fits(shard):
                found.append(shard)
            else:
                path.unlink(missing_ok=True)
        notes.save()
        return found


def shard_name(data: bytes) -> str:
    """The name of the file of a shard: it says what the shard holds."""
    return f"{sha256_bytes(data)[:32]}{SUFFIX}"


def shard_bytes(tensors: Tensors) -> bytes:
    """A safetensors file with a checksum of its tensors (float32, int32 or uint8)."""
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return save(whole, {"crc32": _checksum(whole)})


def read_shard(path: Path, notes: FileNotes | None = None) -> dict[str, NDArray[Any]] | None:
    """The tensors in a file of `shard_bytes`, memory-mapped; None for a missing, truncated or damaged file.

    `notes`: remembers which files have a valid checksum.
    """
    try:
        mark = file_mark(path)
        found, expected = _parsed(np.memmap(path, np.uint8, "r"))
        if notes is None or notes.known(str(path), mark) != expected:
            if _checksum(found) != expected:
                return None
            if notes is not None and settled(mark):
                notes.remember(str(path), mark, expected)
    except FileNotFoundError:
        return None  # another process found it damaged and deleted it
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return found


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


def _index(digests: Digests, start: int) -> HashIndex:
    keys = _keys(digests)
    order = np.argsort(keys, kind="stable")
    return HashIndex(keys[order], digests[order], order.astype(np.int64) + start)


def _merged(first: HashIndex, second: HashIndex) -> HashIndex:
    keys = np.concatenate([first.keys, second.keys])
    order = np.argsort(keys, kind="stable")
    return HashIndex(
        keys[order],
        np.concatenate([first.digests, second.digests])[order],
        np.concatenate([first.rows, second.rows])[order],
    )


def _keys(digests: Digests) -> NDArray[np.uint64]:
    """The first 8 bytes of each digest as a number."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)
