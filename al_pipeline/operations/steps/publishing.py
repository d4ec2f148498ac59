"""Steps that turn a closed round into a published one: build, decide, publish, tag, sync."""

from __future__ import annotations

from collections import Counter
from functools import partial

from al_pipeline.annotation.tasks import standing_of
from al_pipeline.data.ledger import read_events, read_forecasts, read_refused, still_refused
from al_pipeline.errors import RepositoryError, UnexpectedChange
from al_pipeline.files import read_json
from al_pipeline.operations import build, publish
from al_pipeline.operations.counting import counted_events
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.overlap import more_answers
from al_pipeline.operations.planning import kept_tasks
from al_pipeline.operations.steps.context import Context
from al_pipeline.operations.steps.notes import recall
from al_pipeline.rounds.manifests import TaskCounts
from al_pipeline.rounds.state_machine import BUILD, Facts, Step
from al_pipeline.workspace.layout import STAGES


def build_step(context: Context, facts: Facts, *, step: Step) -> None:
    """Run one step of the build."""
    warn, say, params = context.outcome.warnings.append, context.on_progress, context.workspace.params
    build.run_step(step, context.layout, params, context.dvc, context.run_shards, warn, say)


def decide(context: Context, facts: Facts) -> None:
    """Decide on the new model, and plan the next round."""
    publish.decide_and_plan(
        context.workspace,
        context.git,
        context.history,
        facts.planned,
        build.build_key(context.layout),
        _round_facts(context, facts.planned),
    )
    build.record_decided(context.layout, *context.layout.decision(facts.planned))


def publish_round(context: Context, facts: Facts) -> None:
    """Publish what was built; if its files were changed meanwhile, restart the build, once per tick.

    Raises UnexpectedChange if they were changed again.
    """
    layout, taken = context.layout, context.taken
    if changed := _changed_outputs(context):
        if Step.PUBLISH in taken.done:
            raise UnexpectedChange(f"changed repeatedly while the round was built: {', '.join(sorted(changed))}")
        build.forget_built(layout)
        (layout.genesis if facts.planned is None else layout.record(facts.planned)).unlink(missing_ok=True)
        taken.again(*BUILD, Step.DECIDE, Step.PUBLISH)
        taken.done.add(Step.PUBLISH)
        context.on_progress("an output of the build does not match its record: the build starts over")
        return
    publish.publish(context.workspace, context.git, context.dvc, facts.planned)
    build.forget_built(layout)
    layout.closing.unlink(missing_ok=True)
    context.read_history_again()
    taken.done -= {Step.RETIRE, Step.PUSH, Step.SYNC}
    _count_selected(context)


def tag(context: Context, facts: Facts) -> None:
    """Tag a published round that has no tag yet."""
    assert facts.untagged is not None
    publish.tag(context.git, context.layout, facts.untagged)
    context.outcome.published.append(facts.untagged)
    try:
        context.git.pack_tags()
        context.git.pack()
    except RepositoryError as error:
        context.outcome.warnings.append(
            f"git's tags and loose objects could not be packed, which does no harm: {error}"
        )


def sync(context: Context, facts: Facts) -> None:
    """Push to the git remote. A failure is only a warning: it must not keep people from labelling."""
    outcome = context.outcome
    try:
        outcome.warnings += publish.sync(context.git, context.layout)
        outcome.changed = True
    except RepositoryError as error:
        outcome.warnings.append(f"the git remote lacks the newest rounds; the next tick tries again: {error}")


def _changed_outputs(context: Context) -> set[str]:
    """Outputs of the build, and data that it reads, that differ from DVC's records."""
    dvc, layout = context.dvc, context.layout
    sources = [str(pointer.relative_to(layout.root)) for pointer in layout.pointers]
    return {*dvc.changed(*STAGES, *sources), *dvc.unlike(), *dvc.unlike(*sources)}


def _count_selected(context: Context) -> None:
    """Count the items that the published plan selects with the requested settings; warn if it ignores the strategy."""
    record, wanted, outcome = context.history.latest, context.overrides, context.outcome
    if not wanted or record is None or record.overrides != wanted:
        return
    plan = context.history.open_tasks()
    outcome.selected += sum(task.part == "pool" and task.first_round == task.round for task in plan)
    if "strategy" in wanted and not record.counts.labelled:
        outcome.warnings.append(
            f"the batch was drawn without a model, not by {wanted['strategy']}: there are no labels yet"
        )


def _round_facts(context: Context, planned: int | None) -> publish.RoundFacts:
    layout, remembered = context.layout, recall(context.layout, planned)
    return publish.RoundFacts(
        opened_at=remembered.get("opened_at"),
        closed_at=remembered.get("closed_at"),
        reason=remembered.get("reason"),
        seconds=build.build_seconds(layout),
        project=read_json(layout.project) or None,
        interventions=tuple(context.history.waiting),
        answers=None if planned is None else _answers(context, planned),
    )


def _answers(context: Context, planned: int) -> TaskCounts:
    """Count the outcomes of the tasks of round `planned`."""
    layout, params = context.layout, context.workspace.params
    events, tasks = read_events(layout.events), read_plan(context.git, planned)
    more = more_answers(layout, params, tasks, partial(read_forecasts, layout.events), events)
    counted = counted_events(layout.events).events
    found = Counter(standing_of(tasks, counted, params.round.overlap, len(params.annotators) or None, more).values())
    refused = still_refused(read_refused(layout.events), events)
    return TaskCounts(
        tasks=len(tasks),
        answered=found["answered"],
        given_up=found["given_up"],
        unanswered=found["open"],
        kept=len(kept_tasks(layout, context.git, planned + 1)),
        refused=dict(Counter(str(row["reason"]) for row in refused if row.get("round") == planned)),
    )
