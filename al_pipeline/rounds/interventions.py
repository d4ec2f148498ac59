"""Rulings: what a person decided about rounds, labels and models outside the ordinary course; never edited.

A ruling is made while a round is open: it comes after the record of the round before and before that round's own. One
that changes labels is carried out by the tick that closes this round; the others hold from the moment they are made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from al_pipeline.annotation.aggregation import ruling_key
from al_pipeline.errors import BadInput
from al_pipeline.records import Event, Intervention, Selection, event_digest, moment, round_name

Kind = Literal["rollback", "undo", "revoke", "restore", "approve", "pause", "resume", "ask"]

MAX_ITEMS = 10_000
"""That one ruling may name."""

_KINDS = frozenset(get_args(Kind))
_TAG = re.compile(r"round-\d{4,6}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_FILE = re.compile(r"rounds/rulings/(\d{6})\.json")


@dataclass(frozen=True, slots=True)
class Ruling:
    """One decision of a person."""

    number: int
    kind: Kind
    round: int
    """The round that was open."""
    by: str
    at: str
    reason: str
    labels: bool = False
    """Whether it changes the labelled set."""
    to: int | None = None
    """rollback: the round whose snapshot is gone back to."""
    parts: int | None = None
    """rollback: the number of the snapshot's last part of the ledger."""
    undoes: int | None = None
    selection: Selection | None = None
    serves: str | None = None
    """The tag of the round whose model is the promoted one from now on; None leaves that as it is."""
    hold: bool | None = None
    """Whether later models wait for an approval; None leaves that as it is."""
    params_from: str | None = None
    """The git revision whose `params.yaml` comes back."""
    before: Mapping[str, Any] | None = None
    """rollback: what an undo goes back to (`serves`, `hold`, `head`)."""
    items: tuple[str, ...] = ()
    """ask: the items of the pool that the next batch is to ask about."""

    def to_row(self) -> dict[str, Any]:
        """This ruling as a JSON object."""
        row = asdict(self)
        if self.selection is not None and self.selection.label is None:  # as earlier versions wrote it
            del row["selection"]["label"]
        return row | {"items": list(self.items)} if self.items else {k: v for k, v in row.items() if k != "items"}

    def summary(self) -> str:
        """What was decided, in a few words."""
        named = [*self.items[:3], *([f"{len(self.items) - 3} more"] if len(self.items) > 3 else [])]
        return {
            "rollback": f"rolled back to {round_name(self.to or 0)}",
            "undo": f"took ruling {self.undoes} back",
            "revoke": f"revoked answers ({self.selection})",
            "restore": f"restored answers ({self.selection})",
            "approve": f"approved the model of {self.serves}",
            "pause": "paused",
            "resume": "resumed",
            "ask": f"asked for {', '.join(named)}",
        }[self.kind]

    def sentence(self) -> str:
        """What was decided, by whom and why."""
        return f"{self.summary()} by {self.by} at {self.at}" + (f": {self.reason}" if self.reason else "")


def ruling_number(path: str) -> int | None:
    """Which ruling a file of the repository is; None where it is another file."""
    found = _FILE.fullmatch(path)
    return int(found[1]) if found else None


