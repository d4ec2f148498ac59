"""Items that a person puts into the next batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Played, answer_all, go_on

from al_pipeline.active_learning.batch import ASKED, choose
from al_pipeline.active_learning.sampling import round_seed
from al_pipeline.data.pool import read_ids
from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.operations.ask import ask
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.tick import tick
from al_pipeline.records import RANDOM_SLICE
from al_pipeline.rounds.interventions import Intervention, asked_for, parse_intervention
from al_pipeline.workspace.workspace import open_workspace


def intervention(number: int, at_round: int, *items: str) -> Intervention:
    return Intervention(number, "ask", at_round, "Ann", "2026-01-01T00:00:00+00:00", "", items=items)


def test_what_was_asked_for_waits_until_a_plan_holds_it() -> None:
    interventions = [intervention(1, 2, "a", "b"), intervention(2, 3, "c", "a")]
    assert asked_for(interventions, {}) == ["a", "b", "c"]
    assert asked_for(interventions, {"a": 3, "b": 2, "c": 1}) == ["b", "c", "a"], (
        "asked again after it was asked in round 3"
    )
    assert asked_for(interventions, {"a": 4, "b": 3, "c": 4}) == []


def test_the_intervention_comes_back_and_others_look_as_before() -> None:
    assert parse_intervention(intervention(1, 2, "a", "b").to_row(), "x") == intervention(1, 2, "a", "b")
    assert "items" not in Intervention(1, "pause", 2, "Ann", "2026-01-01T00:00:00+00:00", "").to_row()
    for items in ("a", [1], [None], {"a": 1}):
        with pytest.raises(BadInput, match=r"items(\.0)?: got .*; expected: (list of up to 10,000|text)"):
            parse_intervention({**intervention(1, 2).to_row(), "items": items}, "x")


def test_requested_items_come_first_and_are_no_part_of_the_random_slice() -> None:
    ids = [f"i{n:03d}" for n in range(200)]
    batch = choose(
        ids, None, strategy="random", k=20, random_share=0.5, seed=round_seed(1, 3, "random"),
        first=["i003"], requested=["i001", "i002", "nobody"],
    )  # fmt: skip
    assert len(batch) == 20
    by_id = {query.item_id: query for query in batch}
    assert [query.item_id for query in batch[:3]] == ["i001", "i002", "i003"]
    assert "nobody" not in by_id
    for item in ("i001", "i002"):
        assert (by_id[item].strategy, by_id[item].probability) in ((ASKED, 1.0), (RANDOM_SLICE, 10 / 200))
    plain = choose(ids, None, strategy="random", k=20, random_share=0.5, seed=round_seed(1, 3, "random"))
    assert {q.item_id for q in plain if q.strategy == RANDOM_SLICE} == {
        q.item_id for q in batch if q.strategy == RANDOM_SLICE
    }, "the honest part is drawn before anything else"


@pytest.mark.slow
def test_items_enter_the_next_batch_and_the_record_says_who_wanted_them(started: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    layout, git = workspace.layout, Git(workspace.layout.root)
    plan = read_plan(git, 0)
    planned = {task.item_id for task in plan}
    test = next(task.item_id for task in plan if task.part == "test")
    pending = next(task.item_id for task in plan if task.part == "pool")
    wanted = sorted(set(read_ids([layout.pool]).ids()) - planned)[:2]

    def put(*items: str) -> Intervention:
        with open_dvc(layout) as dvc:
            return ask(open_workspace(layout.root), dvc, items, "a customer complained")

    for item, says in ((test, "test set"), (pending, "round 0, which is open"), ("nobody", "no item")):
        with pytest.raises(BadInput, match=says):
            put(*wanted, item)
    made = put(*wanted)
    with pytest.raises(NothingToDo, match="already"):
        put(*wanted)
    assert (made.items, made.reason) == (tuple(wanted), "a customer complained")
    answer_all(oracle, truth)
    assert tick(open_workspace(layout.root), lambda: oracle).published == (0,)
    asked = {task.item_id: task for task in read_plan(git, 1) if task.item_id in wanted}
    assert sorted(asked) == wanted
    assert all(task.strategy in (ASKED, RANDOM_SLICE) for task in asked.values())
    assert read_json(layout.overrides)["ask"] == wanted
    answer_all(oracle, truth)
    assert tick(open_workspace(layout.root), lambda: oracle).published == (1,)
    assert "ask" not in read_json(layout.overrides), "once is enough"
    with pytest.raises(BadInput, match="has the label"):
        put(wanted[0])
