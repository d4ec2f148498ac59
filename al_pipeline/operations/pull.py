"""Bring what people answered from Label Studio into the inbox, as events that say what changed since the last pull.

Label Studio overwrites and deletes, and believes anything; here nothing is lost and nothing believed unchecked. What
it holds is compared with what ledger and inbox know of it: an annotation is new, changed, vanished or back. An answer
that cannot be believed is kept aside with its reason. The inbox is written before the cursor, and an event's id is a
hash of what it says, so that a pull can be killed anywhere and repeated.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from al_pipeline.data.ledger import (
    Refused,
    add_to_inbox,
    author_digest,
    read_events,
    read_refused,
)
from al_pipeline.errors import VanishedAnswers
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.label_studio.parsers import TIME_FORMAT, parse_annotation, shows_plan
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.params import Schema
from al_pipeline.records import (
    Annotation,
    Answer,
    AnsweredTask,
    Event,
    EventType,
    PlannedTask,
    RefusalReason,
    canonical,
    event_digest,
    shown_text,
)
from al_pipeline.workspace.workspace import Workspace

OVERLAP = timedelta(minutes=10)
"""How far each pull looks back behind the newest change it saw: a change is stamped before it is committed."""

_WITHDRAWING: frozenset[RefusalReason] = frozenset(
    {"malformed", "empty result", "wrong from_name", "several choices", "unknown label"}
)
"""Reasons that lie in what the annotator now says. An earlier answer that was edited into this is no longer held; for
the other reasons it stands, since it was given on the right text or by somebody who was allowed to."""

_ANSWER_TYPES: frozenset[EventType] = frozenset({"label", "skip", "supersede", "delete"})


@dataclass(frozen=True, slots=True)
class PullReport:
    """What a pull brought: events by type, refused answers by reason, and where the next one begins."""

    events: Counter[str]
    refused: Counter[str]
    cursor: str | None


def pull(
    workspace: Workspace,
    oracle: Oracle,
    ref: ProjectRef,
    plans: Mapping[str, PlannedTask],
    schema: Schema,
    allow: Collection[str],
    observed_at: str,
    max_vanished: int,
    accept_vanished: bool = False,
    full: bool = False,
) -> PullReport:
    """Append to the inbox what Label Studio holds that we do not know yet.

    `plans` has every task ever planned, by push key; `allow` the annotators who may answer (empty: everybody);
    `observed_at` is our time in UTC, ISO 8601. `full` reads everything again and finds deleted tasks too. Answers
    to abandoned rounds are recorded like all others; whether they count is decided by each fold. Raises
    VanishedAnswers, with nothing appended, when more than `max_vanished` answers are gone and not `accept_vanished`.
    """
    layout = workspace.layout
    ledger = (layout.events, layout.inbox_events)
    known = read_json(layout.pull_state, {})
    # Answers that other classes were needed for may count by now.
    same_classes = isinstance(known, Mapping) and known.get("classes") == list(schema.labels)
    cursor = _cursor(known, ref) if same_classes and not full else None
    reading = _Reading(
        ref=ref,
        plans=plans,
        schema=schema,
        allow=frozenset(address.strip().lower() for address in allow),
        observed_at=observed_at,
        history=_History(read_events(*ledger), read_refused(*ledger), ref),
    )
    newest = ""
    for task in oracle.answered(ref, cursor):
        reading.read(task)
        newest = max(newest, task.updated_at)
    reading.look_again(oracle.answered_by_key(ref, keys) if (keys := reading.keys_with_losses()) else ())
    reading.note_losses()
    if full:
        reading.note_gone_tasks({state.push_key for state in oracle.task_states(ref)})
    if reading.vanished > max_vanished and not accept_vanished:
        raise VanishedAnswers(
            f"{reading.vanished} answers that we know are gone from Label Studio, more than label_studio.max_vanished "
            f"({max_vanished}) in params.yaml; nothing was recorded. If people deleted them on purpose: "
            "`al round --accept-vanished`"
        )
    news = reading.new_events()
    add_to_inbox(layout.inbox_events, news, reading.refused, ledger=layout.events)
    following = _following(cursor, newest, observed_at)
    if following is not None:
        write_json(layout.pull_state, {"project_uid": ref.project_uid, "cursor": following, "classes": schema.labels})
    return PullReport(
        events=Counter(event.type for event in news),
        refused=Counter(str(row["reason"]) for row in reading.refused),
        cursor=following,
    )


def annotation_key(push_key: str, ref: ProjectRef, annotation: Annotation) -> str:
    """The name of an answer: `push_key#project_uid.number-digest`, the digest of its annotator and creation time.

    A server gives a number again after a deletion, or after it was restored from a backup. Names that earlier versions
    wrote end with the number.
    """
    digest = author_digest(annotation.annotator, annotation.created_at)
    return f"{push_key}#{ref.project_uid}.{annotation.annotation_id}-{digest}"


_NUMBER = re.compile(r"(\d+)(?:-[0-9a-f]{12})?")


class _History:
    """What ledger and inbox know of one project: its annotations' latest events, and all ids."""

    def __init__(self, events: Iterable[Event], refused: Iterable[Refused], ref: ProjectRef) -> None:
        self.ids: set[str] = set()
        self.refused = {str(row["refused_id"]): row for row in refused}
        self.latest: dict[str, Event] = {}
        self.by_task: dict[str, list[str]] = defaultdict(list)
        """The annotations of each push key, in the order in which we first heard of them."""
        self._ref = ref
        self._numbered: dict[tuple[str, int], list[str]] = defaultdict(list)
        """The annotations of each push key that bore a number, the newest last."""
        self._identity: dict[str, tuple[str, str | None]] = {}
        self._noted: set[str] = set()
        """Ids of answers whose task is known to be gone."""
        self.gone: set[str] = set()
        """Push keys of tasks that were gone once."""
        separator = f"#{ref.project_uid}."
        for event in events:
            self.ids.add(event.event_id)
            key = event.annotation_key
            push_key, found, rest = key.rpartition(separator)
            if event.type in _ANSWER_TYPES and found and (number := _NUMBER.fullmatch(rest)):
                if key not in self.latest:
                    self.by_task[push_key].append(key)
                    self._numbered[push_key, int(number[1])].append(key)
                self.latest[key] = event
                if event.type != "delete":
                    self._identity[key] = event.annotator, event.created_at
            elif event.type == "task_gone":
                # Earlier versions named no answers: then it is all those known until then.
                self._noted |= set(event.targets) or {answer.event_id for answer in self.live(key)}
                self.gone.add(key)

    def live(self, push_key: str) -> list[Event]:
        """The answers of this task that stand, as far as we know."""
        latest = (self.latest[key] for key in self.by_task.get(push_key, ()))
        return [event for event in latest if event.type != "delete"]

    def key_of(self, push_key: str, annotation: Annotation) -> str:
        """The name under which we know an annotation, or are to know it.

        One with a known number, and another annotator or another creation time, is another answer.
        """
        for key in reversed(self._numbered.get((push_key, annotation.annotation_id), ())):
            annotator, created_at = self._identity.get(key, ("", None))
            if annotator == annotation.annotator and created_at in (None, annotation.created_at):
                return key
        return annotation_key(push_key, self._ref, annotation)

    def news_of_gone(self, answers: Iterable[Event]) -> list[Event]:
        """Of `answers` to a task that is gone, those of which that is not noted yet."""
        return [event for event in answers if event.event_id not in self._noted]


