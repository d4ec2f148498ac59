"""A live round at a tick: it begins with a few tasks of its batch, and can go on as an ordinary one."""

from __future__ import annotations

from collections.abc import Iterable

from al_pipeline.integrations.git import Git
from al_pipeline.live.plan import append, remembered_size
from al_pipeline.logs import get_logger
from al_pipeline.operations.history import History
from al_pipeline.operations.push import Landmark, present
from al_pipeline.operations.steps.context import Context
from al_pipeline.records import PlannedTask
from al_pipeline.rounds.manifests import LiveQuestion
from al_pipeline.workspace.layout import Layout

_logger = get_logger(__name__)


def begin_live(context: Context, number: int, landmark: Landmark | None) -> None:
    """Make the open round a live one, if it is not: of its batch it keeps what was answered, and a short queue.

    The rest of a batch that was pushed before is retired: nobody is asked it unless the live model asks it again.
    """
    batch = context.history.batch()
    if context.history.open_live or not batch:
        return
    oracle, project = context.project
    copies = present(oracle, project, batch, landmark)
    answered = {key for key, states in copies.items() if any(one.annotations or one.cancelled for one in states)}
    first = [task for task in batch if task.push_key in answered or task.first_round < number]
    kept = {task.push_key for task in first}
    first += [task for task in batch if task.push_key not in kept][: remembered_size(context.layout)]
    kept = {task.push_key for task in first}
    spare = [
        state.task_id for key, states in copies.items() for state in states if key not in kept and not state.is_labeled
    ]
    if spare:  # before the plan says so: a tick that is killed in between finds them missing and begins again
        oracle.retire(project, spare)
        context.on_progress(
            f"round {number} is asked live: {len(spare)} tasks of its batch were taken out of the queue"
        )
    _append(context, number, first)


def leave_live(context: Context, number: int, landmark: Landmark | None) -> None:
    """Ask the rest of the batch of a round that was live: nobody asks live questions any more."""
    asked = {question.task.push_key for question in context.history.asked_live()}
    rest = [task for task in context.history.batch() if task.push_key not in asked]
    items = {question.task.item_id for question in context.history.asked_live()}
    rest = [task for task in rest if task.item_id not in items]
    settled = max(0, len(context.history.batch()) - len(asked))
    if rest and settled:
        context.on_progress(f"round {number} is no longer asked live: {len(rest[:settled])} tasks of its batch follow")
        _append(context, number, rest[:settled])


def _append(context: Context, number: int, tasks: Iterable[PlannedTask]) -> None:
    append(context.layout.live_plan(number), planned(context.history, tasks, context.now().timestamp()))
    context.read_history_again()
    context.forget_plans()


def planned(history: History, tasks: Iterable[PlannedTask], now: float) -> list[LiveQuestion]:
    """Tasks of a round's batch as questions that the published model asks."""
    latest = history.latest
    model = "" if latest is None else latest.hashes["model"][:16]
    events = 0 if latest is None else latest.counts.events or 0
    return [LiveQuestion(task, "planned", model, events, "", now) for task in tasks]


def commit_live(layout: Layout, git: Git, number: int) -> bool:
    """Commit what the open round asked live; return whether there was anything new."""
    path = layout.live_plan(number)
    if not path.exists():
        return False
    append(path, ())  # without a line that a killed process left unfinished
    if not git.changed([path]):
        return False
    git.commit(f"Record what round {number} asked live", [path])
    return True
