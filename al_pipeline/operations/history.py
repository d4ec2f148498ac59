"""What was published: the records of rounds, read from the last commit and never from a half-built tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from al_pipeline.annotation.active_events import changed_by, items_of
from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.evaluation.online import Saved, labels_saved
from al_pipeline.integrations.git import Git
from al_pipeline.records import Event, PlannedTask, round_name
from al_pipeline.rounds.interventions import (
    Intervention,
    abandoned,
    holding,
    intervention_number,
    pausing,
    promoted,
    read_intervention,
    waiting,
)
from al_pipeline.rounds.manifests import (
    Record,
    RoundRecord,
    parse_genesis,
    parse_plan,
    parse_record,
    plan_number,
    record_number,
)
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import check_tree


@dataclass(frozen=True)
class History:
    """The published records at one commit."""

    revision: str
    genesis: Record | None
    rounds: tuple[RoundRecord, ...]
    """In the order of their numbers."""
    planned: int | None
    """The round whose plan is committed and whose record is not."""
    interventions: tuple[Intervention, ...] = ()
    """What people decided outside the ordinary course, in order."""

    @property
    def latest(self) -> Record | None:
        """The newest record: a round's, else the first build's."""
        return self.rounds[-1] if self.rounds else self.genesis

    @property
    def promoted(self) -> str | None:
        """The tag of the round whose model is the promoted one: the newest record or intervention that says so."""
        return promoted(self.interventions, [(r.round, r.decision.verdict == "promoted") for r in self.rounds])

    @property
    def abandoned(self) -> dict[int, int]:
        """The rounds that were rolled back, each with the number of the intervention."""
        return abandoned(self.interventions)

    @property
    def holding(self) -> Intervention | None:
        """The intervention for which new models wait for an approval."""
        return holding(self.interventions)

    @property
    def pausing(self) -> Intervention | None:
        """The intervention that has ticks do nothing."""
        return pausing(self.interventions)

    @property
    def waiting(self) -> list[Intervention]:
        """The interventions about labels that no published round has carried out yet."""
        return waiting(self.interventions, {carried.number for r in self.rounds for carried in r.interventions})

    def record(self, number: int) -> RoundRecord:
        """The record of one round. Raises NothingToDo where it is not published."""
        for record in self.rounds:
            if record.round == number:
                return record
        raise NothingToDo(f"{round_name(number)} is not published; `al rounds` lists those that are")


def read_history(layout: Layout, git: Git, revision: str = "HEAD") -> History:
    """The records at `revision`."""
    tree = git.tree(revision) if git.head() else {}
    modes = {name: mode for name, (mode, kind, _) in tree.items() if kind != "tree"}
    check_tree(modes, layout)
    genesis_name = layout.genesis.relative_to(layout.root).as_posix()
    numbered = {name: number for name in modes if (number := record_number(name)) is not None}
    wanted = [*([genesis_name] if genesis_name in modes else []), *sorted(numbered, key=lambda name: numbered[name])]
    spoken = sorted(name for name in modes if intervention_number(name) is not None)
    texts = git.read(revision, [*wanted, *spoken], tree)
    genesis = parse_genesis(texts[genesis_name], genesis_name) if genesis_name in wanted else None
    rounds = tuple(parse_record(texts[name], name) for name in wanted if name != genesis_name)
    plans = {number for name in modes if (number := plan_number(name)) is not None}
    open_rounds = plans - set(numbered.values())
    interventions = tuple(read_intervention(texts[name], name) for name in spoken)
    return History(revision, genesis, rounds, max(open_rounds, default=None), interventions)


def events_known(record: RoundRecord, events: Sequence[Event]) -> int:
    """How many of the ledger's `events`, from the first, round `record` knew: the ledger only grows.

    A record of layout 1 does not say; then it is those before the first answer to a later round's question.
    """
    if record.counts.events is not None:
        return record.counts.events
    return next((n for n, event in enumerate(events) if event.round > record.round), len(events))


def subjects(events: Sequence[Event]) -> dict[str, frozenset[str]]:
    """The items that each event speaks of, by event id: its own, or those of the events that it takes out or back."""
    by_id = {event.event_id: event for event in events}
    found: dict[str, frozenset[str]] = changed_by(events)

    def of(event_id: str) -> frozenset[str]:
        if event_id not in found:
            event = by_id.get(event_id)
            if event is None:
                return frozenset()
            found[event_id] = items_of(event)
            if event.targets and event.type != "correct":
                found[event_id] = frozenset().union(*map(of, event.targets))
        return found[event_id]

    return {event_id: of(event_id) for event_id in by_id}


def labels_saved_by(history: History, number: int | None) -> Saved | None:
    """What the random labels of rounds up to `number` (None: all) reach, and how few labels the rounds needed."""
    rounds = [record for record in history.rounds if number is None or record.round <= number]
    scores = [(record.counts.labelled, record.metrics.macro_f1.value) for record in rounds]
    return labels_saved(scores, rounds[-1].control if rounds else None)


def read_plan(git: Git, number: int, revision: str = "HEAD") -> list[PlannedTask]:
    """What round `number` asks, as committed. Raises RepositoryError where git has lost it."""
    return parse_plan(git.show(revision, f"rounds/{number:04d}/plan.jsonl") or "", number)


def read_plans(git: Git, revision: str = "HEAD") -> dict[str, PlannedTask]:
    """Every task that was ever planned, by its push key; of one that was kept for a later round, that round's row."""
    return {task.push_key: task for task in read_plan_rows(git, revision)}


def read_plan_rows(git: Git, revision: str = "HEAD") -> list[PlannedTask]:
    """All that every plan holds, in the order of the rounds: a task that was kept stands in several."""
    names = {name: number for name in git.files(revision, "rounds") if (number := plan_number(name)) is not None}
    texts = git.read(revision, sorted(names, key=lambda name: names[name]))
    return [task for name, text in texts.items() for task in parse_plan(text, names[name])]


def rounds_of(plans: Iterable[PlannedTask]) -> dict[str, int]:
    """The newest round whose plan holds an item, by item."""
    found: dict[str, int] = {}
    for task in plans:
        found[task.item_id] = max(found.get(task.item_id, task.round), task.round)
    return found


def round_number(text: str) -> int:
    """`7` or `round-0007` as a number. Raises BadInput."""
    digits = text.removeprefix("round-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 6):
        raise BadInput(f"{text!r} is no round; give a number such as 7, or a tag such as round-0007")
    return int(digits)
