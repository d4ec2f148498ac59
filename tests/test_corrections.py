"""Texts that come again under a known id with another text, and are taken for what was wrong."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from harness import answer_all, results, small_workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ingest import close, events, labels, make_workspace, pool, rejects, snapshot, write
from test_ingest import test_set as items_of_test_set
from typer.testing import CliRunner

from al_pipeline.annotation.active_events import superseded
from al_pipeline.annotation.aggregation import fold
from al_pipeline.cli.app import app
from al_pipeline.data.ledger import read_events
from al_pipeline.errors import BadInput, UsageError
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.ask import ask
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.ingestion import intake, staging
from al_pipeline.operations.ingestion.draw import redraw_test
from al_pipeline.operations.ingestion.staging import finish_ingest
from al_pipeline.operations.intervene import rollback, undo
from al_pipeline.operations.log import log
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import tick
from al_pipeline.workspace.workspace import Workspace, open_workspace

FEW_TEST_TASKS = {"test_tasks: 40": "test_tasks: 4"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "ws")


def candidates(space: Workspace) -> dict[str, str]:
    """The texts that people may be asked about, by item."""
    wrong = superseded(events(space))
    return {item.item_id: item.text for item in (*pool(space), *items_of_test_set(space)) if item.item_id not in wrong}


def give(space: Workspace, **texts: str) -> Path:
    return write(space.layout.root / "given.csv", "id,text", *(f"{name},{text}" for name, text in texts.items()))


def test_a_text_that_grew_takes_the_place_of_the_old_one(workspace):
    ingest(workspace, [give(workspace, a="only the beg", b="whole")])
    file = give(workspace, a="only the beginning", b="whole", c="new")
    report = ingest(workspace, [file])
    assert (report.added, report.duplicates, report.corrected) == (1, 1, 0)
    assert report.rejected == {intake.ANOTHER_TEXT: 1}
    assert any("the same command with --corrections" in line for line in report.lines())
    report = ingest(workspace, [file], corrections=True)
    assert (report.rows, report.added, report.duplicates, report.corrected) == (3, 0, 2, 1)
    assert not report.rejected
    assert candidates(workspace) == {"a~2": "only the beginning", "b": "whole", "c": "new"}
    assert [item.item_id for item in pool(workspace)] == ["a", "b", "c", "a~2"], "nothing was edited"
    before = snapshot(workspace)
    for again in (True, False):
        report = ingest(workspace, [file], corrections=again)
        assert (report.duplicates, report.corrected, report.rejected) == (3, 0, {})
    assert snapshot(workspace) == before


def test_corrections_of_corrections_and_back(workspace):
    for place, (text, wanted) in enumerate(
        [("one", "a"), ("two", "a~2"), ("three", "a~3"), ("one", "a"), ("three", "a~3"), ("two", "a~2"), ("one", "a")]
    ):
        ingest(workspace, [give(workspace, a=text)], corrections=True)
        assert candidates(workspace) == {wanted: text}
        if place % 2:
            close(workspace)
    assert len(pool(workspace)) == 3
    report = ingest(workspace, [write(workspace.layout.root / "x.csv", "id,text", "a~3,four")], corrections=True)
    assert report.corrected == 1, "an export names the text by the id that we gave it"
    assert candidates(workspace) == {"a~4": "four"}


def test_labels_stay_with_the_text_that_they_were_given_to(workspace):
    root = workspace.layout.root
    ingest(workspace, [write(root / "a.csv", "id,text,label", "a,cut,ham", "b,other,spam")], label_column="label")
    ingest(workspace, [give(workspace, a="cut no more")], corrections=True)
    assert labels(workspace) == {"b": "spam"}
    folded = fold(events(workspace), ["ham", "spam"])
    assert [(row.item_id, row.kind, row.reason) for row in folded.unresolved] == [
        ("a", "ignored", "its text was corrected: a~2")
    ]
    ingest(workspace, [write(root / "a.csv", "id,text,label", "a,cut no more,spam")], label_column="label")
    assert labels(workspace) == {"a~2": "spam", "b": "spam"}
    ingest(workspace, [give(workspace, a="cut")], corrections=True)
    assert labels(workspace) == {"a": "ham", "b": "spam"}, "the first text comes back with its label"


def test_what_cannot_be_a_correction_is_told_and_loses_nothing(workspace):
    root = workspace.layout.root
    ingest(workspace, [give(workspace, a="one", b="two", **{"l" * 199: "long"})])
    swapped = ingest(workspace, [give(workspace, a="two", b="one")], corrections=True)
    assert swapped.rejected == {intake.ANOTHERS_TEXT: 2}
    assert [row["detail"] for row in rejects(swapped)] == ["as item b", "as item a"]
    twice = write(root / "t.csv", "id,text", "a,three", "a,four", "n,five", "n,six", "a,three")
    for _ in range(2):
        assert ingest(workspace, [twice], corrections=True).rejected == {intake.TWO_TEXTS: 2}
        assert sorted(candidates(workspace).values()) == ["five", "long", "three", "two"]
    stays = write(root / "t.csv", "id,text", "b,two", "b,other")
    assert ingest(workspace, [stays], corrections=True).rejected == {intake.TWO_TEXTS: 1}
    other = ingest(workspace, [give(workspace, z="one")])
    assert other.rejected == {intake.CORRECTED_TEXT: 1}
    assert ingest(workspace, [give(workspace, **{"l" * 199: "longer"})], corrections=True).rejected.total() == 1
    nameless = ingest(workspace, [write(root / "t.csv", "text", "seven", "one")], corrections=True)
    assert (nameless.added, nameless.duplicates) == (1, 1)
    assert "--id-column names the column" in nameless.notes[0]
    with pytest.raises(UsageError, match="--corrections"):
        ingest(workspace, [twice], corrections=True, test=True)


def test_an_id_of_the_user_that_looks_like_ours_is_left_alone(workspace):
    ingest(workspace, [give(workspace, a="one", **{"a~2": "another"})])
    ingest(workspace, [give(workspace, a="two")], corrections=True)
    assert candidates(workspace) == {"a~2": "another", "a~3": "two"}
    ingest(workspace, [give(workspace, **{"a~2": "corrected"})], corrections=True)
    assert candidates(workspace) == {"a~2~2": "corrected", "a~3": "two"}


def test_test_items_stay_test_items(tmp_path):
    space = make_workspace(tmp_path / "ws", test_size=5)
    ingest(space, [give(space, **{f"i{n}": f"text {n}" for n in range(40)})])
    drawn = {item.item_id for item in items_of_test_set(space)}
    assert len(drawn) == 5
    ingest(space, [give(space, **{f"i{n}": f"text {n} is longer" for n in range(40)})], corrections=True)
    assert {item.item_id for item in items_of_test_set(space)} == drawn | {f"{item}~2" for item in drawn}
    assert all(item.item_id.removesuffix("~2") not in drawn for item in pool(space))
    redraw_test(space)
    assert len(pool(space)) + len(items_of_test_set(space)) == 80
    again = {item.item_id.removesuffix("~2") for item in items_of_test_set(space)}
    assert all(item.item_id.removesuffix("~2") not in again for item in pool(space)), "both texts, or neither"
    by_id = {item.item_id for item in items_of_test_set(space)}
    assert all((event.part == "test") == (event.item_id in by_id) for event in events(space))


@pytest.mark.parametrize("moment", range(4))
def test_killed_at_any_move_a_correction_is_whole_or_not_there(tmp_path, monkeypatch, moment):
    """Between the moves of pool, test set and events, and before the moment from which it all counts."""
    space = make_workspace(tmp_path / "ws", test_size=2)
    ingest(space, [give(space, **{f"i{n}": f"text {n}" for n in range(10)})])
    file = give(space, **{f"i{n}": f"text {n} is longer" for n in range(10)})
    before, calls = candidates(space), []
    names = ("move", "move", "add_to_inbox", "write_json")

    class Killed(BaseException):
        pass

    real = getattr(staging, names[moment])

    def kill(*args, **kwargs):
        in_inbox = (
            names[moment] == "write_json"
            or space.layout.inbox_events in args
            or any(
                folder in getattr(args[-1], "parents", ())
                for folder in (space.layout.inbox_pool, space.layout.inbox_test)
            )
        )
        calls.append(in_inbox)
        if sum(calls) > (moment == 1) and in_inbox:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(staging, names[moment], kill)
        ingest(space, [file], corrections=True)
    finish_ingest(space.layout)
    if names[moment] == "write_json":
        assert candidates(space) == before
    else:
        assert set(candidates(space)) == {f"i{n}~2" for n in range(10)}
    ingest(space, [file], corrections=True)
    assert set(candidates(space)) == {f"i{n}~2" for n in range(10)}
    assert len(pool(space)) + len(items_of_test_set(space)) == 20
    assert len(events(space)) == 10


TEXTS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("uvwxyz"), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(first=TEXTS, then=st.lists(st.tuples(TEXTS, st.booleans()), max_size=5), repeats=st.integers(0, 2))
def test_repeats_change_nothing_and_nothing_is_lost(first, then, repeats):
    with tempfile.TemporaryDirectory() as folder:
        once, often = make_workspace(Path(folder) / "once"), make_workspace(Path(folder) / "often")
        for space, times in ((once, 1), (often, 1 + repeats)):
            for texts, accepts in [(first, False), *then]:
                known = {item.text for item in pool(space)}
                for time in range(times):
                    report = ingest(space, [give(space, **texts)], corrections=accepts)
                    done = report.added + report.test_added + report.corrected + report.duplicates
                    assert report.rows == len(texts) == done + sum(report.rejected.values())
                    assert time == 0 or (report.added, report.corrected) == (0, 0)
                assert known <= {item.text for item in pool(space)}
                if accepts:
                    now = candidates(space)
                    refused = sum(report.rejected.values()) + report.duplicates
                    assert len(set(texts.values()) & set(now.values())) >= len(set(texts.values())) - refused
        assert candidates(once) == candidates(often)
        assert events(once) == events(often)
        assert len(set(candidates(once).values())) == len(candidates(once))


def test_on_the_command_line(workspace, monkeypatch):
    monkeypatch.chdir(workspace.layout.root)
    give(workspace, a="one")
    run = CliRunner()
    assert run.invoke(app, ["ingest", "given.csv"]).exit_code == 0
    give(workspace, a="one and a half")
    said = run.invoke(app, ["ingest", "given.csv"]).output
    assert "1 text differs" in said and "--corrections" in said
    said = run.invoke(app, ["ingest", "given.csv", "--corrections", "--json"]).output
    assert json.loads(said)["corrected"] == 1
    assert isinstance(run.invoke(app, ["ingest", "given.csv", "--corrections", "--test"]).exception, UsageError)


@pytest.mark.slow
def test_a_round_with_corrections_rolls_back_and_can_be_made_again(tmp_path):
    """Asked, answered, corrected; then what is open is retired, and the snapshots before and after hold."""
    space, truth = small_workspace(tmp_path, changes=FEW_TEST_TASKS)
    root, oracle = space.layout.root, SimulatedOracle()
    tick(space, lambda: oracle)
    answer_all(oracle, truth)
    tick(open_workspace(root), lambda: oracle)
    git = Git(root)
    number = 1
    plan = read_plan(git, number)
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    folded = fold(read_events(space.layout.events), ["ham", "spam"])
    asked = {task.part: task for task in plan}
    labelled = folded.labeled[0].item_id
    wrong = {labelled, *(task.item_id for task in asked.values())}
    assert set(asked) == {"pool", "test"}
    for row in rows:
        if row["id"] in wrong:
            row["text"] += " and the rest of it"
    (tmp_path / "whole.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth |= {f"{item}~2": truth[item] for item in wrong}
    ingest(open_workspace(root), [tmp_path / "whole.jsonl"], corrections=True)
    tick(open_workspace(root), lambda: oracle)
    open_keys = set(oracle.queue("ann@example.org"))
    assert not open_keys & {task.push_key for task in asked.values()}, "retired, whatever their part"
    assert all(task.push_key in open_keys for task in plan if task.item_id not in wrong)
    tick(open_workspace(root), lambda: oracle)
    assert set(oracle.queue("ann@example.org")) == open_keys, "not pushed again"
    with open_dvc(space.layout) as dvc, pytest.raises(BadInput, match="was corrected"):
        ask(open_workspace(root), dvc, [labelled], "")
    answer_all(oracle, truth)
    report = tick(open_workspace(root), lambda: oracle)
    assert report.published == (1,)
    record = json.loads(space.layout.record(1).read_text())
    counts = record["counts"]
    now = fold(read_events(space.layout.events), ["ham", "spam"])
    assert {row.item_id for row in now.unresolved} >= wrong
    assert not wrong & {row.item_id for row in (*now.labeled, *now.test)}
    assert not wrong & {task.item_id for task in read_plan(git, 2)}
    assert counts["ignored"] == 2
    assert "correct" in {entry.what for entry in log(open_workspace(root), labelled).entries}
    assert "correct" in {entry.what for entry in log(open_workspace(root), f"{labelled}~2").entries}
    (made,) = reproduce(open_workspace(root), [1])
    assert (made.compared, made.difference) == ("bytes", None)
    with open_dvc(space.layout) as dvc:
        rollback(open_workspace(root), dvc, 0, labels=True, model=False, params=False, reason="")
    tick(open_workspace(root), lambda: oracle)
    before = fold(read_events(space.layout.events), ["ham", "spam"])
    assert before == folded
    assert results(open_workspace(root), 2)["labeled"] == results(open_workspace(root), 0)["labeled"]
    with open_dvc(space.layout) as dvc:
        undo(open_workspace(root), dvc, "")
    tick(open_workspace(root), lambda: oracle)
    assert fold(read_events(space.layout.events), ["ham", "spam"]) == now
