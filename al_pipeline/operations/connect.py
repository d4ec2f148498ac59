"""The workspace's Label Studio server and project."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from al_pipeline.errors import (
    LabelStudioDown,
    LabelStudioRefused,
    ManualActionRequired,
    NothingToDo,
    UnexpectedChange,
    WrongProject,
)
from al_pipeline.files import read_object, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.projects import ProjectMark, project_title
from al_pipeline.integrations.oracle import Oracle, PageEdit, ProjectRef, ProjectSpec
from al_pipeline.operations.checkout import ROUND_TAGS, check_ready
from al_pipeline.operations.close import check_sources, is_closed, pull_missing_sources
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.records import review_workspace
from al_pipeline.sanitize import counted, is_web_address
from al_pipeline.workspace.identity import begin_adoption, check_identity, clone_id, end_adoption, identify
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.integrations.label_studio.client import About, LabelStudioOracle


_LOOK_SECONDS = 5.0
"""Timeout of the requests that check which clone writes to the project."""


def stored_project(layout: Layout) -> ProjectRef | None:
    """The recorded Label Studio project; None before there is one. Raises UnexpectedChange if the file is invalid."""
    return _stored(layout.project)


def stored_review_project(layout: Layout) -> ProjectRef | None:
    """The recorded project of reviews; like `stored_project`."""
    return _stored(layout.review_project)


def _stored(path: Path) -> ProjectRef | None:
    found = read_object(path)
    if not found:
        return None
    number, uid = found.get("project_id"), found.get("project_uid")
    if type(number) is not int or not isinstance(uid, str) or not uid.isprintable() or " " in uid:
        raise UnexpectedChange(f"{path} does not name a project; `git log -p {path}` shows who changed it")
    return ProjectRef(number, uid)


def project_page(workspace: Workspace) -> str | None:
    """The URL where annotators start, with the button "Label All Tasks"; None if there is no project or URL yet.

    Never a URL with `labeling=1`: opened directly, it serves tasks from a queue without locks, so that two people get
    the same task.
    """
    return _page(workspace, stored_project(workspace.layout))


def review_page(workspace: Workspace) -> str | None:
    """The same for reviewers, in the project of reviews."""
    return _page(workspace, stored_review_project(workspace.layout))


def _page(workspace: Workspace, project: ProjectRef | None) -> str | None:
    url = workspace.credentials().get("url")
    return None if project is None or url is None else f"{url.rstrip('/')}/projects/{project.project_id}/data"


def task_pages(workspace: Workspace, last: int) -> dict[str, str]:
    """The Label Studio URL of each item asked in the rounds up to `last`, as far as this clone pushed them.

    Empty if there is no project, or if the server's address is unsafe to open in a browser.
    """
    project, url = stored_project(workspace.layout), workspace.credentials().get("url", "")
    if project is None or not is_web_address(url):
        return {}
    numbers: dict[str, int] = {}
    for number in range(last + 1):
        tasks = read_object(workspace.layout.state(number)).get("tasks")
        if isinstance(tasks, dict) and tasks.get("project_uid") == project.project_uid:
            known = tasks.get("numbers")
            numbers |= known if isinstance(known, dict) else {}
    page = f"{url.rstrip('/')}/projects/{project.project_id}/data?task="
    return {item: f"{page}{number}" for item, number in numbers.items() if type(number) is int}


def connect_to(workspace: Workspace, url: str, token: str) -> About:
    """Store `url` and `token` once the Label Studio there has answered; environment variables are ignored.

    Raises LabelStudioRefused if the address or token is rejected, LabelStudioDown if the server does not answer.
    """
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

    with LabelStudioOracle(url, token, workspace.params.label_studio.timeout_seconds) as oracle:
        about = oracle.about()
        workspace.store_credentials(oracle.url, token)
    return about


def connect(workspace: Workspace, most_seconds: float = math.inf, accounts_seconds: float = 0.0) -> LabelStudioOracle:
    """A client for the workspace's Label Studio; sends nothing yet. Raises LabelStudioRefused if none is configured.

    Its timeout is that of `params.yaml`, but at most `most_seconds`. `accounts_seconds`: see the client.
    """
    known = workspace.credentials()
    if missing := [name for name in ("url", "token") if name not in known]:
        variables = " and ".join(f"AL_LABEL_STUDIO_{name.upper()}" for name in missing)
        raise LabelStudioRefused(
            f"the {' and '.join(missing)} of Label Studio {'is' if len(missing) == 1 else 'are'} not known here; `al "
            f"labelstudio start` runs one, `al labelstudio connect URL` uses yours, or set {variables}"
        )
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

    seconds = min(workspace.params.label_studio.timeout_seconds, most_seconds)
    return LabelStudioOracle(known["url"], known["token"], seconds, accounts_seconds=accounts_seconds)


def refuse_elsewhere(workspace: Workspace) -> None:
    """Raise WrongProject if ticks run in another clone: an intervention made here would not reach them.

    Raises nothing if Label Studio is unconfigured or unreachable or the project is not ours: a rollback must not
    depend on it.
    """
    from al_pipeline.integrations.label_studio.probe import is_writer

    ref, known = stored_project(workspace.layout), workspace.credentials()
    if ref is None:
        return
    ours = ProjectMark(workspace.id, workspace.clone_id, ref.project_uid)
    if {"url", "token"} <= known.keys() and is_writer(
        known["url"], known["token"], ref.project_id, ours, _LOOK_SECONDS
    ):
        return
    with contextlib.suppress(LabelStudioDown, LabelStudioRefused), closing(connect(workspace, _LOOK_SECONDS)) as oracle:
        try:
            oracle.check(ref, workspace.id)
        except WrongProject:
            return
        oracle.check(ref, workspace.id, workspace.clone_id)


def ensure_project(
    workspace: Workspace,
    oracle: Oracle,
    known: ProjectRef | None,
    published: Collection[str],
    on_page_edit: Callable[[PageEdit], None],
) -> ProjectRef:
    """Find or create the workspace's project and apply the settings of `params.yaml` to it; see Oracle."""
    params = workspace.params
    spec = ProjectSpec(
        workspace_id=workspace.id,
        clone_id=workspace.clone_id,
        schema=params.schema_,
        overlap=params.round.overlap,
        show_guess=params.label_studio.show_guess,
        published=published,
        title=project_title(workspace.layout.root.name, params.schema_.question, workspace.id),
    )
    return oracle.ensure_project(spec, known, on_page_edit)


