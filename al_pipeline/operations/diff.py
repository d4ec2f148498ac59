"""Compare two published rounds: labels and their annotators, parameters, metrics, predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from al_pipeline.annotation.active_events import schemas_of
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import Predictions, flat, parse_predictions
from al_pipeline.data.served import without_requests
from al_pipeline.evaluation.comparison import Comparison, Predicted, compare, in_common_classes
from al_pipeline.evaluation.figures import FIGURES, Estimate
from al_pipeline.integrations.git import Git
from al_pipeline.operations.close import refuse_changed
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import events_known, read_history, subjects
from al_pipeline.operations.snapshots import Labels, snapshots
from al_pipeline.records import Event, LabeledItem, round_name
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class LabelChange:
    """An item whose label changed, and the events about it between the two rounds."""

    item_id: str
    before: str | None
    after: str | None
    annotators: tuple[str, ...]
    rounds: tuple[int, ...]
    """The rounds that asked for the answers; -1 for imported labels."""
    events: tuple[str, ...]
    """The types of the events, such as label or quarantine, with the reason if there is one."""

    @property
    def kind(self) -> str:
        """`added`, `removed` or `changed`."""
        return "added" if self.before is None else "removed" if self.after is None else "changed"


@dataclass(frozen=True, slots=True)
class Diff:
    """Round `after` compared with round `before`; either may be the older one."""

    before: int
    after: int
    labels: tuple[LabelChange, ...]
    """Sorted by kind, then by item."""
    params: dict[str, tuple[Any, Any]]
    """Dotted key -> (before, after), for keys whose values differ; None if a round lacks the key."""
    metrics: dict[str, tuple[Estimate, Estimate]]
    """As recorded, each measured on the test set of its own round."""
    models: Comparison
    """Both models on the test items that the two rounds share, in the classes that both know."""

    def to_json(self) -> dict[str, Any]:
        """This record as a JSON object."""
        return {
            "before": round_name(self.before),
            "after": round_name(self.after),
            "labels": [{"kind": change.kind, **asdict(change)} for change in self.labels],
            "params": {key: {"before": old, "after": new} for key, (old, new) in self.params.items()},
            "metrics": {
                name: {
                    "before": old.to_row(),
                    "after": new.to_row(),
                    "difference": self.models.differences[name].to_json(),
                }
                for name, (old, new) in self.metrics.items()
            },
            "shared_test_items": self.models.items,
            "flips": [asdict(flip) for flip in self.models.flips],
        }


def diff(workspace: Workspace, before: int, after: int) -> Diff:
    """Compare two published rounds from their records and DVC objects; nothing is checked out.

    Raises NothingToDo if one is not published, RemoteIncomplete if its labels cannot be fetched, UnexpectedChange if
    the ledger differs from git's records.
    """
    layout = workspace.layout
    git = Git(layout.root)
    history = read_history(layout, git)
    old, new = history.record(before), history.record(after)
    with replace(open_dvc(layout), state=None) as dvc:
        refuse_changed(layout, dvc)
    events = read_events(layout.events)
    known = sorted(events_known(record, events) for record in (old, new))
    related = _related(events, old, new)
    with snapshots(workspace) as labels:
        changes = _changes(labels(old), labels(new), events, events[known[0] : known[1]], related)
    models: tuple[Predicted, Predicted] = _predictions(layout, git, old), _predictions(layout, git, new)
    if any(names != {name} for name, names in related.items()):
        models = in_common_classes(*models, related)
    was, now = flat(old.params.to_row()), flat(new.params.to_row())
    return Diff(
        before=before,
        after=after,
        labels=changes,
        params={k: (was.get(k), now.get(k)) for k in dict.fromkeys((*was, *now)) if was.get(k) != now.get(k)},
        metrics={name: (old.metrics.figure(name), new.metrics.figure(name)) for name in FIGURES},
        models=compare(
            *models,
            np.random.default_rng([new.params.seed, 0xD1FF]),
            new.params.evaluate.bootstrap,
            new.params.evaluate.confidence,
        ),
    )


def _changes(
    before: Labels,
    after: Labels,
    events: Sequence[Event],
    between: Sequence[Event],
    related: Mapping[str, frozenset[str]],
) -> tuple[LabelChange, ...]:
    """The items whose labels differ, otherwise than by a renamed or merged class."""
    about = subjects(events)
    touching: defaultdict[str, list[Event]] = defaultdict(list)
    for event in between:
        for item_id in about[event.event_id]:
            touching[item_id].append(event)
    changes = []
    for item_id in sorted(before.keys() | after.keys()):
        old, new = _label(before, item_id), _label(after, item_id)
        if old != new and (old is None or related.get(old, {old}) != {new}):
            said = touching[item_id]
            people = tuple(sorted({event.annotator for event in said if event.annotator}))
            rounds = tuple(sorted({event.round for event in said}))
            reasons = tuple(f"{event.type}: {event.reason}" if event.reason else event.type for event in said)
            changes.append(LabelChange(item_id, old, new, people, rounds, reasons))
    return tuple(sorted(changes, key=lambda change: change.kind))


def _related(events: Sequence[Event], old: RoundRecord, new: RoundRecord) -> dict[str, frozenset[str]]:
    """The classes of round `new` to which each class of round `old` is related; the older one may be either."""
    names, schemas = old.params.schema_.labels, schemas_of(events)
    if schemas is None:
        return {name: frozenset((name,)) for name in names}
    return schemas.relation(names, events_known(old, events) - 1, events_known(new, events) - 1)


def _label(labels: Labels, item_id: str) -> str | None:
    row = labels.get(item_id)
    return row.label if isinstance(row, LabeledItem) else None


def _predictions(layout: Layout, git: Git, record: RoundRecord) -> Predictions:
    found = parse_predictions(git.show(round_name(record.round), "rounds/predictions.csv") or "item_id,label\n")
    return found if record.traffic is None else without_requests(found, layout.test)
