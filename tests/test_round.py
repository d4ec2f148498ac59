"""Whole rounds on a real Label Studio with real weights, through the command line, and what may go wrong with them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from annotating import ServerRig
from embedded import LabelStudioServer
from harness import SMALL, change_params, small_workspace, write_pool

from al_pipeline.data.ledger import read_events, read_refused
from al_pipeline.data.outputs import read_labeled, read_unresolved
from al_pipeline.data.pool import fetch, read_ids
from al_pipeline.errors import VanishedAnswers, WrongProject
from al_pipeline.files import read_json, sha256_tree
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.label_studio.payloads import choice_result, shown_fields, shown_hash
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_plan
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.tick import Options, TickReport, tick
from al_pipeline.records import PlannedTask
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = [pytest.mark.server, pytest.mark.slow]

ANN, BOB = "ann.round@example.com", "bob.round@example.com"


@pytest.fixture(scope="module")
def studio(label_studio_venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudioServer]:
    """A Label Studio of this file's own: its tests stop and start it."""
    server = LabelStudioServer(tmp_path_factory.mktemp("round-label-studio"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _connected(studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", studio.url)
    monkeypatch.setenv("AL_LABEL_STUDIO_TOKEN", studio.token)


@dataclass(frozen=True)
class Person:
    """Somebody with an account and a token of their own, at the REST API."""

    url: str
    token: str

    def answer(self, task: int, label: str) -> int:
        """Choose a label, whether it exists or not; returns the annotation's id."""
        return int(self._send("POST", f"/api/tasks/{task}/annotations/", result=choice_result(label))["id"])

    def skip(self, task: int) -> None:
        self._send("POST", f"/api/tasks/{task}/annotations/", result=[], was_cancelled=True)

    def edit(self, annotation: int, label: str) -> None:
        self._send("PATCH", f"/api/annotations/{annotation}/", result=choice_result(label))

    def delete(self, annotation: int) -> None:
        self._send("DELETE", f"/api/annotations/{annotation}/")

    def change_text(self, task: int, text: str) -> None:
        data = self._send("GET", f"/api/tasks/{task}/")["data"]
        self._send("PATCH", f"/api/tasks/{task}/", data={**data, "text": text})

    def next(self, project: int) -> str:
        """The push key of the task that the label stream offers."""
        return str(self._send("GET", f"/api/projects/{project}/next")["data"]["push_key"])

    def _send(self, method: str, path: str, **content: Any) -> Any:
        reply = httpx.request(
            method,
            f"{self.url}{path}",
            headers={"Authorization": f"Token {self.token}"},
            json=content or None,
            timeout=60,
            trust_env=False,
            verify=False,
        )
        reply.raise_for_status()
        return reply.json() if reply.content else None


def al(folder: Path | None, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; it must end with `code`."""
    place = [] if folder is None else ["-C", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "al_pipeline.cli.app", *place, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == code, f"al {' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def al_json(folder: Path | None, *words: str, code: int = 0) -> dict[str, Any]:
    """The same with `--json`: standard output is one JSON object and nothing else."""
    found: dict[str, Any] = json.loads(al(folder, *words, "--json", code=code).stdout)
    return found


def project(workspace: Workspace) -> ProjectRef:
    return ProjectRef(**read_json(workspace.layout.project))


def tasks(studio: LabelStudioServer, workspace: Workspace) -> dict[str, tuple[int, bool]]:
    """Push key -> (task id, whether it is out of the queue), by rising id."""
    with LabelStudioOracle(studio.url, studio.token) as oracle:
        return {str(s.push_key): (s.task_id, s.is_labeled) for s in oracle.task_states(project(workspace))}


def fingerprint(studio: LabelStudioServer, workspace: Workspace) -> tuple[Any, ...]:
    """All that a tick without news must leave as it is."""
    git, layout = Git(workspace.layout.root), workspace.layout
    return (
        git.head(),
        git.tags(),
        git.run("status", "--porcelain").stdout,
        tasks(studio, workspace),
        sha256_tree(layout.events),
        [event.event_id for event in read_events(layout.events, layout.inbox_events)],
    )


def ticked(workspace: Workspace, **options: bool) -> TickReport:
    """A tick in this process, with a connection of its own."""
    opened = open_workspace(workspace.layout.root)
    known = opened.credentials()
    with LabelStudioOracle(known["url"], known["token"]) as oracle:
        return tick(opened, lambda: oracle, options=Options(**options))


@pytest.fixture
def weighty(tmp_path: Path) -> tuple[Workspace, Mapping[str, str]]:
    """A workspace made by the command line that learns on real pre-trained weights."""
    root = tmp_path / "spam"
    made = al_json(None, "init", str(root), "--labels", "ham,spam", "--remote", str(tmp_path / "remote"))
    workspace = open_workspace(root)
    assert made == {"workspace": str(root), "workspace_id": workspace.id}
    changes = {name: to for name, to in SMALL.items() if "kind" not in name}
    changes |= {"test_size: 500": "test_size: 4", "seed_size: 40": "seed_size: 8", "batch_size: 40": "batch_size: 4"}
    change_params(workspace, {**changes, "quorum: 0.9": "quorum: 0.75"})
    truth = write_pool(tmp_path / "pool.jsonl", 40)
    taken = al_json(root, "ingest", str(tmp_path / "pool.jsonl"))
    assert (taken["added"], taken["test_added"]) == (36, 4), taken
    return open_workspace(root), truth


def test_a_round_from_nothing_to_the_next_one(
    studio: LabelStudioServer, weighty: tuple[Workspace, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two people answer rightly, skip, err, correct themselves, delete, come late; somebody edits a task."""
    workspace, truth = weighty
    root, layout, git = workspace.layout.root, workspace.layout, Git(workspace.layout.root)
    ann, bob = (Person(studio.url, studio.invite(email)) for email in (ANN, BOB))

    first = al(root, "round")
    assert "Round 0 is open: 9 more of 12 tasks" in first.stdout
    assert "in this process" in first.stderr, "it says where it runs"
    assert (layout.encoder / "source.json").exists() and any(layout.features.rglob("*")), "on real weights"
    plan = read_plan(git, 0)
    there = tasks(studio, workspace)
    assert list(there) == [task.push_key for task in plan], "in the plan's order"
    assert [task.part for task in plan].count("test") == 4 and "pool" in [task.part for task in plan[:3]], "mixed"
    assert ann.next(project(workspace).project_id) == plan[0].push_key
    asked_in_order, plan = plan, sorted(plan, key=lambda task: task.part != "test")

    before = fingerprint(studio, workspace)
    again = al_json(root, "round", code=3)
    assert (again["state"], again["published"], again["pulled"]) == ("open", [], {})
    assert fingerprint(studio, workspace) == before, "a second tick changes nothing"

    ids = [there[task.push_key][0] for task in plan]
    right = [truth[task.item_id] for task in plan]
    wrong = ["spam" if label == "ham" else "ham" for label in right]
    test, pool = range(4), range(4, 12)
    answered, skipped_once, given_up, unknown, corrected, deleted, edited, late = pool
    for task in test[:2]:
        ann.answer(ids[task], right[task])
    ann.answer(ids[unknown], "eggs")
    mistake = ann.answer(ids[corrected], wrong[corrected])
    doomed = ann.answer(ids[deleted], wrong[deleted])
    Person(studio.url, studio.token).change_text(ids[edited], "another text altogether")
    bob.answer(ids[edited], right[edited])

    found = al_json(root, "round")
    assert found["pulled"] == {"label": 4} and found["refused"] == {"unknown label": 1, "changed text": 1}
    state = al_json(root, "status")
    assert (state["state"], state["settled"], state["tasks"]) == ("open", 4, 12)
    assert state["refused"] == {"unknown label": 1, "changed text": 1}
    assert git.run("status", "--porcelain").stdout == "", "clean while people label"

    studio.restart()
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", studio.url)
    ann, bob = Person(studio.url, ann.token), Person(studio.url, bob.token)
    ann.edit(mistake, right[corrected])
    ann.delete(doomed)
    bob.answer(ids[deleted], right[deleted])
    for task in (*test[2:], answered):
        ann.answer(ids[task], right[task])
    ann.skip(ids[skipped_once])
    bob.answer(ids[skipped_once], right[skipped_once])
    ann.skip(ids[given_up])
    bob.skip(ids[given_up])

    published = al_json(root, "round")
    assert published["published"] == [0] and (published["round"], published["state"]) == (1, "open")
    assert published["pulled"] == {"label": 5, "skip": 3, "supersede": 1, "delete": 1}
    assert published["refused"] == {}, "what was refused once is not counted again"
    counted = [answered, skipped_once, corrected, deleted]
    assert {row.item_id: row.label for row in read_labeled(layout.labeled)} == {
        plan[task].item_id: right[task] for task in counted
    }
    assert {row.item_id: row.label for row in read_labeled(layout.test_labels)} == {
        plan[task].item_id: right[task] for task in test
    }
    assert [(row.item_id, row.kind) for row in read_unresolved(layout.unresolved)] == [
        (plan[given_up].item_id, "ignored")
    ]
    state = al_json(root, "status")
    assert {name: state[name] for name in ("labelled", "pending", "ignored", "unlabelled", "pool")} == {
        "labelled": 4,
        "pending": 4,
        "ignored": 1,
        "unlabelled": 27,
        "pool": 36,
    }
    assert sorted(git.tags()) == ["round-0000"] and git.run("status", "--porcelain").stdout == ""

    following = read_plan(git, 1)
    there = tasks(studio, workspace)
    assert list(there) == [task.push_key for task in (*asked_in_order, *following)]
    assert there[plan[late].push_key][1], "an unanswered task has left the queue"
    assert bob.next(project(workspace).project_id) == following[0].push_key
    assert not {task.item_id for task in following} & {plan[task].item_id for task in (*counted, given_up)}
    assert {task.strategy for task in following} <= {"core_set", "herding", "margin", "random", "random_slice"}

    ann.answer(ids[late], right[late])
    for task in following:
        bob.answer(there[task.push_key][0], truth[task.item_id])
    assert al_json(root, "round")["published"] == [1]
    rounds = {row.item_id: row.round for row in read_labeled(layout.labeled)}
    assert rounds[plan[late].item_id] == 0, "a late answer keeps its round and enters the next fold"
    events = read_events(layout.events)
    assert {event.annotator for event in events} == {ANN, BOB}
    assert sorted(row["reason"] for row in read_refused(layout.events)) == ["changed text", "unknown label"]
    assert studio.token not in "".join(path.read_text("utf-8") for path in layout.events.glob("*.jsonl"))

    before = fingerprint(studio, workspace)
    assert al_json(root, "round", code=3)["published"] == []
    assert fingerprint(studio, workspace) == before
    _check_reports(root, plan, given_up)


def _check_reports(root: Path, plan: list[PlannedTask], given_up: int) -> None:
    """Both rounds' pages say what happened."""
    page = Path(al_json(root, "report", "0")["report"]).read_text("utf-8")
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    loads = re.sub(r'<a href="[^"]+" rel="noreferrer" title="in Label Studio">', "", page)
    assert loads != page, "its items lead to their tasks"
    assert not re.search(r"""(src|href)=["']?\s*(http|//)|@import|url\(\s*["']?http""", loads), "it opens offline"
    for words in ("unknown label", "changed text", plan[given_up].item_id, "skipped"):
        assert words in text, words
    record = read_json(root / "rounds/0000/round.json")
    assert record["answers"] == {
        "tasks": 12,
        "answered": 8,
        "given_up": 1,
        "unanswered": 3,
        "kept": 0,
        "refused": {"unknown label": 1, "changed text": 1},
    }
    latest = al_json(root, "report")["report"]
    assert latest.endswith("round-0001.html")
    labelled = len(read_labeled(root / "data/labeled.parquet"))
    assert [row["labelled"] for row in al_json(root, "rounds")["rounds"]] == [4, labelled]


# What may go wrong: one open round, and each test leaves it as it found it ------------------------------------------


@pytest.fixture(scope="module")
def open_round(
    studio: LabelStudioServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, Mapping[str, str]]:
    """Round 0 in Label Studio, nobody has answered."""
    folder = tmp_path_factory.mktemp("open-round")
    workspace, truth = small_workspace(folder)
    with LabelStudioOracle(studio.url, studio.token) as oracle:
        tick(workspace, lambda: oracle)
    return open_workspace(workspace.layout.root), truth


def test_label_studio_goes_away_and_comes_back(
    studio: LabelStudioServer, open_round: tuple[Workspace, Mapping[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _ = open_round
    before = fingerprint(studio, workspace)
    studio.stop()
    try:
        told = al_json(workspace.layout.root, "round", code=5)
        assert told["error"] == "LabelStudioDown" and told["exit_code"] == 5
        assert "is it running?" in told["message"]
        assert al_json(workspace.layout.root, "status")["state"] == "open", "what is known needs no server"
    finally:
        studio.restart()
    monkeypatch.setenv("AL_LABEL_STUDIO_URL", studio.url)
    assert fingerprint(studio, workspace) == before
    assert ticked(workspace).state == "open"
    assert fingerprint(studio, workspace) == before


def test_a_wrong_token(studio: LabelStudioServer, open_round: tuple[Workspace, Mapping[str, str]]) -> None:
    workspace, _ = open_round
    before = fingerprint(studio, workspace)
    wrong = "0123456789abcdef0123456789abcdef01234567"
    done = al(workspace.layout.root, "round", code=5, AL_LABEL_STUDIO_TOKEN=wrong)
    assert "refused the token (401)" in done.stderr and "Copy a new one from Account & Settings" in done.stderr
    assert wrong not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert fingerprint(studio, workspace) == before


def test_a_second_clone_only_reads_until_it_adopts(
    studio: LabelStudioServer, open_round: tuple[Workspace, Mapping[str, str]], tmp_path: Path
) -> None:
    workspace, _ = open_round
    before = fingerprint(studio, workspace)
    subprocess.run(["git", "clone", "-q", str(workspace.layout.root), str(tmp_path / "clone")], check=True)
    clone = open_workspace(tmp_path / "clone")
    with open_dvc(clone.layout) as dvc:
        dvc.pull()
    with pytest.raises(WrongProject, match="al adopt"):
        ticked(clone)
    assert fingerprint(studio, workspace) == before
    al(clone.layout.root, "adopt")
    assert ticked(clone).state == "open"
    with pytest.raises(WrongProject, match="al adopt"):
        ticked(workspace)
    al(workspace.layout.root, "adopt")
    assert ticked(workspace).state == "open"
    assert fingerprint(studio, workspace) == before


def test_many_answers_vanish_at_once(
    studio: LabelStudioServer, open_round: tuple[Workspace, Mapping[str, str]]
) -> None:
    workspace, truth = open_round
    plan = read_plan(Git(workspace.layout.root), 0)[12:17]
    with LabelStudioOracle(studio.url, studio.token) as oracle, ServerRig(studio, oracle) as rig:
        given = [rig.answer(project(workspace), task.push_key, ANN, truth[task.item_id]) for task in plan]
        assert ticked(workspace).pulled == {"label": 5}
        for annotation in given:
            rig.delete_annotation(project(workspace), annotation)
    before = fingerprint(studio, workspace)
    with pytest.raises(VanishedAnswers, match="al round --accept-vanished"):
        ticked(workspace)
    assert al_json(workspace.layout.root, "round", code=6)["error"] == "VanishedAnswers"
    assert fingerprint(studio, workspace) == before, "nothing was appended"
    assert al_json(workspace.layout.root, "round", "--accept-vanished")["pulled"] == {"delete": 5}
    assert al_json(workspace.layout.root, "status")["settled"] == 0
    assert ticked(workspace).pulled == {}


def test_the_project_is_deleted(studio: LabelStudioServer, open_round: tuple[Workspace, Mapping[str, str]]) -> None:
    """The last act of the open round."""
    workspace, truth = open_round
    task = read_plan(Git(workspace.layout.root), 0)[12]
    with LabelStudioOracle(studio.url, studio.token) as oracle, ServerRig(studio, oracle) as rig:
        rig.answer(project(workspace), task.push_key, ANN, truth[task.item_id])
        ticked(workspace)
        known = read_events(workspace.layout.events, workspace.layout.inbox_events)
        assert known[-1].label == truth[task.item_id]
        head = Git(workspace.layout.root).head()
        rig.delete_project(project(workspace))
    told = al_json(workspace.layout.root, "round", code=6)
    assert told["error"] == "WrongProject"
    assert read_events(workspace.layout.events, workspace.layout.inbox_events) == known
    assert Git(workspace.layout.root).head() == head


# Texts that JSON, HTML, a database or a form might change -----------------------------------------------------------

ODD = {
    "nul": "before\x00after",
    "crlf": "one\r\ntwo\rthree\n",
    "blanks": "   in front and behind   \t\n ",
    "controls": "bell\x07 escape\x1b[31m delete\x7f separator\x85 \u2028 end",
    "long": ("all work and no play. " * 10_000)[:200_000],
    "rtl": "שלום עולם \u202eevil\u202c العربية",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \ufeff",
    "empty-looking": "\u200b",
    "markup": "<b>&amp;</b> <script>alert(1)</script> ${text} {{ text }} %s",
    "number": "007",
    "json": '{"text": null}',
    "null": "null",
    "dollar": "$undefined$ $text",
}


def test_odd_texts_come_back_as_they_were_sent(studio: LabelStudioServer, tmp_path: Path) -> None:
    workspace, _ = small_workspace(tmp_path, 4, {"test_size: 500": "test_size: 1", "seed_size: 40": "seed_size: 40"})
    lines = [json.dumps({"id": name, "text": text}) + "\n" for name, text in ODD.items()]
    (tmp_path / "odd.jsonl").write_text("".join(lines), encoding="ascii")
    ingest(workspace, [tmp_path / "odd.jsonl"])
    ticked(workspace)
    plan = read_plan(Git(workspace.layout.root), 0)
    known = set(read_ids([workspace.layout.pool, workspace.layout.test]).ids())
    assert known >= ODD.keys()
    assert {task.item_id for task in plan} == known, "all of them are asked"
    with LabelStudioOracle(studio.url, studio.token) as oracle:
        with ServerRig(studio, oracle) as rig:
            for task in plan:
                rig.answer(project(workspace), task.push_key, ANN, "spam")
        for task in oracle.answered(project(workspace), None):
            assert shown_hash(shown_fields(task.data)) == task.data["shown_hash"], task.data["item_id"]
    done = ticked(workspace)
    assert done.refused == {} and done.pulled == {"label": len(plan)}
    assert done.published == (0,)
    items = fetch([workspace.layout.pool, workspace.layout.test], list(ODD))
    assert {name: items[name].text for name in ODD} == ODD
    page = Path(al_json(workspace.layout.root, "report")["report"]).read_bytes()
    assert b"<script>alert(1)" not in page and b"\x00" not in page
