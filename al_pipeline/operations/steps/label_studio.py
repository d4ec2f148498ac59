"""Steps that use Label Studio: connect, retire, push, pull, audit. Each can be retried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec.structs import asdict, replace

from al_pipeline.annotation.tasks import standing_of
from al_pipeline.data.ledger import read_events
from al_pipeline.data.pool import columns_of, fetch
from al_pipeline.errors import UnexpectedChange, WrongProject
from al_pipeline.files import write_json
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations.checkout import bring_in_line
from al_pipeline.operations.connect import ensure_project, stored_project
from al_pipeline.operations.costs import room_in_budget
from al_pipeline.operations.counting import corrected_texts, counted_events
from al_pipeline.operations.facts import opened_at
from al_pipeline.operations.overlap import ask_again, more_answers, overlap_of, within_room
from al_pipeline.operations.pull import PullRequest, pull
from al_pipeline.operations.push import Landmark, PushReport, RetirePolicy, push, retire
from al_pipeline.operations.schema import former_classes, published_labels
from al_pipeline.operations.steps.context import Context
from al_pipeline.operations.steps.notes import recall, remember
from al_pipeline.records import PlannedTask, Task, shown_text
from al_pipeline.rounds.manifests import LiveQuestion
from al_pipeline.rounds.state_machine import Facts, Step
from al_pipeline.workspace.workspace import Workspace

FIXED_FIRST = 1_000_000
"""Added to the places of a batch's own tasks in a live round."""


def connect(context: Context, facts: Facts) -> None:
    """Find or create our project. Commit a new one at once, so that the work tree is clean while people label."""
    layout, workspace, outcome = context.layout, context.workspace, context.outcome
    known = stored_project(layout)
    version = workspace.params.schema_.version
    oracle = context.connect()
    project = ensure_project(
        workspace,
        oracle,
        known,
        published_labels(context.history),
        lambda edit: outcome.warnings.append(edit.sentence(version)),
    )
    context.connected(oracle, project)
    if known != project:
        outcome.changed = True
        write_json(layout.project, asdict(project))
    if context.git.changed([layout.project]):
        context.git.commit(f"Use Label Studio's project {project.project_id}", [layout.project])
        context.taken.again(Step.SYNC)
    if bring_in_line(layout, context.git):
        context.taken.again(Step.SYNC)


def retire_tasks(context: Context, facts: Facts) -> None:
    """Take tasks that need no answer any more out of the queue."""
    assert facts.planned is not None
    oracle, project = context.project
    plans, history, corrected = context.plans(), context.history, _corrected(context)
    policy = RetirePolicy(
        facts.planned,
        abandoned=history.abandoned,
        overlaps={record.round: record.params.round.overlap for record in history.rounds},
        plans=plans,
        superseded=corrected,
    )
    context.outcome.changed |= retire(oracle, project, policy) > 0


def push_plan(context: Context, facts: Facts) -> None:
    """Push every task of the round's plan to Label Studio's queue that the budget has room for.

    Those whose text was corrected since are left out.
    """
    assert facts.planned is not None
    oracle, project = context.project
    corrected = _corrected(context)
    landmark = _landmark(context, facts.planned, project)
    if facts.live or context.history.open_live:
        from al_pipeline.operations.live_rounds import begin_live, leave_live  # few workspaces are live

        enter = begin_live if facts.live else leave_live
        enter(context, facts.planned, landmark)
    plan = [task for task in context.history.open_tasks() if task.item_id not in corrected]
    plan = _affordable(context, plan)
    pushed = push(oracle, project, plan, _show(context, facts.live), landmark=landmark)
    if facts.live or context.history.open_live:
        placed = pushed.sent > 0 or any(one.kind != "planned" for one in context.history.asked_live())
        if placed or not facts.live:  # tasks of a batch that was pushed before have no places
            oracle.serve_newest(project, facts.live and has_places(context.workspace))
    context.outcome.changed |= pushed.sent > 0
    context.queue_is_empty, context.states = bool(plan) and not pushed.waiting, pushed.states
    numbers = {task.item_id: pushed.task_ids[task.push_key] for task in plan if task.push_key in pushed.task_ids}
    _remember_push(context, facts.planned, pushed, {"project_uid": project.project_uid, "numbers": numbers})


def _show(context: Context, live: bool) -> Callable[[Sequence[PlannedTask]], Sequence[Task]]:
    """What adds the shown fields to tasks; of a live round also their places."""
    if not live:
        return partial(shown_tasks, context.workspace)
    return partial(placed_tasks, context.workspace, context.history.asked_live())


def has_places(workspace: Workspace) -> bool:
    """Whether live questions are served by their places: not where annotators see the model's predictions."""
    return not workspace.params.label_studio.show_guess


def placed_tasks(workspace: Workspace, asked: Sequence[LiveQuestion], plan: Sequence[PlannedTask]) -> list[Task]:
    """Questions of a live round with what annotators see, and with their places: of two, that with the higher is served
    first. Tasks of the batch, such as test items, come before what a model chose: they do not grow old.
    """
    places = {
        one.task.push_key: number + (FIXED_FIRST if one.kind == "planned" else 0) for number, one in enumerate(asked, 1)
    }
    shown = shown_tasks(workspace, plan)
    if not has_places(workspace):
        return shown
    return [replace(task, place=places.get(task.plan.push_key)) for task in shown]


