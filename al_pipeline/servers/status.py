"""The state of all services that this machine runs for a workspace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from al_pipeline.servers import process
from al_pipeline.servers.fork_server import stop_fork_servers
from al_pipeline.servers.label_studio_server import connected_elsewhere, label_studio_status
from al_pipeline.servers.live import live_status
from al_pipeline.servers.prefect_server import prefect_status
from al_pipeline.servers.process import Server
from al_pipeline.servers.worker import worker_status
from al_pipeline.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """The state of one service."""

    service: str
    state: str
    """`running`, `stopped`, or `yours` for a service that the user runs."""
    address: str
    pid: int | None
    log: str | None
    """Its log file, relative to the workspace's home."""

    def to_json(self) -> dict[str, Any]:
        """This row as a JSON object."""
        return asdict(self)


def label_studio_elsewhere(workspace: Workspace) -> str | None:
    """The address of the user's own Label Studio if the workspace is connected to one, else None."""
    return os.environ.get("AL_LABEL_STUDIO_URL") or connected_elsewhere(workspace)


FOLDERS = {"Label Studio": "label-studio", "Prefect": "prefect", "worker": "worker", "live": "live"}
"""The folder of each service in a workspace's home."""


_NO_ADDRESS = ("worker", "live")
"""Services that people have no use for the address of."""


def running_in(homes: Sequence[Path]) -> dict[Path, list[ServiceRow]]:
    """The services in workspaces' homes, by home; the workspaces themselves need not exist any more.

    Reads the process table once and sends no request: a live process counts as running even while it starts.
    """
    marked = process.marked()
    found = {}
    for home in homes:
        rows = []
        for name, folder in FOLDERS.items():
            record = home / folder / "server.json"
            living = marked.get(os.path.realpath(record), [])
            if not living:
                if record.exists():
                    rows.append(ServiceRow(name, "stopped", "", None, f"{folder}/server.log"))
                continue
            known = process.recorded(record)
            known = known if known and any(one.pid == known.pid for one in living) else None
            address = known.url if known and folder not in _NO_ADDRESS else ""
            pid = known.pid if known else living[0].pid
            rows.append(ServiceRow(name, "running", address, pid, f"{folder}/server.log"))
        found[home] = rows
    return found


def end_all_in(home: Path) -> list[str]:
    """End every process of the services in a workspace's home. Returns the names of the services that ran."""
    marked = process.marked()
    ended = []
    for name, folder in reversed(FOLDERS.items()):  # the worker first: it depends on the others
        if living := marked.get(os.path.realpath(home / folder / "server.json")):
            process.end(living)
            ended.append(name)
    stop_fork_servers(home)
    return ended


def services(workspace: Workspace) -> list[ServiceRow]:
    """The present state of every service of the workspace."""

    def row(name: str, folder: str, server: Server | None) -> ServiceRow:
        log = f"{folder}/server.log"
        if server is None:
            return ServiceRow(name, "stopped", "", None, log)
        return ServiceRow(name, "running", "" if folder in _NO_ADDRESS else server.url, server.pid, log)

    elsewhere = label_studio_elsewhere(workspace)
    return [
        ServiceRow("Label Studio", "yours", elsewhere, None, None)
        if elsewhere
        else row("Label Studio", "label-studio", label_studio_status(workspace)),
        row("Prefect", "prefect", prefect_status(workspace)),
        row("worker", "worker", worker_status(workspace)),
        *([row("live", "live", live_status(workspace))] if _has_live(workspace) else []),
    ]


def _has_live(workspace: Workspace) -> bool:
    """Whether `al up` runs `al live` here, or did."""
    return workspace.params.live.enabled or (workspace.home / "live/server.json").exists()
