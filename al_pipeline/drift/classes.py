"""Shift of predicted classes: does the model predict other shares in the window than in the reference?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from al_pipeline.drift.permutations import Floats, p_value


@dataclass(frozen=True)
class ClassTest:
    """Whether the shares of the predicted classes differ."""

    p: float
    reference: tuple[int, ...]
    """Number of the reference's texts predicted as each class."""
    window: tuple[int, ...]


def class_test(
    reference: NDArray[np.intp], window: NDArray[np.intp], classes: int, permutations: int, rng: Generator
) -> ClassTest:
    """Test predicted classes, as indices (n,) and (m,), by the likelihood ratio.

    The counts of the window under a permutation are multivariate hypergeometric, so they are drawn as such.
    """
    mine, theirs = (np.bincount(rows, minlength=classes) for rows in (window, reference))
    drawn = rng.multivariate_hypergeometric(mine + theirs, len(window), size=permutations, method="marginals")
    counts = np.concatenate([mine[None], drawn])
    ratios = np.round(_likelihood_ratio(counts, mine + theirs), 9)  # equal tables, equal ratios
    return ClassTest(p_value(ratios), tuple(map(int, theirs)), tuple(map(int, mine)))


def _likelihood_ratio(counts: NDArray[np.intp], totals: NDArray[np.intp]) -> Floats:
    """The G statistic of each row of counts (r, C) of the window, given the totals (C,) of both."""
    rows, size = counts.sum(axis=1, keepdims=True), max(1, int(totals.sum()))
    found = np.zeros(len(counts))
    for observed, of in ((counts, rows), (totals - counts, size - rows)):
        expected = of * totals / size
        ratio = np.divide(observed, expected, out=np.ones(observed.shape), where=(expected > 0) & (observed > 0))
        found += 2 * (observed * np.log(ratio)).sum(axis=1)
    return found
