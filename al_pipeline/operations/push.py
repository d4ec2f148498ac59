"""Push a round's plan to Label Studio: each task is in the queue exactly once, despite crashes and lost replies.

Label Studio has no unique keys, and an error does not say whether the tasks were created. So a push lists the tasks
there, sends those that are missing and counts again; after an error, it first lets the server finish.

Nothing is ever deleted. An annotator may have a task open in the browser: the answer to a deleted task is lost, or is
stored with the next task if that reuses the id. A duplicate is retired instead: it leaves the queue and still accepts
a late answer, which counts under the same key.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from al_pipeline.errors import BadInput, LabelStudioDown
from al_pipeline.integrations.label_studio.payloads import task_json
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.logs import get_logger
from al_pipeline.records import PlannedTask, Task, TaskState

_logger = get_logger(__name__)

MAX_REQUEST_BYTES = 5_000_000
"""Maximum size of a request; only a request with a single task may exceed it."""

_ATTEMPTS = 4
_SETTLE_SECONDS = (1.0, 2.0, 4.0, 8.0)
_MOST_COUNTS = 5

Show = Callable[[Sequence[PlannedTask]], Sequence[Task]]
"""Adds what annotators see to planned tasks. Called only for tasks that are sent, since it reads the pool."""
Copies = Mapping[str, Sequence[TaskState]]
"""Label Studio's copies of each task, by push key, in ascending order of task id."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """How many tasks a push found, sent and retired."""

    present: int
    sent: int
    duplicates_retired: int
    task_ids: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Label Studio's id of each task, by push key: for links to it, not as its identity."""
    waiting: int = field(default=0, compare=False)
    """The number of tasks that Label Studio still asks people for."""
    states: Mapping[str, TaskState] = field(default_factory=dict, compare=False)
    """The tasks as Label Studio lists them, by push key."""


def push(
    oracle: Oracle,
    ref: ProjectRef,
    plan: Sequence[PlannedTask],
    show: Show,
    chunk: int = 250,
    sleep: Callable[[float], None] = time.sleep,
    landmark: Landmark | None = None,
) -> PushReport:
    """Make Label Studio's queue hold each task of `plan` exactly once, in this order. Can be killed and repeated.

    With a `landmark`, the server searches only what came after it for tasks of the plan's own round. Raises
    LabelStudioDown if several attempts fail, and any error that says that the request is invalid.
    """
    keys = frozenset(task.push_key for task in plan)
    if len(keys) < len(plan):
        raise BadInput(f"the plan contains {len(plan) - len(keys)} tasks twice")
    queue = _Queue(oracle, ref, plan, keys, show, chunk, sleep, landmark)
    copies = queue.copies()
    present = len(copies)
    copies = queue.fill(copies)
    spare = _spare_copies(copies)
    if spare:
        oracle.retire(ref, spare)
    kept = {key: _kept(states) for key, states in copies.items()}
    numbers = {key: state.task_id for key, state in kept.items()}
    waiting = sum(not state.is_labeled for state in kept.values())
    _logger.info("tasks: %d there, %d sent, %d second copies retired", present, len(keys) - present, len(spare))
    return PushReport(present, len(keys) - present, len(spare), numbers, waiting, kept)


def present(oracle: Oracle, ref: ProjectRef, plan: Sequence[PlannedTask], landmark: Landmark | None = None) -> Copies:
    """Label Studio's copies of the tasks of `plan` that people are shown or have answered; sends nothing."""
    keys = frozenset(task.push_key for task in plan)
    return _Queue(oracle, ref, plan, keys, lambda _: (), 1, time.sleep, landmark).copies()


def spare_copies(states: Iterable[TaskState]) -> list[int]:
    """The task ids of open duplicates among `states`, of which each task keeps one copy."""
    copies: dict[str, list[TaskState]] = defaultdict(list)
    for state in states:
        if state.push_key is not None and (state.annotations or not state.is_labeled):
            copies[state.push_key].append(state)
    return _spare_copies(copies)


class Landmark(Struct, frozen=True):
    """A task of an earlier round, as it was known when this round was planned: those of this round have higher ids.

    That holds as long as the server still has it under the same id and key. Else its data were replaced, by a backup
    perhaps, and its ids say nothing.
    """

    task_id: int
    item_id: str

    def is_at(self, state: TaskState, current_round: int) -> bool:
        """Whether `state` is this task."""
        key, number = state.push_key, state.round
        if key is None or number is None or not 0 <= number < current_round:
            return False
        return state.task_id == self.task_id and key.endswith(f":{number:04d}:{self.item_id}")


