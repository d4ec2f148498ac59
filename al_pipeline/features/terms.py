"""Cache of the label-independent parts of TF-IDF: the fitted vocabulary, and the row of each text under it.

A round thus computes only what is new. Cached values have the same bytes as computed ones; `engine` identifies
everything else on which these depend. The cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.shards import Shards, Tensors, digest_rows, read_shard, shard_bytes
from al_pipeline.features.texts import content_hashes
from al_pipeline.features.tfidf import Tfidf, fit
from al_pipeline.files import make_folder, write_bytes

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

GROWTH = 1.25
"""A new vocabulary is fitted when the pool has grown to this many times the size of the last fit."""
_KEPT = 3
"""Number of vocabularies, and of folders of rows, to keep; the oldest are deleted."""


def fitted_parts(sizes: Sequence[int]) -> int:
    """The number of leading parts of a pool on whose texts the vocabulary is fitted. `sizes`: items per part.

    It depends on the pool alone, and changes only when the pool has grown by a quarter; until then, no row changes.
    """
    fitted = total = parts = 0
    for number, size in enumerate(sizes, 1):
        total += size
        if total >= GROWTH * fitted:
            fitted, parts = total, number
    return parts


@dataclass(frozen=True)
class TermCache:
    """The vocabularies and rows below `folder`, of one engine."""

    folder: Path
    engine: str

    def vocabulary(self, source: str, texts: Callable[[], Iterable[str]]) -> Tfidf:
        """The vocabulary fitted on `texts`, which are read only if it is not cached. `source` identifies the texts."""
        path = self.folder / f"vocabulary-{self._key(source.encode())}.safetensors"
        found = read_shard(path)
        if found is None:
            fitted = fit(texts())
            write_bytes(path, shard_bytes(_tensors(fitted)))
            self._delete_oldest("vocabulary-*")
        else:
            os.utime(path)
            fitted = _from_tensors(found.tensors)
        return self.attached_to(fitted)

    def attached_to(self, tfidf: Tfidf) -> Tfidf:
        """The same vocabulary, with its rows cached."""
        folder = self.folder / f"rows-{self._key(_joined(tfidf.terms), tfidf.idf.tobytes())}"
        if folder.exists():
            os.utime(folder)
        else:
            make_folder(folder)
            self._delete_oldest("rows-*")
        return replace(tfidf, rows=TermRows(folder))

    def _key(self, *parts: bytes) -> str:
        digest = hashlib.sha256(self.engine.encode())
        for part in parts:
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()[:24]

    def _delete_oldest(self, pattern: str) -> None:
        found = sorted(self.folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
        for path in found[:-_KEPT]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class TermRows:
    """The rows of texts under one vocabulary, by content hash: texts of items are read only if a row is missing."""

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder, _fits)

    def of(self, texts: Sequence[str], width: int, compute: Callable[[Sequence[str]], csr_matrix]) -> csr_matrix:
        """The rows of `texts`, (n, width), in order. `compute` returns those not cached yet, which are then stored."""
        from scipy.sparse import csr_matrix, vstack

        rows = self._rows_of(texts, compute)
        blocks, order = [], []
        for shard, places, own in self._shards.split(rows):
            block = csr_matrix((shard["values"], shard["columns"], shard["starts"]), (len(shard["hashes"]), width))
            blocks.append(block if np.array_equal(own, np.arange(block.shape[0])) else block[own])
            order.append(places)
        if not blocks:
            return csr_matrix((0, width), dtype=np.float32)
        found = blocks[0] if len(blocks) == 1 else vstack(blocks, format="csr")
        placed = np.concatenate(order)
        return found if np.array_equal(placed, np.arange(len(placed))) else found[np.argsort(placed)]

    def ensure(self, texts: Sequence[str], compute: Callable[[Sequence[str]], csr_matrix]) -> None:
        """Store the rows of `texts` that are not cached yet, which `compute` returns."""
        self._rows_of(texts, compute)

    def remember_written(self) -> None:
        """Spare the next process a check of the files that this one wrote."""
        self._shards.remember_written()

    def _rows_of(self, texts: Sequence[str], compute: Callable[[Sequence[str]], csr_matrix]) -> NDArray[np.int64]:
        """The numbers of the rows of `texts` across all shards, (n,), after those not cached yet were stored."""
        digests = digest_rows(list(content_hashes(texts)))
        rows = self._shards.find(digests)
        if not (rows < 0).any():
            return rows
        new = list({digests[row].tobytes(): row for row in np.flatnonzero(rows < 0)}.values())
        made = compute([texts[row] for row in new])
        self._shards.add(
            {
                "columns": made.indices.astype(np.int32),
                "hashes": digests[new],
                "starts": made.indptr.astype(np.int32),
                "values": made.data,
            }
        )
        return self._shards.find(digests)


def _fits(tensors: Tensors) -> bool:
    if tensors.keys() != {"columns", "hashes", "starts", "values"}:
        return False
    count, entries = len(tensors["hashes"]), len(tensors["columns"])
    return tensors["starts"].shape == (count + 1,) and tensors["values"].shape == (entries,)


def _joined(terms: Sequence[str]) -> bytes:
    """Terms as bytes, one per line. They hold only word characters and spaces."""
    return "\n".join(terms).encode()


def _tensors(tfidf: Tfidf) -> Tensors:
    tensors: dict[str, NDArray[Any]] = {"terms": np.frombuffer(_joined(tfidf.terms), np.uint8), "idf": tfidf.idf}
    return tensors if tfidf.components is None else {**tensors, "components": tfidf.components}


def _from_tensors(tensors: Tensors) -> Tfidf:
    text = tensors["terms"].tobytes().decode()
    components = tensors.get("components")
    return Tfidf(
        tuple(text.split("\n")) if text else (),
        np.array(tensors["idf"]),
        None if components is None else np.array(components),
    )
