"""An opened workspace: its layout, ids, parameters and credentials."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from al_pipeline.errors import BadInput, NotAWorkspace, UsageError
from al_pipeline.files import read_object, sha256_bytes, write_bytes, write_json
from al_pipeline.params import Params, load_params
from al_pipeline.workspace.home import al_home, check_private, check_workspace, private_folder
from al_pipeline.workspace.identity import clone_id
from al_pipeline.workspace.layout import Layout

LAYOUT_VERSION = 4
"""Increment together with a migration in `operations/upgrade.py`."""

NOTIFY_VARIABLE = "AL_NOTIFY_URLS"
"""The environment variable with the addresses of notification services, separated by blanks."""

PLACES = "places"
"""A folder in a workspace's home with a file for each clone on this machine, which holds the clone's path."""

_ID = re.compile(r"^[0-9a-f]{12}\Z")


def is_workspace_id(name: object) -> bool:
    """Whether `name` is a valid workspace id: twelve hex digits."""
    return isinstance(name, str) and bool(_ID.match(name))


@dataclass(frozen=True)
class Workspace:
    """One labelling project on this machine. Create it by `open_workspace`."""

    layout: Layout
    id: str
    """Twelve hex digits, the same in every clone."""

    @cached_property
    def params(self) -> Params:
        """The parameters, read at first access. Raises BadParams."""
        return load_params(self.layout.params)

    def forget_params(self) -> None:
        """Read `params.yaml` again at the next access: it was changed."""
        self.__dict__.pop("params", None)

    @cached_property
    def clone_id(self) -> str:
        """The clone's id; created on first use, never in git."""
        return clone_id(self.layout)

    @property
    def home(self) -> Path:
        """This workspace's folder in `al`'s home: credentials (0600), data of its own servers.

        Raises UsageError if it lies inside the workspace, where git or DVC could pick up a secret.
        """
        home = al_home() / self.id
        check_private(home)
        if home.resolve().is_relative_to(self.layout.root.resolve()):
            raise UsageError(
                f"AL_HOME ({al_home()}) is inside the workspace, where secrets must not be; move it elsewhere"
            )
        return home

    def make_home(self) -> None:
        """Create `home` for its owner alone, and record this clone's path there."""
        private_folder(self.home)
        place = os.fsencode(os.path.abspath(self.layout.root))
        note = private_folder(self.home / PLACES) / sha256_bytes(place)[:12]  # a file each, so that clones do not race
        if not note.exists():
            write_bytes(note, place, 0o600)

    @property
    def credentials_file(self) -> Path:
        return self.home / "credentials.json"

    def credentials(self) -> dict[str, str]:
        """Address and token of Label Studio (`url`, `token`): environment first, then the 0600 file."""
        stored = read_object(self.credentials_file)
        found = {
            "url": os.environ.get("AL_LABEL_STUDIO_URL") or stored.get("url"),
            "token": os.environ.get("AL_LABEL_STUDIO_TOKEN") or stored.get("token"),
        }
        return {key: value for key, value in found.items() if value}

    def store_credentials(self, url: str, token: str) -> None:
        """Store Label Studio's address and token in a file that only its owner can read."""
        self.make_home()
        write_json(self.credentials_file, {"url": url, "token": token}, mode=0o600)

    @property
    def services_file(self) -> Path:
        """The addresses of the notification services, by number."""
        return self.home / "notify.json"

    def services(self) -> dict[str, str]:
        """The addresses of the services that tell people, by name: those of AL_NOTIFY_URLS, else of the 0600 file.

        They hold secrets. A name is a number, or `AL_NOTIFY_URLS:1`. Raises BadInput if the file is damaged.
        """
        if given := os.environ.get(NOTIFY_VARIABLE, "").split():
            return {f"{NOTIFY_VARIABLE}:{number}": url for number, url in enumerate(given, 1)}
        stored = read_object(self.services_file)
        if not all(isinstance(url, str) for url in stored.values()):
            raise BadInput(f"{self.services_file} is damaged; delete it, then `al notify add` stores a service anew")
        return stored

    def store_services(self, services: Mapping[str, str]) -> None:
        """Store the services' addresses in a file that only its owner can read."""
        self.make_home()
        write_json(self.services_file, dict(services), mode=0o600)


def in_workspace(start: Path | None = None) -> bool:
    """Whether `start` (default: the current folder) lies in a workspace of any layout version."""
    start = (start or Path.cwd()).resolve()
    return any(Layout(folder).marker.exists() for folder in (start, *start.parents))


def open_workspace(start: Path | None = None) -> Workspace:
    """The workspace that contains `start` (default: the current folder). Raises NotAWorkspace."""
    layout, marker = find_workspace(start)
    if (found := marker["layout"]) != LAYOUT_VERSION:
        fix = "`al upgrade` converts it" if found < LAYOUT_VERSION else "install a newer engine"
        raise NotAWorkspace(f"{layout.root} has layout {found}, but this engine needs layout {LAYOUT_VERSION}; {fix}")
    return Workspace(layout, marker["workspace_id"])


def find_workspace(start: Path | None = None) -> tuple[Layout, dict[str, Any]]:
    """The workspace of any layout version that contains `start`, and the content of its marker.

    Raises NotAWorkspace, and UnsafeFolder if others could change files that control it.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        layout = Layout(folder)
        if not layout.marker.is_file():
            continue
        marker = read_object(layout.marker)
        if not isinstance(marker.get("layout"), int):
            raise NotAWorkspace(f"{layout.marker} is damaged; `git checkout -- {layout.marker.name}` restores it")
        name = marker.get("workspace_id")
        if not is_workspace_id(name):  # it becomes a folder's name: `../..` would lead anywhere
            raise NotAWorkspace(f"{layout.marker} is damaged: `workspace_id` must be 12 hex digits, got {name!r}")
        _check_folders(layout)
        check_workspace(layout.root)
        for private in (layout.private, layout.inbox):
            check_private(private)
        return layout, marker
    raise NotAWorkspace(f"{start} is not in a workspace; `al init DIR --labels a,b` creates one, then work inside DIR")


def _check_folders(layout: Layout) -> None:
    """Raise NotAWorkspace if a folder that the engine writes to is a link out of the workspace."""
    root = layout.root.resolve()
    for folder in layout.folders:
        if folder.is_symlink() and not folder.resolve().is_relative_to(root):
            raise NotAWorkspace(
                f"{folder} is a link that leads outside the workspace, where the engine must not write; replace it by "
                "a folder (only DVC's cache may be elsewhere: `dvc cache dir --local PATH`)"
            )
