"""Gold: items with known labels are added, removed, and put into every round's plan; answers of some are held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from al_pipeline.annotation.active_events import CONTROLS, active, standing_answers
from al_pipeline.annotation.answers import IMPORT_ROUND
from al_pipeline.annotation.gold import (
    FIRST,
    GOLD,
    TRAIN,
    answers_to_gold,
    choose_gold,
    gold_items,
    gold_key,
    mixed_in,
    right_and_all,
    unexpired,
)
from al_pipeline.annotation.review import rulings
from al_pipeline.data.catalog import label_from, text_from
from al_pipeline.data.inputs import Source, open_inputs
from al_pipeline.data.ledger import add_to_inbox, known_ids, read_events
from al_pipeline.data.pool import hashes_of, read_ids
from al_pipeline.data.table_rows import BadRow, Row, excerpt
from al_pipeline.data.tables import read_table
from al_pipeline.errors import BadInput, NothingToDo, UsageError
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.operations.gold_figures import below_bound
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.intervene import locked_for_intervention
from al_pipeline.params import Params
from al_pipeline.records import (
    Event,
    LabelIntervention,
    PlannedTask,
    content_hash,
    event_digest,
    is_of_review,
    push_key,
)
from al_pipeline.workspace.home import user_name
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)

_MOST_NAMED = 3
HELD = "held for review: "
"""How the reason of events begins that hold somebody's answers."""


class Known(Struct, frozen=True):
    """A row of a user's file: an item, by text or by id, and its right label."""

    place: str
    text: str | None
    item_id: str | None
    label: str


class Added(Struct, frozen=True, kw_only=True):
    """What `add` and `add_reviewed` did."""

    gold: int
    """New gold items, and those whose label or use changed."""
    known: int
    """Items that were gold already, with the same label."""
    labelled: int
    """Of `gold`, items that leave the labelled set, since their label is not trained on."""


def add(
    workspace: Workspace,
    dvc: Dvc,
    path: Path,
    *,
    text_column: str = "text",
    id_column: str = "id",
    label_column: str = "label",
    train: bool = False,
    format: str | None = None,
    encoding: str | None = None,
) -> Added:
    """Make the items of a CSV, JSONL, Parquet or XLSX file gold: rows with a label, and a text or an item's id.

    `path` can be `-`, standard input. Set `format` and `encoding` if they cannot be detected.

    Texts that are new enter the pool. With `train` the labels are trained on too. Nothing is added if a row cannot be:
    raises BadInput, naming rows, for no label or one that is no class, an unknown id, an item of the test set, or
    one item with two labels.
    """
    with open_inputs([path], format, encoding) as inputs:
        return _add(workspace, dvc, inputs.sources, path, text_column, id_column, label_column, train)


def _add(
    workspace: Workspace,
    dvc: Dvc,
    sources: Sequence[Source],
    path: Path,
    text_column: str,
    id_column: str,
    label_column: str,
    train: bool,
) -> Added:
    rows = list(_rows(sources, text_column, id_column, label_column, workspace.params))
    _check_labels(rows, workspace.params.schema_.labels)
    if not rows:
        raise BadInput(f"{path} has no row with a label and a text or an id")
    with locked_for_intervention(workspace, dvc, "al gold add") as (git, _):
        layout = workspace.layout
        test = {*_hashes(layout, test=True)}
        texts = {content_hash(row.text): row for row in rows if row.text is not None}
        _refuse("belong to the test set, which is never trained on and asked for its own sake", [
            row.place for known, row in texts.items() if known in test
        ])  # fmt: skip
        ids = hashes_of([layout.pool, layout.inbox_pool], [row.item_id for row in rows if row.item_id and not row.text])
        _refuse("name no item of the pool by its id", [
            row.place for row in rows if row.text is None and row.item_id not in ids
        ])  # fmt: skip
        labels = _by_content(rows, ids)
        if texts.keys() - _hashes(layout):
            size = None if test else 0  # without a test set, none is drawn from gold
            ingest(workspace, sources, text_column=text_column, id_column=None, test_size=size)
        return _record(workspace, git, {known: labels[known] for known in labels}, train)


def add_reviewed(workspace: Workspace, dvc: Dvc, *, train: bool = False) -> Added:
    """Make the items of the pool with an undisputed ruling gold. Raises NothingToDo if there is none."""
    with locked_for_intervention(workspace, dvc, "al gold add") as (git, _):
        layout = workspace.layout
        counted = active(read_events(layout.events, layout.inbox_events))
        content = {event.item_id: event.content_hash for event in counted}
        settled = {
            content[one.item_id]: one.label
            for one in rulings(counted)
            if one.part == "pool" and one.independent and not one.contradicts
        }
        if not settled:
            raise NothingToDo("no item of the pool has a ruling yet; `al review` puts items before reviewers")
        return _record(workspace, git, settled, train)


