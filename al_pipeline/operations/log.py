"""The full history of one item, in order: ingested, asked, answered, labelled, predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from msgspec.structs import asdict

from al_pipeline.data.ledger import read_events, read_refused
from al_pipeline.data.outputs import parse_predictions
from al_pipeline.data.pool import find
from al_pipeline.errors import BadInput
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import events_known, read_history, read_live, read_plan_rows, subjects
from al_pipeline.operations.snapshots import Labels, snapshots
from al_pipeline.records import NOT_ASKED, Event, LabeledItem, PlannedTask, round_name
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Entry:
    """One step in the history of an item."""

    round: int | None
    """The round that was published next; None if none was yet, or for `ingested`, where it is unknown."""
    what: str
    """`ingested`, `asked`, an event's type, `refused`, `labelled`, `unlabelled` or `predicted`."""
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ItemLog:
    """An item and its history. Labels and predictions have an entry only where they changed."""

    item_id: str
    part: str | None
    text: str | None
    entries: tuple[Entry, ...]
    labels: Mapping[str, str | None]
    """Its label at each published round; None if it had none."""
    predictions: Mapping[str, Mapping[str, float]]
    """For an item of the test set: the class probabilities that each round's model predicted."""


def log(workspace: Workspace, item_id: str) -> ItemLog:
    """The history of an item, in the order of the ledger and the rounds; timestamps are not used.

    Raises BadInput if nothing is known of the item, RemoteIncomplete if a round's labels cannot be fetched.
    """
    layout = workspace.layout
    git = Git(layout.root)
    history = read_history(layout, git)
    found = find([layout.pool, layout.test, layout.inbox_pool, layout.inbox_test], item_id)
    rows = (task for task in read_plan_rows(git) if task.item_id == item_id and task.strategy != NOT_ASKED)
    tasks = {task.round: _asked(git, task) for task in rows}
    past = _Past(workspace, item_id)
    entries: list[Entry] = []
    if found is not None:
        path, item = found
        where = {"file": path.relative_to(layout.root).as_posix(), "content_hash": item.content_hash}
        entries.append(Entry(None, "ingested", where))
    labels: dict[str, str | None] = {}
    predictions: dict[str, dict[str, float]] = {}
    became: dict[str, Any] | None = None
    predicted: str | None = None
    with snapshots(workspace) as snapshot:
        for record in history.rounds:
            number, name = record.round, round_name(record.round)
            if number in tasks:
                entries.append(Entry(number, "asked", tasks.pop(number)))
            entries += past.until(record)
            now = _became(snapshot(record), item_id) if past.begun else None
            if now != became:
                what = "labelled" if now and now["label"] is not None else "unlabelled"
                entries.append(Entry(number, what, now or {"label": None}))
            became = now
            labels[name] = now["label"] if now else None
            if proba := _predicted(git, name, item_id):
                best = max(proba, key=lambda label: proba[label])
                if best != predicted:
                    entries.append(Entry(number, "predicted", {"label": best, "probability": proba[best]}))
                predicted, predictions[name] = best, proba
    entries += [Entry(None, "asked", details) for _, details in sorted(tasks.items())]
    entries += past.rest()
    if not entries:
        raise BadInput(f"there is no item {item_id!r}; the report and `al diff` show the ids of items")
    part = None if found is None else "test" if found[0].parent in (layout.test, layout.inbox_test) else "pool"
    return ItemLog(item_id, part, found[1].text if found else None, tuple(entries), labels, predictions)


class _Past:
    """The events and refused answers of one item, from the ledger's start to the inbox, read round by round."""

    def __init__(self, workspace: Workspace, item_id: str) -> None:
        layout = workspace.layout
        self._item = item_id
        self._events = read_events(layout.events, layout.inbox_events)
        self._refused = read_refused(layout.events, layout.inbox_events)
        self._about = subjects(self._events)
        self._ledger = len(read_events(layout.events)), len(read_refused(layout.events))
        self._place = 0, 0
        self.begun = False
        """Whether any event was found yet."""

    def until(self, record: RoundRecord) -> list[Entry]:
        """Entries that round `record` knew and the round before did not."""
        known = events_known(record, self._events[: self._ledger[0]])
        return list(self._go_on((known, record.counts.refused), record.round, "ledger"))

    def rest(self) -> list[Entry]:
        """Entries that no published round knows: the end of the ledger, then the inbox."""
        everything = len(self._events), len(self._refused)
        return [*self._go_on(self._ledger, None, "ledger"), *self._go_on(everything, None, "inbox")]

    def _go_on(self, place: tuple[int, int], number: int | None, where: str) -> Iterator[Entry]:
        for event in self._events[self._place[0] : place[0]]:
            if self._item in self._about[event.event_id]:
                self.begun = True
                yield Entry(number, event.type, {"in": where, **_details(event)})
        for row in self._refused[self._place[1] : place[1]]:
            if row.get("item_id") == self._item:
                yield Entry(number, "refused", {"in": where, **row})
        self._place = max(self._place[0], place[0]), max(self._place[1], place[1])


def _details(event: Event) -> dict[str, Any]:
    row = event.to_row()
    return {key: value for key, value in row.items() if value not in (None, []) and key not in ("type", "item_id")}


def _asked(git: Git, task: PlannedTask) -> dict[str, Any]:
    """How an item was asked; in a live round also by which model, and how many answers that knew."""
    row = asdict(task)
    details = {key: row[key] for key in ("round", "rank", "score", "strategy", "probability")}
    live = next((one for one in read_live(git, task.round) if one.task.push_key == task.push_key), None)
    if live is None:
        return details
    moment = datetime.fromtimestamp(live.asked_at, UTC).isoformat(timespec="seconds")
    return {**details, "live": live.kind, "model": live.model, "answers_known": live.events, "asked_at": moment}


def _became(labels: Labels, item_id: str) -> dict[str, Any] | None:
    row = labels.get(item_id)
    if isinstance(row, LabeledItem):
        sure = {} if row.confidence is None else {"confidence": row.confidence}
        return {"label": row.label, "agreement": row.agreement, **sure, "answers": row.answers}
    return None if row is None else {"label": None, "kind": row.kind, "reason": row.reason}


def _predicted(git: Git, name: str, item_id: str) -> dict[str, float] | None:
    text = git.show(name, "rounds/predictions.csv")
    if not text or item_id not in text:
        return None
    found = parse_predictions(text)
    if item_id not in found.item_ids:
        return None
    return dict(zip(found.classes, found.proba[found.item_ids.index(item_id)].tolist(), strict=True))
