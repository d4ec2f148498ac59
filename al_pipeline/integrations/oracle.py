"""The one seam to whoever answers: what the pipeline asks of Label Studio, and a twin of it in memory.

`Oracle` is the interface, `integrations/label_studio` the real thing, `SimulatedOracle` the twin that ships with the
package, with the traps of the real thing: it never refuses a duplicate, reuses ids, validates nothing and overwrites.
"""

from __future__ import annotations

import copy
import json
import math
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol, runtime_checkable

from al_pipeline.errors import BadInput, WrongProject
from al_pipeline.files import sha256_bytes
from al_pipeline.params import Schema
from al_pipeline.records import Annotation, AnsweredTask, Part, Task, TaskState, shown_text
from al_pipeline.sanitize import one_line, shortened

CONTROL = "label"
"""Name of the one question in the label config: the `from_name` of every answer that we read."""

RESERVED = frozenset(
    {
        CONTROL, "item_id", "al_round", "al_part", "al_rank", "al_score", "al_strategy", "al_prelabel",
        "push_key", "shown_hash",
    }
)  # fmt: skip
"""Keys of a task's data that are ours; what is left is what annotators see."""

TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
"""How Label Studio's times are written here: UTC, six digits, so that text order is time order."""

SHORT_ID = 6
"""Characters of a workspace's id that names for people end with."""

_LONGEST_TITLE = 50
"""What Label Studio takes."""

_LONGEST_NAME = 24

_PLAIN_KEY = re.compile(r"^[A-Za-z][A-Za-z0-9_]*$")
_MARK = re.compile(r"al-workspace:(\S+) clone:(\S+) project:(\S+)")


@dataclass(frozen=True, slots=True)
class ProjectRef:
    """Which project is ours: its number on its server, and the id that we wrote into it."""

    project_id: int
    project_uid: str


@dataclass(frozen=True, slots=True)
class ProjectMark:
    """What a project's description says of whose it is."""

    workspace_id: str
    clone_id: str
    project_uid: str

    def __str__(self) -> str:
        return f"al-workspace:{self.workspace_id} clone:{self.clone_id} project:{self.project_uid}"


@dataclass(frozen=True, slots=True)
class PageEdit:
    """How the classes that the project offered differed from the schema, where somebody edited them in its page."""

    added: tuple[str, ...]
    removed: tuple[str, ...]

    def sentence(self, version: int) -> str:
        """What that means, and both ways out. `version` is the present `schema.version`."""
        said = []
        if self.added:
            named = ", ".join(map(repr, self.added))
            said.append(
                f"the project in Label Studio differs from params.yaml: it offers {named}, which somebody added in its "
                f"page. Answers with that class are kept aside. To count them, add it to schema.labels in params.yaml "
                f"and set schema.version to {version + 1}; to take it out of the page, `al labelstudio reset`"
            )
        if self.removed:
            named = ", ".join(map(repr, self.removed))
            said.append(
                f"the project in Label Studio lacked {named}, which somebody removed or renamed in its page, and "
                "params.yaml has it: it was put back. Classes are changed in params.yaml, with a raised schema.version"
            )
        return "; ".join(said)


def ignore(_: object) -> None:
    """Nobody is told."""


def page_edit(offered: Collection[str], schema: Schema, published: Collection[str]) -> PageEdit | None:
    """What somebody changed in the project's page, which offers `offered`; None where nobody did."""
    added = tuple(sorted(set(offered) - set(schema.labels) - set(published)))
    removed = tuple(name for name in schema.labels if name in published and name not in offered)
    return PageEdit(added, removed) if added or removed else None


