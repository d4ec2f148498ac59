"""The live model with what it asks about: labels of items in, the next question out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct
from numpy.random import default_rng
from numpy.typing import NDArray

from al_pipeline.active_learning.acquisition import ACQUISITION
from al_pipeline.live.model import LiveModel, Scores
from al_pipeline.live.pool import LivePool
from al_pipeline.live.queue import Slot, draw, next_slot, pick
from al_pipeline.records import PlannedTask

PROBABLE = 0.005
"""Less probable classes are left out of a question's forecast."""
STABLE = 0.99
"""The agreement (Cohen's kappa) of successive predictions from which the model counts as stable (Bloodgood &
Vijay-Shanker 2009)."""
_STOP_SET, _STOP_EVERY, _STOP_CHECKS = 1000, 20, 3
_PURPOSE = 0x11FE


class Chosen(Struct, frozen=True):
    """A question of the live model."""

    item_id: str
    content_hash: str
    score: float
    open_items: int
    """The number of items from which it was chosen or drawn."""
    predicted: str | None
    confidence: float | None
    proba: tuple[tuple[str, float], ...]


class ClassFigures(Struct, frozen=True):
    """What the model knows of one class: its labels, and how unsure it is of the items that it takes for it."""

    name: str
    labels: int
    predicted: int
    """Items of a random sample of the pool that it predicts to be of this class."""
    uncertainty: float | None
    """Their mean score; None without any."""


class Asker:
    """A live model, its scores of the pool, and what may be asked. `strategy`: of `params.yaml`."""

    def __init__(
        self,
        pool: LivePool,
        classes: Sequence[str],
        strategy: str,
        seed: int,
        max_similarity: float,
        temperature: float = 1.0,
    ) -> None:
        self.pool = pool
        self.acquisition = strategy if strategy in ACQUISITION else "margin"
        self._classes = tuple(classes)
        self._seed = seed
        self._max_similarity = max_similarity
        self._allowed = np.ones(len(pool.ids), np.bool_)
        self._model = LiveModel(pool.features, classes, temperature)
        rng = default_rng([seed, _PURPOSE])
        self._scores = Scores(self._model, len(pool.ids), self.acquisition, rng)
        self._stop_rows = np.sort(rng.permutation(len(pool.ids))[:_STOP_SET])
        self._stop: list[tuple[int, NDArray[np.intp]]] = []
        self._agreements: list[float] = []

    @property
    def digest(self) -> str:
        """The model's digest."""
        return self._model.digest

    @property
    def labels(self) -> int:
        """The number of labels that the model knows."""
        return self._model.labels

    @property
    def is_trained(self) -> bool:
        """Whether it has labels of two classes or more."""
        return self._model.is_trained

    def learn(self, labels: Mapping[str, str], closed: Iterable[str]) -> bool:
        """Update the model to exactly these labels, by item id, and what may be asked: nothing `closed`.

        Labels of items that the pool does not have are left out. Returns whether the model changed.
        """
        rows = self.pool.rows
        self._allowed[:] = True
        self._allowed[[rows[item] for item in {*labels, *closed} if item in rows]] = False
        if not self._model.learn({rows[item]: label for item, label in labels.items() if item in rows}):
            return False
        if self._model.is_trained:
            self._scores.refresh(self._allowed)
            self._watch_stability()
        return True

    def go_on(self) -> bool:
        """Score a block of the pool by the newest model; return whether others are left."""
        return self._model.is_trained and self._scores.go_on()

    def slot(
        self, batch: Sequence[PlannedTask], asked: Sequence[str], share: float, number: int
    ) -> tuple[Slot, PlannedTask | None]:
        """What the next question of round `number` is; see `next_slot`."""
        return next_slot(batch, asked, share, default_rng([self._seed, _PURPOSE, number, len(asked), 0]))

    def ask(self, kind: Slot, near: Iterable[str], number: int, place: int) -> Chosen | None:
        """The next question, which is then closed; None if nothing is left to ask.

        `near`: items from which a chosen one must differ; `number` and `place`: of the round and of the question, which
        seed a random draw.
        """
        open_items = int(self._allowed.sum())
        rows = self.pool.rows
        if kind == "random" or not self._model.is_trained:
            row = draw(self._allowed, default_rng([self._seed, _PURPOSE, number, place, 1]))
        else:
            others = [rows[item] for item in near if item in rows]
            row = pick(self._scores.values, self._allowed, self.pool.features, others, self._max_similarity)
        if row is None:
            return None
        self._allowed[row] = False
        if not self._model.counts:
            return Chosen(self.pool.ids[row], self.pool.hashes[row], 0.0, open_items, None, None, ())
        proba = self._model.proba(np.array([row]))
        score = float(ACQUISITION[self.acquisition](proba)[0])
        best = int(proba[0].argmax())
        shown = tuple(
            (name, round(share, 4))
            for name, share in zip(self._classes, proba[0].tolist(), strict=True)
            if share >= PROBABLE
        )
        return Chosen(
            self.pool.ids[row],
            self.pool.hashes[row],
            score,
            open_items,
            self._classes[best],
            float(proba[0, best]),
            shown,
        )

    def class_figures(self) -> list[ClassFigures]:
        """What the model knows of each class."""
        counts = self._model.counts
        if not self._model.is_trained or not len(self._stop_rows):
            return [ClassFigures(name, counts.get(name, 0), 0, None) for name in self._classes]
        proba = self._model.proba(self._stop_rows)
        scores, best = ACQUISITION[self.acquisition](proba), proba.argmax(axis=1)
        found = []
        for column, name in enumerate(self._classes):
            own = scores[best == column]
            found.append(ClassFigures(name, counts.get(name, 0), len(own), float(own.mean()) if len(own) else None))
        return found

    def agreement(self) -> float | None:
        """Cohen's kappa of the newest predictions with those of some labels before, the least of the last checks.

        None as long as there were too few labels for it. From `STABLE` on, further labels change little.
        """
        return min(self._agreements) if len(self._agreements) == _STOP_CHECKS else None

    def _watch_stability(self) -> None:
        if not len(self._stop_rows):
            return
        if self._stop and self._model.labels - self._stop[-1][0] < _STOP_EVERY:
            return
        now = self._model.proba(self._stop_rows).argmax(axis=1)
        if self._stop:
            self._agreements = [*self._agreements, _kappa(self._stop[-1][1], now, len(self._classes))][-_STOP_CHECKS:]
        self._stop = [(self._model.labels, now)]


def _kappa(before: NDArray[np.intp], after: NDArray[np.intp], classes: int) -> float:
    """Cohen's kappa of two predictions of the same items; 1 if both are of one class alone."""
    same = float((before == after).mean())
    shares = [np.bincount(one, minlength=classes) / len(one) for one in (before, after)]
    chance = float((shares[0] * shares[1]).sum())
    return 1.0 if chance >= 1 else (same - chance) / (1 - chance)
