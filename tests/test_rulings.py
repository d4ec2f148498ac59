"""Rulings: their words, and rollback as a state machine against a reference that a person could keep on paper."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from al_pipeline.errors import BadInput
from al_pipeline.labels import Folded, fold, times_asked
from al_pipeline.layout import Layout
from al_pipeline.ledger import append_inbox, append_part, last_part, read_events
from al_pipeline.operations.close import carry_out
from al_pipeline.operations.pull import pull
from al_pipeline.operations.push import push
from al_pipeline.oracle import SimulatedOracle
from al_pipeline.params import Schema
from al_pipeline.records import PlannedTask, Task, push_key
from al_pipeline.rulings import (
    Ruling,
    Selection,
    abandoned,
    holding,
    in_effect,
    moment,
    parse_ruling,
    pausing,
    promoted,
    waiting,
)
from al_pipeline.workspace import Workspace

SCHEMA = Schema(version=1, question="?", labels=["ham", "spam"], fields=["text"])
PEOPLE = ("ann@example.org", "bob@example.org", "eve@example.org")
ITEMS = tuple("abcdefgh")


def ruling(number: int, kind: str = "rollback", at: int = 5, **values: object) -> Ruling:
    return Ruling(number, kind, at, "ann", "2026-01-01T00:00:00+00:00", "", **values)  # type: ignore[arg-type]


def back(number: int, at: int, to: int) -> Ruling:
    return ruling(number, "rollback", at, labels=True, to=to, parts=1)


def test_a_ruling_comes_back_as_it_went_and_nothing_else_is_one() -> None:
    one = replace(back(1, 5, 3), selection=Selection(annotator="ann"), before={"serves": None})
    assert parse_ruling(one.to_row(), "here") == one
    for bad in (
        {},
        [],
        None,
        {**one.to_row(), "kind": "dance"},
        {**one.to_row(), "new": 1},
        {**one.to_row(), "to": "3"},
    ):
        with pytest.raises(BadInput, match="here is no ruling"):
            parse_ruling(bad, "here")


def test_what_is_abandoned_and_what_takes_it_back() -> None:
    assert abandoned([back(1, at=9, to=5)]) == dict.fromkeys((6, 7, 8, 9), 1)
    undo = ruling(2, "undo", 10, labels=True, undoes=1)
    assert abandoned([back(1, 9, 5), undo]) == {}
    later = back(3, at=11, to=8)
    assert abandoned([back(1, 9, 5), later]) == dict.fromkeys((9, 10, 11), 3), "8 was before the first rollback"
    assert abandoned([back(1, 9, 5), back(3, at=11, to=9)]) == {**dict.fromkeys((6, 7, 8, 9), 1), 10: 3, 11: 3}
    assert abandoned([back(1, 9, 5), undo, back(3, at=12, to=9)]).keys() == {6, 7, 8, 9, 10, 11, 12}, (
        "the undo goes too"
    )
    assert [one.number for one in in_effect([back(1, 9, 5), undo])] == [2]


def test_the_newest_word_says_which_model_is_served() -> None:
    rounds = [(0, True), (1, False), (2, True)]
    assert promoted([], rounds) == "round-0002" and promoted([], []) is None
    serve = ruling(1, at=3, serves="round-0000", hold=True)
    assert promoted([serve], rounds) == "round-0000"
    assert promoted([serve], [*rounds, (3, True)]) == "round-0003", "a later record"
    approve = ruling(2, "approve", at=3, serves="round-0001", hold=False)
    assert promoted([serve, approve], rounds) == "round-0001"
    assert holding([serve]) is serve and holding([serve, approve]) is None


def test_pauses_and_what_waits() -> None:
    pause, resume = ruling(1, "pause"), ruling(2, "resume")
    assert pausing([pause]) is pause and pausing([pause, resume]) is None
    assert waiting([pause, back(2, 5, 3), back(3, 5, 2)], {2}) == [back(3, 5, 2)]


def test_since_takes_dates_and_zones() -> None:
    assert moment("2026-03-01") == datetime(2026, 3, 1, tzinfo=UTC)
    assert moment("2026-03-01T01:00+01:00") == moment("2026-03-01")


# The state machine -------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """What the labelled set must be, kept as a person would: a list of statements, each with a tick where it counts."""

    statements: list[tuple[str, str, str, str | None]] = field(default_factory=list)
    """(push key, annotator, item, label or None for a skip), as they were made."""
    history: list[tuple[str, int, object]] = field(default_factory=list)
    """(what, ruling or statement, with what), as it happened."""
    closed: dict[int, tuple[dict[int, bool], frozenset[int]]] = field(default_factory=dict)
    """The ticks at the close of each round, and the rounds that were abandoned."""

    def ticks(self) -> tuple[dict[int, bool], frozenset[int]]:
        """Which statements count, and which rounds are abandoned: history played again without what was undone."""
        undone = {number for what, number, which in self.history if what == "undo" for number in (number, which)}
        counts: dict[int, bool] = {}
        gone: frozenset[int] = frozenset()
        for what, number, which in self.history:
            if what == "said":
                counts[number] = which not in gone
            elif number in undone:
                continue
            elif what == "rollback":
                to, at = which  # type: ignore[misc]
                then, gone_then = self.closed[to]
                counts = {statement: then.get(statement, False) for statement in counts}
                gone = gone_then | frozenset(range(to + 1, at + 1))
            elif what in ("revoke", "restore"):
                counts |= dict.fromkeys(which, what == "restore")  # type: ignore[call-overload]
        return counts, gone

    def labels(self) -> dict[str, str]:
        """The newest counting word of each person, then the majority; a draw is no label."""
        counts, _ = self.ticks()
        said: dict[str, dict[str, str | None]] = {}
        for number, (_, who, item, label) in enumerate(self.statements):
            if counts[number]:
                said.setdefault(item, {}).pop(who, None)
                said[item][who] = label
        found = {}
        for item, words in said.items():
            votes = Counter(label for label in words.values() if label is not None).most_common()
            if votes and (len(votes) == 1 or votes[0][1] > votes[1][1]):
                found[item] = votes[0][0]
        return found


class Rollbacks(RuleBasedStateMachine):
    """Rounds, late answers, corrections, skips, rollbacks, undos, revocations and kills, on a real ledger and pull."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="al-rulings-"))
        self.layout = Layout(self.folder)
        for path in (self.layout.events, self.layout.inbox_events, self.layout.private):
            path.mkdir(parents=True)
        self.workspace = Workspace(self.layout, "0123456789ab")
        self.oracle = SimulatedOracle()
        self.ref = self.oracle.ensure_project("0123456789ab", "c", SCHEMA, 1, False, None)
        self.plans: dict[str, PlannedTask] = {}
        self.rulings: list[Ruling] = []
        self.parts: dict[int, int] = {}
        self.folds: dict[int, Folded] = {}
        self.model = Reference()
        self.round = 0
        self._ask()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _fold(self) -> Folded:
        events = read_events(self.layout.events, self.layout.inbox_events)
        return fold(events, SCHEMA.labels, None, times_asked(events))

    def _ask(self) -> None:
        done = {row.item_id for row in self._fold().labeled}
        plans = [
            PlannedTask(
                push_key("0123456789ab", self.round, item),
                item,
                f"hash {item}",
                "pool",
                self.round,
                rank,
                0.0,
                "m",
                1.0,
            )
            for rank, item in enumerate([item for item in ITEMS if item not in done][:3])
        ]
        push(self.oracle, self.ref, [Task(plan, {"text": plan.item_id}) for plan in plans], sleep=lambda _: None)
        self.plans |= {plan.push_key: plan for plan in plans}

    def _pull(self) -> None:
        numbers = {one.number: one for one in self.rulings}
        keep = {number: numbers[by] for number, by in abandoned(self.rulings).items()}
        now = "2027-01-01T00:00:00+00:00"
        pull(self.workspace, self.oracle, self.ref, self.plans, SCHEMA, (), now, 0, abandoned=keep)

    def _close(self, made: Ruling | None, killed: bool) -> None:
        """What `close` does to the ledger; killed after the append, it is done again from the start."""
        if made is not None:
            self.rulings.append(made)
        consumed: list[Path] = []
        for _ in range(2 if killed else 1):
            consumed = append_inbox(self.layout.inbox_events, self.layout.events)
            append_part(self.layout.events, carry_out([made] if made else [], self.layout.events))
        for path in consumed:
            path.unlink(missing_ok=True)
        self.parts[self.round], self.folds[self.round] = last_part(self.layout.events), self._fold()
        self.model.closed[self.round] = self.model.ticks()
        self.round += 1
        self._ask()

    def _next(self, kind: str, **values: object) -> Ruling:
        return ruling(len(self.rulings) + 1, kind, self.round, labels=True, **values)

    @rule(data=st.data(), who=st.sampled_from(PEOPLE), label=st.sampled_from(["ham", "spam", None]))
    def answer(self, data: st.DataObject, who: str, label: str | None) -> None:
        """In time, late, or to an abandoned round; a second answer of the same person corrects the first."""
        key = data.draw(st.sampled_from(sorted(self.plans)))
        mine = {
            a.annotator: a
            for task in self.oracle.answered_by_key(self.ref, [key])
            for a in task.annotations
        }  # fmt: skip
        if who in mine:
            self.oracle.edit(mine[who].annotation_id, label or "ham", cancelled=label is None)
        elif label is None:
            self.oracle.skip(key, who)
        else:
            self.oracle.answer(key, who, label)
        self._pull()
        self.model.history.append(("said", len(self.model.statements), self.plans[key].round))
        self.model.statements.append((key, who, self.plans[key].item_id, label))

    @rule(killed=st.booleans())
    def close(self, killed: bool) -> None:
        self._close(None, killed)

    @rule()
    def forget_where_the_pull_was(self) -> None:
        self.layout.pull_state.unlink(missing_ok=True)
        self._pull()

    @precondition(lambda self: self.parts)
    @rule(data=st.data(), killed=st.booleans())
    def rollback(self, data: st.DataObject, killed: bool) -> None:
        to = data.draw(st.sampled_from(sorted(self.parts)))
        made = self._next("rollback", to=to, parts=self.parts[to])
        self.model.history.append(("rollback", made.number, (to, self.round)))
        self._close(made, killed)
        assert self._fold() == self.folds[to], "the labels of the snapshot, and what was unresolved"

    @rule(killed=st.booleans())
    def undo(self, killed: bool) -> None:
        undone = {one.undoes for one in self.rulings if one.kind == "undo"}
        standing = [r for r in in_effect(self.rulings) if r.kind == "rollback" and r.number not in undone]
        if standing:
            made = self._next("undo", undoes=standing[-1].number)
            self.model.history.append(("undo", made.number, standing[-1].number))
            self._close(made, killed)

    @rule(who=st.sampled_from(PEOPLE), kind=st.sampled_from(["revoke", "restore"]), killed=st.booleans())
    def amend(self, who: str, kind: str, killed: bool) -> None:
        counts, _ = self.model.ticks()
        theirs = [
            n for n, said in enumerate(self.model.statements) if said[1] == who and counts[n] != (kind == "restore")
        ]
        made = self._next(kind, selection=Selection(annotator=who))
        self.model.history.append((kind, made.number, tuple(theirs)))
        self._close(made, killed)

    @invariant()
    def the_labels_are_the_references_and_nothing_is_twice(self) -> None:
        if hasattr(self, "layout"):
            assert {row.item_id: row.label for row in self._fold().labeled} == self.model.labels()
            events = read_events(self.layout.events, self.layout.inbox_events)
            assert sum(event.type in ("label", "skip", "supersede") for event in events) == len(self.model.statements)


TestRollbacks = Rollbacks.TestCase
TestRollbacks.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
