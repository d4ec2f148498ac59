"""Stage `score`: the acquisition score of each unlabelled item of the pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.active_learning.acquisition import score_bounds
from al_pipeline.active_learning.names import name_scores, searched
from al_pipeline.active_learning.sampling import draw, ensemble_seed
from al_pipeline.active_learning.shortlist import ScoreAccumulator, ScoreSummary, TopK
from al_pipeline.active_learning.strategies import Scoring, scoring_of
from al_pipeline.data.outputs import read_labeled, read_unresolved, write_scores
from al_pipeline.data.pool import OpenIds, count_items, fetch, iter_keys
from al_pipeline.features.cache import CHUNK
from al_pipeline.features.names import class_prototypes
from al_pipeline.features.texts import ItemTexts
from al_pipeline.features.vectors import Vectors, guide_vectors, open_vectors
from al_pipeline.files import write_json
from al_pipeline.models.approximate import MarginAccumulator
from al_pipeline.models.feature_matrix import Floats, row_products
from al_pipeline.models.linear import Head
from al_pipeline.models.loading import load_model, vectors_for
from al_pipeline.models.text_model import Classifier, TextModel
from al_pipeline.params import Params, Select, load_overrides, load_params, plugins_of
from al_pipeline.progress import progress_reporter
from al_pipeline.records import LabeledItem
from al_pipeline.stages import open_terms, stage, use_plugin_of, use_plugins
from al_pipeline.workspace.fingerprint import check_engine
from al_pipeline.workspace.layout import Layout

BINS = 20
_CENTRE = 1000
"""Size of the random sample of the pool from which the mean similarity to each class's name is computed."""
Rows = NDArray[np.float32]


@stage
def main(layout: Layout) -> None:
    """Score the pool part by part; write the shortlist of the highest scores, and a histogram of all."""
    device = check_engine(layout.engine)
    params = load_params(layout.params)
    labeled = read_labeled(layout.labeled)
    vectors = open_vectors(layout.encoder, layout.features, params.features, device)
    use_plugin_of(layout, layout.model)
    model = load_model(layout.model, layout.encoder, open_terms(layout), device)
    chosen = load_overrides(layout.overrides)
    select = chosen.applied_to(params.select)
    use_plugins(layout, plugins_of(strategy=select.strategy), params.features.uses_encoder)
    scoring = scoring_of(select.strategy)
    seed = ensemble_seed(params.seed, chosen.round, select.strategy)
    samples = _samples(scoring, model, vectors, labeled, layout, seed)
    classes = len(params.schema_.labels)
    bounds = score_bounds(scoring.acquisition, classes, 1 if samples is None else len(samples))
    scores = ScoreAccumulator(TopK(select.shortlist, select.batch_size, params.seed, classes), bounds, BINS, classes)
    scorer = _Scorer(scores, scoring, model, samples)
    search = _Search(select, params.seed, model, vectors)
    names = _name_search(layout, params, select, labeled, vectors)
    needed = vectors if model.needs_vectors or select.guide or names is not None else None
    on_progress = None if model.needs_vectors else progress_reporter(layout.progress, "scoring the pool")
    for ids, texts in _unlabeled(layout, labeled, on_progress):
        own = None if needed is None else needed.of_texts(texts.hashes, texts)
        search.add(ids, texts, own)
        if names is not None and own is not None:
            names.add(ids, own)
        scorer.add(ids, texts, own)
    found = scorer.result()
    write_scores(layout.scores, *found.kept)
    write_json(layout.guided, search.found() | (names.found() if names is not None else {}))
    write_json(
        layout.histogram,
        {
            "strategy": select.strategy,
            "acquisition": scoring.acquisition,
            "edges": scores.edges.tolist(),
            "counts": found.counts.tolist(),
            "predicted": dict(zip(params.schema_.labels, found.predicted.tolist(), strict=True)),
        },
    )


def _unlabeled(
    layout: Layout, labeled: Sequence[LabeledItem], on_progress: Callable[[int, int], None] | None
) -> Iterator[tuple[list[str], ItemTexts]]:
    """Yield the ids and texts of the items that are neither labelled nor ignored, in batches."""
    closed = {row.item_id for row in labeled}
    closed |= {row.item_id for row in read_unresolved(layout.unresolved) if row.kind == "ignored"}
    total, done = count_items([layout.pool]), 0
    for ids, hashes, read in iter_keys([layout.pool], CHUNK):  # the TF-IDF rows of a batch are one file of the cache
        done += len(ids)
        texts = ItemTexts(hashes, read)
        if any(map(closed.__contains__, ids)):
            rows = [row for row, item_id in enumerate(ids) if item_id not in closed]
            ids, texts = [ids[row] for row in rows], texts.some(rows)
        if ids:
            yield ids, texts
            if on_progress:
                on_progress(done, total)


