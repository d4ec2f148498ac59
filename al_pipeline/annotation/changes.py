"""Events for the differences between Label Studio and what ledger and inbox already record.

An annotation can be new, changed, deleted or back again. Label Studio overwrites and deletes, so each change becomes an
event of its own, and an answer that cannot be accepted is kept apart with the reason. An event's id is a hash of its
content, so that repeating a comparison gives the same events.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from al_pipeline.records import (
    Annotation,
    Answer,
    AnsweredTask,
    Event,
    EventType,
    PlannedTask,
    RefusalReason,
    author_digest,
    canonical,
    event_digest,
    shown_text,
)

Judge = Callable[[AnsweredTask, PlannedTask, Annotation], Answer | RefusalReason]
"""Maps an annotation of a planned task to its answer, or to the reason why it is refused."""

_WITHDRAWING: frozenset[RefusalReason] = frozenset(
    {"malformed", "empty result", "wrong from_name", "several choices", "unknown label"}
)
"""Reasons that concern the annotation's content. An earlier answer that was edited into such a state is withdrawn;
for the other reasons it stays valid, since it was given on the right text or by a permitted annotator.
"""

_ANSWER_TYPES: frozenset[EventType] = frozenset({"label", "skip", "supersede", "delete", "adjudicate"})
_NUMBER = re.compile(r"(\d+)(?:-[0-9a-f]{12})?")


def annotation_key(push_key: str, project_uid: str, annotation: Annotation) -> str:
    """The key of an answer: `push_key#project_uid.number-digest`, a digest of its annotator and creation time.

    The digest is needed because a server reuses numbers after a deletion or a restored backup. Keys written by earlier
    versions end with the number.
    """
    digest = author_digest(annotation.annotator, annotation.created_at)
    return f"{push_key}#{project_uid}.{annotation.annotation_id}-{digest}"


def state_digest(project_uid: str, task: AnsweredTask, annotation: Annotation, *, with_author: bool = True) -> str:
    """The id of an annotation's current state: the same on every pull until somebody changes the annotation.

    Without `with_author`, the id that earlier versions gave it.
    """
    return event_digest(
        project_uid,
        task.push_key,
        annotation.annotation_id,
        annotation.updated_at,
        list(annotation.result),
        annotation.was_cancelled,
        *((annotation.annotator, annotation.created_at) if with_author else ()),
    )


class KnownAnswers:
    """The latest event of each annotation of one project, and all event ids.

    `refused`: the ledger's rows of refused answers.
    """

    def __init__(self, events: Iterable[Event], refused: Iterable[Mapping[str, Any]], project_uid: str) -> None:
        self.ids: set[str] = set()
        self.refused = {str(row["refused_id"]): row for row in refused}
        self.latest: dict[str, Event] = {}
        self.by_task: dict[str, list[str]] = defaultdict(list)
        """The annotation keys of each push key, in the order of their first events."""
        self.gone: set[str] = set()
        """Push keys of tasks that have been gone at some time."""
        self._project_uid = project_uid
        self._mark = f"#{project_uid}."
        self._deleted: dict[str, Event] = {}
        """The last event of each deleted annotation before its deletion, by annotation key."""
        self._digest: str | None = None
        self._names: list[str] | None = None
        """The ids of `latest`, sorted, once they were needed."""
        self._recorded_as_gone: set[str] = set()
        """Event ids of answers whose task is recorded as gone."""
        for event in events:
            self.add(event)

    def live(self, push_key: str) -> list[Event]:
        """The latest events of this task's answers, without deleted ones."""
        latest = (self.latest[key] for key in self.by_task.get(push_key, ()))
        return [event for event in latest if event.type != "delete"]

    def key_of(self, push_key: str, annotation: Annotation) -> str:
        """The known key of an annotation, or the key to give it.

        A known number with another annotator or creation time belongs to another answer.
        """
        for key in reversed(self.by_task.get(push_key, ())):
            number = _NUMBER.fullmatch(key.rpartition(self._mark)[2])
            if number is None or int(number[1]) != annotation.annotation_id:
                continue
            newest = self.latest[key]
            last = self._deleted.get(key) if newest.type == "delete" else newest
            annotator, created_at = ("", None) if last is None else (last.annotator, last.created_at)
            if annotator == annotation.annotator and created_at in (None, annotation.created_at):
                return key
        return annotation_key(push_key, self._project_uid, annotation)

    def annotators(self) -> set[str]:
        """Whose answers are still there, as far as we know: not deleted, and their task is not gone."""
        found = self.not_recorded_as_gone(self.latest.values())
        return {event.annotator for event in found if event.type != "delete"}

    def not_recorded_as_gone(self, answers: Iterable[Event]) -> list[Event]:
        """Those of `answers` (to a task that is gone) that no event records as gone yet."""
        return [event for event in answers if event.event_id not in self._recorded_as_gone]

    def digest(self) -> str:
        """A digest of the present state of all answers, accepted and refused."""
        if self._digest is None:
            if self._names is None:
                self._names = sorted(event.event_id for event in self.latest.values())
            self._digest = event_digest(*self._names, *sorted(self.refused))
        return self._digest

    def refuse(self, row: Mapping[str, Any]) -> None:
        """Add the row of a refused answer."""
        self.refused[str(row["refused_id"])] = row
        self._digest = None

    def add(self, event: Event) -> None:
        """Add an event, later than all others."""
        self.ids.add(event.event_id)
        self._digest = None
        key = event.annotation_key
        push_key, found, rest = key.rpartition(self._mark)
        if event.type in _ANSWER_TYPES and found and (key in self.latest or _NUMBER.fullmatch(rest)):
            before = self.latest.get(key)
            if before is None:
                self.by_task[push_key].append(key)
            elif event.type == "delete" and before.type != "delete":
                self._deleted[key] = before
            self.latest[key] = event
            if self._names is not None:
                if before is not None:
                    del self._names[bisect_left(self._names, before.event_id)]
                insort(self._names, event.event_id)
        elif event.type == "task_gone":
            # Earlier versions listed no answers; the event then covers all those known at that point.
            self._recorded_as_gone |= set(event.targets) or {answer.event_id for answer in self.live(key)}
            self.gone.add(key)


