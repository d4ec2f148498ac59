"""Strategies of scikit-activeml in our loop: the same features, classifier, splits, seed rounds and metrics.

They get the encoder's vectors, our classifier's probabilities and the labels so far, as their interface requires, and
our committee. A strategy that needs a classifier's output other than for an item of the pool (after one more label, or
for a vector that it made up) gets scikit-learn's logistic regression on the vectors, or one of their own classifiers
if it accepts no other; what it selects is then learnt and measured with our classifier all the same.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.evaluation.metrics import evaluate
from al_pipeline.files import read_json, write_json
from al_pipeline.models.ensembles import draw_heads
from al_pipeline.models.estimators import Estimate
from al_pipeline.models.linear import Head, fit_head
from al_pipeline.simulation.runs import METRICS, Prepared, Work, simulate_run

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


def _uncertainty(method: str) -> Callable[[int, int], Any]:
    return lambda seed, _: _theirs().UncertaintySampling(method=method, random_state=seed)


def _committee(method: str) -> Callable[[int, int], Any]:
    return lambda seed, _: _theirs().QueryByCommittee(method=method, random_state=seed)


def _plain(name: str) -> Callable[[int, int], Any]:
    return lambda seed, _: getattr(_theirs(), name)(random_state=seed)


def _with_classes(name: str) -> Callable[[int, int], Any]:
    return lambda seed, classes: getattr(_theirs(), name)(classes=list(range(classes)), random_state=seed)


def _theirs() -> Any:
    import skactiveml.pool

    return skactiveml.pool


_MAKERS: Mapping[str, Callable[[int, int], Any]] = {
    "margin": _uncertainty("margin_sampling"),
    "entropy": _uncertainty("entropy"),
    "least confident": _uncertainty("least_confident"),
    "expected AP": _uncertainty("expected_average_precision"),
    "QBC KL": _committee("KL_divergence"),
    "QBC vote entropy": _committee("vote_entropy"),
    "QBC variation ratios": _committee("variation_ratios"),
    "BADGE": _plain("Badge"),
    "BatchBALD": _plain("BatchBALD"),
    "CAL": _plain("ContrastiveAL"),
    "CLUE": _plain("Clue"),
    "CoreSet": _plain("CoreSet"),
    "CostEmbedding": _with_classes("CostEmbeddingAL"),
    "DiscriminativeAL": _plain("DiscriminativeAL"),
    "DropQuery": _plain("DropQuery"),
    "epistemic": _plain("EpistemicUncertaintySampling"),
    "expected error": _plain("MonteCarloEER"),
    "Falcun": _plain("Falcun"),
    "FourDs": _plain("FourDs"),
    "GreedyBALD": _plain("GreedyBALD"),
    "GreedySamplingX": _plain("GreedySamplingX"),
    "MaxHerding": _plain("MaxHerding"),
    "McPAL": lambda seed, _: _theirs().ProbabilisticAL(metric="rbf", random_state=seed),
    "ProbCover": lambda seed, classes: _theirs().ProbCover(n_classes=classes, random_state=seed),
    "QUIRE": _with_classes("Quire"),
    "TypiClust": _plain("TypiClust"),
    "value of information": _plain("ValueOfInformationEER"),
}
"""All classification strategies of 1.0.1 except plain random sampling. Those for regression take no classifier."""
PEERS = tuple(f"their {name}" for name in _MAKERS)

_ASK_ELSEWHERE = {"DropQuery", "epistemic", "expected error", "value of information"}
"""Strategies that get a classifier to fit."""


class TooSlow(BaseException):
    """A batch exceeded its processor time. (Not an Exception: their `fit` continues after any of those.)"""


def make_peer(name: str, seed: int, classes: int = 2) -> Any:
    """One of their strategies by its name here. Raises KeyError if it is not in `PEERS`."""
    return _MAKERS[name.removeprefix("their ")](seed, classes)


@dataclass(frozen=True)
class _Pool:
    """What a strategy gets: vectors (n, d), labels (n,) with NaN for none, the trained head and the committee."""

    vectors: Floats
    given: Floats
    head: Head
    committee: Callable[[], tuple[Head | Estimate, ...]]
    prepared: Prepared
    positions: Rows

    @property
    def classes(self) -> list[int]:
        return list(range(len(self.prepared.corpus.classes)))


def peer_run(
    work: Work, prepared: Prepared, name: str, seed: int, path: Path, limit: float | None = None
) -> dict[str, Any]:
    """One strategy's curve with one seed; read from `path` if that exists.

    `limit`: seconds of processor time for a batch. With it, a strategy that needs more, or raises, gives a row with
    `failed` and the reason in place of a curve.
    """
    kept: dict[str, Any] | None = read_json(path)
    if kept is not None:
        return kept
    began = time.process_time()
    others = path.parent.glob(f"{path.stem.rpartition('-')[0]}-*.json")
    if limit is not None and (slow := next((row for one in others if _is_slow(row := read_json(one))), None)):
        return {"strategy": name, "seed": seed, "failed": slow["failed"], "cpu_seconds": slow["cpu_seconds"]}
    try:
        row = _curve(work, prepared, name, seed, limit)
    except (Exception, TooSlow) as error:  # any error of their code is a result of the screening
        if limit is None:
            raise
        row = {"strategy": name, "seed": seed, "failed": f"{type(error).__name__}: {str(error)[:200]}"}
    row |= {"cpu_seconds": round(time.process_time() - began, 2)}
    write_json(path, row)
    return row


def _is_slow(row: Mapping[str, Any]) -> bool:
    return str(row.get("failed")).startswith(TooSlow.__name__)


def _curve(work: Work, prepared: Prepared, name: str, seed: int, limit: float | None) -> dict[str, Any]:
    corpus, classes = prepared.corpus, prepared.corpus.classes
    assert work.dense is not None
    pool = np.sort(corpus.pool)
    vectors = work.dense[pool].astype(np.float64)
    place = {corpus.item_ids[int(position)]: row for row, position in enumerate(pool)}
    first = simulate_run(replace(work, rounds=0), prepared, "margin", seed).points[0]
    labeled = [place[query.item_id] for query in first.queries]
    strategy = make_peer(name, seed, len(classes))
    row: dict[str, Any] = {"strategy": name, "seed": seed, "budgets": [], **{metric: [] for metric in METRICS}}
    for number in range(work.rounds + 1):
        rows = np.sort(np.array(labeled))
        truth = [classes[int(one)] for one in corpus.truth[pool[rows]]]
        known = prepared.matrix.rows(pool[rows])
        head = fit_head(known, truth, classes, seed, work.calibrate)
        figures = evaluate(
            head.predict_proba(prepared.matrix.rows(corpus.test)),
            corpus.truth[corpus.test],
            classes,
            np.random.default_rng([seed, number]),
            0,
            positive=work.texts.positive,
        )
        row["budgets"].append(len(labeled))
        for metric in METRICS:
            row[metric].append(getattr(figures, metric).value)
        if number < work.rounds and len(labeled) < len(pool):
            given = np.full(len(pool), np.nan)
            given[rows] = corpus.truth[pool[rows]]
            size = min(work.config.batch_size, len(pool) - len(labeled))
            draws = SeedSequence([seed, number])

            def committee(
                head: Head = head, known: Any = known, truth: list[str] = truth, draws: SeedSequence = draws
            ) -> tuple[Head | Estimate, ...]:
                return draw_heads("committee", head, known, truth, draws)

            with _within(limit):
                found = _query(strategy, name, _Pool(vectors, given, head, committee, prepared, pool), size)
            labeled += [int(one) for one in found]
    return row


@contextmanager
def _within(limit: float | None) -> Iterator[None]:
    """Raise TooSlow after that many processor seconds of this process."""
    if limit is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {limit:.0f} s of processor time for a batch")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _query(strategy: Any, name: str, pool: _Pool, size: int) -> Rows:
    """The rows of the pool that a strategy selects."""
    known = signature(strategy.query).parameters
    options: dict[str, Any] = {}
    for argument, fit in (("clf", "fit_clf"), ("estimator", "fit_estimator")):
        if argument in known:
            own = _own_classifier(name, pool)
            options |= {argument: own or _trained(pool, pool.head), fit: own is not None}
    if "ensemble" in known:
        options |= {"ensemble": [_trained(pool, head) for head in pool.committee()], "fit_ensemble": False}
    if "discriminator" in known:
        options["discriminator"] = _logistic(pool)
    found: Rows = strategy.query(pool.vectors, pool.given, batch_size=size, **options)
    return found


def _own_classifier(name: str, pool: _Pool) -> Any:
    """A classifier that the strategy fits itself; None for most."""
    if name == "their FourDs":
        from skactiveml.classifier import MixtureModelClassifier

        return MixtureModelClassifier(classes=pool.classes, random_state=0)
    return _logistic(pool) if name.removeprefix("their ") in _ASK_ELSEWHERE else None


def _logistic(pool: _Pool) -> Any:
    from skactiveml.classifier import SklearnClassifier
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped, unused-ignore]

    return SklearnClassifier(LogisticRegression(max_iter=500), classes=pool.classes)


def _trained(pool: _Pool, head: Head | Estimate) -> Any:
    """Our trained classifier with their interface: it identifies an item by its vector."""
    from skactiveml.base import SkactivemlClassifier

    row = {vector.tobytes(): number for number, vector in enumerate(pool.vectors)}
    proba = head.predict_proba(pool.prepared.matrix.rows(pool.positions))

    class Trained(SkactivemlClassifier):  # type: ignore[misc]
        def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
            raise NotImplementedError("it is trained")

        def predict(self, X: Any) -> Rows:
            return np.asarray(self.predict_proba(X).argmax(axis=1))

        def predict_proba(self, X: Any, **_: Any) -> Floats:
            known = [row[np.ascontiguousarray(vector).tobytes()] for vector in X]
            return np.asarray(proba[known], dtype=np.float64)

    model = Trained(classes=pool.classes)
    model.classes_ = np.array(pool.classes)
    model.cost_matrix_ = 1 - np.eye(len(pool.classes))
    return model
