"""The fold: what answers come to, rule by rule, and the laws that rollback and reproduction rest on."""

import time
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from al_pipeline.annotation.active_events import active, intervention_key, standing_answers
from al_pipeline.annotation.aggregation import Folded, fold
from al_pipeline.annotation.tasks import standing
from al_pipeline.annotation.votes import people, skips, times_asked
from al_pipeline.errors import BadInput, SchemaInUse
from al_pipeline.records import Event, LabeledItem, LabelIntervention, PlannedTask, Selection, Unresolved

LABELS = ("ham", "spam", "other")


def event(type_: str, who: str = "ann", label: str | None = None, *, item: str = "a", at: int = 1, **other) -> Event:
    """One event; the annotation key names item, round and person unless given, the id everything."""
    fields = {
        "type": type_,
        "item_id": item,
        "content_hash": f"hash of {item}",
        "part": "pool",
        "round": at,
        "annotation_key": f"ws:{at:04d}:{item}#p.{who}",
        "annotator": who,
        "label": label,
        **other,
    }
    return Event(**{"event_id": "|".join(map(str, fields.values())), **fields})


def said(who: str, label: str, **other) -> Event:
    return event("label", who, label, **other)


def skipped(who: str, **other) -> Event:
    return event("skip", who, **other)


def imported(label: str, item: str = "a") -> Event:
    return event("import", "import", label, item=item, at=-1, annotation_key=f"import:hash of {item}")


def control(type_: str, *targets: Event, id_: str = "control") -> Event:
    return Event(id_, type_, "", "", "pool", 0, "", "admin", targets=tuple(target.event_id for target in targets))


def label_of(*events: Event, everybody: int | None = 9, **other) -> str | None:
    found = fold(events, LABELS, everybody, **other)
    return found.labeled[0].label if found.labeled else None


def row(label: str, agreement: float = 1.0, answers: int = 1, at: int = 1, item: str = "a") -> LabeledItem:
    return LabeledItem(item, f"hash of {item}", label, agreement, answers, at)


# Who wins -----------------------------------------------------------------------------------------------------------
def test_no_events_fold_to_nothing() -> None:
    assert fold((), LABELS) == Folded((), (), ())


def test_one_answer_is_a_label() -> None:
    assert fold([said("ann", "spam")], LABELS).labeled == (row("spam"),)


def test_majority_wins_with_its_share() -> None:
    events = [said("ann", "spam"), said("bob", "ham"), said("eve", "spam"), skipped("dan")]
    assert fold(events, LABELS).labeled == (row("spam", 2 / 3, 3),)


def test_most_people_win_without_more_than_half() -> None:
    events = [said("ann", "spam"), said("bob", "ham"), said("eve", "spam"), said("dan", "other"), said("joe", "other")]
    assert label_of(*events, said("sue", "spam")) == "spam"


def test_newest_answer_of_a_person_counts_and_only_that() -> None:
    events = [said("ann", "ham", at=1), said("bob", "spam", at=1), said("ann", "spam", at=2)]
    assert fold(events, LABELS).labeled == (row("spam", 1.0, 2, at=2),)


def test_late_answer_to_an_old_task_is_newer_by_the_ledger() -> None:
    assert label_of(said("ann", "ham", at=2), said("ann", "spam", at=1)) == "spam"


def test_newest_answer_may_be_a_skip() -> None:
    assert label_of(said("ann", "ham", at=1), skipped("ann", at=2)) is None


def test_edit_replaces_the_content() -> None:
    assert label_of(said("ann", "ham"), event("supersede", "ann", "spam")) == "spam"


def test_edit_into_a_skip_takes_the_label_back() -> None:
    assert label_of(said("ann", "ham"), event("supersede", "ann", None)) is None


def test_deleted_annotation_is_void_and_may_come_back() -> None:
    gone = event("delete", "ann")
    assert label_of(said("ann", "ham"), gone) is None
    assert label_of(said("ann", "ham"), gone, said("ann", "ham", previous=gone.event_id)) == "ham"


def test_deleting_the_newer_annotation_brings_the_older_back() -> None:
    assert label_of(said("ann", "ham", at=1), said("ann", "spam", at=2), event("delete", "ann", at=2)) == "ham"


