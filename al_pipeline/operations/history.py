"""What was published: the records of rounds, read from the last commit and never from a half-built tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.layout import Layout
from al_pipeline.manifests import parse_plan, parse_record, plan_number, record_number
from al_pipeline.records import PlannedTask, round_name
from al_pipeline.repository import Git
from al_pipeline.trust import check_tree

Record = dict[str, Any]
"""One round's manifest, as `rounds/NNNN/round.json` holds it."""


@dataclass(frozen=True)
class History:
    """The published records at one commit."""

    revision: str
    genesis: Record | None
    rounds: tuple[Record, ...]
    """In the order of their numbers."""
    planned: int | None
    """The round whose plan is committed and whose record is not."""

    @property
    def latest(self) -> Record | None:
        """The newest record: a round's, else the first build's."""
        return self.rounds[-1] if self.rounds else self.genesis

    @property
    def promoted(self) -> str | None:
        """The tag of the round whose model is the promoted one: the newest record that says so."""
        return next(
            (round_name(r["round"]) for r in reversed(self.rounds) if r["decision"]["verdict"] == "promoted"), None
        )

    def record(self, number: int) -> Record:
        """The record of one round. Raises NothingToDo where it is not published."""
        for record in self.rounds:
            if record["round"] == number:
                return record
        raise NothingToDo(f"{round_name(number)} is not published; `al rounds` lists those that are")


def read_history(layout: Layout, git: Git, revision: str = "HEAD") -> History:
    """The records at `revision`."""
    modes = git.modes(revision) if git.head() else {}
    check_tree(modes, layout)
    genesis_name = layout.genesis.relative_to(layout.root).as_posix()
    numbered = {name: number for name in modes if (number := record_number(name)) is not None}
    wanted = [*([genesis_name] if genesis_name in modes else []), *sorted(numbered, key=lambda name: numbered[name])]
    found = {name: parse_record(text, name) for name, text in git.read(revision, wanted).items()}
    genesis = found.pop(genesis_name, None)
    plans = {number for name in modes if (number := plan_number(name)) is not None}
    open_rounds = plans - set(numbered.values())
    return History(revision, genesis, tuple(found.values()), max(open_rounds, default=None))


def read_plan(git: Git, number: int, revision: str = "HEAD") -> list[PlannedTask]:
    """What round `number` asks, as committed."""
    return parse_plan(git.show(revision, f"rounds/{number:04d}/plan.jsonl") or "", number)


def read_plans(git: Git, revision: str = "HEAD") -> dict[str, PlannedTask]:
    """Every task that was ever planned, by its push key."""
    names = {name: number for name in git.files(revision, "rounds") if (number := plan_number(name)) is not None}
    texts = git.read(revision, list(names))
    return {task.push_key: task for name, text in texts.items() for task in parse_plan(text, names[name])}


def round_number(text: str) -> int:
    """`7` or `round-0007` as a number. Raises BadInput."""
    digits = text.removeprefix("round-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 6):
        raise BadInput(f"{text!r} is no round; give a number such as 7, or a tag such as round-0007")
    return int(digits)
