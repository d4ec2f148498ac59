"""Replay: the learning curve of simulated rounds on a labelled corpus.

It calls the functions of the stages (`top_candidates`, `next_batch`, `evaluate`) in the same order. The model is passed
in as `fit`, so this module works on arrays alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.batch import VectorsOf, next_batch
from al_pipeline.active_learning.choice import Choice, QueryConfig
from al_pipeline.active_learning.names import searched
from al_pipeline.active_learning.relabeling import Doubted, Labeled, doubtful
from al_pipeline.active_learning.sampling import ensemble_seed, round_seed
from al_pipeline.active_learning.shortlist import Shortlist, top_candidates
from al_pipeline.active_learning.strategies import Samples, scoring_of
from al_pipeline.evaluation.figures import Metrics
from al_pipeline.evaluation.metrics import Floats, check_truth, evaluate
from al_pipeline.evaluation.savings import mean_interval
from al_pipeline.records import RELABEL, Query
from al_pipeline.simulation.annotators import Labeling, TrueLabels

Indices = NDArray[np.intp]
Predict = Callable[[Indices], Floats]
"""Positions in the corpus (m,) -> probabilities (m, C)."""
Fit = Callable[[Indices], Predict]
"""Positions of the labelled items -> the model trained on them. It must use the classes of these items only."""
HeldOut = Callable[[Indices], Floats | None]
"""Positions of the labelled items (m,) -> probabilities (m, C) by models not trained on the item; None if too few."""
Draw = Callable[[Samples, Indices, SeedSequence], Predict]
"""Kind of samples, positions of the labelled items, seed -> K sampled models: positions (m,) -> (m, K, C)."""

_BLOCK = 1000
"""Number of items whose samples are in memory at a time."""


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
            raise ValueError(f"{len(self.item_ids)} ids but {len(self.truth)} true classes")
        if len({self.item_ids[int(p)] for p in self.pool}) < len(self.pool):
            raise ValueError("the pool contains an item twice")
        check_truth(self.truth, len(self.classes))
        both = np.intersect1d(self.pool, self.test)
        if len(both):
            raise ValueError(f"item {self.item_ids[int(both[0])]!r} is in the pool and in the test set")


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a learning curve: number of labels, metrics, and the queries and strategy of the newest batch."""

    labels: int
    metrics: Metrics
    queries: tuple[Query, ...]
    choice: Choice
    answers: int = 0
    """The number of answers, of which an item can have several."""
    right: float = 1.0
    """Share of the labels that are right."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A learning curve: one point per round, the seed round first."""

    strategy: str
    seed: int
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class MeanPoint:
    """The mean over seeds at one number of labels; `low` and `high` are None if only one seed has a value."""

    labels: int
    mean: float
    low: float | None
    high: float | None
    seeds: int


def replay(
    corpus: Corpus,
    config: QueryConfig,
    rounds: int,
    fit: Fit,
    bootstrap: int = 0,
    vectors: VectorsOf | None = None,
    positive: str | None = None,
    on_progress: Callable[[int], None] | None = None,
    guide: Mapping[str, Floats] | None = None,
    draw: Draw | None = None,
    named: Mapping[str, Floats] | None = None,
    labeling: Labeling | None = None,
    held_out: HeldOut | None = None,
) -> Curve:
    """The learning curve of a seed round and `rounds` active ones with the settings `config`.

    `labeling` makes labels of the queries; None: the truth is told. `held_out` is for labels that are asked again.

    Ends early when the pool is exhausted. `vectors` and `draw` are for strategies that need vectors or sampled models
    (ValueError without); `positive` is the class of `evaluate`; `on_progress` gets the number of labels after each
    round. `guide`: for a class, the similarity of each item of the corpus (n,) to its guide texts. `named`: for a
    class, the `name_scores` of each item.

    Queries never depend on the true classes of unlabelled items: `fit` gets the pool's labels batch by batch, and only
    `evaluate` gets those of the test set.
    """
    position = {corpus.item_ids[p]: int(p) for p in corpus.pool}
    truth_of = {item_id: corpus.classes[int(corpus.truth[place])] for item_id, place in position.items()}
    labeling = labeling or TrueLabels(truth_of)
    points: list[Point] = []
    predict: Predict | None = None
    for round_number in range(rounds + 1):
        labeled = labeling.labels
        closed = labeled.keys() | labeling.ignored
        unlabeled = [item_id for item_id in position if item_id not in closed]
        if not unlabeled:
            break
        scored = None
        if predict is not None:
            scored = _shortlist(config, round_number, predict, draw, labeled, unlabeled, position)
        guided = _search({**(guide or {}), **_named(named or {}, labeled)}, config, unlabeled, position)
        queries, choice = next_batch(
            config,
            round_number,
            unlabeled,
            scored,
            labeled,
            corpus.classes,
            vectors,
            first=labeling.ties,
            guided=guided,
            doubted=_doubted(config, round_number, labeling, held_out, corpus.classes, position),
        )
        forecasts = {} if predict is None else _forecasts(queries, predict, corpus.classes, position)
        labeling.ask(queries, round_number, forecasts)
        labeled = labeling.labels
        predict = fit(_positions(labeled, position))
        rng = np.random.default_rng([config.seed, round_number])
        truth = corpus.truth[corpus.test]
        metrics = evaluate(predict(corpus.test), truth, corpus.classes, rng, bootstrap, positive=positive)
        right = sum(truth_of[item_id] == label for item_id, label in labeled.items()) / max(1, len(labeled))
        points.append(Point(len(labeled), metrics, tuple(queries), choice, labeling.answers, right))
        if on_progress:
            on_progress(labeling.answers)
    return Curve(config.strategy, config.seed, tuple(points))