def test_vanished_task_voids_nothing() -> None:
    gone = event("task_gone", "system", annotation_key="ws:0001:a")
    assert fold([said("ann", "ham"), gone], LABELS).labeled == (row("ham"),)


@pytest.mark.parametrize("binding", ["adjudicate", "gold"])
def test_adjudication_and_gold_win_over_any_majority(binding: str) -> None:
    events = [event(binding, "boss", "ham"), said("ann", "spam"), said("bob", "spam")]
    assert fold(events, LABELS).labeled == (row("ham", 1 / 3, 3),)


def test_newest_adjudication_wins() -> None:
    assert label_of(event("gold", "boss", "ham"), event("adjudicate", "chief", "spam")) == "spam"
    assert label_of(event("adjudicate", "chief", "spam"), event("gold", "boss", "ham")) == "ham"


def test_edited_adjudication_still_binds_and_a_deleted_one_does_not() -> None:
    events = [event("adjudicate", "boss", "ham"), said("ann", "spam"), event("supersede", "boss", "other")]
    assert label_of(*events) == "other"
    assert label_of(*events, event("delete", "boss")) == "spam"


def test_adjudicators_ordinary_answer_does_not_unmake_the_adjudication() -> None:
    events = [event("adjudicate", "boss", "ham", at=1), said("boss", "spam", at=2)]
    assert fold(events, LABELS).labeled == (row("ham"),)


# Imports ------------------------------------------------------------------------------------------------------------
def test_import_is_a_label_of_no_round() -> None:
    assert fold([imported("ham")], LABELS).labeled == (row("ham", at=-1),)


def test_one_person_outweighs_the_import() -> None:
    assert fold([said("ann", "spam", at=3), imported("ham")], LABELS).labeled == (row("spam", at=3),)


def test_newer_import_replaces_the_older() -> None:
    again = replace(imported("spam"), event_id="again")
    assert fold([imported("ham"), again], LABELS).labeled == (row("spam", at=-1),)


def test_skips_leave_an_imported_label_standing() -> None:
    assert fold([imported("ham"), skipped("ann"), skipped("bob")], LABELS).labeled == (row("ham", at=-1),)


def test_import_stands_again_when_the_person_takes_the_label_back() -> None:
    events = [imported("ham"), said("ann", "spam", at=1), skipped("ann", at=2)]
    assert fold(events, LABELS).labeled == (row("ham", at=-1),)


# Ties and skips -----------------------------------------------------------------------------------------------------
TIE = [said("ann", "spam"), said("bob", "ham")]


def test_tie_stays_unlabelled_and_is_named_in_the_order_of_the_schema() -> None:
    found = fold(TIE, LABELS, asked={"a": 1})
    assert found == Folded((), (), (Unresolved("a", "pool", "tie", "a tie of ham and spam", 1),))


def test_tie_after_two_rounds_is_ignored_with_that_reason() -> None:
    found = fold(TIE, LABELS, asked={"a": 2}).unresolved
    assert found == (Unresolved("a", "pool", "ignored", "still a tie of ham and spam after 2 rounds", 2),)


def test_tie_that_a_second_round_resolves_is_labelled_in_that_round() -> None:
    assert fold([*TIE, said("eve", "ham", at=2)], LABELS, asked={"a": 2}).labeled == (row("ham", 2 / 3, 3, at=2),)


def test_two_peoples_skips_end_the_asking() -> None:
    assert fold([skipped("ann")], LABELS, everybody=3) == Folded((), (), ())
    found = fold([skipped("ann"), skipped("bob")], LABELS, everybody=3, asked={"a": 1})
    assert found.unresolved == (Unresolved("a", "pool", "ignored", "skipped by 2 people", 1),)


def test_one_person_skipping_twice_is_one_skip() -> None:
    assert fold([skipped("ann", at=1), skipped("ann", at=2)], LABELS, everybody=3) == Folded((), (), ())


@pytest.mark.parametrize(
    ("everybody", "others", "ignored"), [(1, 0, True), (2, 0, False), (None, 0, True), (None, 1, False)]
)
def test_everybodys_skip_ends_the_asking(everybody: int | None, others: int, ignored: bool) -> None:
    events = [skipped("ann"), *[said("bob", "ham", item="b")] * others, imported("ham", item="c")]
    assert any(one.kind == "ignored" for one in fold(events, LABELS, everybody).unresolved) is ignored


