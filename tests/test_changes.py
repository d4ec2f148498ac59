"""Laws of comparing what Label Studio holds with what is known: nothing recorded twice, nothing lost, in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.annotation.active_events import standing_answers
from al_pipeline.annotation.changes import AnnotationDiff, KnownAnswers
from al_pipeline.operations.round_tasks import _lead_times
from al_pipeline.records import Annotation, Answer, AnsweredTask, Event, PlannedTask, RefusalReason, push_key

UID, NOW, BORN = "p", "2026-01-02T00:00:00+00:00", "2026-01-01T00:00:00.000000Z"
KEYS = [push_key("w", 1, item) for item in ("a", "b", "c")]
PLANS = {
    key: PlannedTask(key, key[-1], f"hash {key[-1]}", "pool", 1, rank, 0.0, "margin", 1.0)
    for rank, key in enumerate(KEYS)
}
JUNK = "junk"
"""What an annotation says that cannot be taken."""

State = Mapping[str, Mapping[int, tuple[str, str, int]]]
"""What Label Studio holds: of each task, by number of the annotation, who says what since when."""


def judge(task: AnsweredTask, plan: PlannedTask, annotation: Annotation) -> Answer | RefusalReason:
    said = annotation.result[0]["label"]
    return "unknown label" if said == JUNK else Answer(said, None)


def time(minute: int) -> str:
    return f"2026-01-01T01:{minute:02}:00.000000Z"


def task(key: str, rows: Mapping[int, tuple[str, str, int]]) -> AnsweredTask:
    held = tuple(
        # The number tells who made it and when; label and minute are what an edit changes.
        Annotation(number, who, ({"label": label},), False, time(0), time(minute), 1.0)
        for number, (who, label, minute) in rows.items()
    )
    return AnsweredTask(KEYS.index(key) + 1, key, time(59), {}, held, BORN)


def compare(state: State, events: Sequence[Event], refused: Sequence[Mapping[str, object]]) -> AnnotationDiff:
    """Compare all that Label Studio holds with what is known."""
    known = KnownAnswers(events, refused, UID)
    diff = AnnotationDiff(UID, PLANS, 1, judge, NOW, known)
    for key, held in state.items():
        diff.add(task(key, held))
    for key in diff.keys_with_losses():
        diff.add_copy(task(key, state[key]))
    diff.record_losses()
    diff.record_gone_tasks()
    return diff


def test_the_time_of_an_annotation_is_its_newest_since_edits_add_to_it() -> None:
    events: list[Event] = []
    moments: list[tuple[int, str, float | None]] = [(1, "ham", 4.0), (2, "spam", 9.5), (3, "ham", None)]
    for minute, label, seconds in moments:
        answered = task(KEYS[0], {1: ("ann", label, minute), 2: ("bob", "ham", 1)})
        first, second = answered.annotations
        diff = AnnotationDiff(UID, PLANS, 1, judge, NOW, KnownAnswers(events, [], UID))
        diff.add(replace(answered, annotations=(replace(first, lead_time=seconds), replace(second, lead_time=2.0))))
        events += diff.events()
    ann, bob = (next(event.annotation_key for event in events if event.annotator == who) for who in ("ann", "bob"))
    assert [event.lead_time for event in events if event.annotation_key == ann] == [4.0, 9.5, None]
    assert _lead_times(events) == {ann: 9.5, bob: 2.0}, "not 13.5: Label Studio has added it up already"


annotation = st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from(["ham", "spam", JUNK]), st.integers(1, 3))
states = st.dictionaries(st.sampled_from(KEYS), st.dictionaries(st.integers(1, 3), annotation, max_size=3))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(states, max_size=5))
def test_what_stands_is_what_label_studio_holds_and_nothing_is_recorded_twice(history: list[State]) -> None:
    events: list[Event] = []
    refused: list[Mapping[str, object]] = []
    for state in history:
        diff = compare(state, events, refused)
        new = diff.events()
        one_by_one = KnownAnswers(events, refused, UID)
        for event in new:
            one_by_one.digest()
            one_by_one.add(event)
        assert one_by_one.digest() == KnownAnswers([*events, *new], refused, UID).digest()
        assert len({event.event_id for event in (*events, *new)}) == len(events) + len(new), "no id is used twice"
        events, refused = [*events, *new], [*refused, *diff.refused]
        again = compare(state, events, refused)
        assert (again.events(), again.refused, again.vanished) == ([], [], 0)
        held = {(key, who, label) for key, rows in state.items() for who, label, _ in rows.values() if label != JUNK}
        stands = {(event.push_key, event.annotator, event.label) for event in standing_answers(events).values()}
        assert {row for row in stands if row[0] in state} == held, "answers to tasks that are gone stand beside them"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(states, states, st.randoms(use_true_random=False))
def test_the_order_of_tasks_and_annotations_does_not_matter(before: State, now: State, random) -> None:  # type: ignore[no-untyped-def]
    first = compare(before, [], [])
    known, refused = first.events(), first.refused
    shuffled = {
        key: dict(random.sample(sorted(now[key].items()), len(now[key])))
        for key in random.sample(sorted(now), len(now))
    }
    one, other = compare(now, known, refused), compare(shuffled, known, refused)
    assert {event.event_id for event in one.events()} == {event.event_id for event in other.events()}
    assert {row["refused_id"] for row in one.refused} == {row["refused_id"] for row in other.refused}
    assert one.vanished == other.vanished


def test_an_answer_on_another_copy_of_its_task_is_not_lost() -> None:
    held = {KEYS[0]: {1: ("ann", "ham", 1)}}
    known = compare(held, [], []).events()
    diff = AnnotationDiff(UID, PLANS, 1, judge, NOW, KnownAnswers(known, [], UID))
    diff.add(replace(task(KEYS[0], {}), task_id=9))
    assert diff.keys_with_losses() == [KEYS[0]]
    diff.add_copy(task(KEYS[0], held[KEYS[0]]))
    diff.record_losses()
    assert (diff.events(), diff.vanished) == ([], 0)


def test_a_task_that_is_gone_keeps_its_answers_and_is_recorded_once() -> None:
    known = compare({KEYS[0]: {1: ("ann", "ham", 1)}}, [], []).events()
    diff = compare({}, known, [])
    assert [event.type for event in diff.events()] == ["task_gone"]
    assert diff.vanished == 1
    assert [event.label for event in standing_answers([*known, *diff.events()]).values()] == ["ham"]
    assert compare({}, [*known, *diff.events()], []).events() == []
