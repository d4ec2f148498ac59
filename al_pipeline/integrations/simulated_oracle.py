"""An oracle in memory for tests, simulations and dry runs: a fake of Label Studio that has its pitfalls."""

from __future__ import annotations

import copy
import json
import math
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Literal

from msgspec.structs import replace

from al_pipeline.errors import LabelStudioRefused
from al_pipeline.integrations.label_studio.parsers import TIME_FORMAT, answered_task, raw_result, task_state
from al_pipeline.integrations.label_studio.payloads import LIVE, choice_result, task_json
from al_pipeline.integrations.label_studio.projects import (
    ProjectMark,
    check_mark,
    find_mark,
    find_project,
    is_our_title,
    missing_project,
    page_edit,
    with_mark,
)
from al_pipeline.integrations.oracle import PageEdit, ProjectRef, ProjectSpec, ignore
from al_pipeline.records import Annotation, AnsweredTask, Task, TaskState, TaskTotals, TaskVersion

Moment = Literal["before", "after"]
"""A fault occurs before the server has done anything, or after it has done everything (its reply is lost)."""


@dataclass(slots=True)
class _HeldTask:
    task_id: int
    data: dict[str, Any]
    predictions: list[dict[str, Any]]
    created_at: str
    updated_at: str
    annotations: dict[int, Annotation] = field(default_factory=dict)
    retired: bool = False
    overlap: int | None = None
    """None: that of the project."""


@dataclass(slots=True)
class _HeldProject:
    title: str
    description: str
    labels: list[str]
    overlap: int
    show_guess: bool
    newest_first: bool = False
    tasks: dict[int, _HeldTask] = field(default_factory=dict)


