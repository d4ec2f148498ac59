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
from al_pipeline.logs import get_logger
from al_pipeline.records import PlannedTask, Task, TaskState

_logger = get_logger(__name__)

MAX_REQUEST_BYTES = 5_000_000
"""Size that one request should not exceed; a single task may."""

_ATTEMPTS = 4
_SETTLE_SECONDS = (1.0, 2.0, 4.0, 8.0)
_MOST_COUNTS = 5

Show = Callable[[Sequence[PlannedTask]], Sequence[Task]]
"""Gives planned tasks what annotators will see of them. Called for tasks that are sent: it reads the pool."""
Copies = Mapping[str, Sequence[TaskState]]
"""The copies of each task that Label Studio holds, by push key and rising id."""


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
    plan: Sequence[PlannedTask],
    show: Show,
    chunk: int = 250,
    sleep: Callable[[float], None] = time.sleep,
) -> PushReport:
    """Make Label Studio's queue hold each task of `plan` exactly once, in this order. May be killed and repeated.

    Raises LabelStudioDown when a few attempts do not bring it about, and whatever says that the request is not valid.
    """
    keys = frozenset(task.push_key for task in plan)
    if len(keys) < len(plan):
        raise BadInput(f"the plan names {len(plan) - len(keys)} tasks twice")
    queue = _Queue(oracle, ref, plan, keys, show, chunk, sleep)
    copies = queue.copies()
    present = len(copies)
    copies = queue.fill(copies)
    spare = _spare_copies(copies)
    if spare:
        oracle.retire(ref, spare)
    numbers = {key: _kept(states).task_id for key, states in copies.items()}
    _logger.info("tasks: %d there, %d sent, %d second copies retired", present, len(keys) - present, len(spare))
    return PushReport(present, len(keys) - present, len(spare), numbers)


@dataclass(frozen=True, slots=True)
class RetirePolicy:
    """Which open tasks nobody need answer any more.

    Of rounds before the current one these are pool tasks that nobody answered, and tasks with as many answers as their
    round wanted: Label Studio opens all of them again when the project's overlap changes. Test tasks without an answer
    stay. Of the abandoned rounds all open tasks go, those that wait for a second answer too: it would not count. In any
    round go tasks that show a text that was corrected.
    """

    current_round: int
    abandoned: Collection[int] = ()
    """Rounds that count no more."""
    overlaps: Mapping[int, int] = field(default_factory=dict)
    """How many answers each round wanted of a task."""
    rounds: Mapping[str, int] = field(default_factory=dict)
    """The round that a task belongs to, by push key: one that was kept for a later round does not say so itself."""
    superseded: Collection[str] = ()
    """Push keys of the tasks whose text was corrected."""

    def retires(self, state: TaskState) -> bool:
        """Whether this task is to leave the queue. False for one that is not ours."""
        if state.push_key is None or (number := self.rounds.get(state.push_key, state.round)) is None:
            return False
        if state.push_key in self.superseded:
            return True
        return number < self.current_round and (
            number in self.abandoned
            or (state.part == "pool" and state.annotations == 0)
            or (number in self.overlaps and state.annotations >= self.overlaps[number])
        )


def retire(oracle: Oracle, ref: ProjectRef, policy: RetirePolicy) -> int:
    """Take what `policy` retires of the open tasks out of the queue; how many they are."""
    retired = [state.task_id for state in oracle.open_tasks(ref) if policy.retires(state)]
    if retired:
        oracle.retire(ref, retired)
        _logger.info("%d tasks that nobody need answer any more were retired", len(retired))
    return len(retired)


@dataclass(frozen=True, slots=True)
class _Queue:
    """The tasks of one push in Label Studio's queue."""

    oracle: Oracle
    ref: ProjectRef
    plan: Sequence[PlannedTask]
    keys: Collection[str]
    """The push keys of the plan."""
    show: Show
    chunk: int
    sleep: Callable[[float], None]

    def fill(self, copies: Copies) -> Copies:
        """Send the tasks that have no copy, until each has one; what is there then."""
        attempts = 0
        while missing := [task for task in self.plan if task.push_key not in copies]:
            try:
                for batch in _batches(self.show(missing), self.chunk):
                    self.oracle.import_tasks(self.ref, batch)
                copies = self.copies()
                if len(copies) < len(self.keys):
                    raise LabelStudioDown(
                        f"Label Studio took {len(self.keys)} tasks without an error but lists {len(copies)} of them"
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
        """What Label Studio holds of our tasks. Empty ones out of the queue, which nobody is served, are no copies."""
        copies: dict[str, list[TaskState]] = defaultdict(list)
        for number in sorted({task.first_round for task in self.plan}):
            for state in self.oracle.task_states(self.ref, number):
                key = state.push_key
                if key is not None and key in self.keys and (state.annotations or not state.is_labeled):
                    copies[key].append(state)
        return dict(copies)

    def _settled(self) -> Copies:
        """What is there once two counts in a row agree: after a lost reply the server may still be committing."""
        before = self.copies()
        for _ in range(_MOST_COUNTS):
            self.sleep(_SETTLE_SECONDS[0])
            now = self.copies()
            if _count(now) == _count(before):
                return now
            before = now
        raise LabelStudioDown("Label Studio is still taking in tasks that were sent earlier; try again later")


def _batches(tasks: Sequence[Task], chunk: int) -> Iterator[list[Task]]:
    """`tasks` in order, in batches of at most `chunk` tasks and about MAX_REQUEST_BYTES."""
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
    """Open copies that the queue need not hold beside another: of each key the one with most answers stays, and of
    those the first, which stands where the plan wants it."""
    spare: list[int] = []
    for states in copies.values():
        kept = _kept(states)
        spare += [state.task_id for state in states if state is not kept and not state.is_labeled]
    return spare


def _kept(states: Sequence[TaskState]) -> TaskState:
    return max(states, key=lambda state: (state.annotations, state.cancelled, -state.task_id))


def _count(copies: Copies) -> int:
    return sum(len(states) for states in copies.values())
