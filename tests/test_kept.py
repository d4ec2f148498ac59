"""What an intervention leaves of the open round: its open tasks stay with the annotators, under their old names."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from annotating import ServerRig
from embedded import LabelStudioServer
from harness import (
    Killed,
    Played,
    answer_all,
    change_params,
    copy_workspace,
    go_on,
    killing,
    results,
    small_workspace,
)
from msgspec.structs import asdict, replace

from al_pipeline.annotation.aggregation import fold
from al_pipeline.annotation.tasks import worth_asking
from al_pipeline.annotation.votes import times_asked
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import NothingToDo, UnexpectedChange
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations.ask import ask
from al_pipeline.operations.connect import connect
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_plan, read_plans
from al_pipeline.operations.intervene import amend, rollback, undo
from al_pipeline.operations.log import log
from al_pipeline.operations.report import report_data
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, TickReport, call, tick
from al_pipeline.records import Event, LabelIntervention, PlannedTask, Selection, push_key
from al_pipeline.rounds.manifests import parse_plan
from al_pipeline.workspace.workspace import Workspace, open_workspace

ANN, BOB, EVE = "ann@example.org", "bob@example.org", "eve@example.org"


class Rig:
    """A workspace with rounds behind it and one that is open, with its Label Studio."""

    def __init__(self, played: Any, folder: Path, changes: dict[str, str] | None = None) -> None:
        place, self.truth, oracle = played
        self.workspace = copy_workspace((place, self.truth), folder)
        self.layout, self.oracle = self.workspace.layout, copy.deepcopy(oracle)
        if changes:
            change_params(self.workspace, changes)

    @property
    def git(self) -> Git:
        return Git(self.layout.root)

    def reopened(self) -> Workspace:
        return open_workspace(self.layout.root)

    def tick(self, **settings: Any) -> TickReport:
        return tick(self.reopened(), lambda: self.oracle, **settings)

    def intervene(self, what: Any, *given: Any, **named: Any) -> Any:
        with open_dvc(self.layout) as dvc:
            return what(self.reopened(), dvc, *given, **named)

    def back(self, number: int) -> Any:
        return self.intervene(rollback, number, labels=True, model=True, params=False, reason="bad labels")

    def plan(self, number: int) -> list[PlannedTask]:
        return read_plan(self.git, number)

    def keys(self, number: int) -> list[str]:
        return [task.push_key for task in self.plan(number)]

    def label(self, key: str, who: str = ANN, wrong: bool = False) -> int:
        truth = self.truth[key.rsplit(":", 1)[1]]
        return self.oracle.answer(key, who, {"ham": "spam", "spam": "ham"}[truth] if wrong else truth)

    def copies(self) -> Counter[str]:
        """How often Label Studio holds each task."""
        project = ProjectRef(**read_json(self.layout.project))
        return Counter(str(state.push_key) for state in self.oracle.task_states(project))

    def record(self, number: int) -> Any:
        return read_json(self.layout.record(number))

    def clean(self) -> bool:
        with open_dvc(self.layout) as dvc:
            return self.git.run("status", "--porcelain").stdout == "" and dvc.changed() == {}

    def divided(self) -> bool:
        found = status(self.reopened())
        parts = ("labelled", "pending", "ignored", "unlabelled")
        return (
            sum(getattr(found, part) for part in parts) == found.pool
            and min(getattr(found, part) for part in parts) >= 0
        )


@pytest.fixture(scope="module")
def played(once: Played, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Two published rounds, the second one eve's alone; round 2 is open."""
    folder = tmp_path_factory.mktemp("played")
    workspace, oracle, truth = go_on(once, folder)
    answer_all(oracle, truth, EVE)
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    return folder / "copy", truth, oracle


