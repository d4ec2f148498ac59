"""Adaptive overlap in the open round: tasks whose labels are not sure enough are asked of another person at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice

from al_pipeline.annotation.active_events import standing_answers
from al_pipeline.annotation.confidence import ConsensusRule, rule_for
from al_pipeline.annotation.overlap import Overlap, wanted_answers
from al_pipeline.data.ledger import read_events, read_forecasts, signature
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.logs import get_logger
from al_pipeline.params import Params
from al_pipeline.records import Event, PlannedTask, TaskState
from al_pipeline.workspace.layout import Layout

_logger = get_logger(__name__)


def overlap_of(params: Params) -> Overlap:
    """How many people answer a task."""
    return Overlap(params.round.overlap, params.round.max_overlap, params.labels.min_confidence)


def more_answers(
    layout: Layout, params: Params, tasks: Sequence[PlannedTask], events: Sequence[Event] | None = None
) -> Mapping[str, int]:
    """The tasks of a round that another person is to answer, see `annotation.overlap.wanted_answers`.

    `events`: None for those of ledger and inbox; the result is then kept for the next call with the same ones.
    """
    if not overlap_of(params).adaptive:
        return {}
    if events is not None:
        return _more(layout, params, tasks, events)
    return _remembered(signature(layout.events, layout.inbox_events), layout, _Hashed(params), tuple(tasks))


class _Hashed:
    """Parameters as part of a cache's key: equal sections are equal."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._key = (params.labels, params.round, tuple(params.schema_.labels), tuple(params.annotators))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=2)
def _remembered(
    _events: tuple[tuple[str, int, int], ...], layout: Layout, params: _Hashed, tasks: tuple[PlannedTask, ...]
) -> Mapping[str, int]:
    return _more(layout, params.params, tasks, read_events(layout.events, layout.inbox_events))


def _more(layout: Layout, params: Params, tasks: Sequence[PlannedTask], events: Sequence[Event]) -> Mapping[str, int]:
    rule = rule_for(params.labels, partial(read_forecasts, layout.events))
    if rule is None:
        return {}
    rule = ConsensusRule(rule.method, _with_open(rule, tasks, events) if params.labels.uses_model else {})
    everybody = len(params.annotators) or None
    return wanted_answers(tasks, events, params.schema_.labels, rule, overlap_of(params), everybody)


def _with_open(
    rule: ConsensusRule, tasks: Sequence[PlannedTask], events: Sequence[Event]
) -> dict[str, Mapping[str, float]]:
    """The ledger's forecasts, and those of the round's tasks, which a close adds; none of items answered earlier."""
    round_of = {task.item_id: task.first_round for task in tasks}
    earlier = {
        event.item_id
        for event in events
        if event.label is not None and event.round < round_of.get(event.item_id, event.round)
    }
    own = {task.item_id: task.forecast for task in tasks if task.part == "pool" and task.forecast}
    return {item: found for item, found in own.items() if item not in earlier} | dict(rule.forecasts)


def within_room(more: Mapping[str, int], room: int | None) -> Mapping[str, int]:
    """The first tasks of `more` that the budget has room for; the others wait until it has. None: there is no limit."""
    return more if room is None else dict(islice(more.items(), room))


def ask_again(
    oracle: Oracle,
    ref: ProjectRef,
    tasks: Sequence[PlannedTask],
    states: Mapping[str, TaskState],
    more: Mapping[str, int],
    events: Sequence[Event],
    overlap: Overlap,
) -> tuple[int, int]:
    """Have Label Studio ask one person more for the tasks in `more`; withdraw those that need it no longer.

    `states`: the tasks as the last listing shows them; of answers since then the next call takes care. Nothing is noted
    here: what is already asked shows there as open, so that a call can be killed and repeated. Returns the numbers of
    tasks asked again and withdrawn.
    """
    given = Counter(event.push_key for event in standing_answers(events).values() if event.label is not None)
    raised: dict[int, int] = {}
    withdrawn: list[int] = []
    for task in tasks:
        state = states.get(task.push_key)
        if state is None:
            continue
        held = max(state.annotations, given[task.push_key])
        if task.push_key in more:
            if state.is_labeled or held > state.annotations:
                raised[state.task_id] = held + 1
        elif not state.is_labeled and state.annotations >= overlap.least and given[task.push_key] >= overlap.least:
            withdrawn.append(state.task_id)
    if raised:
        oracle.ask_more(ref, raised)
    if withdrawn:
        oracle.retire(ref, withdrawn)
    if raised or withdrawn:
        _logger.info("tasks asked of another person: %d; no longer asked: %d", len(raised), len(withdrawn))
    return len(raised), len(withdrawn)
