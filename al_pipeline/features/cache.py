"""The cache of feature vectors: by the text's content hash, in one folder for each encoder fingerprint.

A shard is a safetensors file with `vectors` (n, d) float32, `hashes` (n, 32) bytes and a checksum of both. It is
written atomically and never changed; a truncated or damaged one is deleted and its texts are encoded again. The cache
may be deleted at any time.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.files import TEMPORARY_PREFIX, sha256_bytes, write_bytes

if TYPE_CHECKING:
    from al_pipeline.features.encoder import TextEncoder

Vectors = NDArray[np.float32]
Digests = NDArray[np.uint8]
"""Content hashes as raw bytes, (n, 32)."""

CHUNK = 4096
"""Texts in a shard: the most that a killed process has to repeat."""
_STALE_SECONDS = 24 * 3600
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class _Index:
    """Every cached hash in sorted order, with its row in the concatenation of all shards."""

    keys: NDArray[np.uint64]
    digests: Digests
    rows: NDArray[np.int64]

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """The row of each hash, (n,); -1 where it is not cached."""
        found = np.full(len(digests), -1, np.int64)
        keys = _keys(digests)
        at = np.searchsorted(self.keys, keys)
        open_ = np.arange(len(digests))
        while len(open_):
            open_ = open_[at[open_] < len(self.keys)]
            open_ = open_[self.keys[at[open_]] == keys[open_]]
            same = (self.digests[at[open_]] == digests[open_]).all(axis=1)
            found[open_[same]] = self.rows[at[open_[same]]]
            open_ = open_[~same]  # another hash with the same first 8 bytes: try the next
            at[open_] += 1
        return found


class FeatureCache:
    """Vectors by content hash (SHA-256 in hex), below one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, tuple[Digests, Vectors]] | None = None
        self._index: _Index | None = None
        self._starts: NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def dimension(self) -> int:
        """Length of a vector; 0 while the cache is empty."""
        return next((vectors.shape[1] for _, vectors in self._open().values()), 0)

    def __len__(self) -> int:
        return len(self._indexed().keys)

    def missing(self, hashes: Sequence[str]) -> list[str]:
        """Those of `hashes` that have no vector yet, each once, in their order."""
        found = self._indexed().find(_digests(hashes))
        return list(dict.fromkeys(hashes[row] for row in np.flatnonzero(found < 0)))

    def add(self, hashes: Sequence[str], vectors: Vectors) -> None:
        """Store `vectors` (n, d) under `hashes` atomically; known hashes are skipped.

        Raises ValueError where the numbers or the vectors' length do not fit, OSError where the disk does not read back
        what was written.
        """
        if len(hashes) != len(vectors):
            raise ValueError(f"{len(hashes)} hashes for {len(vectors)} vectors")
        wanted = set(self.missing(hashes))
        rows = []
        for row, name in enumerate(hashes):
            if name in wanted:
                rows.append(row)
                wanted.discard(name)
        if not rows:
            return
        if self.dimension not in (0, vectors.shape[1]):
            raise ValueError(f"vectors of length {vectors.shape[1]} in a cache of length {self.dimension}")
        data = _shard_bytes(_digests([hashes[row] for row in rows]), np.ascontiguousarray(vectors[rows], np.float32))
        path = self._folder / f"{sha256_bytes(data)[:32]}{_SUFFIX}"
        write_bytes(path, data)
        shard = _read_shard(path)
        if shard is None:
            raise OSError(f"{path} did not read back as it was written; check the disk")
        self._open()[path.name] = shard
        self._index = None

    def get(self, hashes: Sequence[str]) -> Vectors:
        """The vectors of `hashes`, (n, d), in their order. Raises KeyError for one that is not cached."""
        rows = self._indexed().find(_digests(hashes))
        if (rows < 0).any():
            raise KeyError(f"no vector for {hashes[int(np.flatnonzero(rows < 0)[0])]}; `ensure` it first")
        vectors = np.empty((len(rows), self.dimension), np.float32)
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], [*self._starts, np.iinfo(np.int64).max])
        for number, (_, shard) in enumerate(self._open().values()):
            here = order[bounds[number] : bounds[number + 1]]
            if len(here):
                vectors[here] = shard[rows[here] - self._starts[number]]
        return vectors

    def stream(self, hashes: Sequence[str], batch: int) -> Iterator[Vectors]:
        """The vectors of `hashes`, at most `batch` rows at a time."""
        for start in range(0, len(hashes), batch):
            yield self.get(hashes[start : start + batch])

    def remove_leftovers(self) -> None:
        """Delete temporary files that are more than a day old: writers were killed."""
        for path in self._folder.glob(f"{TEMPORARY_PREFIX}*"):
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                path.unlink(missing_ok=True)

    def _open(self) -> dict[str, tuple[Digests, Vectors]]:
        if self._shards is None:
            self._shards = {}
            length = 0
            for path in sorted(self._folder.glob(f"[!.]*{_SUFFIX}")):
                shard = _read_shard(path)
                if shard is None or length not in (0, shard[1].shape[1]):
                    path.unlink(missing_ok=True)
                    continue
                length = shard[1].shape[1]
                self._shards[path.name] = shard
        return self._shards

    def _indexed(self) -> _Index:
        if self._index is None:
            shards = list(self._open().values())
            sizes = [len(digests) for digests, _ in shards]
            self._starts = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
            digests = np.concatenate([np.zeros((0, 32), np.uint8), *(digests for digests, _ in shards)])
            keys = _keys(digests)
            order = np.argsort(keys, kind="stable")
            self._index = _Index(keys[order], digests[order], order.astype(np.int64))
        return self._index


