"""Migrate a workspace to this engine's layout: a table of migrations, and one commit for all their changes.

A migration is a pure function of the committed texts. So an upgrade can be killed at any point and run again, and any
other change in the work tree is the user's: then the upgrade stops and names the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from al_pipeline.errors import NotAWorkspace, NothingToDo, UnexpectedChange
from al_pipeline.files import read_json, sha256_bytes, write_json, write_text
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.operations.checkout import bring_in_line, check_ready, put_back_converted, with_lines
from al_pipeline.operations.close import foreign_edits, is_closed
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.workspace.identity import bind, identify
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.params_file import with_missing
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import LAYOUT_VERSION, Workspace, find_workspace

_logger = get_logger(__name__)

Texts = Mapping[str, str]
"""The contents of FILES, by path."""

FILES = ("params.yaml", "dvc.yaml", ".gitignore")
"""The files that migrations may read and change, besides the marker."""

_DVC_YAML_1 = "b2997b93dd0bfe0ca3d2d59d02352f48c7c556b3386f27a088d20e42920deed8"
_DVC_YAML_2 = "994622d7a156790745bc04441c3745e44d403229ca21e88cd7d3f1b42b884859"
_DVC_YAML_3 = "79bb35ee233c9994eef0c705ba583d5c99f2c8604885800f2b393159d385c499"
OLD_DVC_YAML = frozenset({_DVC_YAML_1, _DVC_YAML_2, _DVC_YAML_3})
"""SHA-256 of the `dvc.yaml` of each older layout: any other content has the user's own changes."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What an upgrade did; `before` equals `after` if there was nothing to do."""

    before: int
    after: int
    changed: tuple[str, ...]
    commit: str


def upgrade(start: Path | None = None, replace_dvc_yaml: bool = False) -> Upgrade:
    """Migrate the workspace that contains `start` to LAYOUT_VERSION, in one commit; harmless if it is up to date.

    Raises NotAWorkspace for a newer layout, NothingToDo while a round is being built, UnexpectedChange if a user's
    change would be lost (`replace_dvc_yaml` discards one in `dvc.yaml`), BadParams if the new keys cannot be added to
    `params.yaml`.
    """
    layout, _ = find_workspace(start)
    git = Git(layout.root)
    with locked(layout.lock, "al upgrade"):
        marker = _committed_marker(layout, git)
        before = marker["layout"]
        if before > LAYOUT_VERSION:
            raise NotAWorkspace(
                f"{layout.root} has layout {before}, but this engine supports layouts up to {LAYOUT_VERSION}; install "
                "a newer engine"
            )
        check_ready(layout, git)
        if identify(layout).verdict == "same":  # a copy is migrated too: only then can it be adopted
            bind(layout)
        with open_dvc(layout) as dvc:
            dvc.keep_state_private()
        Workspace(layout, marker["workspace_id"]).make_home()
        put_back_converted(layout, git)
        if before == LAYOUT_VERSION:
            return Upgrade(before, before, tuple(bring_in_line(layout, git)), str(git.head()))
        committed = {name: git.show("HEAD", name) or "" for name in FILES}
        planned = migrate(committed, before, replace_dvc_yaml)
        wanted = {**marker, "layout": LAYOUT_VERSION}
        _check(layout, git, committed, planned, (marker, wanted))
        changed = [name for name in FILES if planned[name] != committed[name]]
        for name in changed:
            write_text(layout.root / name, planned[name])
        write_json(layout.marker, wanted)  # last: it marks the rest as done
        changed.append(layout.marker.name)
        message = f"Carry the workspace from layout {before} to {LAYOUT_VERSION}"
        git.commit(message, [layout.root / name for name in changed])
        _logger.info("%s: %s", message, ", ".join(changed))
        changed += [name for name in bring_in_line(layout, git) if name not in changed]
        return Upgrade(before, LAYOUT_VERSION, tuple(changed), str(git.head()))


def _committed_marker(layout: Layout, git: Git) -> dict[str, Any]:
    try:
        marker = json.loads(git.show("HEAD", layout.marker.name) or "{}")
    except (ValueError, RecursionError):
        marker = {}
    if not isinstance(marker, dict) or not isinstance(marker.get("layout"), int) or marker["layout"] < 1:
        raise NotAWorkspace(f"{layout.root} has no commit with its marker; was `al init` interrupted? Run it again")
    return marker


