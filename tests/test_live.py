"""Live rounds on a simulated Label Studio: what is asked, what is published, what survives."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from harness import Killed, Played, change_params, go_on, results

from al_pipeline.data.ledger import read_events
from al_pipeline.errors import LabelStudioDown
from al_pipeline.files import json_line, read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import Oracle
from al_pipeline.integrations.simulated_oracle import Moment
from al_pipeline.operations import live as live_module
from al_pipeline.operations.history import read_history, read_plans
from al_pipeline.operations.live import Live
from al_pipeline.operations.pull import PullMemory, PullReport, PullRequest, pull
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import Options, tick
from al_pipeline.rounds.manifests import LiveQuestion, parse_live
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace, open_workspace

ANN = "ann@example.org"


class Clock:
    """Time that passes by hand."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Site:
    """A workspace whose questions are asked live, with its simulated Label Studio."""

    def __init__(self, played: Played, folder: Path) -> None:
        self.workspace, self.oracle, self.truth = go_on(played, folder)
        change_params(self.workspace, {"enabled: false": "enabled: true"})
        self.git, self.layout, self.clock = Git(self.workspace.layout.root), self.workspace.layout, Clock()
        self.answered: list[str] = []
        self.live = self.begin()

    def begin(self) -> Live:
        """A new process."""
        return Live(open_workspace(self.layout.root), lambda: self.oracle, clock=self.clock)

    def annotate(self, who: str = ANN) -> str:
        """Answer the first task of the person's queue, and take a step; returns the task's key."""
        key = self.oracle.queue(who)[0]
        self.oracle.answer(key, who, self.truth[key.rsplit(":", 1)[1]])
        self.answered.append(key)
        self.clock.now += 2
        self.live.step()
        return key

    @property
    def open_round(self) -> int:
        number = read_history(self.layout, self.git).planned
        assert number is not None
        return number

    def asked(self, number: int) -> tuple[LiveQuestion, ...]:
        return parse_live(self.layout.live_plan(number).read_text("utf-8"), number)


def test_a_live_round_publishes_what_a_batch_of_the_same_questions_publishes(once: Played, tmp_path: Path) -> None:
    site = Site(once, tmp_path / "live")
    site.live.step()
    while site.open_round == 1:
        assert len(site.oracle.queue(ANN)) >= 2, "the queue never runs empty"
        site.annotate()
        assert len(site.answered) < 30
    asked = site.asked(1)
    assert site.git.show("round-0001^", "rounds/0001/live.jsonl"), "committed before the build"
    kinds = Counter(one.kind for one in asked)
    assert kinds["chosen"] > 2 and kinds["random"] >= 1
    models = [one.model for one in asked if one.kind == "chosen"]
    assert len(set(models)) > 3, "each answer makes a new model"
    assert [one.events for one in asked] == sorted(one.events for one in asked)

    workspace, oracle, truth = go_on(once, tmp_path / "batch")
    plan = workspace.layout.plan(1)
    plan.write_text("".join(json_line(one.task.to_row()) for one in asked), encoding="utf-8")
    Git(workspace.layout.root).commit("The same questions", [plan])
    tick(workspace, lambda: oracle)
    for key in site.answered:
        oracle.answer(key, ANN, truth[key.rsplit(":", 1)[1]])
    tick(open_workspace(workspace.layout.root), lambda: oracle, options=Options(close_now=True))
    assert results(workspace, 1) == results(site.workspace, 1)
    metrics = [read_json(one.record(1))["metrics"] for one in (workspace.layout, site.layout)]
    assert metrics[0] == metrics[1]


def test_a_batch_that_was_pushed_gives_way_to_a_short_queue_and_comes_back(once: Played, tmp_path: Path) -> None:
    site = Site(once, tmp_path)
    assert len(site.oracle.queue(ANN)) == 8
    site.live.step()
    assert len(site.oracle.queue(ANN)) == 3 == len(site.asked(1))
    assert site.git.changed([site.layout.root / "rounds"]) == ["rounds/0001/live.jsonl"]
    site.annotate()
    late = next(key for key in read_plans(site.git) if key not in {one.task.push_key for one in site.asked(1)})
    site.oracle.answer(late, ANN, "spam")  # somebody had the retired task on the screen
    site.live.step()
    assert {event.push_key for event in read_events(site.layout.inbox_events)} == {site.answered[0], late}
    site.live.close()
    assert not site.git.changed([site.layout.root / "rounds"]), "what was asked is committed"
    change_params(site.workspace, {"enabled: true": "enabled: false"})
    tick(open_workspace(site.layout.root), lambda: site.oracle)
    asked = {one.task.push_key for one in site.asked(1)}
    assert len(asked) == 8 and set(site.oracle.queue(ANN)) == asked - {site.answered[0], late}


