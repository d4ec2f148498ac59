"""Rounds in which labelled items are asked again: whose answers count, and what plans, records and counts say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from annotating import leave
from embedded import LabelStudioServer
from harness import small_workspace
from test_round import Person, project, tasks

from al_pipeline.annotation.votes import answers_of, by_item, votes_of
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import read_labeled, read_unresolved
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.label_studio.client import LabelStudioOracle
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations.history import read_plan, read_plans
from al_pipeline.operations.report import write_report
from al_pipeline.operations.tick import tick
from al_pipeline.records import RELABEL, PlannedTask
from al_pipeline.stages import select
from al_pipeline.workspace.workspace import Workspace, open_workspace

pytestmark = pytest.mark.slow

ANN, BOB, EVE = "ann@example.org", "bob@example.org", "eve@example.org"
OTHER = {"ham": "spam", "spam": "ham"}
CHANGES = {"relabel: 0": "relabel: 0.5", "seed_size: 10": "seed_size: 36", "batch_size: 8": "batch_size: 12"}


def asked_again(workspace: Workspace, number: int) -> list[PlannedTask]:
    return [task for task in read_plan(Git(workspace.layout.root), number) if task.strategy == RELABEL]


def test_doubtful_labels_are_asked_again_and_the_newest_answer_of_each_person_counts(tmp_path: Path) -> None:
    workspace, truth = small_workspace(tmp_path, 120, {**CHANGES, "test_tasks: 40": "test_tasks: 0"})
    oracle = SimulatedOracle()

    def turn() -> Workspace:
        tick(open_workspace(workspace.layout.root), lambda: oracle)
        return open_workspace(workspace.layout.root)

    turn()
    keys = oracle.queue(ANN)
    wrong = {key.rsplit(":", 1)[1] for key in keys[:6]}
    for place, key in enumerate(keys):
        item = key.rsplit(":", 1)[1]
        oracle.answer(key, ANN if place < 30 else BOB, OTHER[truth[item]] if item in wrong else truth[item])
    space = turn()

    # The plan: new tasks of labelled items, each once, with what a model says that was not trained on them.
    again = asked_again(space, 1)
    plan = read_plan(Git(space.layout.root), 1)
    labels = {row.item_id: row.label for row in read_labeled(space.layout.labeled)}
    assert 2 <= len(again) <= 6 and {task.item_id for task in again} < labels.keys()
    assert len(plan) == 12 == len({task.item_id for task in plan}) == len({task.push_key for task in plan})
    assert all(task.push_key.split(":")[1] == "0001" and task.first_round == 1 for task in again)
    assert sum(task.item_id in wrong for task in again) >= len(again) / 2, "mostly what was really wrong"
    assert all(task.predicted != labels[task.item_id] for task in again if task.item_id in wrong)
    assert all(0.25 <= task.score <= 1 and task.probability == 1.0 for task in again)
    assert sum(task.strategy == "random_slice" for task in plan) == 1
    before = space.layout.queries.read_bytes()
    select.main(space.layout)
    assert space.layout.queries.read_bytes() == before, "the same labels give the same batch"

    # Ann gets one of her own items again and says the same; the others fall to Bob.
    own, *others = [task.item_id for task in again if task.item_id in wrong]
    for key in oracle.queue(ANN):
        item = key.rsplit(":", 1)[1]
        oracle.answer(key, ANN if item == own else BOB, labels[own] if item == own else truth[item])
    space = turn()
    votes = {
        item: [vote for vote in votes_of(answers_of(about).values()) if vote.label is not None]
        for item, about in by_item(read_events(space.layout.events)).items()
    }
    assert [(vote.annotator, vote.label) for vote in votes[own]] == [(ANN, labels[own])]
    record = json.loads(space.layout.record(1).read_text())
    assert record["answers"]["answered"] == 12
    ties = {row.item_id for row in read_unresolved(space.layout.unresolved) if row.kind == "tie"}
    assert ties >= set(others), "two people who differ: asked once more, not given up after two rounds"
    held = record["counts"]
    assert held["labelled"] + held["pending"] + held["ignored"] + held["unlabelled"] == held["pool"] == 108

    # Ties come first, and Eve decides them; an item is asked in no more rounds than are allowed.
    plan = read_plan(Git(space.layout.root), 2)
    assert {task.item_id for task in plan if task.strategy == "ask_again"} == ties
    for key in oracle.queue(EVE):
        oracle.answer(key, EVE, truth[key.rsplit(":", 1)[1]])
    space = turn()
    labels = {row.item_id: row.label for row in read_labeled(space.layout.labeled)}
    assert all(labels[item] == truth[item] for item in others)
    tasks = Counter(task.item_id for task in read_plans(Git(space.layout.root)).values())
    assert max(tasks.values()) <= 5
    page = write_report(space).read_text(encoding="utf-8")
    assert ">ask_again<" in page or ">relabel<" in page


@pytest.mark.server
def test_label_studio_offers_an_item_again_to_whoever_answered_it(
    label_studio: LabelStudioServer, tmp_path: Path
) -> None:
    """A new task is a new question there: the answer replaces the person's first one; another's is a second vote."""
    changes = {**CHANGES, "test_tasks: 40": "test_tasks: 0", "seed_size: 10": "seed_size: 24"}
    workspace, truth = small_workspace(tmp_path, 60, changes)
    ann, bob = (Person(label_studio.url, label_studio.invite(f"{name}.again@example.com")) for name in ("ann", "bob"))

    def turn() -> Workspace:
        space = open_workspace(workspace.layout.root)
        with LabelStudioOracle(label_studio.url, label_studio.token) as oracle:
            tick(space, lambda: oracle)
        return open_workspace(workspace.layout.root)

    try:
        space = turn()
        for place, (key, (number, _)) in enumerate(tasks(label_studio, space).items()):
            label = truth[key.rsplit(":", 1)[1]]
            (bob if place == 23 else ann).answer(number, OTHER[label] if place < 4 else label)
        space = turn()
        again = asked_again(space, 1)
        there = tasks(label_studio, space)
        assert len(again) >= 2 and all(task.push_key in there for task in again)
        for key in [task.push_key for task in read_plan(Git(space.layout.root), 1) if task not in again]:
            bob.answer(there[key][0], truth[key.rsplit(":", 1)[1]])
        first, second, *rest = [task.push_key for task in again]
        assert ann.next(project(space).project_id) == first, "she is asked what she has answered"
        ann.answer(there[first][0], truth[first.rsplit(":", 1)[1]])
        for key in (second, *rest):
            bob.answer(there[key][0], truth[key.rsplit(":", 1)[1]])
        space = turn()
        about = by_item(read_events(space.layout.events))
        votes = [votes_of(answers_of(about[key.rsplit(":", 1)[1]]).values()) for key in (first, second)]
        assert [len(one) for one in votes] == [1, 2]
        assert votes[0][0].label == truth[first.rsplit(":", 1)[1]]
    finally:
        leave(label_studio, workspace)
