"""Replay: learning curves on known labels, honest about what the model may see; and that the strategies pay."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from al_pipeline.active_learning.acquisition import margin
from al_pipeline.active_learning.batch import VectorsOf
from al_pipeline.active_learning.choice import AUTO, QueryConfig
from al_pipeline.active_learning.strategies import STRATEGIES, scoring_of
from al_pipeline.evaluation.figures import Metrics
from al_pipeline.simulation.replay import Corpus, Curve, Draw, Fit, Indices, Predict, mean_curve, replay

ROUNDS = 4


def asking(strategy: str = "margin", seed: int = 0, seed_size: int = 20, batch_size: int = 20, **other) -> QueryConfig:
    return QueryConfig(seed, seed_size, strategy, batch_size, **{"random_share": 0.1, "shortlist": 100, **other})


def vectors_of(data: Corpus, vectors: np.ndarray) -> VectorsOf:
    row = {item_id: number for number, item_id in enumerate(data.item_ids)}
    return lambda ids: vectors[[row[item_id] for item_id in ids]]


def corpus(n: int = 800, positives: float = 0.12, seed: int = 0) -> tuple[Corpus, np.ndarray]:
    """Two overlapping clouds, the second rare; a quarter is the test set. And their vectors."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < positives).astype(np.intp)
    vectors = rng.normal(size=(n, 8)) + truth[:, None] * np.array([2.0, 1.0, 0, 0, 0, 0, 0, 0])
    order = rng.permutation(n)
    names = [f"item-{number}" for number in range(n)]
    return Corpus(names, truth, np.sort(order[n // 4 :]), np.sort(order[: n // 4]), ("ham", "spam")), vectors


def logistic(data: Corpus, vectors: np.ndarray, seen: list[Indices] | None = None) -> Fit:
    """Ridge logistic regression by Newton steps; a constant where one class alone was seen."""
    x = np.hstack([vectors, np.ones((len(vectors), 1))])

    def fit(rows: Indices) -> Predict:
        if seen is not None:
            seen.append(rows)
        y = data.truth[rows].astype(float)
        w = np.zeros(x.shape[1])
        for _ in range(8):
            p = 1 / (1 + np.exp(-x[rows] @ w))
            hessian = (x[rows] * (p * (1 - p))[:, None]).T @ x[rows] + np.eye(len(w))
            w -= np.linalg.solve(hessian, x[rows].T @ (p - y) + w)

        def predict(some: Indices) -> np.ndarray:
            p = 1 / (1 + np.exp(-x[some] @ w))
            return np.column_stack([1 - p, p])

        return predict

    return fit


def average_precision(metrics: Metrics) -> float | None:
    return metrics.average_precision.value


def committee(fit: Fit) -> Draw:
    """Five models of labels drawn again."""

    def draw(kind: str, labeled: Indices, seed: np.random.SeedSequence) -> Predict:
        rng = np.random.default_rng(seed)
        models = [fit(rng.choice(labeled, len(labeled))) for _ in range(5)]
        return lambda some: np.stack([predict(some) for predict in models], axis=1)

    return draw


EVERY = pytest.mark.parametrize("strategy", sorted([*STRATEGIES, AUTO]))


@EVERY
def test_every_strategy_replays_and_the_model_sees_labelled_pool_items_alone(strategy: str) -> None:
    data, vectors = corpus(200)
    seen: list[Indices] = []
    asked = asking(strategy, 1, batch_size=10)
    given: list[Indices] = []
    draw = committee(logistic(data, vectors, given))
    curve = replay(data, asked, 3, logistic(data, vectors, seen), vectors=vectors_of(data, vectors), draw=draw)
    assert set().union(*map(set, given)) <= set(seen[-1]) and bool(given) == bool(scoring_of(strategy).samples)
    assert [point.labels for point in curve.points] == [len(rows) for rows in seen] == [20, 30, 40, 50]
    for before, rows in zip([[], *seen], seen, strict=False):
        assert set(before) < set(rows.tolist()) <= set(data.pool.tolist())
    assert all(point.metrics.items == len(data.test) for point in curve.points)


def test_margin_asks_for_what_the_newest_model_is_least_sure_of() -> None:
    data, vectors = corpus(200)
    seen: list[Indices] = []
    fit = logistic(data, vectors, seen)
    replay(data, asking(seed=1, batch_size=10, random_share=0.0), 1, fit)
    before, after = seen
    unlabeled = np.setdiff1d(data.pool, before)
    scores = margin(fit(before)(unlabeled))
    assert set(after) - set(before) == set(unlabeled[np.argsort(-scores)[:10]])


def test_same_seed_same_curve() -> None:
    data, vectors = corpus(200)
    fit = logistic(data, vectors)
    three, four = asking(seed=3), asking(seed=4)
    assert replay(data, three, ROUNDS, fit, bootstrap=100) == replay(data, three, ROUNDS, fit, bootstrap=100)
    assert replay(data, three, ROUNDS, fit) != replay(data, four, ROUNDS, fit)


@EVERY
def test_labels_of_the_test_set_change_no_selection(strategy: str) -> None:
    """Any order of the test set's labels: the same questions, other figures."""
    data, vectors = corpus(200)
    other = data.truth.copy()
    other[data.test] = np.random.default_rng(1).permutation(1 - other[data.test])
    swapped = replace(data, truth=other)
    one, two = (
        replay(arm, asking(strategy), 3, fit, vectors=vectors_of(data, vectors), draw=committee(fit))
        for arm, fit in ((data, logistic(data, vectors)), (swapped, logistic(swapped, vectors)))
    )
    assert [point.queries for point in one.points] == [point.queries for point in two.points]
    assert [point.metrics for point in one.points] != [point.metrics for point in two.points]


def test_arms_of_one_seed_share_their_seed_round() -> None:
    data, vectors = corpus(200)
    fit = logistic(data, vectors)
    arms = [replay(data, asking(name, 3), 1, fit) for name in ("margin", "random")]
    assert arms[0].points[0] == arms[1].points[0]
    assert arms[0].points[1] != arms[1].points[1]


def test_replay_ends_with_the_pool() -> None:
    data, vectors = corpus(80)
    curve = replay(data, asking(batch_size=30), 9, logistic(data, vectors))
    assert [point.labels for point in curve.points] == [20, 50, 60]


@pytest.mark.slow
def test_margin_beats_random_where_a_class_is_rare_and_random_equals_random() -> None:
    """The statistical gate of the whole loop: area under the average-precision curve, paired over 40 corpora."""

    def area(strategy: str, number: int, seed: int) -> float:
        data, vectors = corpus(2000, positives=0.08, seed=number)
        curve = replay(data, asking(strategy, seed, 40, shortlist=500), 6, logistic(data, vectors))
        return float(np.mean([average_precision(point.metrics) for point in curve.points[1:]]))

    random = np.array([area("random", number, number) for number in range(40)])
    gain = np.array([area("margin", number, number) for number in range(40)]) - random
    nothing = np.array([area("random", number, number + 100) for number in range(40)]) - random
    assert gain.mean() - 2 * gain.std(ddof=1) / np.sqrt(40) > 0.01
    assert abs(nothing.mean()) < 3 * nothing.std(ddof=1) / np.sqrt(40)


# Means over seeds ---------------------------------------------------------------------------------------------------
def curves(values: list[list[float | None]]) -> tuple[list[Curve], dict[int, float | None]]:
    """Curves of one seed each with these figures at 10, 20, ... labels, looked up by the metrics' identity."""
    data, vectors = corpus(120)
    made = [
        replay(data, asking("random", seed, 10, 10), len(values[0]) - 1, logistic(data, vectors))
        for seed in range(len(values))
    ]
    figures = {
        id(point.metrics): value
        for curve, row in zip(made, values, strict=True)
        for point, value in zip(curve.points, row, strict=True)
    }
    return made, figures


def test_mean_has_the_t_interval() -> None:
    made, figures = curves([[0.5, 0.8], [0.6, 0.8], [0.9, 0.8]])
    first, second = mean_curve(made, lambda metrics: figures[id(metrics)])
    low, high = stats.t.interval(0.95, 2, loc=2 / 3, scale=stats.sem([0.5, 0.6, 0.9]))
    assert (first.labels, first.mean, first.low, first.high, first.seeds) == pytest.approx((10, 2 / 3, low, high, 3))
    assert (second.mean, second.low, second.high) == pytest.approx((0.8, 0.8, 0.8))


def test_missing_figures_are_left_out_not_counted_as_zero() -> None:
    made, figures = curves([[None, 0.4, None], [0.5, 0.6, None]])
    first, second = mean_curve(made, lambda metrics: figures[id(metrics)])
    assert (first.labels, first.mean, first.low, first.high, first.seeds) == (10, 0.5, None, None, 1)
    assert (second.labels, second.mean, second.seeds) == (20, pytest.approx(0.5), 2)


def test_curves_at_different_numbers_of_labels_are_refused() -> None:
    one, other = curves([[0.1]])[0] + curves([[0.1, 0.2]])[0]
    with pytest.raises(ValueError, match=r"\(10,\) and \(10, 20\)"):
        mean_curve([one, other], average_precision)
    assert mean_curve([], average_precision) == []


# Refusals -----------------------------------------------------------------------------------------------------------
def test_wrong_corpora_are_named() -> None:
    truth, rows = np.array([0, 1, 0]), np.array([0, 1])
    with pytest.raises(ValueError, match="'b' is in the pool and in the test set"):
        Corpus(["a", "b", "c"], truth, rows, np.array([1, 2]), ("x", "y"))
    with pytest.raises(ValueError, match="contains an item twice"):
        Corpus(["a", "a", "c"], truth, rows, np.array([2]), ("x", "y"))
    with pytest.raises(ValueError, match="2 ids but 3 true classes"):
        Corpus(["a", "b"], truth, rows, np.array([], dtype=int), ("x", "y"))
