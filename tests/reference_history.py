"""What README and CONTRIBUTING say about answers and interventions, implemented as plainly as possible.

It keeps what it was told, in order, and recomputes everything from the beginning each time. It uses nothing of the
product's ledger, events or fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

WITHDRAWN = "(withdrawn)"


@dataclass(frozen=True)
class AnswerId:
    """An answer: the task, who gave it and when. An edit does not make it another answer."""

    task: str
    annotator: str
    created: str


@dataclass(frozen=True)
class Said:
    """A statement: the label that the answer has from now on, None for a skip, or that it was withdrawn."""

    answer: AnswerId
    item: str
    round: int
    label: str | None
    at: str
    held: bool = False
    """Whether a rollback excludes it."""


@dataclass(frozen=True)
class Closed:
    """The close of a round: everything before it is the round's snapshot."""

    round: int


@dataclass(frozen=True)
class Intervened:
    """A person's decision. `which`: the round restored, the intervention undone, or a test for answers."""

    number: int
    kind: str
    which: int | Callable[[Said], bool]
    round: int = 0
    """The round that was open."""


@dataclass(frozen=True)
class Corrected:
    """From now on an id stands for the text of `item`; the texts of `others` were wrong."""

    id: str
    item: str
    others: frozenset[str]


Entry = Said | Closed | Intervened | Corrected


def in_force(told: Sequence[Entry]) -> list[Entry]:
    """`told` without the interventions that were undone, with the statements that rollbacks exclude marked."""
    if not told:
        return []
    rest, last = list(told[:-1]), told[-1]
    if isinstance(last, Intervened) and last.kind == "undo":
        return in_force([e for e in rest if not (isinstance(e, Intervened) and e.number == last.which)])
    if isinstance(last, Intervened) and last.kind == "rollback":
        end = next(place for place, e in enumerate(rest) if isinstance(e, Closed) and e.round == last.which)
        held = [replace(e, held=True) for e in rest[end:] if isinstance(e, Said)]
        return [*in_force(rest[:end]), *held, last]
    return [*in_force(rest), last]


@dataclass
class Standing:
    """One answer's statements so far, and which of them count."""

    statements: list[tuple[int, Said]] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)

    def now(self) -> tuple[int, Said] | None:
        """The newest that counts, with its place; None if there is none or it was withdrawn."""
        counting = [one for one, yes in zip(self.statements, self.counts, strict=True) if yes]
        return counting[-1] if counting and counting[-1][1].label != WITHDRAWN else None

    def revoke(self, named: Callable[[Said], bool]) -> None:
        if (now := self.now()) and named(now[1]):
            self.counts = [False] * len(self.counts)

    def restore(self, named: Callable[[Said], bool]) -> None:
        given = [
            (said, yes) for (_, said), yes in zip(self.statements, self.counts, strict=True) if said.label != WITHDRAWN
        ]
        if given and not given[-1][1] and named(given[-1][0]):
            self.counts = [True] * len(self.counts)


def standing(told: Sequence[Entry]) -> dict[AnswerId, Standing]:
    """Every answer with its statements that count."""
    answers: dict[AnswerId, Standing] = {}
    abandoned: set[int] = set()
    for place, entry in enumerate(in_force(told)):
        if isinstance(entry, Said):
            one = answers.setdefault(entry.answer, Standing())
            one.statements.append((place, entry))
            one.counts.append(not entry.held and entry.round not in abandoned)
        elif isinstance(entry, Intervened):
            for one in answers.values():
                if entry.kind == "revoke":
                    assert callable(entry.which)
                    one.revoke(entry.which)
                elif entry.kind == "restore":
                    assert callable(entry.which)
                    one.restore(entry.which)
            if entry.kind == "rollback":
                assert isinstance(entry.which, int)
                abandoned |= set(range(entry.which + 1, entry.round + 1))
    return answers


@dataclass(frozen=True)
class Outcome:
    """The result of the answers, by item: label with agreement, answers and first round, or why it is unresolved."""

    labels: Mapping[str, tuple[str, float, int, int]]
    ties: frozenset[str]
    ignored: frozenset[str]


