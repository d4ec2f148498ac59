"""The fold of `al live`, which takes in what is new: the same as the fold at once, whatever comes."""

from __future__ import annotations

import random

import pytest
from annotating import planned
from msgspec.structs import replace
from test_aggregation import control, event, imported

from al_pipeline.annotation.active_events import standing_answers, superseded
from al_pipeline.annotation.aggregation import fold_by
from al_pipeline.annotation.tasks import standing
from al_pipeline.live.plan import knowledge
from al_pipeline.operations.init import template, with_schema
from al_pipeline.operations.running_fold import RunningFold
from al_pipeline.params import parse_params
from al_pipeline.records import Event

LABELS = ("ham", "spam", "other")
PARAMS = parse_params(with_schema(template("params.yaml"), LABELS, "What is it?", 10))
ITEMS = [f"item-{number}" for number in range(6)]
TASKS = [planned("ws", 1, item) for item in ITEMS]


def drawn(draw: random.Random, before: list[Event], number: int, odd: bool) -> Event:
    """Some event: mostly answers, skips, changes and deletions; if `odd`, also quarantines and corrections."""
    item, who = draw.choice(ITEMS), draw.choice(["ann@x.org", "bob@x.org", "eve@x.org"])
    kind = draw.choice(["label", "label", "skip", "supersede", "delete", "adjudicate", "task_gone"])
    if odd and before and draw.random() < 0.1:
        return control("quarantine", draw.choice(before), id_=f"control-{number}")
    if odd and draw.random() < 0.05:
        return event("correct", who, item=f"{item}-new", targets=(item,), annotation_key=f"correct:{item}")
    if kind == "task_gone":
        return event(kind, "", item=item, annotation_key=f"ws:0001:{item}", reason=str(number))
    label = None if kind in ("skip", "delete") else draw.choice(LABELS)
    return event(kind, who, label, item=item, reason=str(number))


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_new_folds_as_everything_at_once(seed: int, odd: bool) -> None:
    draw = random.Random(seed)
    events: list[Event] = [imported("spam", ITEMS[0]), imported("ham", "item-9")]
    running = RunningFold(PARAMS, {events[0].event_id}, dict)
    running.add_tasks(TASKS[:2])
    for number in range(40):
        if number == 10:
            running.add_tasks(TASKS)
        tasks = TASKS[: 2 if number < 10 else None]
        new = running.update(list(events))
        assert not number or new == events[-1:]
        whole = fold_by(PARAMS, events, dict)
        assert running.labels == {row.item_id: row.label for row in whole.labeled}
        assert running.tests == {row.item_id for row in whole.test}
        ignored = {row.item_id for row in whole.unresolved if row.kind == "ignored" and row.part == "pool"}
        assert running.ignored == ignored and running.corrected == superseded(events).keys()
        assert running.standing == standing(tasks, events, PARAMS.round.overlap)
        people: dict[str, set[str]] = {key: set() for key, how in running.standing.items() if how == "open"}
        for one in standing_answers(events).values():
            if one.push_key in people:
                people[one.push_key].add(one.annotator)
        assert running.open_keys == people
        assert running.knowledge() == knowledge(events)
        events.append(drawn(draw, events, number, odd))


def test_the_thousandth_answer_folds_no_more_than_the_second() -> None:
    events = [replace(imported("spam", f"old-{number}")) for number in range(500)]
    tasks = [planned("ws", 1, f"item-{number}") for number in range(1000)]
    running = RunningFold(PARAMS, {one.event_id for one in events}, dict)
    running.add_tasks(tasks)
    running.update(list(events))
    work = []
    for task in tasks:
        before = running.folded
        events.append(event("label", "ann@x.org", "ham", item=task.item_id, annotation_key=f"{task.push_key}#p.1"))
        running.update(list(events))
        work.append(running.folded - before)
    assert max(work[1:]) == 1, "the first answer is that of the first person, on whom rules depend"
    assert len(running.labels) == 1500 and not running.open_keys
