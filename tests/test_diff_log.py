"""`al diff` and `al log` on real rounds: corrections, withdrawals, refusals and quarantines, each told once."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from harness import answer_all, change_params, play, small_workspace
from msgspec.structs import replace

from al_pipeline.cli import app as cli
from al_pipeline.data.ledger import add_to_inbox, read_events
from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import BadInput, NothingToDo, RepositoryError
from al_pipeline.files import read_json, read_jsonl
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import snapshots as snapshots_module
from al_pipeline.operations.diff import diff
from al_pipeline.operations.history import events_known, read_history, subjects
from al_pipeline.operations.log import log
from al_pipeline.operations.tick import tick
from al_pipeline.records import Event
from al_pipeline.workspace.workspace import Workspace, open_workspace

ANN, BOB = "ann@example.org", "bob@example.org"
CONTROL = "\x1b[31mred"


@dataclass
class Story:
    """Three rounds in which an item was corrected, one withdrawn, one quarantined, and an answer refused."""

    workspace: Workspace
    corrected: str
    withdrawn: str
    voided: str
    refused: str
    truth: dict[str, str]


def event(kind: Any, event_id: str, item: str = "", targets: tuple[str, ...] = (), **more: Any) -> Event:
    said: dict[str, Any] = {"round": 0, "annotator": "", **more}
    return Event(event_id, kind, item, "", "pool", annotation_key="", targets=targets, **said)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    workspace, truth = small_workspace(tmp_path_factory.mktemp("story"), size=60)
    oracle = SimulatedOracle()
    play(workspace, oracle, truth, 1)
    root = workspace.layout.root
    corrected, withdrawn, voided = (row.item_id for row in read_labeled(workspace.layout.labeled)[:3])
    given = {key.rsplit(":", 1)[1]: a for key, a in _answers(oracle).items()}
    oracle.edit(given[corrected], "ham" if truth[corrected] == "spam" else "spam")
    oracle.delete_annotation(given[withdrawn])
    keys = [key for key in oracle.queue(ANN) if not key.endswith(f":{withdrawn}")]
    for key in keys:
        oracle.answer(key, ANN, truth[key.rsplit(":", 1)[1]])
    refused = keys[-1]
    oracle.answer(refused, BOB, f"{CONTROL} label")
    target = next(e.event_id for e in read_events(workspace.layout.events) if e.item_id == voided)
    void = event("quarantine", "q1", targets=(target,), reason=f"{CONTROL} tired", annotator="ops")
    add_to_inbox(workspace.layout.inbox_events, [void], ledger=workspace.layout.events)
    change_params(workspace, {"batch_size: 8": "batch_size: 6"})
    assert tick(open_workspace(root), lambda: oracle).published == (1,)
    answer_all(oracle, truth)
    restore = event("restore", "r1", targets=(target,), reason="was right", annotator="ops")
    add_to_inbox(workspace.layout.inbox_events, [restore], ledger=workspace.layout.events)
    assert tick(open_workspace(root), lambda: oracle).published == (2,)
    return Story(open_workspace(root), corrected, withdrawn, voided, refused.rsplit(":", 1)[1], truth)


def _answers(oracle: SimulatedOracle) -> dict[str, int]:
    tasks = oracle.projects[1].tasks.values()
    return {str(task.data["push_key"]): number for task in tasks for number in task.annotations}


@pytest.mark.slow
def test_labels_that_came_changed_and_went_with_who_and_why(story: Story) -> None:
    found = diff(story.workspace, 0, 1)
    changes = {change.item_id: change for change in found.labels}
    other = {"ham": "spam", "spam": "ham"}
    right = story.truth[story.corrected]
    assert (changes[story.corrected].before, changes[story.corrected].after) == (right, other[right])
    assert changes[story.corrected].annotators == (ANN,) and changes[story.corrected].events == ("supersede",)
    assert changes[story.corrected].rounds == (0,)
    assert changes[story.withdrawn].after is None
    assert changes[story.withdrawn].events == ("delete: vanished from Label Studio",)
    assert changes[story.voided].after is None
    assert changes[story.voided].events == (f"quarantine: {CONTROL} tired",)
    added = [change for change in found.labels if change.kind == "added"]
    assert len(added) == 8 and all(c.after == story.truth[c.item_id] and c.rounds == (1,) for c in added)
    assert [change.kind for change in found.labels] == ["added"] * 8 + ["changed"] + ["removed"] * 2
    assert {item: (c.after, c.before) for item, c in changes.items()} == {
        change.item_id: (change.before, change.after) for change in diff(story.workspace, 1, 0).labels
    }


@pytest.mark.slow
def test_parameters_metrics_and_predictions(story: Story) -> None:
    found = diff(story.workspace, 0, 1)
    assert found.params == {"select.batch_size": (8, 6)}
    records = [read_json(story.workspace.layout.record(number)) for number in (0, 1)]
    assert found.models.items == 12
    for name, (old, new) in found.metrics.items():
        assert [old.to_row(), new.to_row()] == [record["metrics"][name] for record in records]
        assert found.models.differences[name].value == pytest.approx(new.value - old.value, abs=1e-6)
    assert diff(story.workspace, 1, 1).labels == () and diff(story.workspace, 1, 1).params == {}
    assert diff(story.workspace, 0, 1) == found, "the same intervals each time"
    with pytest.raises(NothingToDo):
        diff(story.workspace, 0, 9)


def whats(story: Story, item: str) -> list[tuple[int | None, str]]:
    return [(entry.round, entry.what) for entry in log(story.workspace, item).entries]


@pytest.mark.slow
def test_the_log_of_an_item_tells_everything_in_order(story: Story) -> None:
    begin = [(None, "ingested"), (0, "asked"), (0, "label"), (0, "labelled")]
    assert whats(story, story.corrected) == [*begin, (1, "supersede"), (1, "labelled")]
    assert whats(story, story.withdrawn)[:6] == [*begin, (1, "delete"), (1, "unlabelled")]
    voided = [
        step for step in whats(story, story.voided) if step not in ((2, "asked"), (2, "label"))
    ]  # it may be asked
    assert voided == [*begin, (1, "quarantine"), (1, "unlabelled"), (2, "restore"), (2, "labelled")]
    found = log(story.workspace, story.voided)
    label = story.truth[story.voided]
    assert found.labels == {"round-0000": label, "round-0001": None, "round-0002": label}
    assert found.part == "pool" and found.predictions == {}
    asked = found.entries[1]
    assert asked.details.keys() == {"round", "rank", "score", "strategy", "probability"}
    refused = [entry for entry in log(story.workspace, story.refused).entries if entry.what == "refused"]
    assert [(entry.round, entry.details["reason"]) for entry in refused] == [(1, "unknown label")]


@pytest.mark.slow
def test_the_log_of_a_test_item_has_what_each_model_said(story: Story) -> None:
    text = Git(story.workspace.layout.root).show("round-0002", "rounds/predictions.csv")
    item = str(text).split("\n")[1].split(",")[0]
    found = log(story.workspace, item)
    assert found.part == "test" and list(found.predictions) == ["round-0000", "round-0001", "round-0002"]
    assert found.labels == dict.fromkeys(found.predictions, story.truth[item])
    assert whats(story, item)[:5] == [
        (None, "ingested"),
        (0, "asked"),
        (0, "label"),
        (0, "labelled"),
        (0, "predicted"),
    ]


@pytest.mark.slow
def test_what_no_round_knows_yet_comes_last(story: Story) -> None:
    layout = story.workspace.layout
    add_to_inbox(layout.inbox_events, [event("label", "late", story.corrected, annotator=BOB, label="ham")])
    last = log(story.workspace, story.corrected).entries[-1]
    assert (last.round, last.what, last.details["in"], last.details["annotator"]) == (None, "label", "inbox", BOB)
    planned = [{row["item_id"] for row in read_jsonl(layout.plan(number))} for number in range(4)]
    new = planned[3] - planned[0] - planned[1] - planned[2]
    assert new
    for item in new:
        assert whats(story, item) == [(None, "ingested"), (None, "asked")]


@pytest.mark.slow
def test_an_item_that_nobody_knows_is_said(story: Story) -> None:
    with pytest.raises(BadInput, match="there is no item 'nix'"):
        log(story.workspace, "nix")


@pytest.mark.slow
def test_labels_that_are_not_the_recorded_ones_are_not_shown(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_history(story.workspace.layout, Git(story.workspace.layout.root))
    record = replace(whole.rounds[0], hashes={**whole.rounds[0].hashes, "labeled": "0" * 64})
    with (
        pytest.raises(RepositoryError, match="labeled.parquet of round-0000 does not match its record"),
        snapshots_module.snapshots(story.workspace) as labels,
    ):
        labels(record)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["diff", "log"])
def test_the_terminal_gets_nothing_that_steers_it(
    story: Story, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def al(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(story.workspace.layout.root), *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    words = ("diff", "0", "round-0001") if command == "diff" else ("log", story.voided)
    said = al(*words)
    assert "red tired" in said and "\x1b" not in said
    assert story.voided in said
    assert f"{CONTROL} tired" in json.dumps(json.loads(al(*words, "--json")), ensure_ascii=False).replace(
        "\\u001b", "\x1b"
    )


def test_a_quarantine_speaks_of_what_it_names_however_far() -> None:
    events = [
        event("label", "a", "x"),
        event("label", "b", "y"),
        event("quarantine", "q", targets=("a", "b")),
        event("restore", "r", targets=("q",)),
        event("quarantine", "lost", targets=("never",)),
    ]
    found = subjects(events)
    assert found == {"a": {"x"}, "b": {"y"}, "q": {"x", "y"}, "r": {"x", "y"}, "lost": set()}


def test_how_much_of_the_ledger_a_round_knew_is_recorded_or_inferred() -> None:
    events = [event("label", str(n), "x", round=number) for n, number in enumerate([0, 0, 1, 0, 2])]

    def record(number: int, known: int | None) -> Any:
        return SimpleNamespace(round=number, counts=SimpleNamespace(events=known))

    assert events_known(record(0, 3), events) == 3
    assert [events_known(record(number, None), events) for number in (0, 1, 2)] == [2, 4, 5]
