"""The tick as a Prefect flow: each step is a task with its own name in the run graph.

The workspace is the one that `AL_WORKSPACE` names (else the current folder). It is fixed by the deployment, not a
parameter of a run.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import httpx
from prefect import Task, flow, get_run_logger, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import CancelledRun
from prefect.states import Cancelled
from pydantic import Field

from al_pipeline.errors import ExternalServiceError, LabelStudioRefused, Locked, ServerFailed, UsageError
from al_pipeline.evaluation.figures import FIGURES
from al_pipeline.logs import record_from
from al_pipeline.operations.connect import connect
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.params import LOCAL, BatchSize, StrategyName, check_overrides, load_params
from al_pipeline.records import round_name
from al_pipeline.rounds.state_machine import Step
from al_pipeline.servers.prefect_server import is_our_deployment
from al_pipeline.workspace.home import restrict_umask
from al_pipeline.workspace.lock import holder
from al_pipeline.workspace.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from al_pipeline.operations.encoding import Shards

_SIZES = get_args(BatchSize)[1]
Size = Annotated[int, Field(ge=_SIZES.ge, le=_SIZES.le)]
"""The number of items in a batch, for Prefect, which describes and checks a run's parameters with pydantic."""

NETWORK = frozenset({Step.CONNECT, Step.RETIRE, Step.PUSH, Step.PULL, Step.AUDIT, Step.SYNC})
"""Steps with retries: they use the network, and a repeat is harmless."""


LISTENER: ContextVar[Callable[[str], None]] = ContextVar("listener", default=lambda _: None)
"""Callback of the command line, which gets the lines of the run's log."""

FINISHED: ContextVar[Callable[[TickReport], None]] = ContextVar("finished", default=lambda _: None)
"""Callback that gets the tick's report before Prefect does."""


def run_round(options: Options, on_progress: Callable[[str], None]) -> TickReport:
    """Run the flow in this process, for the command line; `on_progress` gets the lines of the run's log.

    Raises the AlErrors of the tick, Locked if another tick runs, ServerFailed if Prefect's server fails before
    the tick has finished. A later failure of the server is a warning.
    """
    done: list[TickReport] = []
    LISTENER.set(on_progress)
    FINISHED.set(done.append)
    try:
        al_round(options.close_now, options.accept_vanished, options.size, options.strategy)
    except CancelledRun as error:
        raise Locked(str(error)) from None
    except httpx.HTTPError as error:
        failed = f"the workspace's Prefect server does not answer ({type(error).__name__}); `al up` restarts it"
        if not done:
            raise ServerFailed(f"{failed}. The next `al round` completes the work") from error
        return replace(done[0], warnings=(*done[0].warnings, f"{failed}. Its page does not show how this run ended"))
    return done[0]


@flow(name="al-round", persist_result=False, validate_parameters=True)
def al_round(
    close_now: bool = False,
    accept_vanished: bool = False,
    size: Size | None = None,
    strategy: StrategyName | str | None = None,
) -> TickReport | State[Any]:
    """Run one tick of the workspace: pull answers, close and build the round if it is full, push the next questions.

    A run that starts while another tick runs is cancelled, with a message that names that tick; nothing is lost.
    Prefect offers al-pipeline's own strategies; the run checks any other name, as `al round --strategy` does.

    Args:
        close_now: Close the open round with its answers so far.
        accept_vanished: Accept a large number of deleted annotations.
        size: Size of the batch that this tick selects; empty for the value in params.yaml.
        strategy: Query strategy of that batch, as params.yaml takes it; empty for the one there.
    """
    restrict_umask()
    gc.set_threshold(50_000, 20, 20)  # as the command line does: answers by the ten thousand are no garbage
    check_overrides(size, strategy)
    workspace = _workspace()
    logger, listen = get_run_logger(), LISTENER.get()
    record_from(logging.getLogger("prefect.extra").getEffectiveLevel())  # Prefect gives an extra logger no level

    def on_progress(line: str) -> None:
        logger.info(line)
        listen(line)

    try:
        report = tick(
            workspace,
            lambda: connect(workspace),
            run=partial(_run_step, workspace),
            options=Options(close_now, accept_vanished, size, strategy),
            on_progress=on_progress,
            purpose=f"a tick, Prefect flow run {runtime.flow_run.name}",
            run_shards=_run_shards,
        )
    except Locked as error:
        if holder(workspace.layout.lock).get("host", socket.gethostname()) != socket.gethostname():
            raise  # a lock held on another machine needs a person's decision
        return Cancelled(message=str(error))
    FINISHED.get()(report)
    try:
        _artifact(workspace, report)
    except httpx.HTTPError as error:
        logger.warning("Prefect did not accept the run's table (%s)", type(error).__name__)
    return report


