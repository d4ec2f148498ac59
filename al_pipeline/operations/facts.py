"""Read the facts that decide a round's next step from the workspace, git and DVC; open DVC for a workspace.

This layer lies below the other operations and never contacts Label Studio. `al status` and `al doctor` use no other
code of a tick.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from al_pipeline.annotation.tasks import standing_of
from al_pipeline.data.ledger import known_ids, read_events, signature
from al_pipeline.data.pool import count_items
from al_pipeline.files import read_object
from al_pipeline.integrations.git import Git
from al_pipeline.live.plan import is_live
from al_pipeline.operations import build
from al_pipeline.operations.checkout import check_tags, put_back_converted
from al_pipeline.operations.close import check_sources, foreign_edits, is_closed, pull_missing_sources, refuse_edits
from al_pipeline.operations.costs import budget_reached, room_in_budget
from al_pipeline.operations.counting import corrected_texts, counted_events
from al_pipeline.operations.history import History, all_plans, read_history
from al_pipeline.operations.overlap import forecasts_at_close, more_answers
from al_pipeline.operations.proposal import stopped
from al_pipeline.params import load_overrides
from al_pipeline.records import PlannedTask, round_name
from al_pipeline.rounds.state_machine import Closing, Facts
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.integrations.dvc.session import Dvc


def open_dvc(layout: Layout) -> Dvc:
    """DVC for a workspace, with the environment variables that stages need."""
    from al_pipeline.integrations.dvc.session import Dvc
    from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT

    return Dvc(layout.root, layout.dvc_process, layout.logs / "dvc.log", dict(STAGE_ENVIRONMENT))


def closing_rule(workspace: Workspace) -> Closing:
    """The rule by which rounds of this workspace close."""
    params = workspace.params.round
    return Closing(params.quorum, params.deadline_days, params.min_labels)


def read_facts(workspace: Workspace, now: datetime | None = None) -> tuple[Facts, History]:
    """The facts and history that a tick would start from; writes nothing and contacts no server."""
    layout = workspace.layout
    git = Git(layout.root)
    history = read_history(layout, git)
    return facts_at(workspace, git, history, now or datetime.now(UTC)), history


def facts_at(workspace: Workspace, git: Git, history: History, now: datetime) -> Facts:
    """The facts at time `now`, given the workspace's history."""
    layout = workspace.layout
    planned = history.planned
    incoming = count_items([layout.inbox_pool])
    tags = git.tags() if history.rounds else {}
    untagged = next((r.round for r in history.rounds if round_name(r.round) not in tags), None)
    closed = is_closed(layout, planned)
    decided = False
    if closed:
        decided = build.is_decided(layout, *layout.decision(planned))
    carried = set(load_overrides(layout.overrides).interventions) if closed else set()
    waiting = {intervention.number for intervention in history.waiting}
    found = Facts(
        items=incoming + _published_items(layout, history),
        incoming=incoming,
        planned=planned,
        untagged=untagged,
        amend=not waiting <= carried,
        amending=bool(carried),
        paused=history.pausing.sentence() if history.pausing else "",
        live=is_live(workspace),
    )
    if planned is None or closed:
        return replace(found, closed=closed, built=build.built(layout), decided=decided)
    tasks = history.open_tasks()
    if planned == 0 and not tasks and history.genesis is not None and history.genesis.counts.labelled:
        return replace(found, brought=history.genesis.counts.labelled)
    params = workspace.params
    more = more_answers(layout, params, tasks, partial(forecasts_at_close, layout, history, partial(all_plans, git)))
    settled, new_labels = _progress(
        signature(layout.events, layout.inbox_events),
        layout,
        tuple(tasks),
        params.round.overlap,
        len(params.annotators) or None,
        tuple(more.items()),
    )
    opened = datetime.fromtimestamp(opened_at(layout, git, planned), UTC)
    return replace(
        found,
        tasks=len(history.batch()),
        settled=settled,
        new_labels=new_labels,
        asked_again=len(more),
        budget=budget_reached(layout, params.budget),
        stopped=stopped(history, params),
        room=room_in_budget(layout, params.budget),
        age_days=max(0.0, (now - opened).total_seconds() / 86_400),
    )


def _published_items(layout: Layout, history: History) -> int:
    """The size of the pool: counted from its parts before the first record, then taken from the newest record.

    During a close the pool may hold a new part that the record does not count; nothing needs the number then.
    """
    if history.latest is None:
        return count_items([layout.pool])
    return history.latest.counts.pool


@lru_cache(maxsize=1)
def _progress(
    _events: tuple[tuple[str, int, int], ...],
    layout: Layout,
    tasks: tuple[PlannedTask, ...],
    overlap: int,
    everybody: int | None,
    more: tuple[tuple[str, int], ...],
) -> tuple[int, int]:
    """How many of a round's tasks are answered or given up, and how many items the inbox has new labels of.

    Kept for the next call with the same events, whose `signature` is given: a tick asks before each of its steps.
    """
    both = layout.events, layout.inbox_events
    counted = counted_events(*both).events
    settled = sum(value != "open" for value in standing_of(tasks, counted, overlap, everybody, dict(more)).values())
    known = known_ids(layout.events)
    fresh = {event.event_id for event in read_events(layout.inbox_events) if event.event_id not in known}
    if not fresh:
        return settled, 0
    news = {event.item_id for event in counted if event.label is not None and event.event_id in fresh}
    return settled, len(news - corrected_texts(*both).keys())


def opened_at(layout: Layout, git: Git, number: int) -> float:
    """The Unix time when round `number` opened: its first complete push, else the commit of its plan."""
    remembered = read_object(layout.state(number)).get("opened_at")
    if isinstance(remembered, int | float):
        return float(remembered)
    return float(git.commit_time(git.brought(layout.plan(number).relative_to(layout.root).as_posix())))


def check_owned(
    workspace: Workspace, git: Git, dvc: Dvc, history: History, now: datetime, *, sources: bool = True
) -> None:
    """Between builds, raise UnexpectedChange if a file that the engine owns differs from the last commit.

    During a build, restore the DVC records that a kill left incomplete. `sources`: pull missing data and check the
    data too; not needed by callers that read none.
    """
    layout = workspace.layout
    check_tags([record.round for record in history.rounds], git.tags())
    if layout.closing.exists() or is_closed(layout, history.planned):  # before anything reads the data
        git.unstage([*layout.owned, layout.params, layout.dvc_yaml])
        return build.restore_torn_records(layout, git)
    changed = git.changed(layout.tracked)
    put_back_converted(layout, git, changed)
    if changed:
        refuse_edits(foreign_edits(layout, git))
    if sources:
        pull_missing_sources(layout, dvc)
        check_sources(layout, dvc)