def remove(workspace: Workspace, dvc: Dvc, items: Sequence[str]) -> int:
    """Let items be gold no longer; their answers then count like all others. Raises BadInput for one that is not."""
    with locked_for_intervention(workspace, dvc, "al gold remove"):
        layout = workspace.layout
        events = read_events(layout.events, layout.inbox_events)
        gold = gold_items(active(events))
        if unknown := [item for item in items if item not in gold]:
            raise BadInput(f"not gold: {', '.join(unknown[:_MOST_NAMED])}; `al gold list` shows what is")
        newest = standing_answers(events)
        removed = []
        for item in dict.fromkeys(items):
            last = newest[gold_key(gold[item].content_hash)]
            removed.append(
                replace(
                    last,
                    event_id=event_digest("delete", last.event_id),
                    type="delete",
                    label=None,
                    origin=None,
                    reason="no longer gold",
                    previous=last.event_id,
                    observed_at=_now(),
                )
            )
        add_to_inbox(layout.inbox_events, removed, ledger=layout.events)
        return len(removed)


def gold_tasks(
    workspace: Workspace, number: int, tasks: Sequence[PlannedTask], plans: Mapping[str, PlannedTask]
) -> list[PlannedTask]:
    """`tasks`, the plan of round `number`, with gold among them: `quality.gold_share`, more first for newcomers.

    Each item that not everybody has answered can be asked again. In Label Studio nothing tells gold from other tasks:
    keys, fields and order are theirs, and the score lies between those of the queries.
    """
    layout, params = workspace.layout, workspace.params
    share = params.quality.gold_share
    if not share or not tasks:
        return list(tasks)
    counted = active(read_events(layout.events))
    gold = {item: one for item, one in gold_items(counted).items()}
    seen = answers_to_gold(counted, gold_keys(plans))
    people = _everybody(params, counted)
    planned = {task.item_id for task in tasks}
    viewers = {item: count for item, count in unexpired(gold, seen, people).items() if item not in planned}
    there = hashes_of([layout.pool], list(viewers))
    viewers = {item: count for item, count in viewers.items() if item in there}
    counts = right_and_all(seen, gold)
    new = not people or any(counts.get(who, (0, 0))[1] < FIRST for who in people)
    first = FIRST if new else 0
    chosen = choose_gold(gold, viewers, first + round(share * len(tasks)), f"{params.seed} {number}")
    scores = sorted(task.score for task in tasks if task.part == "pool") or [0.0]
    mixed = [
        PlannedTask(
            push_key(workspace.id, number, one.item_id),
            one.item_id,
            one.content_hash,
            "pool",
            number,
            0,
            _between(scores, place, len(chosen)),
            GOLD,
            1.0,
        )
        for place, one in enumerate(chosen)
    ]
    return mixed_in(tasks, mixed, min(first, len(mixed)))


def gold_keys(plans: Mapping[str, PlannedTask]) -> frozenset[str]:
    """The push keys of the tasks that asked an item as gold."""
    return frozenset(key for key, task in plans.items() if task.strategy == GOLD)


def hold_answers(layout: Layout, params: Params, plans: Mapping[str, PlannedTask], now: datetime) -> dict[str, int]:
    """With `quality.hold`, quarantine the answers in the inbox of those whose accuracy on gold is below the bound.

    It is an event for each of them, which says why, and `al labels restore` takes back. It stands while gold says so
    (`annotation.active_events`). Returns the number of answers held, by annotator. A killed close can repeat it.
    """
    if not params.quality.hold:
        return {}
    events = read_events(layout.events, layout.inbox_events)
    counted, keys = active(events), gold_keys(plans)
    low, gold = below_bound(params, counted, keys), gold_items(counted)
    seen = [one for one in answers_to_gold(counted, keys) if one.item_id in gold]
    known, targeted = known_ids(layout.events), {target for event in events for target in event.targets}
    held: dict[str, int] = {}
    made = []
    for who, why in low.items():
        targets = tuple(
            event.event_id
            for event in events
            if event.annotator == who
            and event.type in ("label", "supersede")
            and event.event_id not in known | targeted
            and event.push_key not in keys
            and not is_of_review(event.annotation_key)
        )
        if targets:
            held[who] = len(targets)
            event_id = event_digest("hold", *targets)
            evidence = tuple(one.event_id for one in seen if one.annotator == who)
            made.append(
                Event(
                    event_id, "quarantine", "", "", "pool", IMPORT_ROUND, f"hold:{event_id[:12]}", "al-pipeline",
                    reason=f"{HELD}{who} {why}", targets=targets, observed_at=now.isoformat(timespec="seconds"),
                    intervention=LabelIntervention("hold", bound=params.quality.min_gold, gold=evidence),
                )
            )  # fmt: skip
    add_to_inbox(layout.inbox_events, made, ledger=layout.events)
    for who, count in held.items():
        _logger.warning("%d answers of %s are held for review", count, who)
    return held


def held_answers(events: Sequence[Event]) -> list[Event]:
    """The answers that are held now: out because of a hold, and not restored since."""
    targets = {target for event in events if (event.reason or "").startswith(HELD) for target in event.targets}
    if not targets:
        return []
    counting = {event.event_id for event in active(events)}
    return [event for event in events if event.event_id in targets - counting and event.type not in CONTROLS]


