"""The records of published rounds, read from a commit and never from a half-built work tree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from msgspec import Struct

from al_pipeline.annotation.active_events import changed_by, items_of
from al_pipeline.errors import BadInput, NothingToDo, RepositoryError, UnexpectedChange
from al_pipeline.evaluation.online import Saved, labels_saved
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.git.objects import Tree
from al_pipeline.operations.plan_cache import plan_rows
from al_pipeline.records import NOT_ASKED, Event, PlannedTask, round_name
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
    LiveQuestion,
    Record,
    RoundRecord,
    live_number,
    parse_genesis,
    parse_live,
    parse_plan,
    parse_record,
    plan_number,
    record_number,
    tasks_of_live,
)
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.trust import check_tree


class History(Struct, frozen=True):
    """The published records at one commit."""

    revision: str
    genesis: Record | None
    rounds: tuple[RoundRecord, ...]
    """In order of round number."""
    planned: int | None
    """The round whose plan is committed but whose record is not."""
    interventions: tuple[Intervention, ...] = ()
    """In order of their numbers."""
    open_plan: str = ""
    """The text of the open round's committed plan (`open_tasks`)."""
    open_live: str = ""
    """The text of the open round's live plan, as far as it was written; empty if it asks its batch."""

    @property
    def latest(self) -> Record | None:
        """The record of the newest round, else that of the first build."""
        return self.rounds[-1] if self.rounds else self.genesis

    @property
    def promoted(self) -> str | None:
        """The tag of the round whose model is promoted, according to the newest record or intervention about it."""
        return promoted(self.interventions, [(r.round, r.decision.verdict == "promoted") for r in self.rounds])

    @property
    def abandoned(self) -> dict[int, int]:
        """The rounds that were rolled back, each with the number of the intervention that did so."""
        return abandoned(self.interventions)

    @property
    def holding(self) -> Intervention | None:
        """The intervention that requires approval of new models; None if none does."""
        return holding(self.interventions)

    @property
    def pausing(self) -> Intervention | None:
        """The intervention that pauses ticks; None if they are not paused."""
        return pausing(self.interventions)

    @property
    def waiting(self) -> list[Intervention]:
        """The interventions about labels that no published round has carried out yet."""
        return waiting(self.interventions, {carried.number for r in self.rounds for carried in r.interventions})

    def open_tasks(self) -> list[PlannedTask]:
        """The tasks of the open round, as committed; none without an open round. Of a live round those asked so far."""
        return [question.task for question in self.asked_live()] or self.batch()

    def batch(self) -> list[PlannedTask]:
        """The tasks of the open round's batch, as committed: a live round asks as many, but not these."""
        return [] if self.planned is None else parse_plan(self.open_plan, self.planned)

    def asked_live(self) -> tuple[LiveQuestion, ...]:
        """What the open round asked live."""
        return () if self.planned is None else parse_live(self.open_live, self.planned)

    def record(self, number: int) -> RoundRecord:
        """The record of round `number`. Raises NothingToDo if it is not published."""
        for record in self.rounds:
            if record.round == number:
                return record
        raise NothingToDo(f"{round_name(number)} is not published; `al rounds` lists the published rounds")


def read_history(layout: Layout, git: Git, revision: str = "HEAD") -> History:
    """The history published at `revision`."""
    tree = _tree(git, revision)
    modes = {name: mode for name, (mode, kind, _) in tree.items() if kind != "tree"}
    check_tree(modes, layout)
    genesis_name = layout.genesis.relative_to(layout.root).as_posix()
    numbered = {name: number for name in modes if (number := record_number(name)) is not None}
    wanted = [*([genesis_name] if genesis_name in modes else []), *sorted(numbered, key=lambda name: numbered[name])]
    spoken = sorted(name for name in modes if intervention_number(name) is not None)
    plans = {number: name for name in modes if (number := plan_number(name)) is not None}
    planned = max(plans.keys() - set(numbered.values()), default=None)
    plan = [] if planned is None else [plans[planned]]
    texts = git.read(revision, [*wanted, *spoken, *plan], tree)
    live = "" if planned is None else _live_text(git, planned, revision)
    genesis = parse_genesis(texts[genesis_name], genesis_name) if genesis_name in wanted else None
    rounds = tuple(parse_record(texts[name], name) for name in wanted if name != genesis_name)
    interventions = tuple(read_intervention(texts[name], name) for name in spoken)
    return History(revision, genesis, rounds, planned, interventions, "".join(texts[name] for name in plan), live)


def _live_text(git: Git, number: int, revision: str) -> str:
    """The live plan of round `number` at `revision`; at HEAD with what was appended here since."""
    path = Layout(git.root).live_plan(number)
    committed = git.show(revision, path.relative_to(git.root).as_posix()) or ""
    if revision != "HEAD":
        return committed
    try:
        here = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return committed
    except UnicodeDecodeError:
        raise UnexpectedChange(f"{path} is not UTF-8: the engine did not write it; `git checkout -- {path}`") from None
    return here if here.startswith(committed) else committed


def _tree(git: Git, revision: str) -> Tree:
    """The files at `revision`; none before the first commit."""
    try:
        return git.tree(revision)
    except RepositoryError:
        if git.head():  # raises, with a better reason, if git cannot read it
            raise
        return {}


