"""The feature matrix of texts: dense vectors of the encoder, sparse TF-IDF, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Floats = NDArray[np.float64]

FULL_TFIDF = 200
"""Number of labels from which TF-IDF has the same weight as the encoder's vectors."""


@dataclass(frozen=True)
class FeatureMatrix:
    """Features of n texts: dense vectors (n, d) float32, sparse TF-IDF (n, v), or both; rows have unit length."""

    dense: NDArray[np.float32] | None = None
    sparse: csr_matrix | None = None
    components: NDArray[np.float32] | None = None
    """LSA components (v, k) on which a fit also projects the texts (`tfidf.lsa_components`). The fit maps its weights
    back to the terms, so prediction does not use them."""

    def __post_init__(self) -> None:
        sizes = {block.shape[0] for block in self.blocks}
        if len(sizes) != 1:
            raise ValueError(f"features need one or two blocks with the same number of rows, got {sorted(sizes)}")

    @property
    def blocks(self) -> list[Any]:
        """The blocks that are not None."""
        return [block for block in (self.dense, self.sparse) if block is not None]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of columns of each block."""
        return tuple(block.shape[1] for block in self.blocks)

    def __len__(self) -> int:
        return int(self.blocks[0].shape[0])

    def likeness(self, others: FeatureMatrix) -> Floats:
        """Cosine similarities with other texts, summed over the blocks, (n, m)."""
        total = np.zeros((len(self), len(others)))
        for mine, theirs in zip(self.blocks, others.blocks, strict=True):
            product = row_products(mine, theirs)
            total += product if isinstance(product, np.ndarray) else product.toarray()
        return total

    def rows(self, rows: NDArray[np.intp]) -> FeatureMatrix:
        """The given rows of every block."""
        return FeatureMatrix(
            None if self.dense is None else self.dense[rows],
            None if self.sparse is None else self.sparse[rows],
            self.components,
        )


def row_products(rows: Any, others: Any) -> Any:
    """`rows @ others.T`, (n, m); no row depends on the number of rows or threads.

    BLAS chooses its kernel by the shape of the product, so a text would get other probabilities alone than in a pool.
    `einsum` without BLAS and sparse products compute row by row.
    """
    if isinstance(rows, np.ndarray):
        return np.einsum("nd,md->nm", np.ascontiguousarray(rows), np.ascontiguousarray(others), optimize=False)
    return rows @ others.T


def feature_scales(features: FeatureMatrix, full_tfidf: int = FULL_TFIDF) -> list[float]:
    """The scale of each block in the fit; the fitted weights absorb it, so prediction does not use it.

    TF-IDF carries little information until most terms have occurred with a label: beside the encoder's vectors, its
    scale reaches 1 at `full_tfidf` labels (measured in benchmarks/results/head.json).
    """
    if features.dense is None or features.sparse is None:
        return [1.0]
    return [1.0, min(1.0, math.sqrt(len(features) / full_tfidf))]
