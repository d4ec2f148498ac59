"""Stage `select`: select the next batch of unlabelled items, with the model's predictions for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from al_pipeline.active_learning.acquisition import ACQUISITION
from al_pipeline.active_learning.batch import VectorsOf, next_batch
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.relabeling import MOST_TASKS, Labeled, doubtful
from al_pipeline.active_learning.sampling import round_seed
from al_pipeline.active_learning.shortlist import Shortlist
from al_pipeline.annotation.answered import answered_items
from al_pipeline.costs.seconds import predict
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import read_labeled, read_scores, read_unresolved, write_queries
from al_pipeline.data.pool import OpenIds, fetch, hashes_of
from al_pipeline.features.names import class_prototypes
from al_pipeline.features.vectors import Vectors, open_vectors
from al_pipeline.files import read_json, write_json
from al_pipeline.models.estimators import HEAD
from al_pipeline.models.held_out import tempered_held_out_proba
from al_pipeline.models.loading import load_model, vectors_for
from al_pipeline.models.text_model import text_features
from al_pipeline.params import FINETUNED, AnswerCost, Params, load_overrides, load_params, plugins_of
from al_pipeline.records import RELABEL, Query
from al_pipeline.stages import open_terms, pool_vocabulary, stage, use_plugin_of, use_plugins
from al_pipeline.workspace.fingerprint import check_engine
from al_pipeline.workspace.layout import Layout

PROBABLE = 0.005
"""Classes that are less probable are left out of a plan."""
_AT_ONCE = 4096
"""How many texts are predicted at a time."""


@stage
def main(layout: Layout) -> None:
    """Select the batch from the shortlist and, for its random slice, from the whole unlabelled pool.

    Items kept from the previous round count towards the batch size and are not candidates. Items whose class is gone
    have a batch's room in any case.
    """
    device = check_engine(layout.engine)
    params = load_params(layout.params)
    chosen = load_overrides(layout.overrides)
    select = chosen.applied_to(params.select)
    use_plugins(layout, plugins_of(strategy=select.strategy), params.features.uses_encoder)
    labeled = {row.item_id: row.label for row in read_labeled(layout.labeled)}
    unresolved = read_unresolved(layout.unresolved)
    ignored = {row.item_id for row in unresolved if row.kind == "ignored"}
    closed = labeled.keys() | (ignored - set(chosen.ask)) | set(chosen.kept)
    tied, again = (
        [row.item_id for row in unresolved if row.kind == kind and row.part == "pool" and row.item_id not in closed]
        for kind in ("tie", "again")
    )
    room = max(0, select.batch_size - len(chosen.kept), min(len(again), select.batch_size))
    vectors = open_vectors(layout.encoder, layout.features, params.features, device)
    config = QueryConfig(
        params.seed, chosen.size or params.round.seed_size, **msgspec.structs.asdict(select) | {"batch_size": room}
    )
    doubted = _doubted_labels(layout, params, config, chosen.round, vectors, set(chosen.kept))
    scored, paid = Shortlist(*read_scores(layout.scores)), chosen.cost is not None and select.cost == "seconds"
    if chosen.cost is not None and paid:
        scored = _per_second(layout, chosen.cost, scored, params.schema_.labels)
    queries, choice = next_batch(
        config,
        chosen.round,
        OpenIds([layout.pool], closed),
        scored,
        labeled,
        params.schema_.labels,
        None if vectors is None else _vectors_of(layout, vectors),
        guided=read_json(layout.guided, {}),
        first=[*tied, *_most_uncertain_first(layout, vectors, device, again)],
        requested=chosen.ask,
        doubted=doubted.items,
    )
    if paid:
        choice = choice._replace(reason=f"{choice.reason}; scores count per second that an answer is expected to take")
    in_full = params.labels.uses_model
    write_queries(layout.queries, _forecast(layout, vectors, device, queries, in_full, doubted.proba))
    write_json(layout.choice, {"named": select.strategy, **choice._asdict()})


class _Doubted(NamedTuple):
    """Labelled items to ask again."""

    items: list[tuple[str, float]]
    """Item id and the probability that its label is wrong, the highest first."""
    proba: Mapping[str, NDArray[np.float64]]
    """For each of them the probabilities (C,) of a model that was not trained on it."""


def _doubted_labels(
    layout: Layout,
    params: Params,
    config: QueryConfig,
    round_number: int,
    vectors: Vectors | None,
    kept: Collection[str],
) -> _Doubted:
    """The labelled items that the batch may ask again, without those in `kept`, which are asked already.

    Empty if `select.relabel` is 0, or while there are too few labels for models by cross-validation. A fine-tuned model
    is replaced by the head, since it would have to be trained five times.
    """
    if not config.relabel:
        return _Doubted([], {})
    classes = params.schema_.labels
    answered = answered_items(read_events(layout.events), classes, MOST_TASKS, len(params.annotators) or None)
    labeled = read_labeled(layout.labeled)
    mine = [row for row, item in enumerate(labeled) if item.item_id in answered]
    if not mine:
        return _Doubted([], {})
    classifier = HEAD if params.train.model == FINETUNED else params.train.model
    use_plugins(layout, plugins_of(classifier))
    found = fetch([layout.pool], [row.item_id for row in labeled])
    items = [found[row.item_id] for row in labeled]
    matrix = text_features(
        [item.text for item in items],
        None if vectors is None else vectors.of(items),
        params.features.uses_encoder,
        pool_vocabulary(layout) if params.features.uses_tfidf else None,
    )
    names = vectors if params.train.names else None
    proba = tempered_held_out_proba(
        matrix,
        [row.label for row in labeled],
        classes,
        params.seed,
        classifier,
        None if names is None else class_prototypes(names, classes, params.schema_.meanings),
    )
    if proba is None:
        return _Doubted([], {})
    row_of = {labeled[row].item_id: row for row in mine}
    known = Labeled(
        list(row_of),
        np.array([[answered[item_id].votes.get(name, 0) for name in classes] for item_id in row_of]),
        [classes.index(labeled[row].label) for row in mine],
        [answered[item_id].open and item_id not in kept for item_id in row_of],
    )
    seed = round_seed(params.seed, round_number, RELABEL)
    doubted = doubtful(known, proba[mine], config.relabel, config.batch_size, seed)
    return _Doubted(doubted, {item_id: proba[row_of[item_id]] for item_id, _ in doubted})


def _per_second(layout: Layout, cost: AnswerCost, scored: Shortlist, classes: Sequence[str]) -> Shortlist:
    """The shortlist with its scores per expected second."""
    found = fetch([layout.pool], scored.ids)
    characters = np.array([len(found[item_id].text) for item_id in scored.ids], dtype=np.float64)
    return scored.per_second(predict(cost, characters, scored.proba, classes))


def _vectors_of(layout: Layout, vectors: Vectors) -> VectorsOf:
    """Vectors by id, from the cache; texts are read only if a vector is missing."""

    def of(ids: Sequence[str]) -> NDArray[np.float32]:
        hashes = hashes_of([layout.pool], ids)
        return vectors.lookup([hashes[item] for item in ids], lambda: fetch([layout.pool], ids).values())

    return of


def _most_uncertain_first(layout: Layout, vectors: Vectors | None, device: str, again: Sequence[str]) -> list[str]:
    """The items to ask again because their class is gone, by the margin of the newest model."""
    if not again:
        return []
    use_plugin_of(layout, layout.model)
    model = load_model(layout.model, layout.encoder, open_terms(layout), device)
    if not model.counts:
        return list(again)
    scores: list[float] = []
    for start in range(0, len(again), _AT_ONCE):
        part = again[start : start + _AT_ONCE]
        found = fetch([layout.pool], part)
        items = [found[item_id] for item_id in part]
        proba = model.predict_proba([item.text for item in items], vectors_for(model, vectors, items))
        scores += ACQUISITION["margin"](proba).tolist()
    return [again[row] for row in sorted(range(len(again)), key=lambda row: (-scores[row], again[row]))]


def _forecast(
    layout: Layout,
    vectors: Vectors | None,
    device: str,
    queries: Sequence[Query],
    in_full: bool,
    held_out: Mapping[str, NDArray[np.float64]],
) -> list[Query]:
    """Add the newest model's predictions to the queries; unchanged while the model has no labels.

    On the random slice they give an unbiased estimate of accuracy: the model was not trained on these labels. Those of
    items that are asked again are `held_out`, by item id, since the model was trained on their labels. `in_full`: with
    the probabilities of all classes, for the consensus of the answers.
    """
    use_plugin_of(layout, layout.model)
    model = load_model(layout.model, layout.encoder, open_terms(layout), device)
    if not model.counts or not queries:
        return list(queries)
    found = fetch([layout.pool], [query.item_id for query in queries])
    items = [found[query.item_id] for query in queries]
    proba = model.predict_proba([item.text for item in items], vectors_for(model, vectors, items))
    for row, query in enumerate(queries):
        if query.strategy == RELABEL:
            proba[row] = held_out[query.item_id]
    return [
        replace(
            query,
            predicted=model.classes[int(row.argmax())],
            confidence=float(row.max()),
            proba=_probable(model.classes, row) if in_full else (),
        )
        for query, row in zip(queries, proba, strict=True)
    ]


def _probable(classes: Sequence[str], row: NDArray[np.float64]) -> tuple[tuple[str, float], ...]:
    """The classes with their probabilities, without improbable ones."""
    return tuple(
        (name, round(share, 4)) for name, share in zip(classes, row.tolist(), strict=True) if share >= PROBABLE
    )


if __name__ == "__main__":
    main()
