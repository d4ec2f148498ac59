"""List what workspaces left on this machine below `al`'s home, and remove what one of them left.

A workspace's home holds its servers with their databases, credentials, caches and, unless `al init` was given another
DVC remote, the data of its rounds. The folder of the workspace itself may have been deleted or moved.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from al_pipeline.data.ledger import read_events, read_refused
from al_pipeline.errors import (
    BadInput,
    ManualActionRequired,
    NotAWorkspace,
    NothingToDo,
    ServerFailed,
    UnsafeFolder,
    UsageError,
)
from al_pipeline.files import TEMPORARY_PREFIX, disk_usage, read_object, remove_tree
from al_pipeline.integrations.label_studio.parsers import TIME_FORMAT
from al_pipeline.integrations.label_studio.projects import find_mark
from al_pipeline.servers import ServiceRow, StoredAnswer, end_all_in, running_in, stored_answers
from al_pipeline.workspace.home import al_home, check_private
from al_pipeline.workspace.identity import refuse_copy
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import PLACES, is_workspace_id

State = Literal["running", "stopped", "gone", "unsafe"]

_MACHINES = ("label-studio", "live", "worker", "prefect", "credentials.json", "reproduce", "dvc")
"""Entries of a workspace's home that can be recreated, or are useless without the servers, in the order of removal."""

_DATA = "dvc-remote"
"""The DVC remote with the data of the rounds, unless `al init` was given another one."""

_CALLED = {
    "label-studio": "Label Studio's database, with its accounts and every answer in it",
    "worker": "the worker",
    "live": "the log of `al live`",
    "prefect": "Prefect's database, with the schedule and the log of its runs",
    "credentials.json": "the address and token of Label Studio",
    "reproduce": "clones that `al reproduce` kept",
    "dvc": "DVC's state",
    _DATA: "the DVC remote, with the data and models of every round",
}


_WORKSPACE = "the workspace: git history, labels, models"
_WITH_FOLDER = "`--with-folder` removes the workspace and the data of its rounds too"
_YOURS = "not made by `al`"


@dataclass(frozen=True, slots=True)
class Left:
    """What one workspace left on this machine."""

    workspace_id: str
    home: Path
    places: tuple[Path, ...]
    """Folders of its clones on this machine, existing ones first; empty if none was recorded."""
    present: tuple[Path, ...]
    """Those of `places` that still exist."""
    state: State
    services: tuple[ServiceRow, ...]
    problem: str = ""
    """Why the home cannot be read (state `unsafe`)."""

    @property
    def name(self) -> str:
        """The name of its folder; empty if unknown."""
        return self.places[0].name if self.places else ""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object, with the disk usage in bytes."""
        safe = self.state != "unsafe"
        return {
            "workspace_id": self.workspace_id,
            "name": self.name,
            "state": self.state,
            "path": str(self.places[0]) if self.places else None,
            "clones": [str(place) for place in self.present],
            "home": str(self.home),
            "bytes": disk_usage(self.home) if safe else None,
            "data_bytes": disk_usage(self.home / _DATA) if safe else None,
            "services": [row.to_json() for row in self.services],
            "problem": self.problem or None,
        }


@dataclass(frozen=True, slots=True)
class Destruction:
    """What `destroy` would remove, or has removed."""

    left: Left
    removed: tuple[tuple[str, str, int], ...]
    """Path, description and size in bytes of each."""
    kept: tuple[tuple[str, str], ...]
    """Path or URL, and description of each."""
    losses: tuple[str, ...]
    """A sentence for each thing that would be lost for good: as far as is known, there is no other copy."""
    ended: tuple[str, ...] = ()
    """Services that were running and were stopped."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {
            "workspace_id": self.left.workspace_id,
            "removed": [{"path": path, "description": what, "bytes": size} for path, what, size in self.removed],
            "kept": [{"path": path, "description": what} for path, what in self.kept],
            "losses": list(self.losses),
            "stopped": list(self.ended),
        }


def workspaces() -> list[Left]:
    """List every workspace that left something below `al`'s home, sorted by folder name. Reads only."""
    root = al_home()
    if not root.is_dir():
        return []
    homes = sorted(entry for entry in root.iterdir() if is_workspace_id(entry.name) and not entry.is_symlink())
    homes = [home for home in homes if home.is_dir()]
    running = running_in(homes)
    return sorted((_look(home, running[home]) for home in homes), key=lambda one: (one.name, one.workspace_id))


