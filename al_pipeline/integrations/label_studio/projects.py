"""Ownership and title of a Label Studio project, and edits made in its page.

A mark in its description names the workspace and clone that it belongs to; any other text there is kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from msgspec import Struct

from al_pipeline.errors import WrongProject
from al_pipeline.integrations.oracle import PageEdit, ProjectRef
from al_pipeline.params import Schema
from al_pipeline.sanitize import one_line, shortened

SHORT_ID = 6
"""The number of characters of a workspace's id at the end of names shown to people."""

_LONGEST_TITLE = 50
"""Label Studio's limit."""

_LONGEST_NAME = 24

_MARK = re.compile(r"al-workspace:(\S+) clone:(\S+) project:(\S+)")


class ProjectMark(Struct, frozen=True):
    """The owner of a project, as its description names it."""

    workspace_id: str
    clone_id: str
    project_uid: str

    def __str__(self) -> str:
        return f"al-workspace:{self.workspace_id} clone:{self.clone_id} project:{self.project_uid}"


def find_mark(description: str | None) -> ProjectMark | None:
    """The mark in a project's description; None if it has none."""
    found = _MARK.search(description or "")
    return ProjectMark(found[1], found[2], found[3]) if found else None


def with_mark(description: str | None, mark: ProjectMark) -> str:
    """The description with `mark` added or replaced; any other text is kept."""
    if find_mark(description):
        return _MARK.sub(lambda _: str(mark), description or "", count=1)
    return f"{description}\n{mark}" if description else str(mark)


def check_mark(mark: ProjectMark | None, ref: ProjectRef, workspace_id: str, clone_id: str | None) -> None:
    """Raise WrongProject unless `mark` is that of project `ref`, this workspace and (with `clone_id`) this clone."""
    if mark is None or mark.workspace_id != workspace_id or mark.project_uid != ref.project_uid:
        whose = "nobody we know" if mark is None else f"workspace {mark.workspace_id} (project {mark.project_uid})"
        raise WrongProject(
            f"project {ref.project_id} in Label Studio belongs to {whose}, not to workspace {workspace_id} (project "
            f"{ref.project_uid}); is that the address of the right server? `al doctor` shows it"
        )
    if clone_id is not None and mark.clone_id != clone_id:
        raise WrongProject(
            f"another clone of this workspace ({mark.clone_id}, this is {clone_id}) writes to project "
            f"{ref.project_id} in Label Studio; `al adopt` makes this clone the one that writes"
        )


def missing_project(ref: ProjectRef) -> WrongProject:
    """The error for a project that its server does not have, or does not show us."""
    return WrongProject(
        f"Label Studio has no project {ref.project_id} that we may see (project {ref.project_uid}): it was deleted, "
        "or this is another server; nothing was changed. `al doctor` shows the address in use. If the project is gone "
        "for good, run `al adopt --new-project`: pulled answers are kept, and open items are asked again in a new "
        "project"
    )


def find_project(descriptions: Iterable[tuple[int, str | None]], workspace_id: str) -> ProjectRef | None:
    """The project whose mark names this workspace, or None: finds one whose creation was not recorded.

    `descriptions`: number and description of all projects. Raises WrongProject if several name this workspace.
    """
    found: dict[int, str] = {}
    for number, description in descriptions:
        mark = find_mark(description)
        if mark is not None and mark.workspace_id == workspace_id:
            found[number] = mark.project_uid
    if len(found) > 1:
        numbers = ", ".join(str(number) for number in sorted(found))
        raise WrongProject(
            f"projects {numbers} in Label Studio all claim to belong to workspace {workspace_id}; remove the line "
            "`al-workspace:` from the description of all but one"
        )
    return next((ProjectRef(number, uid) for number, uid in found.items()), None)


def project_title(name: str, question: str, workspace_id: str) -> str:
    """The title of a workspace's project: name and question, shortened, and the beginning of the workspace's id.

    The title is for people; the pipeline finds the project by its mark.
    """
    end = f" ({workspace_id[:SHORT_ID]})"
    name, question = shortened(one_line(name), _LONGEST_NAME), one_line(question)
    return shortened(": ".join(filter(None, (name, question))), _LONGEST_TITLE - len(end)) + end


def is_our_title(title: str | None, workspace_id: str) -> bool:
    """Whether a title was given by this or an earlier version, not by a person."""
    return title == f"al {workspace_id}" or (title or "").endswith(f"({workspace_id[:SHORT_ID]})")


def page_edit(offered: Collection[str], schema: Schema, published: Collection[str]) -> PageEdit | None:
    """How the classes `offered` in the project's page differ from the schema; None if nobody edited them."""
    added = tuple(sorted(set(offered) - set(schema.labels) - set(published)))
    removed = tuple(name for name in schema.labels if name in published and name not in offered)
    return PageEdit(added, removed) if added or removed else None
