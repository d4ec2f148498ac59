"""Rollback on real git and DVC: the labels of a snapshot to the byte, nothing lost, and the way back."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from harness import Killed, Played, answer_all, change_params, copy_workspace, go_on, killing

from al_pipeline.annotation.active_events import active
from al_pipeline.cli import app as cli
from al_pipeline.data import outputs as results
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import (
    LabelStudioDown,
    ManualActionRequired,
    NothingToDo,
    RemoteIncomplete,
    UnexpectedChange,
    UsageError,
    WrongProject,
)
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations import connect
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plan
from al_pipeline.operations.intervene import Change, amend, approve, pause, resume, rollback, undo
from al_pipeline.operations.report import report_data
from al_pipeline.operations.status import rounds, status
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.records import Selection
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow

BAD = "mallory@example.org"
OTHER = {"ham": "spam", "spam": "ham"}


@pytest.fixture(scope="module")
def played(twice: Played, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Three published rounds, the last of them answered wrongly by one person; round 3 is open."""
    folder = tmp_path_factory.mktemp("played")
    workspace, oracle, truth = go_on(twice, folder)
    for key in oracle.queue(BAD):
        oracle.answer(key, BAD, OTHER[truth[key.rsplit(":", 1)[1]]])
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    return folder / "copy", truth, oracle


class Rig:
    """A copy of the played workspace with its Label Studio."""

    def __init__(self, played: Any, folder: Path) -> None:
        place, self.truth, oracle = played
        self.workspace = copy_workspace((place, self.truth), folder)
        self.layout, self.oracle = self.workspace.layout, copy.deepcopy(oracle)

    @property
    def git(self) -> Git:
        return Git(self.layout.root)

    def history(self) -> Any:
        return read_history(self.layout, self.git)

    def reopened(self) -> Workspace:
        return open_workspace(self.layout.root)

    def tick(self) -> TickReport:
        return tick(self.reopened(), lambda: self.oracle)

    def back(self, number: int, **wanted: Any) -> Change:
        settings = {"labels": True, "model": True, "params": False, "reason": "bad labels", **wanted}
        with open_dvc(self.layout) as dvc:
            return rollback(self.reopened(), dvc, number, **settings)

    def intervene(self, what: Any, *given: Any, **named: Any) -> Any:
        with open_dvc(self.layout) as dvc:
            return what(self.reopened(), dvc, *given, **named)

    def next_round(self, annotator: str = "ann@example.org", wrong: bool = False) -> TickReport:
        for key in self.oracle.queue(annotator):
            truth = self.truth[key.rsplit(":", 1)[1]]
            other = {"ham": "spam", "spam": "ham"}[truth]
            self.oracle.answer(key, annotator, other if wrong else truth)
        return self.tick()

    def hashes(self, number: int) -> dict[str, str]:
        found = read_json(self.layout.record(number))["hashes"]
        return {name: found[name] for name in ("labeled", "test_labels", "unresolved", "model")}

    def clean(self) -> bool:
        with open_dvc(self.layout) as dvc:
            return self.git.run("status", "--porcelain").stdout == "" and dvc.changed() == {}


