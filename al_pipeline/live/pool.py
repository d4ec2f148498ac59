"""The pool's features as one memory-mapped file of rows, in the pool's order: what the live model learns and scores.

The encoder's vectors come from the feature cache; TF-IDF is projected on its principal directions, by the vocabulary of
the newest published model. The file may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from al_pipeline.data.pool import iter_batches, list_parts
from al_pipeline.features.tfidf import IDF_FILE, TERMS_FILE, Tfidf, load_tfidf, lsa_components
from al_pipeline.features.vectors import Vectors, open_vectors
from al_pipeline.files import replacing, sha256_file
from al_pipeline.params import Features
from al_pipeline.records import Item
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout

_AT_ONCE = 4096
_SAMPLE = 1000
"""Texts from which the principal directions of TF-IDF are computed."""


@dataclass(frozen=True)
class LivePool:
    """The items of the pool by row."""

    ids: tuple[str, ...]
    hashes: tuple[str, ...]
    """Their content hashes."""
    features: NDArray[np.float32]
    """(n, d), memory-mapped."""
    rows: dict[str, int]
    """The row of each item, by id."""


def open_pool(layout: Layout, features: Features, on_progress: Callable[[str], None] = lambda _: None) -> LivePool:
    """The pool of a workspace, with features made as needed. Only what the pool holds, not its inbox."""
    vectors = open_vectors(layout.encoder, layout.features, features)
    tfidf = _vocabulary(layout) if features.uses_tfidf else None
    parts = list_parts([layout.pool])
    made = hashlib.sha256(b"al-live-features/1")
    for part in parts:
        made.update(f"{part.name} {part.stat().st_size} {part.stat().st_mtime_ns}\n".encode())
    made.update(("" if vectors is None else vectors.fingerprint).encode())
    if tfidf is not None:
        made.update((sha256_file(layout.model / TERMS_FILE) + sha256_file(layout.model / IDF_FILE)).encode())
    path = private_folder(layout.live) / f"features-{made.hexdigest()[:24]}.f32"
    ids: list[str] = []
    hashes: list[str] = []
    for batch in iter_batches(parts, ("item_id", "content_hash"), _AT_ONCE):
        ids += batch.column("item_id").to_pylist()
        hashes += batch.column("content_hash").to_pylist()
    if not path.exists():
        on_progress(f"reading the features of {len(ids):,} items")
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(path, 0o600))
            with temporary.open("wb") as file:
                for block in _blocks(parts, vectors, tfidf):
                    file.write(np.ascontiguousarray(block, np.float32).data)
        for old in layout.live.glob("features-*.f32"):
            if old != path:
                old.unlink(missing_ok=True)
    width = path.stat().st_size // 4 // max(1, len(ids))
    mapped = np.memmap(path, np.float32, "r", shape=(len(ids), width)) if ids and width else np.zeros((len(ids), 0))
    return LivePool(
        tuple(ids), tuple(hashes), mapped.astype(np.float32, copy=False), {one: row for row, one in enumerate(ids)}
    )


def _vocabulary(layout: Layout) -> Tfidf | None:
    """The vocabulary of the newest model; None if it has none."""
    return load_tfidf(layout.model) if (layout.model / TERMS_FILE).is_file() else None


def _blocks(parts: list[Path], vectors: Vectors | None, tfidf: Tfidf | None) -> Iterator[NDArray[np.float32]]:
    """The features of the pool's items, some rows at a time."""
    components = None if tfidf is None else _components(parts, tfidf)
    for batch in iter_batches(parts, ("item_id", "content_hash", "text"), _AT_ONCE):
        hashes, texts = batch.column("content_hash").to_pylist(), batch.column("text").to_pylist()
        blocks: list[NDArray[np.float32]] = []
        if vectors is not None:
            blocks.append(vectors.of([Item("", name, text) for name, text in zip(hashes, texts, strict=True)]))
        if tfidf is not None and components is not None:
            blocks.append(np.asarray(tfidf.transform(texts) @ components, np.float32))
        yield np.concatenate(blocks, axis=1) if blocks else np.zeros((len(hashes), 0), np.float32)


def _components(parts: list[Path], tfidf: Tfidf) -> NDArray[np.float32] | None:
    """The principal directions of a sample of the pool in term space, (v, k)."""
    texts = [text for batch in iter_batches(parts, ("text",), _AT_ONCE) for text in batch.column("text").to_pylist()]
    chosen = default_rng(0).permutation(len(texts))[:_SAMPLE]
    return lsa_components(tfidf.transform([texts[row] for row in sorted(chosen.tolist())]))
