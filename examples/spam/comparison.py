"""What random sampling would have reached with the same budget: a replay on the demo's own data.

It uses the functions that the rounds run (selection, head, metrics) on the workspace's cached features, without Label
Studio. The replay gets the annotators' labels, errors included, and is measured on the test labels that they gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import asdict

from al_pipeline.active_learning.batch import VectorsOf
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.strategies import Samples
from al_pipeline.data.outputs import read_labeled
from al_pipeline.data.pool import iter_items
from al_pipeline.evaluation.figures import Metrics
from al_pipeline.features.tfidf import fit as fit_tfidf
from al_pipeline.features.vectors import open_vectors
from al_pipeline.models.ensembles import draw_heads, sample_proba
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import Head, fit_head
from al_pipeline.simulation.replay import Corpus, Draw, Fit, Indices, MeanPoint, Predict, mean_curve, mean_point, replay
from al_pipeline.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean macro-F1 over the same seeds, by round."""

    strategy: str
    active: tuple[MeanPoint, ...]
    random: tuple[MeanPoint, ...]
    gain: tuple[MeanPoint, ...]
    """Active minus random, by seed: significantly above zero only if `low` is."""


def compare(
    workspace: Workspace,
    answers: Mapping[str, str],
    rounds: int,
    seeds: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Replay `rounds` active rounds after the seed round, with the workspace's strategy and at random, over `seeds`.

    `answers` maps an item's id to the annotators' label of it.
    """
    params = workspace.params
    corpus, fit, vectors, draw = _corpus(workspace, answers)
    curves: dict[str, list[list[float]]] = {"active": [], "random": []}
    points: dict[str, list[MeanPoint]] = {}
    kinds = {"active": params.select.strategy, "random": "random"}
    done = 0
    for kind, strategy in kinds.items():
        knobs = asdict(params.select) | {"strategy": strategy}
        found = []
        for seed in seeds:
            config = QueryConfig(seed, params.round.seed_size, **knobs)
            found.append(replay(corpus, config, rounds, fit, vectors=vectors, draw=draw))
            done += 1
            if progress:
                progress(done, 2 * len(seeds))
        points[kind] = mean_curve(found, _macro_f1)
        curves[kind] = [[_macro_f1(point.metrics) or 0.0 for point in curve.points] for curve in found]
    differences = np.array(curves["active"]) - np.array(curves["random"])
    return Comparison(
        kinds["active"],
        tuple(points["active"]),
        tuple(points["random"]),
        tuple(mean_point(point.labels, differences[:, column]) for column, point in enumerate(points["random"])),
    )


def _macro_f1(metrics: Metrics) -> float | None:
    return metrics.macro_f1.value


def _corpus(workspace: Workspace, answers: Mapping[str, str]) -> tuple[Corpus, Fit, VectorsOf | None, Draw]:
    layout, params = workspace.layout, workspace.params
    classes = tuple(params.schema_.labels)
    pool = [item for batch in iter_items([layout.pool]) for item in batch]
    test_labels = {row.item_id: row.label for row in read_labeled(layout.test_labels)}
    test = [item for batch in iter_items([layout.test]) for item in batch if item.item_id in test_labels]
    items = [*pool, *test]
    vectors = open_vectors(layout.encoder, layout.features, params.features)
    tfidf = fit_tfidf(item.text for item in pool) if params.features.uses_tfidf else None
    matrix = FeatureMatrix(
        None if vectors is None else vectors.of(items),
        None if tfidf is None else tfidf.transform([item.text for item in items]),
        None if tfidf is None else tfidf.components,
    )
    labels = [answers[item.item_id] for item in pool] + [test_labels[item.item_id] for item in test]

    newest: list[Head] = []

    def fit(labeled: Indices) -> Predict:
        head = fit_head(
            matrix.rows(labeled), [labels[int(p)] for p in labeled], classes, params.seed, params.train.calibrate
        )
        newest[:] = [head]
        return lambda positions: head.predict_proba(matrix.rows(positions))

    def draw(kind: Samples, labeled: Indices, seed: np.random.SeedSequence) -> Predict:
        heads = draw_heads(kind, newest[0], matrix.rows(labeled), [labels[int(p)] for p in labeled], seed)
        return lambda positions: sample_proba(heads, matrix.rows(positions))

    corpus = Corpus(
        [item.item_id for item in items],
        np.array([classes.index(label) for label in labels], dtype=np.intp),
        np.arange(len(pool), dtype=np.intp),
        np.arange(len(pool), len(items), dtype=np.intp),
        classes,
    )
    dense = matrix.dense
    if dense is None:
        return corpus, fit, None, draw
    row = {item.item_id: number for number, item in enumerate(pool)}
    return corpus, fit, lambda ids: dense[[row[item_id] for item_id in ids]], draw