def _workspace() -> Workspace:
    """The workspace of this process. Raises UsageError if the run's deployment is for another one."""
    workspace = open_workspace(Path(os.environ.get("AL_WORKSPACE", ".")))
    served = runtime.deployment.name
    if served is not None and not is_our_deployment(served, workspace.id):
        raise UsageError(
            f"this deployment is for workspace {served}, but {workspace.layout.root} is workspace {workspace.id}; a "
            "run cannot choose its workspace, so do not change its job variables"
        )
    return workspace


def _is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether an external service failed without refusing the request: other errors would recur."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, ExternalServiceError) and not isinstance(error, LabelStudioRefused)


@task(
    persist_result=False,
    cache_policy=NO_CACHE,
    retry_delay_seconds=[2, 10],
    retry_jitter_factor=0.3,
    retry_condition_fn=_is_transient,
)
def step(action: Callable[[], Any]) -> Any:
    """One step of a tick; Prefect shows it under the step's name."""
    return action()


def as_task(name: str, action: Callable[[], Any], /) -> Any:
    """Run a step as a Prefect task."""
    return step.with_options(name=name, task_run_name=name, retries=2 if name in NETWORK else 0)(action)


def _run_step(workspace: Workspace, name: str, action: Callable[[], Any], /) -> Any:
    """Run a step as a Prefect task; if a cluster encodes, its flow run takes the place of that step's task.

    Tasks on a cluster get the context of the task around them, with its parameters, which are our state.
    """
    if name == Step.ENCODE and load_params(workspace.layout.params).engine != LOCAL:
        return action()
    return as_task(name, action)


def _run_shards(shards: Shards) -> None:
    from al_pipeline.flows.encoding import run_shards  # most ticks encode nothing

    run_shards(shards)


def _artifact(workspace: Workspace, report: TickReport) -> None:
    """Store the state of the workspace as a table artifact; one key for all runs, so that Prefect shows a history."""
    found = status(workspace, ask=False)
    rows = [("state", found.state), ("next", found.next), ("promoted", found.promoted or "none yet")]
    rows += [(name, f"{getattr(found, name):,}") for name in ("pool", "labelled", "pending", "ignored", "unlabelled")]
    figures = {name: found.metrics.figure(name).value for name in FIGURES} if found.metrics else {}
    rows += [(name, f"{value:.4f}") for name, value in figures.items() if value is not None]
    rows += [(f"budget: {one.what}", one.sentence) for one in found.budget]
    rows += [("forecast", found.outlook.sentence())] if found.outlook else []
    rows += [("proposal", found.proposal.sentence())] if found.proposal else []
    rows += [("drift", found.drift.sentence(words=False))] if found.drift else []
    rows += [(f"seconds: {name}", f"{seconds:.2f}") for name, seconds in report.steps]
    page = workspace.layout.reports / f"{round_name((found.round or 0) - 1)}.html"
    where = f"[report]({page.as_uri()})" if page.exists() else "`al report` renders the report"
    open_round = "no round is open" if report.round is None else f"round {report.round} is open"
    create_table_artifact(
        key=f"workspace-{workspace.id}",
        table=[{"what": name, "value": str(value)} for name, value in rows],
        description=f"{workspace.layout.root.name} after this tick: {open_round}; {where}",
    )
