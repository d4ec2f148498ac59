"""How soon there is a model: labels that the user brings, and a test set that is labelled slice by slice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Played, answer_all, change_params, go_on, small_workspace, write_pool

from al_pipeline.data.catalog import draw_test
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import parse_predictions
from al_pipeline.data.pool import iter_items, read_ids
from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.history import read_history, read_plan, read_plans
from al_pipeline.operations.ingest import before_first_model, ingest
from al_pipeline.operations.ingestion import staging
from al_pipeline.operations.ingestion.draw import redraw_test
from al_pipeline.operations.ingestion.staging import finish_ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.planning import interleaved
from al_pipeline.operations.predict import predict
from al_pipeline.operations.report import report_data
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import tick
from al_pipeline.records import PlannedTask
from al_pipeline.rounds.state_machine import Closing, Facts, Step, close_reason, next_step, state
from al_pipeline.workspace.workspace import Workspace, open_workspace

RULE = Closing(0.9, 7, 10)


def task(name: str) -> PlannedTask:
    return PlannedTask(name, name, name, "pool", 0, 0, 0.0, "random", 1.0)


@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 0), (4, 4), (2, 7), (40, 40), (1, 1)])
def test_any_beginning_of_a_round_holds_its_share_of_both(first: int, second: int) -> None:
    merged = interleaved([task(f"a{n}") for n in range(first)], [task(f"b{n}") for n in range(second)])
    names = [found.item_id for found in merged]
    assert [name for name in names if name[0] == "a"] == [f"a{n}" for n in range(first)]
    assert [name for name in names if name[0] == "b"] == [f"b{n}" for n in range(second)]
    for length in range(len(names) + 1):
        share = sum(name[0] == "a" for name in names[:length])
        assert abs(share - length * first / max(len(names), 1)) <= 1


def test_labels_that_were_brought_close_round_0_before_label_studio_is_asked() -> None:
    facts = Facts(items=9, incoming=0, planned=0, brought=12, done=frozenset({Step.INGEST}))
    assert next_step(facts, RULE) is Step.CLOSE
    assert close_reason(facts, RULE) == "12 labels were brought along"
    assert state(facts) == "planned"


# Ingest ------------------------------------------------------------------------------------------------------------


def fresh(folder: Path, test_size: int | None = None) -> Workspace:
    init(folder / "w", ["ham", "spam"], remote=str(folder / "remote"), test_size=test_size)
    workspace = open_workspace(folder / "w")
    change_params(workspace, {"kind: encoder+tfidf": "kind: tfidf", "min_labels: 10": "min_labels: 5"})
    return open_workspace(folder / "w")


def labelled(path: Path, count: int, start: int = 0) -> dict[str, str]:
    truth = write_pool(path, count, start=start)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "label": truth[row["id"]]}) + "\n" for row in rows))
    return truth


def test_what_people_will_be_asked_is_said_beforehand(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, test_size=60)
    assert workspace.params.ingest.test_size == 60
    write_pool(tmp_path / "pool.jsonl", 400)
    assert ingest(workspace, [tmp_path / "pool.jsonl"]).test_added == 60
    said = str(before_first_model(workspace))
    assert "label 80 items before the first model: 40 to learn from" in said and "40 of the test set" in said
    labelled(tmp_path / "pool.jsonl", 50)
    ingest(workspace, [tmp_path / "pool.jsonl"], label_column="label")
    assert "before anybody answers" in str(before_first_model(workspace))


def test_the_size_of_the_test_set_is_chosen_once(tmp_path: Path) -> None:
    workspace = fresh(tmp_path)
    write_pool(tmp_path / "pool.jsonl", 100)
    assert ingest(workspace, [tmp_path / "pool.jsonl"], test_size=7).test_added == 7
    with pytest.raises(BadInput, match="--redraw-test"):
        ingest(workspace, [tmp_path / "pool.jsonl"], test_size=9)


def test_a_test_set_of_the_first_file_alone_is_drawn_again_from_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = fresh(tmp_path)
    layout = workspace.layout
    for name, start in (("a", 0), ("b", 100), ("given", 500)):
        labelled(tmp_path / f"{name}.jsonl", 100, start)
    with pytest.raises(NothingToDo, match="no test set has been drawn"):
        redraw_test(workspace)
    ingest(workspace, [tmp_path / "a.jsonl"], label_column="label")
    report = ingest(workspace, [tmp_path / "b.jsonl"], label_column="label")
    assert "drawn from earlier files alone" in report.notes[0]
    ingest(workspace, [tmp_path / "given.jsonl"], label_column="label", test=True)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(staging, "_carry_out", killed)
        with pytest.raises(KeyboardInterrupt):
            redraw_test(workspace)
    assert finish_ingest(layout)
    assert redraw_test(workspace) == 40, "twice is as good as once"
    everything = [item for batch in iter_items([layout.inbox_pool, layout.inbox_test]) for item in batch]
    own = [item for item in everything if int(item.item_id[5:]) < 500]
    expected = draw_test([bytes.fromhex(item.content_hash) for item in own], 40, workspace.params.seed)
    found = {bytes.fromhex(text) for text in read_ids([layout.inbox_test]).hashes()}
    assert len(everything) == 300 and len({item.item_id for item in everything}) == 300
    assert found == expected | {bytes.fromhex(i.content_hash) for i in everything if int(i.item_id[5:]) >= 500}
    events = read_events(layout.inbox_events)
    assert len(events) == 300
    assert {e.item_id for e in events if e.part == "test"} == set(read_ids([layout.inbox_test]).ids())


def test_once_a_round_has_begun_the_test_set_is_not_drawn_again(started: Played, tmp_path: Path) -> None:
    workspace, _, _ = go_on(started, tmp_path)
    folders = [workspace.layout.pool, workspace.layout.test, workspace.layout.inbox_pool, workspace.layout.inbox_test]
    before = [list(read_ids([folder]).ids()) for folder in folders]
    with pytest.raises(NothingToDo) as refused:
        redraw_test(workspace)
    assert str(refused.value) == (
        "the first round has begun, so the test set can no longer be redrawn; `al ingest --test FILE` adds to it"
    )
    assert [list(read_ids([folder]).ids()) for folder in folders] == before


# Whole rounds ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_labels_of_the_user_are_a_model_before_anybody_answers(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, test_size=20)
    labelled(tmp_path / "some.jsonl", 60)
    write_pool(tmp_path / "more.jsonl", 60, start=60)
    ingest(workspace, [tmp_path / "some.jsonl"], label_column="label")
    ingest(workspace, [tmp_path / "more.jsonl"])
    oracle = SimulatedOracle()

    def down(call: str, moment: str) -> None:
        raise ConnectionError

    oracle.fault = down
    with pytest.raises(ConnectionError):  # Label Studio is not needed for it
        tick(workspace, lambda: oracle)
    git, layout = Git(workspace.layout.root), workspace.layout
    history = read_history(layout, git)
    assert (history.promoted, history.planned, [r.round for r in history.rounds]) == ("round-0000", 1, [0])
    record = read_json(layout.record(0))
    assert record["reason"] == "48 labels were brought along" and record["counts"]["labelled"] == 48
    assert record["answers"]["tasks"] == 0 and record["metrics"]["items"] == 12
    assert report_data(workspace).labels == 48
    [row] = predict(workspace, iter([[("x", "win money now, claim your prize")]]))
    assert row["label"] == "spam"

    [again] = reproduce(workspace, {0})
    assert again.difference is None and again.compared == "bytes", again

    oracle.fault = None
    opened = tick(open_workspace(layout.root), lambda: oracle)
    assert (opened.round, opened.state, opened.published) == (1, "open", ())
    plan = read_plan(git, 1)
    assert {task.part for task in plan} == {"pool"}, "the test set came with labels"
    assert all(task.predicted for task in plan)


@pytest.mark.slow
def test_the_test_set_is_labelled_slice_by_slice_and_a_champion_is_judged_on_all_of_it(tmp_path: Path) -> None:
    changes = {"test_size: 500": "test_size: 24", "test_tasks: 40": "test_tasks: 8"}
    changes["min_test_per_class: 10"] = "min_test_per_class: 6"
    workspace, truth = small_workspace(tmp_path, 120, changes)
    oracle, git, layout = SimulatedOracle(), Git(workspace.layout.root), workspace.layout
    tick(workspace, lambda: oracle)
    plan = read_plan(git, 0)
    assert [task.part for task in plan[:4]].count("test") in (1, 2, 3), "mixed with the seed"
    assert [task.rank for task in plan] == list(range(18))
    labelled_tests = []
    for number in range(3):
        answer_all(oracle, truth)
        assert tick(open_workspace(layout.root), lambda: oracle).published == (number,)
        labelled_tests.append(read_json(layout.record(number))["counts"]["test_labelled"])
    assert labelled_tests == [8, 16, 24]
    digests = {item.item_id: bytes.fromhex(item.content_hash) for b in iter_items([layout.test]) for item in b}
    asked = [task.item_id for task in read_plans(git).values() if task.part == "test" and task.round == 0]
    assert {digests[item] for item in asked} == draw_test(digests.values(), 8, workspace.params.seed)
    before = parse_predictions(git.show("round-0000", "rounds/predictions.csv") or "", unlabelled=True)
    assert len(before.item_ids) == 24 and sum(label != "" for label in before.labels) == 8
    decision = read_json(layout.record(2))["decision"]
    assert "24 test items" in " ".join(decision["reasons"]), decision
    assert [task.part for task in read_plan(git, 3)].count("test") == 0
