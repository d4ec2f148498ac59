"""Stage `score`: how much each unlabelled item of the pool would teach the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from al_pipeline.active_learning.acquisition import ACQUISITION, SAMPLE_ACQUISITION, score_bounds
from al_pipeline.active_learning.strategies import ScoreAccumulator, TopK, acquisition_of, ensemble_seed, samples_of
from al_pipeline.data.outputs import read_labeled, read_unresolved, write_scores
from al_pipeline.data.pool import count_items, fetch, iter_items
from al_pipeline.features.vectors import Vectors, guide_vectors, open_vectors
from al_pipeline.files import write_json
from al_pipeline.models.linear import Head
from al_pipeline.models.loading import load_model, vectors_for
from al_pipeline.models.text_model import Classifier, TextModel
from al_pipeline.params import Select, load_overrides, load_params
from al_pipeline.progress import progress_reporter
from al_pipeline.records import LabeledItem
from al_pipeline.stages import stage
from al_pipeline.workspace.fingerprint import check_engine
from al_pipeline.workspace.layout import Layout

BINS = 20


@stage
def main(layout: Layout) -> None:
    """Score the pool part by part; keep the best as a shortlist, and a histogram of all."""
    check_engine(layout.engine)
    params = load_params(layout.params)
    labeled = read_labeled(layout.labeled)
    closed = {row.item_id for row in labeled}
    closed |= {row.item_id for row in read_unresolved(layout.unresolved) if row.kind == "ignored"}
    vectors = open_vectors(layout.encoder, layout.features, params.features)
    model = load_model(layout.model, layout.encoder)
    chosen = load_overrides(layout.overrides)
    select = chosen.applied_to(params.select)
    seed = ensemble_seed(params.seed, chosen.round, select.strategy)
    score, judges = _scorer(select.strategy, model, vectors, labeled, layout, seed)
    bounds = score_bounds(acquisition_of(select.strategy), len(params.schema_.labels), judges)
    classes = len(params.schema_.labels)
    tally = ScoreAccumulator(TopK(select.shortlist, select.batch_size, params.seed, classes), bounds, BINS, classes)
    search = _Search(select, params.seed, model, vectors)
    looked_at = model.needs_vectors or bool(select.guide)
    total, done = count_items([layout.pool]), 0
    tell = None if model.needs_vectors else progress_reporter(layout.progress, "scoring the pool")
    for batch in iter_items([layout.pool]):
        done += len(batch)
        items = [item for item in batch if item.item_id not in closed]
        if not items:
            continue
        texts, own = [item.text for item in items], vectors.of(items) if vectors is not None and looked_at else None
        ids = [item.item_id for item in items]
        search.look(ids, texts, own)
        score(tally, ids, texts, own)
        if tell:
            tell(done, total)
    found = tally.result()
    write_scores(layout.scores, *found.kept)
    write_json(layout.guided, search.found())
    write_json(
        layout.histogram,
        {
            "acquisition": select.strategy,
            "edges": tally.edges.tolist(),
            "counts": found.counts.tolist(),
            "predicted": dict(zip(params.schema_.labels, found.predicted.tolist(), strict=True)),
        },
    )


_Score = Callable[[ScoreAccumulator, Sequence[str], Sequence[str], NDArray[np.float32] | None], None]
"""Takes a part into the tally: its ids, texts and vectors."""


def _scorer(
    strategy: str,
    model: Classifier,
    vectors: Vectors | None,
    labeled: Sequence[LabeledItem],
    layout: Layout,
    seed: np.random.SeedSequence,
) -> tuple[_Score, int]:
    """What the strategy scores by, and how many judge. Others than the model only where the strategy wants samples."""
    name, kind = acquisition_of(strategy), samples_of(strategy)
    if kind is None:
        return _by_proba(name, model), 1
    found = fetch([layout.pool], [row.item_id for row in labeled])
    items = [found[row.item_id] for row in labeled]
    labels = [row.label for row in labeled]
    judges = model.draw(kind, [item.text for item in items], vectors_for(model, vectors, items), labels, seed)
    disagree = SAMPLE_ACQUISITION[name]

    def by_samples(
        tally: ScoreAccumulator, ids: Sequence[str], texts: Sequence[str], own: NDArray[np.float32] | None
    ) -> None:
        tally.add(ids, disagree(model.sample_proba(judges, texts, own)), model.predict_proba(texts, own))

    return by_samples, len(judges)


def _by_proba(name: str, model: Classifier) -> _Score:
    """Scores by the model's own probabilities; by margin at a glance, which leaves the same in less time."""
    acquire = ACQUISITION[name]

    def score(
        tally: ScoreAccumulator, ids: Sequence[str], texts: Sequence[str], own: NDArray[np.float32] | None
    ) -> None:
        if (
            name == "margin"
            and isinstance(model, TextModel)
            and isinstance(model.head, Head)
            and (columns := model.columns(texts, own))
        ):
            tally.look(ids, columns, model.head)
            return
        proba = model.predict_proba(texts, own)
        tally.add(ids, acquire(proba), proba)

    return score


class _Search:
    """The candidates nearest to the guide of each class, best first."""

    def __init__(self, select: Select, seed: int, model: Classifier, vectors: Vectors | None) -> None:
        self._best = {name: TopK(select.batch_size, select.batch_size, seed) for name in select.guide}
        self._model = model
        self._guide = {name: (list(texts), guide_vectors(vectors, texts)) for name, texts in select.guide.items()}

    def look(self, ids: Sequence[str], texts: Sequence[str], own: NDArray[np.float32] | None) -> None:
        """Take more candidates into account."""
        for name, (others, other_vectors) in self._guide.items():
            self._best[name].add(ids, self._model.likeness(texts, own, others, other_vectors).max(axis=1))

    def found(self) -> dict[str, list[str]]:
        """For each class the ids, best first."""
        return {name: best.kept()[0] for name, best in self._best.items()}


if __name__ == "__main__":
    main()