@dataclass(slots=True)
class _Reading:
    """One pull under way: what it saw, and what that makes new."""

    ref: ProjectRef
    plans: Mapping[str, PlannedTask]
    schema: Schema
    allow: frozenset[str]
    observed_at: str
    history: _History
    refused: list[Refused] = field(default_factory=list)
    vanished: int = 0
    _answers: list[Event] = field(default_factory=list)
    _losses: list[Event] = field(default_factory=list)
    _seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """The annotations that each push key has now, on any of its copies."""
    _oldest: dict[str, str] = field(default_factory=dict)
    """When the oldest copy of each push key's task was made."""

    def read(self, task: AnsweredTask) -> None:
        """Compare one task with what is known of it."""
        plan = self.plans.get(task.push_key) if task.push_key is not None else None
        if plan is not None:
            self._see(plan.push_key, task)
        for annotation in sorted(task.annotations, key=lambda a: (a.updated_at, a.annotation_id)):
            self._read_annotation(task, plan, annotation)

    def keys_with_losses(self) -> list[str]:
        """Push keys of tasks that came back without an answer that we know."""
        return [key for key in self._seen if self._lost(key)]

    def look_again(self, tasks: Iterable[AnsweredTask]) -> None:
        """Take note of what other copies of these tasks hold."""
        for task in tasks:
            if task.push_key is not None:
                self._see(task.push_key, task)

    def note_losses(self) -> None:
        """An answer that its task no longer has is deleted; one older than the task lay on a task that is gone."""
        for push_key in self.keys_with_losses():
            gone = []
            for event in self._lost(push_key):
                if event.created_at is not None and event.created_at < self._oldest[push_key]:
                    gone.append(event)
                else:
                    self._withdraw(event, "vanished from Label Studio")
            self._note_gone(push_key, gone)

    def note_gone_tasks(self, present: Collection[str | None]) -> None:
        """A task with known answers that is not listed is gone. Its answers stand."""
        for push_key in self.history.by_task:
            if push_key not in present and push_key in self.plans:
                self._note_gone(push_key, self.history.live(push_key))

    def new_events(self) -> list[Event]:
        """What is new: answers as they were given, then losses."""
        answers = sorted(self._answers, key=lambda event: (event.updated_at or "", event.annotation_key))
        return [*answers, *self._losses]

    def _see(self, push_key: str, task: AnsweredTask) -> None:
        self._seen[push_key].update(self.history.key_of(push_key, annotation) for annotation in task.annotations)
        self._oldest[push_key] = min(self._oldest.get(push_key, task.created_at), task.created_at)

    def _lost(self, push_key: str) -> list[Event]:
        return [event for event in self.history.live(push_key) if event.annotation_key not in self._seen[push_key]]

    def _read_annotation(self, task: AnsweredTask, plan: PlannedTask | None, annotation: Annotation) -> None:
        if plan is None:
            self._refuse("task not ours", task, annotation)
            return
        key = self.history.key_of(plan.push_key, annotation)
        last = self.history.latest.get(key)
        said = _said(self.ref, task, annotation, whose=key == annotation_key(plan.push_key, self.ref, annotation))
        if last is not None and last.event_id in (said, event_digest(said, last.previous)):
            return
        answer = self._judge(task, plan, annotation)
        if isinstance(answer, Answer):
            after = None if last is None else last.event_id
            # A state that we have seen before (a restored database) needs an id of its own to count again.
            event_id = event_digest(said, after) if said in self.history.ids else said
            back = last is None or last.type == "delete"
            kind: EventType = ("skip" if answer.label is None else "label") if back else "supersede"
            self._answers.append(self._event(event_id, kind, plan, key, annotation, answer, task, after))
            return
        self._refuse(answer, task, annotation)
        if last is not None and last.type != "delete" and answer in _WITHDRAWING:
            self._withdraw(last, f"edited into an answer that was refused: {answer}")

    def _judge(self, task: AnsweredTask, plan: PlannedTask, annotation: Annotation) -> Answer | RefusalReason:
        if self.allow and annotation.annotator not in self.allow:
            return "annotator not allowed"
        if not shows_plan(task.data, plan, self.schema):
            return "changed text"
        return parse_annotation(annotation.result, annotation.was_cancelled, self.schema)

    def _event(
        self,
        event_id: str,
        kind: EventType,
        plan: PlannedTask,
        key: str,
        annotation: Annotation,
        answer: Answer,
        task: AnsweredTask,
        previous: str | None,
    ) -> Event:
        lead_time = annotation.lead_time
        return Event(
            event_id=event_id,
            type=kind,
            item_id=plan.item_id,
            content_hash=plan.content_hash,
            part=plan.part,
            round=plan.round,
            annotation_key=key,
            annotator=annotation.annotator,
            label=answer.label,
            schema_version=self.schema.version,
            previous=previous,
            lead_time=lead_time if lead_time is not None and math.isfinite(lead_time) else None,
            origin=answer.origin,
            created_at=annotation.created_at,
            updated_at=annotation.updated_at,
            observed_at=self.observed_at,
            prelabel_shown=task.prelabel_shown,
        )

    def _withdraw(self, last: Event, reason: str) -> None:
        self.vanished += 1
        self._losses.append(
            Event(
                event_id=event_digest("delete", last.event_id),
                type="delete",
                item_id=last.item_id,
                content_hash=last.content_hash,
                part=last.part,
                round=last.round,
                annotation_key=last.annotation_key,
                annotator=last.annotator,
                schema_version=last.schema_version,
                reason=reason,
                previous=last.event_id,
                observed_at=self.observed_at,
            )
        )

    def _note_gone(self, push_key: str, answers: Sequence[Event]) -> None:
        fresh = sorted(event.event_id for event in self.history.news_of_gone(answers))
        if not fresh:
            return
        plan = self.plans[push_key]
        again = fresh if push_key in self.history.gone else ()
        event_id = event_digest("task_gone", self.ref.project_uid, push_key, *again)
        self.vanished += len(fresh)
        if all(event.event_id != event_id for event in self._losses):
            self._losses.append(
                Event(
                    event_id=event_id,
                    type="task_gone",
                    item_id=plan.item_id,
                    content_hash=plan.content_hash,
                    part=plan.part,
                    round=plan.round,
                    annotation_key=push_key,
                    annotator="",
                    schema_version=self.schema.version,
                    targets=tuple(fresh),
                    observed_at=self.observed_at,
                )
            )

    def _refuse(self, reason: RefusalReason, task: AnsweredTask, annotation: Annotation) -> None:
        said = _said(self.ref, task, annotation)
        earlier = self.history.refused.get(_said(self.ref, task, annotation, whose=False), {})
        same = earlier.get("annotator") == annotation.annotator and earlier.get("created_at") == annotation.created_at
        if said in self.history.refused or same:
            return
        plan = self.plans.get(task.push_key or "")
        row = {
            "refused_id": said,
            "reason": reason,
            "push_key": shown_text(task.push_key)[:500] if task.push_key is not None else None,
            "item_id": plan.item_id if plan else None,
            "round": plan.round if plan else None,
            "task_id": task.task_id,
            "annotation_id": annotation.annotation_id,
            "annotator": annotation.annotator,
            "was_cancelled": annotation.was_cancelled,
            "result": canonical(list(annotation.result)),
            "created_at": annotation.created_at,
            "updated_at": annotation.updated_at,
            "observed_at": self.observed_at,
        }
        self.history.refused[said] = row
        self.refused.append(row)


def _said(ref: ProjectRef, task: AnsweredTask, annotation: Annotation, *, whose: bool = True) -> str:
    """The id of what this annotation says now: the same on every pull until somebody changes it.

    Without `whose`, the id that earlier versions gave it.
    """
    return event_digest(
        ref.project_uid,
        task.push_key,
        annotation.annotation_id,
        annotation.updated_at,
        list(annotation.result),
        annotation.was_cancelled,
        *((annotation.annotator, annotation.created_at) if whose else ()),
    )


def _cursor(state: Any, ref: ProjectRef) -> str | None:
    """Where the last pull of this project got to; None (read everything) where nothing usable says so."""
    if not isinstance(state, Mapping) or state.get("project_uid") != ref.project_uid:
        return None
    cursor = state.get("cursor")
    return cursor if isinstance(cursor, str) and _moment(cursor) is not None else None


def _following(cursor: str | None, newest: str, observed_at: str) -> str | None:
    """Where the next pull begins: a while before the newest change seen, by the server's clock.

    Never later than our own clock says: one change stamped in the future would hide all that follow.
    """
    seen = _moment(newest)
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