def _positions(labeled: Mapping[str, str], position: Mapping[str, int]) -> Indices:
    """Positions of the labelled items, ordered by id as in the stages."""
    return np.array([position[item_id] for item_id in sorted(labeled)], dtype=np.intp)


def _forecasts(
    queries: Sequence[Query], predict: Predict, classes: Sequence[str], position: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """The newest model's probabilities of each query's classes."""
    proba = predict(np.array([position[query.item_id] for query in queries], np.intp))
    return {
        query.item_id: dict(zip(classes, row.tolist(), strict=True)) for query, row in zip(queries, proba, strict=True)
    }


def _doubted(
    config: QueryConfig,
    round_number: int,
    labeling: Labeling,
    held_out: HeldOut | None,
    classes: Sequence[str],
    position: Mapping[str, int],
) -> Doubted:
    """The labelled items that the stage `select` would ask again."""
    if not config.relabel or held_out is None:
        return []
    labels, answered = labeling.labels, labeling.answered()
    ids = sorted(labels)
    mine = [row for row, item_id in enumerate(ids) if item_id in answered]
    proba = held_out(_positions(labels, position)) if mine else None
    if proba is None:
        return []
    known = Labeled(
        [ids[row] for row in mine],
        np.array([[answered[ids[row]].votes.get(name, 0) for name in classes] for row in mine]),
        [classes.index(labels[ids[row]]) for row in mine],
        [answered[ids[row]].open for row in mine],
    )
    seed = round_seed(config.seed, round_number, RELABEL)
    return doubtful(known, proba[mine], config.relabel, config.batch_size, seed)


def _shortlist(
    config: QueryConfig,
    round_number: int,
    predict: Predict,
    draw: Draw | None,
    labeled: Mapping[str, str],
    unlabeled: Sequence[str],
    position: Mapping[str, int],
) -> Shortlist:
    """The shortlist that the stage `score` would write."""
    rows = np.array([position[item_id] for item_id in unlabeled], dtype=np.intp)
    proba = np.asarray(predict(rows), dtype=np.float64)
    scoring = scoring_of(config.strategy)
    if scoring.samples is None:
        scores = scoring.function(proba)
    elif draw is None:
        raise ValueError(f"strategy {config.strategy!r} needs samples from a {scoring.samples}, but `draw` is missing")
    else:
        seed = ensemble_seed(config.seed, round_number, config.strategy)
        sampled = draw(scoring.samples, _positions(labeled, position), seed)
        parts = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
        scores = np.concatenate([scoring.function(sampled(part)) for part in parts])
    best = top_candidates(unlabeled, scores, config.shortlist, config.batch_size, config.seed)
    return Shortlist([unlabeled[row] for row in best], scores[best], proba[best])


def _named(named: Mapping[str, Floats], labeled: Mapping[str, str]) -> dict[str, Floats]:
    """The scores of the classes that are searched by their names, as in the stage `score`."""
    counts = Counter(labeled.values())
    return {name: named[name] for name in searched({name: counts[name] for name in named})}


def _search(
    guide: Mapping[str, Floats], config: QueryConfig, unlabeled: Sequence[str], position: Mapping[str, int]
) -> dict[str, list[str]]:
    """The unlabelled items most similar to the guide of each class, as in the stage `score`."""
    found = {}
    for name, similarity in guide.items():
        scores = similarity[[position[item_id] for item_id in unlabeled]]
        rows = top_candidates(unlabeled, scores, config.batch_size, config.batch_size, config.seed)
        found[name] = [unlabeled[row] for row in rows]
    return found


def mean_curve(
    curves: Sequence[Curve], figure: Callable[[Metrics], float | None], confidence: float = 0.95
) -> list[MeanPoint]:
    """Mean of a metric over curves of several seeds, with Student's t interval.

    A mean omits curves without a value at that point; points without any value are left out. Raises ValueError if
    the curves have different numbers of labels.
    """
    grids = {tuple(point.labels for point in curve.points) for curve in curves}
    if len(grids) > 1:
        raise ValueError(f"the curves have different numbers of labels: {' and '.join(map(str, sorted(grids)))}")
    means = []
    for column, labels in enumerate(next(iter(grids), ())):
        found = [figure(curve.points[column].metrics) for curve in curves]
        values = np.array([value for value in found if value is not None], dtype=np.float64)
        if len(values):
            means.append(mean_point(labels, values, confidence))
    return means


def mean_point(labels: int, values: Floats, confidence: float = 0.95) -> MeanPoint:
    """The mean over seeds of a metric at one number of labels, with Student's t interval of the mean (Gosset 1908).

    Raises ValueError if no value is finite.
    """
    found = mean_interval(values, confidence)
    if found.value is None:
        raise ValueError(f"no value at {labels} labels")
    return MeanPoint(labels, found.value, found.low, found.high, len(values))