def test_a_label_beats_any_number_of_skips() -> None:
    assert label_of(skipped("ann"), skipped("bob"), said("eve", "ham"), skipped("dan")) == "ham"


@pytest.mark.parametrize("kind", ["label", "skip", "import", "supersede", "adjudicate", "gold", "correct"])
@pytest.mark.parametrize("part", ["pool", "test"])
@pytest.mark.parametrize("label", ["ham", "unknown"])
def test_the_only_event_of_an_item_says_the_same_as_among_others(kind: str, part: str, label: str) -> None:
    """Nearly all items have one event. Another that says nothing of it takes the way of items with several."""
    one = event(kind, "ann", None if kind in ("skip", "correct") else label, part=part, at=3)
    gone = event("task_gone", "", part=part, at=3)

    def found(*events: Event) -> object:
        try:
            return fold(events, LABELS, 9)
        except SchemaInUse as error:
            return str(error)

    assert found(one) == found(one, gone)


def test_people_are_those_who_answer() -> None:
    events = [said("ann", "ham"), skipped("bob"), imported("ham"), event("gold", "boss", "ham"), event("delete", "x")]
    assert people(events) == 2


# Rounds and parts ---------------------------------------------------------------------------------------------------
def test_round_is_the_first_that_made_it_labelled_and_stays() -> None:
    events = [said("ann", "ham", at=2), said("bob", "spam", at=4), said("eve", "spam", at=4)]
    assert fold(events, LABELS).labeled == (row("spam", 2 / 3, 3, at=2),)


def test_parts_are_kept_apart_and_sorted() -> None:
    events = [
        said("ann", "ham", item="z"),
        said("ann", "ham", item="t2", part="test"),
        said("ann", "spam", item="b"),
        said("ann", "ham", item="t1", part="test"),
        skipped("ann", item="t0", part="test"),
    ]
    found = fold(events, LABELS, everybody=1)
    assert [one.item_id for one in found.labeled] == ["b", "z"]
    assert [one.item_id for one in found.test] == ["t1", "t2"]
    assert [(one.item_id, one.part) for one in found.unresolved] == [("t0", "test")]


# Refusals -----------------------------------------------------------------------------------------------------------
def test_class_that_the_schema_lost_is_refused_with_the_way_out() -> None:
    with pytest.raises(SchemaInUse, match=r"'other' \(2 answers\).*al labels revoke"):
        fold([said("ann", "other"), said("bob", "other"), said("eve", "ham")], ("ham", "spam"))


def test_class_that_no_standing_answer_uses_may_go() -> None:
    events = [said("ann", "other"), event("supersede", "ann", "ham"), said("bob", "other"), event("delete", "bob")]
    assert fold(events, ("ham", "spam")).labeled == (row("ham"),)


def test_contradicting_ledger_is_refused() -> None:
    with pytest.raises(BadInput, match="contradicts itself about item 'a'"):
        fold([said("ann", "ham"), said("bob", "ham", content_hash="other text")], LABELS)
    with pytest.raises(BadInput, match="type 'label' but names no label"):
        fold([event("label", "ann")], LABELS)


# Quarantine ---------------------------------------------------------------------------------------------------------
def test_quarantined_answer_does_not_count_until_restored() -> None:
    one, other = said("ann", "ham"), said("bob", "ham")
    out = control("quarantine", one)
    assert fold([one, other, out], LABELS).labeled == (row("ham"),)
    assert active([one, other, out]) == [other]
    assert fold([one, other, out, control("restore", one, id_="back")], LABELS) == fold([one, other], LABELS)


def test_quarantined_edit_leaves_the_answer_before_it() -> None:
    edit = event("supersede", "ann", "spam")
    assert label_of(said("ann", "ham"), edit, control("quarantine", edit)) == "ham"


def test_quarantined_deletion_deletes_nothing() -> None:
    gone = event("delete", "ann")
    assert label_of(said("ann", "ham"), gone, control("quarantine", gone)) == "ham"