def ensure(
    cache: FeatureCache,
    items: Iterable[tuple[str, str]],
    make_encoder: Callable[[], TextEncoder],
    progress: bool | None = None,
    total: int | None = None,
    chunk: int = CHUNK,
) -> int:
    """Encode those of `items` (content hash, text) that the cache lacks, and return their number.

    Each chunk is stored before the next one starts. The encoder is created at the first missing text, so that a full
    cache imports nothing heavy. `progress`: show a bar on stderr (None: if that is a terminal); `total`: the number of
    missing texts, if known, for the bar's remaining time.
    """
    cache.remove_leftovers()
    encoder: TextEncoder | None = None
    done = 0
    with _progress_bar(progress, total) as advance:
        for hashes, texts in _missing_chunks(cache, items, chunk):
            encoder = encoder or make_encoder()
            cache.add(hashes, encoder.encode(texts, advance))
            done += len(hashes)
    return done


def _missing_chunks(
    cache: FeatureCache, items: Iterable[tuple[str, str]], chunk: int
) -> Iterator[tuple[list[str], list[str]]]:
    items = iter(items)
    waiting: dict[str, str] = {}
    while block := list(islice(items, chunk)):
        known = dict(block)
        waiting.update((name, known[name]) for name in cache.missing([name for name, _ in block]))
        while len(waiting) >= chunk:
            names = list(islice(waiting, chunk))
            yield names, [waiting.pop(name) for name in names]
    if waiting:
        yield list(waiting), list(waiting.values())


@contextmanager
def _progress_bar(show: bool | None, total: int | None) -> Iterator[Callable[[int], None] | None]:
    """A callback with the number of finished texts; None where no progress is shown."""
    import sys

    if show is False or (show is None and not sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("encoding texts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=180) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            state = bar.tasks[0]
            bar.update(task, rate=f"{state.completed / max(state.elapsed or 0, 1e-9):.0f} texts/s")

        yield advance


def _digests(hashes: Sequence[str]) -> Digests:
    """Hex hashes as bytes, (n, 32). Raises ValueError where one is not a SHA-256 in hex."""
    wrong = next((name for name in hashes if len(name) != 64), None)
    if wrong is not None:
        raise ValueError(f"not a SHA-256 in hex: {wrong!r}")
    raw = bytes.fromhex("".join(hashes))
    if len(raw) != 32 * len(hashes):  # fromhex skips blanks
        raise ValueError("not a SHA-256 in hex: one of the hashes holds blanks")
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)


def _keys(digests: Digests) -> NDArray[np.uint64]:
    """The first 8 bytes of each hash as a number."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)


# Shards ------------------------------------------------------------------------------------------------------------


def _shard_bytes(digests: Digests, vectors: Vectors) -> bytes:
    from safetensors.numpy import save

    return save({"vectors": vectors, "hashes": digests}, {"crc32": _checksum(digests, vectors)})


def _checksum(digests: Digests, vectors: Vectors) -> str:
    return f"{zlib.crc32(vectors.data, zlib.crc32(digests.data)):08x}"


def _read_shard(path: Path) -> tuple[Digests, Vectors] | None:
    """The hashes in memory and the vectors memory-mapped; None for a truncated or damaged shard."""
    try:
        data = np.memmap(path, np.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + size].tobytes())
        body = data[8 + size :]
        vectors = _tensor(body, header["vectors"], np.dtype(np.float32))
        digests = _tensor(body, header["hashes"], np.dtype(np.uint8))
        expected = header["__metadata__"]["crc32"]
        complete = (
            vectors.ndim == 2 and digests.shape == (len(vectors), 32) and len(body) == vectors.nbytes + digests.nbytes
        )
        if not complete or _checksum(digests, vectors) != expected:
            return None
    except FileNotFoundError:
        return None  # another process found it damaged and deleted it
    except (ValueError, KeyError, TypeError):
        return None
    return np.array(digests), vectors


def _tensor(body: NDArray[np.uint8], entry: dict[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    begin, end = entry["data_offsets"]
    return body[begin:end].view(dtype).reshape(entry["shape"])
