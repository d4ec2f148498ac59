"""Checks of Label Studio and Prefect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.connect import connect, stored_project
from al_pipeline.operations.schedule import read_schedule
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

CLOCK_TOLERANCE_SECONDS = 60.0
LABEL_STUDIO = (1, 23)
"""The oldest server version that this engine was tested with."""


def check_label_studio(workspace: Workspace) -> Iterator[Finding]:
    """Check Label Studio's version and clock, and whether the project is ours."""
    with closing(connect(workspace)) as oracle:
        yield from _label_studio_at(workspace, oracle)


def _label_studio_at(workspace: Workspace, oracle: LabelStudioOracle) -> Iterator[Finding]:
    about = oracle.about()
    yield Finding("Label Studio", "ok", f"version {about.version} at {oracle.url}, as {about.user}")
    numbers = tuple(int(part) for part in about.version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < LABEL_STUDIO:
        yield Finding(
            "Label Studio",
            "warning",
            f"version {about.version} is older than any tested version",
            "upgrade to 1.23 or newer",
        )
    if about.clock_ahead is not None and abs(about.clock_ahead) > CLOCK_TOLERANCE_SECONDS:
        yield Finding(
            "clock",
            "warning",
            f"Label Studio's clock differs by {about.clock_ahead:+.0f} s",
            "synchronise both machines with NTP",
        )
    else:
        yield Finding("clock", "ok", "agrees with Label Studio's")
    known = stored_project(workspace.layout)
    if known:
        oracle.check(known, workspace.id, workspace.clone_id)
        yield Finding("project", "ok", f"project {known.project_id} belongs to this workspace")
    else:
        yield Finding("project", "ok", "none yet; the first `al round` creates one")


def check_schedule(workspace: Workspace) -> Iterator[Finding]:
    """Check that Prefect runs what `params.yaml` schedules."""
    found = read_schedule(workspace)
    says = f"{found.wanted.cron} {found.wanted.timezone}"
    if found.server is None:
        off = "" if found.wanted.active else " (off)"
        yield Finding(
            "schedule",
            "ok",
            f"{says}{off}; no Prefect server of its own is up, so no tick runs",
        )
    elif found.deployment is None:
        yield Finding("schedule", "warning", f"{says} has never been applied in Prefect", "`al schedule apply`")
    elif found.differs:
        yield Finding("schedule", "warning", "; ".join(found.differs), "`al schedule apply`, or change params.yaml")
    elif not found.worker:
        yield Finding("schedule", "warning", "no worker picks up scheduled ticks", "`al up` starts it")
    elif not found.wanted.active:
        yield Finding("schedule", "ok", "off, as in Prefect")
    else:
        yield Finding("schedule", "ok", f"{says}, as in Prefect; next run {found.next_run or 'not yet set'}")