@runtime_checkable
class Oracle(Protocol):
    """What the pipeline asks of Label Studio. Every call may raise LabelStudioDown or LabelStudioRefused."""

    def ensure_project(
        self,
        workspace_id: str,
        clone_id: str,
        schema: Schema,
        overlap: int,
        show_guess: bool,
        known: ProjectRef | None,
        published: Collection[str] = (),
        on_page_edit: Callable[[PageEdit], None] = ignore,
        title: str | None = None,
    ) -> ProjectRef:
        """Find our project (by `known`, else by its mark) or create it, and bring its settings in line.

        `title` is what people find it by (see `project_title`; default: the id alone). One that people gave it stays.

        `published` are the classes that any published schema had. Others that the project offers and the schema lacks
        somebody added in Label Studio's page: they stay there, since answers may name them, and `on_page_edit` is told;
        so it is where the page lacks a published class of the schema, which is put back. Raises WrongProject where
        `known` is missing, is another's or belongs to another clone.
        """
        ...

    def check(self, ref: ProjectRef, workspace_id: str, clone_id: str | None = None) -> None:
        """Raise WrongProject unless `ref` is ours; with `clone_id` also where another clone may write to it."""
        ...

    def adopt(self, ref: ProjectRef, workspace_id: str, clone_id: str) -> None:
        """Make this clone the one that writes to the project. Raises WrongProject where it is another's."""
        ...

    def task_states(self, ref: ProjectRef, round: int | None = None) -> Iterator[TaskState]:
        """Every task (of one round), by rising id, duplicates and foreign tasks too."""
        ...

    def open_tasks(self, ref: ProjectRef) -> Iterator[TaskState]:
        """Every task that people may still be served, by rising id, duplicates and foreign tasks too."""
        ...

    def import_tasks(self, ref: ProjectRef, tasks: Sequence[Task]) -> None:
        """Add tasks in this order, in one request that is never repeated. An error says nothing of what was added."""
        ...

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        """Tasks touched at or after `since` (all, if None) with their annotations, skips included, by rising id."""
        ...

    def answered_by_key(self, ref: ProjectRef, push_keys: Collection[str]) -> Iterator[AnsweredTask]:
        """The same for every task that carries one of `push_keys`: a second look before an answer is voided."""
        ...

    def retire(self, ref: ProjectRef, task_ids: Sequence[int]) -> None:
        """Take tasks out of the queue; answers stay possible. A task that is gone is passed over."""
        ...

    def close(self) -> None:
        """Give back what the connection holds."""
        ...


def project_title(name: str, question: str, workspace_id: str) -> str:
    """What the project of a workspace is called: its name and question, and the beginning of its id, never cut.

    We find it by its mark; the title is for people.
    """
    end = f" ({workspace_id[:SHORT_ID]})"
    name, question = shortened(one_line(name), _LONGEST_NAME), one_line(question)
    return shortened(": ".join(filter(None, (name, question))), _LONGEST_TITLE - len(end)) + end


def is_our_title(title: str | None, workspace_id: str) -> bool:
    """Whether a title is one that this or an earlier version gave, and no person's."""
    return title == f"al {workspace_id}" or (title or "").endswith(f"({workspace_id[:SHORT_ID]})")


def data_key(name: str) -> str:
    """Key of a task's data under which a field of this name is sent.

    Label Studio reads `$key` in its config as a path, so that only letters, digits and underscores are safe.
    """
    if _PLAIN_KEY.match(name) and name not in RESERVED:
        return name
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_") or "field"
    return f"shown_{plain}_{sha256_bytes(name.encode('utf-8', 'surrogatepass'))[:6]}"


