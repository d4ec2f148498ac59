"""Scenarios of gold, reviews and changed classes: their commands and the ticks that follow are killed at random."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from harness import change_params

from al_pipeline.annotation.gold import GOLD, REASON
from al_pipeline.data.outputs import read_labeled, read_unresolved
from al_pipeline.data.pool import read_ids
from al_pipeline.files import write_jsonl
from al_pipeline.operations.history import read_history, read_plan, read_plans
from al_pipeline.operations.review_figures import read_reviews
from al_pipeline.workspace.workspace import open_workspace
from chaos.lab import FaultCount, Lab, Scenario
from chaos.sites import Ended, Site, Tick, TwinPeople, expect, said

STORIES, KILLS = 3, 3
"""Of each kind; and the kills of the command, and again of the ticks that follow it."""
CHIEF = "chief.chaos@example.com"
GOLD_ITEMS, REVIEWED = 10, 6
_FIRST, _LATEST = 0.3, 2.5
"""The range of delays before a kill, in seconds."""


def team_scenarios() -> Iterator[Scenario]:
    """All of them."""
    for what, play in (("gold", _gold), ("review", _review), ("classes", _classes)):
        for number in range(STORIES):
            yield Scenario(
                f"{what} at random {number}",
                f"kill -9 at a random instant: {_KINDS[what]}",
                partial(play, seed=number),
                kills=True,
                strikes=2 * KILLS,
            )


_KINDS = {
    "gold": "al gold add, and ticks with gold",
    "review": "al review, and ticks with rulings",
    "classes": "al schema, and ticks that map answers",
}


class Desk:
    """A workspace, its annotators, and at most one reviewer."""

    def __init__(self, site: Site, tally: FaultCount, seed: str) -> None:
        assert isinstance(site.people, TwinPeople)
        self.site, self.people, self._tally = site, site.people, tally
        self._draw = random.Random(seed)

    def kill(self, start: Callable[[], Tick]) -> Ended:
        """Start something, and kill it at a random instant, unless it is faster."""
        running = start()
        time.sleep(self._draw.uniform(_FIRST, _LATEST))
        ended = running.kill()
        self._tally.strike(int(ended.code == -signal.SIGKILL))
        expect("Traceback" not in ended.err, f"it ended with a traceback: {ended.err[-1500:]}")
        return ended

    def run(self, *words: str) -> None:
        """Run a command of `al` that must succeed, with the twin."""
        ended = self.site.start_command(*words).end()
        expect(ended.code == 0, f"al {' '.join(words)}: {ended.short}")

    def answer(self, most: int | None = None) -> None:
        """The annotators answer all open tasks, or the first `most`, as if classes had the names of the beginning."""
        with self.people._server.lock:
            done = {key for key, _ in self.people.given}
            for key in [one for one in self.people.oracle.queue("nobody@example.com", 1) if one not in done][:most]:
                for who, label in said(key, self.site.truth):
                    if label is None:
                        self.people.oracle.skip(key, who, 1)
                    else:
                        self.people.oracle.answer(key, who, label, 1)
                    self.people.given[key, who] = label

    def kill_ticks(self) -> None:
        """Kill ticks, and let the round wait for people again."""
        for _ in range(KILLS):
            self.kill(self.site.start)
        self._tally.recovered(self.site)

    def keys(self, project: int) -> Counter[str]:
        """The push keys of a project's tasks that are open or were answered."""
        with self.people._server.lock:
            tasks = self.people.oracle.projects[project].tasks.values()
            return Counter(str(one.data["push_key"]) for one in tasks if one.annotations or not one.retired)

    def check(self) -> None:
        """No answer is lost or counted twice, no task is asked twice, and each round can be made again."""
        site, keys = self.site, self.keys(1)
        expect(keys.keys() <= read_plans(site.git).keys(), "Label Studio has a task that is in no plan")
        expect(max(keys.values()) == 1, f"a task is there twice: {keys.most_common(1)}")
        heard = Counter((one.push_key, one.annotator) for one in site.events() if one.type in ("label", "skip"))
        lost = [pair for pair in self.people.given if heard[pair] != 1]
        expect(not lost, f"{len(lost)} answers were lost or counted twice, first {lost[:1]}")
        expect(not site.git.run("status", "--porcelain").stdout, "git status is not clean")
        site.al("reproduce")


