"""Checks of Label Studio, Prefect, and the cluster of `engine.runner`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from al_pipeline.errors import ExternalServiceError
from al_pipeline.integrations.dask_cluster import count_workers
from al_pipeline.integrations.prefect_settings import API_URL
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.clusters import CLUSTERS, no_address, not_installed
from al_pipeline.operations.connect import connect, stored_project
from al_pipeline.operations.costs import budget_uses
from al_pipeline.operations.notify import list_services, outbox_of
from al_pipeline.operations.schedule import read_schedule
from al_pipeline.sanitize import counted, redact
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.integrations.label_studio.client import LabelStudioOracle

CLOCK_TOLERANCE_SECONDS = 60.0
_CLUSTER_SECONDS = 5.0
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
            f"{says}{off}; no Prefect server of its own is up, and neither PREFECT_API_URL nor Prefect's active "
            "profile names one, so no tick is known to run (one of cron's or of a Prefect elsewhere is not seen here)",
        )
        return
    where = f"Prefect at {found.server}" if found.elsewhere else "Prefect"
    if found.problem:
        fix = "set PREFECT_API_URL to your team's server, or unset it"
        if found.source != API_URL:
            fix = f"that address is of {found.source}: `prefect config set PREFECT_API_URL=URL` changes it"
        yield Finding("schedule", "warning", f"{found.problem}; so it is not known whether ticks run", fix)
    elif found.deployment is None:
        yield Finding("schedule", "warning", f"{says} has never been applied in {where}", found.fix)
    elif found.differs:
        yield Finding("schedule", "warning", "; ".join(found.differs), f"{found.fix}, or change params.yaml")
    elif not found.worker:
        yield Finding("schedule", "warning", "no worker picks up scheduled ticks", f"{found.start_worker} starts it")
    elif not found.wanted.active:
        yield Finding("schedule", "ok", f"off, as in {where}")
    else:
        yield Finding("schedule", "ok", f"{says}, as in {where}; next run {found.next_run or 'not yet set'}")


def check_notifications(workspace: Workspace) -> Iterator[Finding]:
    """Check that people can be told: services are set, Apprise knows them, and the last messages arrived."""
    events, services = workspace.params.notify.events, list_services(workspace)
    if not events or not services:
        why = "no service is set; `al notify add` stores one" if events else "notify.events in params.yaml is empty"
        yield Finding("notifications", "ok", f"nobody is told of anything: {why}")
        return
    fix = "`al notify test` says what it answers; `al notify remove` and `al notify add` replace it"
    for one in services:
        if one.kind is None:
            yield Finding("notifications", "error", f"service {one.service}: {one.answer}", fix)
    waiting = outbox_of(workspace).waiting
    refusing = sorted({name for entry in waiting for name, sent in entry.deliveries.items() if not sent.delivered})
    for name in refusing:
        yield Finding("notifications", "warning", f"service {name} did not take the newest messages", fix)
    kinds = ", ".join(one.kind for one in services if one.kind)
    yield Finding("notifications", "ok", f"told by {kinds or 'no service'}: {', '.join(events)}")


def check_budget(workspace: Workspace) -> Iterator[Finding]:
    """Check that what is spent of the budget is known; nothing without a budget."""
    for one in budget_uses(workspace.layout, workspace.params.budget):
        if one.spent is None:
            fix = (
                "people who answer on Label Studio's page have times; set budget.labels if they answer through its API"
            )
            yield Finding("budget", "warning", f"{one.sentence()}, so it limits nothing", fix)
        else:
            yield Finding("budget", "ok", one.sentence())


def check_cluster(workspace: Workspace) -> Iterator[Finding]:
    """Check that the cluster of `engine.runner` is named and listens, and that one of Dask has workers."""
    runner = workspace.params.engine.runner
    if runner not in CLUSTERS:
        return
    cluster = CLUSTERS[runner]
    if missing := [name for name in cluster.packages if find_spec(name) is None]:
        yield Finding("cluster", "error", not_installed(runner, f"no {missing[0]}"))
        return
    if not (address := os.environ.get(cluster.variable, "")):
        yield Finding("cluster", "error", no_address(runner), f"set {cluster.variable}")
        return
    place = redact(address)
    fix = f"start it, or correct {cluster.variable}, or set engine.runner: local in params.yaml"
    try:
        host, port = _host_of(address)
    except ValueError:
        yield Finding(
            "cluster", "error", f"{cluster.variable} is not an address such as {cluster.example}: {place}", fix
        )
        return
    try:
        with socket.create_connection((host, port), _CLUSTER_SECONDS):
            pass
        workers = count_workers(address) if runner == "dask" else None
    except (OSError, ExternalServiceError) as error:
        why = getattr(error, "strerror", None) or str(error)
        yield Finding("cluster", "error", f"the {runner} cluster at {place} cannot be reached: {why}", fix)
        return
    if workers is None:  # Ray answers only a client that has joined it
        yield Finding("cluster", "ok", f"the {runner} cluster at {place} takes connections")
    elif not workers:
        yield Finding(
            "cluster",
            "warning",
            f"the {runner} cluster at {place} has no workers: a tick that has texts to encode waits for one",
            f"`dask worker {place}` on each of its machines starts one, unless your cluster starts them when needed",
        )
    else:
        yield Finding("cluster", "ok", f"the {runner} cluster at {place} has {counted(workers, 'worker')}")


def _host_of(address: str) -> tuple[str, int]:
    """Host and port of an address such as `tcp://host:8786`. Raises ValueError if it is none."""
    found = urlsplit(address if "://" in address else f"//{address}")
    if not found.hostname or not found.port:
        raise ValueError(address)
    return found.hostname, found.port