def shown_hash(shown: Mapping[str, Any]) -> str:
    """What annotators were shown, as a SHA-256 (hex) of the canonical JSON of the fields."""
    text = json.dumps(dict(shown), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return sha256_bytes(text.encode("ascii"))


def shown_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a task's data that annotators see."""
    return {key: value for key, value in data.items() if key not in RESERVED}


def choice_result(label: str, to_name: str = "text") -> list[dict[str, Any]]:
    """An answer (or a guess) as Label Studio writes it."""
    return [{"from_name": CONTROL, "to_name": to_name, "type": "choices", "value": {"choices": [label]}}]


def task_json(task: Task) -> dict[str, Any]:
    """A task exactly as it is sent. Raises BadInput where a key or score could not come back as it went."""
    plan = task.plan
    if plan.push_key != shown_text(plan.push_key) or not math.isfinite(plan.score):
        raise BadInput(
            f"item {plan.item_id!r}: its id holds control characters, or its score {plan.score} is no number"
        )
    shown = {data_key(name): shown_text(text) for name, text in task.fields.items()}
    data: dict[str, Any] = {
        **shown,
        "item_id": plan.item_id,
        "al_round": plan.first_round,
        "al_part": plan.part,
        "al_rank": plan.rank,
        "al_score": plan.score,
        "push_key": plan.push_key,
        "shown_hash": shown_hash(shown),
    }
    if task.guess is None:
        return {"data": data}
    label, probability = task.guess
    guess = {
        "model_version": f"round-{plan.round:04d}",
        "score": probability,
        "result": choice_result(label, to_name=next(iter(shown))),
    }
    return {"data": {**data, "al_prelabel": True}, "predictions": [guess]}


def find_mark(description: str | None) -> ProjectMark | None:
    """Whose a project is, by its description; None where it does not say."""
    found = _MARK.search(description or "")
    return ProjectMark(found[1], found[2], found[3]) if found else None


def with_mark(description: str | None, mark: ProjectMark) -> str:
    """The description with `mark` in it; whatever else people wrote there stays."""
    if find_mark(description):
        return _MARK.sub(lambda _: str(mark), description or "", count=1)
    return f"{description}\n{mark}" if description else str(mark)


def check_mark(mark: ProjectMark | None, ref: ProjectRef, workspace_id: str, clone_id: str | None) -> None:
    """Raise WrongProject unless `mark` says that the project is `ref`, ours and (with `clone_id`) this clone's."""
    if mark is None or mark.workspace_id != workspace_id or mark.project_uid != ref.project_uid:
        whose = "nobody we know" if mark is None else f"workspace {mark.workspace_id} (project {mark.project_uid})"
        raise WrongProject(
            f"project {ref.project_id} in Label Studio belongs to {whose}, not to workspace {workspace_id} "
            f"(project {ref.project_uid}); is the address that of the right server? `al doctor` shows it"
        )
    if clone_id is not None and mark.clone_id != clone_id:
        raise WrongProject(
            f"project {ref.project_id} in Label Studio is written to by another clone of this workspace "
            f"({mark.clone_id}, this is {clone_id}); `al adopt` makes this clone the one that writes"
        )


def missing_project(ref: ProjectRef) -> WrongProject:
    """The error for a project that is not on its server."""
    return WrongProject(
        f"Label Studio has no project {ref.project_id} that we may see (project {ref.project_uid}): deleted, "
        "or another server; nothing was changed. `al doctor` shows the address in use. If it is gone for good, "
        "`al adopt --new-project`: what was pulled stays, and what is open is asked again in a new one"
    )


def several_projects(workspace_id: str, project_ids: Collection[int]) -> WrongProject:
    """The error for more than one project that carries our mark."""
    numbers = ", ".join(str(number) for number in sorted(project_ids))
    return WrongProject(
        f"projects {numbers} in Label Studio all say that they belong to workspace {workspace_id}; "
        "take the line `al-workspace:` out of the description of all but one"
    )


# The twin ----------------------------------------------------------------------------------------------------------

Moment = Literal["before", "after"]
"""A fault strikes before the server has done anything, or after it has done everything (its reply is lost)."""


@dataclass(slots=True)
class _HeldTask:
    task_id: int
    data: dict[str, Any]
    predictions: list[dict[str, Any]]
    created_at: str
    updated_at: str
    annotations: dict[int, Annotation] = field(default_factory=dict)
    retired: bool = False


@dataclass(slots=True)
class _HeldProject:
    title: str
    description: str
    labels: list[str]
    overlap: int
    show_guess: bool
    tasks: dict[int, _HeldTask] = field(default_factory=dict)


class SimulatedOracle:
    """Label Studio in memory, for tests and rehearsals, with its traps.

    A repeated import makes duplicates; the highest task id is handed out again after a deletion; an edit overwrites;
    a deletion leaves no trace; any result is stored; another overlap opens retired tasks again. `fault(call, moment)`,
    where set, is called around each call of the interface and may raise. The other public methods are what annotators
    (and vandals) do.
    """

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self.fault: Callable[[str, Moment], None] | None = None
        self.projects: dict[int, _HeldProject] = {}
        self._now = start
        self._last_annotation = 0

    # The interface -------------------------------------------------------------------------------------------------

    def ensure_project(
        self,
        workspace_id: str,
        clone_id: str,
        schema: Schema,
        overlap: int,
        show_guess: bool,
        known: ProjectRef | None,
        published: Collection[str] = (),
        on_page_edit: Callable[[PageEdit], None] = ignore,
        title: str | None = None,
    ) -> ProjectRef:
        """Find or create our project; see Oracle."""
        self._strike("ensure_project", "before")
        ref = known or self._find(workspace_id)
        if ref is None:
            ref = ProjectRef(1 + max(self.projects, default=0), uuid.uuid4().hex[:12])
            mark = ProjectMark(workspace_id, clone_id, ref.project_uid)
            named = title or f"al {workspace_id}"
            self.projects[ref.project_id] = _HeldProject(named, str(mark), list(schema.labels), overlap, show_guess)
        else:
            project = self._project(ref, workspace_id, clone_id)
            edit = page_edit(project.labels, schema, published)
            if edit is not None:
                on_page_edit(edit)
            if overlap != project.overlap:  # opens retired tasks again
                for task in project.tasks.values():
                    task.retired = False
            project.labels = [*schema.labels, *(edit.added if edit else ())]
            project.overlap, project.show_guess = overlap, show_guess
            if title is not None and is_our_title(project.title, workspace_id):
                project.title = title
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

    def task_states(self, ref: ProjectRef, round: int | None = None) -> Iterator[TaskState]:
        """Every task (of one round); see Oracle."""
        self._strike("task_states", "before")
        project = self._held(ref)
        for task in sorted(project.tasks.values(), key=lambda task: task.task_id):
            if round is None or task.data.get("al_round") == round:
                yield self._state(project, task)

    def open_tasks(self, ref: ProjectRef) -> Iterator[TaskState]:
        """Every task that people may still be served; see Oracle."""
        self._strike("open_tasks", "before")
        project = self._held(ref)
        for task in sorted(project.tasks.values(), key=lambda task: task.task_id):
            state = self._state(project, task)
            if not state.is_labeled:
                yield state

    def import_tasks(self, ref: ProjectRef, tasks: Sequence[Task]) -> None:
        """Add tasks, twice if asked twice; see Oracle."""
        self._strike("import_tasks", "before")
        project, now = self._held(ref), self._tick()
        for sent in [json.loads(json.dumps(task_json(task), allow_nan=False)) for task in tasks]:
            task_id = 1 + max(project.tasks, default=0)
            project.tasks[task_id] = _HeldTask(task_id, sent["data"], sent.get("predictions", []), now, now)
        self._strike("import_tasks", "after")

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        """Tasks touched since then; see Oracle."""
        self._strike("answered", "before")
        for task in sorted(self._held(ref).tasks.values(), key=lambda task: task.task_id):
            if since is None or task.updated_at >= since:
                yield _answered(task)

    def answered_by_key(self, ref: ProjectRef, push_keys: Collection[str]) -> Iterator[AnsweredTask]:
        """Tasks with these keys; see Oracle."""
        self._strike("answered_by_key", "before")
        for task in sorted(self._held(ref).tasks.values(), key=lambda task: task.task_id):
            if task.data.get("push_key") in push_keys:
                yield _answered(task)

    def retire(self, ref: ProjectRef, task_ids: Sequence[int]) -> None:
        """Take tasks out of the queue; see Oracle."""
        self._strike("retire", "before")
        held = self._held(ref).tasks
        for task_id in task_ids:
            if task_id in held:
                held[task_id].retired, held[task_id].updated_at = True, self._tick()
        self._strike("retire", "after")

    def close(self) -> None:
        """Nothing to give back."""

    # What annotators do --------------------------------------------------------------------------------------------

    def queue(self, annotator: str, project_id: int = 1) -> list[str]:
        """Push keys that this annotator would be served, in order."""
        project = self.projects[project_id]
        return [
            str(task.data.get("push_key"))
            for task in sorted(project.tasks.values(), key=lambda task: task.task_id)
            if not self._state(project, task).is_labeled
            and all(annotation.annotator != annotator for annotation in task.annotations.values())
        ]

    def answer(self, push_key: str, annotator: str, label: str | Any, project_id: int = 1) -> int:
        """Answer the (first) task with this key by a label, or by any raw result; the annotation's id."""
        return self._annotate(self._find_task(push_key, project_id), annotator, label, cancelled=False)

    def skip(self, push_key: str, annotator: str, project_id: int = 1) -> int:
        """Skip the (first) task with this key; the annotation's id."""
        return self._annotate(self._find_task(push_key, project_id), annotator, [], cancelled=True)

    def edit(self, annotation_id: int, label: str | Any, cancelled: bool = False, project_id: int = 1) -> None:
        """Overwrite an annotation, without a trace of what it said."""
        task = self._task_of(annotation_id, project_id)
        old, now = task.annotations[annotation_id], self._tick()
        task.annotations[annotation_id] = replace(old, result=_raw(label), was_cancelled=cancelled, updated_at=now)
        task.updated_at = now

    def delete_annotation(self, annotation_id: int, project_id: int = 1) -> Annotation:
        """Delete an annotation; what it was."""
        task = self._task_of(annotation_id, project_id)
        task.updated_at = self._tick()
        return task.annotations.pop(annotation_id)

    def restore_annotation(self, push_key: str, annotation: Annotation, project_id: int = 1) -> None:
        """Put a deleted annotation back exactly as it was, as a restored database would."""
        task = self._find_task(push_key, project_id)
        task.annotations[annotation.annotation_id], task.updated_at = annotation, self._tick()

    def delete_task(self, push_key: str, project_id: int = 1) -> None:
        """Delete the (first) task with this key, answers and all."""
        del self.projects[project_id].tasks[self._find_task(push_key, project_id).task_id]

    def backup(self) -> SimulatedOracle:
        """What a backup of the server holds now."""
        return copy.deepcopy(self)

    def restore_backup(self, saved: SimulatedOracle) -> None:
        """Bring the server back to what a backup holds: numbers given since then are given again. The clock goes on."""
        held = copy.deepcopy(saved)
        self.projects, self._last_annotation = held.projects, held._last_annotation

    def edit_data(self, push_key: str, project_id: int = 1, **changes: Any) -> None:
        """Change the data of the (first) task with this key."""
        task = self._find_task(push_key, project_id)
        task.data, task.updated_at = {**task.data, **changes}, self._tick()

    def pass_time(self, seconds: float) -> str:
        """Let the server's clock go on (each write moves it by one second); what it says then."""
        self._now += timedelta(seconds=seconds)
        return self._now.strftime(TIME_FORMAT)

    # -----------------------------------------------------------------------------------------------------------------

    def _strike(self, call: str, moment: Moment) -> None:
        if self.fault is not None:
            self.fault(call, moment)

    def _tick(self) -> str:
        return self.pass_time(1)

    def _held(self, ref: ProjectRef) -> _HeldProject:
        if ref.project_id not in self.projects:
            raise missing_project(ref)
        return self.projects[ref.project_id]

    def _project(self, ref: ProjectRef, workspace_id: str, clone_id: str | None) -> _HeldProject:
        project = self._held(ref)
        check_mark(find_mark(project.description), ref, workspace_id, clone_id)
        return project

    def _find(self, workspace_id: str) -> ProjectRef | None:
        marks = {number: find_mark(project.description) for number, project in self.projects.items()}
        ours = {number: mark for number, mark in marks.items() if mark and mark.workspace_id == workspace_id}
        if len(ours) > 1:
            raise several_projects(workspace_id, ours)
        return next((ProjectRef(number, mark.project_uid) for number, mark in ours.items()), None)

    def _state(self, project: _HeldProject, task: _HeldTask) -> TaskState:
        people = {annotation.annotator for annotation in _live(task)}
        return task_state(
            task.task_id,
            task.data,
            is_labeled=task.retired or len(people) >= project.overlap,
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
        now = self._tick()
        task.annotations[self._last_annotation] = Annotation(
            self._last_annotation, annotator, _raw(label), cancelled, now, now, lead_time=1.0
        )
        task.updated_at = now
        return self._last_annotation


def task_state(
    task_id: int, data: Mapping[str, Any], *, is_labeled: bool, annotations: int, cancelled: int
) -> TaskState:
    """A task's state from its data, which anybody may have edited: what is not of our form counts as absent."""
    key, number, part = data.get("push_key"), data.get("al_round"), data.get("al_part")
    return TaskState(
        task_id=task_id,
        push_key=key if isinstance(key, str) else None,
        round=number if type(number) is int else None,
        part=_part(part),
        is_labeled=is_labeled,
        annotations=annotations,
        cancelled=cancelled,
    )


def _part(value: Any) -> Part | None:
    if value == "pool":
        return "pool"
    return "test" if value == "test" else None


def _live(task: _HeldTask) -> list[Annotation]:
    return [annotation for annotation in task.annotations.values() if not annotation.was_cancelled]


def _raw(label: str | Any) -> tuple[Any, ...]:
    return raw_result(choice_result(label) if isinstance(label, str) else label)


def raw_result(value: Any) -> tuple[Any, ...]:
    """A result as the server holds it, which should be a list but may be anything."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else ({"malformed": value},)


def _answered(task: _HeldTask) -> AnsweredTask:
    key = task.data.get("push_key")
    return AnsweredTask(
        task_id=task.task_id,
        push_key=key if isinstance(key, str) else None,
        updated_at=task.updated_at,
        data=dict(task.data),
        annotations=tuple(task.annotations.values()),
        created_at=task.created_at,
    )
