"""Stage `score`: how much each unlabelled item of the pool would teach the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from al_pipeline.acquisition import ACQUISITION
from al_pipeline.encoding import Vectors, guide_vectors, open_vectors
from al_pipeline.engine import check_engine
from al_pipeline.files import write_json
from al_pipeline.items import iter_items
from al_pipeline.layout import Layout
from al_pipeline.models import TextModel, load_text_model
from al_pipeline.params import Select, load_overrides, load_params
from al_pipeline.query_strategies import acquisition_of, keep_best
from al_pipeline.results import read_labeled, read_unresolved, write_scores
from al_pipeline.stages import stage

BINS = 20


@stage
def main(layout: Layout) -> None:
    """Score the pool part by part; keep the best as a shortlist, and a histogram of all."""
    check_engine(layout.engine)
    params = load_params(layout.params)
    closed = {row.item_id for row in read_labeled(layout.labeled)}
    closed |= {row.item_id for row in read_unresolved(layout.unresolved) if row.kind == "ignored"}
    vectors = open_vectors(layout, params.features)
    model = load_text_model(layout.model)
    select = load_overrides(layout.overrides).applied_to(params.select)
    acquire = ACQUISITION[acquisition_of(select.strategy)]
    best_ids: list[str] = []
    best: NDArray[np.float64] = np.empty(0)
    best_proba: NDArray[np.float64] = np.empty((0, len(params.schema_.labels)))
    edges = np.linspace(*_bounds(acquire, len(params.schema_.labels)), BINS + 1, dtype=np.float64)
    counts = np.zeros(BINS, dtype=np.int64)
    predicted = np.zeros(len(params.schema_.labels), dtype=np.int64)
    search = _Search(select.guide, model, vectors)
    for batch in iter_items([layout.pool]):
        items = [item for item in batch if item.item_id not in closed]
        if not items:
            continue
        texts, own = [item.text for item in items], None if vectors is None else vectors.of(items)
        proba = model.predict_proba(texts, own)
        search.look([item.item_id for item in items], texts, own, select, params.seed)
        scores = acquire(proba)
        counts += np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0]
        predicted += np.bincount(proba.argmax(axis=1), minlength=len(predicted))
        best_ids += [item.item_id for item in items]
        best = np.concatenate([best, scores])
        best_proba = np.concatenate([best_proba, proba])
        rows = keep_best(best_ids, best, select.shortlist, select.batch_size, params.seed)
        best_ids, best, best_proba = [best_ids[row] for row in rows], best[rows], best_proba[rows]
    write_scores(layout.scores, best_ids, best, best_proba)
    write_json(layout.guided, search.found)
    write_json(
        layout.histogram,
        {
            "acquisition": select.strategy,
            "edges": edges.tolist(),
            "counts": counts.tolist(),
            "predicted": dict(zip(params.schema_.labels, predicted.tolist(), strict=True)),
        },
    )


class _Search:
    """The candidates nearest to the guide of each class, best first."""

    def __init__(self, guide: Mapping[str, Sequence[str]], model: TextModel, vectors: Vectors | None) -> None:
        self.found: dict[str, list[str]] = {name: [] for name in guide}
        self._scores = {name: np.empty(0) for name in guide}
        self._model = model
        self._guide = {name: (list(texts), guide_vectors(vectors, texts)) for name, texts in guide.items()}

    def look(
        self, ids: Sequence[str], texts: Sequence[str], own: NDArray[np.float32] | None, select: Select, seed: int
    ) -> None:
        """Take more candidates into account."""
        for name, (others, other_vectors) in self._guide.items():
            nearest = self._model.likeness(texts, own, others, other_vectors).max(axis=1)
            every, scores = self.found[name] + list(ids), np.concatenate([self._scores[name], nearest])
            rows = keep_best(every, scores, select.batch_size, select.batch_size, seed)
            self.found[name], self._scores[name] = [every[row] for row in rows], scores[rows]


def _bounds(acquire: object, classes: int) -> tuple[float, float]:
    """The lowest and the highest score there can be: of a certain and of a uniform distribution."""
    assert callable(acquire)
    low, high = acquire(np.stack([np.eye(classes)[0], np.full(classes, 1 / classes)]))
    return float(low), float(high)


if __name__ == "__main__":
    main()
