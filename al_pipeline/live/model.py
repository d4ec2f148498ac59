"""The live model: softmax regression on frozen features, updated from its last weights at each answer.

It only chooses questions. What is published is trained from scratch by the stages, and never depends on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from al_pipeline.active_learning.acquisition import ACQUISITION
from al_pipeline.models.linear import STRENGTH
from al_pipeline.models.probabilities import count_classes, over_all_classes, softmax
from al_pipeline.models.softmax import Parts, fit_softmax

Rows = NDArray[np.intp]
Features = NDArray[np.float32]
Floats = NDArray[np.float64]

SLOPE = 1e-5
"""An update ends when the gradient's norm, divided by the number of labels, is below this: the margins of the questions
are then within a thousandth of those of the exact minimum (tests/test_live_parts.py)."""
BLOCK = 16_384
"""Rows that are scored at a time."""
SHORTLIST = 4096
"""Rows with the highest last scores that are scored at once after an update; as many again are drawn at random."""
MOST_FITTED, NEWEST_FITTED, LEAST_OF_CLASS = 4000, 1000, 50
"""With more labels an update fits the newest ones and a fixed sample of the others, so that it takes no longer than
with so many. Of each class at least so many are in it."""
DIGEST = 16
"""Characters of a model's digest."""


class LiveModel:
    """A head on the rows of one feature matrix (n, d), which may be memory-mapped.

    `classes`: those of the schema. `temperature`: that of the published model, for probabilities.
    """

    def __init__(self, features: Features, classes: Sequence[str], temperature: float = 1.0) -> None:
        self._features = features
        self._classes = tuple(classes)
        self._temperature = temperature
        self._weights: Features = np.zeros((features.shape[1], 0), np.float32)
        self._bias: Features = np.zeros(0, np.float32)
        self._arrived: dict[int, None] = {}
        """The labelled rows in the order in which they were learnt."""
        self._rows: tuple[int, ...] = ()
        self._known: Features = np.zeros((0, features.shape[1]), np.float32)
        self._labels: dict[int, str] = {}
        self.counts: Mapping[str, int] = {}
        """Number of labels of each class that has some, in the schema's order."""
        self.digest = ""
        """The first characters of the SHA-256 of its weights and classes; empty before the first update."""

    @property
    def is_trained(self) -> bool:
        """Whether it distinguishes classes: it has labels of two or more."""
        return len(self.counts) > 1

    @property
    def labels(self) -> int:
        """The number of labels that it knows."""
        return len(self._labels)

    def learn(self, labels: Mapping[int, str]) -> bool:
        """Update the model to exactly these labels, by row; return whether anything changed.

        Raises BadInput for a label that is not a class.
        """
        if self.digest and dict(labels) == self._labels:
            return False
        counts, _ = count_classes([*labels.values()], self._classes)
        start = self._start(tuple(counts))
        for row in [row for row in self._arrived if row not in labels]:
            del self._arrived[row]
        for row in sorted(row for row in labels if self._labels.get(row) != labels[row]):
            self._arrived.pop(row, None)
            self._arrived[row] = None
        self.counts, self._labels = counts, dict(labels)
        rows = tuple(sorted(_fitted(self._arrived, labels)))
        self._gather(rows)
        if len(counts) > 1:
            _, targets = count_classes([labels[row] for row in rows], self._classes)
            strength = STRENGTH * len(labels) / len(rows)
            weights, bias = fit_softmax(Parts([self._known]), targets, len(counts), strength, start=start, slope=SLOPE)
            self._weights, self._bias = weights[0].astype(np.float32), bias.astype(np.float32)
        else:
            self._weights, self._bias = np.zeros((self._features.shape[1], 0), np.float32), np.zeros(0, np.float32)
        self.digest = self._digest()
        return True

    def _start(self, seen: tuple[str, ...]) -> tuple[list[Floats], Floats] | None:
        """The last weights, with columns of zeros for classes that are new; None before the first update."""
        if not self.is_trained:
            return None
        weights, bias = np.zeros((self._weights.shape[0], len(seen))), np.zeros(len(seen))
        old = {name: column for column, name in enumerate(self.counts)}
        for column, name in enumerate(seen):
            if name in old:
                weights[:, column], bias[column] = self._weights[:, old[name]], self._bias[old[name]]
        return [weights], bias

    def _gather(self, rows: tuple[int, ...]) -> None:
        """Hold the features of labelled rows in memory; those that were held are not read again."""
        if rows == self._rows:
            return
        held = {row: place for place, row in enumerate(self._rows)}
        new = [row for row in rows if row not in held]
        fresh = {row: place for place, row in enumerate(new)}
        read = np.asarray(self._features[np.array(new, np.intp)]) if new else self._known[:0]
        both = np.concatenate([self._known, read])
        offset = len(self._known)
        self._known = both[[held[row] if row in held else offset + fresh[row] for row in rows]]
        self._rows = rows

    def _digest(self) -> str:
        made = hashlib.sha256("\n".join([*self._classes, "", *self.counts]).encode())
        made.update(str(len(self._labels)).encode())
        made.update(np.ascontiguousarray(self._weights).tobytes())
        made.update(np.ascontiguousarray(self._bias).tobytes())
        return made.hexdigest()[:DIGEST]

    def proba(self, rows: Rows) -> Floats:
        """Class probabilities (m, C) of rows of the features, columns in the schema's order."""
        shared: Floats = np.zeros((len(rows), len(self.counts)))
        if self.is_trained:
            logits = np.asarray(self._features[rows]) @ self._weights + self._bias
            shared = softmax(logits.astype(np.float64) / self._temperature)
        elif self.counts:
            shared[:] = 1.0
        return over_all_classes(shared, self._classes, self.counts)