def test_back_to_a_snapshot_and_on(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    answer = rig.oracle.answer(rig.oracle.queue("ann@example.org")[0], BAD, "ham")  # of the open round 3
    rig.tick()
    change = rig.back(1)
    assert {(number, who) for number, who, _ in change.leaving} == {(2, BAD), (3, BAD)}
    assert change.labels == (27, 18) and change.changed == 9
    assert rig.history().planned == 3, "an intervention is made; the tick carries it out"
    rig.oracle.edit(answer, "spam")
    report = rig.tick()
    assert report.published == (3,) and report.round == 4
    assert rig.hashes(3) == rig.hashes(1), "labels, and so the model, of the snapshot, to the byte"
    assert rig.clean()
    record = read_json(rig.layout.record(3))
    assert "rolled back to round-0001" in record["reason"] and record["interventions"][0]["kind"] == "rollback"
    assert record["decision"]["verdict"] == "held"
    assert "rolled back" in rounds(rig.workspace)[-1].interventions[0]
    assert rig.history().promoted == read_history(rig.layout, rig.git, "round-0001").promoted

    keys = {task.push_key for task in read_plan(rig.git, 4)}
    assert set(rig.oracle.queue("ann@example.org")) == keys, "what is open stays in the queue, and is filled up"
    late = [e for e in read_events(rig.layout.inbox_events) if e.type == "supersede"]
    assert [e.round for e in late] == [3], "what was said of it is kept"
    assert late[0] not in active(read_events(rig.layout.events, rig.layout.inbox_events))

    rig.next_round()
    assert rig.history().planned == 5
    rows = {row.item_id: row for row in read_labeled(rig.layout.labeled)}
    assert len(rows) == 18 + 8 and all(row.label == rig.truth[item] for item, row in rows.items())
    reasons = read_json(rig.layout.record(4))["decision"]["reasons"]
    assert reasons[0].startswith("promotion waits for `al approve`: rolled back"), reasons
    rig.intervene(approve, None, "looks good")
    assert rig.history().promoted == "round-0004" and rig.history().holding is None

    change = rig.intervene(undo, "it was not the labels after all")
    assert {(number, who) for number, who, _ in change.coming} == {(2, BAD), (3, BAD)} and not change.leaving
    served = [rig.history().record(int(str(tag)[-4:])).metrics for tag in change.served]
    assert list(change.metrics) == served, "of the model served now, and of the one served before the rollback"
    rig.tick()
    assert late[0] in active(read_events(rig.layout.events)), "the late answer to the abandoned round counts again too"
    assert rig.history().abandoned == {} and rig.clean()
    with pytest.raises(NothingToDo, match="there is no rollback to undo"):
        rig.intervene(undo, "")


@pytest.mark.parametrize("others", ["labels", "labels and model"])
def test_a_snapshot_of_equal_rows_in_other_bytes_is_gone_back_to(
    played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    """Another pyarrow writes the same table in other bytes; what a rollback is accepted for, the tick carries out."""

    def other_bytes(path: Path, rows: Any, write: Any) -> None:
        write(path, rows)
        pq.write_table(pq.read_table(path), path, compression="none")

    rig = Rig(played, tmp_path)
    for name in ("write_labeled", "write_unresolved"):
        monkeypatch.setattr(results, name, partial(other_bytes, write=getattr(results, name)))
    rig.back(1, model=others != "labels")
    report = rig.tick()
    assert report.published == (3,) and rig.hashes(3) == rig.hashes(1)
    assert rig.tick().round == 4 and rig.clean()


def test_the_reports_say_the_same_before_and_after_a_rollback(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    before = [report_data(rig.workspace, number).answers for number in (0, 1)]
    rig.back(1)
    assert rig.tick().published == (3,)
    rig.next_round()
    assert [report_data(rig.reopened(), number).answers for number in (0, 1)] == before
    assert report_data(rig.reopened(), 3).answers.answered == 0, "the round was abandoned"


def test_a_snapshot_of_other_rows_is_refused_before_anything_is_committed(
    played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(played, tmp_path)
    monkeypatch.setattr(results, "write_labeled", lambda path, rows: write_json(path, {}))
    monkeypatch.setattr(results, "read_labeled", lambda path: read_labeled(path)[1:])
    head = rig.git.head()
    with pytest.raises(ManualActionRequired, match="labeled"):
        rig.back(1)
    assert rig.git.head() == head and rig.history().interventions == ()


def test_a_rehearsal_changes_nothing(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    head = rig.git.head()
    change = rig.back(0, dry_run=True)
    assert change.to_json()["labelled_after"] == 10
    assert change.metrics == tuple(rig.history().record(number).metrics for number in (2, 0))
    rig.intervene(amend, "revoke", Selection(round=1), "", dry_run=True)
    assert rig.git.head() == head and rig.clean() and rig.history().interventions == ()


def test_the_command_shows_what_would_change_and_asks_nobody(
    played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal, and with no Label Studio that is known: what it is owed waits."""
    rig = Rig(played, tmp_path)

    def al(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(rig.layout.root), *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    head = rig.git.head()
    for name in ("1", "round-0001"):
        shown = al("rollback", name, "--dry-run")
        assert f"Answers that no longer count round annotator answers round-0002 {BAD} 8" in shown
        figures = [read_json(rig.layout.record(number))["metrics"]["macro_f1"]["value"] for number in (2, 1)]
        assert "macro f1 of the newest model {:.3f} {:.3f}".format(*figures) in shown
        assert shown.endswith("Nothing was changed.") and rig.git.head() == head
    shown = al("rollback", "1", "--reason", "bad labels")
    assert "Published round-0003" in shown and "held until al approve" in shown
    assert "The next `al round` finishes the work in Label Studio" in shown and rig.clean()
    undone = json.loads(al("rollback", "--undo", "--json"))
    assert undone["published"] == [4] and undone["unfinished"] and not undone["dry_run"]


def test_what_would_not_reach_the_clone_where_ticks_run_is_not_committed(
    played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a second clone; but where Label Studio is away or not ours, going back does not wait for it."""
    rig = Rig(played, tmp_path)
    rig.tick()
    write_json(rig.layout.clone, {**read_json(rig.layout.clone), "clone_id": "feedfeedfeed"})
    second, head = rig.reopened(), rig.git.head()
    monkeypatch.setattr(connect, "connect", lambda *_: rig.oracle)
    for words in (["rollback", "1"], ["labels", "revoke", "--round", "2"], ["pause"], ["resume"], ["approve"]):
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(rig.layout.root), *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == WrongProject.exit_code
    assert rig.git.head() == head and rig.clean()
    rig.oracle.projects.clear()
    connect.refuse_elsewhere(second)

    def down(_call: str, _moment: str) -> None:
        raise LabelStudioDown("no reply")

    rig.oracle.fault = down
    connect.refuse_elsewhere(second)


def test_the_model_alone(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    served = rig.history().promoted
    was = rig.history().record(int(served.removeprefix("round-"))).metrics
    change = rig.back(0, labels=False)
    assert change.metrics == (was, rig.history().record(0).metrics), "of what is served, not of the newest"
    assert rig.history().promoted == "round-0000" and rig.clean()
    assert rig.history().planned == 3, "no round is lost for it"
    assert "rolled back" in status(rig.reopened()).held
    with pytest.raises(NothingToDo, match="is already served"):
        rig.back(0, labels=False)
    rig.intervene(undo, "")
    assert rig.history().promoted == served and rig.history().holding is None


def test_parameters_go_back_where_asked(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    change_params(rig.workspace, {"annotators: []": "annotators: [ann@example.org]"})
    change_params(rig.workspace, {'    - "spam"\n': '    - "spam"\n    - "other"\n'})
    with pytest.raises(UnexpectedChange, match=r"params\.yaml has uncommitted changes"):
        rig.back(0, params=True)
    text = rig.layout.params.read_text()
    rig.git.commit("Three classes", [rig.layout.params])
    change = rig.back(0, params=True)
    assert set(change.params) == {"schema", "annotators"}
    rig.tick()
    assert rig.layout.params.read_text() == rig.git.show("round-0000", "params.yaml")
    assert rig.hashes(3) == rig.hashes(0) and rig.clean()
    rig.intervene(undo, "")
    rig.tick()
    assert rig.layout.params.read_text() == text


def test_other_parameters_that_change_the_fold_stop_it(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    skipped = rig.oracle.queue("ann@example.org")[0]
    rig.oracle.skip(skipped, "ann@example.org")
    answer_all(rig.oracle, rig.truth)
    tick(rig.reopened(), lambda: rig.oracle, options=Options(close_now=True))
    change_params(rig.workspace, {"annotators: []": "annotators: [ann@example.org]"})
    head = rig.git.head()
    with pytest.raises(ManualActionRequired, match="`--params` restores them too"):
        rig.back(3)
    assert rig.git.head() == head


def test_what_cannot_be_had_stops_it(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    head = rig.git.head()
    lock = yaml.safe_load(rig.git.show("round-0000", "dvc.lock") or "")
    [md5] = [out["md5"] for out in lock["stages"]["label"]["outs"] if out["path"] == "data/labeled.parquet"]
    for store in (tmp_path / "copy/remote", rig.layout.root / ".dvc/cache"):
        (store / "files/md5" / md5[:2] / md5[2:]).unlink()
    with pytest.raises(RemoteIncomplete, match=r"labeled.parquet of round-0000 is available neither here"):
        rig.back(0)
    with pytest.raises(NothingToDo, match="round-0009 is not published"):
        rig.back(9)
    assert rig.git.head() == head and rig.clean()


def test_revoke_and_restore(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    with pytest.raises(UsageError, match="select answers"):
        rig.intervene(amend, "revoke", Selection(), "")
    with pytest.raises(UsageError, match="--since must be a date"):
        rig.intervene(amend, "revoke", Selection(since="yesterday"), "")
    with pytest.raises(NothingToDo, match="no answer that counts"):
        rig.intervene(amend, "revoke", Selection(annotator="nobody@example.org"), "")
    test = next(task for task in read_plan(rig.git, 0) if task.part == "test").item_id
    rig.intervene(amend, "revoke", Selection(annotator=BAD), "wrong on purpose")
    rig.intervene(amend, "revoke", Selection(item=test), "and this one too, in the same round")
    rig.tick()
    assert rig.hashes(3)["labeled"] == rig.hashes(1)["labeled"] and rig.clean()
    asked = [task for task in read_plan(rig.git, 4) if task.part == "test"]
    assert [task.item_id for task in asked] == [test], "asked once more"
    rig.intervene(amend, "restore", Selection(round=2), "")
    rig.tick()
    assert len(read_labeled(rig.layout.labeled)) == 26 and rig.clean()
    still = [task.push_key for task in read_plan(rig.git, 5) if task.part == "test"]
    assert still == [task.push_key for task in asked], "still open, not asked twice"


def test_a_build_that_bad_labels_have_stopped_is_no_dead_end(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    answer_all(rig.oracle, rig.truth)

    def die(name: str, action: Any, /) -> Any:
        if name == "label":
            raise Killed
        return action()

    with pytest.raises(Killed):
        tick(rig.reopened(), lambda: rig.oracle, run=die)
    rig.intervene(amend, "revoke", Selection(round=3), "in the middle of a build")
    report = rig.tick()
    assert report.published == (3,) and rig.hashes(3)["labeled"] == rig.hashes(2)["labeled"] and rig.clean()


def test_label_studio_may_be_down(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    owed, *others = rig.oracle.queue("ann@example.org")
    rig.oracle.skip(owed, BAD)
    rig.tick()

    def down(_call: str, _moment: str) -> None:
        raise LabelStudioDown("no reply")

    rig.oracle.fault = down
    rig.back(0)
    with pytest.raises(LabelStudioDown):
        rig.tick()
    assert rig.hashes(3) == rig.hashes(0) and rig.clean(), "rolled back all the same"
    rig.oracle.fault = None
    rig.tick()
    queue = rig.oracle.queue("ann@example.org")
    assert owed not in queue and set(others) < set(queue), "what was owed is done"


def test_paused_ticks_do_nothing_but_a_rollback_works(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    rig.intervene(pause, "the annotators are being trained")
    answer_all(rig.oracle, rig.truth)
    report = rig.tick()
    assert report.steps == () and "being trained" in report.waits_for and "al resume" in report.waits_for
    rig.back(0, model=False)
    assert rig.tick().published == (3,)
    assert status(rig.reopened()).paused
    with pytest.raises(NothingToDo):
        rig.intervene(pause, "")
    rig.intervene(resume, "")
    rig.tick()
    assert rig.oracle.queue("ann@example.org")
    with pytest.raises(NothingToDo):
        rig.intervene(resume, "")


def test_killed_before_and_after_every_step(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    rig.back(0)
    names = ("close", "label", "train", "select", "decide", "publish", "tag", "retire", "push")
    for moment, name in itertools.product(("before", "after"), names):
        with contextlib.suppress(Killed):
            tick(rig.reopened(), lambda: rig.oracle, run=killing(name, moment))
    rig.tick()
    assert rig.hashes(3) == rig.hashes(0) and rig.clean()
    controls = [event for event in read_events(rig.layout.events) if event.type == "quarantine"]
    assert len(controls) == 1
    project = ProjectRef(**read_json(rig.layout.project))
    keys = [state.push_key for state in rig.oracle.task_states(project)]
    assert len(keys) == len(set(keys))


def test_a_intervention_whose_maker_was_killed_is_committed_and_an_edited_one_refused(
    played: Any, tmp_path: Path
) -> None:
    rig = Rig(played, tmp_path)
    head = rig.git.head()
    rig.back(0, labels=False)
    rig.git.run("reset", "--soft", str(head))
    rig.git.run("restore", "--staged", "rounds/interventions")
    rig.tick()
    assert len(rig.history().interventions) == 1 and rig.clean()
    path = rig.layout.intervention(1)
    path.write_text(path.read_text().replace("bad labels", "no reason"))
    with pytest.raises(UnexpectedChange, match="interventions must not be edited"):
        rig.tick()
