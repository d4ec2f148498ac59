"""Whose a project of Label Studio is, what it is called, and what somebody changed in its page.

Its description says which workspace and clone it belongs to; whatever else people wrote there stays.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from al_pipeline.errors import WrongProject
from al_pipeline.integrations.oracle import PageEdit, ProjectRef
from al_pipeline.params import Schema
from al_pipeline.sanitize import one_line, shortened

SHORT_ID = 6
"""Characters of a workspace's id that names for people end with."""

_LONGEST_TITLE = 50
"""What Label Studio takes."""

_LONGEST_NAME = 24

_MARK = re.compile(r"al-workspace:(\S+) clone:(\S+) project:(\S+)")


@dataclass(frozen=True, slots=True)
class ProjectMark:
    """What a project's description says of whose it is."""

    workspace_id: str
    clone_id: str
    project_uid: str

    def __str__(self) -> str:
        return f"al-workspace:{self.workspace_id} clone:{self.clone_id} project:{self.project_uid}"


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


def find_project(descriptions: Iterable[tuple[int, str | None]], workspace_id: str) -> ProjectRef | None:
    """The project whose description says that it is ours: the trace of a creation whose reply, or record, was lost.

    `descriptions`: of all projects, by number. Raises WrongProject where several say so.
    """
    found: dict[int, str] = {}
    for number, description in descriptions:
        mark = find_mark(description)
        if mark is not None and mark.workspace_id == workspace_id:
            found[number] = mark.project_uid
    if len(found) > 1:
        numbers = ", ".join(str(number) for number in sorted(found))
        raise WrongProject(
            f"projects {numbers} in Label Studio all say that they belong to workspace {workspace_id}; "
            "take the line `al-workspace:` out of the description of all but one"
        )
    return next((ProjectRef(number, uid) for number, uid in found.items()), None)


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


def page_edit(offered: Collection[str], schema: Schema, published: Collection[str]) -> PageEdit | None:
    """What somebody changed in the project's page, which offers `offered`; None where nobody did."""
    added = tuple(sorted(set(offered) - set(schema.labels) - set(published)))
    removed = tuple(name for name in schema.labels if name in published and name not in offered)
    return PageEdit(added, removed) if added or removed else None
