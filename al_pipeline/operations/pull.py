"""Pull answers from Label Studio into the inbox.

They are compared with what the ledger and the inbox hold (`annotation.changes`). The inbox is written before the
cursor, and an event's id is a hash of its content, so that a pull can be killed at any point and repeated.

A pull lists the versions of the tasks changed since the last one, and reads those that it has not read in this version.
An audit also finds what does not show as a change of a task: it reads the tasks changed since the last audit and some
others, and compares the rest with what was known of them (`annotation.task_index`). Only if something differs, or
nothing is known, does it read all tasks.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from al_pipeline.annotation.changes import AnnotationDiff, Judge, KnownAnswers
from al_pipeline.annotation.task_index import TaskIndex, version_of, without_account
from al_pipeline.data.ledger import add_to_inbox, read_events, read_refused, signature
from al_pipeline.errors import VanishedAnswers
from al_pipeline.files import read_json, write_text
from al_pipeline.integrations.label_studio.parsers import TIME_FORMAT, parse_annotation, shows_plan
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.logs import get_logger
from al_pipeline.params import Schema
from al_pipeline.records import Annotation, Answer, AnsweredTask, PlannedTask, RefusalReason, TaskVersion
from al_pipeline.workspace.layout import Layout

_logger = get_logger(__name__)

OVERLAP = timedelta(minutes=10)
"""How far a pull looks back before the newest change seen: a change is timestamped before it is committed."""
NOTED_SECONDS = 5.0
"""How often a process that pulls each second notes on disk where it is."""
ROLLING = 100
"""How many tasks the rolling check reads at an audit, at least: about 0.4 s of the server's processor."""
_COMPARISONS = 2
"""How often an audit compares the totals: an answer given while it reads changes them."""


class PullRequest(Struct, frozen=True):
    """What to pull, and which answers to accept."""

    project: ProjectRef
    plans: Mapping[str, PlannedTask]
    """Every task ever planned, by push key."""
    schema: Schema
    allow: Collection[str]
    """Annotators whose answers are accepted; empty: everybody."""
    observed_at: str
    """Time of the pull by our clock, as ISO 8601 in UTC."""
    max_vanished: int
    """How many known answers may be missing."""
    accept_vanished: bool = False
    """Accept more missing answers than that."""
    rulings: bool = False
    """Whether the project is that of reviews; `allow` are then the reviewers, and nobody else is accepted."""
    audit: bool = False
    """Also find what does not show as a change of a task, such as deleted tasks."""
    former: Collection[str] = ()
    """Classes that the schema had before: pages opened then still offer them, and the fold maps their answers."""
    look_back: timedelta = OVERLAP
    """How far to look back, at most OVERLAP. Less misses changes that were committed late: the next pull that looks
    back further finds them."""


class PullReport(Struct, frozen=True):
    """What a pull added: events by type, refused answers by reason, and the cursor of the next pull."""

    events: Counter[str]
    refused: Counter[str]
    cursor: str | None


class _Position(Struct, frozen=True):
    """Where the last pull ended."""

    cursor: str | None = None
    """Changes before this time were read; None: the next pull reads everything."""
    audited: str = ""
    """Changes before this time were read by an audit."""
    rolled: int = 0
    """The task id that the rolling check has come to."""
    index: TaskIndex | None = None
    """All tasks; None if no audit has read them, or a later pull contradicted it: the next audit reads all."""


