"""Labels and tasks of the open round while people answer: `al live` folds what is new.

What the other commands fold at once (`annotation.aggregation`, `annotation.tasks`), and with the same result.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from al_pipeline.annotation.active_events import CONTROLS, corrected_items, counted, standing_answers
from al_pipeline.annotation.aggregation import Folded, fold, fold_by, most_asked, skips_to_give_up
from al_pipeline.annotation.confidence import ReadForecasts, rule_for
from al_pipeline.annotation.tasks import Standing, standing_of
from al_pipeline.annotation.votes import times_asked
from al_pipeline.params import Params
from al_pipeline.records import Event, PlannedTask


class RunningFold:
    """Labels and tasks of the open round, as all events say, at the cost of those that are new.

    Further answers change the items that they are about, and nothing else, unless an intervention or a correction is
    among the events, the model takes part in the consensus, or the number of skips that give up an item changes. Then
    all events are folded again.
    """

    def __init__(self, params: Params, in_ledger: Collection[str], read_forecasts: ReadForecasts) -> None:
        self.events: Sequence[Event] = ()
        self.labels: dict[str, str] = {}
        """The label of each labelled item of the pool."""
        self.tests: set[str] = set()
        """The labelled items of the test set."""
        self.ignored: set[str] = set()
        """Items of the pool that are not asked any more."""
        self.corrected: frozenset[str] = frozenset()
        """Items whose text was corrected."""
        self.fresh: set[str] = set()
        """Items with a label that is not in the ledger."""
        self.standing: dict[str, Standing] = {}
        """Of each task asked, by push key."""
        self.open_keys: dict[str, frozenset[str]] = {}
        """The push keys of the open tasks, each with the people who have answered or skipped it."""
        self.folded = 0
        """How many events were folded so far, each as often as it was."""
        self._params, self._ledger, self._read_forecasts = params, in_ledger, read_forecasts
        self._everybody = len(params.annotators) or None
        self._people: set[str] = set()
        self._skips = 0
        self._is_plain = False
        self._of_item: defaultdict[str, list[Event]] = defaultdict(list)
        self._tasks: dict[str, PlannedTask] = {}
        self._keys_of: defaultdict[str, list[str]] = defaultdict(list)
        self._digest = hashlib.sha256()
        self._more: Mapping[str, int] = {}

    def knowledge(self) -> tuple[int, str]:
        """`live.plan.knowledge` of its events."""
        return len(self.events), self._digest.hexdigest()[:16]

    def add_tasks(self, tasks: Sequence[PlannedTask]) -> None:
        """Add tasks that were asked; those that it has are left out."""
        new = [task for task in tasks if task.push_key not in self._tasks]
        for task in new:
            self._tasks[task.push_key] = task
            self._keys_of[task.item_id].append(task.push_key)
        self._stand(new)

    def update(self, events: Sequence[Event], more: Mapping[str, int] | None = None) -> list[Event]:
        """Take in all events of ledger and inbox; return those that are new. `more`: see `tasks.standing`."""
        known = len(self.events)
        follows = known <= len(events) and (known == 0 or events[known - 1].event_id == self.events[-1].event_id)
        new = list(events[known:] if follows else events)
        if not follows:
            self._digest = hashlib.sha256()
        for event in new:
            self._digest.update(event.event_id.encode())
        self.events = events
        plain = all(event.type not in (*CONTROLS, "correct") for event in new)
        if follows and self._is_plain and plain and not more and not self._more and self._fold_new(new):
            return new
        self._more = more or {}
        self._fold_all()
        return new

    def _fold_new(self, new: Sequence[Event]) -> bool:
        """Fold the items that `new` events are about; return whether that is enough."""
        self._people.update(event.annotator for event in new if event.type in ("label", "skip", "supersede"))
        if self._enough_skips() != self._skips:
            return False
        for event in new:
            self._of_item[event.item_id].append(event)
        items = {event.item_id for event in new}
        about = [event for item in sorted(items) for event in self._of_item[item]]
        self.folded += len(about)
        limit = most_asked(bool(self._params.select.relabel))
        found = fold(about, self._params.schema_.labels, self._skips, times_asked(about), None, limit)
        for item in items:
            self.labels.pop(item, None)
            self.tests.discard(item)
            self.ignored.discard(item)
        self._take(found)
        self.fresh |= {one.item_id for one in new if one.label is not None and one.event_id not in self._ledger}
        self._stand([self._tasks[key] for item in items for key in self._keys_of.get(item, ())])
        return True

    def _fold_all(self) -> None:
        events = self.events
        self.folded += len(events)
        found = counted(events)
        self._is_plain = found.schemas is None and len(found.events) == len(events)
        self._is_plain = self._is_plain and all(event.type != "correct" for event in events)
        self.corrected = frozenset(corrected_items(found.events))
        folded = fold_by(self._params, events, self._read_forecasts)
        self._is_plain = self._is_plain and not _has_rule(self._params)
        self.labels, self.tests, self.ignored = {}, set(), set()
        self._take(folded)
        self._people = {one.annotator for one in found.events if one.type in ("label", "skip", "supersede")}
        self._skips = self._enough_skips()
        self._of_item = defaultdict(list)
        for event in found.events:
            self._of_item[event.item_id].append(event)
        fresh = {one.item_id for one in found.events if one.label is not None and one.event_id not in self._ledger}
        self.fresh = fresh - self.corrected
        self.standing, self.open_keys = {}, {}
        everything = standing_of(
            [*self._tasks.values()], found.events, self._params.round.overlap, self._everybody, self._more, self._skips
        )
        self._note(everything)

    def _enough_skips(self) -> int:
        count = len(self._people) if self._everybody is None else self._everybody
        return skips_to_give_up((), max(1, count))

    def _take(self, found: Folded) -> None:
        self.labels |= {row.item_id: row.label for row in found.labeled}
        self.tests |= {row.item_id for row in found.test}
        self.ignored |= {row.item_id for row in found.unresolved if row.kind == "ignored" and row.part == "pool"}

    def _stand(self, tasks: Sequence[PlannedTask]) -> None:
        """Find out again which of these tasks are open."""
        if not tasks:
            return
        about = [event for item in {task.item_id for task in tasks} for event in self._of_item.get(item, ())]
        found = standing_of(tasks, about, self._params.round.overlap, self._everybody, self._more, self._skips or 1)
        for task in tasks:
            if task.item_id in self.corrected:
                found[task.push_key] = "given_up"
        self._note(found)

    def _note(self, found: Mapping[str, Standing]) -> None:
        for key, how in found.items():
            self.standing[key] = how
            if how == "open":
                own = [event for event in self._of_item.get(self._tasks[key].item_id, ()) if event.push_key == key]
                self.open_keys[key] = frozenset(one.annotator for one in standing_answers(own).values())
            else:
                self.open_keys.pop(key, None)


def _has_rule(params: Params) -> bool:
    """Whether labels are decided by more than the answers to each item."""
    return rule_for(params.labels, dict) is not None