def test_skips_changes_and_deletions_count_as_in_rounds(once: Played, tmp_path: Path) -> None:
    site = Site(once, tmp_path)
    site.live.step()
    assert site.live.asker is not None
    first, second, third = site.oracle.queue(ANN)
    before = site.live.asker.labels
    site.oracle.skip(first, ANN)
    answer = site.oracle.answer(second, ANN, "spam")
    site.live.step()
    assert site.live.asker.labels == before + 1 and len(site.oracle.queue(ANN)) == 3, (
        "a skip and an answer are replaced"
    )
    site.oracle.edit(answer, "ham")
    digest = site.live.asker.digest
    site.live.step()
    assert site.live.asker.digest != digest and site.live.asker.labels == before + 1
    site.oracle.delete_annotation(answer)
    site.live.step()
    assert site.live.asker.labels == before and second in site.oracle.queue(ANN)
    assert [event.type for event in read_events(site.layout.inbox_events)] == ["skip", "label", "supersede", "delete"]


def test_nobody_is_held_up_by_somebody_who_went_away(once: Played, tmp_path: Path) -> None:
    site = Site(once, tmp_path)
    site.live.step()
    for who in (ANN, "bob@example.org", ANN):
        site.annotate(who)
    assert len(site.oracle.queue(ANN)) == 4, "two at work, and two more"
    site.clock.now += 600
    site.annotate()
    assert len(site.oracle.queue(ANN)) == 4, "one at work, one task that bob may hold, two more"
    keys = [one.task.push_key for one in site.asked(1)]
    assert len(keys) == len(set(keys))


def test_pulls_look_back_the_farther_the_less_often(
    once: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(once, tmp_path)
    seconds: list[float] = []

    def spied(layout: Layout, oracle: Oracle, request: PullRequest, memory: PullMemory) -> PullReport:
        seconds.append(request.look_back.total_seconds())
        return pull(layout, oracle, request, memory)

    monkeypatch.setattr(live_module, "pull", spied)
    site.live.step()
    for pause in (1, 1, 60, 1, 240, 1, -3600):
        site.clock.now += pause
        site.live.step()
    assert seconds == [600, 15, 15, 120, 15, 600, 15, 15]


def test_a_step_does_no_more_than_the_one_before(once: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, calls, noted = Site(once, tmp_path), Counter[str](), Counter[str]()
    site.live.step()
    site.annotate()  # the first person: rules depend on how many there are
    monkeypatch.setattr("al_pipeline.operations.pull.write_text", lambda path, _: noted.update([path.name]))
    site.oracle.fault = lambda call, moment: calls.update([call] if moment == "before" else [])
    assert site.live.round is not None
    for _ in range(3):
        calls.clear()
        reads, folded = site.live._memory.reads, site.live.round.fold.folded
        site.annotate()
        assert calls == {"changed": 1, "answered": 1, "import_tasks": 1, "task_states": 1}
        assert site.live._memory.reads == reads, "what is known is not read again"
        assert site.live.round.fold.folded == folded + 1, "the new answer alone"
    assert noted.total() <= 1, "its place is noted every few seconds"


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_anywhere_it_loses_and_doubles_nothing(once: Played, tmp_path: Path, seed: int) -> None:
    site, draw = Site(once, tmp_path), random.Random(seed)

    def strike(call: str, moment: Moment) -> None:
        if draw.random() < 0.04:
            raise draw.choice([Killed(), LabelStudioDown(f"{moment} {call}")])

    deaths = 0
    while site.open_round == 1 and len(site.answered) < 40:
        site.oracle.fault = strike
        try:
            site.live.step()
        except (Killed, LabelStudioDown):
            deaths += 1
            site.oracle.fault = None
            if draw.random() < 0.5:  # in the middle of a line
                with site.layout.live_plan(1).open("a") as file:
                    file.write('{"task": {"push')
            site.live = site.begin()
            site.live.step()
        site.oracle.fault = None
        queue = site.oracle.queue(ANN)
        assert len(queue) == len(set(queue)) >= 2
        if site.open_round == 1:
            site.oracle.answer(queue[0], ANN, site.truth[queue[0].rsplit(":", 1)[1]])
            site.answered.append(queue[0])
            site.clock.now += 2
    assert deaths
    tick(open_workspace(site.layout.root), lambda: site.oracle, options=Options())
    events = read_events(site.layout.events, site.layout.inbox_events)
    heard = [event.push_key for event in events if event.round == 1]
    assert sorted(heard) == sorted(site.answered)
    assert {one.task.push_key for one in site.asked(1)} >= set(heard)
    assert reproduces(site.workspace)


def reproduces(workspace: Workspace) -> bool:
    """Whether the stages make the newest round again in a fresh clone, byte by byte."""
    return all(one.difference is None for one in reproduce(open_workspace(workspace.layout.root), []))
