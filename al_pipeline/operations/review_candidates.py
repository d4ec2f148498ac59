"""The items that could be reviewed, with what speaks against their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from al_pipeline.annotation.active_events import active, corrected_items
from al_pipeline.annotation.aggregation import Folded, fold_by
from al_pipeline.annotation.answers import answers_of, by_item, votes_of
from al_pipeline.annotation.review import Candidate
from al_pipeline.data.ledger import read_events, read_forecasts
from al_pipeline.data.pool import fetch
from al_pipeline.logs import get_logger
from al_pipeline.operations.gold import held_answers
from al_pipeline.operations.review_figures import in_random_order
from al_pipeline.params import FINETUNED
from al_pipeline.records import Event, LabeledItem
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)

_TIED = 0.5
"""The agreement of a tied item: at most half of its votes are for a class."""
_FEWEST_LABELS = 20
"""With fewer labels no model is asked which of them are wrong."""


def candidates(workspace: Workspace) -> list[Candidate]:
    """Every labelled item of the pool and of the test set, and tied ones; by the answers pulled so far."""
    layout, params = workspace.layout, workspace.params
    events = read_events(layout.events, layout.inbox_events)
    folded = fold_by(params, events, partial(read_forecasts, layout.events))
    return [
        *_labelled(folded, "pool", _pool_errors(workspace, folded.labeled)),
        *_labelled(folded, "test", _test_errors(workspace, folded.test)),
        *_tied(folded, active(events)),
        *_held(folded, events),
    ]


def of_a_person(workspace: Workspace, annotator: str) -> list[Candidate]:
    """The labelled items that somebody gave a label for, in random order."""
    layout = workspace.layout
    counted = active(read_events(layout.events, layout.inbox_events))
    name, corrected = annotator.strip().lower(), corrected_items(counted)
    found = {}
    for item, about in by_item(counted).items():
        votes = votes_of(one for one in answers_of(about).values() if not one.binding)
        if item not in corrected and any(vote.annotator == name and vote.label is not None for vote in votes):
            found[item] = Candidate(item, about[0].content_hash, about[0].part, 1.0)
    order = in_random_order({item: one.content_hash for item, one in found.items()}, workspace.params.seed)
    return [found[item] for item in order]


def _labelled(folded: Folded, part: str, errors: Mapping[str, float]) -> list[Candidate]:
    rows = folded.labeled if part == "pool" else folded.test
    return [
        Candidate(
            row.item_id,
            row.content_hash,
            "pool" if part == "pool" else "test",
            row.agreement,
            row.confidence,
            error=errors.get(row.item_id, 0.0),
        )
        for row in rows
    ]


def _tied(folded: Folded, counted: Sequence[Event]) -> list[Candidate]:
    """Items without a label because their annotators disagree, also those that are not asked again."""
    tied = {row.item_id: row.part for row in folded.unresolved if "a tie of" in row.reason}
    content = {event.item_id: event.content_hash for event in counted if event.item_id in tied}
    return [Candidate(item, content[item], part, _TIED) for item, part in tied.items() if item in content]


def _held(folded: Folded, events: Sequence[Event]) -> list[Candidate]:
    """Items without a label because an answer to them is held."""
    labelled = {row.item_id for row in (*folded.labeled, *folded.test)}
    found = {event.item_id: event for event in held_answers(events) if event.item_id not in labelled}
    return [Candidate(item, event.content_hash, event.part, 1.0, held=True) for item, event in found.items()]


def _pool_errors(workspace: Workspace, rows: Sequence[LabeledItem]) -> dict[str, float]:
    """The probability that each label of the pool is wrong, by cross-validation of the workspace's kind of model.

    Of a fine-tuned model, which would have to be trained several times, the head on the same encoder takes the place.
    """
    if len(rows) < _FEWEST_LABELS or len({row.label for row in rows}) < 2:
        return {}
    from al_pipeline.features.device import device_of
    from al_pipeline.features.names import class_prototypes
    from al_pipeline.features.vectors import open_vectors
    from al_pipeline.models.estimators import HEAD
    from al_pipeline.models.feature_matrix import FeatureMatrix
    from al_pipeline.models.held_out import held_out_proba
    from al_pipeline.models.loading import estimator_name, load_model, vectors_for
    from al_pipeline.models.text_model import TextModel
    from al_pipeline.operations.plugins import use_plugin_of
    from al_pipeline.quality.label_errors import error_probabilities

    layout, params = workspace.layout, workspace.params
    items = fetch([layout.pool], [row.item_id for row in rows])
    known = [row for row in rows if row.item_id in items]
    mine = [items[row.item_id] for row in known]
    texts, labels = [item.text for item in mine], [row.label for row in known]
    vectors = open_vectors(layout.encoder, layout.features, params.features, device_of(params.features))
    use_plugin_of(layout.model, layout)
    model = load_model(layout.model, layout.encoder, device=device_of(params.features))
    classes = params.schema_.labels
    if isinstance(model, TextModel):
        matrix, kind = model.features_of(texts, vectors_for(model, vectors, mine)), estimator_name(layout.model)
    elif vectors is not None:
        matrix, kind = FeatureMatrix(vectors.of(mine)), HEAD
    else:
        return {}
    named = params.train.names and params.train.model != FINETUNED and vectors is not None
    prototypes = class_prototypes(vectors, classes, params.schema_.meanings) if named and vectors else None
    proba = held_out_proba(matrix, labels, classes, params.seed, params.train.calibrate, kind or HEAD, prototypes)
    _logger.info("likely errors among %d labels by cross-validation", len(known))
    return dict(zip([row.item_id for row in known], error_probabilities(proba, labels, classes), strict=True))


def _test_errors(workspace: Workspace, rows: Sequence[LabeledItem]) -> dict[str, float]:
    """The probability that each label of the test set is wrong, by the newest model, which never sees them."""
    from al_pipeline.data.outputs import parse_predictions
    from al_pipeline.quality.label_errors import error_probabilities

    layout = workspace.layout
    if len(rows) < _FEWEST_LABELS or not layout.predictions.exists():
        return {}
    predicted = parse_predictions(layout.predictions.read_text(encoding="utf-8"), unlabelled=True)
    label_of = {row.item_id: row.label for row in rows}
    places = [place for place, item in enumerate(predicted.item_ids) if item in label_of]
    ids = [predicted.item_ids[place] for place in places]
    labels = [label_of[item] for item in ids]
    return dict(zip(ids, error_probabilities(predicted.proba[places], labels, predicted.classes), strict=True))
