"""Checks of this machine and of `params.yaml`: packages, engine, disk, lock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from al_pipeline.features.device import device_of
from al_pipeline.files import read_json
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.plugins import doubtful_plugins, plugin_record
from al_pipeline.quantities import format_size
from al_pipeline.workspace.fingerprint import current_engine, difference
from al_pipeline.workspace.lock import holder
from al_pipeline.workspace.workspace import Workspace

LOW_DISK_BYTES = 2 * 10**9


def check_versions(_: Workspace) -> Iterator[Finding]:
    """Check that the installed dependencies satisfy al-pipeline's requirements."""
    from packaging.requirements import Requirement

    wrong = []
    for line in requires("al-pipeline") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(need.name)
        except PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have} is installed, but {need.specifier} is required")
    if wrong:
        yield Finding("versions", "error", "; ".join(wrong), "install again, with the versions in requirements.lock")
    else:
        yield Finding("versions", "ok", f"al-pipeline {version('al-pipeline')} and its dependencies")


def check_parameters(workspace: Workspace) -> Iterator[Finding]:
    """Check that `params.yaml` is valid."""
    schema = workspace.params.schema_
    yield Finding("parameters", "ok", f"params.yaml is valid; schema {schema.version}: {', '.join(schema.labels)}")


def check_engine(workspace: Workspace) -> Iterator[Finding]:
    """Check whether this engine made the last build."""
    recorded, engine = read_json(workspace.layout.engine), current_engine(device_of(workspace.params.features))
    if recorded is None:
        yield Finding("engine", "ok", f"{engine['version']}; nothing has been built yet")
    elif changes := difference(recorded, engine, plugin_record(workspace.layout, workspace.params)):
        yield Finding(
            "engine",
            "warning",
            f"not the engine of the last build: {changes}",
            "the next build uses this engine; older rounds stay as they are",
        )
    else:
        yield Finding("engine", "ok", f"{engine['version']}, the engine of the last build")


def check_plugins(workspace: Workspace) -> Iterator[Finding]:
    """Check that the plug-ins that `params.yaml` names are there and trusted. Nothing of them is run."""
    doubts = doubtful_plugins(workspace)
    for doubt in doubts:
        message = f"{doubt.name} {doubt.problem}, which is not trusted on this machine"
        yield Finding("plug-ins", "error", message, "`al trust` shows it and lets it run")
    used = plugin_record(workspace.layout, workspace.params)
    if absent := [name for name, found in used.items() if found == "absent"]:
        yield Finding("plug-ins", "error", f"{', '.join(absent)} is missing", "`pip install 'al-pipeline[plugins]'`")
    elif used and not doubts:
        yield Finding("plug-ins", "ok", "; ".join(f"{name}: {found}" for name, found in used.items()))


def check_disk(workspace: Workspace) -> Iterator[Finding]:
    """Check write permission and free disk space."""
    for folder in (workspace.layout.root, workspace.home):
        if folder.exists() and not os.access(folder, os.W_OK):
            yield Finding(
                "disk",
                "error",
                f"{folder} cannot be written to: its file system is read-only, or you lack the permission",
                "make it writable (`mount`, `chmod`) before the next round",
            )
    free = shutil.disk_usage(workspace.layout.root).free
    level: Literal["ok", "warning"] = "ok" if free >= LOW_DISK_BYTES else "warning"
    yield Finding(
        "disk",
        level,
        f"{format_size(free)} free",
        "" if level == "ok" else "free some space before the next round",
    )


def check_lock(workspace: Workspace) -> Iterator[Finding]:
    """Report who holds the workspace's lock."""
    owner = holder(workspace.layout.lock)
    if owner:
        yield Finding(
            "lock", "ok", f"held by {owner.get('purpose')} (process {owner.get('pid')}) since {owner.get('since')}"
        )
    else:
        yield Finding("lock", "ok", "free")
