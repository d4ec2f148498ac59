"""The tick as a Prefect flow: each step is a task with its name, so that the run graph shows the whole chain.

The workspace is the one that `AL_WORKSPACE` names (else the current folder): fixed where the flow is served, no
parameter of a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from al_pipeline.errors import LabelStudioRefused, WorldError
from al_pipeline.lifecycle import Step
from al_pipeline.operations.connect import connect
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.workspace import Workspace, open_workspace

NETWORK = frozenset({Step.CONNECT, Step.RETIRE, Step.PUSH, Step.PULL, Step.AUDIT, Step.SYNC})
"""Steps that may be tried again at once: a repeat is harmless, and the other side may be back."""


LISTENER: ContextVar[Callable[[str], None]] = ContextVar("listener", default=lambda _: None)
"""Whoever waits for the run in a terminal; gets what goes to the run's log."""


@flow(name="al-round", persist_result=False, validate_parameters=True)
def al_round(close_now: bool = False, accept_vanished: bool = False) -> TickReport:
    """Run one tick of the workspace: pull answers, close and build the round if it is full, push the next questions.

    close_now: close the open round with the answers there are.
    accept_vanished: believe Label Studio although many answers vanished.
    """
    workspace = open_workspace(Path(os.environ.get("AL_WORKSPACE", ".")))
    logger, listen = get_run_logger(), LISTENER.get()

    def say(line: str) -> None:
        logger.info(line)
        listen(line)

    report = tick(
        workspace,
        lambda: connect(workspace),
        run=as_task,
        options=Options(close_now=close_now, accept_vanished=accept_vanished),
        say=say,
    )
    _artifact(workspace, report)
    return report


def as_task(name: str, action: Callable[[], Any], /) -> Any:
    """Take a step as a Prefect task of its own."""
    network = name in NETWORK
    step: Task[[], Any] = Task(
        action,
        name=name,
        task_run_name=name,
        persist_result=False,
        cache_policy=NO_CACHE,
        retries=2 if network else 0,
        retry_delay_seconds=[2, 10],
        retry_jitter_factor=0.3,
        retry_condition_fn=_may_come_right,
    )
    return step()


def _may_come_right(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether the world outside failed and did not refuse: all else fails again in the same way."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, WorldError) and not isinstance(error, LabelStudioRefused)


def _artifact(workspace: Workspace, report: TickReport) -> None:
    """The run's figures, where people look at the run."""
    found = status(workspace)
    rows = [("state", found["state"]), ("next", found["next"]), ("promoted", found["promoted"] or "none yet")]
    rows += [(name, f"{found[name]:,}") for name in ("pool", "labelled", "pending", "ignored", "unlabelled")]
    rows += [(name, f"{value:.4f}") for name, value in found["metrics"].items() if value is not None]
    rows += [(f"seconds: {name}", f"{seconds:.2f}") for name, seconds in report.steps]
    table = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows)
    number = "none" if report.round is None else f"{report.round:04d}"
    create_markdown_artifact(
        key=f"round-{number}",
        markdown=f"| | |\n|---|---|\n{table}\n",
        description=f"The workspace after this tick: round {number}",
    )