def test_quarantine_holds_however_often_the_answer_is_pulled_again() -> None:
    answer = said("ann", "ham")
    assert label_of(control("quarantine", answer), answer, answer) is None
    assert label_of(answer, control("quarantine", answer), answer) is None


def test_quarantine_can_itself_be_quarantined() -> None:
    answer = said("ann", "ham")
    out = control("quarantine", answer, id_="out")
    undo = control("quarantine", out, id_="undo")
    assert label_of(answer, out, undo) == "ham"
    assert label_of(answer, out, undo, control("restore", out, id_="redo")) is None


# Interventions, as the ledger holds them ------------------------------------------------------------------------------
def intervened(number: int, kind: str, at: int = 0, **asked) -> Event:
    type_ = "restore" if kind == "restore" else "quarantine"
    what = LabelIntervention(kind, **asked)
    return Event(f"i{number}", type_, "", "", "pool", at, intervention_key(number), "admin", intervention=what)


def back(number: int, at: int, to: int, after: Event | None) -> Event:
    return intervened(number, "rollback", at, to=to, after=after.event_id if after else None)


def revoked(number: int, kind: str = "revoke", **selection) -> Event:
    return intervened(number, kind, selection=Selection(**selection))


def counted(*events: Event) -> set[str]:
    return {f"{one.annotator} {one.label}" for one in standing_answers(events).values()}


FIRST, SECOND = said("ann", "ham", at=1), said("bob", "ham", at=2)
LATE = event("supersede", "bob", "spam", at=2)
"""An edit of SECOND, pulled while it is out."""


def test_rollback_holds_out_what_came_after_its_snapshot_and_late_answers_to_abandoned_rounds() -> None:
    rollback = back(1, at=3, to=1, after=FIRST)
    assert counted(FIRST, SECOND, rollback, LATE) == {"ann ham"}
    assert counted(FIRST, SECOND, rollback, said("eve", "ham", at=1)) == {"ann ham", "eve ham"}, "round 1 is none"
    assert counted(FIRST, SECOND, rollback, LATE, intervened(2, "undo", undoes=1)) == {"ann ham", "bob spam"}
    assert counted(back(1, at=0, to=0, after=None), FIRST) == {"ann ham"}, "a snapshot without events"


@pytest.mark.parametrize("undos", [0, 1, 2])
@pytest.mark.parametrize("place", range(5))
def test_an_edit_pulled_at_any_time_counts_when_no_rollback_holds_it_out(undos: int, place: int) -> None:
    """Back to round 1, again to round 1, and both taken back, with the edit of an answer that is out in between."""
    story = [back(1, 3, 1, FIRST), back(2, 4, 1, FIRST), intervened(3, "undo", 5, undoes=2)]
    story = [*story, intervened(4, "undo", 6, undoes=1)][: 2 + undos]
    story.insert(min(place, len(story)), LATE)
    assert counted(FIRST, SECOND, *story) == ({"ann ham", "bob spam"} if undos == 2 else {"ann ham"})


def test_an_undo_brings_back_nothing_that_another_rollback_holds_out() -> None:
    third = said("eve", "ham", at=3)
    story = [FIRST, SECOND, third, back(1, at=4, to=3, after=third), back(2, at=5, to=1, after=FIRST)]
    assert counted(*story) == {"ann ham"}
    fifth = said("dan", "ham", at=4)
    assert counted(*story, fifth, intervened(3, "undo", 6, undoes=2)) == {"ann ham", "bob ham", "eve ham"}
    assert "dan ham" in counted(*story, fifth, intervened(3, "undo", 6, undoes=2), intervened(4, "undo", 7, undoes=1))


def test_going_back_to_a_snapshot_before_an_undo_takes_the_undo_back() -> None:
    rollback = back(1, at=3, to=1, after=FIRST)
    undo = intervened(2, "undo", 4, undoes=1)
    again = back(3, at=5, to=3, after=rollback)
    assert counted(FIRST, SECOND, rollback, undo, again, LATE) == {"ann ham"}
    assert counted(FIRST, SECOND, rollback, undo, again, LATE, intervened(4, "undo", 6, undoes=3)) == {
        "ann ham", "bob spam"
    }  # fmt: skip


