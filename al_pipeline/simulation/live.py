"""Replay of live rounds: each question is asked by a model that knows all answers but the newest ones.

It uses the live model of `al live` (`live.asker`) with the same staleness: at any time each person at work holds one
question, and `AHEAD` others are open. Whoever answers takes the next open question at once, before the model has
learnt the answer: one person the newest question, several a random one, as Label Studio serves them. Then the model
is updated and asks one question. The curve is measured as that of batches: at the same numbers of labels, by the
stages' model trained from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from al_pipeline.active_learning.acquisition import ACQUISITION
from al_pipeline.active_learning.choice import Choice, QueryConfig
from al_pipeline.evaluation.metrics import Floats, evaluate
from al_pipeline.evaluation.savings import SHARES, compare, fewer_labels
from al_pipeline.live.asker import Asker
from al_pipeline.live.pool import LivePool
from al_pipeline.live.queue_size import AHEAD, RECENT
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.records import RANDOM, RANDOM_SLICE, Query
from al_pipeline.simulation.replay import Corpus, Curve, Fit, Point

LIVE = ", live"
"""The end of the name of a run whose questions are asked live."""
MARGIN = "margin"
_PURPOSE = 0x11FE


@dataclass(frozen=True, slots=True)
class LiveWork:
    """How questions are asked live: the people at work, and `live.max_similarity`."""

    people: int
    max_similarity: float


def live_arms(strategies: Sequence[str]) -> dict[str, str]:
    """The live run with which each strategy's batches are compared: that by its score, or by margin if it has none."""
    return {name: f"{name if name in ACQUISITION else MARGIN}{LIVE}" for name in strategies if name != RANDOM}


def live_features(matrix: FeatureMatrix, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """The features of the live model, (n, d): the encoder's vectors, and TF-IDF on its principal directions."""
    blocks: list[Any] = []
    part = matrix.rows(rows)
    if part.dense is not None:
        blocks.append(part.dense)
    if part.sparse is not None and part.components is not None:
        blocks.append(np.asarray(part.sparse @ part.components, np.float32))
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((len(rows), 0), np.float32)


def replay_live(
    corpus: Corpus,
    config: QueryConfig,
    rounds: int,
    fit: Fit,
    features: NDArray[np.float32],
    live: LiveWork,
    first: Callable[[], Curve],
    positive: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Curve:
    """The learning curve of a seed round and of live questions for `rounds` batches.

    `features`: (n, d), of the pool in the corpus's order. `first`: makes the curve of the seed round alone, which is
    that of the batches.
    """
    position = {corpus.item_ids[place]: int(place) for place in corpus.pool}
    truth = {item: corpus.classes[int(corpus.truth[place])] for item, place in position.items()}
    ids = tuple(position)
    pool = LivePool(ids, ids, features, {item: row for row, item in enumerate(ids)})
    asker = Asker(pool, corpus.classes, config.strategy, config.seed, live.max_similarity)
    [start] = first().points
    labels = {query.item_id: truth[query.item_id] for query in start.queries}
    points = [start]
    queue = _Queue(asker, config.random_share, default_rng([config.seed, _PURPOSE]), live.people)
    asker.learn(labels, ())
    queue.fill()
    for number in range(1, rounds + 1):
        answered: list[Query] = []
        while len(answered) < config.batch_size and (query := queue.answer()):
            answered.append(query)
            labels[query.item_id] = truth[query.item_id]
            asker.learn(labels, queue.open_items)
            while asker.go_on():
                pass  # a person takes seconds for an answer
            queue.fill()
        if not answered:
            break
        predict = fit(np.array([position[item] for item in sorted(labels)], dtype=np.intp))
        known = corpus.truth[corpus.test]
        metrics = evaluate(
            predict(corpus.test), known, corpus.classes, default_rng([config.seed, number]), 0, positive=positive
        )
        choice = Choice(config.strategy, asker.acquisition, "asked live")
        points.append(Point(len(labels), metrics, tuple(answered), choice, len(labels)))
        if on_progress:
            on_progress(len(labels))
    return Curve(f"{config.strategy}{LIVE}", config.seed, tuple(points))


class _Queue:
    """The open questions: those that people hold, and those that nobody has taken yet, the newest last."""

    def __init__(self, asker: Asker, share: float, rng: np.random.Generator, people: int) -> None:
        self._asker, self._share, self._rng, self._people = asker, share, rng, people
        self._held: list[Query] = []
        self._free: list[Query] = []
        self._asked = 0
        self._recent: list[str] = []

    @property
    def open_items(self) -> list[str]:
        """The items of all open questions."""
        return [query.item_id for query in (*self._held, *self._free)]

    def fill(self) -> None:
        """Ask what is missing, and let whoever has no question take one."""
        while len(self._held) + len(self._free) < self._people + AHEAD:
            kind = "random" if self._rng.random() < self._share else "chosen"
            near = [*self.open_items, *self._recent]
            chosen = self._asker.ask("random" if kind == "random" else "chosen", near, 1, self._asked)
            if chosen is None:
                break
            name = RANDOM_SLICE if kind == "random" else self._asker.acquisition
            self._free.append(
                Query(chosen.item_id, self._asked, chosen.score, name, 1.0, chosen.predicted, chosen.confidence)
            )
            self._asked += 1
            self._recent = [*self._recent, chosen.item_id][-RECENT:]
        self._take()

    def answer(self) -> Query | None:
        """The question that is answered next; None if none is left. Whoever answered it takes another one."""
        if not self._held:
            return None
        query = self._held.pop(int(self._rng.integers(len(self._held))))
        self._take()
        return query

    def _take(self) -> None:
        while len(self._held) < self._people and self._free:
            place = -1 if self._people == 1 else int(self._rng.integers(len(self._free)))
            self._held.append(self._free.pop(place))


def live_figures(
    budgets: Sequence[int], curves: Mapping[str, Floats], full: Floats, strategies: Sequence[str], live: LiveWork
) -> dict[str, Any]:
    """What live questions save of the labels that batches need. `curves`: of the main metric, by run.

    For each strategy and share of the full-data score: the labels of both, the difference with its interval over
    resamples of the seeds, and the gain of the area with Student's interval, paired by seed.
    """
    found: dict[str, Any] = {}
    for batch, arm in live_arms(strategies).items():
        pair = compare(budgets, {RANDOM: curves[batch], arm: curves[arm]}, full, default_rng(0))
        saved = fewer_labels(budgets, curves[arm], curves[batch], full, default_rng(0))
        own = pair.arms[arm]
        found[batch] = {
            "live": arm,
            "gain": [own.gain.value, own.gain.low, own.gain.high],
            "shares": {
                str(share): {
                    "batch_labels": own.savings[share].random_labels,
                    "live_labels": own.savings[share].labels,
                    "fewer": [saved[share].value, saved[share].low, saved[share].high],
                }
                for share in SHARES
            },
        }
    return {"people": live.people, "open_questions": live.people + AHEAD, "against": found}
