"""One tick: read the facts, take the steps that are possible, end. Idempotent.

The CLI, the Prefect flow and the tests all call `tick`; the flow passes a `run` that makes each step a task of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msgspec.structs import replace

from al_pipeline.errors import NothingToDo
from al_pipeline.files import bound_log, remove_leftovers
from al_pipeline.integrations import processes as child
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import Oracle
from al_pipeline.logs import get_logger
from al_pipeline.operations import build, publish
from al_pipeline.operations.checkout import check_not_ignored, check_ready
from al_pipeline.operations.facts import check_owned, closing_rule, facts_at, open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.operations.intervene import finish_intervention
from al_pipeline.operations.notify import failures_told, tell_closed, tell_outcome
from al_pipeline.operations.schema import check_schema, schema_news
from al_pipeline.operations.steps.closing import close_round, ingest_sources, override_build
from al_pipeline.operations.steps.context import Context
from al_pipeline.operations.steps.label_studio import connect, pull_answers, push_plan, retire_tasks
from al_pipeline.operations.steps.publishing import build_step, decide, publish_round, sync, tag
from al_pipeline.rounds.state_machine import BUILD, Facts, State, Step, Wait, next_step, state
from al_pipeline.workspace.home import fork_servers, private_folder
from al_pipeline.workspace.identity import check_identity
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.operations.encoding import ShardRunner

_logger = get_logger(__name__)

STEPS: dict[Step, Callable[[Context, Facts], None]] = {
    Step.INGEST: ingest_sources,
    Step.CONNECT: connect,
    Step.RETIRE: retire_tasks,
    Step.PUSH: push_plan,
    Step.PULL: pull_answers,
    Step.AUDIT: partial(pull_answers, audit=True),
    Step.CLOSE: close_round,
    **{step: partial(build_step, step=step) for step in BUILD},
    Step.DECIDE: decide,
    Step.PUBLISH: publish_round,
    Step.TAG: tag,
    Step.SYNC: sync,
}
"""The function of each step. `rounds/state_machine.py` decides when a step is taken."""

_BEFORE_STAGES = frozenset({Step.AUDIT, Step.CLOSE, *BUILD})
"""Steps soon after which stages run."""
_ROUTINE = frozenset({Step.INGEST, Step.CONNECT, Step.RETIRE, Step.PUSH, Step.PULL, Step.AUDIT, Step.SYNC})
"""Steps of every tick, which usually find nothing to do."""


class Runner(Protocol):
    """Runs a step by calling `action`; `name` is the step's name."""

    def __call__(self, name: str, action: Callable[[], Any], /) -> Any: ...