class PullMemory:
    """What a process that pulls each second keeps from one pull to the next, so that a pull costs what is new.

    It holds as long as nobody else changed ledger or inbox. Where the pull is, is noted on disk every few seconds; a
    process that is killed before reads more than it need, and records nothing twice.
    """

    def __init__(self) -> None:
        self.reads = 0
        """Pulls that read ledger and inbox, and the note on disk."""
        self._key: tuple[Any, ...] | None = None
        self._known: KnownAnswers | None = None
        self._position = _Position()
        self._unnoted: tuple[Path, _Position, _Known] | None = None
        self._noted_at = -math.inf

    def inbox_merged(self, layout: Layout) -> None:
        """Go on with the files as they are now: they hold the same events, in other files."""
        if self._key is not None:
            self._key = (*self._key[:-1], _files_of(layout))

    def note(self, layout: Layout) -> None:
        """Note on disk where the last pull ended, unless that is done or somebody else has pulled since."""
        if self._unnoted is not None and self._key is not None and self._key[-1] == _files_of(layout):
            place, position, known = self._unnoted
            write_text(place, f"{msgspec.json.encode(_state(position, known), order='sorted').decode()}\n")
        self._unnoted, self._noted_at = None, time.monotonic()

    def forget(self) -> None:
        """Have the next pull read everything again."""
        self._key = self._known = self._unnoted = None

    def _holds(self, key: tuple[Any, ...]) -> bool:
        return self._key == key

    def _keep(self, key: tuple[Any, ...], known: _Known, position: _Position, place: Path) -> None:
        self._key, self._position = key, position
        self._known = known.diff.known if known.is_read else known.kept
        if position.cursor is not None:
            self._unnoted = place, position, known


def pull(layout: Layout, oracle: Oracle, request: PullRequest, memory: PullMemory | None = None) -> PullReport:
    """Append to the inbox all changes of answers in Label Studio that are not recorded yet.

    Answers to abandoned rounds are recorded like all others; each fold decides whether they count. Raises
    VanishedAnswers, with nothing appended, if more known answers are missing than the request allows.
    """
    place = layout.review_state if request.rulings else layout.pull_state
    state: Any = None
    if memory is not None and memory._holds(_memory_key(layout, request)):
        known, before = _Known(layout, request, {}, memory._known), memory._position
    else:
        state = _read_state(place)
        known = _Known(layout, request, state)
        before = _position(state, known)
        if memory is not None:
            memory.forget()
            memory.reads += 1
    after = _audit(known, oracle, request, before) if request.audit else _read_changes(known, oracle, request, before)
    if not known.is_read and after == before:
        _logger.info("answers: none new")
        if memory is not None:
            if state is not None:
                memory._keep(_memory_key(layout, request), known, after, place)
            elif memory._unnoted is not None and time.monotonic() - memory._noted_at >= NOTED_SECONDS:
                memory.note(layout)
        return PullReport(Counter(), Counter(), after.cursor)
    diff = known.diff
    if diff.vanished > request.max_vanished and not request.accept_vanished:
        raise VanishedAnswers(
            f"{diff.vanished} known answers have disappeared from Label Studio, more than label_studio.max_vanished "
            f"({request.max_vanished}) in params.yaml allows; nothing was recorded. If people deleted them on "
            "purpose: `al round --accept-vanished`"
        )
    events = diff.events()
    add_to_inbox(layout.inbox_events, events, diff.refused, ledger=layout.events)
    for event in events:
        diff.known.add(event)
    for row in diff.refused:
        diff.known.refuse(row)
    if memory is not None:
        memory._keep(_memory_key(layout, request), known, after, place)
        if state is not None or time.monotonic() - memory._noted_at >= NOTED_SECONDS:
            memory.note(layout)
    elif after.cursor is not None and (now := _state(after, known)) != state:
        write_text(place, f"{msgspec.json.encode(now, order='sorted').decode()}\n")
    report = PullReport(
        events=Counter(event.type for event in events),
        refused=Counter(str(row["reason"]) for row in diff.refused),
        cursor=after.cursor,
    )
    _logger.info("answers: %s", ", ".join(f"{count} {kind}" for kind, count in report.events.items()) or "none new")
    for reason, count in report.refused.items():
        _logger.warning("%d answers were refused: %s", count, reason)
    return report


def _read_state(place: Path) -> Any:
    """What the last pull noted, of tens of thousands of tasks perhaps."""
    try:
        return msgspec.json.decode(place.read_bytes())
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, RecursionError):
        return read_json(place, {})  # says what is wrong