def test_a_revocation_holds_whatever_rollbacks_come_and_go() -> None:
    revocation, rollback = revoked(1, annotator="bob"), back(2, at=3, to=1, after=FIRST)
    undo = intervened(3, "undo", 4, undoes=2)
    assert counted(FIRST, SECOND, revocation, rollback, undo) == {"ann ham"}
    assert counted(
        FIRST, SECOND, back(1, 3, 1, FIRST), revoked(2, annotator="bob"), intervened(3, "undo", undoes=1)
    ) == {"ann ham"}, "made while a rollback held the answer out"


def test_a_restored_answer_counts_although_a_rollback_holds_others_out() -> None:
    rollback, restored = back(1, at=3, to=1, after=FIRST), revoked(2, "restore", annotator="bob")
    other = said("eve", "ham", at=2)
    assert counted(FIRST, SECOND, other, rollback, restored) == {"ann ham", "bob ham"}
    assert counted(FIRST, SECOND, other, rollback, restored, back(3, 5, 1, FIRST)) == {"ann ham"}


GIVEN = [said("ann", "ham", updated_at="2026-01-01T00:00:00Z"), said("bob", "ham", updated_at="2026-01-01T00:00:00Z")]
WITHDRAWALS = [
    event("delete", "ann", observed_at="2026-03-02T00:00:00Z"),
    event("supersede", "ann", None, updated_at="2026-03-02T00:00:00Z"),
    event("supersede", "ann", "spam", updated_at="2026-03-02T00:00:00Z"),
]


@pytest.mark.parametrize("withdrawal", WITHDRAWALS)
@pytest.mark.parametrize("chosen", [{"since": "2026-03-01"}, {"annotator": "ann"}, {"item": "a"}, {"round": 1}])
def test_a_revocation_only_takes_answers_out(withdrawal: Event, chosen: dict) -> None:
    before = counted(*GIVEN, withdrawal)
    after = counted(*GIVEN, withdrawal, revoked(1, **chosen))
    assert after <= before and "ann ham" not in after
    restored = counted(*GIVEN, withdrawal, revoked(1, **chosen), revoked(2, "restore", **chosen))
    assert restored == before


CAFE = said("eve", "caf\u00e9", updated_at="2026-03-02T00:00:00Z")


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        ({"label": "ham"}, {"ann spam", "eve caf\u00e9", "dan None"}),
        ({"label": "spam"}, {"bob ham", "eve caf\u00e9", "dan None"}),
        ({"label": "cafe\u0301"}, {"ann spam", "bob ham", "dan None"}),
        ({"label": "other"}, {"ann spam", "bob ham", "eve caf\u00e9", "dan None"}),
        ({"label": "ham", "annotator": "bob"}, {"ann spam", "eve caf\u00e9", "dan None"}),
        ({"label": "ham", "annotator": "ann"}, {"ann spam", "bob ham", "eve caf\u00e9", "dan None"}),
        ({"label": "spam", "since": "2026-03-01"}, {"bob ham", "eve caf\u00e9", "dan None"}),
        ({"label": "ham", "since": "2026-03-01"}, {"ann spam", "bob ham", "eve caf\u00e9", "dan None"}),
        ({"label": "ham", "item": "a", "round": 1}, {"ann spam", "eve caf\u00e9", "dan None"}),
    ],
)
def test_a_class_is_revoked_by_what_answers_say_now(chosen: dict, left: set[str]) -> None:
    """ann's answer said ham until she changed it to spam, and dan skipped."""
    story = [*GIVEN, WITHDRAWALS[2], CAFE, skipped("dan")]
    assert counted(*story, revoked(1, **chosen)) == left
    assert counted(*story, revoked(1, **chosen), revoked(2, "restore", **chosen)) == counted(*story)


def test_an_answer_given_or_edited_after_its_revocation_counts() -> None:
    edit = event("supersede", "ann", "spam")
    assert counted(*GIVEN, revoked(1, annotator="ann"), edit) == {"bob ham", "ann spam"}


def test_a_rollback_whose_snapshot_the_ledger_lacks_is_refused() -> None:
    with pytest.raises(BadInput, match="the ledger lacks event .*round-0001.*dvc checkout"):
        active([SECOND, back(1, at=3, to=1, after=FIRST)])


