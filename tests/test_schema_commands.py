"""`al schema` on real git and DVC: classes change in the middle of a round, and everything follows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from annotating import ServerRig
from embedded import LabelStudioServer
from harness import Killed, Played, change_params, go_on, small_workspace
from typer.testing import CliRunner

from al_pipeline.cli.app import app
from al_pipeline.data.ledger import read_events, read_forecasts
from al_pipeline.data.outputs import read_labeled, read_unresolved
from al_pipeline.errors import BadParams, NothingToDo, SchemaInUse, UnexpectedChange
from al_pipeline.files import read_json, sha256_file
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations import intervene
from al_pipeline.operations.class_changes import Asked, Effect, change_classes, undo_change
from al_pipeline.operations.connect import connect
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history, read_plan
from al_pipeline.operations.intervene import rollback, undo
from al_pipeline.operations.quality import quality
from al_pipeline.operations.report import report_data
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.status import rounds, status
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow

ANN = "ann@example.org"


class Rig:
    """A copy of a played workspace with its Label Studio."""

    def __init__(self, played: Played, folder: Path) -> None:
        workspace, self.oracle, self.truth = go_on(played, folder)
        self.layout = workspace.layout

    @property
    def workspace(self) -> Workspace:
        return open_workspace(self.layout.root)

    @property
    def git(self) -> Git:
        return Git(self.layout.root)

    def tick(self, **options: Any) -> TickReport:
        return tick(self.workspace, lambda: self.oracle, options=Options(**options))

    def intervene(self, what: Callable[..., Any], *given: Any, **named: Any) -> Any:
        with open_dvc(self.layout) as dvc:
            return what(self.workspace, dvc, *given, **named)

    def change(self, kind: str, old: str, new: str = "", **named: Any) -> Effect:
        sides = [tuple(name for name in text.split(",") if name) for text in (old, new)]
        found: Effect = self.intervene(change_classes, Asked(kind, *sides, named.pop("again", False)), "why", **named)
        return found

    def answer(self, names: dict[str, str], count: int | None = None, who: str = ANN) -> int:
        """Answer (the first `count` tasks) with the class that the true one has now."""
        keys = self.oracle.queue(who)[:count]
        for key in keys:
            label = self.truth[key.rsplit(":", 1)[1]]
            self.oracle.answer(key, who, names.get(label, label))
        return len(keys)

    def labels(self) -> dict[str, str]:
        return {row.item_id: row.label for row in read_labeled(self.layout.labeled)}

    def record(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.layout.record(number))
        return found

    def clean(self) -> bool:
        with open_dvc(self.layout) as dvc:
            return self.git.run("status", "--porcelain").stdout == "" and dvc.changed() == {}


@pytest.fixture
def rig(once: Played, tmp_path: Path) -> Rig:
    """One published round; the gate compares models even on a few test items."""
    made = Rig(once, tmp_path)
    change_params(made.workspace, {"min_test_per_class: 10": "min_test_per_class: 1"})
    made.git.commit("Compare models on a few test items", [made.layout.params])
    return made


def test_a_former_name_says_what_it_said_in_forecasts_that_used_it(rig: Rig) -> None:
    change_params(rig.workspace, {"consensus: majority": "consensus: crowdlab"})
    rig.git.commit("The model takes part", [rig.layout.params])
    rig.answer({}, 3)
    rig.tick()
    rig.change("rename", "spam", "junk")
    rig.tick()
    forecasts = read_forecasts(rig.layout.events)
    assert forecasts and all(set(one.proba) <= {"ham", "spam"} for one in forecasts.values())
    known = {one.known for one in forecasts.values()}
    assert known == {read_history(rig.layout, rig.git).record(0).counts.events}
    assert rig.change("add", "", "spam", dry_run=True).classes[1] == ("ham", "junk", "spam")


def test_a_rename_in_an_open_round(rig: Rig, tmp_path: Path) -> None:
    """Labels, params.yaml, the page in Label Studio and open tasks follow; late answers count; it can be undone."""
    before, labels = sha256_file(rig.layout.labeled), rig.labels()
    head, text = rig.git.head(), rig.layout.params.read_text()
    rig.answer({}, 3)
    rig.tick()
    dry = rig.change("rename", "spam", "junk", dry_run=True)
    assert (rig.git.head(), rig.layout.params.read_text()) == (head, text), "a dry run changes nothing"
    assert dry.classes == (("ham", "spam"), ("ham", "junk")) and dry.asked_again == {}
    assert dry.labels[0]["spam"] == dry.labels[1]["junk"] and dry.tasks == (8, 5)
    rig.change("rename", "spam", "junk")
    changed = rig.git.run("show", "--name-only", "--format=", "HEAD").stdout.split()
    assert changed == ["params.yaml", "rounds/interventions/000001.json"]
    report = rig.tick()
    assert (report.published, report.warnings) == ((1,), ())
    assert {item: label for item, label in rig.labels().items() if item in labels} == {
        item: {"spam": "junk"}.get(label, label) for item, label in labels.items()
    }
    schema = rig.record(1)["params"]["schema"]
    assert (schema["version"], schema["labels"]) == (2, ["ham", "junk"])
    decision = rig.record(1)["decision"]
    assert "against the promoted model" in decision["reasons"][0], "a renamed class is the same class"
    assert decision["difference"] > -0.5 and rig.record(1)["metrics"]["classes"] == ["ham", "junk"]
    assert rig.oracle.projects[1].labels == ["ham", "junk"]
    kept = [task for task in read_plan(rig.git, 2) if task.first_round == 1]
    assert len(kept) == 5, "what is open stays in the queue"
    assert rig.clean()
    rig.answer({}, 3)  # from pages that still show the old class
    rig.answer({"spam": "junk"})
    report = rig.tick()
    assert (report.published, dict(report.refused)) == ((2,), {})
    assert set(rig.labels().values()) == {"ham", "junk"}
    assert {event.label for event in read_events(rig.layout.events)} == {"ham", "spam", "junk", None}, "as it was said"
    running = rig.record(2)["running"]["whole"]
    assert running["right"] <= running["answered"] <= running["asked"]
    rows = rounds(rig.workspace)
    assert [row.schema_version for row in rows] == [1, 2, 2] and [row.new_classes for row in rows] == [
        False,
        True,
        False,
    ]
    page = report_data(rig.workspace)
    assert page.classes == ("ham", "junk") and page.saved is None or page.saved
    found = quality(rig.workspace)
    assert found.answers > 0

    (tmp_path / "new.csv").write_text("text,label\nwin money now friend,spam\nlunch with us,junk\n")
    from al_pipeline.operations.ingest import ingest

    assert ingest(rig.workspace, [tmp_path / "new.csv"], label_column="label").labels_rejected == {}
    with pytest.raises(NothingToDo, match="no rollback"):
        rig.intervene(undo, "")
    effect = rig.intervene(undo_change, "it was a mistake")
    assert effect.asked_again == {} and effect.classes[1] == ("ham", "spam")
    report = rig.tick()
    assert report.published == (3,) and rig.oracle.projects[1].labels == ["ham", "spam"]
    assert set(rig.labels().values()) == {"ham", "spam"}
    assert all(rig.labels()[item] == label for item, label in labels.items())
    assert rig.record(3)["params"]["schema"]["version"] == 3 and rig.clean()
    assert sha256_file(rig.layout.labeled) != before
    with pytest.raises(NothingToDo, match="no change of classes is in force"):
        rig.intervene(undo_change, "")
    rig.answer({"spam": "junk"}, 2)
    assert dict(rig.tick().refused) == {}, "late from the page of the undone schema"
    assert [one.difference for one in reproduce(rig.workspace, [0, 1, 3])] == [None] * 3, "each with its own classes"


def test_an_undo_restores_the_labelled_set_to_the_byte(rig: Rig) -> None:
    files = (rig.layout.labeled, rig.layout.test_labels, rig.layout.unresolved)
    before = [sha256_file(path) for path in files]
    rig.change("split", "spam", "scam,ads")
    rig.tick()
    assert [sha256_file(path) for path in files] != before
    rig.intervene(undo_change, "")
    rig.tick()
    assert [sha256_file(path) for path in files] == before


def test_a_split_asks_the_items_again(rig: Rig) -> None:
    spam = {item for item, label in rig.labels().items() if label == "spam"}
    test = {row.item_id: row.label for row in read_labeled(rig.layout.test_labels)}
    assert len(test) == 12 and spam
    effect = rig.change("split", "spam", "scam,ads")
    of_test = sum(label == "spam" for label in test.values())
    assert effect.asked_again == {"pool": len(spam), "test": of_test}
    assert effect.labels[1] == {"ham": effect.labels[0]["ham"], "scam": 0, "ads": 0}
    report = rig.tick()
    assert report.published == (1,)
    again = {row.item_id: row for row in read_unresolved(rig.layout.unresolved) if row.kind == "again"}
    assert {item for item, row in again.items() if row.part == "pool"} == spam
    plan = read_plan(rig.git, 2)
    fresh = [task for task in plan if task.first_round == 2]
    assert {task.item_id for task in fresh if task.part == "test"} == {item for item, t in test.items() if t == "spam"}
    asked = [task for task in fresh if task.strategy == "ask_again"]
    scores = [task.confidence for task in asked]
    assert {task.item_id for task in asked} <= spam and asked and scores == sorted(scores), "least certain first"
    decision = rig.record(1)["decision"]
    assert decision["verdict"] == "held" and "fewer than" in decision["reasons"][0]
    assert set(rig.labels().values()) == {"ham"} and rig.oracle.projects[1].labels == ["ham", "scam", "ads"]
    for number in range(2, 6):
        for key in rig.oracle.queue(ANN):
            item = key.rsplit(":", 1)[1]
            label = "ham" if rig.truth[item] == "ham" else ("scam", "ads")[int(item[-1]) % 2]
            rig.oracle.answer(key, ANN, label)
        assert rig.tick().published == (number,)
    assert spam <= rig.labels().keys() and rig.clean()
    assert set(rig.labels().values()) == {"ham", "scam", "ads"}
    said = [reason for number in range(2, 6) for reason in rig.record(number)["decision"]["reasons"]]
    assert "compared in the classes ham, scam+ads, which both models know" in said


def test_retire_merge_and_add(rig: Rig) -> None:
    rig.change("add", "", "news")
    rig.tick()
    for number, key in enumerate(rig.oracle.queue(ANN)):
        rig.oracle.answer(key, ANN, "news" if number < 3 else rig.truth[key.rsplit(":", 1)[1]])
    rig.tick()
    counts = Counter(rig.labels().values())
    assert counts["news"]
    effect = rig.change("merge", "spam,news", "spam", dry_run=True)
    assert effect.labels[1] == {"ham": counts["ham"], "spam": counts["spam"] + counts["news"]}
    effect = rig.change("retire", "news")
    assert effect.ignored["pool"] == counts["news"]
    rig.tick()
    assert set(rig.labels().values()) == {"ham", "spam"}
    ignored = [row for row in read_unresolved(rig.layout.unresolved) if row.kind == "ignored"]
    assert len([row for row in ignored if row.part == "pool"]) == counts["news"]
    counted = rig.record(2)["counts"]
    assert counted["labelled"] + counted["pending"] + counted["ignored"] + counted["unlabelled"] == counted["pool"]
    with pytest.raises(BadParams, match="'news', which a change of classes took away.*al schema add news"):
        text = rig.layout.params.read_text()
        rig.layout.params.write_text(text.replace("version: 3\n  question", "version: 4\n  question").replace(
            '    - "spam"\n', '    - "spam"\n    - "news"\n'))  # fmt: skip
        rig.tick()
    rig.layout.params.write_text(text)
    rig.change("add", "", "news")
    rig.tick()
    assert rig.oracle.projects[1].labels == ["ham", "spam", "news"]
    assert "news" not in rig.labels().values(), "the old answers stay retired"


def test_a_rollback_goes_back_to_the_classes_of_its_round(rig: Rig) -> None:
    files = (rig.layout.labeled, rig.layout.test_labels, rig.layout.unresolved)
    before = [sha256_file(path) for path in files]
    rig.change("rename", "spam", "junk")
    rig.tick()
    rig.answer({"spam": "junk"})
    rig.tick()
    now = [sha256_file(path) for path in files]
    rig.intervene(rollback, 0, labels=True, model=True, params=False, reason="")
    assert rig.workspace.params.schema_.labels == ["ham", "spam"]
    assert rig.tick().published == (3,)
    assert [sha256_file(path) for path in files] == before and rig.oracle.projects[1].labels == ["ham", "spam"]
    rig.intervene(undo, "")
    assert rig.tick().published == (4,)
    assert [sha256_file(path) for path in files] == now and rig.oracle.projects[1].labels == ["ham", "junk"]
    assert rig.clean()


@pytest.mark.parametrize("moment", ["nothing", "file", "params"])
def test_killed_while_the_classes_change(rig: Rig, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Either nothing happened, or the next tick finishes it."""
    head = rig.git.head()

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    target = {"nothing": "write_json", "file": "write_bytes", "params": None}[moment]
    with monkeypatch.context() as patch:
        if target is None:
            patch.setattr(Git, "commit", die)
        else:
            patch.setattr(intervene, target, die)
        with pytest.raises(Killed):
            rig.change("rename", "spam", "junk")
    assert rig.git.head() == head
    report = rig.tick()
    done = moment != "nothing"
    assert report.published == ((1,) if done else ())
    assert rig.workspace.params.schema_.labels == (["ham", "junk"] if done else ["ham", "spam"])
    assert rig.clean()