def _gold(lab: Lab, tally: FaultCount, seed: int) -> None:
    """`al gold add` is killed and repeated, then the ticks that ask the gold items and judge by them."""
    with lab.site("start-1") as site:
        desk = Desk(site, tally, f"gold {seed}")
        change_params(open_workspace(site.root), {"gold_share: 0.0": "gold_share: 0.25"})
        asked = {task.item_id for task in read_plans(site.git).values()}
        items = [item for item in read_ids([site.layout.pool]).ids() if item not in asked][:GOLD_ITEMS]
        path = site.outside / "gold.jsonl"
        write_jsonl(path, [{"id": item, "label": site.truth[item]} for item in items])
        for _ in range(KILLS):
            desk.kill(lambda: site.start_command("gold", "add", str(path)))
        desk.run("gold", "add", str(path))
        made = Counter(one.item_id for one in site.events() if one.type == "gold")
        expect(made == Counter(items), f"gold was added twice or not at all: {made}")
        desk.kill_ticks()
        number = read_history(site.layout, site.git).planned
        assert number is not None
        gold = Counter(task.item_id for task in read_plan(site.git, number) if task.strategy == GOLD)
        expect(gold and gold.keys() <= set(items) and max(gold.values()) == 1, f"the plan asks gold so: {gold}")
        desk.answer()
        desk.kill_ticks()
        apart = {row.item_id for row in read_unresolved(site.layout.unresolved) if row.reason == REASON}
        expect(apart == set(items), "gold is not set apart")
        labelled = {row.item_id for row in read_labeled(site.layout.labeled)}
        expect(not labelled & set(items), "gold is trained on")
        desk.check()


def _review(lab: Lab, tally: FaultCount, seed: int) -> None:
    """`al review` is killed and repeated, then the ticks that pull the rulings and count them."""
    with lab.site("start-1") as site:
        desk = Desk(site, tally, f"review {seed}")
        site.recover()
        change_params(open_workspace(site.root), {"reviewers: []": f"reviewers: [{CHIEF}]"})
        for _ in range(KILLS):
            desk.kill(lambda: site.start_command("review", "--size", str(REVIEWED)))
        desk.run("review", "--size", str(REVIEWED))
        planned = read_reviews(site.layout)
        expect(len({task.item_id for task in planned}) == len(planned) == REVIEWED, f"{len(planned)} tasks of reviews")
        there = desk.keys(2)
        expect(there == Counter(task.push_key for task in planned), f"the review project has {there}")
        with desk.people._server.lock:
            for task in planned:
                desk.people.oracle.answer(task.push_key, CHIEF, site.truth[task.item_id], 2)
        desk.answer()
        desk.kill_ticks()
        ruled = Counter(one.item_id for one in site.events() if one.type == "adjudicate")
        expect(ruled == Counter(task.item_id for task in planned), f"rulings were lost or counted twice: {ruled}")
        both = read_labeled(site.layout.labeled) + read_labeled(site.layout.test_labels)
        wrong = [row.item_id for row in both if row.item_id in ruled and row.label != site.truth[row.item_id]]
        expect(not wrong, f"rulings do not decide about {wrong}")
        desk.check()


def _classes(lab: Lab, tally: FaultCount, seed: int) -> None:
    """`al schema rename` or `merge` is killed and repeated until it is recorded, then the ticks that carry it out."""
    with lab.site("start-1") as site:
        desk = Desk(site, tally, f"classes {seed}")
        site.recover()
        desk.answer(3)
        words = ("schema", "rename", "spam", "junk", "--reason", "chaos")
        if seed % 2:
            desk.run("schema", "add", "other", "--reason", "chaos")
            words = ("schema", "merge", "spam,other", "INTO", "junk", "--reason", "chaos")

        def recorded() -> int:
            changes = (one.change for one in read_history(site.layout, site.git).interventions)
            return sum(one is not None and "junk" in one.new for one in changes)

        for _ in range(KILLS):
            if not recorded():
                desk.kill(lambda: site.start_command(*words))
        if not recorded():
            desk.run(*words)
        desk.kill_ticks()
        desk.answer()
        desk.kill_ticks()
        expect(recorded() == 1, f"{recorded()} changes of classes are recorded")
        with desk.people._server.lock:
            classes = desk.people.oracle.projects[1].labels
        expect(classes == ["ham", "junk"], f"Label Studio offers {classes}")
        votes: dict[str, set[str]] = {}
        for (key, _), label in desk.people.given.items():
            if label is not None:
                votes.setdefault(key.rsplit(":", 1)[1], set()).add({"spam": "junk"}.get(label, label))
        both = read_labeled(site.layout.labeled) + read_labeled(site.layout.test_labels)
        expect({row.item_id for row in both} == votes.keys(), "labels were lost")
        wrong = [row.item_id for row in both if {row.label} != votes[row.item_id]]
        expect(not wrong, f"labels were not mapped: {wrong[:3]}")
        desk.check()