def _between(scores: Sequence[float], place: int, count: int) -> float:
    """A score between two of the queries', which no query has."""
    position = (place + 0.5) / max(1, count) * (len(scores) - 1)
    low, part = int(position), position - int(position)
    high = min(low + 1, len(scores) - 1)
    return scores[low] + (scores[high] - scores[low]) * part


def _everybody(params: Params, counted: Sequence[Event]) -> frozenset[str]:
    """The annotators that there are: those allowed, else those who have answered so far."""
    if params.annotators:
        return frozenset(address.strip().lower() for address in params.annotators)
    return frozenset(event.annotator for event in counted if event.type in ("label", "skip", "supersede"))


def _rows(
    sources: Sequence[Source], text_column: str, id_column: str, label_column: str, params: Params
) -> Iterator[Known]:
    for source in sources:
        for batch in read_table(source, (label_column,), (text_column, id_column, label_column)):
            for row in batch:
                yield _known(row, text_column, id_column, label_column, params)


def _known(row: Row | BadRow, text_column: str, id_column: str, label_column: str, params: Params) -> Known:
    place = f"{row.unit} {row.number}"
    if isinstance(row, BadRow):
        raise BadInput(f"{place}: {row.reason}; nothing was added")
    try:
        label = label_from(row.values.get(label_column))
    except ValueError:
        label = excerpt(row.values.get(label_column))[:80]
    if label is None:
        raise BadInput(f"{place} has no label; nothing was added. Gold needs the right label in {label_column!r}")
    item = row.values.get(id_column)
    text = row.values.get(text_column)
    if text is None or text == "":
        if item is None or item == "":
            raise BadInput(f"{place} has a label, but neither {text_column!r} nor {id_column!r}; nothing was added")
        return Known(place, None, str(item), label)
    try:
        return Known(place, text_from(text, params.ingest.max_characters), None, label)
    except ValueError as error:
        raise BadInput(f"{place}: {error.args[0]}; nothing was added") from None


def _check_labels(rows: Sequence[Known], classes: Sequence[str]) -> None:
    unknown = [row for row in rows if row.label not in classes]
    if unknown:
        named = ", ".join(f"{row.label!r} ({row.place})" for row in unknown[:_MOST_NAMED])
        more = f" and {len(unknown) - _MOST_NAMED} more rows" if len(unknown) > _MOST_NAMED else ""
        raise BadInput(
            f"these labels are no classes of schema.labels in params.yaml: {named}{more}; nothing was added. Correct "
            "the file, or add the class with a higher schema.version"
        )


def _refuse(what: str, places: Sequence[str]) -> None:
    if places:
        more = f" and {len(places) - _MOST_NAMED} more" if len(places) > _MOST_NAMED else ""
        raise BadInput(f"these rows {what}: {', '.join(places[:_MOST_NAMED])}{more}; nothing was added")


def _by_content(rows: Sequence[Known], ids: Mapping[str, str]) -> dict[str, str]:
    """The label of each item, by content hash. Raises BadInput if one has two."""
    found: dict[str, str] = {}
    for row in rows:
        known = content_hash(row.text) if row.text is not None else ids[row.item_id or ""]
        if found.setdefault(known, row.label) != row.label:
            raise BadInput(
                f"{row.place}: the same item has the label {found[known]!r} in an earlier row; nothing was added"
            )
    return found


def _hashes(layout: Layout, *, test: bool = False) -> frozenset[str]:
    return frozenset(read_ids([layout.test, layout.inbox_test] if test else [layout.pool, layout.inbox_pool]).hashes())


def _record(workspace: Workspace, git: Git, labels: Mapping[str, str], train: bool) -> Added:
    """Write a gold event for each of `labels` (content hash -> label) that is not gold with this label already."""
    layout = workspace.layout
    keys = read_ids([layout.pool, layout.inbox_pool])
    ids = {known: item for item, known in zip(keys.ids(), keys.hashes(), strict=True) if known in labels}
    if missing := labels.keys() - ids.keys():
        raise UsageError(f"{len(missing)} texts are not in the pool: `al ingest` rejected them, see data/rejects")
    events = read_events(layout.events, layout.inbox_events)
    newest, all_ids = standing_answers(events), {event.event_id for event in events}
    by, made, known, labelled = git.identity() or user_name(), [], 0, 0
    answered = Counter(event.item_id for event in active(events) if event.label is not None and event.type != GOLD)
    for content, label in sorted(labels.items()):
        last, origin = newest.get(gold_key(content)), TRAIN if train else None
        if last is not None and (last.label, last.origin) == (label, origin):
            known += 1
            continue
        previous = None if last is None else last.event_id
        event_id = event_digest("gold", content, label, origin, previous)
        while event_id in all_ids:  # it was gold before, and removed
            event_id = event_digest(event_id)
        labelled += not train and ids[content] in answered
        made.append(
            Event(
                event_id, "gold", ids[content], content, "pool", IMPORT_ROUND, gold_key(content), by, label,
                workspace.params.schema_.version, previous=previous, origin=origin, observed_at=_now(),
            )
        )  # fmt: skip
    add_to_inbox(layout.inbox_events, made, ledger=layout.events)
    return Added(gold=len(made), known=known, labelled=labelled)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
