"""Replay: what rounds with another strategy or seed would have come to, on a corpus whose labels are all known.

The same `choose` and `evaluate` as in production; the model is passed in as `fit`, so that this knows arrays alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from al_pipeline.acquisition import ACQUISITION
from al_pipeline.metrics import Floats, Metrics, check_truth, evaluate
from al_pipeline.query_strategies import STRATEGIES, Shortlist, choose, round_seed, top_k

Indices = NDArray[np.intp]
Predict = Callable[[Indices], Floats]
"""Positions in the corpus (m,) -> probabilities (m, C)."""
Fit = Callable[[Indices], Predict]
"""Positions of the labelled items -> the model trained on them. It may look at the truth of those alone."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A labelled corpus: ids and true classes (n,) of all items, positions of its pool and of its test set."""

    item_ids: Sequence[str]
    truth: Indices
    pool: Indices
    test: Indices
    classes: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.item_ids) != len(self.truth):
            raise ValueError(f"{len(self.item_ids)} ids and {len(self.truth)} true classes")
        if len({self.item_ids[int(p)] for p in self.pool}) < len(self.pool):
            raise ValueError("the pool names an item twice")
        check_truth(self.truth, len(self.classes))
        both = np.intersect1d(self.pool, self.test)
        if len(both):
            raise ValueError(f"item {self.item_ids[int(both[0])]!r} is in the pool and in the test set")


@dataclass(frozen=True, slots=True)
class Settings:
    """How the rounds go: a seed round without a model, then `rounds` active ones."""

    strategy: str
    seed_size: int
    batch_size: int
    rounds: int
    random_share: float = 0.0
    shortlist: int = 1000


@dataclass(frozen=True, slots=True)
class Point:
    """The model after a round: how many labels it had, and how good it is."""

    labels: int
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Curve:
    """A learning curve: one point a round, the seed round first."""

    strategy: str
    seed: int
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class MeanPoint:
    """The mean over seeds at one number of labels; `low`, `high` None where one seed alone has a value there."""

    labels: int
    mean: float
    low: float | None
    high: float | None
    seeds: int


def replay(corpus: Corpus, settings: Settings, fit: Fit, seed: int, bootstrap: int = 0) -> Curve:
    """The learning curve that `settings` would have given with this project seed, answered by the truth.

    Ends early when the pool is used up. A strategy that needs vectors cannot be replayed (ValueError).
    """
    strategy = STRATEGIES[settings.strategy]
    if strategy.needs - {"scores", "proba"}:
        raise ValueError(f"strategy {settings.strategy!r} needs {', '.join(sorted(strategy.needs))}; no replay of that")
    position = {corpus.item_ids[p]: int(p) for p in corpus.pool}
    labeled: list[int] = []
    points: list[Point] = []
    predict: Predict | None = None
    for round_number in range(settings.rounds + 1):
        unlabeled = np.array(sorted(set(position.values()) - set(labeled)), dtype=np.intp)
        if len(unlabeled) == 0:
            break
        choice = round_seed(seed, round_number, settings.strategy if predict else "random")
        queries = choose(
            [corpus.item_ids[p] for p in unlabeled],
            _shortlist(corpus, settings, predict, unlabeled, seed, round_number)
            if predict and strategy.needs
            else None,
            strategy=settings.strategy,
            k=settings.batch_size if predict else settings.seed_size,
            random_share=settings.random_share,
            seed=choice,
            cold_start=predict is None,
        )
        labeled += [position[query.item_id] for query in queries]
        predict = fit(np.array(sorted(labeled), dtype=np.intp))
        rng = np.random.default_rng([seed, round_number])
        metrics = evaluate(predict(corpus.test), corpus.truth[corpus.test], corpus.classes, rng, bootstrap)
        points.append(Point(len(labeled), metrics))
    return Curve(settings.strategy, seed, tuple(points))


def _shortlist(
    corpus: Corpus, settings: Settings, predict: Predict, unlabeled: Indices, seed: int, round_number: int
) -> Shortlist:
    proba = predict(unlabeled)
    scores = ACQUISITION[STRATEGIES[settings.strategy].acquisition or "margin"](proba)
    ids = [corpus.item_ids[p] for p in unlabeled]
    best = top_k(scores, ids, settings.shortlist, round_seed(seed, round_number, "shortlist"))
    return Shortlist([ids[row] for row in best], scores[best], np.asarray(proba, dtype=np.float64)[best])


def mean_interval(
    curves: Sequence[Curve], figure: Callable[[Metrics], float | None], confidence: float = 0.95
) -> list[MeanPoint]:
    """Mean of a figure over curves of several seeds, with Student's t interval of the mean (Gosset 1908).

    Points where a curve has no value are means over the others; points where none has are left out. Raises ValueError
    where the curves do not stand at the same numbers of labels.
    """
    grids = {tuple(point.labels for point in curve.points) for curve in curves}
    if len(grids) > 1:
        raise ValueError(f"curves at different numbers of labels: {' and '.join(map(str, sorted(grids)))}")
    means = []
    for column, labels in enumerate(next(iter(grids), ())):
        found = [figure(curve.points[column].metrics) for curve in curves]
        values = np.array([value for value in found if value is not None], dtype=np.float64)
        if len(values) == 0:
            continue
        low = high = None
        if len(values) > 1:
            half = _t_quantile((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
            low, high = float(values.mean() - half), float(values.mean() + half)
        means.append(MeanPoint(labels, float(values.mean()), low, high, len(values)))
    return means


def _t_quantile(probability: float, freedom: int) -> float:
    from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

    return float(stdtrit(freedom, probability))
