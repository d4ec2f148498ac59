"""The tick as a Prefect flow: each step is a task with its name, so that the run graph shows the whole chain.

The workspace is the one that `AL_WORKSPACE` names (else the current folder): fixed where the flow is served, no
parameter of a run.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from prefect import Task, flow, get_run_logger, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import CancelledRun
from prefect.states import Cancelled

from al_pipeline.errors import ExternalServiceError, LabelStudioRefused, Locked, ServerFailed, UsageError
from al_pipeline.evaluation.figures import FIGURES
from al_pipeline.logs import record_from
from al_pipeline.operations.connect import connect
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.params import BatchSize, StrategyName
from al_pipeline.records import round_name
from al_pipeline.rounds.state_machine import Step
from al_pipeline.servers.prefect_server import is_our_deployment
from al_pipeline.workspace.home import restrict_umask
from al_pipeline.workspace.lock import holder
from al_pipeline.workspace.workspace import Workspace, open_workspace

NETWORK = frozenset({Step.CONNECT, Step.RETIRE, Step.PUSH, Step.PULL, Step.AUDIT, Step.SYNC})
"""Steps that may be tried again at once: a repeat is harmless, and the other side may be back."""


LISTENER: ContextVar[Callable[[str], None]] = ContextVar("listener", default=lambda _: None)
"""Whoever waits for the run in a terminal; gets what goes to the run's log."""

FINISHED: ContextVar[Callable[[TickReport], None]] = ContextVar("finished", default=lambda _: None)
"""Who waits for the tick's report, which is there before Prefect was told of it."""


def run_round(options: Options, on_progress: Callable[[str], None]) -> TickReport:
    """The flow as the command line calls it, in this process; `on_progress` gets what goes to the run's log.

    Raises AlError: what the tick raises, Locked where another tick works, ServerFailed where Prefect went away before
    the tick could begin. Where it goes away later the tick does not mind: it has no need of it.
    """
    done: list[TickReport] = []
    LISTENER.set(on_progress)
    FINISHED.set(done.append)
    try:
        al_round(options.close_now, options.accept_vanished, options.size, options.strategy)  # type: ignore[arg-type]
    except CancelledRun as error:
        raise Locked(str(error)) from None
    except httpx.HTTPError as error:
        gone = f"the workspace's Prefect server went away ({type(error).__name__}), and `al up` starts it again"
        if not done:
            raise ServerFailed(f"{gone}; the next `al round` finishes the job") from error
        return replace(done[0], warnings=(*done[0].warnings, f"{gone}: its page does not show how this run ended"))
    return done[0]


@flow(name="al-round", persist_result=False, validate_parameters=True)
def al_round(
    close_now: bool = False,
    accept_vanished: bool = False,
    size: BatchSize | None = None,
    strategy: StrategyName | None = None,
) -> TickReport | State[Any]:
    """Run one tick of the workspace: pull answers, close and build the round if it is full, push the next questions.

    A run that comes while another tick works is cancelled and says who works: nothing went wrong, and nothing is lost.

    Args:
        close_now: Close the open round with the answers there are.
        accept_vanished: Believe Label Studio although many answers vanished.
        size: How many items the batch that this tick selects asks about; empty for what params.yaml says.
        strategy: Which query strategy selects that batch; empty for the one that params.yaml names.
    """
    restrict_umask()
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
            run=as_task,
            options=Options(close_now, accept_vanished, size, strategy),
            on_progress=on_progress,
            purpose=f"a tick, Prefect's run {runtime.flow_run.name}",
        )
    except Locked as error:
        if holder(workspace.layout.lock).get("host", socket.gethostname()) != socket.gethostname():
            raise  # it does not come right by itself: a person must look
        return Cancelled(message=str(error))
    FINISHED.get()(report)
    try:
        _artifact(workspace, report)
    except httpx.HTTPError as error:
        logger.warning("Prefect did not take the run's figures (%s)", type(error).__name__)
    return report


def _workspace() -> Workspace:
    """The workspace that this process works in. Raises UsageError where the run's deployment is for another."""
    workspace = open_workspace(Path(os.environ.get("AL_WORKSPACE", ".")))
    served = runtime.deployment.name
    if served is not None and not is_our_deployment(served, workspace.id):
        raise UsageError(
            f"this deployment is for the workspace {served}, and {workspace.layout.root} is {workspace.id}; a run "
            "cannot choose its workspace, so leave its job variables alone"
        )
    return workspace


def _may_come_right(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether the world outside failed and did not refuse: all else fails again in the same way."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, ExternalServiceError) and not isinstance(error, LabelStudioRefused)


@task(
    persist_result=False,
    cache_policy=NO_CACHE,
    retry_delay_seconds=[2, 10],
    retry_jitter_factor=0.3,
    retry_condition_fn=_may_come_right,
)
def step(action: Callable[[], Any]) -> Any:
    """One step of a tick; Prefect shows it under the step's name."""
    return action()


def as_task(name: str, action: Callable[[], Any], /) -> Any:
    """Take a step as a Prefect task of its own."""
    return step.with_options(name=name, task_run_name=name, retries=2 if name in NETWORK else 0)(action)


def _artifact(workspace: Workspace, report: TickReport) -> None:
    """The workspace after this run, as a table under one key for all its runs: Prefect shows its history."""
    found = status(workspace, ask=False)
    rows = [("state", found.state), ("next", found.next), ("promoted", found.promoted or "none yet")]
    rows += [(name, f"{getattr(found, name):,}") for name in ("pool", "labelled", "pending", "ignored", "unlabelled")]
    figures = {name: found.metrics.figure(name).value for name in FIGURES} if found.metrics else {}
    rows += [(name, f"{value:.4f}") for name, value in figures.items() if value is not None]
    rows += [(f"seconds: {name}", f"{seconds:.2f}") for name, seconds in report.steps]
    page = workspace.layout.reports / f"{round_name((found.round or 0) - 1)}.html"
    where = f"[report]({page.as_uri()})" if page.exists() else "`al report` renders the report"
    open_round = "no round is open" if report.round is None else f"round {report.round} is open"
    create_table_artifact(
        key=f"workspace-{workspace.id}",
        table=[{"what": name, "value": str(value)} for name, value in rows],
        description=f"{workspace.layout.root.name} after this tick: {open_round}; {where}",
    )