def migrate(texts: Texts, layout: int, replace_dvc_yaml: bool = False) -> Texts:
    """Migrate the contents of FILES from version `layout` to this engine's layout."""
    for version in range(layout, LAYOUT_VERSION):
        texts = MIGRATIONS[version](texts, replace_dvc_yaml)
    return texts


def bring_up_to_date(layout: Layout) -> None:
    """Migrate the files of a temporary clone, replacing its `dvc.yaml`; commits nothing."""
    texts = {name: (layout.root / name).read_bytes().decode() for name in FILES}
    for name, text in migrate(texts, read_json(layout.marker)["layout"], True).items():
        write_text(layout.root / name, text)


def _check(
    layout: Layout, git: Git, committed: Texts, planned: Texts, markers: tuple[dict[str, object], dict[str, object]]
) -> None:
    """Raise NothingToDo during a build, UnexpectedChange for edits other than those of a killed upgrade."""
    if layout.closing.exists() or is_closed(layout, read_history(layout, git).planned):
        raise NothingToDo(
            "a round is being built with the engine of the older layout; finish it with that engine (`al round`), "
            "then upgrade"
        )
    edited = foreign_edits(layout, git)
    for name in FILES:
        path = layout.root / name
        text = path.read_bytes().decode(errors="surrogateescape") if path.exists() else ""
        if text not in (committed[name], planned[name]):
            edited.append(name)
    if read_json(layout.marker) not in markers:
        edited.append(layout.marker.name)
    if edited:
        raise UnexpectedChange(
            f"uncommitted changes in {', '.join(edited[:5])}. An upgrade would mix them with its own: commit them "
            "(`git commit -- FILE`) or discard them (`git checkout -- FILE`), then upgrade"
        )


# Migrations: version -> the next one --------------------------------------------------------------------------------


def _to_2(texts: Texts, replace_dvc_yaml: bool) -> Texts:
    """Add the new keys of `params.yaml`, and the `dvc.yaml` and ignored paths of layout 2."""
    return {
        "params.yaml": with_missing(texts["params.yaml"], template("params.yaml"))[0],
        "dvc.yaml": _dvc_yaml(texts["dvc.yaml"], _DVC_YAML_1, replace_dvc_yaml),
        ".gitignore": with_lines(texts[".gitignore"], Layout().ignored),
    }


def _to_3(texts: Texts, replace_dvc_yaml: bool) -> Texts:
    """Install the `dvc.yaml` whose plots, descriptions and model DVC's own commands show."""
    return {**texts, "dvc.yaml": _dvc_yaml(texts["dvc.yaml"], _DVC_YAML_2, replace_dvc_yaml)}


def _to_4(texts: Texts, replace_dvc_yaml: bool) -> Texts:
    """Add the new keys of `params.yaml`, and the `dvc.yaml` whose stages read `labels`."""
    return {
        **texts,
        "params.yaml": with_missing(texts["params.yaml"], template("params.yaml"))[0],
        "dvc.yaml": _dvc_yaml(texts["dvc.yaml"], _DVC_YAML_3, replace_dvc_yaml),
    }


def _dvc_yaml(text: str, known: str, replace: bool) -> str:
    """The template's if `text` is the older layout's (digest `known`) or `replace`; else raises UnexpectedChange."""
    ours = template("dvc.yaml")
    if text == ours or sha256_bytes(ours.encode()) == known:
        return text  # there is no newer one
    if sha256_bytes(text.encode()) != known and not replace:
        raise UnexpectedChange(
            "dvc.yaml has changes of your own, and the new layout has other stages; `al upgrade --replace-dvc-yaml` "
            "replaces the file (git keeps yours), then make your changes again"
        )
    return ours


Migration = Callable[[Texts, bool], Texts]
MIGRATIONS: Mapping[int, Migration] = {1: _to_2, 2: _to_3, 3: _to_4}
"""The migration from each version to the next. A released migration is never changed."""