def events_known(record: RoundRecord, events: Sequence[Event]) -> int:
    """The number n such that round `record` knew the first n of the ledger's `events`; the ledger is append-only.

    A record of layout 1 does not store it; then n counts the events before the first one of a later round.
    """
    if record.counts.events is not None:
        return record.counts.events
    return next((n for n, event in enumerate(events) if event.round > record.round), len(events))


def events_of_plans(history: History, events: Sequence[Event]) -> dict[int, int]:
    """How many of the ledger's `events` the model that made a round's plan knew, by round."""
    found = {record.round + 1: events_known(record, events) for record in history.rounds}
    first = None if history.genesis is None else history.genesis.counts.events
    return found if first is None else {0: first, **found}


def subjects(events: Sequence[Event]) -> dict[str, frozenset[str]]:
    """The items that each event concerns, by event id: its own, or those of the events that it revokes or restores."""
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
    """The control's score and how few labels the rounds up to `number` (None: all) needed for it; None without one.

    Only rounds with the same classes as the last of them: scores of other classes are of another task.
    """
    rounds = [record for record in history.rounds if number is None or record.round <= number]
    rounds = same_classes(rounds)
    scores = [(record.counts.labelled, record.metrics.macro_f1.value) for record in rounds]
    if not rounds:
        return None
    newest, seconds = rounds[-1], [None if one.cost is None else one.cost.pool_seconds for one in rounds]
    random_seconds = None if newest.cost is None else newest.cost.random_seconds
    relabels = any(record.params.select.relabel for record in rounds)
    return labels_saved(scores, newest.control, seconds, random_seconds, relabels)


def same_classes(rounds: Sequence[RoundRecord]) -> list[RoundRecord]:
    """The last of `rounds` and those directly before it that have the same classes."""
    found: list[RoundRecord] = []
    for record in reversed(rounds):
        if found and set(record.params.schema_.labels) != set(found[0].params.schema_.labels):
            break
        found.insert(0, record)
    return found


def read_live(git: Git, number: int, revision: str = "HEAD") -> tuple[LiveQuestion, ...]:
    """What round `number` asked live; empty if it asked its batch."""
    return parse_live(_live_text(git, number, revision), number)


def read_plan(git: Git, number: int, revision: str = "HEAD") -> list[PlannedTask]:
    """The tasks of round `number`, as committed; of a live round those asked. RepositoryError if git has lost them."""
    if live := read_live(git, number, revision):
        return [question.task for question in live]
    return parse_plan(git.show(revision, f"rounds/{number:04d}/plan.jsonl") or "", number)


def read_plans(git: Git, revision: str = "HEAD") -> dict[str, PlannedTask]:
    """Every task ever planned, by push key; for a task carried over to later rounds, the last round's row."""
    return {task.push_key: task for task in read_plan_rows(git, revision)}


def all_plans(git: Git) -> Iterable[PlannedTask]:
    """Every task ever planned, as `read_plans`."""
    return read_plans(git).values()


def read_plan_rows(git: Git, revision: str = "HEAD") -> list[PlannedTask]:
    """The rows of all plans, in order of round; a task that was carried over appears in several.

    Of a live round also the tasks of its batch that it did not ask, with the strategy NOT_ASKED.
    """
    tree = git.tree(revision, "rounds")
    names = {number: name for name in tree if (number := plan_number(name)) is not None}
    live = {number: name for name in tree if (number := live_number(name)) is not None}

    def parse(numbers: Sequence[int]) -> dict[int, tuple[PlannedTask, ...]]:
        wanted = [*(names[number] for number in numbers), *(live[number] for number in numbers if number in live)]
        texts = git.read(revision, wanted, tree)
        found = {number: tuple(parse_plan(texts[names[number]], number)) for number in numbers}
        asked = {number: parse_live(texts[live[number]], number) for number in numbers if number in live}
        return {**found, **{number: tasks_of_live(found[number], own) for number, own in asked.items()}}

    objects = {number: tree[names[number]][2] for number in sorted(names)}
    for number, name in live.items():
        if number in objects:
            objects[number] += tree[name][2]
    last = max(objects, default=None) if revision == "HEAD" else None
    if last is None or not Layout(git.root).live_plan(last).exists():
        return list(chain.from_iterable(plan_rows(Layout(git.root).plans_read, objects, parse)))
    del objects[last]  # still grows
    before = chain.from_iterable(plan_rows(Layout(git.root).plans_read, objects, parse))
    plan = parse_plan(git.show(revision, names[last]) or "", last)
    asked = parse_live(_live_text(git, last, revision), last)
    return [*before, *(tasks_of_live(plan, asked) if asked else plan)]


def rounds_of(plans: Iterable[PlannedTask]) -> dict[str, int]:
    """The newest round whose plan contains each item, by item id."""
    found: dict[str, int] = {}
    for task in plans:
        if task.strategy == NOT_ASKED:
            continue
        found[task.item_id] = max(found.get(task.item_id, task.round), task.round)
    return found


def round_number(text: str) -> int:
    """Parse a round number such as `7` or `round-0007`. Raises BadInput for anything else."""
    digits = text.removeprefix("round-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 6):
        raise BadInput(f"{text!r} is not a round; give a number such as 7, or a tag such as round-0007")
    return int(digits)