def test_only_answers_that_stand_say_that_an_item_was_asked() -> None:
    """A task that is gone, an intervention, a deleted answer: nobody's answer, so that a tie is asked once more."""
    third = said("eve", "ham", at=2)
    gone = event("task_gone", "", at=2, annotation_key="ws:0002:a")
    assert times_asked([*TIE, third]) == {"a": 2}
    for others in (
        [revoked(1, annotator="eve")],
        [revoked(1, annotator="eve"), gone],
        [gone, revoked(1, annotator="eve")],
        [event("delete", "eve", at=2)],
        [back(1, at=3, to=1, after=TIE[-1]), gone],
    ):
        events = [*TIE, third, *others]
        assert times_asked(events) == {"a": 1}, others
        [found] = fold(events, LABELS, 9, times_asked(events)).unresolved
        assert (found.kind, found.asked) == ("tie", 1)
    assert times_asked([*TIE, gone]) == {"a": 1} and times_asked([*TIE, skipped("eve", at=2)]) == {"a": 2}


def older(number: int, type_: str, reason: str, *targets: Event, at: int = 3) -> Event:
    """A quarantine or restore as earlier versions wrote it."""
    key, ids = intervention_key(number), tuple(target.event_id for target in targets)
    return Event(f"o{number} {ids}", type_, "", "", "pool", at, key, "admin", reason=reason, targets=ids)


def test_a_ledger_of_an_earlier_version_counts_as_it_did_or_better() -> None:
    first = older(1, "quarantine", "rolled back to round-0001 by admin at 2026", SECOND)
    late = older(1, "quarantine", "rolled back to round-0001 by admin at 2026", LATE)
    undo = older(2, "quarantine", "took intervention 1 back by admin at 2026", first, late, at=4)
    assert counted(FIRST, SECOND, first, LATE, late) == {"ann ham"}
    assert counted(FIRST, SECOND, first, LATE, late, undo) == {"ann ham", "bob spam"}
    assert counted(FIRST, SECOND, first, LATE) == {"ann ham"}, "pulled by this version"
    assert counted(FIRST, SECOND, first, LATE, late, intervened(2, "undo", 4, undoes=1)) == {"ann ham", "bob spam"}
    assert counted(FIRST, SECOND, first, LATE, late, undo, back(3, 5, 1, FIRST)) == {"ann ham"}
    assert counted(FIRST, SECOND, first, LATE, late, undo, back(3, 5, 3, first)) == {"ann ham"}, "the undo goes too"

    second = older(2, "quarantine", "rolled back to round-0001 by admin at 2026", SECOND, first, at=4)
    blamed = older(2, "quarantine", "rolled back to round-0001 by admin at 2026", LATE, at=4)
    undone = older(3, "quarantine", "took intervention 2 back by admin at 2026", second, blamed, at=5)
    assert counted(FIRST, SECOND, first, second, LATE, blamed, undone) == {"ann ham"}, "the first one holds it out"

    gone = event("delete", "ann", at=1)
    revocation = older(1, "quarantine", "revoked answers (since 2026-01-01) by admin at 2026", gone, SECOND)
    assert counted(FIRST, SECOND, gone, revocation) == set(), "a withdrawn answer does not come back"
    restored = older(2, "restore", "restored answers (item a) by admin at 2026", SECOND)
    assert counted(FIRST, SECOND, gone, revocation, restored) == {"bob ham"}


# Laws ---------------------------------------------------------------------------------------------------------------
PEOPLE = ("ann", "bob", "eve")


@st.composite
def one_persons_events(draw: st.DrawFn, who: str) -> list[Event]:
    """What one annotator did, in order: answers, skips, edits, deletions over three items and three rounds."""
    done: list[Event] = []
    serial = count()
    for _ in range(draw(st.integers(0, 7))):
        type_ = draw(st.sampled_from(["label", "label", "label", "skip", "supersede", "delete", "task_gone"]))
        label = draw(st.sampled_from(LABELS)) if type_ in ("label", "supersede") else None
        item, at = draw(st.sampled_from("abc")), draw(st.integers(0, 2))
        done.append(replace(event(type_, who, label, item=item, at=at), event_id=f"{who} {next(serial)}"))
    return done


