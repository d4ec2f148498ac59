"""A list of classes that changes: what needs a new version, what is refused, and what somebody edits in the page."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from harness import answer_all, change_params, settle, small_workspace

from al_pipeline.annotation.schema_change import Published, missing_in_use, wrong_version
from al_pipeline.errors import AlError, BadParams, NothingToDo, SchemaInUse
from al_pipeline.files import read_json, sha256_tree
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import connect as connect_module
from al_pipeline.operations.doctor import examine
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.intervene import Change, amend
from al_pipeline.operations.status import status
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.params import parse_params
from al_pipeline.records import Selection
from al_pipeline.sanitize import plain_form
from al_pipeline.workspace.trust import template
from al_pipeline.workspace.workspace import Workspace, open_workspace

BEFORE = Published(1, ("ham", "spam", "eggs"), "round-0003")


class After:
    """The schema as it is now."""

    def __init__(self, version: int, *labels: str) -> None:
        self.version, self.labels = version, labels


@pytest.mark.parametrize(
    ("after", "problem"),
    [
        (After(1, "ham", "spam", "eggs"), None),
        (After(2, "ham", "spam", "eggs"), None),
        (After(2, "ham", "spam", "eggs", "new"), None),
        (After(2, "eggs", "ham", "spam"), None),
        (After(1, "ham", "spam"), "removed 'eggs'"),
        (After(1, "ham", "spam", "eggs", "new"), "added 'new'"),
        (After(1, "ham", "spam", "oeufs"), "added 'oeufs'; removed 'eggs'"),
        (After(1, "spam", "ham", "eggs"), "the order changed"),
        (After(1, "ham", "spam", "Eggs"), "'Eggs' looks like 'eggs'"),
        (After(1, "ham", "spam", "eg\u200bgs"), "looks like 'eggs'"),
        (After(0, "ham", "spam", "eggs"), "can only increase"),
    ],
)
def test_another_list_of_classes_is_another_version(after: After, problem: str | None) -> None:
    said = wrong_version(BEFORE, after)
    assert (said is None) == (problem is None)
    assert problem is None or problem in str(said)


def test_a_class_in_use_stays() -> None:
    assert missing_in_use(["ham", "spam"], {"ham": "3", "spam": "1"}) is None
    said = str(missing_in_use(["ham", "caf\u00e9"], {"ham": "3", "cafe\u0301": "4 of the pool"}))
    assert "4 of the pool" in said and "look the same" in said and "`al labels revoke --label 'cafe\u0301'`" in said


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("Ham", "ham "),
        ("a  b", "A b"),
        ("x\u200b", "x"),
        ("ß", "SS"),
    ],
)
def test_names_that_look_alike_are_one(left: str, right: str) -> None:
    assert plain_form(left) == plain_form(right)
    text = template("params.yaml").replace(
        "    - ham\n    - spam\n", f"    - {json.dumps(left.strip())}\n    - {json.dumps(right.strip())}\n"
    )
    with pytest.raises(BadParams, match="differ by more than"):
        parse_params(text)


def test_a_name_that_cannot_be_seen_is_refused() -> None:
    with pytest.raises(BadParams, match="visible character"):
        parse_params(template("params.yaml").replace("    - ham\n", '    - "\\u200b"\n'))


# Whole rounds ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SimulatedOracle, Mapping[str, str]]:
    """Round 0 is published with three classes of which nobody used the third; round 1 is open."""
    folder = tmp_path_factory.mktemp("schema")
    workspace, truth = small_workspace(folder)
    change_params(workspace, {'    - "spam"\n': '    - "spam"\n    - "eggs"\n'})
    oracle = SimulatedOracle()
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    answer_all(oracle, truth)
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    return folder, oracle, truth


class Rig:
    """A copy of what was played."""

    def __init__(self, played: Any, folder: Path) -> None:
        shutil.copytree(played[0], folder / "copy")
        self.root = settle(folder / "copy/workspace")
        self.oracle: SimulatedOracle = copy.deepcopy(played[1])
        self.truth: Mapping[str, str] = played[2]

    @property
    def workspace(self) -> Workspace:
        return open_workspace(self.root)

    def tick(self, **options: bool) -> TickReport:
        return tick(self.workspace, lambda: self.oracle, options=Options(**options))

    def classes(self, version: int, *labels: str) -> None:
        text = self.workspace.layout.params.read_text(encoding="utf-8")
        before = text[text.index("  labels:") : text.index("  fields:")]
        now = "  labels:\n" + "".join(f"    - {label}\n" for label in labels)
        now_version = text.replace(before, now)
        old = f"  version: {self.workspace.params.schema_.version}\n"
        assert now_version.count(old) == 1
        self.workspace.layout.params.write_text(now_version.replace(old, f"  version: {version}\n"), encoding="utf-8")

    def everything(self) -> tuple[Any, ...]:
        layout = self.workspace.layout
        git = Git(layout.root)
        return git.head(), git.tags(), sha256_tree(layout.inbox), sha256_tree(layout.events), self.oracle.projects


REFUSED: list[tuple[int, tuple[str, ...], type[AlError], str]] = [
    (1, ("ham", "spam"), BadParams, "removed 'eggs'.*set schema.version to 2"),
    (1, ("spam", "ham", "eggs"), BadParams, "the order changed"),
    (1, ("ham", "spam", "eggs", "new"), BadParams, "added 'new'"),
    (1, ("ham", "junk", "eggs"), SchemaInUse, r"'spam' \(\d+ of the .*\).*`al schema rename spam NEW`"),
    (2, ("ham", "junk", "eggs"), SchemaInUse, "'spam'"),
    (2, ("ham", "eggs"), SchemaInUse, "'spam'"),
]


@pytest.mark.slow
def test_a_tick_refuses_before_it_changes_anything(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    answer_all(rig.oracle, rig.truth)
    before = copy.deepcopy(rig.everything())
    for version, labels, error, words in REFUSED:
        rig.classes(version, *labels)
        with pytest.raises(error, match=words):
            rig.tick()
        assert repr(rig.everything()) == repr(before), labels
        assert status(rig.workspace).schema_problem, labels
        findings = {finding.check: finding.level for finding in examine(rig.workspace)}
        assert findings["classes"] == "error", labels
        (tmp_path / "more.jsonl").write_text(json.dumps({"text": "new", "label": labels[0]}))
        with pytest.raises(error):
            ingest(rig.workspace, [tmp_path / "more.jsonl"], label_column="label")
        rig.classes(1, "ham", "spam", "eggs")
    assert rig.tick().published == (1,)


@pytest.mark.slow
def test_a_class_in_use_leaves_once_its_answers_are_revoked(played: Any, tmp_path: Path) -> None:
    """Before or after it was taken out of params.yaml; the page that says so names the command."""
    rig = Rig(played, tmp_path)
    key = rig.oracle.queue("ann@example.org")[0]
    rig.oracle.answer(key, "ann@example.org", "eggs")
    rig.tick()
    rig.classes(2, "ham", "spam")
    with pytest.raises(SchemaInUse, match=r"'eggs' \(1 of the pool\).*`al labels revoke --label eggs`"):
        rig.tick()

    def revoke(kind: Any, **chosen: Any) -> Change:
        with open_dvc(rig.workspace.layout) as dvc:
            return amend(rig.workspace, dvc, kind, Selection(**chosen), "nobody needs it")

    with pytest.raises(NothingToDo, match="matches: annotator bob@example.org, label eggs"):
        revoke("revoke", label="eggs", annotator="bob@example.org")
    change = revoke("revoke", label="eggs")
    assert change.leaving == ((1, "ann@example.org", 1),) and change.labels == (11, 10)
    assert rig.tick().published == (1,)
    record = read_json(rig.workspace.layout.record(1))
    assert (record["params"]["schema"]["labels"], record["counts"]["labelled"]) == (["ham", "spam"], 10)
    with pytest.raises(SchemaInUse, match="'eggs'"):
        revoke("restore", label="eggs")


@pytest.mark.slow
def test_a_new_class_is_compared_with_the_promoted_model_and_an_unused_one_leaves(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    rig.classes(2, "ham", "news", "spam")
    rig.tick()
    assert rig.oracle.projects[1].labels == ["ham", "news", "spam"]
    answer_all(rig.oracle, rig.truth)
    assert rig.tick().published == (1,)
    record = read_json(rig.workspace.layout.record(1))
    assert (record["params"]["schema"]["version"], record["metrics"]["classes"]) == (2, ["ham", "news", "spam"])
    assert "the first model" not in record["decision"]["reasons"]
    assert "news 0" in record["decision"]["reasons"][0], "held: no test item of the new class says anything yet"
    assert read_history(rig.workspace.layout, Git(rig.root)).promoted == "round-0000"


@pytest.mark.slow
def test_answers_with_a_class_of_the_page_wait_until_it_is_adopted(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    rig.oracle.projects[1].labels.append("novel")
    keys = rig.oracle.queue("ann@example.org")
    for key in keys[:3]:
        rig.oracle.answer(key, "ann@example.org", "novel")
    rig.oracle.answer(keys[3], "ann@example.org", "ham")
    report = rig.tick()
    assert (dict(report.pulled), dict(report.refused)) == ({"label": 1}, {"unknown label": 3})
    [warning] = report.warnings
    for words in ("'novel'", "schema.version to 2", "al labelstudio reset"):
        assert words in warning
    assert rig.oracle.projects[1].labels == ["ham", "spam", "eggs", "novel"]
    assert status(rig.workspace).settled == 1, "a refused answer is none"
    rig.oracle.pass_time(3600)
    for key in keys[4:6]:
        rig.oracle.answer(key, "ann@example.org", "ham")
    rig.tick()

    rig.classes(2, "ham", "spam", "eggs", "novel")
    report = rig.tick()
    assert dict(report.pulled) == {"label": 3}
    assert [w for w in report.warnings if "differs from params.yaml" in w] == []
    assert (
        "'novel' is new since round-0000: 10 labels and 12 of the test set were given without it" in report.warnings[0]
    )
    assert status(rig.workspace).refused == {}
    answer_all(rig.oracle, rig.truth)
    assert rig.tick().published == (1,)
    assert read_json(rig.workspace.layout.record(1))["counts"]["labels"]["novel"] == 3
    assert read_json(rig.workspace.layout.record(1))["answers"]["refused"] == {}


@pytest.mark.slow
def test_a_class_of_the_page_can_be_taken_out_again(
    played: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(played, tmp_path)
    rig.oracle.projects[1].labels.append("novel")
    monkeypatch.setattr(connect_module, "connect", lambda *_: nullcontext(rig.oracle))
    assert connect_module.reset_page(rig.workspace) == ("novel",)
    assert rig.oracle.projects[1].labels == ["ham", "spam", "eggs"]
    assert connect_module.reset_page(rig.workspace) == ()
    assert rig.tick().warnings == ()


@pytest.mark.slow
def test_a_round_counts_its_own_refused_answers_and_none_as_answered(played: Any, tmp_path: Path) -> None:
    rig = Rig(played, tmp_path)
    for number in (1, 2):
        first, second, *rest = rig.oracle.queue("ann@example.org")
        rig.oracle.answer(first, "ann@example.org", "nonsense")
        repaired = rig.oracle.answer(second, "ann@example.org", "nonsense")
        for key in rest:
            rig.oracle.answer(key, "ann@example.org", rig.truth[key.rsplit(":", 1)[1]])
        rig.tick()
        rig.oracle.edit(repaired, "ham")
        assert rig.tick(close_now=True).published == (number,)
        answers = read_json(rig.workspace.layout.record(number))["answers"]
        assert answers["refused"] == {"unknown label": 1}
        assert answers["answered"] == answers["tasks"] - 1 and answers["unanswered"] == 1
