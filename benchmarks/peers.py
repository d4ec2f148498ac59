"""Strategies of scikit-activeml in our loop: the same features, classifier, splits, seed rounds and figures.

They are handed the encoder's vectors, our classifier's probabilities and the labels so far, as their interface asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.files import read_json, write_json
from al_pipeline.head import Head, fit_head
from al_pipeline.metrics import evaluate
from al_pipeline.simulation.runs import METRICS, Prepared, Work, simulate_run

Floats = NDArray[np.float64]


def make_peer(name: str, seed: int) -> Any:
    """One of their strategies by its name here. Raises KeyError for one that is not in `PEERS`."""
    import skactiveml.pool as theirs

    makers: Mapping[str, Callable[[], Any]] = {
        "their margin": lambda: theirs.UncertaintySampling(method="margin_sampling", random_state=seed),
        "their entropy": lambda: theirs.UncertaintySampling(method="entropy", random_state=seed),
        "their BADGE": lambda: theirs.Badge(random_state=seed),
        "their CLUE": lambda: theirs.Clue(random_state=seed),
        "their Falcun": lambda: theirs.Falcun(random_state=seed),
        "their CAL": lambda: theirs.ContrastiveAL(random_state=seed),
        "their CoreSet": lambda: theirs.CoreSet(random_state=seed),
        "their TypiClust": lambda: theirs.TypiClust(random_state=seed),
    }
    return makers[name]()


_NAMES = ("margin", "entropy", "BADGE", "CLUE", "Falcun", "CAL", "CoreSet", "TypiClust")
PEERS = tuple(f"their {name}" for name in _NAMES)


def peer_run(work: Work, prepared: Prepared, name: str, seed: int, path: Path) -> dict[str, Any]:
    """One strategy's curve with one seed; read from `path` where it is there."""
    kept: dict[str, Any] | None = read_json(path)
    if kept is not None:
        return kept
    began = time.perf_counter()
    corpus, classes = prepared.corpus, prepared.corpus.classes
    assert work.dense is not None
    pool = np.sort(corpus.pool)
    vectors = work.dense[pool].astype(np.float64)
    place = {corpus.item_ids[int(position)]: row for row, position in enumerate(pool)}
    first = simulate_run(replace(work, rounds=0), prepared, "margin", seed).points[0]
    labeled = [place[query.item_id] for query in first.queries]
    strategy = make_peer(name, seed)
    row: dict[str, Any] = {"strategy": name, "seed": seed, "budgets": [], **{metric: [] for metric in METRICS}}
    for number in range(work.rounds + 1):
        rows = np.sort(np.array(labeled))
        truth = [classes[int(one)] for one in corpus.truth[pool[rows]]]
        head = fit_head(prepared.matrix.rows(pool[rows]), truth, classes, seed, work.calibrate)
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
            size = min(work.asking.batch_size, len(pool) - len(labeled))
            labeled += [int(one) for one in _query(strategy, vectors, given, head, prepared, pool, size)]
    write_json(path, row | {"seconds": round(time.perf_counter() - began, 2)})
    return row


def _query(
    strategy: Any, vectors: Floats, given: Floats, head: Head, prepared: Prepared, pool: NDArray[np.intp], size: int
) -> NDArray[np.intp]:
    """What a strategy asks: rows of the pool."""
    from inspect import signature

    known = signature(strategy.query).parameters
    model = _model(vectors, head, prepared, pool) if {"clf", "estimator"} & known.keys() else None
    options: dict[str, Any] = {}
    for argument, fit in (("clf", "fit_clf"), ("estimator", "fit_estimator")):
        if argument in known:
            options |= {argument: model, fit: False}
    found: NDArray[np.intp] = strategy.query(vectors, given, batch_size=size, **options)
    return found


def _model(vectors: Floats, head: Head, prepared: Prepared, pool: NDArray[np.intp]) -> Any:
    """Our classifier, trained, in their clothes: it finds an item by its vector."""
    from skactiveml.base import SkactivemlClassifier

    row = {vector.tobytes(): number for number, vector in enumerate(vectors)}
    proba = head.predict_proba(prepared.matrix.rows(pool))

    class Trained(SkactivemlClassifier):  # type: ignore[misc]
        def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
            raise NotImplementedError("it is trained")

        def predict_proba(self, X: Any, **_: Any) -> Floats:
            known = [row[np.ascontiguousarray(vector).tobytes()] for vector in X]
            return np.asarray(proba[known], dtype=np.float64)

    model = Trained(classes=list(range(len(prepared.corpus.classes))))
    model.classes_ = np.arange(len(prepared.corpus.classes))
    model.cost_matrix_ = 1 - np.eye(len(model.classes_))
    return model
