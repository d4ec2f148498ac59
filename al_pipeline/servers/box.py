"""All that one box runs for a workspace, as rows of one screen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from al_pipeline.servers import process
from al_pipeline.servers.label_studio_server import connected_elsewhere, label_studio_status
from al_pipeline.servers.prefect_server import prefect_status
from al_pipeline.servers.process import Server
from al_pipeline.servers.worker import worker_status
from al_pipeline.workspace.workspace import Workspace


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """One service: what it is, whether it is well, and where to look."""

    service: str
    state: str
    """`running`, `stopped`, or `yours` for one that we neither start nor stop."""
    address: str
    pid: int | None
    log: str | None
    """Below the workspace's home."""

    def to_json(self) -> dict[str, Any]:
        """This row as a JSON object."""
        return asdict(self)


def label_studio_elsewhere(workspace: Workspace) -> str | None:
    """The address of the Label Studio that the workspace was told to use in place of one of its own."""
    return os.environ.get("AL_LABEL_STUDIO_URL") or connected_elsewhere(workspace)


FOLDERS = {"Label Studio": "label-studio", "Prefect": "prefect", "worker": "worker"}
"""The folder of each service in a workspace's home."""


def running_in(homes: Sequence[Path]) -> dict[Path, list[ServiceRow]]:
    """The services of workspaces, by their homes, whether or not the workspaces are still there.

    One look at all processes, and no request: a process that lives counts as running, though it may be busy starting.
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
            address = known.url if known and folder != "worker" else ""
            pid = known.pid if known else living[0].pid
            rows.append(ServiceRow(name, "running", address, pid, f"{folder}/server.log"))
        found[home] = rows
    return found


def end_all_in(home: Path) -> list[str]:
    """End every process of the services in a workspace's home, and no other; which services ran."""
    marked = process.marked()
    ended = []
    for name, folder in reversed(FOLDERS.items()):  # the worker first: it asks the others
        if living := marked.get(os.path.realpath(home / folder / "server.json")):
            process.end(living)
            ended.append(name)
    return ended


def services(workspace: Workspace) -> list[ServiceRow]:
    """Every service of the workspace, as it is now."""

    def row(name: str, folder: str, server: Server | None) -> ServiceRow:
        log = f"{folder}/server.log"
        if server is None:
            return ServiceRow(name, "stopped", "", None, log)
        return ServiceRow(name, "running", "" if folder == "worker" else server.url, server.pid, log)

    elsewhere = label_studio_elsewhere(workspace)
    return [
        ServiceRow("Label Studio", "yours", elsewhere, None, None)
        if elsewhere
        else row("Label Studio", "label-studio", label_studio_status(workspace)),
        row("Prefect", "prefect", prefect_status(workspace)),
        row("worker", "worker", worker_status(workspace)),
    ]