class _Known:
    """What ledger and inbox hold, read when a task has to be compared with it. `state`: what the last pull noted."""

    def __init__(self, layout: Layout, request: PullRequest, state: Any, kept: KnownAnswers | None = None) -> None:
        self.kept = kept
        """What is known already, if a process kept it."""
        self._ledger = layout.events, layout.inbox_events
        self._request = request
        self._state = state if isinstance(state, Mapping) else {}
        self.is_read = False

    @cached_property
    def diff(self) -> AnnotationDiff:
        """A diff against them, at first empty."""
        request, uid = self._request, self._request.project.project_uid
        self.is_read = True
        return AnnotationDiff(
            project_uid=uid,
            plans=request.plans,
            schema_version=request.schema.version,
            judge=_judge(request.schema, request.allow, request.former, request.rulings),
            observed_at=request.observed_at,
            known=self.kept or KnownAnswers(read_events(*self._ledger), read_refused(*self._ledger), uid),
            rulings=request.rulings,
        )

    def compared_with(self) -> dict[str, Any]:
        """The project, what decides whether an answer of it is accepted, and the answers that ledger and inbox hold.

        The digest of the answers is the noted one if the files are those of which it was noted: they never change.
        """
        schema, files = self._request.schema, [list(mark) for mark in signature(*self._ledger, refused=True)]
        noted = self._state.get("known") if not self.is_read and self._state.get("files") == files else None
        return {
            "project_uid": self._request.project.project_uid,
            "classes": list(schema.labels),
            "fields": list(schema.fields),
            "annotators": sorted(self._request.allow),
            "known": noted if isinstance(noted, str) else self.diff.known.digest(),
            "files": files,
        }


def _read_changes(known: _Known, oracle: Oracle, request: PullRequest, before: _Position) -> _Position:
    """Compare the tasks changed since the last pull with what is `known`; return where the next one starts.

    Those whose versions the index has are not read again.
    """
    since, index = _since(before.cursor, request.look_back), before.index
    listed: Mapping[int, TaskVersion] = {}
    if since is None or index is None:
        index = None
    else:
        listed = oracle.changed(request.project, since)
        if index.missing(since, listed) or index.replaced(listed):
            index = None
        else:
            since = index.first_change(listed)
    read: Mapping[int, TaskVersion] = {}
    if index is None or since is not None:
        read = _add(known.diff, oracle, request.project, oracle.answered(request.project, since))
    if index is not None:
        index = None if index.replaced(read) else index.with_read(read)
    return replace(before, cursor=_following(before.cursor, {**listed, **read}, request.observed_at), index=index)


def _since(cursor: str | None, look_back: timedelta) -> str | None:
    """The time since which changes are listed: a cursor is OVERLAP before the newest change seen."""
    begin = None if cursor is None else _moment(cursor)
    if begin is None or look_back >= OVERLAP:
        return cursor
    return (begin + OVERLAP - look_back).strftime(TIME_FORMAT)


def _memory_key(layout: Layout, request: PullRequest) -> tuple[Any, ...]:
    """What a memory holds for: the project, what decides whether an answer counts, and the files of known answers."""
    schema = request.schema
    return (
        request.project.project_uid,
        request.rulings,
        (tuple(schema.labels), tuple(schema.fields), tuple(sorted(request.allow))),
        _files_of(layout),
    )


def _files_of(layout: Layout) -> tuple[tuple[str, int, int], ...]:
    return signature(layout.events, layout.inbox_events, refused=True)


def _audit(known: _Known, oracle: Oracle, request: PullRequest, before: _Position) -> _Position:
    """Compare all tasks that may differ from what is `known` with it; return where the next pull starts."""
    diff = known.diff
    found = _suspects(oracle, request.project, before, diff.known.annotators())
    if isinstance(found, _Suspects):
        read = _add(diff, oracle, request.project, found.tasks)
        rolled, index = found.rolled, found.index.with_read(read)
    else:
        _logger.info("all tasks are read: %s", found)
        read = _add(diff, oracle, request.project, oracle.answered(request.project, None))
        diff.record_gone_tasks()
        rolled, index = 0, TaskIndex(read)
    cursor = _following(before.cursor, read, request.observed_at)
    return _Position(cursor, cursor or "", rolled, index)


class _Suspects(Struct, frozen=True):
    """The tasks that an audit must read, the index that holds all others, and where the rolling check has come to."""

    tasks: Collection[AnsweredTask]
    index: TaskIndex
    rolled: int


