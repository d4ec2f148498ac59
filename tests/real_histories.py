"""Random histories on the whole product: real ticks and builds on real git and DVC, against the same reference.

Only Label Studio is simulated. The reference is told of each step as the tick takes it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from harness import Killed, write_pool
from histories import JUNK, PEOPLE, Step, World
from reference_history import Closed, Intervened, Outcome, Reference

from al_pipeline.annotation.aggregation import Folded
from al_pipeline.data.outputs import read_labeled, read_unresolved
from al_pipeline.errors import NothingToDo, VanishedAnswers
from al_pipeline.files import read_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.oracle import ProjectRef
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import intervene
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import History, read_history, read_plan, read_plans
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.tick import Options, tick
from al_pipeline.records import PlannedTask
from al_pipeline.rounds.interventions import Intervention
from al_pipeline.workspace.workspace import Workspace, open_workspace

TALK = {"answer": 3, "answers_to_much": 3, "delete": 1, "pull_again": 1, "more_items": 1}
DECISIONS = {"close_the_round": 2, "roll_back": 3, "undo": 2, "revoke": 2, "restore": 1}
"""Each of them ends in a build."""
FOLDED = ("labeled", "test_labels", "unresolved")
_KILLED = 0.4
"""The share of ticks that are killed, before or after one of their first ten steps."""


def real_steps_of(seed: int, rounds: int) -> list[Step]:
    """The history of a seed: `rounds` times, answers and similar steps, then a decision."""
    draw = random.Random(seed)
    names: list[str] = []
    for _ in range(rounds):
        names += draw.choices(list(TALK), list(TALK.values()), k=2)
        names += draw.choices(list(DECISIONS), list(DECISIONS.values()))
    return [(name, draw.randrange(10**6)) for name in [*names, "finish"]]


BEGINNING: list[Step] = [("answers_to_much", 0), ("close_the_round", 1)]
"""The first round, from which histories continue."""


def play_real(world: RealWorld, steps: Sequence[Step]) -> None:
    """Play a history; AssertionError if a property is violated."""
    for name, salt in steps:
        world.draw = random.Random(salt)
        getattr(world, name)()


class RealWorld(World):
    """A workspace with its DVC remote, its Label Studio and its people, and the reference."""

    def __init__(self, workspace: Workspace, oracle: SimulatedOracle) -> None:
        """`workspace` has an open round, and `oracle` its tasks."""
        self.oracle, self.draw = oracle, random.Random(0)
        self.move(workspace)
        self.ref = ProjectRef(**read_json(workspace.layout.project))
        self.classes = list(workspace.params.schema_.labels)
        self.most_vanished = workspace.params.label_studio.max_vanished
        self.everybody = None
        self.reference = Reference(None)
        self.interventions: list[Intervention] = []
        self.outcomes: dict[int, Outcome] = {}
        self.added = 0
        self.items = sorted({task.item_id for task in read_plans(self.git).values()})
        self.look()

    def move(self, workspace: Workspace) -> None:
        """Continue in a copy of the workspace."""
        self.workspace, self.layout, self.folder = workspace, workspace.layout, workspace.layout.root
        self.git = Git(workspace.layout.root)

    def look(self) -> History:
        """The committed history, from which round, plans and items are refreshed."""
        history = read_history(self.layout, self.git)
        assert history.planned is not None
        self.round, self.plans = history.planned, read_plans(self.git)
        self.items = sorted({*self.items, *(task.item_id for task in self.plans.values())})
        return history

    # Ticks -----------------------------------------------------------------------------------------------------------

    def pull(self) -> None:
        """A tick."""
        self.tick()

    def tick(self, **wanted: Any) -> None:
        """A tick that may be killed, and then as many as it takes to finish."""
        self.to_go = self.draw.randrange(20) if self.draw.random() < _KILLED else -1
        for _ in range(4):
            try:
                tick(open_workspace(self.layout.root), lambda: self.oracle, run=self.run, options=Options(**wanted))
                break
            except Killed:
                continue
            except VanishedAnswers:
                wanted["accept_vanished"] = True
        else:
            raise AssertionError("the tick does not come to an end")
        history = self.look()
        assert not history.waiting
        held = Counter(str(task.data["push_key"]) for task in self.held().values())
        assert max(held.values()) == 1, "one task for each question"
        assert {task.push_key for task in read_plan(self.git, self.round)} <= held.keys()

    def run(self, step: str, action: Callable[[], Any], /) -> Any:
        """Take a step, and tell the reference what it did."""
        self.perhaps_die()
        if step in ("pull", "audit"):
            self.look()
            news, gone = self.reference.pull(*self.seen())
            before = self.told()
            try:
                found = action()
            except VanishedAnswers:
                assert self.reference.vanished(news, gone) > self.most_vanished
                assert self.told() == before, "nothing is recorded"
                raise
            self.reference.take(news, gone)
            self.check()
        elif step == "close":
            waiting, before = self.look().waiting, self.standing()
            found = action()
            if {intervention.kind for intervention in waiting} == {"revoke"}:
                assert self.standing().items() <= before.items(), "a revocation only takes answers out"
            self.interventions += waiting
            self.reference.told += [self.decided[intervention.number] for intervention in waiting]
            self.reference.told.append(Closed(self.round))
            self.outcomes[self.round] = self.reference.outcome()
            self.check()
        else:
            found = action()
            if step == "publish":
                self.check_published()
        self.perhaps_die()
        return found

    def perhaps_die(self) -> None:
        self.to_go -= 1
        if self.to_go == 0:
            raise Killed

    # What must hold --------------------------------------------------------------------------------------------------

    def check_published(self) -> None:
        """The build's labels equal the reference's at the close, and the items asked next are not labelled."""
        record = read_history(self.layout, self.git).rounds[-1]
        expected = self.outcomes[record.round]
        rows = [*read_labeled(self.layout.labeled), *read_labeled(self.layout.test_labels)]
        unresolved = read_unresolved(self.layout.unresolved)
        found = Outcome(
            {row.item_id: (row.label, row.agreement, row.answers, row.round) for row in rows},
            frozenset(row.item_id for row in unresolved if row.kind == "tie"),
            frozenset(row.item_id for row in unresolved if row.kind == "ignored"),
        )
        assert found == expected
        made = record.interventions
        if len(made) == 1 and made[0].kind == "rollback":
            then = read_json(self.layout.record(made[0].to or 0))["hashes"]
            assert {name: record.hashes[name] for name in FOLDED} == {name: then[name] for name in FOLDED}
        asked = [task.item_id for task in read_plan(self.git, record.round + 1)]
        assert len(asked) == len(set(asked))
        assert not {*asked} & (expected.labels.keys() | expected.ignored)

    def finish(self) -> None:
        """Nothing is left unfinished."""
        self.tick()
        self.to_go = -1
        assert not tick(open_workspace(self.layout.root), lambda: self.oracle, run=self.run).changed
        assert self.git.run("status", "--porcelain").stdout == ""
        with open_dvc(self.layout) as dvc:
            assert dvc.changed() == {} and dvc.defects_in_remote() == []

    def fold(self) -> Folded:
        """Test items are answered like the others."""
        found = super().fold()
        return Folded((*found.labeled, *found.test), (), found.unresolved)

    def kept(self) -> list[PlannedTask]:
        raise NotImplementedError("the tick decides it")

    # What people do --------------------------------------------------------------------------------------------------

    def answers_to_much(self) -> None:
        """One annotator answers items of the open round, one after the other."""
        who = self.draw.choice(PEOPLE)
        for key in self.oracle.queue(who, self.ref.project_id)[: self.draw.randint(4, 14)]:
            self.oracle.answer(key, who, self.draw.choice([*self.classes * 4, JUNK]), self.ref.project_id)

    def pull_again(self) -> None:
        if self.draw.random() < 0.5:
            self.layout.pull_state.unlink(missing_ok=True)
        self.tick()

    def more_items(self) -> None:
        self.added += 1
        fresh = self.layout.private / "more.jsonl"
        write_pool(fresh, 4, seed=self.draw.randrange(10**6), start=1000 + 10 * self.added)
        ingest(open_workspace(self.layout.root), [fresh])

    # What is decided -------------------------------------------------------------------------------------------------

    def close_the_round(self) -> None:
        self.tick(close_now=True)

    def roll_back(self) -> None:
        self.perhaps_pull()
        if published := sorted(self.outcomes):
            to = self.draw.choice(published)
            made = self.decide(intervene.rollback, to, labels=True, model=False, params=False, reason="")
            self.carry_out(Intervened(made.number, "rollback", to, self.round))

    def undo(self) -> None:
        self.perhaps_pull()
        try:
            made = self.decide(intervene.undo, "")
        except NothingToDo:
            return
        assert made.undoes is not None
        self.carry_out(Intervened(made.number, "undo", made.undoes, self.round))

    def revoke(self) -> None:
        self.amend("revoke")

    def amend(self, kind: Literal["revoke", "restore"]) -> None:
        selection, named = self.some_answers()
        try:
            made = self.decide(intervene.amend, kind, selection, "")
        except NothingToDo:
            return
        self.carry_out(Intervened(made.number, kind, named, self.round))

    def decide(self, what: Callable[..., Any], *given: Any, **named: Any) -> Intervention:
        with open_dvc(self.layout) as dvc:
            made: Intervention = what(open_workspace(self.layout.root), dvc, *given, **named).intervention
        return made

    def carry_out(self, made: Intervened) -> None:
        self.decided = {made.number: made}
        self.tick()