def _samples(
    scoring: Scoring,
    model: Classifier,
    vectors: Vectors | None,
    labeled: Sequence[LabeledItem],
    layout: Layout,
    seed: np.random.SeedSequence,
) -> Any:
    """The sampled models for the acquisition function; None if it takes the model's own probabilities."""
    if scoring.samples is None:
        return None
    found = fetch([layout.pool], [row.item_id for row in labeled])
    items = [found[row.item_id] for row in labeled]
    labels = [row.label for row in labeled]
    return model.draw(scoring.samples, [item.text for item in items], vectors_for(model, vectors, items), labels, seed)


class _Scorer:
    """Adds parts of the pool to the accumulator, through approximate margins if possible (same result, faster).

    `samples`: the return value of `_samples`.
    """

    def __init__(self, scores: ScoreAccumulator, scoring: Scoring, model: Classifier, samples: Any) -> None:
        self._scores = scores
        self._scoring = scoring
        self._model = model
        self._samples = samples
        self._margins: tuple[TextModel, MarginAccumulator] | None = None
        if scoring.acquisition == "margin" and isinstance(model, TextModel) and isinstance(model.head, Head):
            self._margins = model, MarginAccumulator(scores, model.head)

    def add(self, ids: Sequence[str], texts: Sequence[str], own: NDArray[np.float32] | None) -> None:
        """Score a part: ids, texts, and vectors (n, d) if the model needs them."""
        if self._margins is not None:
            model, margins = self._margins
            if columns := model.columns(texts, own):
                margins.add_approximate(ids, columns)
                return
        proba = self._model.predict_proba(texts, own)
        seen = proba if self._samples is None else self._model.sample_proba(self._samples, texts, own)
        self._scores.add(ids, self._scoring.function(seen), proba)

    def result(self) -> ScoreSummary:
        """The summary of all parts added so far."""
        return self._scores.result() if self._margins is None else self._margins[1].result()


class _Search:
    """The candidates most similar to the guide texts of each class in `select.guide`."""

    def __init__(self, select: Select, seed: int, model: Classifier, vectors: Vectors | None) -> None:
        self._best = {name: TopK(select.batch_size, select.batch_size, seed) for name in select.guide}
        self._model = model
        self._guide = {name: (list(texts), guide_vectors(vectors, texts)) for name, texts in select.guide.items()}

    def add(self, ids: Sequence[str], texts: Sequence[str], own: NDArray[np.float32] | None) -> None:
        """Add candidates: ids, texts, and vectors (n, d) if there is an encoder."""
        for name, (others, other_vectors) in self._guide.items():
            self._best[name].add(ids, self._model.likeness(texts, own, others, other_vectors).max(axis=1))

    def found(self) -> dict[str, list[str]]:
        """The ids for each class, most similar first."""
        return {name: best.kept()[0] for name, best in self._best.items()}


class _NameSearch:
    """The candidates most similar to the names of the classes that need it."""

    def __init__(
        self, classes: Sequence[str], wanted: Sequence[str], prototypes: Rows, centre: Floats, size: int, seed: int
    ) -> None:
        self._columns = {name: list(classes).index(name) for name in wanted}
        self._prototypes, self._centre = prototypes, centre
        self._best = {name: TopK(size, size, seed) for name in wanted}

    def add(self, ids: Sequence[str], own: Rows) -> None:
        """Add candidates: ids and vectors (n, d)."""
        scores = name_scores(row_products(own, self._prototypes).astype(np.float64), self._centre)
        for name, column in self._columns.items():
            self._best[name].add(ids, scores[:, column])

    def found(self) -> dict[str, list[str]]:
        """The ids for each class, most similar first."""
        return {name: best.kept()[0] for name, best in self._best.items()}


def _name_search(
    layout: Layout, params: Params, select: Select, labeled: Sequence[LabeledItem], vectors: Vectors | None
) -> _NameSearch | None:
    """The search by the names of classes; None if it is switched off, or no class needs it. A guide replaces a name."""
    if not select.names or vectors is None:
        return None
    classes, counts = params.schema_.labels, Counter(row.label for row in labeled)
    wanted = [name for name in searched({name: counts[name] for name in classes}) if name not in select.guide]
    if not wanted:
        return None
    prototypes = class_prototypes(vectors, classes, params.schema_.meanings)
    ids = sorted(draw(OpenIds([layout.pool], frozenset()), _CENTRE, np.random.SeedSequence(params.seed), "names"))
    found = fetch([layout.pool], ids)
    cosines = row_products(vectors.of([found[item_id] for item_id in ids]), prototypes)
    return _NameSearch(
        classes, wanted, prototypes, cosines.astype(np.float64).mean(axis=0), select.batch_size, params.seed
    )


if __name__ == "__main__":
    main()
