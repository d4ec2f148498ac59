"""The vectors of a workspace's items, from the cache if possible, else from the encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.cache import FeatureCache, ensure, missing_chunks
from al_pipeline.features.device import device_of
from al_pipeline.features.encoder import encoder_fingerprint, encoder_identity
from al_pipeline.features.shards import SUFFIX
from al_pipeline.file_notes import FileNotes
from al_pipeline.params import Features
from al_pipeline.records import Item, content_hash

if TYPE_CHECKING:
    from al_pipeline.features.encoder import Encoder


class Vectors:
    """The encoder's vectors for items of one workspace, cached; torch is imported only to encode, and to find a GPU.

    `device`: what `engine.json` records, in a stage; else the one that `features` names. Raises BadParams if it is not
    there.
    """

    def __init__(self, encoder: Path, cache: Path, features: Features, device: str | None = None) -> None:
        self._folder = encoder
        self._features = features
        self.device = device or device_of(features)
        """The device that computes them, as `find_device` describes it."""
        notes = FileNotes(cache / ".notes")
        self.identity = encoder_identity(encoder, features.max_tokens, notes)
        """The `encoder_identity`: a model fitted on vectors of another identity cannot use these."""
        notes.save()
        self.fingerprint = encoder_fingerprint(self.identity, features.precision, self.device)
        """The `encoder_fingerprint`: what the bytes of the vectors depend on."""
        self.folder = cache / self.fingerprint
        """The folder of the cache's shards."""
        self._cache = FeatureCache(self.folder)

    def missing(self, digests: Iterable[NDArray[np.uint8]]) -> int:
        """The number of these content hashes, as bytes (n, 32) in parts, that have no vector yet."""
        return sum(int(self._cache.missing_rows(part).sum()) for part in digests)

    def missing_digests(self, digests: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Those of these content hashes, as bytes (n, 32) in parts, that have no vector yet, (m, 32)."""
        found = [part[self._cache.missing_rows(part)] for part in digests]
        return np.concatenate([np.empty((0, 32), np.uint8), *found])

    def prepare(
        self,
        items: Iterable[tuple[str, str]],
        total: int | None = None,
        on_encoded: Callable[[int, float], None] | None = None,
    ) -> int:
        """Encode those of `items` (content hash, text) that the cache lacks, with a progress bar; return how many.

        `on_encoded` gets the number of texts encoded so far, and the seconds that this took.
        """
        return ensure(self._cache, items, self._encoder, total=total, on_encoded=on_encoded)

    def shards(self, items: Iterable[tuple[str, str]], size: int) -> Iterator[tuple[list[str], list[str]]]:
        """Those of `items` (content hash, text) that the cache lacks, as hashes and texts, `size` at a time."""
        return missing_chunks(self._cache, items, size)

    def shard_files(self) -> dict[str, Path]:
        """The files of the cache by name; damaged ones are deleted before."""
        len(self._cache)  # reads all
        return {path.name: path for path in sorted(self.folder.glob(f"[!.]*{SUFFIX}"))}

    def store(self, hashes: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Add vectors (n, d) that were computed elsewhere to the cache."""
        self._cache.add(hashes, vectors)

    def of(self, items: Sequence[Item]) -> NDArray[np.float32]:
        """The items' vectors, (n, d), in order."""
        return self.of_texts([item.content_hash for item in items], [item.text for item in items])

    def of_texts(self, hashes: Sequence[str], texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of texts, (n, d), in order, given their content hashes."""
        try:
            return self._cache.get(hashes)
        except KeyError:
            ensure(self._cache, zip(hashes, texts, strict=True), self._encoder, progress=False)
            return self._cache.get(hashes)

    def lookup(self, hashes: Sequence[str], items: Callable[[], Iterable[Item]]) -> NDArray[np.float32]:
        """The vectors of content hashes, (n, d), in order. `items` returns the texts, if some must be encoded."""
        if not hashes:
            return np.zeros((0, self._cache.dimension), np.float32)
        try:
            return self._cache.get(hashes)
        except KeyError:
            ensure(self._cache, ((item.content_hash, item.text) for item in items()), self._encoder, progress=False)
            return self._cache.get(hashes)

    def _encoder(self) -> Encoder:
        from al_pipeline.features.encoder import Encoder

        return Encoder(self._folder, self._features.max_tokens, self._features.precision, device=self.device)


def guide_vectors(vectors: Vectors | None, texts: Sequence[str]) -> NDArray[np.float32] | None:
    """The vectors of texts that are not items, (n, d); None without an encoder."""
    return None if vectors is None else vectors.of([Item("", content_hash(text), text) for text in texts])


def open_vectors(encoder: Path, cache: Path, features: Features, device: str | None = None) -> Vectors | None:
    """The vectors of this encoder, cached in `cache`; None if the features are TF-IDF alone. See `Vectors`."""
    return Vectors(encoder, cache, features, device) if features.uses_encoder else None
