"""Steps that fix the inputs of a round: ingest the source files, close the round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from al_pipeline.annotation.active_events import superseded
from al_pipeline.annotation.aggregation import fold_by
from al_pipeline.annotation.tasks import worth_asking
from al_pipeline.data.ledger import read_events, read_forecasts, read_refused, still_refused
from al_pipeline.features.device import device_of
from al_pipeline.files import write_text
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.operations.close import NO_FORECASTS, carry_out, close, override
from al_pipeline.operations.costs import answer_cost
from al_pipeline.operations.counting import corrected_texts
from al_pipeline.operations.facts import closing_rule, facts_at
from al_pipeline.operations.history import History, all_plans, read_plan, rounds_of
from al_pipeline.operations.intervene import check_snapshot
from al_pipeline.operations.overlap import forecasts_at_close, more_answers
from al_pipeline.operations.plugins import trusted_plugins
from al_pipeline.operations.steps.context import Context
from al_pipeline.operations.steps.notes import remember
from al_pipeline.params import Params
from al_pipeline.records import PlannedTask
from al_pipeline.rounds.interventions import Intervention, asked_for
from al_pipeline.rounds.state_machine import Facts, Step, close_reason
from al_pipeline.workspace.workspace import Workspace

_logger = get_logger(__name__)


def ingest_sources(context: Context, facts: Facts) -> None:
    """Ingest what is new in the files of `ingest.sources`, and of logged requests what `traffic` says."""
    from al_pipeline.operations import sources

    added, problems = sources.ingest_sources(context.workspace, context.now().timestamp())
    context.outcome.warnings += problems
    context.outcome.changed |= added > 0
    if context.layout.traffic.exists():  # few workspaces are served and keep requests
        from al_pipeline.operations.ingestion.traffic import take_traffic

        added, problems = take_traffic(context.workspace, context.now().timestamp())
        context.outcome.warnings += problems
        context.outcome.changed |= added > 0


def close_round(context: Context, facts: Facts) -> None:
    """Close the open round and carry out the waiting interventions, which are then the recorded reason."""
    layout, planned, interventions = context.layout, facts.planned, context.history.waiting
    if context.history.open_live and planned is not None:
        from al_pipeline.operations.live_rounds import commit_live  # few workspaces are live

        if commit_live(layout, context.git, planned):
            context.taken.again(Step.SYNC)
    reason = _reason(context, facts, interventions)
    _put_params_back(context, interventions)
    params, wanted = context.workspace.params, context.overrides or {}
    device = device_of(params.features)  # first: nothing is done for a device or a plug-in that is not there
    plugins = trusted_plugins(layout, params, wanted.get("strategy") or params.select.strategy)
    check_snapshot(context.workspace, context.git, context.dvc, interventions)
    _logger.info("closing %s: %s", "the first build" if planned is None else f"round {planned}", reason)
    remember(layout, planned, closed_at=context.now().timestamp(), reason=reason)
    plans = context.plans().values()
    coming = carry_out(interventions, layout.events)  # a killed close has appended them: both must see the same
    both = layout.events, layout.inbox_events
    corrected = superseded([*read_events(*both), *coming]) if coming else corrected_texts(*both)
    if params.quality.hold:
        from al_pipeline.operations.gold import hold_answers

        for who, count in hold_answers(layout, params, context.plans(), context.now()).items():
            context.outcome.warnings.append(
                f"{count} answers of {who} are held, whose accuracy on gold is below quality.min_gold: `al review` "
                f"puts them before reviewers, `al labels restore --annotator {who}` lets them count"
            )
    given = context.history.interventions
    rounds = rounds_of(plans) if any(one.kind == "ask" for one in given) else {}
    asked = [item for item in asked_for(given, rounds) if item not in corrected]
    kept = (
        tasks_to_keep(context.workspace, context.git, context.history, interventions, params) if interventions else []
    )
    if kept:
        context.on_progress(f"round {planned}: {len(kept)} open tasks stay in the queue")
    upcoming = 0 if planned is None else planned + 1
    close(
        layout,
        context.dvc,
        upcoming,
        context.take_overrides(),
        interventions,
        plans,
        asked,
        kept,
        device,
        plugins,
        forecasts=context.forecasts_at_close() if params.labels.uses_model else NO_FORECASTS,
        cost=answer_cost(layout, coming) if params.select.cost == "seconds" else None,
    )


def override_build(context: Context) -> None:
    """Apply the requested batch settings to a build that an earlier tick left unfinished: its batch is not final yet.

    If there is no such build, a later close applies them. Raises UnexpectedChange if a plug-in is not trusted.
    """
    wanted = context.overrides
    if wanted and facts_at(context.workspace, context.git, context.history, context.now()).closed:
        trusted_plugins(context.layout, context.workspace.params, wanted.get("strategy"))
        override(context.layout, context.take_overrides())


def _reason(context: Context, facts: Facts, interventions: Sequence[Intervention]) -> str:
    if facts.planned is None:
        return "the first build"
    said = "; ".join(intervention.sentence() for intervention in interventions)
    return said or close_reason(facts, closing_rule(context.workspace)) or ""


def _put_params_back(context: Context, interventions: Sequence[Intervention]) -> None:
    """Restore `params.yaml` from the snapshots that interventions go back to, and have the build read it again."""
    params = context.layout.params
    for intervention in interventions:
        if intervention.params_from is not None and (text := context.git.show(intervention.params_from, params.name)):
            write_text(params, text)
    context.workspace = replace(context.workspace)


def tasks_to_keep(
    workspace: Workspace, git: Git, history: History, interventions: Sequence[Intervention], params: Params
) -> list[PlannedTask]:
    """The open tasks that the next round keeps, since only `interventions` close this one. `params`: those after it.

    Empty if the tasks show other fields than the schema has now, or if its classes were changed by hand.
    """
    layout, latest, planned = workspace.layout, history.latest, history.planned
    before, now = latest.params.schema_ if latest else None, params.schema_
    if before is None or planned is None or before.fields != tuple(now.fields):
        return []
    if before.labels != tuple(now.labels) and not any(one.changes_classes for one in interventions):
        return []
    events = read_events(layout.events, layout.inbox_events)
    refused = still_refused(read_refused(layout.events, layout.inbox_events), events)
    events += carry_out(interventions, layout.events)
    everybody, tasks = len(params.annotators) or None, read_plan(git, planned)
    return worth_asking(
        tasks,
        events,
        fold_by(params, events, partial(read_forecasts, layout.events)),
        params.round.overlap,
        everybody,
        {str(row.get("push_key")) for row in refused},
        {item for intervention in history.interventions for item in intervention.items},
        more_answers(
            layout, params, tasks, partial(forecasts_at_close, layout, history, partial(all_plans, git)), events
        ),
    )
