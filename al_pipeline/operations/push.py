"""Bring a round's plan into Label Studio: each task once in the queue, whatever crashes or is lost on the way.

Label Studio has no unique keys, and an error says nothing about whether the tasks exist. So: list what is there, send
what is missing, and count again; after an error, let the server finish first.

Nothing is ever deleted. Somebody may have a task open in the browser: the answer to a deleted one is lost, and where
its id is given to the next task, the answer lands there. A second copy is retired instead: it leaves the queue and
still takes a late answer, which counts under the same key.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from al_pipeline.errors import BadInput, LabelStudioDown
from al_pipeline.integrations.label_studio.payloads import task_json
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.records import Task, TaskState

MAX_REQUEST_BYTES = 5_000_000
"""Size that one request should not exceed; a single task may."""

_ATTEMPTS = 4
_SETTLE_SECONDS = (1.0, 2.0, 4.0, 8.0)
_LOOKS = 5


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push found and did, in tasks."""

    present: int
    sent: int
    duplicates_retired: int
    task_ids: Mapping[str, int] = field(default_factory=dict, compare=False)
    """The server's number of each task, by push key: to look at it, not to know it by."""


def push(
    oracle: Oracle,
    ref: ProjectRef,
    tasks: Sequence[Task],
    chunk: int = 250,
    sleep: Callable[[float], None] = time.sleep,
) -> PushReport:
    """Make Label Studio's queue hold each of `tasks` exactly once, in this order. May be killed and repeated.

    Raises LabelStudioDown when a few attempts do not bring it about, and whatever says that the request is not valid.
    """
    sizes = {task.plan.push_key: len(json.dumps(task_json(task))) for task in tasks}
    if len(sizes) < len(tasks):
        raise BadInput(f"the plan names {len(tasks) - len(sizes)} tasks twice")
    copies = _copies(oracle, ref, tasks)
    present = len(copies)
    attempts = 0
    while missing := [task for task in tasks if task.plan.push_key not in copies]:
        try:
            for batch in _batches(missing, sizes, chunk):
                oracle.import_tasks(ref, batch)
            copies = _copies(oracle, ref, tasks)
            if len(copies) < len(sizes):
                raise LabelStudioDown(
                    f"Label Studio took {len(sizes)} tasks without an error but lists {len(copies)} of them"
                )
        except LabelStudioDown:
            attempts += 1
            if attempts == _ATTEMPTS:
                raise
            sleep(_SETTLE_SECONDS[attempts - 1])
            settled = _settled(oracle, ref, tasks, sleep)
            if len(settled) > len(copies):
                attempts = 0
            copies = settled
    spare = _spare_copies(copies)
    if spare:
        oracle.retire(ref, spare)
    numbers = {key: _kept(states).task_id for key, states in copies.items()}
    return PushReport(present, len(sizes) - present, len(spare), numbers)


def retire(
    oracle: Oracle,
    ref: ProjectRef,
    current_round: int,
    abandoned: Collection[int] = (),
    overlaps: Mapping[int, int] | None = None,
    rounds: Mapping[str, int] | None = None,
    superseded: Collection[str] = (),
) -> int:
    """Take tasks of earlier rounds that nobody need answer any more out of the queue; how many.

    These are pool tasks that nobody answered, and tasks with as many answers as their round wanted (`overlaps`, by
    round): Label Studio opens all of them again when the project's overlap changes. Test tasks without an answer stay.
    Of the `abandoned` rounds all open tasks go, those that wait for a second answer too: it would not count. `rounds`
    has the round that a task belongs to, by push key: one that was kept for a later round does not say so itself.
    Tasks whose push keys are `superseded` go in any round: the text that they show was corrected.
    """
    wanted, moved = overlaps or {}, rounds or {}
    stale = [
        state.task_id
        for state in oracle.open_tasks(ref)
        if state.push_key is not None
        and (number := moved.get(state.push_key, state.round)) is not None
        and (
            state.push_key in superseded
            or (
                number < current_round
                and (
                    number in abandoned
                    or (state.part == "pool" and state.annotations == 0)
                    or (number in wanted and state.annotations >= wanted[number])
                )
            )
        )
    ]
    if stale:
        oracle.retire(ref, stale)
    return len(stale)


def _copies(oracle: Oracle, ref: ProjectRef, tasks: Sequence[Task]) -> dict[str, list[TaskState]]:
    """What Label Studio holds of our tasks: each key with its copies, by rising id. Empty ones out of the queue, which
    nobody is served, are no copies."""
    ours = {task.plan.push_key for task in tasks}
    copies: dict[str, list[TaskState]] = defaultdict(list)
    for number in sorted({task.plan.first_round for task in tasks}):
        for state in oracle.task_states(ref, number):
            if state.push_key in ours and (state.annotations or not state.is_labeled):
                copies[state.push_key].append(state)
    return dict(copies)


def _settled(
    oracle: Oracle, ref: ProjectRef, tasks: Sequence[Task], sleep: Callable[[float], None]
) -> dict[str, list[TaskState]]:
    """What is there once two looks in a row agree: after a lost reply the server may still be committing."""
    seen = _copies(oracle, ref, tasks)
    for _ in range(_LOOKS):
        sleep(_SETTLE_SECONDS[0])
        again = _copies(oracle, ref, tasks)
        if _count(again) == _count(seen):
            return again
        seen = again
    raise LabelStudioDown("Label Studio is still taking in tasks that were sent earlier; try again later")


def _batches(missing: Sequence[Task], sizes: dict[str, int], chunk: int) -> Iterator[list[Task]]:
    """`missing` in order, in batches of at most `chunk` tasks and about MAX_REQUEST_BYTES."""
    batch: list[Task] = []
    size = 0
    for task in missing:
        more = sizes[task.plan.push_key]
        if batch and (len(batch) == chunk or size + more > MAX_REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += more
    if batch:
        yield batch


def _spare_copies(copies: Mapping[str, Sequence[TaskState]]) -> list[int]:
    """Open copies that the queue need not hold beside another: of each key the one with most answers stays, and of
    those the first, which stands where the plan wants it."""
    spare: list[int] = []
    for states in copies.values():
        kept = _kept(states)
        spare += [state.task_id for state in states if state is not kept and not state.is_labeled]
    return spare


def _kept(states: Sequence[TaskState]) -> TaskState:
    return max(states, key=lambda state: (state.annotations, state.cancelled, -state.task_id))


def _count(copies: dict[str, list[TaskState]]) -> int:
    return sum(len(states) for states in copies.values())
