"""Bring a round's plan into Label Studio: each task once, whatever crashes or is lost on the way.

Label Studio has no unique keys, and an error says nothing about whether the tasks exist. So: list what is there, send
what is missing, and count again; after an error, let the server finish first.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from al_pipeline.errors import BadInput, LabelStudioDown, NeedsAHand
from al_pipeline.oracle import Oracle, ProjectRef, task_json
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
    duplicates_removed: int


def push(
    oracle: Oracle,
    ref: ProjectRef,
    tasks: Sequence[Task],
    chunk: int = 250,
    sleep: Callable[[float], None] = time.sleep,
) -> PushReport:
    """Make Label Studio hold each of `tasks` exactly once, in this order. May be killed and repeated.

    Raises LabelStudioDown when a few attempts do not bring it about, NeedsAHand where two copies of one task are both
    answered, and whatever says that the request is not valid. Nothing that has an answer is ever deleted.
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
    removed = _remove_duplicates(oracle, ref, copies)
    if removed:
        copies = _copies(oracle, ref, tasks)
    _check(copies, sizes)
    return PushReport(present=present, sent=len(sizes) - present, duplicates_removed=removed)


def retire(oracle: Oracle, ref: ProjectRef, current_round: int, abandoned: Collection[int] = ()) -> int:
    """Take open pool tasks of earlier rounds that nobody answered out of the queue; how many. Test tasks stay.

    Of the `abandoned` rounds all open tasks go, those that wait for a second answer too: it would not count.
    """
    stale = [
        state.task_id
        for state in oracle.task_states(ref)
        if (state.part == "pool" or state.round in abandoned)
        and state.round is not None
        and state.round < current_round
        and state.push_key is not None
        and not state.is_labeled
        and (state.annotations == 0 or state.round in abandoned)
    ]
    oracle.retire(ref, stale)
    return len(stale)


def _copies(oracle: Oracle, ref: ProjectRef, tasks: Sequence[Task]) -> dict[str, list[TaskState]]:
    """What Label Studio holds of our tasks: each key with all its copies, by rising id."""
    ours = {task.plan.push_key for task in tasks}
    copies: dict[str, list[TaskState]] = defaultdict(list)
    for number in sorted({task.plan.round for task in tasks}):
        for state in oracle.task_states(ref, number):
            if state.push_key in ours:
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


def _remove_duplicates(oracle: Oracle, ref: ProjectRef, copies: dict[str, list[TaskState]]) -> int:
    doomed: list[int] = []
    for states in copies.values():
        unanswered = [state.task_id for state in states if state.annotations == 0 and state.cancelled == 0]
        # The first copy stays where nobody answered any: it stands where the plan wants it.
        doomed += unanswered if len(unanswered) < len(states) else unanswered[1:]
    return oracle.delete_tasks(ref, doomed) if doomed else 0


def _check(copies: dict[str, list[TaskState]], sizes: dict[str, int]) -> None:
    twice = sorted(key for key, states in copies.items() if len(states) > 1)
    if twice:
        raise NeedsAHand(
            f"Label Studio holds {len(twice)} tasks more than once with answers on several copies, first {twice[0]} "
            f"(tasks {', '.join(str(state.task_id) for state in copies[twice[0]])}); delete one copy of each there"
        )
    if len(copies) != len(sizes):
        raise LabelStudioDown(f"the plan has {len(sizes)} tasks, Label Studio lists {len(copies)} of them")


def _count(copies: dict[str, list[TaskState]]) -> int:
    return sum(len(states) for states in copies.values())
