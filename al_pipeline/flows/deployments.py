"""Scheduled ticks: a work pool, a deployment, and an automation that marks runs without heartbeat as crashed.

`apply` creates all three on a workspace's own Prefect server. A team's server gets the deployment from `prefect.yaml`,
whose steps are `describe`, `rename` and `watch`.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema

from al_pipeline.errors import ServerFailed, UsageError
from al_pipeline.files import json_line, read_json, sha256_bytes
from al_pipeline.flows.rounds import al_round
from al_pipeline.logs import get_logger
from al_pipeline.servers.prefect_server import FLOW, deployment_name, is_our_deployment, pool_name
from al_pipeline.workspace.fingerprint import current_engine
from al_pipeline.workspace.identity import refuse_copy
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

_logger = get_logger(__name__)

ENTRYPOINT = "al_pipeline.flows.rounds.al_round"
WATCH = f"{FLOW}: a run without a heartbeat has crashed"
HEARTBEATS_MISSING = timedelta(seconds=90)
"""Three missing heartbeats (PREFECT_FLOWS_HEARTBEAT_FREQUENCY is 30 for our runs)."""

_ENDED = frozenset(f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed"))


def apply(workspace: Workspace, *, take_over: bool = False) -> bool:
    """Create or update pool, deployment, schedule and automation on the Prefect server that the environment names.

    Returns whether anything changed; what is up to date is not rewritten, so that scheduled runs stay. Raises
    UsageError if the server's deployment works in another clone of the workspace, unless `take_over`; ServerFailed
    if the server rejects a request or does not answer.
    """
    try:
        with get_client(sync_client=True) as client:
            _refuse_other_clone(client, workspace, take_over)
            changed = _apply_pool(client, workspace)
            changed = _apply_deployment(client, workspace) or changed
            changed = _remove_renamed(client, workspace) or changed
            changed = _apply_watch(client) or changed
            _logger.info("schedule, pool and watch: %s", "changed" if changed else "as they were")
            return changed
    except httpx.HTTPError as error:
        raise ServerFailed(f"Prefect did not accept the schedule: {_reason(error)}") from error


def describe() -> dict[str, Any]:
    """A step of `prefect.yaml`: the properties of the workspace that AL_WORKSPACE names. Raises CopiedWorkspace."""
    workspace = open_workspace(Path(os.environ.get("AL_WORKSPACE", ".")))
    refuse_copy(workspace.layout)
    schedule = workspace.params.schedule
    return {
        "id": workspace.id,
        "name": deployment_name(workspace),
        "root": str(workspace.layout.root),
        "command": _command(),
        "description": _description(),
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "active": schedule.active,
    }


def rename() -> dict[str, Any]:
    """A step of `prefect.yaml`: delete the deployment of an earlier version, whose name is the workspace's id alone."""
    workspace = open_workspace(Path(os.environ.get("AL_WORKSPACE", ".")))
    with get_client(sync_client=True) as client:
        try:
            client.delete_deployment(client.read_deployment_by_name(f"{FLOW}/{workspace.id}").id)
        except ObjectNotFound:
            return {"changed": False}
    return {"changed": True}


def watch() -> dict[str, Any]:
    """A step of `prefect.yaml`: create the automation that marks runs without heartbeat as crashed."""
    with get_client(sync_client=True) as client:
        return {"changed": _apply_watch(client)}


def _command() -> str:
    """The command of a run: this Python, in which the engine is installed; -P: files in the workspace shadow no module.

    With an explicit command, Prefect neither copies code nor searches a project in the run's working directory.
    """
    return shlex.join([sys.executable, "-P", "-m", "al_pipeline.flows.launch"])


def _description() -> str:
    """The deployment's description on Prefect's page, without the parameters, which the page shows separately."""
    return str(al_round.description).split("\n\nArgs:")[0]


def _apply_pool(client: SyncPrefectClient, workspace: Workspace) -> bool:
    """Create or update the work pool, which fixes the command and the workspace of its runs."""
    template = {
        "job_configuration": {
            "command": _command(),
            "env": {"AL_WORKSPACE": str(workspace.layout.root)},
            "working_dir": str(workspace.layout.root),
            "stream_output": True,
            "labels": {},
            "name": None,
        },
        "variables": {"type": "object", "properties": {}, "additionalProperties": False},
    }
    name = pool_name(workspace)
    try:
        if client.read_work_pool(name).base_job_template == template:
            return False
    except ObjectNotFound:
        pass
    pool = WorkPoolCreate(
        name=name, type="process", base_job_template=template, description="Ticks of one workspace (`al up`)"
    )
    client.create_work_pool(pool, overwrite=True)
    return True


