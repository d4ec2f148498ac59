"""Random histories of answers, losses and interventions, checked against a reference that recomputes everything.

The product's pull, ledger, close and fold run on real files, with the simulated oracle as Label Studio. A history is a
list of steps, each a name and a seed for its choices, so that any step can be left out.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from annotating import shown
from msgspec.structs import replace
from reference_history import (
    WITHDRAWN,
    AnswerId,
    Closed,
    Corrected,
    Intervened,
    Outcome,
    Reference,
    Said,
    Seen,
    in_force,
    standing,
)

from al_pipeline.annotation.active_events import active, standing_answers, superseded
from al_pipeline.annotation.aggregation import Folded, fold
from al_pipeline.annotation.tasks import worth_asking
from al_pipeline.annotation.votes import times_asked
from al_pipeline.data.ledger import (
    add_to_inbox,
    append_inbox,
    append_part,
    last_part,
    read_events,
    read_refused,
    still_refused,
)
from al_pipeline.errors import ManualActionRequired, VanishedAnswers
from al_pipeline.integrations.oracle import ProjectSpec
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.operations import pull as pulling
from al_pipeline.operations.answers import answers_given
from al_pipeline.operations.close import carry_out
from al_pipeline.operations.pull import ROLLING, PullRequest, pull
from al_pipeline.operations.push import RetirePolicy, push, retire
from al_pipeline.params import Schema
from al_pipeline.records import Event, PlannedTask, Selection, Task, event_digest, push_key
from al_pipeline.rounds.interventions import Intervention, Kind, abandoned, undoable
from al_pipeline.workspace.layout import Layout

PEOPLE = ("ann@example.org", "bob@example.org", "eve@example.org")
CLASSES = ("ham", "spam", "news", "lists")
JUNK = "???"
WORKSPACE = "0123456789ab"
NOW = "2027-01-01T00:00:00+00:00"
MAX_VANISHED = 2
BATCH = 3

Step = tuple[str, int]
"""A kind of step, and the seed of its choices."""

WEIGHTS = {
    "answer": 12,
    "delete": 2,
    "delete_task": 1,
    "duplicate_task": 1,
    "back_up_the_server": 1,
    "restore_the_server": 1,
    "pull_again": 2,
    "more_items": 1,
    "correct": 2,
    "another_class": 1,
    "close_the_round": 3,
    "roll_back": 3,
    "undo": 3,
    "revoke": 2,
    "restore": 1,
}


def steps_of(seed: int, length: int = 40) -> list[Step]:
    """The history of a seed."""
    draw = random.Random(seed)
    names = draw.choices(list(WEIGHTS), list(WEIGHTS.values()), k=length)
    return [("begin", draw.randrange(10**6)), *((name, draw.randrange(10**6)) for name in names)]


def play(steps: Sequence[Step], *, pause: float = 0.0, rolling: int = ROLLING, audits: bool = False) -> None:
    """Play a history; AssertionError if a property is violated.

    `pause`: seconds between two steps, after which a pull reads less than everything; `rolling`: how many tasks the
    rolling check of an audit reads, at least; `audits`: every pull is an audit.
    """
    memory = Path("/dev/shm")  # these files are not read after a power loss, and fsync is slow
    place = tempfile.TemporaryDirectory(prefix="al-history-", dir=memory if memory.is_dir() else None)
    with place as folder, mock.patch.object(pulling, "ROLLING", rolling):
        world = World(Path(folder), audits=audits)
        for name, salt in steps:
            world.draw = random.Random(salt)
            getattr(world, name)()
            world.oracle.pass_time(pause)


def fails(steps: Sequence[Step], **how: Any) -> Exception | None:
    """The error with which a history ends, played as `play` takes it; None if it ends well."""
    try:
        play(steps, **how)
    except Exception as error:  # any other exception is a failure too
        return error
    return None


def shortest(steps: Sequence[Step], **how: Any) -> list[Step]:
    """A failing history reduced to the steps that it needs to fail."""
    steps = list(steps)
    size = len(steps) // 2
    while size:
        place = 1
        while place < len(steps):
            fewer = [*steps[:place], *steps[place + size :]]
            if fails(fewer, **how):
                steps = fewer
            else:
                place += size
        size //= 2
    return steps


def check(steps: Sequence[Step], **how: Any) -> None:
    """Play a history; if it fails, report how the shortest failing part of it fails."""
    if fails(steps, **how):
        short = shortest(steps, **how)
        raise AssertionError(f"this history fails, played with {how}: {short}") from fails(short, **how)


@dataclass
class Published:
    """What a round's record says about its snapshot."""

    part: int
    folded: Folded