def reset_page(workspace: Workspace) -> tuple[str, ...]:
    """Remove the classes that somebody added on the project's page, and return them.

    Raises NothingToDo if there is no project, WrongProject.
    """
    with locked(workspace.layout.lock, "al labelstudio reset"):
        check_identity(workspace.layout)
        ref = _known(workspace)
        taken_out: list[str] = []

        def note(edit: PageEdit) -> None:
            taken_out.extend(edit.added)

        with connect(workspace) as oracle:
            ensure_project(workspace, oracle, ref, (), note)
            if taken_out:  # passed as published, so that they are removed like classes that the schema dropped
                ensure_project(workspace, oracle, ref, tuple(taken_out), note)
        return tuple(dict.fromkeys(taken_out))


class Adopted(Struct, frozen=True):
    """The result of `adopt`."""

    project: int | None
    """The project that this clone now writes to; None if there is none yet."""
    copy: bool
    """Whether the folder was a copy, which now has its own identity."""


def adopt(workspace: Workspace) -> Adopted:
    """Make this clone the one that writes to the project; a copy of a clone gets its own identity.

    Before anything changes in Label Studio, missing data are pulled and all data are compared with git's records.
    Raises NothingToDo if there is no project, WrongProject, RemoteIncomplete or UnexpectedChange if data differ from
    their records, and ManualActionRequired if another clone published rounds that this one lacks and would make again
    under the same numbers.
    """
    layout, git = workspace.layout, Git(workspace.layout.root)
    check_ready(layout, git)
    copy = identify(layout).verdict != "same"
    if copy:
        with locked(layout.lock, "al adopt"):
            begin_adoption(layout)
    if copy and stored_project(layout) is None:
        end_adoption(layout)
        return Adopted(None, copy)
    ref = _known(workspace)
    if (remote := git.remote()) is not None:
        git.fetch_tags(remote, ROUND_TAGS)
    if missing := git.lacks():
        raise ManualActionRequired(
            f"the git remote is {counted(missing, 'commit')} ahead of this clone, and may have rounds that it lacks: "
            "`git pull`, then `al adopt` again"
        )
    with locked(layout.lock, "al adopt"), open_dvc(layout) as dvc:
        dvc.keep_state_private()
        if not layout.closing.exists() and not is_closed(layout, read_history(layout, git).planned):
            pull_missing_sources(layout, dvc)
            check_sources(layout, dvc)
    with closing(connect(workspace)) as oracle:
        oracle.adopt(ref, workspace.id, clone_id(layout))
        if (of_reviews := stored_review_project(layout)) is not None:
            oracle.adopt(of_reviews, review_workspace(workspace.id), clone_id(layout))
    end_adoption(layout)
    return Adopted(ref.project_id, copy)


def leave_project(workspace: Workspace) -> int:
    """Forget a project that no longer exists; returns its number. A later tick creates another, or finds it again.

    Likewise that of reviews. Pulled answers stay and count for their tasks. A copy of a clone gets its own identity.
    """
    layout = workspace.layout
    with locked(layout.lock, "al adopt"):
        check_ready(layout, Git(layout.root))
        number = _known(workspace).project_id
        if identify(layout).verdict != "same":
            begin_adoption(layout)
            end_adoption(layout)
        left = [path for path in (layout.project, layout.review_project) if path.exists()]
        for path in left:
            write_json(path, {})
        Git(layout.root).commit(f"Leave Label Studio's project {number}", left)
    return number


def _known(workspace: Workspace) -> ProjectRef:
    known = stored_project(workspace.layout)
    if known is None:
        raise NothingToDo("there is no project yet; `al round` creates one")
    return known
