"""Margins in single precision with an error bound, and an accumulator that computes exact scores only where needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from al_pipeline.active_learning.acquisition import margin
from al_pipeline.active_learning.shortlist import ScoreAccumulator, ScoreSummary

Floats = NDArray[np.float64]
_SCREENED = 8000
"""Number of items whose approximate margins are computed together: a step costs about as much for fewer."""
_EXACT = 256
"""Number of items whose exact scores are computed together."""
_ROUNDING = 1e-6
"""Bound on the rounding error of a score's bin position, in bins."""
Columns = Sequence[NDArray[np.float32]]
"""Each feature block's term of the logits, transposed to (seen, n); see `Head.columns`."""


@dataclass(frozen=True, slots=True)
class ApproximateMargins:
    """Margins of n items in single precision, with a bound on their error.

    With them, exact probabilities are not needed for items that cannot be candidates: nearly all of a large pool.
    """

    scores: NDArray[np.float32]
    """(n,), each within `slack` of `margin` of the item's probabilities; undefined if `slack` is infinite."""
    slack: float
    likeliest: NDArray[np.bool_]
    """(C, n): each item's most likely class; it is the predicted class if the score is below 1 - slack."""


class ApproximateScorer(Protocol):
    """A classifier head that can approximate margins; both methods take the same columns."""

    def approximate_margins(self, columns: Columns) -> ApproximateMargins:
        """Margins in single precision."""
        ...

    def exact(self, columns: Columns) -> Floats:
        """Class probabilities (n, C)."""
        ...


class _Buffer:
    """A buffer of items to score, with their columns."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._parts: list[Columns] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, ids: Sequence[str], columns: Columns) -> None:
        self._ids += ids
        self._parts.append(columns)

    def take(self) -> tuple[list[str], list[NDArray[np.float32]]]:
        """Remove and return all items."""
        ids, columns = self._ids, [np.concatenate(blocks, axis=1) for blocks in zip(*self._parts, strict=True)]
        self._ids, self._parts = [], []
        return ids, columns


class MarginAccumulator:
    """Adds items to a `ScoreAccumulator` by their margins; the result equals, to the bit, that of adding exact scores.

    Exact scores are computed only for items that may be among the best, or whose bin or predicted class the approximate
    margin leaves uncertain.
    """

    def __init__(self, scores: ScoreAccumulator, head: ApproximateScorer) -> None:
        self._scores = scores
        self._head = head
        edges = scores.edges
        self._bins = len(edges) - 1
        self._low, self._scale = float(edges[0]), self._bins / float(edges[-1] - edges[0])
        self._screened = _Buffer()
        self._open = _Buffer()

    def add_approximate(self, ids: Sequence[str], columns: Columns) -> None:
        """Add the ids and columns of n items. They are buffered until there are enough for a step."""
        self._screened.add(ids, columns)
        if len(self._screened) >= _SCREENED:
            self._screen()
        if len(self._open) >= _EXACT:
            self._add_exact()

    def result(self) -> ScoreSummary:
        """The summary of all parts added so far."""
        self._screen()
        self._add_exact()
        return self._scores.result()

    def _screen(self) -> None:
        """Count the items whose bin and class are certain and that cannot be kept; buffer the others."""
        if len(self._screened) == 0:
            return
        ids, columns = self._screened.take()
        margins = self._head.approximate_margins(columns)
        places = (margins.scores - np.float32(self._low)) * np.float32(self._scale)  # in bins
        edges = np.clip(np.rint(places), 1, self._bins - 1)  # the nearest inner edge
        certain = np.abs(places - edges) > (margins.slack + _ROUNDING) * self._scale
        # written so that NaN counts as uncertain
        certain &= margins.scores < np.float32(min(self._scores.least, 1.0) - margins.slack - _ROUNDING)
        open_ = np.flatnonzero(~certain)
        if len(open_) < len(certain):
            bins = np.clip(places[certain], 0, self._bins - 1).astype(np.intp)
            predicted = np.array([np.count_nonzero(row) for row in margins.likeliest])
            self._scores.count(bins, predicted - margins.likeliest[:, open_].sum(axis=1))
        if len(open_):
            self._open.add([ids[row] for row in open_], [part[:, open_] for part in columns])

    def _add_exact(self) -> None:
        """Add the buffered items by their probabilities."""
        if len(self._open) == 0:
            return
        ids, columns = self._open.take()
        proba = self._head.exact(columns)
        self._scores.add(ids, margin(proba), proba)