def test_edits_by_hand_are_refused(rig: Rig) -> None:
    text = rig.layout.params.read_text()
    rig.layout.params.write_text(
        text.replace('- "spam"', '- "junk"').replace("version: 1\n  question", "version: 2\n  question")
    )
    with pytest.raises(SchemaInUse, match="`al schema rename spam NEW`"):
        rig.tick()
    with pytest.raises(SchemaInUse):
        rig.change("rename", "ham", "eggs")
    rig.layout.params.write_text(text + "\n")
    with pytest.raises(UnexpectedChange, match="uncommitted changes"):
        rig.change("rename", "ham", "eggs")
    rig.layout.params.write_text(text)
    assert status(rig.workspace).schema_problem is None
    assert read_history(rig.layout, rig.git).interventions == ()


def test_before_any_answer_there_is_nothing_to_map(started: Played, tmp_path: Path) -> None:
    rig = Rig(started, tmp_path)
    with pytest.raises(NothingToDo, match="set schema.version to 2"):
        rig.change("rename", "spam", "junk")
    rig.answer({}, 4)
    rig.tick()
    rig.change("rename", "spam", "junk")
    assert rig.tick().published == (0,)
    assert rig.record(0)["params"]["schema"]["labels"] == ["ham", "junk"]
    assert rig.answer({"spam": "junk"}) > 4


