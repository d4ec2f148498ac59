"""Live rounds on a simulated Label Studio: what is asked, what is published, what survives."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from harness import Played, change_params, go_on, results

from al_pipeline.files import json_line, read_json
from al_pipeline.integrations.git import Git
from al_pipeline.operations.history import read_history
from al_pipeline.operations.live import Live
from al_pipeline.operations.tick import Options, tick
from al_pipeline.rounds.manifests import LiveQuestion, parse_live
from al_pipeline.workspace.workspace import open_workspace

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
    assert kinds["chosen"] > 2 and kinds["random"] == 1
    models = [one.model for one in asked if one.kind == "chosen"]
    assert len(set(models)) > 3, "each answer makes a new model"
    assert [one.events for one in asked] == sorted(one.events for one in asked)

    workspace, oracle, truth = go_on(once, tmp_path / "batch")
    plan = workspace.layout.plan(1)
    plan.write_text("".join(json_line(one.task.to_row()) for one in asked), encoding="utf-8")
    Git(workspace.layout.root).commit("The same questions", [plan])
    change_params(workspace, {"enabled: false": "enabled: true"})
    change_params(workspace, {"enabled: true": "enabled: false"})
    tick(workspace, lambda: oracle)
    for key in site.answered:
        oracle.answer(key, ANN, truth[key.rsplit(":", 1)[1]])
    tick(open_workspace(workspace.layout.root), lambda: oracle, options=Options(close_now=True))
    assert results(workspace, 1) == results(site.workspace, 1)
    metrics = [read_json(one.record(1))["metrics"] for one in (workspace.layout, site.layout)]
    assert metrics[0] == metrics[1]