class SimulatedOracle:
    """Label Studio in memory, with its pitfalls.

    A repeated import creates duplicates; the highest task id is reused after a deletion; an edit overwrites; a deletion
    leaves no trace; any result is stored; a changed overlap reopens retired tasks. `fault(call, moment)`, if set, is
    called around each call of the interface and may raise. The other public methods do what annotators and
    administrators do in Label Studio.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self.fault: Callable[[str, Moment], None] | None = None
        self.projects: dict[int, _HeldProject] = {}
        self._now = start
        self._last_annotation = 0
        self._people: set[str] = set()
        """Everybody who has ever answered or skipped."""

    # The interface -------------------------------------------------------------------------------------------------

    def ensure_project(
        self, spec: ProjectSpec, known: ProjectRef | None = None, on_page_edit: Callable[[PageEdit], None] = ignore
    ) -> ProjectRef:
        """Find or create our project; see Oracle."""
        self._strike("ensure_project", "before")
        described = ((number, project.description) for number, project in self.projects.items())
        ref = known or find_project(described, spec.workspace_id)
        if ref is None:
            ref = self._create_project(spec)
        else:
            self._update_project(self._project(ref, spec.workspace_id, spec.clone_id), spec, on_page_edit)
        self._strike("ensure_project", "after")
        return ref

    def check(self, ref: ProjectRef, workspace_id: str, clone_id: str | None = None) -> None:
        """Raise WrongProject unless `ref` is ours; see Oracle."""
        self._strike("check", "before")
        self._project(ref, workspace_id, clone_id)

    def adopt(self, ref: ProjectRef, workspace_id: str, clone_id: str) -> None:
        """Make this clone the writer; see Oracle."""
        self._strike("adopt", "before")
        project = self._project(ref, workspace_id, None)
        project.description = with_mark(project.description, ProjectMark(workspace_id, clone_id, ref.project_uid))
        self._strike("adopt", "after")

    def task_states(self, ref: ProjectRef, round: int | None = None, first: int = 0) -> Iterator[TaskState]:
        """Every task (of one round); see Oracle."""
        self._strike("task_states", "before")
        project = self._held(ref)
        for task in sorted(project.tasks.values(), key=lambda task: task.task_id):
            if task.task_id >= first and (round is None or task.data.get("al_round") == round):
                yield self._state(project, task)

    def open_tasks(self, ref: ProjectRef) -> Iterator[TaskState]:
        """Every task still in the queue; see Oracle."""
        self._strike("open_tasks", "before")
        project = self._held(ref)
        for task in sorted(project.tasks.values(), key=lambda task: task.task_id):
            state = self._state(project, task)
            if not state.is_labeled:
                yield state

    def import_tasks(self, ref: ProjectRef, tasks: Sequence[Task]) -> None:
        """Add tasks; a repeated call creates duplicates; see Oracle."""
        self._strike("import_tasks", "before")
        project, now = self._held(ref), self._tick()
        for sent in [json.loads(json.dumps(task_json(task), allow_nan=False)) for task in tasks]:
            task_id = 1 + max(project.tasks, default=0)
            project.tasks[task_id] = _HeldTask(task_id, sent["data"], sent.get("predictions", []), now, now)
        self._strike("import_tasks", "after")

    def changed(self, ref: ProjectRef, since: str) -> Mapping[int, TaskVersion]:
        """The versions of the tasks changed since then; see Oracle."""
        self._strike("changed", "before")
        return {
            task.task_id: TaskVersion(task.created_at, task.updated_at, len(_live(task)))
            for task in self._held(ref).tasks.values()
            if task.updated_at >= since
        }

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        """Tasks changed since then; see Oracle."""
        self._strike("answered", "before")
        for task in sorted(self._held(ref).tasks.values(), key=lambda task: task.task_id):
            if since is None or task.updated_at >= since:
                yield _answered(task)

    def answered_after(self, ref: ProjectRef, task_id: int, before: str, limit: int) -> Iterator[AnsweredTask]:
        """The next tasks by id; see Oracle."""
        self._strike("answered_after", "before")
        held = sorted(self._held(ref).tasks.values(), key=lambda task: task.task_id)
        for task in islice((task for task in held if task.task_id > task_id and task.updated_at < before), limit):
            yield _answered(task)

    def answered_by_key(self, ref: ProjectRef, push_keys: Collection[str]) -> Iterator[AnsweredTask]:
        """Tasks with these keys; see Oracle."""
        self._strike("answered_by_key", "before")
        for task in sorted(self._held(ref).tasks.values(), key=lambda task: task.task_id):
            if task.data.get("push_key") in push_keys:
                yield _answered(task)

    def totals(self, ref: ProjectRef, before: str) -> TaskTotals:
        """Totals of the tasks last changed earlier; see Oracle."""
        self._strike("totals", "before")
        found = [task for task in self._held(ref).tasks.values() if task.updated_at < before]
        newest = max((task.updated_at for task in found), default=None)
        return TaskTotals(len(found), sum(len(_live(task)) for task in found), newest)

    def accounts(self) -> Mapping[int, str]:
        """All accounts; see Oracle."""
        self._strike("accounts", "before")
        return dict(enumerate(sorted(self._people), start=1))

    def ask_more(self, ref: ProjectRef, answers: Mapping[int, int]) -> None:
        """Put tasks back into the queue; see Oracle."""
        self._strike("ask_more", "before")
        held = self._held(ref).tasks
        for task_id, wanted in answers.items():
            if task_id in held:
                task = held[task_id]
                task.retired, task.overlap, task.updated_at = False, wanted, self._tick()
        self._strike("ask_more", "after")

    def serve_newest(self, ref: ProjectRef, newest: bool) -> None:
        """Change the order of tasks; see Oracle."""
        self._strike("serve_newest", "before")
        held = self._held(ref)
        if newest and all(_by_place(task)[0] == math.inf for task in held.tasks.values()):
            raise LabelStudioRefused("changing the order of tasks: no task has a prediction of that version")
        held.newest_first = newest
        self._strike("serve_newest", "after")

    def retire(self, ref: ProjectRef, task_ids: Sequence[int]) -> None:
        """Take tasks out of the queue; see Oracle."""
        self._strike("retire", "before")
        held = self._held(ref).tasks
        for task_id in task_ids:
            if task_id in held:
                held[task_id].retired, held[task_id].updated_at = True, self._tick()
        self._strike("retire", "after")

    def close(self) -> None:
        """Do nothing: there is no connection."""

    # What annotators do --------------------------------------------------------------------------------------------

    def queue(self, annotator: str, project_id: int = 1) -> list[str]:
        """The push keys of the tasks that this annotator would be served, in order."""
        project = self.projects[project_id]
        order = _by_place if project.newest_first else _by_id
        return [
            str(task.data.get("push_key"))
            for task in sorted(project.tasks.values(), key=order)
            if not self._state(project, task).is_labeled
            and all(annotation.annotator != annotator for annotation in task.annotations.values())
        ]

    def answer(self, push_key: str, annotator: str, label: str | Any, project_id: int = 1) -> int:
        """Answer the (first) task with this key by a label or any raw result; return the annotation's id."""
        return self._annotate(self._find_task(push_key, project_id), annotator, label, cancelled=False)

    def skip(self, push_key: str, annotator: str, project_id: int = 1) -> int:
        """Skip the (first) task with this key; return the annotation's id."""
        return self._annotate(self._find_task(push_key, project_id), annotator, [], cancelled=True)

    def edit(self, annotation_id: int, label: str | Any, cancelled: bool = False, project_id: int = 1) -> None:
        """Overwrite an annotation without keeping its earlier content."""
        task = self._task_of(annotation_id, project_id)
        old, now = task.annotations[annotation_id], self._tick()
        task.annotations[annotation_id] = replace(old, result=_raw(label), was_cancelled=cancelled, updated_at=now)
        task.updated_at = now

    def delete_annotation(self, annotation_id: int, project_id: int = 1) -> Annotation:
        """Delete an annotation and return it."""
        task = self._task_of(annotation_id, project_id)
        task.updated_at = self._tick()
        return task.annotations.pop(annotation_id)

    def restore_annotation(self, push_key: str, annotation: Annotation, project_id: int = 1) -> None:
        """Put a deleted annotation back exactly as it was, as a restored database would."""
        task = self._find_task(push_key, project_id)
        task.annotations[annotation.annotation_id], task.updated_at = annotation, self._tick()

    def delete_task(self, push_key: str, project_id: int = 1) -> None:
        """Delete the (first) task with this key, and its answers."""
        del self.projects[project_id].tasks[self._find_task(push_key, project_id).task_id]

    def backup(self) -> SimulatedOracle:
        """A copy of the server's present state."""
        return copy.deepcopy(self)

    def restore_backup(self, saved: SimulatedOracle) -> None:
        """Restore a backup's state: ids assigned since then are assigned again. The clock is not set back."""
        held = copy.deepcopy(saved)
        self.projects, self._last_annotation = held.projects, held._last_annotation

    def edit_data(self, push_key: str, project_id: int = 1, **changes: Any) -> None:
        """Change the data of the (first) task with this key."""
        task = self._find_task(push_key, project_id)
        task.data, task.updated_at = {**task.data, **changes}, self._tick()

    def pass_time(self, seconds: float) -> str:
        """Advance the server's clock and return its time. Each write advances it by one second."""
        self._now += timedelta(seconds=seconds)
        return self._now.strftime(TIME_FORMAT)

    # -----------------------------------------------------------------------------------------------------------------

    def _strike(self, call: str, moment: Moment) -> None:
        if self.fault is not None:
            self.fault(call, moment)

    def _tick(self) -> str:
        return self.pass_time(1)

    def _create_project(self, spec: ProjectSpec) -> ProjectRef:
        ref = ProjectRef(1 + max(self.projects, default=0), uuid.uuid4().hex[:12])
        mark = ProjectMark(spec.workspace_id, spec.clone_id, ref.project_uid)
        title, labels = spec.title or f"al {spec.workspace_id}", list(spec.schema.labels)
        self.projects[ref.project_id] = _HeldProject(title, str(mark), labels, spec.overlap, spec.show_guess)
        return ref

    def _update_project(
        self, project: _HeldProject, spec: ProjectSpec, on_page_edit: Callable[[PageEdit], None]
    ) -> None:
        edit = page_edit(project.labels, spec.schema, spec.published)
        if edit is not None:
            on_page_edit(edit)
        if spec.overlap != project.overlap:  # as in Label Studio, this reopens retired tasks
            for task in project.tasks.values():
                task.retired, task.overlap = False, None
        project.labels = [*spec.schema.labels, *(edit.added if edit else ())]
        project.overlap, project.show_guess = spec.overlap, spec.show_guess
        if spec.title is not None and is_our_title(project.title, spec.workspace_id):
            project.title = spec.title

    def _held(self, ref: ProjectRef) -> _HeldProject:
        if ref.project_id not in self.projects:
            raise missing_project(ref)
        return self.projects[ref.project_id]

    def _project(self, ref: ProjectRef, workspace_id: str, clone_id: str | None) -> _HeldProject:
        project = self._held(ref)
        check_mark(find_mark(project.description), ref, workspace_id, clone_id)
        return project

    def _state(self, project: _HeldProject, task: _HeldTask) -> TaskState:
        people = {annotation.annotator for annotation in _live(task)}
        return task_state(
            task.task_id,
            task.data,
            is_labeled=task.retired or len(people) >= (task.overlap or project.overlap),
            annotations=len(_live(task)),
            cancelled=len(task.annotations) - len(_live(task)),
        )

    def _find_task(self, push_key: str, project_id: int) -> _HeldTask:
        tasks = self.projects[project_id].tasks
        found = [task for _, task in sorted(tasks.items()) if task.data.get("push_key") == push_key]
        if not found:
            raise KeyError(push_key)
        return found[0]

    def _task_of(self, annotation_id: int, project_id: int) -> _HeldTask:
        return next(task for task in self.projects[project_id].tasks.values() if annotation_id in task.annotations)

    def _annotate(self, task: _HeldTask, annotator: str, label: str | Any, cancelled: bool) -> int:
        self._last_annotation += 1
        self._people.add(annotator)
        now = self._tick()
        task.annotations[self._last_annotation] = Annotation(
            self._last_annotation, annotator, _raw(label), cancelled, now, now, lead_time=1.0
        )
        task.updated_at = now
        return self._last_annotation


def _live(task: _HeldTask) -> list[Annotation]:
    return [annotation for annotation in task.annotations.values() if not annotation.was_cancelled]


def _raw(label: str | Any) -> tuple[Any, ...]:
    return raw_result(choice_result(label) if isinstance(label, str) else label)


def _answered(task: _HeldTask) -> AnsweredTask:
    return answered_task(
        task.task_id,
        dict(task.data),
        tuple(task.annotations.values()),
        created_at=task.created_at,
        updated_at=task.updated_at,
        answers=len(_live(task)),
    )


def _by_id(task: _HeldTask) -> tuple[float, int]:
    return 0.0, task.task_id


def _by_place(task: _HeldTask) -> tuple[float, int]:
    """Tasks with a place first, by falling place, as uncertainty sampling has it."""
    scores = [float(one["score"]) for one in task.predictions if one["model_version"] == LIVE]
    return min(scores, default=math.inf), task.task_id
