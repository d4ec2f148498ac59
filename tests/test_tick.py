"""Whole rounds on real git and DVC: published, cloned, checked out, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import (
    Killed,
    Played,
    answer_all,
    change_params,
    copy_workspace,
    go_on,
    killing,
    play,
    results,
    write_pool,
)

from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import (
    EngineChanged,
    LabelStudioDown,
    Locked,
    ManualActionRequired,
    NothingToDo,
    StageFailed,
    UnexpectedChange,
    WrongProject,
)
from al_pipeline.files import read_json, sha256_file, sha256_tree, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.close import check_sources, pull_missing_sources
from al_pipeline.operations.connect import leave_project
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plan
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.records import AnsweredTask
from al_pipeline.rounds.state_machine import Step
from al_pipeline.workspace.layout import STAGES
from al_pipeline.workspace.lock import locked
from al_pipeline.workspace.trust import accept
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow


def test_rounds_are_published_complete_and_clean(undisturbed: Workspace) -> None:
    git = Git(undisturbed.layout.root)
    assert sorted(git.tags()) == ["round-0000", "round-0001"]
    assert git.run("status", "--porcelain").stdout == ""
    with open_dvc(undisturbed.layout) as dvc:
        assert dvc.changed() == {}
        assert dvc.defects_in_remote() == []
    found = status(undisturbed)
    assert (found.round, found.state, found.labelled) == (2, "open", 18)
    assert found.labelled + found.pending + found.ignored + found.unlabelled == found.pool == 68
    assert found.promoted in git.tags()


def test_a_tick_leaves_nothing_behind_that_the_git_remote_lacks(template: Any, tmp_path: Path) -> None:
    """The commit that names Label Studio's project comes last of all."""
    workspace = copy_workspace(template, tmp_path)
    git = Git(workspace.layout.root)
    subprocess.run(["git", "init", "-q", "--bare", "--initial-branch=main", str(tmp_path / "bare.git")], check=True)
    git.run("remote", "add", "origin", str(tmp_path / "bare.git"))
    tick(workspace, SimulatedOracle)
    assert Git(tmp_path / "bare.git").run("rev-parse", "main").stdout.strip() == git.head()