def find(wanted: str | None, here: Path | None) -> Left:
    """Find what the workspace `wanted` (id, path or folder name) left; by default, the workspace that contains `here`.

    Raises UsageError if there is none or the name is ambiguous, CopiedWorkspace if `here` is in a copy.
    """
    everything = workspaces()
    if wanted is None:
        start = (here or Path.cwd()).resolve()
        around = next((folder for folder in (start, *start.parents) if Layout(folder).marker.is_file()), None)
        if around is None:
            raise NotAWorkspace(
                f"{start} is not in a workspace; name one that `al workspaces` lists, by its id or path (`al init "
                "DIR` creates one)"
            )
        refuse_copy(Layout(around))  # the marker of a copy has the id of its original
        name = read_object(Layout(around).marker).get("workspace_id")
        found = [one for one in everything if one.workspace_id == name]
        if not found:
            raise UsageError(f"the workspace {around} stores nothing in {al_home()}: there is nothing to remove")
        return found[0]
    place = Path(os.path.abspath(os.path.expanduser(wanted)))
    found = [one for one in everything if one.workspace_id == wanted]
    found = found or [one for one in everything if place in one.places or place.resolve() in one.present]
    found = found or [one for one in everything if one.name == wanted]
    if not found:
        raise UsageError(f"no workspace {wanted!r} stores anything in {al_home()}; `al workspaces` lists those that do")
    if len(found) > 1:
        ids = ", ".join(one.workspace_id for one in found)
        raise UsageError(f"{len(found)} workspaces have the name {wanted!r}; give the id of one: {ids}")
    return found[0]


def plan(left: Left, with_folder: bool) -> Destruction:
    """Return what `destroy` would remove. Raises UnsafeFolder, and BadInput if a file that it reads is invalid."""
    check_private(left.home)
    removed: list[tuple[str, str, int]] = []
    kept: list[tuple[str, str]] = []
    takes_data = with_folder and len(left.present) <= 1
    for entry in sorted(left.home.iterdir()):
        begun = entry.name.startswith(TEMPORARY_PREFIX)
        what = _CALLED.get(entry.name, "the rest of what an earlier call removed" if begun else _YOURS)
        if begun or entry.name in _MACHINES or (entry.name == _DATA and takes_data):
            removed.append((str(entry), what, disk_usage(entry)))
        elif entry.name != PLACES:
            kept.append((str(entry), what))
    if url := _elsewhere(left):
        kept.append((url, "your own Label Studio, with its project and answers"))
    for place in left.present:
        if not takes_data:
            kept.append((str(place), _WORKSPACE))
            continue
        ours = _owned(place)
        removed.append((str(place), _WORKSPACE, sum(map(disk_usage, ours))))
        others = _others(place, ours)
        kept += [(str(path), "the git history of your own files" if path.name == ".git" else _YOURS) for path in others]
    return Destruction(left, tuple(removed), tuple(kept), tuple(_losses(left, with_folder)))


def destroy(
    left: Left, with_folder: bool, force: bool, on_progress: Callable[[str], None] = lambda _: None
) -> Destruction:
    """Stop the workspace's servers and remove what it left on this machine; with `with_folder`, the workspace too.

    Without `with_folder`, the workspace and the DVC remote in its home stay. If killed at any point, the same call
    continues. Raises ManualActionRequired, with nothing changed, if something would be lost and `force` is false;
    UsageError for `with_folder` if the workspace has several clones here; NothingToDo if nothing is left; Locked while
    a round runs.
    """
    if with_folder and len(left.present) > 1:
        clones = ", ".join(map(str, left.present))
        raise UsageError(
            f"this machine has several clones of this workspace ({clones}), which share what would be removed; delete "
            "the folders of those that you no longer want, then run this again"
        )
    with contextlib.ExitStack() as stack:
        for place in left.present:
            stack.enter_context(locked(Layout(place).lock, "al destroy"))
        planned = plan(left, with_folder)
        if not planned.removed:
            raise NothingToDo("there is nothing left to remove" + ("" if with_folder else f"; {_WITH_FOLDER}"))
        if planned.losses and not force:
            raise ManualActionRequired(f"{'; '.join(planned.losses)}. Nothing was removed; `--force` removes it anyway")
        on_progress("stopping servers")
        ended = end_all_in(left.home)
        on_progress("removing files")
        for begun in left.home.glob(f"{TEMPORARY_PREFIX}*"):
            remove_tree(begun)
        for name in _MACHINES:
            remove_tree(left.home / name)
        if with_folder:
            for place in left.places:
                _remove_workspace(place) if place in left.present else _remove_empty(place)
            remove_tree(left.home / _DATA)
    if not any(entry.name != PLACES for entry in left.home.iterdir()):
        remove_tree(left.home / PLACES)  # last: a repeated call finds the workspace by it
        left.home.rmdir()
    return Destruction(left, planned.removed, planned.kept, planned.losses, tuple(ended))


def _look(home: Path, services: Sequence[ServiceRow]) -> Left:
    try:
        check_private(home)
        notes = sorted((home / PLACES).glob("*"))
        noted = [Path(os.fsdecode(note.read_bytes())) for note in notes if not note.name.startswith(TEMPORARY_PREFIX)]
    except (UnsafeFolder, OSError) as error:
        return Left(home.name, home, (), (), "unsafe", tuple(services), str(error))
    present = tuple(place for place in noted if _is_clone(place, home.name))
    state: State = "running" if any(row.state == "running" for row in services) else "stopped"
    if noted and not present:
        state = "gone"
    return Left(home.name, home, tuple(dict.fromkeys((*present, *noted))), present, state, tuple(services))