@st.composite
def ledgers(draw: st.DrawFn, interleavings: int = 1) -> list[list[Event]]:
    """The same events in several orders, each keeping every person's own order; imports among them."""
    streams = {who: draw(one_persons_events(who)) for who in PEOPLE}
    streams["import"] = [
        imported(draw(st.sampled_from(LABELS)), item) for item in draw(st.sets(st.sampled_from("abc")))
    ]
    turns = [who for who, stream in streams.items() for _ in stream]
    orders = []
    for _ in range(interleavings):
        left = {who: iter(stream) for who, stream in streams.items()}
        orders.append([next(left[who]) for who in draw(st.permutations(turns))])
    return orders


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """A ledger with adjudications, quarantines and restores of anything before them."""
    (history,) = draw(ledgers())
    for number in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(history)))
        targets = draw(st.lists(st.sampled_from(history[:place]), max_size=4)) if place else []
        new = control(draw(st.sampled_from(["quarantine", "restore"])), *targets, id_=f"control {number}")
        if draw(st.booleans()):
            new = replace(event("adjudicate", "boss", "ham", item=draw(st.sampled_from("abc"))), event_id=f"b {number}")
        history = [*history[:place], new, *history[place:]]
    return history


def law(function: Callable[..., None]) -> Callable[..., None]:
    return settings(max_examples=50, derandomize=True, deadline=None)(function)


EVERYBODY = st.sampled_from([None, 1, 3])
ASKED = st.fixed_dictionaries({item: st.integers(0, 3) for item in "abc"})


@given(ledgers(interleavings=2), EVERYBODY, ASKED)
@law
def test_order_of_different_peoples_events_is_nothing(orders: list[list[Event]], everybody, asked) -> None:
    assert fold(orders[0], LABELS, everybody, asked) == fold(orders[1], LABELS, everybody, asked)


@given(histories(), EVERYBODY, ASKED, st.data())
@law
def test_event_seen_twice_changes_nothing(history: list[Event], everybody, asked, data: st.DataObject) -> None:
    twice = list(history)
    for copy in data.draw(st.lists(st.sampled_from(history), max_size=4)) if history else []:
        first = next(place for place, one in enumerate(twice) if one.event_id == copy.event_id)
        twice.insert(data.draw(st.integers(first + 1, len(twice))), copy)
    assert fold(twice, LABELS, everybody, asked) == fold(history, LABELS, everybody, asked)


@given(histories(), EVERYBODY, ASKED, st.data())
@law
def test_quarantine_and_restore_is_nothing(history: list[Event], everybody, asked, data: st.DataObject) -> None:
    """Of events that are in at the time; and of anything at all, when the quarantine itself is quarantined."""
    before = fold(history, LABELS, everybody, asked)
    present = active(history)
    chosen = data.draw(st.lists(st.sampled_from(present), max_size=5)) if present else []
    out, back = control("quarantine", *chosen, id_="out"), control("restore", *chosen, id_="back")
    assert fold([*history, out, back], LABELS, everybody, asked) == before
    anything = data.draw(st.lists(st.sampled_from(history), max_size=5)) if history else []
    out = control("quarantine", *anything, id_="out")
    assert fold([*history, out, control("quarantine", out, id_="undo")], LABELS, everybody, asked) == before


@given(histories(), EVERYBODY, ASKED, st.data())
@law
def test_quarantining_all_after_a_prefix_gives_the_prefix(history, everybody, asked, data: st.DataObject) -> None:
    """What rollback needs: later quarantines and restores are undone with the rest."""
    cut = data.draw(st.integers(0, len(history)))
    rolled_back = [*history, control("quarantine", *history[cut:], id_="rollback")]
    assert fold(rolled_back, LABELS, everybody, asked) == fold(history[:cut], LABELS, everybody, asked)


@given(histories(), EVERYBODY, ASKED)
@law
def test_partition_shares_and_labels_are_sane(history: list[Event], everybody, asked) -> None:
    found = fold(history, LABELS, everybody, asked)
    names = [one.item_id for one in (*found.labeled, *found.test, *found.unresolved)]
    assert len(names) == len(set(names))
    for one in found.labeled:
        assert one.label in LABELS and 0 < one.agreement <= 1 <= one.answers
        assert one.agreement * one.answers == pytest.approx(round(one.agreement * one.answers))
    assert list(found.labeled) == sorted(found.labeled, key=lambda one: one.item_id)
    assert list(found.unresolved) == sorted(found.unresolved, key=lambda one: one.item_id)


