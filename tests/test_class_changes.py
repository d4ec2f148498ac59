"""Answers in changed classes: what each fold makes of renames, merges, splits, retired and added classes, and undos."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.annotation.active_events import active, changed_by, schemas_of
from al_pipeline.annotation.aggregation import Folded, fold
from al_pipeline.annotation.class_changes import classes_after, related
from al_pipeline.annotation.confidence import ConsensusRule
from al_pipeline.annotation.gold import gold_items
from al_pipeline.annotation.votes import labels_in_use, times_asked
from al_pipeline.data.outputs import Predictions
from al_pipeline.errors import UsageError
from al_pipeline.evaluation.comparison import common_groups, compare, group_names, in_common_classes
from al_pipeline.evaluation.promotion import decide
from al_pipeline.operations.class_changes import Asked, checked
from al_pipeline.records import ClassChange, Event, Selection
from al_pipeline.rounds.interventions import Intervention, control_event, parse_intervention

ABC = ("a", "b", "c")
ITEMS, PEOPLE = ("i0", "i1", "i2", "i3"), ("p", "q", "r")


class Ledger:
    """A ledger under construction, and the classes that its newest event leaves."""

    def __init__(self, classes: Sequence[str] = ABC) -> None:
        self.events: list[Event] = []
        self.stack: list[tuple[int, tuple[str, ...]]] = []
        self.classes = tuple(classes)
        self.numbers = count(1)

    def say(self, item: str, who: str, label: str | None, kind: str = "label") -> Event:
        number = next(self.numbers)
        event = Event(
            event_id=f"event {number}",
            type=kind if label is not None else "skip",  # type: ignore[arg-type]
            item_id=item,
            content_hash=f"hash {item}",
            part="test" if item == "i3" else "pool",
            round=0,
            annotation_key=f"ws:0000:{item}#p.{number}",
            annotator=who,
            label=label,
        )
        self.events.append(event)
        return event

    def intervene(self, kind: str, **values: object) -> int:
        number = next(self.numbers)
        made = Intervention(number, kind, 0, "me", "2026-01-01", "", labels=True, **values)  # type: ignore[arg-type]
        assert parse_intervention(made.to_row(), "there") == made
        self.events.append(control_event(made))
        return number

    def change(self, kind: str, old: Sequence[str], new: Sequence[str], *, again: bool = False) -> None:
        change = checked(Asked(kind, tuple(old), tuple(new), again), self.classes)
        self.stack.append((self.intervene("schema", change=change), self.classes))
        self.classes = classes_after(change)

    def undo(self) -> None:
        number, self.classes = self.stack.pop()
        self.intervene("undo", undoes=number)

    def fold(self) -> Folded:
        return fold(self.events, self.classes, len(PEOPLE), times_asked(self.events))

    def labels(self) -> dict[str, str]:
        folded = self.fold()
        return {row.item_id: row.label for row in (*folded.labeled, *folded.test)}

    def open(self) -> dict[str, str]:
        return {row.item_id: row.kind for row in self.fold().unresolved}


@pytest.mark.parametrize(
    ("kind", "old", "new", "after"),
    [
        ("rename", "b", "z", "azc"),
        ("merge", "ab", "z", "zc"),
        ("merge", "bc", "b", "ab"),
        ("merge", "c", "a", "ab"),
        ("split", "b", "xy", "axyc"),
        ("split", "b", "xc", "axc"),
        ("split", "b", "ac", "ac"),
        ("retire", "a", "", "bc"),
        ("add", "", "d", "abcd"),
    ],
)
def test_the_place_of_new_classes(kind: str, old: str, new: str, after: str) -> None:
    change = checked(Asked(kind, tuple(old), tuple(new)), ABC)
    assert classes_after(change) == tuple(after)
    for name in ABC:  # the relation is the same from both sides
        for other in classes_after(change):
            assert (other in related(change, name)) == (name in related(change, other, back=True)), (name, other)


@pytest.mark.parametrize(
    ("kind", "old", "new", "said"),
    [
        ("rename", ["z"], ["y"], "'z' is not a class"),
        ("rename", ["a"], ["b"], "'b' is a class already; `al schema merge a INTO b`"),
        ("add", [], ["b"], "'b' is a class already"),
        ("add", [], [" d"], "blank at its ends"),
        ("add", [], ["a$"], r"no `\$`"),
        ("rename", ["a"], ["x" * 101], "1 to 100 characters"),
        ("merge", ["a"], ["z"], "two classes or more"),
        ("merge", ["a", "b", "c"], ["z"], "at least two classes"),
        ("split", ["a"], ["a", "z"], "one of its own parts"),
        ("split", ["a"], ["z"], "two parts or more"),
    ],
)
def test_what_cannot_be_changed_is_refused(kind: str, old: list[str], new: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        checked(Asked(kind, tuple(old), tuple(new)), ABC)


def test_two_classes_cannot_become_one() -> None:
    with pytest.raises(UsageError, match="at least two"):
        checked(Asked("retire", ("a",)), ("a", "b"))


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "rename", "before": ["a", "b"], "old": ["z"], "new": ["y"]},
        {"kind": "split", "before": ["a", "b"], "old": ["a"], "new": ["y"]},
        {"kind": "add", "before": [], "new": ["y"]},
        {"kind": "retire", "before": ["a", "a"], "old": ["a"]},
        {"kind": "drop", "before": ["a", "b"]},
        {"kind": "add", "before": ["a"], "new": ["y" * 101]},
    ],
)
def test_a_change_that_the_engine_did_not_write_is_refused(row: object) -> None:
    known = {"number": 1, "kind": "schema", "round": 0, "by": "x", "at": "t", "reason": "", "change": row}
    with pytest.raises(Exception, match="is not a valid intervention"):
        parse_intervention(known, "there")


def test_two_people_agree_after_a_merge() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a"), ledger.say("i0", "q", "b")
    assert ledger.open() == {"i0": "tie"}
    ledger.change("merge", "ab", "b")
    [row] = ledger.fold().labeled
    assert (row.label, row.agreement, row.answers) == ("b", 1.0, 2)
    ledger.undo()
    assert ledger.open() == {"i0": "tie"}


def test_a_merged_minority_becomes_the_majority() -> None:
    ledger = Ledger()
    for who, label in zip("pqrst", "aabbc", strict=True):
        ledger.say("i0", who, label)
    ledger.say("i0", "u", "c"), ledger.say("i0", "v", "c")
    assert ledger.labels() == {"i0": "c"}, "3 of 7"
    ledger.change("merge", "ab", "z")
    assert ledger.labels() == {"i0": "z"}, "4 of 7: votes are mapped before they are counted"


def test_late_answers_in_old_classes_are_understood() -> None:
    ledger = Ledger()
    ledger.change("rename", "a", "z")
    ledger.say("i0", "p", "a")
    ledger.change("merge", "zb", "m")
    ledger.say("i1", "p", "a"), ledger.say("i2", "p", "z"), ledger.say("i3", "p", "m")
    assert ledger.labels() == dict.fromkeys(ITEMS, "m")
    ledger.undo()
    assert ledger.labels() == {"i0": "z", "i1": "z", "i2": "z"}
    assert ledger.open() == {"i3": "again"}, "nobody knows whether it was z or b"
    ledger.undo()
    ledger.say("i3", "q", "z")
    assert ledger.labels() == dict.fromkeys(ITEMS, "a"), "a page that was opened before the undo"


def test_a_class_that_comes_back_is_a_new_one() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a")
    ledger.change("rename", "a", "z")
    ledger.change("add", "", "a")
    ledger.say("i1", "p", "a")
    assert ledger.labels() == {"i0": "z", "i1": "a"}
    schemas = schemas_of(ledger.events)
    assert schemas is not None and schemas.former() == frozenset()


def test_a_class_added_by_hand_between_two_changes_is_not_taken_away_by_undoing_the_second() -> None:
    ledger = Ledger()
    ledger.change("rename", "a", "z")
    ledger.classes = (*ledger.classes, "own")  # in params.yaml
    ledger.say("i0", "p", "own")
    ledger.change("rename", "b", "y")
    ledger.undo()
    schemas = schemas_of(ledger.events)
    assert schemas is not None and schemas.former() == {"a", "y"}
    assert ledger.labels() == {"i0": "own"}


def test_the_items_of_a_split_class_are_asked_afresh() -> None:
    ledger = Ledger()
    for who, label in zip("pqr", "aab", strict=True):
        ledger.say("i0", who, label)
    for who, label in zip("pqr", "abb", strict=True):
        ledger.say("i1", who, label)
    ledger.say("i2", "p", "b"), ledger.say("i3", "p", "a")
    ledger.change("split", "a", "xy")
    assert ledger.labels() == {"i1": "b", "i2": "b"}, "b was the label of i1, and had no majority in i0"
    assert ledger.open() == {"i0": "again", "i3": "again"}
    assert times_asked(ledger.events) == {"i1": 1, "i2": 1}
    ledger.say("i0", "s", "x")
    assert ledger.labels()["i0"] == "x", "earlier answers to the old question do not count against it"
    ledger.say("i0", "t", "a")
    assert ledger.labels()["i0"] == "x", "nor does a late one"
    ledger.undo()
    assert ledger.labels() == {"i0": "a", "i1": "b", "i2": "b", "i3": "a"}, "the parts are the class again"


def test_a_ruling_of_a_split_class_is_asked_again_whatever_others_said() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "b"), ledger.say("i0", "q", "b"), ledger.say("i0", "boss", "a", "adjudicate")
    assert ledger.labels() == {"i0": "a"}
    ledger.change("split", "a", "xy")
    assert (ledger.labels(), ledger.open()) == ({}, {"i0": "again"})


def test_gold_follows_its_class_and_is_none_without_it() -> None:
    ledger = Ledger()
    gold = ledger.say("i0", "boss", "a", "gold")
    ledger.events[-1] = replace(gold, annotation_key="gold:hash i0")
    ledger.say("i0", "p", "b")
    ledger.change("rename", "a", "z")
    assert gold_items(active(ledger.events))["i0"].label == "z" and ledger.open() == {"i0": "ignored"}
    ledger.change("split", "z", "xy")
    assert gold_items(active(ledger.events)) == {} and ledger.open() == {"i0": "again"}
    ledger.undo()
    assert gold_items(active(ledger.events))["i0"].label == "z"


def test_an_older_answer_of_the_same_person_does_not_come_back() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "b"), ledger.say("i0", "p", "a"), ledger.say("i0", "q", "b"), ledger.say("i0", "r", "b")
    ledger.change("retire", "a", "")
    [row] = ledger.fold().labeled
    assert (row.label, row.answers) == ("b", 2)


def test_an_imported_label_does_not_outweigh_a_person_whose_class_is_gone() -> None:
    ledger = Ledger()
    ledger.say("i0", "import", "b", "import"), ledger.say("i0", "p", "a")
    ledger.change("split", "a", "xy")
    assert ledger.open() == {"i0": "again"}


@pytest.mark.parametrize(("again", "kind"), [(False, "ignored"), (True, "again")])
def test_the_items_of_a_retired_class(again: bool, kind: str) -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a"), ledger.say("i1", "p", "b")
    ledger.change("retire", "a", "", again=again)
    [row] = ledger.fold().unresolved
    assert (row.item_id, row.kind, row.part) == ("i0", kind, "pool") and "somebody retired the class 'a'" in row.reason
    ledger.say("i0", "q", "b")
    assert ledger.labels() == {"i0": "b", "i1": "b"}


def test_skips_settle_an_item_of_a_split_class() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a")
    ledger.change("split", "a", "xy")
    ledger.say("i0", "q", None), ledger.say("i0", "p", None)
    assert ledger.open() == {"i0": "ignored"}


def test_an_added_class_that_is_taken_back_is_asked_again() -> None:
    ledger = Ledger()
    ledger.change("add", "", "d")
    ledger.say("i0", "p", "d")
    assert ledger.labels() == {"i0": "d"}
    ledger.undo()
    assert ledger.open() == {"i0": "again"}


def test_a_split_that_is_merged_again_gives_the_answers_back() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a")
    ledger.change("split", "a", "xy")
    ledger.say("i1", "p", "x")
    ledger.change("merge", "xy", "z")
    assert ledger.labels() == {"i0": "z", "i1": "z"}


def test_a_rollback_to_before_a_change_cancels_it() -> None:
    ledger = Ledger()
    last = ledger.say("i0", "p", "a")
    ledger.change("merge", "ab", "z")
    ledger.say("i1", "p", "z")
    rollback = Intervention(99, "rollback", 1, "me", "2026-01-01", "", labels=True, to=0)
    ledger.events.append(control_event(rollback, last.event_id))
    ledger.classes = ABC
    assert ledger.labels() == {"i0": "a"}
    ledger.events.append(control_event(Intervention(100, "undo", 1, "me", "t", "", labels=True, undoes=99)))
    ledger.classes = ("z", "c")
    assert ledger.labels() == {"i0": "z", "i1": "z"}


def test_a_revocation_by_label_means_the_class_of_its_time() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a"), ledger.say("i1", "p", "b")
    ledger.change("rename", "a", "z")
    ledger.say("i2", "p", "z")
    ledger.intervene("revoke", selection=Selection(label="z"))
    assert ledger.labels() == {"i1": "b"}
    ledger.undo()
    assert ledger.labels() == {"i1": "b"}
    ledger.intervene("restore", selection=Selection(label="a"))
    assert ledger.labels() == {"i0": "a", "i1": "b", "i2": "a"}


def test_whose_items_a_change_concerns() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a"), ledger.say("i1", "p", "b"), ledger.say("i2", "p", None)
    ledger.change("rename", "a", "z")
    assert changed_by(ledger.events) == {ledger.events[-1].event_id: {"i0"}}


# Laws ---------------------------------------------------------------------------------------------------------------

SAID = st.lists(st.tuples(st.sampled_from(ITEMS), st.sampled_from(PEOPLE), st.sampled_from([*ABC, None])), max_size=14)


def told(said: Sequence[tuple[str, str, str | None]]) -> Ledger:
    ledger = Ledger()
    for item, who, label in said:
        ledger.say(item, who, label)
    return ledger


@given(SAID)
def test_a_rename_and_back_is_the_identity(said: list[tuple[str, str, str | None]]) -> None:
    ledger, before = told(said), told(said).fold()
    ledger.change("rename", "a", "z")
    ledger.change("rename", "z", "a")
    assert ledger.fold() == before


CHANGES = st.sampled_from(
    [
        ("rename", "a", "z"),
        ("merge", "ab", "z"),
        ("merge", "ac", "a"),
        ("split", "a", "xy"),
        ("split", "b", "xc"),
        ("retire", "c", ""),
        ("add", "", "d"),
    ]
)


@given(SAID, CHANGES, SAID)
def test_an_undo_gives_every_label_back(
    said: list[tuple[str, str, str | None]],
    change: tuple[str, str, str],
    later: list[tuple[str, str, str | None]],
) -> None:
    """Answers that came in between change only their own items."""
    ledger, before = told(said), told(said).fold()
    ledger.change(*change)
    since = [(item, who, label) for item, who, label in later if label in ledger.classes]
    for item, who, label in since:
        ledger.say(item, who, label)
    ledger.undo()
    touched = {item for item, _, _ in since}

    def rest(folded: Folded) -> list[object]:
        rows = (*folded.labeled, *folded.test, *folded.unresolved)
        return [row for row in rows if row.item_id not in touched]

    assert rest(ledger.fold()) == rest(before)
    if not since:
        assert ledger.fold() == before


@given(SAID)
def test_exact_changes_are_like_other_answers(said: list[tuple[str, str, str | None]]) -> None:
    """A merge gives what people would have given who had said the merged class: votes first, then the majority."""
    ledger = told(said)
    ledger.change("merge", "ab", "z")
    merged = [replace(event, label="z") if event.label in ("a", "b") else event for event in told(said).events]
    assert ledger.fold() == fold(merged, ("z", "c"), len(PEOPLE), times_asked(merged))
    once = ledger.fold()
    ledger.change("add", "", "d")
    ledger.change("merge", "zd", "z")
    assert ledger.fold() == once, "a second merge of the same answers changes nothing"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), st.sampled_from(ITEMS), st.sampled_from(PEOPLE), st.integers(0, 9)),
        st.tuples(st.just("late"), st.sampled_from(ITEMS), st.sampled_from(PEOPLE), st.integers(0, 9)),
        st.tuples(st.sampled_from(["rename", "merge", "split", "retire", "add"]), st.integers(0, 9), st.integers(0, 9)),
        st.tuples(st.just("undo")),
    ),
    max_size=25,
)


@given(STEPS)
@settings(max_examples=200)
def test_every_fold_speaks_the_present_classes(steps: list[tuple[object, ...]]) -> None:
    """Whatever was changed and said in whatever order: all labels are present classes, and each item is in one list."""
    ledger, ever, fresh = Ledger(), {*ABC}, (f"n{number}" for number in count())
    for name, *values in steps:
        one, other = ledger.classes[int(values[-1]) % len(ledger.classes)] if values else "", ""
        if name == "say":
            ledger.say(str(values[0]), str(values[1]), one)
        elif name == "late":
            ledger.say(str(values[0]), str(values[1]), sorted(ever)[int(values[2]) % len(ever)])
        elif name == "undo":
            if ledger.stack:
                ledger.undo()
        else:
            other = ledger.classes[int(values[0]) % len(ledger.classes)]
            asked = {
                "rename": ([one], [next(fresh)]),
                "merge": ([one, other], [next(fresh)]),
                "split": ([one], [next(fresh), next(fresh)]),
                "retire": ([one], []),
                "add": ([], [next(fresh)]),
            }[str(name)]
            try:
                ledger.change(str(name), *asked)
            except UsageError:
                continue
            ever |= {*ledger.classes}
    folded = ledger.fold()
    assert {row.label for row in (*folded.labeled, *folded.test)} <= {*ledger.classes}
    assert set(labels_in_use(ledger.events)) <= {*ledger.classes}
    ids = [row.item_id for row in (*folded.labeled, *folded.test, *folded.unresolved)]
    assert len(ids) == len(set(ids))
    answered = {event.item_id for event in ledger.events if event.label is not None}
    assert answered <= set(ids), "an item with an answer is labelled, tied, ignored or asked again"
    assert active(active(ledger.events)) == active(ledger.events)


# The gate -----------------------------------------------------------------------------------------------------------


class Limits:
    max_drop, min_test_per_class = 0.02, 1


def test_models_are_compared_in_the_classes_that_both_know() -> None:
    assert common_groups(["z", "c"], {"a": frozenset("z"), "b": frozenset("z"), "c": frozenset("c")}) == [0, 1]
    related = {"a": frozenset("xy"), "b": frozenset("b")}
    groups = common_groups(["x", "y", "b"], related)
    assert (groups, group_names(["x", "y", "b"], groups)) == ([0, 0, 1], ["x+y", "b"])
    assert common_groups(["x", "c"], {"a": frozenset("x"), "b": frozenset("xc"), "c": frozenset("c")}) == [0, 0]
    assert common_groups(["a", "d"], {"a": frozenset("a")}) == [0, 1]


def test_the_gate_holds_or_compares_across_a_split() -> None:
    truth = np.array([0, 1, 2, 2])
    champion = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])  # of x+y and b
    confused = np.array([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.1, 0.8]])
    bad = np.array([[0.1, 0.1, 0.8]] * 4)

    def judge(challenger: object, groups: list[int], labels: object = truth) -> object:
        rng = np.random.default_rng(1)
        return decide(champion, challenger, labels, ["x", "y", "b"], Limits(), rng, 100, groups=groups)  # type: ignore[arg-type]

    found = judge(confused, [0, 0, 1])
    assert found.verdict == "promoted" and found.reasons[-1] == "compared in the classes x+y, b, which both models know"  # type: ignore[attr-defined]
    assert judge(bad, [0, 0, 1]).verdict == "refused"  # type: ignore[attr-defined]
    assert "y 0" in judge(confused, [0, 0, 1], np.array([0, 0, 2, 2])).reasons[0]  # type: ignore[attr-defined]
    assert "knows none" in judge(confused, [0, 0, 0]).reasons[0]  # type: ignore[attr-defined]


def test_both_models_of_a_comparison_speak_common_classes() -> None:
    before = Predictions(("i", "k"), ("a", "b"), ("a", "b"), np.array([[0.9, 0.1], [0.2, 0.8]]))
    after = Predictions(("i", "k"), ("y", "b"), ("x", "y", "b"), np.array([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]))
    old, new = in_common_classes(before, after, {"a": frozenset("xy"), "b": frozenset("b")})
    assert old.classes == new.classes == ("x+y", "b") and old.labels == new.labels == ("x+y", "b")
    assert new.proba == pytest.approx(np.array([[0.9, 0.1], [0.2, 0.8]])) and old.proba == pytest.approx(new.proba)
    assert compare(old, new, np.random.default_rng(1), 100).flips == ()


def test_a_forecast_that_takes_part_in_a_consensus_speaks_the_present_classes() -> None:
    ledger = Ledger()
    ledger.say("i0", "p", "a")
    ledger.change("rename", "a", "z")
    ledger.change("split", "b", "xc")
    schemas = schemas_of(ledger.events)
    assert schemas is not None
    assert schemas.shares({"a": 0.5, "b": 0.2, "c": 0.3}) == pytest.approx({"z": 0.5, "x": 0.1, "c": 0.4})
    ledger.undo()
    ledger.change("retire", "c", "")
    rule = ConsensusRule("crowdlab", {"i0": {"a": 0.5, "b": 0.2, "c": 0.3}, "i1": {"z": 1.0}})
    mapped = rule.in_present_classes(schemas_of(ledger.events), ledger.events)
    assert mapped.forecasts == {"i0": {"z": 0.5, "b": 0.2}, "i1": {"z": 1.0}}
    assert rule.in_present_classes(None, ledger.events) is rule
    [row] = fold(ledger.events, ledger.classes, 3, None, rule).labeled
    assert row.label == "z" and row.confidence is not None


def test_a_forecast_speaks_for_the_class_that_had_its_name_when_it_was_made() -> None:
    """A name that another class has now: rows of before say nothing of when they were made."""
    ledger = Ledger()
    ledger.say("i0", "p", "a")
    known = len(ledger.events)
    ledger.change("rename", "a", "z")
    ledger.say("i1", "p", "b")
    ledger.change("rename", "b", "a")
    ledger.say("i2", "p", "a")
    forecasts = {item: {"a": 0.9} for item in ("i0", "i1", "i2")}
    for rule in (ConsensusRule("crowdlab", forecasts), ConsensusRule("crowdlab", forecasts, {"i1": known})):
        mapped = rule.in_present_classes(schemas_of(ledger.events), [*ledger.events, ledger.events[0]])
        assert mapped.forecasts == {"i0": {"z": 0.9}, "i1": {"z": 0.9}, "i2": {"a": 0.9}}
    newest = ConsensusRule("crowdlab", {"i9": {"a": 0.9}}, {"i9": len(ledger.events)})
    assert newest.in_present_classes(schemas_of(ledger.events), ledger.events).forecasts == {"i9": {"a": 0.9}}
    votes = [ledger.say("i0", "q", "c"), ledger.say("i1", "q", "z"), ledger.say("i1", "r", "b")]
    assert len(votes) == 3
    rule = ConsensusRule("crowdlab", {"i0": {"a": 0.99, "c": 0.01}})
    assert {row.item_id: row.label for row in fold(ledger.events, ledger.classes, 3, None, rule).labeled}["i0"] == "z"


def test_an_event_of_a_change_is_a_row_of_json() -> None:
    change = ClassChange("split", ABC, ("a",), ("x", "y"))
    made = Intervention(3, "schema", 1, "me", "2026-01-01", "why", labels=True, change=change)
    row = control_event(made).to_row()
    assert row["type"] == "schema" and row["intervention"]["change"]["new"] == ["x", "y"]
    assert made.sentence() == "split the class 'a' into 'x' and 'y' by me at 2026-01-01: why"
