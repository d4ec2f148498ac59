"""The shortlist: the candidates with the highest scores of a pool read in parts, and statistics of all scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from al_pipeline.active_learning.sampling import (
    Floats,
    Positions,
    first_repeat,
    round_seed,
    top_k,
)


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Input of a strategy: ids (s,), scores (s,), proba (s, C), vectors (s, d) of the shortlisted items.

    Also the vectors of the labelled items, `labeled` (m, d), the number of labels of each class, `counts` (C,), and
    `centre` (d,), the mean of the candidates' unit vectors. Raises ValueError on repeated ids, arrays of another length
    and values that are not finite.
    """

    ids: Sequence[str]
    scores: Floats | None = None
    proba: Floats | None = None
    vectors: Floats | None = None
    labeled: Floats | None = None
    counts: Positions | None = None
    centre: Floats | None = None

    def __post_init__(self) -> None:
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"the shortlist contains an item twice: {first_repeat(self.ids)!r}")
        for need in ("scores", "proba", "vectors"):
            values = getattr(self, need)
            if values is None:
                continue
            if len(values) != len(self.ids):
                raise ValueError(f"the shortlist has {len(self.ids)} ids but {len(values)} rows of {need}")
            finite = np.isfinite(values).all(axis=tuple(range(1, np.ndim(values))))
            if not finite.all():
                raise ValueError(f"{need} of item {self.ids[int(np.argmin(finite))]!r} are not finite")

    def rows(self, positions: Positions) -> Shortlist:
        """The given rows, in the order given."""
        return replace(
            self,
            ids=[self.ids[position] for position in positions],
            **{
                need: np.asarray(values)[positions]
                for need in ("scores", "proba", "vectors")
                if (values := getattr(self, need)) is not None
            },
        )

    def per_second(self, seconds: Floats) -> Shortlist:
        """The same items with their scores per second: `seconds` (s,) that an answer is expected to take.

        Return on investment (Haertel et al. 2008; Settles, Craven & Friedland 2008). The scores are those of a second
        of mean length, so that they keep their size. Raises ValueError on seconds that are not positive, on scores
        below 0 and without scores.
        """
        if self.scores is None:
            raise ValueError("the shortlist has no scores that could be divided by seconds")
        scores, seconds = np.asarray(self.scores, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
        if seconds.shape != scores.shape or not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError("every item of the shortlist needs a positive number of seconds")
        if (scores < 0).any():
            raise ValueError("scores below 0 cannot be divided by seconds")
        return replace(self, scores=scores * (seconds.mean() / seconds)) if len(seconds) else self


def top_candidates(
    ids: Sequence[str], scores: ArrayLike, shortlist: int, batch_size: int, project_seed: int
) -> Positions:
    """Positions of the candidates on the shortlist, highest score first: `shortlist` of them, or two batches."""
    return top_k(scores, ids, max(shortlist, 2 * batch_size), round_seed(project_seed, 0, "score"))


class TopK:
    """The `top_candidates` of a pool that is read in parts, with a row of values for each.

    It holds at most twice as many items and one part in memory.
    """

    def __init__(self, shortlist: int, batch_size: int, project_seed: int, columns: int = 0) -> None:
        self._keep = (shortlist, batch_size, project_seed)
        self._size = max(shortlist, 2 * batch_size)
        self._least = -np.inf
        self._ids: list[str] = []
        self._scores: list[Floats] = [np.empty(0)]
        self._rows: list[Floats] = [np.empty((0, columns))]

    @property
    def least(self) -> float:
        """The lowest score that can still be kept; minus infinity at first."""
        return self._least

    def add(self, ids: Sequence[str], scores: Floats, rows: Floats | None = None) -> None:
        """Add a part: ids, scores (n,), and values (n, columns) if there are any."""
        near = np.flatnonzero(~(scores < self._least))  # NaN is kept, so that `top_k` raises and names the item
        if len(near) == 0:
            return
        self._ids += ids if len(near) == len(ids) else [ids[row] for row in near]
        self._scores.append(scores[near])
        self._rows.append(np.empty((len(near), 0)) if rows is None else rows[near])
        if len(self._ids) > 2 * self._size:
            self._cut()

    def kept(self) -> tuple[list[str], Floats, Floats]:
        """Ids, scores (k,) and values (k, columns), highest score first."""
        self._cut()
        return list(self._ids), self._scores[0], self._rows[0]

    def _cut(self) -> None:
        scores, rows = np.concatenate(self._scores), np.concatenate(self._rows)
        best = top_candidates(self._ids, scores, *self._keep)
        self._ids, self._scores, self._rows = [self._ids[row] for row in best], [scores[best]], [rows[best]]
        if len(best) >= self._size:
            self._least = float(self._scores[0][-1])


class ScoreSummary(NamedTuple):
    """Top candidates (ids, scores, probabilities), histogram of all scores, number of items by predicted class."""

    kept: tuple[list[str], Floats, Floats]
    counts: NDArray[np.int64]
    predicted: NDArray[np.int64]


class ScoreAccumulator:
    """Accumulates the top candidates of a pool read in parts, a histogram of all scores, and predicted-class counts."""

    def __init__(self, best: TopK, bounds: tuple[float, float], bins: int, classes: int) -> None:
        self._best = best
        self.edges: Floats = np.linspace(*bounds, bins + 1, dtype=np.float64)
        """Edges of equally wide bins, (bins + 1,); scores outside count in the outermost bins."""
        self._counts = np.zeros(bins, dtype=np.int64)
        self._predicted = np.zeros(classes, dtype=np.int64)

    @property
    def least(self) -> float:
        """The lowest score that can still be kept; minus infinity at first."""
        return self._best.least

    def add(self, ids: Sequence[str], scores: Floats, proba: Floats) -> None:
        """Add a part: ids, scores (n,), probabilities (n, C)."""
        bins = np.searchsorted(self.edges[1:-1], scores, side="right")
        self.count(bins, np.bincount(proba.argmax(axis=1), minlength=len(self._predicted)))
        self._best.add(ids, scores, proba)

    def count(self, bins: Positions, predicted: NDArray[np.integer]) -> None:
        """Count items that cannot be top candidates: the bin of each, and their number by predicted class (C,)."""
        self._counts += np.bincount(bins, minlength=len(self._counts))
        self._predicted += predicted

    def result(self) -> ScoreSummary:
        """The summary of all parts added so far."""
        return ScoreSummary(self._best.kept(), self._counts.copy(), self._predicted.copy())