def read_ruling(text: str, path: str) -> Ruling:
    """The ruling in a file of the repository. Raises BadInput where it is something else."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    ruling = parse_ruling(row, path)
    if ruling.number != ruling_number(path):
        raise BadInput(f"{path} says that it is ruling {ruling.number}; `git log -p {path}` shows who wrote it")
    return ruling


def parse_ruling(row: Any, place: str) -> Ruling:
    """The ruling that `to_row` wrote. Raises BadInput naming `place` where it is something else."""
    known = {field.name for field in fields(Ruling)}
    try:
        if unknown := sorted(set(row) - known):
            raise ValueError(f"unknown key {unknown[0]!r}")
        selection = row.get("selection")
        items = row.get("items", [])
        if not isinstance(items, list) or len(items) > MAX_ITEMS or not all(isinstance(item, str) for item in items):
            raise TypeError("its items are none")
        chosen = None if selection is None else Selection(**selection)
        ruling = Ruling(**{**row, "selection": chosen, "items": tuple(items)})
        if ruling.kind not in _KINDS or type(ruling.number) is not int or type(ruling.round) is not int:
            raise ValueError("its kind, number or round is none")
        if not all(value is None or type(value) is int for value in (ruling.to, ruling.parts, ruling.undoes)):
            raise ValueError("a number is none")
        _check(ruling)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{place} is no ruling that this engine knows ({error}); was it written by a newer one?"
        ) from None
    return ruling


def _check(ruling: Ruling) -> None:
    """Raise TypeError or ValueError unless what `ruling` holds is of its kind and cannot pass for anything else.

    A revision is an argument of git's, a tag names a folder: neither may be what somebody likes.
    """
    chosen = ruling.selection or Selection()
    before = {} if ruling.before is None else dict(ruling.before)
    named = (text for text in (chosen.annotator, chosen.item, chosen.label) if text is not None)
    texts = (ruling.by, ruling.at, ruling.reason, *named)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a text is none")
    for tag in (ruling.serves, before.get("serves")):
        if tag is not None and not _TAG.fullmatch(tag):
            raise ValueError(f"{tag!r} names no round")
    for revision in (ruling.params_from, before.get("head")):
        if revision is not None and not (_TAG.fullmatch(revision) or _COMMIT.fullmatch(revision)):
            raise ValueError(f"{revision!r} names no commit")
    if not all(flag is None or type(flag) is bool for flag in (ruling.labels, ruling.hold, before.get("hold"))):
        raise TypeError("a yes or no is none")
    if chosen.round is not None and type(chosen.round) is not int:
        raise TypeError("a number is none")
    if chosen.since is not None:
        moment(chosen.since)
    if not all(0 <= value < 10**6 for value in (ruling.round, ruling.to or 0)):
        raise ValueError("a round has a number that none can have")


def in_effect(rulings: Sequence[Ruling]) -> list[Ruling]:
    """The rulings that stand, in order: those about labels that a later one took back are left out.

    An undo takes back the ruling that it names. A rollback takes back all that was made after the snapshot that it
    goes to, undos included: as of events, the newest decides.
    """
    gone: set[int] = set()
    standing = []
    for place in range(len(rulings) - 1, -1, -1):
        ruling = rulings[place]
        if ruling.number in gone:
            continue
        if ruling.kind == "undo" and ruling.undoes is not None:
            gone.add(ruling.undoes)
        if ruling.kind == "rollback" and ruling.labels and ruling.to is not None:
            gone |= {older.number for older in rulings[:place] if older.labels and older.round > ruling.to}
        standing.append(ruling)
    return standing[::-1]


def undoable(rulings: Sequence[Ruling]) -> Ruling | None:
    """The newest rollback that stands; None where none does."""
    undone = {ruling.undoes for ruling in rulings if ruling.kind == "undo"}
    standing = [r for r in in_effect(rulings) if r.kind == "rollback" and r.number not in undone]
    return standing[-1] if standing else None


def abandoned(rulings: Sequence[Ruling]) -> dict[int, int]:
    """The rounds whose answers do not count, even those that come in later, each with the ruling that says so."""
    found: dict[int, int] = {}
    for ruling in in_effect(rulings):
        if ruling.kind == "rollback" and ruling.labels and ruling.to is not None:
            found |= dict.fromkeys(range(ruling.to + 1, ruling.round + 1), ruling.number)
    return found


def holding(rulings: Sequence[Ruling]) -> Ruling | None:
    """The ruling for which new models wait for an approval; None where they do not."""
    newest = next((ruling for ruling in reversed(rulings) if ruling.hold is not None), None)
    return newest if newest is not None and newest.hold else None


def pausing(rulings: Sequence[Ruling]) -> Ruling | None:
    """The ruling that has ticks do nothing; None where they work."""
    newest = next((ruling for ruling in reversed(rulings) if ruling.kind in ("pause", "resume")), None)
    return newest if newest is not None and newest.kind == "pause" else None


def waiting(rulings: Iterable[Ruling], carried_out: Collection[int]) -> list[Ruling]:
    """The rulings about labels that no published round has carried out yet, in order."""
    return [ruling for ruling in rulings if ruling.labels and ruling.number not in carried_out]


def asked_for(rulings: Iterable[Ruling], planned: Mapping[str, int]) -> list[str]:
    """The items that people want asked and that no plan since has held, in the order in which they were named.

    `planned`: the newest round whose plan holds an item, by item. A batch that had no room leaves the rest waiting.
    """
    wanted = [(item, ruling.round) for ruling in rulings if ruling.kind == "ask" for item in ruling.items]
    return list(dict.fromkeys(item for item, number in wanted if planned.get(item, -1) <= number))


def promoted(rulings: Sequence[Ruling], rounds: Sequence[tuple[int, bool]]) -> str | None:
    """The tag of the round whose model is the promoted one; None where there is none.

    `rounds`: each published round's number and whether its record says promoted. The newest word counts; a ruling was
    spoken before the record of the round that was open.
    """
    words = [((number, 1, 0), round_name(number)) for number, yes in rounds if yes]
    words += [((r.round, 0, r.number), r.serves) for r in rulings if r.serves is not None]
    return max(words)[1] if words else None


def control_event(ruling: Ruling, snapshot_end: str | None = None) -> Event:
    """What the ledger holds of a ruling about labels: what it asks for, and no list of events.

    `snapshot_end`: for a rollback, the id of the last event that its snapshot knew.
    """
    if ruling.kind == "rollback":
        asked = Intervention("rollback", to=ruling.to or 0, after=snapshot_end)
    elif ruling.kind == "undo":
        asked = Intervention("undo", undoes=ruling.undoes or 0)
    else:
        kind: Literal["revoke", "restore"] = "restore" if ruling.kind == "restore" else "revoke"
        asked = Intervention(kind, selection=ruling.selection or Selection())
    return Event(
        event_id=event_digest("ruling", ruling.number, asked.to_row()),
        type="restore" if ruling.kind == "restore" else "quarantine",
        item_id="",
        content_hash="",
        part="pool",
        round=ruling.round,
        annotation_key=ruling_key(ruling.number),
        annotator=ruling.by,
        reason=ruling.sentence(),
        observed_at=ruling.at,
        intervention=asked,
    )
