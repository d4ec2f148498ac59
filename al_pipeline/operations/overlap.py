"""Adaptive overlap in the open round: tasks whose labels are not sure enough are asked of another person at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice

from al_pipeline.annotation.active_events import standing_answers
from al_pipeline.annotation.confidence import ReadForecasts, rule_for
from al_pipeline.annotation.overlap import Overlap, wanted_answers
from al_pipeline.data.ledger import read_events, read_forecasts, signature
from al_pipeline.integrations.oracle import Oracle, ProjectRef
from al_pipeline.logs import get_logger
from al_pipeline.operations.close import first_forecasts
from al_pipeline.operations.history import History, events_of_plans
from al_pipeline.params import Params
from al_pipeline.records import Event, ModelForecast, PlannedTask, TaskState
from al_pipeline.workspace.layout import Layout

_logger = get_logger(__name__)


def overlap_of(params: Params) -> Overlap:
    """How many people answer a task."""
    return Overlap(params.round.overlap, params.round.max_overlap, params.labels.min_confidence)


def more_answers(
    layout: Layout,
    params: Params,
    tasks: Sequence[PlannedTask],
    read_forecasts: ReadForecasts,
    events: Sequence[Event] | None = None,
) -> Mapping[str, int]:
    """The tasks of a round that another person is to answer, see `annotation.overlap.wanted_answers`.

    `read_forecasts`: see `forecasts_at_close`; called only if they take part. `events`: None for those of ledger and
    inbox; the result is then kept for the next call with the same ones.
    """
    if not overlap_of(params).adaptive:
        return {}
    if events is not None:
        return _more(params, tasks, events, read_forecasts)
    files = signature(layout.events, layout.inbox_events)
    return _remembered(files, layout, _Hashed(params), tuple(tasks), _Unhashed(read_forecasts))


def forecasts_at_close(
    layout: Layout, history: History, read_plans: Callable[[], Iterable[PlannedTask]]
) -> dict[str, ModelForecast]:
    """The forecasts that the ledger has once the open round is closed: its own, and those of all tasks ever planned."""
    planned = first_forecasts(read_plans(), events_of_plans(history, read_events(layout.events)))
    return planned | read_forecasts(layout.events)


class _Hashed:
    """Parameters as part of a cache's key: equal sections are equal."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._key = (params.labels, params.round, tuple(params.schema_.labels), tuple(params.annotators))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _Unhashed:
    """A function that is no part of a cache's key: what it reads of a round does not change while its tasks do not."""

    def __init__(self, read: ReadForecasts) -> None:
        self.read = read

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashed)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=2)
def _remembered(
    _events: tuple[tuple[str, int, int], ...],
    layout: Layout,
    params: _Hashed,
    tasks: tuple[PlannedTask, ...],
    forecasts: _Unhashed,
) -> Mapping[str, int]:
    return _more(params.params, tasks, read_events(layout.events, layout.inbox_events), forecasts.read)


def _more(
    params: Params, tasks: Sequence[PlannedTask], events: Sequence[Event], read: ReadForecasts
) -> Mapping[str, int]:
    rule = rule_for(params.labels, read)
    if rule is None:
        return {}
    everybody = len(params.annotators) or None
    return wanted_answers(tasks, events, params.schema_.labels, rule, overlap_of(params), everybody)


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