def pull_answers(context: Context, facts: Facts, *, audit: bool = False) -> None:
    """Pull answers into the inbox; with `audit`, also find what does not show as a change of a task.

    A round whose queue is empty is about to close: it is audited at once, so that its answers are read once.
    """
    audit = audit or context.queue_is_empty
    params, outcome = context.workspace.params, context.outcome
    oracle, project = context.project
    request = PullRequest(
        project=project,
        plans=context.plans(),
        schema=params.schema_,
        allow=params.annotators,
        observed_at=context.now().isoformat(timespec="seconds"),
        max_vanished=params.label_studio.max_vanished,
        accept_vanished=context.accept_vanished,
        audit=audit,
        former=former_classes(context.layout),
    )
    report = pull(context.layout, oracle, request)
    if audit:
        context.taken.done.add(Step.AUDIT)
    outcome.changed |= bool(report.events or report.refused)
    outcome.pulled += report.events
    outcome.refused += report.refused
    if overlap_of(params).adaptive:
        _ask_again(context)
    _review(context)


def _ask_again(context: Context) -> None:
    """Have tasks whose labels are not sure enough answered by another person, as far as that is of use.

    Past the budget nothing is pushed, and so no task was listed: what is asked again is withdrawn.
    """
    layout, params = context.layout, context.workspace.params
    oracle, project = context.project
    tasks = context.history.open_tasks()
    more = within_room(
        more_answers(layout, params, tasks, context.forecasts_at_close), room_in_budget(layout, params.budget)
    )
    events = read_events(layout.events, layout.inbox_events)
    states = context.states
    if Step.PUSH not in context.taken.done:
        states = {one.push_key: one for one in oracle.open_tasks(project) if one.push_key is not None}
    raised, withdrawn = ask_again(oracle, project, tasks, states, more, events, overlap_of(params))
    if raised:
        context.on_progress(f"{raised} tasks are asked of another person, since their labels are not sure enough")
    context.outcome.changed |= bool(raised or withdrawn)


def _review(context: Context) -> None:
    """Pull reviewers' rulings. A review project that is missing or somebody else's must not stop a round."""
    if not context.workspace.params.reviewers:
        return
    from al_pipeline.operations.review import review_in_tick  # few workspaces have reviewers

    oracle, _ = context.project
    head = context.git.head()
    try:
        found = review_in_tick(
            context.workspace,
            context.git,
            context.history,
            oracle,
            context.now(),
            accept_vanished=context.accept_vanished,
        )
    except WrongProject as error:
        context.outcome.warnings.append(f"rulings were not pulled: {error}")
        return
    context.outcome.changed |= found > 0
    if context.git.head() != head:
        context.taken.again(Step.SYNC)


def shown_tasks(workspace: Workspace, plan: Sequence[PlannedTask]) -> list[Task]:
    """Add what annotators see to planned tasks. Raises UnexpectedChange if pool and test set lack an item."""
    from al_pipeline.operations.guess import guess  # needed only to send tasks

    layout, params = workspace.layout, workspace.params
    items = fetch([layout.pool, layout.test], [task.item_id for task in plan])
    if missing := [task.item_id for task in plan if task.item_id not in items]:
        raise UnexpectedChange(f"the plan asks about items that the pool does not have: {', '.join(missing[:3])}")
    queried = [items[task.item_id] for task in plan if task.part == "pool"]
    guesses = guess(workspace, queried) if params.label_studio.show_guess else {}
    tasks = []
    for planned in plan:
        item = items[planned.item_id]
        columns = {"text": item.text, **{k: str(v) for k, v in columns_of(item).items()}}
        fields = {name: shown_text(columns.get(name, "")) for name in params.schema_.fields}
        tasks.append(Task(planned, fields, guesses.get(planned.item_id)))
    return tasks


def _affordable(context: Context, plan: Sequence[PlannedTask]) -> list[PlannedTask]:
    """The tasks that are settled, and as many others as the budget has room for, in their order."""
    layout, params = context.layout, context.workspace.params
    room = room_in_budget(layout, params.budget)
    if room is None:
        return list(plan)
    from al_pipeline.costs.budget import affordable  # few workspaces have a budget

    counted, overlap = counted_events(layout.events, layout.inbox_events).events, params.round.overlap
    found = standing_of(plan, counted, overlap, len(params.annotators) or None)
    chosen = affordable([overlap if found[task.push_key] == "open" else 0 for task in plan], room)
    return [task for task, yes in zip(plan, chosen, strict=True) if yes]


def _corrected(context: Context) -> Mapping[str, Any]:
    """The items whose text was corrected, which are no longer asked."""
    return corrected_texts(context.layout.events, context.layout.inbox_events)


def _landmark(context: Context, planned: int, project: ProjectRef) -> Landmark | None:
    """The last task of the round before, if this clone pushed it."""
    known = recall(context.layout, planned - 1).get("tasks") if planned > 0 else None
    if not isinstance(known, dict) or known.get("project_uid") != project.project_uid:
        return None
    numbers = known.get("numbers")
    if not isinstance(numbers, dict) or not numbers or not all(type(number) is int for number in numbers.values()):
        return None
    last = max(numbers, key=lambda item: int(numbers[item]))
    return Landmark(numbers[last], last)


def _remember_push(context: Context, planned: int, pushed: PushReport, tasks: dict[str, Any]) -> None:
    """Record Label Studio's task ids of the round, and when the round opened, if they are not recorded yet."""
    layout, known = context.layout, recall(context.layout, planned)
    if known.get("tasks") != tasks:
        remember(layout, planned, tasks=tasks)
    if "opened_at" not in known:
        elsewhere = pushed.present and not pushed.sent  # another clone opened it
        now = opened_at(layout, context.git, planned) if elsewhere else context.now().timestamp()
        remember(layout, planned, opened_at=now)