def _fitted(arrived: Iterable[int], labels: Mapping[int, str]) -> list[int]:
    """The rows on which an update is fitted: all, or the newest and a sample of the others that hardly changes."""
    rows = list(arrived)
    if len(rows) <= MOST_FITTED:
        return rows
    old, found = rows[:-NEWEST_FITTED], rows[-NEWEST_FITTED:]
    of_class: dict[str, list[int]] = {}
    for row in sorted(old, key=lambda one: (one * 2_654_435_761 % 2**32, one)):
        of_class.setdefault(labels[row], []).append(row)
    share = (MOST_FITTED - NEWEST_FITTED) / len(old)
    for own in of_class.values():
        found += own[: max(LEAST_OF_CLASS, int(share * len(own)))]
    return found


class Scores:
    """The newest known score of each row, some by earlier models: a question never waits for a pass over the pool.

    After an update, `refresh` scores the rows with the highest scores so far and as many others drawn at random;
    `go_on` scores the next block of the rest, until all rows are scored by the newest model.
    """

    def __init__(self, model: LiveModel, count: int, acquisition: str, rng: Generator) -> None:
        self.values = np.full(count, -np.inf)
        """(n,), higher = ask sooner."""
        self._score: Callable[[Floats], Floats] = ACQUISITION[acquisition]
        self._model = model
        self._count = count
        self._rng = rng
        self._next = 0
        self._left = 0

    @property
    def left(self) -> int:
        """The number of rows that the newest model has not scored yet, at most."""
        return self._left

    def refresh(self, allowed: NDArray[np.bool_]) -> Rows:
        """Score the likeliest questions among the `allowed` rows (n,) by the newest model; return their rows."""
        self._left = self._count
        if self._count <= 2 * SHORTLIST:
            rows = np.flatnonzero(allowed)
            self._left = 0
        else:
            open_ = np.flatnonzero(allowed)
            values = self.values[open_]
            best = open_[np.argpartition(-values, SHORTLIST - 1)[:SHORTLIST]] if len(open_) > SHORTLIST else open_
            drawn = open_[self._rng.integers(len(open_), size=SHORTLIST)] if len(open_) else open_
            rows = np.unique(np.concatenate([best, drawn]))
        self._put(rows)
        return rows

    def go_on(self) -> bool:
        """Score the next block of rows; return whether any are left."""
        if self._left > 0:
            rows = np.arange(self._next, min(self._next + BLOCK, self._count))
            self._put(rows)
            self._left -= len(rows)
            self._next = 0 if rows[-1] + 1 >= self._count else int(rows[-1]) + 1
        return self._left > 0

    def _put(self, rows: Rows) -> None:
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            self.values[part] = self._score(self._model.proba(part))