def outcome(told: Sequence[Entry], everybody: int | None) -> Outcome:
    """The labels. `everybody`: the number of people who may answer, if known."""
    answers = standing(told)
    by_item: dict[str, list[tuple[int, Said]]] = {}
    people = set()
    for one in answers.values():
        people |= {s.answer.annotator for (_, s), yes in zip(one.statements, one.counts, strict=True)
                   if yes and s.label != WITHDRAWN}  # fmt: skip
        if now := one.now():
            by_item.setdefault(now[1].item, []).append(now)
    enough = min(2, max(1, len(people) if everybody is None else everybody))
    corrected = {entry.id: entry.others for entry in in_force(told) if isinstance(entry, Corrected)}
    wrong = frozenset().union(*corrected.values())
    labels, ties, ignored = {}, set(), set(wrong)
    for item, said in by_item.items():
        if item in wrong:
            continue
        label, votes = majority(said)
        if label is not None:
            rounds = sorted({one.round for _, one in said})
            first = next(r for r in rounds if majority([s for s in said if s[1].round <= r])[0] is not None)
            given = [vote for vote in votes if vote is not None]
            labels[item] = (label, given.count(label) / len(given), len(given), first)
        elif any(vote is not None for vote in votes):
            asked = len({one.answer.task for _, one in said})
            (ignored if asked >= 2 else ties).add(item)
        elif len(votes) >= enough:
            ignored.add(item)
    return Outcome(labels, frozenset(ties), frozenset(ignored))


def majority(said: Iterable[tuple[int, Said]]) -> tuple[str | None, list[str | None]]:
    """The label that most people's newest answers give (None: a tie, or no answer), and those answers."""
    newest: dict[str, str | None] = {}
    for _, one in sorted(said, key=lambda pair: pair[0]):
        newest[one.answer.annotator] = one.label
    votes = list(newest.values())
    best = Counter(vote for vote in votes if vote is not None).most_common()
    clear = best and (len(best) == 1 or best[0][1] > best[1][1])
    return (best[0][0] if clear else None), votes


@dataclass
class Seen:
    """An answer as Label Studio shows it now. `task_since`: when the oldest copy of its task was created."""

    answer: AnswerId
    item: str
    round: int
    label: str | None
    updated: str


@dataclass
class Reference:
    """Everything that it was told, in order, and the result."""

    everybody: int | None = None
    told: list[Entry] = field(default_factory=list)
    lost_with_task: set[AnswerId] = field(default_factory=set)
    """Answers that stand although their task is gone."""

    def last(self) -> dict[AnswerId, Said]:
        """The newest statement of each answer that we know."""
        return {entry.answer: entry for entry in self.told if isinstance(entry, Said)}

    def pull(self, seen: Sequence[Seen], tasks: Mapping[str, str]) -> tuple[list[Entry], set[AnswerId]]:
        """The news, and the answers whose task is gone. `tasks`: push key -> creation time of its oldest copy."""
        last = self.last()
        news: list[Entry] = []
        for one in sorted(seen, key=lambda s: s.updated):
            before = last.get(one.answer)
            if before is None or before.label == WITHDRAWN or (before.label, before.at) != (one.label, one.updated):
                news.append(Said(one.answer, one.item, one.round, one.label, one.updated))
        there = {one.answer for one in seen}
        gone = set()
        for answer, said in last.items():
            if answer in there or said.label == WITHDRAWN:
                continue
            if answer.task not in tasks or answer.created < tasks[answer.task]:
                gone.add(answer)
            else:
                news.append(replace(said, label=WITHDRAWN))
        return news, gone - self.lost_with_task

    def vanished(self, news: Sequence[Entry], gone: set[AnswerId]) -> int:
        """The number of answers that vanished in a pull."""
        return sum(isinstance(e, Said) and e.label == WITHDRAWN for e in news) + len(gone)

    def take(self, news: Sequence[Entry], gone: set[AnswerId]) -> None:
        """Record a pull."""
        self.told += news
        back = {e.answer for e in news if isinstance(e, Said)}
        self.lost_with_task = (self.lost_with_task | gone) - back

    def outcome(self) -> Outcome:
        """The result of everything that it was told."""
        return outcome(self.told, self.everybody)
