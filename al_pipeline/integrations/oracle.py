"""The interface to the oracle: what the pipeline needs from whatever answers its queries.

`integrations/label_studio` implements it with Label Studio, `integrations/simulated_oracle` in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from msgspec import Struct

from al_pipeline.params import Schema
from al_pipeline.records import AnsweredTask, Task, TaskState, TaskTotals, TaskVersion


class ProjectRef(Struct, frozen=True):
    """Identifies our project: its number on the server, and the id that we wrote into it."""

    project_id: int
    project_uid: str


class ProjectSpec(Struct, frozen=True):
    """The settings that a workspace requires of its project."""

    workspace_id: str
    clone_id: str
    """The clone that writes to the project."""
    schema: Schema
    overlap: int = 1
    """The number of people who are to answer each task."""
    show_guess: bool = False
    """Whether annotators see the model's prediction."""
    published: Collection[str] = ()
    """All classes of the published schemas."""
    review: bool = False
    """Whether it is the project of reviews, whose tasks show the answers of others and take a comment."""
    title: str | None = None
    """The title shown to people (see `project_title`; default: the id alone). A title set by people is kept."""


class PageEdit(Struct, frozen=True):
    """How the project's classes differed from the schema because somebody edited them in Label Studio's page."""

    added: tuple[str, ...]
    removed: tuple[str, ...]

    def sentence(self, version: int) -> str:
        """Describe the edit and both ways to resolve it. `version` is the present `schema.version`."""
        said = []
        if self.added:
            named = ", ".join(map(repr, self.added))
            said.append(
                f"the project in Label Studio differs from params.yaml: it offers {named}, which somebody added in "
                "Label Studio. Answers with that class are stored but do not count. To count them, add it to "
                f"schema.labels in params.yaml and set schema.version to {version + 1}; to remove it from the "
                "project, run `al labelstudio reset`"
            )
        if self.removed:
            named = ", ".join(map(repr, self.removed))
            said.append(
                f"the project in Label Studio lacked {named}, which somebody removed or renamed in Label Studio "
                "although it is in params.yaml; it was restored. Change classes in params.yaml, with a higher "
                "schema.version"
            )
        return "; ".join(said)


def ignore(_: object) -> None:
    """Do nothing: the default callback."""


@runtime_checkable
class Oracle(Protocol):
    """The operations that the pipeline needs. Every call may raise LabelStudioDown or LabelStudioRefused."""

    def ensure_project(
        self, spec: ProjectSpec, known: ProjectRef | None = None, on_page_edit: Callable[[PageEdit], None] = ignore
    ) -> ProjectRef:
        """Find our project (by `known`, else by its mark) or create it, and update its settings to match `spec`.

        A class of the project that neither the schema nor a published one has was added in Label Studio's page. It is
        kept, since answers may name it. A published class of the schema that the project lacks is put back. In both
        cases `on_page_edit` is called. Raises WrongProject if `known` is missing, or belongs to another workspace or
        clone.
        """
        ...

    def check(self, ref: ProjectRef, workspace_id: str, clone_id: str | None = None) -> None:
        """Raise WrongProject unless `ref` is ours; with `clone_id` also if another clone is its writer."""
        ...

    def adopt(self, ref: ProjectRef, workspace_id: str, clone_id: str) -> None:
        """Make this clone the project's writer. Raises WrongProject if it belongs to another workspace."""
        ...

    def task_states(self, ref: ProjectRef, round: int | None = None, first: int = 0) -> Iterator[TaskState]:
        """Yield all tasks (of one round) by increasing id, including duplicates and foreign tasks.

        `first`: the lowest id; without it the server searches the data of all tasks for the round.
        """
        ...

    def open_tasks(self, ref: ProjectRef) -> Iterator[TaskState]:
        """Yield all tasks still in the queue by increasing id, including duplicates and foreign tasks."""
        ...

    def import_tasks(self, ref: ProjectRef, tasks: Sequence[Task]) -> None:
        """Add tasks in this order, in one request that is never retried. After an error, some may have been added."""
        ...

    def changed(self, ref: ProjectRef, since: str) -> Mapping[int, TaskVersion]:
        """The versions of the tasks changed at or after `since`, by id: much cheaper than `answered`."""
        ...

    def answered(self, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        """Yield tasks changed at or after `since` (None: all), with annotations including skips, by increasing id."""
        ...

    def answered_after(self, ref: ProjectRef, task_id: int, before: str, limit: int) -> Iterator[AnsweredTask]:
        """Like `answered`, for the first `limit` tasks after id `task_id` that were last changed before `before`."""
        ...

    def answered_by_key(self, ref: ProjectRef, push_keys: Collection[str]) -> Iterator[AnsweredTask]:
        """Like `answered`, for all tasks with one of `push_keys`: a second check before an answer is voided."""
        ...

    def totals(self, ref: ProjectRef, before: str) -> TaskTotals:
        """The totals of the tasks that were last changed before `before`."""
        ...

    def accounts(self) -> Mapping[int, str]:
        """The name of every account, by id, as `Annotation.annotator` has it."""
        ...

    def ask_more(self, ref: ProjectRef, answers: Mapping[int, int]) -> None:
        """Put tasks back into the queue until each has this number of answers, by task id; none for one person twice.

        Missing tasks are ignored. The project's own overlap, for all other tasks, stays.
        """
        ...

    def serve_newest(self, ref: ProjectRef, newest: bool) -> None:
        """Have the tasks with a `Task.place` served by falling place, before all others, or all in order of their ids.

        With `newest` there must be such a task. An order that people set in Label Studio's page is replaced by the
        former alone.
        """
        ...

    def retire(self, ref: ProjectRef, task_ids: Sequence[int]) -> None:
        """Take tasks out of the queue; they can still be answered. Missing tasks are ignored."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...