def _apply_deployment(client: SyncPrefectClient, workspace: Workspace) -> bool:
    schedule = workspace.params.schedule
    wanted: dict[str, Any] = {
        "entrypoint": ENTRYPOINT,
        "work_pool_name": pool_name(workspace),
        "description": _description(),
        "parameter_openapi_schema": {**parameter_schema(al_round).model_dump(), "additionalProperties": False},
        "enforce_parameter_schema": True,
        "concurrency_limit": 1,
        "pull_steps": [],
        "job_variables": {},
        "parameters": {},
        "tags": [],
        "paused": False,
    }
    cron = CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    version = f"{current_engine()['version']}-{sha256_bytes(json_line(wanted).encode())[:12]}"
    known = _known(client, workspace)
    if known is not None and known.version == version and not known.paused:
        has = [(row.schedule, row.active) for row in known.schedules]
        if has == [(cron, schedule.active)]:
            return False
    client.create_deployment(
        flow_id=client.create_flow_from_name(FLOW),
        name=deployment_name(workspace),
        version=version,
        schedules=[DeploymentScheduleCreate(schedule=cron, active=schedule.active)],
        concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        **wanted,
    )
    return True


def _apply_watch(client: SyncPrefectClient) -> bool:
    """Create or update the automation: an unfinished run whose heartbeat has stopped is marked as crashed."""
    wanted = AutomationCore(
        name=WATCH,
        description="Worker and run were killed, or the machine lost power; the next tick resumes the work.",
        enabled=True,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *_ENDED},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": FLOW},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=HEARTBEATS_MISSING,
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                message="no heartbeat: its process has ended; the next tick finishes the job",
                force=False,
            )
        ],
    )
    known = client.read_automations_by_name(WATCH)
    for more in known[1:]:
        client.delete_automation(more.id)
    if not known:
        client.create_automation(wanted)
    elif _content(known[0]) == _content(wanted):
        return False
    else:
        client.update_automation(known[0].id, wanted)
    return True


def _content(automation: AutomationCore) -> dict[str, Any]:
    """An automation without the fields that the server adds."""
    found = AutomationCore.model_validate(automation.model_dump(include=set(AutomationCore.model_fields)))
    content: dict[str, Any] = found.model_dump(mode="json")
    for part in (content["trigger"], *content["actions"]):
        part.pop("id", None)
    for name in ("after", "expect", "for_each"):
        content["trigger"][name] = sorted(content["trigger"][name])
    return content


def _refuse_other_clone(client: SyncPrefectClient, workspace: Workspace, take_over: bool) -> None:
    try:
        template = client.read_work_pool(pool_name(workspace)).base_job_template
    except ObjectNotFound:
        return
    other = Path(template.get("job_configuration", {}).get("working_dir") or workspace.layout.root)
    known = read_json(Layout(other).marker, {})
    if other != workspace.layout.root and known.get("workspace_id") == workspace.id and not take_over:
        raise UsageError(
            f"scheduled ticks run in another clone of this workspace, {other}; `al schedule apply` here moves them to "
            f"{workspace.layout.root}"
        )


def _known(client: SyncPrefectClient, workspace: Workspace) -> DeploymentResponse | None:
    return next((one for one in _ours(client, workspace) if one.name == deployment_name(workspace)), None)


def _remove_renamed(client: SyncPrefectClient, workspace: Workspace) -> bool:
    """Delete deployments of earlier versions, or with the former name of the workspace's folder."""
    others = [one for one in _ours(client, workspace) if one.name != deployment_name(workspace)]
    for other in others:
        client.delete_deployment(other.id)
    return bool(others)


def _ours(client: SyncPrefectClient, workspace: Workspace) -> list[DeploymentResponse]:
    """The deployments of the workspace in its work pool, without other people's."""
    found = client.read_deployments(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool_name(workspace)])),
    )
    return [one for one in found if is_our_deployment(one.name, workspace.id)]


def _reason(error: httpx.HTTPError) -> str:
    """The server's error message, or the kind of connection error."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code}: {' '.join(error.response.text.split())[:300]}"
    return f"no answer ({type(error).__name__}); `al up` starts it"