class _Observed(Struct, frozen=True):
    """An annotation of a planned task, its key, and its latest known event."""

    task: AnsweredTask
    plan: PlannedTask
    annotation: Annotation
    key: str
    last: Event | None


@dataclass(slots=True)
class AnnotationDiff:
    """The differences between `known` and the tasks added one by one.

    Add every task that may have changed. Then add the other copies of `keys_with_losses`, and only then record losses:
    a missing answer may belong to another copy of its task.
    """

    project_uid: str
    plans: Mapping[str, PlannedTask]
    """All tasks ever planned, by push key."""
    schema_version: int
    judge: Judge
    observed_at: str
    known: KnownAnswers
    rulings: bool = False
    """Whether the project is that of reviews: its answers are rulings, with the reviewer's comment as the reason."""
    refused: list[Mapping[str, Any]] = field(default_factory=list)
    """Rows of newly refused answers."""
    vanished: int = 0
    """Number of known answers that are gone."""
    _refused_ids: set[str] = field(default_factory=set)
    _answers: list[Event] = field(default_factory=list)
    _losses: list[Event] = field(default_factory=list)
    _present: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """The annotation keys that each push key has now, on any copy of its task."""
    _oldest: dict[str, str] = field(default_factory=dict)
    """Creation time of the oldest copy of each push key's task."""

    def add(self, task: AnsweredTask) -> None:
        """Compare one task with what is known of it."""
        plan = self.plans.get(task.push_key) if task.push_key is not None else None
        if plan is not None:
            self.add_copy(task)
        for annotation in sorted(task.annotations, key=lambda a: (a.updated_at, a.annotation_id)):
            if plan is None:
                self._refuse("task not ours", task, annotation)
            else:
                self._add_annotation(task, plan, annotation)

    def add_copy(self, task: AnsweredTask) -> None:
        """Register the annotations of a copy of a task."""
        if (key := task.push_key) is not None:
            self._present[key].update(self.known.key_of(key, annotation) for annotation in task.annotations)
            self._oldest[key] = min(self._oldest.get(key, task.created_at), task.created_at)

    def keys_with_losses(self) -> list[str]:
        """Push keys of added tasks that lack a known answer."""
        return [key for key in self._present if self._lost(key)]

    def record_losses(self) -> None:
        """Record answers missing from their task as deleted, or as gone with an earlier copy if older than the task."""
        for push_key in self.keys_with_losses():
            gone = []
            for event in self._lost(push_key):
                if event.created_at is not None and event.created_at < self._oldest[push_key]:
                    gone.append(event)
                else:
                    self._withdraw(event, "vanished from Label Studio")
            self._record_gone(push_key, gone)

    def record_gone_tasks(self) -> None:
        """Record tasks with known answers that were not added as gone, if all were. Their answers stay valid."""
        for push_key in self.known.by_task:
            if push_key not in self._present and push_key in self.plans:
                self._record_gone(push_key, self.known.live(push_key))

    def events(self) -> list[Event]:
        """The new events: answers in the order in which they were given, then losses."""
        answers = sorted(self._answers, key=lambda event: (event.updated_at or "", event.annotation_key))
        return [*answers, *self._losses]

    def _lost(self, push_key: str) -> list[Event]:
        return [event for event in self.known.live(push_key) if event.annotation_key not in self._present[push_key]]

    def _add_annotation(self, task: AnsweredTask, plan: PlannedTask, annotation: Annotation) -> None:
        key = self.known.key_of(plan.push_key, annotation)
        last = self.known.latest.get(key)
        with_author = key == annotation_key(plan.push_key, self.project_uid, annotation)
        digest = state_digest(self.project_uid, task, annotation, with_author=with_author)
        if last is not None and last.event_id in (digest, event_digest(digest, last.previous)):
            return
        answer = self.judge(task, plan, annotation)
        if isinstance(answer, Answer):
            # If the state was seen before (a restored database), it needs an id of its own to count again.
            previous = None if last is None else last.event_id
            event_id = event_digest(digest, previous) if digest in self.known.ids else digest
            self._answers.append(self._answered(event_id, _Observed(task, plan, annotation, key, last), answer))
            return
        self._refuse(answer, task, annotation)
        if last is not None and last.type != "delete" and answer in _WITHDRAWING:
            self._withdraw(last, f"edited into an answer that was refused: {answer}")

    def _answered(self, event_id: str, observed: _Observed, answer: Answer) -> Event:
        plan, annotation, last = observed.plan, observed.annotation, observed.last
        kind: EventType = "skip" if answer.label is None else "label"
        if last is not None and last.type != "delete":
            kind = "supersede"
        if self.rulings:
            kind = "adjudicate"
        lead_time = annotation.lead_time
        return Event(
            event_id=event_id,
            type=kind,
            item_id=plan.item_id,
            content_hash=plan.content_hash,
            part=plan.part,
            round=plan.round,
            annotation_key=observed.key,
            annotator=annotation.annotator,
            label=answer.label,
            schema_version=self.schema_version,
            reason=answer.comment if self.rulings else None,
            previous=None if last is None else last.event_id,
            lead_time=lead_time if lead_time is not None and math.isfinite(lead_time) else None,
            origin=answer.origin,
            created_at=annotation.created_at,
            updated_at=annotation.updated_at,
            observed_at=self.observed_at,
            prelabel_shown=observed.task.prelabel_shown,
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

    def _record_gone(self, push_key: str, answers: Sequence[Event]) -> None:
        fresh = sorted(event.event_id for event in self.known.not_recorded_as_gone(answers))
        if not fresh:
            return
        self.vanished += len(fresh)
        again = fresh if push_key in self.known.gone else ()
        event_id = event_digest("task_gone", self.project_uid, push_key, *again)
        if any(event.event_id == event_id for event in self._losses):
            return
        plan = self.plans[push_key]
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
                schema_version=self.schema_version,
                targets=tuple(fresh),
                observed_at=self.observed_at,
            )
        )

    def _refuse(self, reason: RefusalReason, task: AnsweredTask, annotation: Annotation) -> None:
        digest = state_digest(self.project_uid, task, annotation)
        earlier = self.known.refused.get(state_digest(self.project_uid, task, annotation, with_author=False), {})
        same = earlier.get("annotator") == annotation.annotator and earlier.get("created_at") == annotation.created_at
        if digest in self.known.refused or digest in self._refused_ids or same:
            return
        plan = self.plans.get(task.push_key or "")
        row = {
            "refused_id": digest,
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
        self._refused_ids.add(digest)
        self.refused.append(row)