class World:
    """One workspace, its Label Studio, its people, and the reference."""

    def __init__(self, folder: Path, *, audits: bool = False) -> None:
        self.folder, self.layout, self.draw, self.audits = folder, Layout(folder), random.Random(0), audits
        for path in (self.layout.events, self.layout.inbox_events, self.layout.private):
            path.mkdir(parents=True)

    def begin(self) -> None:
        """Create a pool and a project, and ask the first questions."""
        self.items = [f"item-{number}" for number in range(self.draw.randint(3, 8))]
        self.classes = list(CLASSES[:2])
        self.oracle = SimulatedOracle()
        self.ref = self.oracle.ensure_project(ProjectSpec(WORKSPACE, "c", self.schema))
        self.everybody = self.draw.choice([None, len(PEOPLE)])
        self.reference = Reference(self.everybody)
        self.plans: dict[str, PlannedTask] = {}
        self.interventions: list[Intervention] = []
        self.published: dict[int, Published] = {}
        self.round = 0
        self.saved = self.oracle.backup()
        self.look_everywhere = False
        self.plan()
        self.pull()

    # What the product does -------------------------------------------------------------------------------------------

    @property
    def schema(self) -> Schema:
        return Schema(version=len(self.classes), question="?", labels=self.classes, fields=["text"])

    def fold(self) -> Folded:
        events = read_events(self.layout.events, self.layout.inbox_events)
        return fold(events, self.classes, self.everybody, times_asked(events))

    def plan(self, kept: Sequence[PlannedTask] = ()) -> None:
        """Plan the kept items and the first items without a label, as a selection would."""
        for task in kept:
            self.plans[task.push_key] = replace(task, round=self.round)
        folded = self.fold()
        settled = {row.item_id for row in folded.labeled} | {task.item_id for task in kept}
        settled |= {row.item_id for row in folded.unresolved if row.kind == "ignored"}
        chosen = [item for item in self.items if item not in settled][: max(0, BATCH - len(kept))]
        for rank, item in enumerate(chosen):
            key = push_key(WORKSPACE, self.round, item)
            self.plans[key] = PlannedTask(key, item, f"hash {item}", "pool", self.round, rank, 0.0, "margin", 1.0)

    def tasks(self, number: int | None = None) -> list[Task]:
        wanted = self.round if number is None else number
        return [Task(plan, {"text": plan.item_id}) for plan in self.plans.values() if plan.round == wanted]

    def pull(self) -> None:
        """Retire, push and pull, as a tick does; the product and the reference then know the same."""
        wrong = superseded(read_events(self.layout.events, self.layout.inbox_events))
        void = {key for key, plan in self.plans.items() if plan.item_id in wrong}
        policy = RetirePolicy(self.round, abandoned(self.interventions), plans=self.plans, superseded=wrong)
        retire(self.oracle, self.ref, policy)
        assert not void & {task.push_key for task in self.oracle.open_tasks(self.ref)}, "nobody is asked about them"
        try:
            self._push([task for task in self.tasks() if task.plan.push_key not in void])
        except ManualActionRequired:  # two copies of a task are answered: a person must choose
            self.look_everywhere = True
        seen, born = self.seen()
        news, gone = self.reference.pull(seen, born)
        audit, self.look_everywhere = self.look_everywhere or self.audits, False
        before = self.told()
        request = PullRequest(self.ref, self.plans, self.schema, (), NOW, MAX_VANISHED, audit=audit)
        for accept in (False, True):
            try:
                pull(self.layout, self.oracle, replace(request, accept_vanished=accept))
                assert self.reference.vanished(news, gone) <= MAX_VANISHED or accept, "too many vanished unnoticed"
                break
            except VanishedAnswers:
                assert self.reference.vanished(news, gone) > MAX_VANISHED
                assert self.told() == before, "nothing is recorded"
        self.reference.take(news, gone)
        self.check()
        kept = self.layout.pull_state.read_bytes() if self.layout.pull_state.exists() else None  # nobody answered yet
        self.layout.pull_state.unlink(missing_ok=True)
        again = pull(self.layout, self.oracle, replace(request, max_vanished=0, audit=True))
        assert not again.events, "what was pulled is not pulled again, and an audit that reads everything finds no more"
        if kept is not None:
            self.layout.pull_state.write_bytes(kept)

    def told(self) -> list[str]:
        return [event.event_id for event in read_events(self.layout.events, self.layout.inbox_events)]

    def seen(self) -> tuple[list[Seen], dict[str, str]]:
        """What Label Studio shows, and when the oldest copy of each of our tasks was created."""
        seen, born = [], {}
        for task in self.held().values():
            key = str(task.data["push_key"])
            born[key] = min(born.get(key, task.created_at), task.created_at)
            for one in task.annotations.values():
                label = None if one.was_cancelled else _chosen(one.result)
                if label is None or label in self.classes:
                    answer = AnswerId(key, one.annotator, one.created_at)
                    seen.append(Seen(answer, self.plans[key].item_id, self.plans[key].round, label, one.updated_at))
        return seen, born

    def close(self, made: list[Intervention]) -> None:
        """What `close` does to the ledger; if killed after the append, it is repeated from the start."""
        self.interventions += made
        consumed: list[Path] = []
        for _ in range(self.draw.choice([1, 2])):
            consumed = append_inbox(self.layout.inbox_events, self.layout.events)
            append_part(self.layout.events, carry_out(made, self.layout.events))
        for path in consumed:
            path.unlink(missing_ok=True)
        self.reference.told.append(Closed(self.round))
        self.published[self.round] = Published(last_part(self.layout.events), self.fold())
        self.check()
        kept = self.kept() if made else []
        self.round += 1
        self.plan(kept)

    def kept(self) -> list[PlannedTask]:
        """The items that an intervention leaves with the annotators: at least those of the round without any statement,
        unless other answers settle the item."""
        events = read_events(self.layout.events)
        refused = {str(row["push_key"]) for row in still_refused(read_refused(self.layout.events), events)}
        plans = [task.plan for task in self.tasks()]
        found = worth_asking(plans, events, self.fold(), 1, self.everybody, refused)
        assert all(task in plans for task in found)
        outcome, heard = self.reference.outcome(), {answer.task for answer in self.reference.last()} | refused
        settled = outcome.labels.keys() | outcome.ignored
        untouched = [plan for plan in plans if plan.push_key not in heard and plan.item_id not in settled]
        assert set(untouched) <= set(found)
        last = standing(self.reference.told)
        for task in found:
            said = [one.statements[-1][1] for answer, one in last.items() if answer.task == task.push_key]
            assert all(one.label in (WITHDRAWN, None) for one in said), "no answer of it is in Label Studio"
        return found

    # What must hold --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """The labels equal the reference's, the pool is partitioned, and nothing was lost or recorded twice."""
        folded, expected = self.fold(), self.reference.outcome()
        labels = {row.item_id: (row.label, row.agreement, row.answers, row.round) for row in folded.labeled}
        ties = {row.item_id for row in folded.unresolved if row.kind == "tie"}
        ignored = {row.item_id for row in folded.unresolved if row.kind == "ignored"}
        assert Outcome(labels, frozenset(ties), frozenset(ignored)) == expected
        assert labels.keys() | ties | ignored <= set(self.items)
        assert len(labels) + len(ties) + len(ignored) == len(labels.keys() | ties | ignored)
        events = read_events(self.layout.events, self.layout.inbox_events)
        measured: dict[str, list[str]] = {}
        for given, _ in answers_given(active(events)):
            if given.label is not None:
                measured.setdefault(given.item, []).append(given.label)
        for item, (label, share, answers, _) in labels.items():
            mine = measured[item]
            assert (len(mine), mine.count(label) / len(mine)) == (answers, share), "what is measured is what is folded"
        assert not measured.keys() - labels.keys() - ties - ignored
        statements = [entry for entry in self.reference.told if isinstance(entry, Said)]
        assert sum(event.type in ("label", "skip", "supersede", "delete") for event in events) == len(statements)
        assert len({event.event_id for event in events}) == len(events)
        goes, at = set(), [e for e in in_force(self.reference.told) if isinstance(e, Intervened)]
        for one in at:
            if one.kind == "rollback":
                assert isinstance(one.which, int)
                goes |= set(range(one.which + 1, one.round + 1))
        assert set(abandoned(self.interventions)) == goes

    # What people do --------------------------------------------------------------------------------------------------

    def answer(self) -> None:
        """Answer in time, late, or to an abandoned round; edit one's own answer, or add a second one."""
        for _ in range(self.draw.randint(1, 4)):
            if not self.keys():  # the server was restored to before the first task
                break
            newest = sorted(self.keys(), key=lambda key: -self.plans[key].round)
            key = self.draw.choice(newest[: self.draw.choice([3, 3, 99])])
            task = self.draw.choice([t for t in self.held().values() if t.data["push_key"] == key])
            who = self.draw.choice(PEOPLE)
            label = self.draw.choice([*CLASSES[:2] * 3, *CLASSES[2:], None, None, JUNK])
            mine = [number for number, a in task.annotations.items() if a.annotator == who]
            if mine and self.draw.random() < 0.7:
                self.oracle.edit(mine[-1], label or [], cancelled=label is None)
            else:
                self.oracle._annotate(task, who, label or [], cancelled=label is None)
        self.perhaps_pull()

    def delete(self) -> None:
        if numbers := sorted(n for task in self.held().values() for n in task.annotations):
            self.oracle.delete_annotation(self.draw.choice(numbers))
        self.perhaps_pull()

    def delete_task(self) -> None:
        if len(keys := sorted(self.keys())) > 1:
            self.oracle.delete_task(self.draw.choice(keys))
            self.look_everywhere = True
        self.perhaps_pull()

    def duplicate_task(self) -> None:
        """An import whose reply was lost and which is repeated."""
        if not (keys := sorted(self.keys())):
            return
        plan = self.plans[self.draw.choice(keys)]
        self.oracle.import_tasks(self.ref, [Task(plan, {"text": plan.item_id})])
        self.look_everywhere = True

    def back_up_the_server(self) -> None:
        self.saved = self.oracle.backup()

    def restore_the_server(self) -> None:
        """Restore a backup: ids given since then are given again."""
        self.oracle.restore_backup(self.saved)
        self.look_everywhere = True
        self.perhaps_pull()

    def pull_again(self) -> None:
        if self.draw.random() < 0.5:  # killed between inbox and cursor, or the cursor's file is gone
            self.layout.pull_state.unlink(missing_ok=True)
        self.pull()

    def more_items(self) -> None:
        self.items.append(f"item-{len(self.items)}")

    def correct(self) -> None:
        """Correct a text, for the first time or again, or restore an earlier one."""
        root = self.draw.choice([item for item in self.items if "~" not in item])
        family = [item for item in self.items if item.split("~")[0] == root]
        wrong = superseded(read_events(self.layout.events, self.layout.inbox_events))
        known = [event for event in self.events() if event.annotation_key == f"correction:{root}"]
        now = next((event.item_id for event in reversed(known) if set(event.targets) <= wrong.keys()), root)
        item = self.draw.choice([one for one in family if one != now] or [""])
        if not item or self.draw.random() < 0.6:
            item = f"{root}~{len(family) + 1}"
            self.items.append(item)
            family.append(item)
        others = [one for one in family if one != item]
        made = Event(
            event_id=event_digest("correct", root, item, known[-1].event_id if known else None),
            type="correct",
            item_id=item,
            content_hash=f"hash {item}",
            part="pool",
            round=-1,
            annotation_key=f"correction:{root}",
            annotator="import",
            targets=tuple(others),
        )
        add_to_inbox(self.layout.inbox_events, [made], ledger=self.layout.events)
        self.reference.told.append(Corrected(root, item, frozenset(others)))
        self.check()
        self.perhaps_pull()

    def events(self) -> list[Event]:
        return read_events(self.layout.events, self.layout.inbox_events)

    def another_class(self) -> None:
        """Add a class: answers that named it before were refused and are now read again."""
        if len(self.classes) < len(CLASSES):
            self.classes.append(CLASSES[len(self.classes)])
            self.oracle.ensure_project(ProjectSpec(WORKSPACE, "c", self.schema), self.ref)
            self.look_everywhere = True
            self.pull()

    def perhaps_pull(self) -> None:
        if self.draw.random() < 0.6:
            self.pull()

    def _push(self, tasks: list[Task]) -> None:
        push(self.oracle, self.ref, [task.plan for task in tasks], shown(tasks), sleep=lambda _: None)

    def held(self) -> dict[int, Any]:
        """The tasks in Label Studio."""
        return self.oracle.projects[self.ref.project_id].tasks

    def keys(self) -> set[str]:
        """Push keys of the tasks in Label Studio; if there are none, the plan is pushed first."""
        if not self.held():
            self._push(self.tasks() or self.tasks(0))
        return {str(task.data["push_key"]) for task in self.held().values()}

    # What is decided -------------------------------------------------------------------------------------------------

    def close_the_round(self) -> None:
        self.look_everywhere = True
        self.pull()
        self.close([])
        self.pull()

    def intervention(self, kind: Kind, **values: Any) -> Intervention:
        number = len(self.interventions) + 1
        return Intervention(number, kind, self.round, "ann", "2026-01-01T00:00:00+00:00", "", labels=True, **values)

    def roll_back(self) -> None:
        self.perhaps_pull()
        if not self.published:
            return
        to = self.draw.choice(sorted(self.published))
        made = self.intervention("rollback", to=to, parts=self.published[to].part)
        self.reference.told.append(Intervened(made.number, "rollback", to, self.round))
        self.close([made])
        assert self.published[self.round - 1].folded == self.published[to].folded, "the snapshot's labels"
        self.perhaps_pull()

    def undo(self) -> None:
        self.perhaps_pull()
        standing = [e for e in in_force(self.reference.told) if isinstance(e, Intervened) and e.kind == "rollback"]
        last = undoable(self.interventions)
        assert (last.number if last else None) == (standing[-1].number if standing else None)
        if last is not None:
            made = self.intervention("undo", undoes=last.number)
            self.reference.told.append(Intervened(made.number, "undo", last.number, self.round))
            self.close([made])
        self.perhaps_pull()

    def revoke(self) -> None:
        before = self.standing()
        self.amend("revoke")
        assert self.standing().items() <= before.items(), "a revocation only takes answers out"

    def restore(self) -> None:
        self.amend("restore")

    def amend(self, kind: Literal["revoke", "restore"]) -> None:
        selection, named = self.some_answers()
        made = self.intervention(kind, selection=selection)
        self.reference.told.append(Intervened(made.number, kind, named, self.round))
        self.close([made])

    def some_answers(self) -> tuple[Selection, Callable[[Said], bool]]:
        """A selection of answers, and the same one for the reference."""
        # Drawn one after the other, so that stored histories stay the same.
        by = self.draw.choice([("annotator",), ("round",), ("item",), ("since",), ("annotator", "since")])
        who = self.draw.choice(PEOPLE) if "annotator" in by else None
        number = self.draw.randint(0, self.round) if "round" in by else None
        item = self.draw.choice(self.items) if "item" in by else None
        since = None
        if "since" in by:
            stamps = sorted({e.at for e in self.reference.told if isinstance(e, Said)})
            since = self.draw.choice(stamps) if stamps else NOW

        label = self.draw.choice(CLASSES) if self.draw.random() < 0.25 else None
        if label is not None and self.draw.random() < 0.5:
            who = number = item = since = None

        def named(said: Said) -> bool:
            return (
                (label is None or said.label == label)
                and (who is None or said.answer.annotator == who)
                and (number is None or said.round == number)
                and (item is None or said.item == item)
                and (since is None or said.at >= since)
            )

        return Selection(who, number, item, since, label), named

    def standing(self) -> dict[str, str | None]:
        events = read_events(self.layout.events, self.layout.inbox_events)
        return {key: event.label for key, event in standing_answers(events).items()}


def _chosen(result: Sequence[Any]) -> str:
    """The class that an answer chooses."""
    return str(result[0]["value"]["choices"][0]) if result else JUNK
