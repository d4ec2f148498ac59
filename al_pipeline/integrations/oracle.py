"""What the pipeline asks of whoever answers, as an interface.

`integrations/label_studio` implements it with Label Studio, `integrations/simulated_oracle` in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from al_pipeline.params import Schema
from al_pipeline.records import AnsweredTask, Task, TaskState


@dataclass(frozen=True, slots=True)
class ProjectRef:
    """Which project is ours: its number on its server, and the id that we wrote into it."""

    project_id: int
    project_uid: str


@dataclass(frozen=True, slots=True)
class ProjectSpec:
    """What a workspace wants of its project."""

    workspace_id: str
    clone_id: str
    """The clone that writes to it."""
    schema: Schema
    overlap: int = 1
    """How many people are to answer each task."""
    show_guess: bool = False
    """Whether annotators see what the model expects."""
    published: Collection[str] = ()
    """The classes that any published schema had."""
    title: str | None = None
    """What people find it by (see `project_title`; default: the id alone). One that people gave it stays."""


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


@runtime_checkable
class Oracle(Protocol):
    """What the pipeline asks of Label Studio. Every call may raise LabelStudioDown or LabelStudioRefused."""

    def ensure_project(
        self, spec: ProjectSpec, known: ProjectRef | None = None, on_page_edit: Callable[[PageEdit], None] = ignore
    ) -> ProjectRef:
        """Find our project (by `known`, else by its mark) or create it, and bring its settings in line with `spec`.

        A class that the project offers, and neither the schema nor any published one has, somebody added in Label
        Studio's page: it stays there, since answers may name it, and `on_page_edit` is called; so it is where the page
        lacks a published class of the schema, which is put back. Raises WrongProject where `known` is missing, is
        another's or belongs to another clone.
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