class RetirePolicy(Struct, frozen=True):
    """Which open tasks need no answer any more.

    Of rounds before the current one: unanswered pool tasks, and tasks with as many answers as their round wanted
    (Label Studio reopens all of them when the project's overlap changes). Unanswered test tasks stay. Of abandoned
    rounds: all open tasks, including those that wait for a second answer, which would not count. Of any round: tasks
    whose text was corrected.
    """

    current_round: int
    abandoned: Collection[int] = ()
    """Rounds that no longer count."""
    overlaps: Mapping[int, int] = msgspec.field(default_factory=dict)
    """How many answers per task each round wanted."""
    plans: Mapping[str, PlannedTask] = msgspec.field(default_factory=dict)
    """Every task ever planned, by push key: one that a later round kept still names its first round."""
    superseded: Collection[str] = ()
    """Ids of the items whose text was corrected."""

    def retires(self, state: TaskState) -> bool:
        """Whether to retire this task. False for a task that is not ours."""
        if state.push_key is None:
            return False
        planned = self.plans.get(state.push_key)
        number = state.round if planned is None else planned.round
        if number is None:
            return False
        if planned is not None and planned.item_id in self.superseded:
            return True
        return number < self.current_round and (
            number in self.abandoned
            or (state.part == "pool" and state.annotations == 0)
            or (number in self.overlaps and state.annotations >= self.overlaps[number])
        )


def retire(oracle: Oracle, ref: ProjectRef, policy: RetirePolicy) -> int:
    """Take the open tasks that `policy` retires out of the queue; return how many."""
    retired = [state.task_id for state in oracle.open_tasks(ref) if policy.retires(state)]
    if retired:
        oracle.retire(ref, retired)
        _logger.info("%d tasks that nobody needs to answer any more were retired", len(retired))
    return len(retired)


class _Queue(Struct, frozen=True):
    """The tasks of one push in Label Studio's queue."""

    oracle: Oracle
    ref: ProjectRef
    plan: Sequence[PlannedTask]
    keys: Collection[str]
    """The push keys of the plan."""
    show: Show
    chunk: int
    sleep: Callable[[float], None]
    landmark: Landmark | None

    def fill(self, copies: Copies) -> Copies:
        """Send the tasks that have no copy until each has one; return all copies."""
        attempts = 0
        while missing := [task for task in self.plan if task.push_key not in copies]:
            try:
                for batch in _batches(self.show(missing), self.chunk):
                    self.oracle.import_tasks(self.ref, batch)
                copies = self.copies()
                if len(copies) < len(self.keys):
                    raise LabelStudioDown(
                        f"Label Studio accepted {len(self.keys)} tasks without an error but lists {len(copies)} of them"
                    )
            except LabelStudioDown as error:
                attempts += 1
                if attempts == _ATTEMPTS:
                    raise
                _logger.warning("attempt %d of %d to send %d tasks: %s", attempts, _ATTEMPTS, len(missing), error)
                self.sleep(_SETTLE_SECONDS[attempts - 1])
                settled = self._settled()
                if len(settled) > len(copies):
                    attempts = 0
                copies = settled
        return copies

    def copies(self) -> Copies:
        """List Label Studio's copies of our tasks, except unanswered ones out of the queue, which nobody is shown."""
        copies: dict[str, list[TaskState]] = defaultdict(list)
        for number in sorted({task.first_round for task in self.plan}):
            for state in self._states(number):
                key = state.push_key
                if key is not None and key in self.keys and (state.annotations or not state.is_labeled):
                    copies[key].append(state)
        return dict(copies)

    def _states(self, number: int) -> Sequence[TaskState]:
        """The tasks of round `number`, perhaps among others."""
        if self.landmark is not None and all(task.round == number for task in self.plan):
            states = list(self.oracle.task_states(self.ref, first=self.landmark.task_id))
            if states and self.landmark.is_at(states[0], number):
                return states[1:]
        return list(self.oracle.task_states(self.ref, number))

    def _settled(self) -> Copies:
        """List the copies once two consecutive counts agree: after a lost reply the server may still be committing."""
        before = self.copies()
        for _ in range(_MOST_COUNTS):
            self.sleep(_SETTLE_SECONDS[0])
            now = self.copies()
            if _count(now) == _count(before):
                return now
            before = now
        raise LabelStudioDown("Label Studio is still importing tasks that were sent earlier; try again later")


def _batches(tasks: Sequence[Task], chunk: int) -> Iterator[list[Task]]:
    """Split `tasks`, in order, into batches of at most `chunk` tasks and about MAX_REQUEST_BYTES."""
    batch: list[Task] = []
    size = 0
    for task in tasks:
        more = len(json.dumps(task_json(task)))
        if batch and (len(batch) == chunk or size + more > MAX_REQUEST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += more
    if batch:
        yield batch


def _spare_copies(copies: Copies) -> list[int]:
    """Task ids of open duplicates that can be retired.

    Of each key the copy with the most answers stays; among equals the first, which has the planned place in the queue.
    """
    spare: list[int] = []
    for states in copies.values():
        kept = _kept(states)
        spare += [state.task_id for state in states if state is not kept and not state.is_labeled]
    return spare


def _kept(states: Sequence[TaskState]) -> TaskState:
    return max(states, key=lambda state: (state.annotations, state.cancelled, -state.task_id))


def _count(copies: Copies) -> int:
    return sum(len(states) for states in copies.values())
