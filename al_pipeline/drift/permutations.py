"""Permutation tests: the labels "reference" and "window", permuted within folds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FOLDS = 5


@dataclass(frozen=True)
class Permutations:
    """Which texts count as the window: column 0 as it is, the others at random.

    The rows are the texts of the reference, then those of the window. Each fold has its share of both, in every column:
    the columns are random members of a group that leaves the folds as they are, so if the texts are exchangeable, all
    columns are equally probable, and `p_value` is at most 0.05 with probability 0.05 at most (Hemerik and Goeman 2018).
    """

    member: NDArray[np.bool_]
    """True where a text counts as the window, (n, 1 + B)."""
    folds: tuple[NDArray[np.intp], ...]
    """The rows of each fold, in random order."""

    @property
    def window(self) -> int:
        """Number of texts of the window."""
        return int(self.member[:, 0].sum())


def permute(reference: int, window: int, count: int, rng: Generator, folds: int = FOLDS) -> Permutations:
    """Folds of `reference` and `window` texts, and `count` permutations of which is which."""
    fold = np.concatenate([rng.permutation(np.arange(size) % folds) for size in (reference, window)])
    member = np.zeros((reference + window, 1 + count), bool)
    member[reference:, 0] = True
    rows = tuple(rng.permutation(np.flatnonzero(fold == one)) for one in range(folds))
    for own in rows:
        drawn = rng.random((len(own), count)).argsort(axis=0)
        member[own, 1:] = member[own, 0][drawn]
    return Permutations(member, tuple(own for own in rows if len(own)))


def p_value(statistics: Floats) -> float:
    """The share of the statistics (1 + B,) that are at least the first, which is among them: at least 1 / (1 + B)."""
    return float((statistics >= statistics[0]).mean())