def _suspects(oracle: Oracle, project: ProjectRef, before: _Position, annotators: Collection[str]) -> _Suspects | str:
    """The tasks that may differ from what is known, or why all of them may. `annotators`: those of known answers."""
    since, index = before.audited, before.index
    if before.cursor is None or index is None or not since:
        return "there is no usable note of an earlier audit"
    if strangers := without_account(annotators, oracle.accounts()):
        return f"{len(strangers)} annotators have another address or no account"
    limit = max(ROLLING, 2 * index.changed_since(since))  # more than what is new, so that it comes round
    section = {task.task_id: task for task in oracle.answered_after(project, before.rolled, since, limit)}
    for _ in range(_COMPARISONS):
        changed = {task.task_id: task for task in oracle.answered(project, since)}
        difference = index.differing(changed, oracle.totals(project, since))
        if difference is None:
            break
    is_last = len(section) < limit
    old = {number: version_of(task) for number, task in section.items()}
    new = {number: version_of(task) for number, task in changed.items()}
    if missing := index.missing(since, new):
        return f"{len(missing)} tasks whose last change is known are not among those changed since"
    if replaced := index.replaced(new):
        return f"{len(replaced)} ids belong to other tasks"
    if difference is not None:
        return difference
    if unlike := index.unlike(before.rolled, old, new, is_last=is_last):
        return f"{len(unlike)} tasks of the rolling check are not as they were"
    return _Suspects({**section, **changed}.values(), index, 0 if is_last else max(section))


def _add(
    diff: AnnotationDiff, oracle: Oracle, project: ProjectRef, tasks: Iterable[AnsweredTask]
) -> dict[int, TaskVersion]:
    """Add `tasks`, and losses in them, to `diff`; return them for the index."""
    read = {}
    for task in tasks:
        diff.add(task)
        read[task.task_id] = version_of(task)
    if lost := diff.keys_with_losses():
        for task in oracle.answered_by_key(project, lost):
            diff.add_copy(task)
    diff.record_losses()
    return read


def _judge(schema: Schema, allow: Collection[str], former: Collection[str], rulings: bool = False) -> Judge:
    """Return a function that accepts an answer if its annotator is allowed, the text is ours and the label a class."""
    allowed = frozenset(address.strip().lower() for address in allow)

    def judge(task: AnsweredTask, plan: PlannedTask, annotation: Annotation) -> Answer | RefusalReason:
        if (allowed or rulings) and annotation.annotator not in allowed:
            return "annotator not allowed"
        if not shows_plan(task.data, plan, schema):
            return "changed text"
        return parse_annotation(annotation.result, annotation.was_cancelled, schema, former)

    return judge


def _position(state: Any, known: _Known) -> _Position:
    """Where the last pull of this project ended; an empty one if there is no usable note of it.

    Empty too if what answers are compared with has changed since. Those refused for an unknown class may count now; and
    answers that ledger or inbox have lost, or that another clone added, may not be the server's.
    """
    if not isinstance(state, Mapping):
        return _Position()
    if any(state.get(name) != value for name, value in known.compared_with().items() if name != "files"):
        return _Position()
    cursor, audited, rolled = state.get("cursor"), state.get("audited"), state.get("rolled")
    if not isinstance(cursor, str) or _moment(cursor) is None:
        return _Position()
    if not isinstance(audited, str) or _moment(audited) is None or type(rolled) is not int:
        return _Position(cursor)
    return _Position(cursor, audited, rolled, TaskIndex.from_rows(state.get("tasks")))


def _state(position: _Position, known: _Known) -> dict[str, Any]:
    """What `_position` reads."""
    rows = None if position.index is None else position.index.to_rows()
    return {
        **known.compared_with(),
        "cursor": position.cursor,
        "audited": position.audited,
        "rolled": position.rolled,
        "tasks": rows,
    }


def _following(cursor: str | None, read: Mapping[int, TaskVersion], observed_at: str) -> str | None:
    """The cursor of the next pull: OVERLAP before the newest change seen, by the server's clock.

    It is capped by our own clock: one change stamped in the future would hide all later ones.
    """
    seen = _moment(max((task.updated_at for task in read.values()), default=""))
    if seen is None:
        return cursor
    ours = datetime.fromisoformat(observed_at)
    ours = ours if ours.tzinfo else ours.replace(tzinfo=UTC)
    return (min(seen, ours).astimezone(UTC) - OVERLAP).strftime(TIME_FORMAT)


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text) if text.endswith("Z") else None
    except ValueError:
        return None