def _is_clone(place: Path, workspace_id: str) -> bool:
    """Whether the workspace is at `place`. An unreadable marker counts as yes: the workspace may still be there."""
    try:
        return bool(read_object(Layout(place).marker).get("workspace_id") == workspace_id)
    except NotADirectoryError:
        return False
    except (BadInput, OSError):
        return True


def _elsewhere(left: Left) -> str | None:
    """The URL of an external Label Studio, if the workspace is configured to use one."""
    with contextlib.suppress(BadInput):
        known = read_object(left.home / "credentials.json")
        own = read_object(left.home / "label-studio/account.json")
        if known and known.get("token") != own.get("token"):
            return str(known.get("url"))
    return None


def _losses(left: Left, with_folder: bool) -> list[str]:
    """Describe the data that only the workspace's own Label Studio or its inbox holds."""
    losses = []
    try:
        stored = stored_answers(left.home / "label-studio")
    except ServerFailed as error:
        return [f"{error}, so it is unknown whether its answers were pulled"]
    try:
        pulled = _pulled(left)
    except (BadInput, OSError) as error:
        return [f"it is unknown which answers were pulled ({error})"] if stored.answers else []
    waiting = Counter(answer.annotator for answer in stored.answers if _key(answer) not in pulled)
    if waiting:
        who = ", ".join(f"{name} {count:,}" for name, count in sorted(waiting.items()))
        answers = f"{waiting.total():,} answers in its Label Studio"
        if left.present:
            losses.append(f"{answers} were not pulled ({who}); `al round` pulls them")
        else:
            losses.append(
                f"{answers} ({who}) may not have been pulled: the workspace, which has the record of that, is gone"
            )
    others = [
        title for title, description in stored.projects
        if (mark := find_mark(description)) is None or mark.workspace_id != left.workspace_id
    ]  # fmt: skip
    if others:
        losses.append(
            f"its Label Studio has projects that do not belong to the workspace: {', '.join(map(repr, others))}"
        )
    for place in left.present if with_folder else ():
        layout = Layout(place)
        inbox = read_events(layout.inbox_events)
        known = {event.event_id for event in read_events(layout.events)}
        if count := len([event for event in inbox if event.event_id not in known]):
            losses.append(
                f"{count:,} pulled answers are not in a published round yet; `al round --close-now` closes one"
            )
    return losses


def _pulled(left: Left) -> set[tuple[str, str, str]]:
    """Push key, annotation id and time of change of each answer in the ledgers and inboxes of the clones here."""
    found = set()
    for place in left.present:
        layout = Layout(place)
        for event in read_events(layout.events, layout.inbox_events):
            found.add((event.push_key, event.answer_name.partition("-")[0], event.updated_at or ""))
        for row in read_refused(layout.events, layout.inbox_events):
            found.add((str(row.get("push_key")), str(row.get("annotation_id")), str(row.get("updated_at"))))
    return found


def _key(answer: StoredAnswer) -> tuple[str, str, str]:
    return str(answer.push_key), str(answer.annotation_id), answer.updated_at.strftime(TIME_FORMAT)


def _owned(place: Path) -> list[Path]:
    """Paths in a workspace's folder that the engine, git or DVC created; the marker last.

    If the folder also holds the user's own files, git's history covers those too and is not in the list.
    """
    layout = Layout(place)
    outputs = (layout.labeled, layout.test_labels, layout.unresolved, layout.model, layout.scores, layout.queries)
    made = (*layout.sources, *layout.pointers, *outputs, layout.inbox, layout.rejects, layout.reports, layout.rounds)
    plain = (layout.engine, layout.dvc_lock, layout.dvc_yaml, layout.params, place / "data/.gitignore")
    tools = (place / "models/.gitignore", place / ".dvc", place / ".dvcignore", layout.private)
    history: tuple[Path, ...] = (layout.git_ignore, layout.git_attributes, place / ".git", layout.marker)
    found = [*made, *plain, *tools]
    if (place / ".git").is_file() or _others(place, [*found, *history]):
        history = (layout.marker,)
    return [path for path in (*found, *history) if os.path.lexists(path)]


def _others(place: Path, ours: Sequence[Path]) -> list[Path]:
    """Entries of a workspace's folder, its `data` and its `models` that are not in `ours`."""
    entries: list[Path] = []
    for entry in sorted(place.iterdir()):
        inside = entry.name in ("data", "models") and entry.is_dir() and not entry.is_symlink()
        entries += sorted(entry.iterdir()) if inside else [entry]
    return [entry for entry in entries if entry not in ours and not entry.name.startswith(TEMPORARY_PREFIX)]


def _remove_workspace(place: Path) -> None:
    folders = (place / "data", place / "models", place)
    for begun in (path for folder in folders for path in folder.glob(f"{TEMPORARY_PREFIX}*")):
        remove_tree(begun)
    for path in _owned(place):
        remove_tree(path)
    _remove_empty(place)


def _remove_empty(place: Path) -> None:
    for folder in (place / "data", place / "models", place):
        with contextlib.suppress(OSError):  # it holds the user's files, or does not exist
            folder.rmdir()