@given(histories(), EVERYBODY, ASKED)
@law
def test_nothing_of_the_servers_matters(history: list[Event], everybody, asked) -> None:
    """The same answers at other times, with other lead times and origins, give the same labelled set."""
    other = [
        replace(one, created_at="2031", updated_at="2030", observed_at="2029", lead_time=9.0, origin="x", reason="y")
        for one in history
    ]
    assert fold(other, LABELS, everybody, asked) == fold(history, LABELS, everybody, asked)


def test_a_year_of_answers_folds_in_seconds() -> None:
    events = [said(f"p{n % 7}", LABELS[n % 3], item=f"i{n // 2}", at=n // 5000) for n in range(40_000)]
    began = time.process_time()
    found = fold(events, LABELS)
    assert time.process_time() - began < 5
    assert len(found.labeled) + len(found.unresolved) == 20_000


# Standing of tasks --------------------------------------------------------------------------------------------------
def task(item: str = "a", at: int = 1) -> PlannedTask:
    return PlannedTask(f"ws:{at:04d}:{item}", item, f"hash of {item}", "pool", at, 0, 0.5, "margin", 1.0)


@pytest.mark.parametrize(
    ("events", "overlap", "everybody", "expected"),
    [
        ([], 1, 3, "open"),
        ([said("ann", "ham")], 1, 3, "answered"),
        ([said("ann", "ham")], 2, 3, "open"),
        ([said("ann", "ham"), said("bob", "spam")], 2, 3, "answered"),
        ([said("ann", "ham"), event("supersede", "ann", "spam")], 2, 3, "open"),
        ([said("ann", "ham"), event("delete", "ann")], 1, 3, "open"),
        ([said("ann", "ham"), event("supersede", "ann", None)], 1, 3, "open"),
        ([said("ann", "ham", at=2)], 1, 3, "open"),
        ([skipped("ann")], 1, 3, "open"),
        ([skipped("ann")], 1, 1, "given_up"),
        ([skipped("ann")], 1, None, "given_up"),
        ([skipped("ann"), said("bob", "ham", item="b")], 1, None, "open"),
        ([skipped("ann"), skipped("bob")], 1, 3, "given_up"),
        ([skipped("ann"), skipped("bob"), said("eve", "ham")], 1, 3, "answered"),
        ([skipped("ann"), said("eve", "ham")], 2, 2, "answered"),
        ([skipped("ann"), said("eve", "ham")], 2, 3, "open"),
        ([said("eve", "ham")], 2, None, "open"),
        ([event("gold", "boss", "ham")], 3, 9, "answered"),
        ([imported("ham")], 1, 3, "open"),
        ([said("ann", "ham"), control("quarantine", said("ann", "ham"))], 1, 3, "open"),
    ],
)
def test_standing(events: list[Event], overlap: int, everybody: int | None, expected: str) -> None:
    assert standing([task()], events, overlap, everybody) == {"ws:0001:a": expected}


def test_standing_has_each_task_once_and_copes_with_odd_ids() -> None:
    odd = "x#1:2"
    events = [said("ann", "ham", item=odd, annotation_key=f"ws:0001:{odd}#p.7")]
    assert standing([task("a"), task(odd)], events, 1, 3) == {"ws:0001:a": "open", f"ws:0001:{odd}": "answered"}


@pytest.mark.parametrize(
    ("events", "counted"),
    [
        ([], {}),
        ([said("ann", "ham")], {}),
        ([skipped("ann"), skipped("bob"), said("eve", "ham")], {"a": 2}),
        ([skipped("ann"), skipped("ann", at=2)], {"a": 1}),
        ([skipped("ann"), said("ann", "ham", at=2)], {}),
        ([said("ann", "ham"), skipped("ann", at=2)], {"a": 1}),
        ([skipped("ann"), event("delete", "ann")], {}),
        ([imported("ham"), skipped("ann")], {"a": 1}),
    ],
)
def test_people_whose_newest_word_is_a_skip_are_counted(events: list[Event], counted: dict[str, int]) -> None:
    assert skips(events) == counted