def call(name: str, action: Callable[[], Any], /) -> Any:
    """Call `action` directly: the runner of the CLI and the tests."""
    return action()


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a single tick."""

    close_now: bool = False
    accept_vanished: bool = False
    size: int | None = None
    strategy: str | None = None
    """`size` and `strategy` of this tick's batch; None: as in `params.yaml`. Checked by `params.check_overrides`."""

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings of the batch, as stored in `rounds/overrides.json`."""
        return {name: value for name in ("size", "strategy") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class TickReport:
    """What a tick did, and what the round waits for."""

    round: int | None
    state: State
    waits_for: str
    steps: tuple[tuple[str, float], ...]
    """The steps taken, each with its duration in seconds."""
    published: tuple[int, ...]
    """Rounds whose tags this tick made."""
    pulled: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    changed: bool = True
    """Whether the tick changed anything (an answer, a task, a build step) rather than only checking."""


def tick(
    workspace: Workspace,
    make_oracle: Callable[[], Oracle],
    *,
    run: Runner = call,
    options: Options | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    on_progress: Callable[[str], None] = lambda _: None,
    purpose: str = "a tick",
    run_shards: ShardRunner | None = None,
) -> TickReport:
    """Take every step that is possible for the open round, then end. Raises AlError; completed steps stay done.

    `make_oracle` connects to Label Studio and is called only by a tick that needs it; `on_progress` gets lines of
    progress; `purpose` describes this tick to processes that find the lock held; `run_shards` carries shards to
    the cluster of `engine.runner`. Raises NothingToDo at the end if `options` has settings for a batch and none was
    selected.
    """
    layout, git, options = workspace.layout, Git(workspace.layout.root), options or Options()
    with (
        locked(layout.lock, purpose),
        failures_told(workspace, run),
        open_dvc(layout) as dvc,
        ExitStack() as connections,
    ):
        if _prepare(workspace, git, dvc):
            workspace.forget_params()
        context = Context(
            workspace,
            git,
            dvc,
            history=read_history(layout, git),
            connect=lambda: connections.enter_context(closing(make_oracle())),
            now=now,
            on_progress=on_progress,
            overrides=options.overrides,
            accept_vanished=options.accept_vanished,
            run_shards=run_shards,
        )
        _check(context)
        override_build(context)
        facts, wait = _take_steps(context, run, options.close_now)
        if layout.traffic.exists():  # few workspaces are served and keep requests
            from al_pipeline.operations.drift_looks import look_at_requests

            context.outcome.warnings += look_at_requests(workspace, now().timestamp(), run)
        tell_outcome(context, facts, run)
        return _report(context, facts, wait, options)


def _prepare(workspace: Workspace, git: Git, dvc: Dvc) -> bool:
    """End processes and remove files that a killed tick left, and finish an intervention that was begun.

    Returns whether there was such an intervention.
    """
    layout = workspace.layout
    check_identity(layout)
    dvc.end_previous()
    private_folder(layout.inbox)
    dvc.keep_state_private()
    workspace.make_home()
    child.end_remembered(layout.encoding)
    child.end_remembered(layout.looking)
    of_servers = (*workspace.home.glob("*/server.log"), *fork_servers(workspace.id).glob("*/server.log"))
    for log in (*layout.logs.glob("*.log"), *of_servers):
        bound_log(log)
    of_rounds = (layout.rounds, layout.private / "rounds")
    written = [one for folder in of_rounds for one in sorted(folder.glob("[0-9]*"))[-2:]]  # still written to
    remove_leftovers(
        *(layout.root, *_private_folders(layout), *of_rounds, *written, layout.root / "data"),
        *(*layout.sources, layout.inbox_events),
    )
    check_ready(layout, git)
    check_not_ignored(layout, git)
    return finish_intervention(layout, git)


def _private_folders(layout: Layout) -> Iterator[Path]:
    """The folders below `.al`, without those of the rounds, which only grow in number."""
    for folder, inner, _ in os.walk(layout.private):
        yield Path(folder)
        inner[:] = [name for name in inner if name != "rounds"]


def _check(context: Context) -> None:
    """Raise if files that the engine owns were changed, or the schema is no valid successor of the published one."""
    check_owned(context.workspace, context.git, context.dvc, context.history, context.now())
    check_schema(context.workspace, context.history)
    if news := schema_news(context.workspace, context.history):
        context.outcome.warnings.append(news)


def _take_steps(context: Context, run: Runner, close_now: bool) -> tuple[Facts, Wait]:
    """Take one step after the other until none is possible; return the last facts and what the round waits for."""
    rule, told = closing_rule(context.workspace), False
    while not isinstance(step := next_step(facts := _facts(context, close_now), rule), Wait):
        if facts.closed and not told:
            told = True
            tell_closed(context, facts, run)
        context.on_progress(_announcement(step, facts))
        context.taken.begin(step, facts)
        if step in _BEFORE_STAGES or (step is Step.PULL and context.queue_is_empty):
            context.dvc.expect_stages()
        begin = time.perf_counter()
        run(str(step), partial(STEPS[step], context, facts))
        seconds = time.perf_counter() - begin
        context.outcome.steps.append((step, seconds))
        _logger.info("%s took %.2f s", _announcement(step, facts), seconds)
        context.taken.done.add(step)
        if step in BUILD:
            build.record_built(context.layout, step, seconds)
    return facts, step


def _facts(context: Context, close_now: bool) -> Facts:
    """Read the facts that decide the next step. A build that another engine began starts over here."""
    found = facts_at(context.workspace, context.git, context.history, context.now())
    if found.closed and build.refresh_engine(context.layout, context.workspace.params):
        context.on_progress("this is not the engine that the build began with: the build starts over")
        found = facts_at(context.workspace, context.git, context.history, context.now())
    return replace(
        found,
        done=frozenset(context.taken.done),
        close_requested=close_now,
        unsynced=publish.unsynced(context.git, context.layout),
    )


def _announcement(step: Step, facts: Facts) -> str:
    number = facts.untagged if step is Step.TAG else facts.planned
    return f"{'first build' if number is None else f'round {number}'}: {step}"


def _report(context: Context, facts: Facts, wait: Wait, options: Options) -> TickReport:
    """Make the report of the tick. Raises NothingToDo if settings for a batch had no effect."""
    outcome = context.outcome
    if options.overrides and not outcome.selected:
        raise NothingToDo(
            f"this tick selected no batch, so {' and '.join(options.overrides)} had no effect: {wait.reason}. Use it "
            "with the tick that closes the round (`--close-now` closes it with the answers received so far)"
        )
    if options.close_now and not outcome.published and Step.CLOSE not in context.taken.done:
        outcome.warnings.append(f"nothing was closed: {facts.paused or 'there are no new answers to close it with'}")
    for warning in outcome.warnings:
        _logger.warning("%s", warning)
    _logger.info("waits for: %s", wait.reason)
    return TickReport(
        context.history.planned,
        state(facts),
        wait.reason,
        tuple((str(step), seconds) for step, seconds in outcome.steps),
        tuple(outcome.published),
        dict(outcome.pulled),
        dict(outcome.refused),
        tuple(outcome.warnings),
        changed=outcome.changed or any(step not in _ROUTINE for step, _ in outcome.steps),
    )
