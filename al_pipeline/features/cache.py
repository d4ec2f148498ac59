"""The cache of feature vectors: by the text's content hash, in one folder for each encoder fingerprint.

See `shards` for the files. The cache may be deleted at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.shards import Digests, Shards, Tensors, digest_rows
from al_pipeline.files import remove_leftovers

if TYPE_CHECKING:
    from al_pipeline.features.encoder import TextEncoder

Vectors = NDArray[np.float32]

CHUNK = 4096
"""Number of texts in a shard: the most that is lost when a process is killed."""


class FeatureCache:
    """Vectors by content hash (SHA-256 in hex), below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._width = 0
        self._shards = Shards(folder, self._fits)

    @property
    def dimension(self) -> int:
        """Length of a vector; 0 while the cache is empty."""
        self._shards.shards()
        return self._width

    def __len__(self) -> int:
        return len(self._shards)

    def missing(self, hashes: Sequence[str]) -> list[str]:
        """Those of `hashes` that have no vector yet, each once, in their order."""
        found = self._shards.find(digest_rows(list(hashes)))
        return list(dict.fromkeys(hashes[row] for row in np.flatnonzero(found < 0)))

    def add(self, hashes: Sequence[str], vectors: Vectors) -> None:
        """Store `vectors` (n, d) under `hashes` atomically; known hashes are skipped.

        Raises ValueError if the numbers or the vectors' length do not fit, OSError if the disk does not read back
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
        own = np.ascontiguousarray(vectors[rows], np.float32)
        self._shards.add({"vectors": own, "hashes": digest_rows([hashes[row] for row in rows])})
        self._width = vectors.shape[1]

    def get(self, hashes: Sequence[str]) -> Vectors:
        """The vectors of `hashes`, (n, d), in their order. Raises KeyError for one that is not cached."""
        rows = self._shards.find(digest_rows(list(hashes)))
        if (rows < 0).any():
            raise KeyError(f"no vector for {hashes[int(np.flatnonzero(rows < 0)[0])]}; `ensure` it first")
        vectors = np.empty((len(rows), self.dimension), np.float32)
        for shard, places, own in self._shards.split(rows):
            vectors[places] = shard["vectors"][own]
        return vectors

    def stream(self, hashes: Sequence[str], batch: int) -> Iterator[Vectors]:
        """The vectors of `hashes`, at most `batch` rows at a time."""
        for start in range(0, len(hashes), batch):
            yield self.get(hashes[start : start + batch])

    def missing_rows(self, digests: Digests) -> NDArray[np.bool_]:
        """Whether each of `digests` has no vector yet, (n,)."""
        return self._shards.find(digests) < 0

    def remember_written(self) -> None:
        """Spare the next process a check of the files that this one wrote."""
        self._shards.remember_written()

    def _fits(self, tensors: Tensors) -> bool:
        """Whether these are vectors of one length, the same in all shards."""
        if tensors.keys() != {"vectors", "hashes"}:
            return False
        vectors, hashes = tensors["vectors"], tensors["hashes"]
        if vectors.ndim != 2 or vectors.dtype != np.float32 or hashes.shape != (len(vectors), 32):
            return False
        self._width = self._width or vectors.shape[1]
        return bool(vectors.shape[1] == self._width)


def ensure(
    cache: FeatureCache,
    items: Iterable[tuple[str, str]],
    make_encoder: Callable[[], TextEncoder],
    progress: bool | None = None,
    total: int | None = None,
    chunk: int = CHUNK,
    on_encoded: Callable[[int, float], None] | None = None,
) -> int:
    """Encode those of `items` (content hash, text) that the cache lacks, and return their number.

    Each chunk is stored before the next one starts. The encoder is created at the first missing text, so that a full
    cache imports nothing heavy. `progress`: whether to show a bar on stderr (None: if that is a terminal); `total`: the
    number of missing texts, if known, to estimate the remaining time. `on_encoded` gets, after each chunk, the number
    of texts encoded so far and the seconds that the encoder took for them.
    """
    encoder: TextEncoder | None = None
    done, seconds = 0, 0.0
    with _progress_bar(progress, total) as advance:
        for hashes, texts in missing_chunks(cache, items, chunk):
            if encoder is None:
                remove_leftovers(cache.folder)
                encoder = make_encoder()
            begin = time.perf_counter()
            vectors = encoder.encode(texts, advance)
            seconds += time.perf_counter() - begin
            cache.add(hashes, vectors)
            done += len(hashes)
            if on_encoded is not None:
                on_encoded(done, seconds)
    cache.remember_written()
    return done


def missing_chunks(
    cache: FeatureCache, items: Iterable[tuple[str, str]], chunk: int
) -> Iterator[tuple[list[str], list[str]]]:
    """Those of `items` (content hash, text) that the cache lacks, as hashes and texts, `chunk` at a time."""
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
    """A callback for the number of newly finished texts; None if no progress is shown."""
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