@pytest.mark.slow
def test_a_revocation_keeps_what_is_open_and_asks_no_more_than_there_is_room_for(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    before = rig.keys(2)
    for key in before[:3]:
        rig.label(key)
    rig.tick()
    rig.intervene(amend, "revoke", Selection(annotator=EVE), "wrong on purpose")
    held = rig.copies()
    report = rig.tick()
    assert report.published == (2,) and report.round == 3
    assert rig.keys(3)[:5] == before[3:], "what was open, under its old names and first"
    new = rig.plan(3)[5:]
    assert [task.push_key for task in new] == [push_key(rig.workspace.id, 3, task.item_id) for task in new]
    assert len(new) == 3, "a batch of 8"
    assert {task.item_id for task in new}.isdisjoint(task.item_id for task in rig.plan(2))
    assert rig.copies() == held + Counter({task.push_key: 1 for task in new}), "nothing was pushed twice"
    assert rig.oracle.queue(ANN) == rig.keys(3)
    assert all(
        (a.item_id, a.score, a.strategy, a.probability, a.predicted) == (b.item_id, b.score, b.strategy, b.probability,
        b.predicted) for a, b in zip(rig.plan(2)[3:], rig.plan(3)[:5], strict=True)
    )  # fmt: skip
    assert [task.rank for task in rig.plan(3)] == list(range(8)) and {task.round for task in rig.plan(3)} == {3}
    answers = rig.record(2)["answers"]
    assert (answers["tasks"], answers["answered"], answers["unanswered"], answers["kept"]) == (8, 3, 5, 5)
    assert rig.divided() and rig.clean()

    assert answer_all(rig.oracle, rig.truth) == 8
    report = rig.tick()
    assert report.published == (3,) and not rig.record(3)["answers"]["kept"]
    assert rig.record(3)["answers"]["answered"] == 8
    rows = {row.item_id: row for row in read_labeled(rig.layout.labeled)}
    assert all(rows[task.item_id].round == 3 for task in rig.plan(3))
    shown = [report_data(rig.reopened(), number).answers for number in (2, 3)]
    assert [(one.unanswered, one.kept, one.carried) for one in shown] == [(5, 5, 0), (0, 0, 5)]
    kept = rig.plan(3)[0].item_id
    asked = [entry.details["round"] for entry in log(rig.reopened(), kept).entries if entry.what == "asked"]
    assert asked == [2, 3]
    made = list(reproduce(rig.reopened(), [2, 3]))
    assert [(one.difference, one.compared) for one in made] == [(None, "bytes")] * 2, "in a fresh clone"


@pytest.mark.slow
def test_a_rollback_and_its_undo_keep_what_is_open_and_what_is_answered_meanwhile_counts(
    played: Any, tmp_path: Path
) -> None:
    """Two answers to a task: one with an answer that counts stays, one with an answer that no longer does is let go."""
    rig = Rig(played, tmp_path, {"overlap: 1": "overlap: 2"})
    first, second, *others = rig.keys(2)
    rig.label(first, EVE)
    rig.oracle.skip(second, EVE)
    rig.tick()
    rig.back(0)
    rig.label(others[0], BOB)
    rig.label(first, BOB)
    report = rig.tick()
    assert report.published == (2,) and report.round == 3
    assert rig.keys(3)[:6] == others, "eve's answers no longer count, and Label Studio serves nobody a third one"
    assert rig.record(2)["answers"]["kept"] == 6
    assert {key.split(":")[1] for key in rig.keys(3)[6:]} == {"0003"}
    assert set(rig.oracle.queue(ANN)) == set(rig.keys(3)), "the tasks that are let go have left the queue"
    assert set(rig.copies().values()) == {1} and rig.divided()
    events = {(event.annotator, event.item_id): event for event in read_events(rig.layout.inbox_events)}
    late, counts = (events[BOB, key.rsplit(":", 1)[1]] for key in (first, others[0]))
    assert (late.round, counts.round) == (2, 3), "an answer to a kept task is one of the round that keeps it"

    for key in rig.keys(3)[1:3]:
        rig.label(key, ANN)
    rig.tick()
    open_before = rig.keys(3)
    rig.intervene(undo, "it was not the labels")
    report = rig.tick()
    assert report.published == (3,) and rig.clean() and rig.divided()
    counted = {row.item_id: row for row in read_labeled(rig.layout.labeled)}
    kept = [key for key in rig.keys(4) if key in open_before]
    assert rig.keys(4)[: len(kept)] == kept
    for key in open_before:
        begun = key in (others[0], *open_before[1:3])
        elsewhere = key.rsplit(":", 1)[1] in counted and not begun
        assert (key in kept) != elsewhere, "what the undo gave a label again is not asked; what is begun is"
    assert others[0] in kept and rig.truth[counted[others[0].rsplit(":", 1)[1]].item_id]
    assert set(rig.copies().values()) == {1}
    assert all(rig.oracle.queue(who) for who in (ANN, BOB))
    for who in (ANN, BOB, EVE):
        answer_all(rig.oracle, rig.truth, who)
    assert rig.tick().published == (4,)
    rows = {row.item_id: row for row in read_labeled(rig.layout.labeled)}
    assert rows[others[0].rsplit(":", 1)[1]].round == 3 and rows[others[0].rsplit(":", 1)[1]].answers == 2
    made = list(reproduce(rig.reopened(), [2, 3, 4]))
    assert [one.difference for one in made] == [None] * 3


@pytest.mark.slow
def test_killed_before_and_after_every_step_the_same_tasks_are_kept(played: Any, tmp_path: Path) -> None:
    whole, torn = Rig(played, tmp_path / "whole"), Rig(played, tmp_path / "torn")
    for rig in (whole, torn):
        for key in rig.keys(2)[:2]:
            rig.label(key)
        rig.tick()
        rig.intervene(amend, "revoke", Selection(annotator=EVE), "")
    whole.tick()
    names = ("close", "select", "decide", "publish", "tag", "retire", "push", "pull")
    for moment, name in itertools.product(("before", "after"), names):
        with contextlib.suppress(Killed):
            torn.tick(run=killing(name, moment))
    torn.tick()
    assert torn.keys(3) == whole.keys(3) and results(torn.reopened(), 2) == results(whole.reopened(), 2)
    assert torn.record(2)["answers"] == whole.record(2)["answers"] and whole.record(2)["answers"]["kept"] == 6
    assert torn.copies() == whole.copies() and torn.clean()


@pytest.mark.slow
def test_what_else_is_asked_of_the_batch(played: Any, tmp_path: Path) -> None:
    """Named items wait for room, like all that is named; other settings speak of the room; test tasks are kept too."""
    rig = Rig(played, tmp_path)
    planned = {task.item_id for task in read_plans(rig.git).values()}
    wanted = next(item for item in sorted(rig.truth) if item not in planned)
    rig.intervene(ask, [wanted], "a customer complained")
    rig.intervene(amend, "revoke", Selection(annotator=EVE), "")
    with pytest.raises(NothingToDo, match="selected no batch, so strategy had no effect"):
        rig.tick(options=Options(strategy="entropy"))
    assert rig.keys(3) == rig.keys(2), "nobody had answered anything, and all of it is asked on"
    test = next(task.item_id for task in rig.plan(0) if task.part == "test")
    rig.intervene(amend, "revoke", Selection(item=test), "the test task is asked once more")
    rig.tick(options=Options(size=10))
    plan = rig.plan(4)
    assert [task.push_key for task in plan[:8]] == rig.keys(2) and len(plan) == 11
    assert [task.item_id for task in plan[8:] if task.part == "test"] == [test]
    assert wanted in {task.item_id for task in plan[8:]}, "first among the two that there is room for"
    again = next(task.push_key for task in plan if task.item_id == test)
    rig.intervene(amend, "restore", Selection(annotator=EVE), "")
    rig.tick()
    assert again in rig.keys(5) and wanted in {task.item_id for task in rig.plan(5)}
    gone = {task.item_id for task in rig.plan(4)} - {task.item_id for task in rig.plan(5)}
    assert len(gone) <= 1 and gone <= {row.item_id for row in read_labeled(rig.layout.labeled)}, "labelled once more"
    for key in rig.keys(5):
        rig.label(key)
    rig.tick()
    assert test in {row.item_id for row in read_labeled(rig.layout.test_labels)}
    assert not set(rig.keys(6)) & set(rig.keys(5)) and rig.divided(), "a round that closes by itself keeps nothing"

    rig.intervene(amend, "revoke", Selection(annotator=EVE), "again")
    change_params(
        rig.workspace,
        {'    - "spam"\n': '    - "spam"\n    - "other"\n', "  version: 1\n": "  version: 2\n"},
    )
    rig.tick()
    assert not set(rig.keys(7)) & set(rig.keys(6)), "what was asked with other classes is asked anew"
    assert set(rig.oracle.queue(ANN)) == set(rig.keys(7))


@pytest.mark.server
@pytest.mark.slow
def test_in_a_real_label_studio_who_has_a_kept_task_on_the_screen_answers_it(
    label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    small = {"quorum: 0.9": "quorum: 1.0", "test_size: 500": "test_size: 0", "seed_size: 40": "seed_size: 4"}
    workspace, truth = small_workspace(tmp_path, 30, {**small, "batch_size: 40": "batch_size: 4"})
    git, layout = Git(workspace.layout.root), workspace.layout

    def go(run: Any = call) -> TickReport:
        return tick(open_workspace(layout.root), lambda: connect(workspace), run=run)

    def right(key: str) -> str:
        return truth[key.rsplit(":", 1)[1]]

    go()
    with connect(workspace) as oracle, ServerRig(label_studio, oracle) as people:
        ref = ProjectRef(**read_json(layout.project))
        for task in read_plan(git, 0):
            people.answer(ref, task.push_key, ANN, right(task.push_key))
        assert go().published == (0,)
        keys = [task.push_key for task in read_plan(git, 1)]
        people.answer(ref, keys[0], ANN, right(keys[0]))
        people.skip(ref, keys[1], BOB)
        go()
        on_screen = people.served(ref)
        assert on_screen in keys[1:]
        ids = {state.push_key: state.task_id for state in oracle.task_states(ref)}
        with open_dvc(layout) as dvc:
            amend(open_workspace(layout.root), dvc, "revoke", Selection(item=read_plan(git, 0)[0].item_id), "wrong")

        def answer_in_between(name: str, action: Any, /) -> Any:
            result = action()
            if name == "close":
                people.answer(ref, on_screen, ANN, right(on_screen))
            return result

        report = go(answer_in_between)
        assert (report.published, report.round) == ((1,), 2)
        plan = [task.push_key for task in read_plan(git, 2)]
        assert plan[:3] == keys[1:] and len(plan) == 4
        held = {state.push_key: state for state in oracle.task_states(ref)}
        assert {key: held[key].task_id for key in ids} == ids and held.keys() - ids.keys() == {plan[3]}
        assert {state.push_key for state in oracle.open_tasks(ref)} == set(plan) - {on_screen}
        assert people.served(ref) in plan
        [late] = read_events(layout.inbox_events)
        assert (late.annotation_key.rpartition("#")[0], late.round, late.label) == (on_screen, 2, right(on_screen))
        assert status(open_workspace(layout.root)).settled == 1
        for key in set(plan) - {on_screen}:
            people.answer(ref, key, ANN, right(key))
        assert go().published == (2,)
    labels = {row.item_id: row for row in read_labeled(layout.labeled)}
    assert {labels[key.rsplit(":", 1)[1]].round for key in plan} == {2}


# Which tasks --------------------------------------------------------------------------------------------------------


def task(item: str = "a", at: int = 1) -> PlannedTask:
    return PlannedTask(push_key("ws", at, item), item, f"hash {item}", "pool", at, 0, 0.5, "margin", 1.0)


def told(who: str, label: str | None, item: str = "a", at: int = 1, kind: str | None = None) -> Event:
    key = f"{push_key('ws', at, item)}#p.{who}"
    name = kind or ("skip" if label is None else "label")
    return Event(f"{key} {name} {label}", name, item, f"hash {item}", "pool", at, key, who, label)  # type: ignore[arg-type]


def revoked(number: int, **chosen: Any) -> Event:
    asked = LabelIntervention("revoke", selection=Selection(**chosen))
    return Event(
        f"intervention {number}", "quarantine", "", "", "pool", 1, f"ruling:{number}", "admin", intervention=asked
    )


@pytest.mark.parametrize(
    ("events", "overlap", "kept"),
    [
        ([], 1, True),
        ([told("ann", "ham")], 1, False),
        ([told("ann", "ham")], 2, True),
        ([told("ann", None)], 2, True),
        ([told("ann", None), told("bob", None)], 2, False),
        ([told("ann", "ham"), revoked(1, annotator="ann")], 2, False),
        ([told("ann", "ham"), revoked(1, annotator="bob")], 2, True),
        ([told("ann", None), revoked(1, annotator="ann")], 2, False),
        ([told("ann", "ham"), revoked(1, annotator="ann"), told("ann", None, kind="delete")], 1, True),
        ([told("ann", "ham"), told("ann", None, kind="delete")], 1, True),
        ([told("ann", "ham", at=0)], 1, False),
        ([told("ann", "ham", at=0), told("bob", "spam", at=0)], 1, True),
        ([told("ann", "ham", at=0), told("bob", "ham")], 2, True),
        ([told("ann", None, at=0), told("bob", None, at=0)], 1, False),
        ([told("ann", "ham"), replace(told("ann", None), annotation_key=f"{push_key('ws', 1, 'a')}#p.2")], 1, False),
    ],
)
def test_which_open_tasks_stay(events: list[Event], overlap: int, kept: bool) -> None:
    folded = fold(events, ("ham", "spam"), 9)
    assert worth_asking([task()], events, folded, overlap, 9) == ([task()] if kept else [])


def test_a_refused_answer_lets_a_task_go_and_a_wish_keeps_an_ignored_item() -> None:
    tasks, skips = [task("a"), task("b"), task("c")], [told("ann", None, "b", at=0), told("bob", None, "b", at=0)]
    folded = fold(skips, ("ham", "spam"), 9)
    assert worth_asking(tasks, skips, folded, 1, 9, {task("a").push_key}) == [task("c")]
    assert worth_asking(tasks, skips, folded, 1, 9, {task("a").push_key}, {"b"}) == [task("b"), task("c")]


def test_a_kept_task_is_asked_once_although_its_answers_belong_to_two_rounds() -> None:
    """A tie of it is asked once more, as any other."""
    second = replace(told("bob", "spam"), round=2)
    assert times_asked([told("ann", "ham"), second]) == {"a": 1}
    [found] = fold([told("ann", "ham"), second], ("ham", "spam"), 9, {"a": 1}).unresolved
    assert found.kind == "tie"


@pytest.mark.parametrize("name", ["0004", "0002", "4", "x", "000x", "0003x"])
def test_a_plan_names_its_own_round_or_an_earlier_one(name: str) -> None:
    row = json.dumps(asdict(replace(task(at=3), push_key=f"ws:{name}:a")))
    if name == "0002":
        assert parse_plan(row, 3)[0].first_round == 2
    else:
        with pytest.raises(UnexpectedChange, match="push_key must be those of round 3"):
            parse_plan(row, 3)
