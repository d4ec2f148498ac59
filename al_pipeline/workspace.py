"""An opened workspace: its layout, its ids, its parameters, and where its secrets lie."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from al_pipeline.errors import NotAWorkspace
from al_pipeline.files import read_json, write_json
from al_pipeline.layout import Layout
from al_pipeline.params import Params, load_params

LAYOUT_VERSION = 2
"""Raise it with a migration in `operations/upgrade.py`."""


@dataclass(frozen=True)
class Workspace:
    """One labelling project on this machine. Create it by `open_workspace`."""

    layout: Layout
    id: str
    """Twelve hex digits, the same in every clone."""

    @cached_property
    def params(self) -> Params:
        """The parameters as they were when first asked for. Raises BadParams."""
        return load_params(self.layout.params)

    @cached_property
    def clone_id(self) -> str:
        """Which clone of the workspace this is; made on first use, never in git."""
        known: str | None = read_json(self.layout.clone, {}).get("clone_id")
        if known is None:
            known = uuid.uuid4().hex[:12]
            write_json(self.layout.clone, {"clone_id": known})
        return known

    @property
    def home(self) -> Path:
        """This workspace's folder outside itself: credentials (0600), embedded servers' data."""
        return al_home() / self.id

    @property
    def credentials_file(self) -> Path:
        return self.home / "credentials.json"

    def credentials(self) -> dict[str, str]:
        """Address and token of Label Studio (`url`, `token`): environment first, then the 0600 file."""
        stored: dict[str, Any] = read_json(self.credentials_file, {})
        found = {
            "url": os.environ.get("AL_LABEL_STUDIO_URL") or stored.get("url"),
            "token": os.environ.get("AL_LABEL_STUDIO_TOKEN") or stored.get("token"),
        }
        return {key: value for key, value in found.items() if value}

    def store_credentials(self, url: str, token: str) -> None:
        """Keep Label Studio's address and token in a file that only its owner can read."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.home.chmod(0o700)
        write_json(self.credentials_file, {"url": url, "token": token}, mode=0o600)


def al_home() -> Path:
    """Where `al` keeps what belongs to this machine: `AL_HOME`, else `~/.local/share/al`."""
    return Path(os.environ.get("AL_HOME") or Path.home() / ".local/share/al")


def in_workspace(start: Path | None = None) -> bool:
    """Whether `start` (default: the current folder) lies in a workspace, of whatever layout."""
    start = (start or Path.cwd()).resolve()
    return any(Layout(folder).marker.exists() for folder in (start, *start.parents))


def open_workspace(start: Path | None = None) -> Workspace:
    """The workspace that holds `start` (default: the current folder). Raises NotAWorkspace."""
    layout, marker = find_workspace(start)
    if (found := marker["layout"]) != LAYOUT_VERSION:
        mend = "`al upgrade` carries it over" if found < LAYOUT_VERSION else "install a newer engine"
        raise NotAWorkspace(f"{layout.root} has layout {found}, this engine works with {LAYOUT_VERSION}; {mend}")
    return Workspace(layout, marker["workspace_id"])


def find_workspace(start: Path | None = None) -> tuple[Layout, dict[str, Any]]:
    """The workspace that holds `start`, of whatever layout, and what its marker says. Raises NotAWorkspace."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        layout = Layout(folder)
        marker = read_json(layout.marker)
        if isinstance(marker, dict) and isinstance(marker.get("layout"), int):
            return layout, marker
        if marker is not None:
            raise NotAWorkspace(f"{layout.marker} is not as `al init` wrote it; `git checkout -- {layout.marker.name}`")
    raise NotAWorkspace(f"{start} is not in a workspace; `al init DIR --labels a,b` makes one, then work inside DIR")