def test_a_round_that_another_clone_published_is_not_made_twice(template: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    root, git = workspace.layout.root, Git(workspace.layout.root)
    git.run("init", "--quiet", "--bare", "--initial-branch=main", str(tmp_path / "bare.git"))
    git.run("remote", "add", "origin", str(tmp_path / "bare.git"))
    tick(workspace, lambda: oracle)
    git.run("push", "--quiet", "origin", "HEAD:refs/tags/round-0000")
    head = git.head()
    answer_all(oracle, truth)
    for _ in range(2):
        with pytest.raises(
            ManualActionRequired, match="round-0000 is already on the git remote: another clone published it"
        ):
            tick(open_workspace(root), lambda: oracle)
    assert git.head() == head and git.tags() == {}
    (tmp_path / "bare.git").rename(tmp_path / "away.git")
    report = tick(open_workspace(root), lambda: oracle)
    assert report.published == (0,) and "git remote" in report.warnings[0], "where it is away, rounds do not wait"


def test_an_edit_made_while_a_round_is_built_is_named_and_not_published(started: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    answer_all(oracle, truth)
    plan = workspace.layout.plan(0)
    right = plan.read_text()

    def editing(name: str, action: Callable[[], Any], /) -> Any:
        if name == "train":
            plan.write_text(right.replace("mail", "male", 1))
        return action()

    with pytest.raises(UnexpectedChange, match=r"rounds/0000/plan\.jsonl"):
        tick(open_workspace(workspace.layout.root), lambda: oracle, run=editing)
    assert Git(workspace.layout.root).tags() == {}
    plan.write_text(right)
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == (0,)


def test_a_project_that_is_gone_is_left_by_command_and_its_answers_stay(template: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    with pytest.raises(NothingToDo, match="al round"):
        leave_project(workspace)
    tick(workspace, lambda: oracle)
    leave_project(workspace)
    tick(workspace, lambda: oracle)
    assert list(oracle.projects) == [1], "a project that is still there is found again"
    for key in oracle.queue("ann")[:5]:
        oracle.answer(key, "ann", truth[key.rsplit(":", 1)[1]])
    tick(workspace, lambda: oracle)
    del oracle.projects[1]
    with pytest.raises(WrongProject, match="al adopt --new-project"):
        tick(workspace, lambda: oracle)
    leave_project(workspace)
    assert Git(workspace.layout.root).run("status", "--porcelain").stdout == ""
    report = tick(workspace, lambda: oracle)
    assert (report.state, report.pulled, len(oracle.queue("ann"))) == ("open", {}, 22), "all of it is asked again"
    assert status(workspace).settled == 5
    for key in oracle.queue("ann")[5:]:
        oracle.answer(key, "ann", truth[key.rsplit(":", 1)[1]])
    assert tick(workspace, lambda: oracle).published == (0,)
    assert len(read_labeled(workspace.layout.labeled)) == 10, "the five from the old project count"


def test_plans_never_repeat_an_item_and_test_items_are_never_queried(undisturbed: Workspace) -> None:
    git = Git(undisturbed.layout.root)
    plans = [read_plan(git, number) for number in range(3)]
    asked = [task.item_id for plan in plans for task in plan]
    assert len(set(asked)) == len(asked)
    assert Counter(task.part for task in plans[0]) == {"test": 12, "pool": 10}
    assert {task.part for plan in plans[1:] for task in plan} == {"pool"}
    labeled = {row.item_id for row in read_labeled(undisturbed.layout.labeled)}
    assert labeled == {task.item_id for plan in plans[:2] for task in plan if task.part == "pool"}


def test_a_fresh_clone_goes_back_to_a_tag_and_makes_it_again(undisturbed: Workspace, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(undisturbed.layout.root), str(clone)], check=True)
    for tag in ("round-0000", "round-0001"):
        subprocess.run(["git", "checkout", "-q", tag], cwd=clone, check=True)
        workspace = open_workspace(clone)
        with open_dvc(workspace.layout) as dvc:
            dvc.pull()
            assert dvc.changed() == {}
        number = int(tag[-4:])
        before = read_json(workspace.layout.record(number))["hashes"]
        assert sha256_tree(workspace.layout.labeled) == before["labeled"]
        assert sha256_tree(workspace.layout.model) == before["model"]
    shutil.rmtree(workspace.layout.features, ignore_errors=True)
    shutil.rmtree(workspace.layout.pool)
    with open_dvc(workspace.layout) as dvc:
        pull_missing_sources(workspace.layout, dvc)
        check_sources(workspace.layout, dvc)
    with open_dvc(workspace.layout) as dvc:
        for stage in STAGES:
            dvc.repro(stage, force=True, run_cache=False)
    hashes = {"labeled": workspace.layout.labeled, "model": workspace.layout.model, "queries": workspace.layout.queries}
    assert {name: sha256_tree(path) for name, path in hashes.items()} == {name: before[name] for name in hashes}
    assert subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=clone, check=False).returncode == 0


def test_two_ticks_at_once_cannot_be(template: Any, tmp_path: Path) -> None:
    workspace = copy_workspace(template, tmp_path)
    with locked(workspace.layout.lock, "a test"), pytest.raises(Locked, match="a test, process"):
        tick(workspace, SimulatedOracle)


def test_what_goes_wrong_and_comes_right(template: Any, tmp_path: Path) -> None:
    """One workspace through a row of mishaps; each stops the tick with a clear word and leaves the round whole."""
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    root = workspace.layout.root

    def down() -> SimulatedOracle:
        raise LabelStudioDown("not there")

    with pytest.raises(LabelStudioDown):
        tick(workspace, down)
    assert status(workspace).state == "open", "the first build needs no Label Studio"
    tick(workspace, lambda: oracle)
    answer_all(oracle, truth)

    ledger = workspace.layout.events / "part-000001.jsonl"
    ledger.write_text("")
    with pytest.raises(UnexpectedChange, match="data/events"):
        tick(open_workspace(root), lambda: oracle)
    ledger.unlink()

    record = workspace.layout.plan(0)
    text = record.read_text()
    record.write_text(text + "\n")
    with pytest.raises(UnexpectedChange, match="plan.jsonl"):
        tick(open_workspace(root), lambda: oracle)
    assert record.read_text() == text + "\n", "somebody's edit is not overwritten"
    record.write_text(text)

    change_params(workspace, {"strategy: auto": "strategy: entropy"})
    dvc_yaml = workspace.layout.dvc_yaml.read_text()
    workspace.layout.dvc_yaml.write_text(dvc_yaml.replace("al_pipeline.stages.train", "al_pipeline.stages.nothing"))
    with pytest.raises(UnexpectedChange, match="dvc.yaml differs from this engine's.*al trust"):
        tick(open_workspace(root), lambda: oracle)
    accept(root)
    with pytest.raises(StageFailed, match="stages.nothing"):
        tick(open_workspace(root), lambda: oracle)
    found = status(open_workspace(root))
    assert (found.state, found.labelled) == ("closed", 0), "status tells of the last commit"
    workspace.layout.dvc_yaml.write_text(dvc_yaml)

    write_json(workspace.layout.engine, {"version": "another"})
    report = tick(open_workspace(root), lambda: oracle)
    assert report.published == (0,)
    assert read_history(workspace.layout, Git(root)).record(0).params.to_row()["select"]["strategy"] == "entropy"
    plan = read_plan(Git(root), 1)
    assert {task.strategy for task in plan} == {"entropy", "random_slice"}


def test_params_edited_in_the_middle_of_a_build_start_it_over(started: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    answer_all(oracle, truth)

    def stop_before_publish(name: str, action: Callable[[], Any], /) -> Any:
        if name == "publish":
            raise Killed
        return action()

    with pytest.raises(Killed):
        tick(open_workspace(workspace.layout.root), lambda: oracle, run=stop_before_publish)
    change_params(workspace, {"batch_size: 8": "batch_size: 5"})
    report = tick(open_workspace(workspace.layout.root), lambda: oracle)
    names = [name for name, _ in report.steps]
    assert "select" in names and "decide" in names
    assert len(read_plan(Git(workspace.layout.root), 1)) == 5


def test_new_items_wait_for_the_close_and_late_answers_count(started: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    parts = {task.push_key: task.part for task in read_plan(Git(workspace.layout.root), 0)}
    keys = sorted(oracle.queue("ann@example.org"), key=lambda key: parts[key] != "test")
    for key in keys[:20]:
        oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
    truth |= write_pool(tmp_path / "more.jsonl", 30, seed=9, start=500)
    ingest(workspace, [tmp_path / "more.jsonl"])
    assert Git(workspace.layout.root).run("status", "--porcelain").stdout == "", "clean while people label"
    found = status(workspace)
    assert (found.incoming, found.pool) == (30, 98)
    report = tick(open_workspace(workspace.layout.root), lambda: oracle)
    assert report.published == (0,)
    late = keys[-1]
    oracle.answer(late, "ann@example.org", truth[late.rsplit(":", 1)[1]])
    for key in oracle.queue("bob@example.org"):
        oracle.answer(key, "bob@example.org", truth[key.rsplit(":", 1)[1]])
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    rows = {row.item_id: row for row in read_labeled(workspace.layout.labeled)}
    assert rows[late.rsplit(":", 1)[1]].round == 0
    found = status(workspace)
    assert found.pool == 98 and found.incoming == 0


def test_a_lost_cache_is_no_foreign_edit(once: Played, tmp_path: Path) -> None:
    """Somebody made room on the disk; the remote has it all."""
    workspace, oracle, truth = go_on(once, tmp_path)
    shutil.rmtree(workspace.layout.root / ".dvc/cache")
    answer_all(oracle, truth)
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == (1,)
    with open_dvc(workspace.layout) as dvc:
        assert dvc.changed() == {}


def test_close_now_closes_with_what_there_is(started: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(started, tmp_path)
    report = tick(open_workspace(workspace.layout.root), lambda: oracle, options=Options(close_now=True))
    assert report.published == () and report.warnings == (
        "nothing was closed: there are no new answers to close it with",
    )
    key = oracle.queue("ann@example.org")[-1]
    oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == ()
    report = tick(open_workspace(workspace.layout.root), lambda: oracle, options=Options(close_now=True))
    assert report.published == (0,) and report.warnings == ()


def test_answers_are_read_once_before_a_round_closes(
    started: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pull of a queue that is empty is an audit; with open tasks left, the audit comes when the round closes."""
    workspace, oracle, truth = go_on(started, tmp_path)
    reads: list[str | None] = []
    answered = SimulatedOracle.answered

    def counted(self: SimulatedOracle, ref: ProjectRef, since: str | None) -> Iterator[AnsweredTask]:
        reads.append(since)
        return answered(self, ref, since)

    def answer(keys: Sequence[str], options: Options | None = None) -> tuple[TickReport, list[str]]:
        for key in keys:
            oracle.answer(key, "ann@example.org", truth[key.rsplit(":", 1)[1]])
        reads.clear()
        report = tick(open_workspace(workspace.layout.root), lambda: oracle, options=options)
        return report, [name for name, _ in report.steps]

    monkeypatch.setattr(SimulatedOracle, "answered", counted)
    keys = oracle.queue("ann@example.org")
    report, steps = answer(keys[:1])
    assert (report.published, len(reads), "audit" in steps) == ((), 1, False)
    report, steps = answer(keys[1:])
    assert (report.published, len(reads), "audit" in steps) == ((0,), 1, False)
    assert report.pulled["label"] == len(keys) - 1
    report, steps = answer(oracle.queue("ann@example.org")[:1], Options(close_now=True))
    assert report.published == (1,) and steps.index("pull") < steps.index("audit") < steps.index("close")


def test_a_batch_of_another_size_and_strategy_is_for_one_round_and_recorded(template: Any, tmp_path: Path) -> None:
    """Killed where it had closed or was built, the round still gets what was asked; the next is ordinary again."""
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    root, git = workspace.layout.root, Git(workspace.layout.root)

    def go(options: Options | None = None, killed_at: str = "") -> Any:
        def run(name: str, action: Callable[[], Any], /) -> Any:
            if name == killed_at:
                raise Killed
            return action()

        return tick(open_workspace(root), lambda: oracle, run=run, options=options)

    first = go(Options(size=6, strategy="entropy"))
    assert "not by entropy: there are no labels yet" in " ".join(first.warnings)
    assert [task.part for task in read_plan(git, 0)].count("pool") == 6, "the seed's size too"
    assert read_json(workspace.layout.genesis)["overrides"] == {"size": 6, "strategy": "entropy"}

    with pytest.raises(NothingToDo, match="selected no batch, so size had no effect: 17 more of 18 tasks"):
        go(Options(size=3))
    assert git.run("status", "--porcelain").stdout == ""
    answer_all(oracle, truth)

    with pytest.raises(Killed):
        go(Options(size=3, strategy="entropy"), killed_at="train")
    with pytest.raises(Killed):
        go(killed_at="publish")
    report = go(Options(strategy="entropy", size=3))
    assert report.published == (0,) and not report.warnings
    assert {task.strategy for task in read_plan(git, 1)} <= {"entropy", "random_slice"} and len(read_plan(git, 1)) == 3
    assert read_json(workspace.layout.record(0))["overrides"] == {"size": 3, "strategy": "entropy"}
    assert read_json(workspace.layout.histogram)["acquisition"] == "entropy", "scored for the strategy that chose"
    assert workspace.params.select.strategy == "auto", "params.yaml stays"

    answer_all(oracle, truth)
    with pytest.raises(Killed):
        go(killed_at="publish")
    go(Options(size=4))
    assert read_json(workspace.layout.record(1))["overrides"] == {"size": 4}, "a build under way is given it too"
    assert len(read_plan(git, 2)) == 4
    answer_all(oracle, truth)
    go()
    assert read_json(workspace.layout.record(2))["overrides"] == {} and len(read_plan(git, 3)) == 8
    with open_dvc(workspace.layout) as dvc:
        assert dvc.changed() == {}


def test_what_a_killed_close_was_to_select_is_not_forgotten(template: Any, tmp_path: Path) -> None:
    workspace, oracle = copy_workspace(template, tmp_path), SimulatedOracle()
    write_json(workspace.layout.closing, {"selects_for": 0, "overrides": {"size": 5}})
    tick(workspace, lambda: oracle)
    assert read_json(workspace.layout.genesis)["overrides"] == {"size": 5}


def test_the_record_says_what_the_round_was(undisturbed: Workspace) -> None:
    record = read_json(undisturbed.layout.record(1))
    assert record["answers"]["answered"] == record["answers"]["tasks"] == 8
    assert record["decision"]["verdict"] in ("promoted", "refused", "held")
    assert record["counts"]["labels"].keys() <= {"ham", "spam"}
    assert record["engine"]["sources"] and record["parent"]
    assert json.dumps(record, allow_nan=False)


def test_a_stage_refuses_another_engine(undisturbed: Workspace, tmp_path: Path) -> None:
    from al_pipeline.stages.label import main
    from al_pipeline.workspace.layout import Layout

    layout = Layout(tmp_path)
    write_json(layout.engine, {"threads": 0})
    with pytest.raises(EngineChanged, match="threads: was 0"):
        main(layout)


def test_steps_have_the_names_of_the_stages() -> None:
    assert {str(step) for step in Step} >= set(STAGES)


def test_guesses_are_shown_only_where_asked_for_and_never_on_test_items(template: Any, tmp_path: Path) -> None:
    workspace, oracle, truth = copy_workspace(template, tmp_path), SimulatedOracle(), template[1]
    change_params(workspace, {"show_guess: false": "show_guess: true"})
    play(open_workspace(workspace.layout.root), oracle, truth, 1)
    held = oracle.projects[read_json(workspace.layout.project)["project_id"]].tasks.values()
    guessed = {task.data["push_key"] for task in held if task.data.get("al_prelabel")}
    plan = read_plan(Git(workspace.layout.root), 1)
    assert guessed == {task.push_key for task in plan}, "round 0 had no model to guess with"


def test_a_notebook_sees_the_rounds_the_labels_and_the_predictions(undisturbed: Workspace) -> None:
    from al_pipeline import frames

    root = undisturbed.layout.root
    rounds = frames.rounds(root)
    assert rounds["round"].tolist() == [0, 1] and rounds["labelled"].tolist() == [10, 18]
    labels = frames.labeled(root)
    assert len(labels) == 18 and labels["text"].notna().all() and set(labels["label"]) <= {"ham", "spam"}
    predicted = frames.predictions(root)
    assert len(predicted) == 12
    assert ((predicted["p_ham"] + predicted["p_spam"]) - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    "name", ["rounds/0001/round.json", "rounds/0002/plan.jsonl", "dvc.lock", "rounds/metrics.json", "models/candidate"]
)
def test_what_somebody_edits_between_the_decision_and_the_commit_is_not_published(
    once: Played, undisturbed: Workspace, tmp_path: Path, name: str
) -> None:
    workspace, oracle, truth = go_on(once, tmp_path)
    answer_all(oracle, truth)
    with pytest.raises(Killed):
        tick(workspace, lambda: oracle, run=killing("publish", "before"))
    path = workspace.layout.root / name
    path = path if path.is_file() else path / "card.json"
    before = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(before.replace(b"0.5", b"0.6").replace(b"outs", b"outs ").replace(b'"spam"', b'"ham"') + b"\n")
    assert tick(open_workspace(workspace.layout.root), lambda: oracle).published == (1,)
    assert results(workspace, 1) == results(undisturbed, 1)
    record = read_json(workspace.layout.record(1))
    assert record["metrics"] == read_json(undisturbed.layout.record(1))["metrics"]
    assert record["hashes"]["dvc_lock"] == sha256_file(workspace.layout.dvc_lock)
    assert record["hashes"]["plan"] == sha256_tree(workspace.layout.plan(2))
    if name != "dvc.lock":
        with open_dvc(workspace.layout) as dvc:
            assert dvc.changed() == {}
    assert Git(workspace.layout.root).run("status", "--porcelain").stdout == ""