def test_the_command_line(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rig.layout.root)

    def al(*words: str, code: int = 0) -> str:
        found = CliRunner().invoke(app, ["schema", *words])
        assert found.exit_code == code or found.exception is not None, found.output
        return found.output

    said = al("split", "spam", "INTO", "scam,ads", "--dry-run")
    assert "items lose their label and are asked again" in said and "Nothing was changed." in said
    row = json.loads(al("merge", "ham,", "spam", "into", '"ham, or not"', "--dry-run", "--json", code=2) or "{}")
    assert row == {}
    row = json.loads(al("retire", "spam", "--dry-run", "--json", code=2) or "{}")
    assert row == {}
    row = json.loads(al("rename", "spam", "junk mail", "--dry-run", "--json"))
    assert row["classes_after"] == ["ham", "junk mail"] and row["dry_run"] is True
    for words in (["split", "spam", "scam"], ["split", "spam,ham", "INTO", "a,b"], ["merge", "INTO", "a"]):
        found = CliRunner().invoke(app, ["schema", *words])
        assert type(found.exception).__name__ == "UsageError", words


@pytest.mark.server
def test_classes_change_under_an_open_round_in_a_real_label_studio(
    label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename, a split and an undo while people have tasks on their screens."""
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", label_studio.token)
    sizes = {"test_size: 12": "test_size: 4", "seed_size: 10": "seed_size: 6", "batch_size: 8": "batch_size: 3"}
    workspace, truth = small_workspace(tmp_path, 30, {"quorum: 0.9": "quorum: 1.0"})
    change_params(workspace, sizes)
    layout, git = workspace.layout, Git(workspace.layout.root)

    def go() -> TickReport:
        return tick(open_workspace(layout.root), lambda: connect(workspace))

    def change(what: Callable[..., Effect], *given: Any) -> TickReport:
        with open_dvc(layout) as dvc:
            what(open_workspace(layout.root), dvc, *given, "why")
        return go()

    def right(key: str, now: dict[str, str]) -> str:
        label = truth[key.rsplit(":", 1)[1]]
        return now.get(label, label)

    def labels() -> dict[str, str]:
        return {row.item_id: row.label for row in (*read_labeled(layout.labeled), *read_labeled(layout.test_labels))}

    go()
    with connect(workspace) as oracle, ServerRig(label_studio, oracle) as people:
        ref = ProjectRef(**read_json(layout.project))

        def asked() -> dict[str | None, str | None]:
            with httpx.Client(headers={"Authorization": f"Token {label_studio.token}"}, trust_env=False) as http:
                found = http.get(f"{label_studio.url}/api/projects/{ref.project_id}/").json()["label_config"]
            return {
                choice.get("value"): choice.get("hotkey") for choice in ElementTree.fromstring(found).iter("Choice")
            }

        def tasks() -> list[str]:
            return [str(state.push_key) for state in oracle.open_tasks(ref)]

        for key in tasks():
            people.answer(ref, key, ANN, right(key, {}))
        assert go().published == (0,)
        first = labels()
        on_screen, *others = tasks()
        assert change(change_classes, Asked("rename", ("spam",), ("junk",))).warnings == ()
        assert asked() == {"ham": "1", "junk": "2"} and {on_screen, *others} == set(tasks()), "open tasks stay"
        people.answer(ref, on_screen, ANN, "spam")
        for key in tasks():
            people.answer(ref, key, ANN, right(key, {"spam": "junk"}))
        report = go()
        assert report.published == (2,) and dict(report.refused) == {}
        before = labels()
        assert before[on_screen.rsplit(":", 1)[1]] == "junk", "given in the class that the page still showed"
        assert {item: label.replace("junk", "spam") for item, label in before.items() if item in first} == first

        change(change_classes, Asked("split", ("junk",), ("scam", "ads")))
        assert asked() == {"ham": "1", "scam": "2", "ads": "3"}
        again = {item for item, label in before.items() if label == "junk"}
        assert set(labels().values()) == {"ham"}
        new = {key.rsplit(":", 1)[1] for key in tasks()}
        assert len(new & again) >= min(3, len(again)), "asked again at once, beside the tasks that stay"
        for key in tasks():
            if key.rsplit(":", 1)[1] in again:
                people.answer(ref, key, ANN, "ads")
        go()
        change(undo_change)
        assert asked() == {"ham": "1", "junk": "2"}
        assert {item: label for item, label in labels().items() if item in before} == before, "the parts are one again"
    assert [one.kind for one in read_history(layout, git).interventions] == ["schema", "schema", "undo"]
