"""Aggregation of annotations into labels: majority vote, overruled by adjudications and gold labels.

The result does not depend on how the events of different people are interleaved in the ledger, except that the newest
adjudication wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from msgspec import Struct

from al_pipeline.annotation.active_events import active, corrected_items
from al_pipeline.annotation.schema_change import missing_in_use
from al_pipeline.annotation.votes import Answer, answers_of, by_item, first_round, people, resolve, votes_of
from al_pipeline.errors import BadInput, SchemaInUse
from al_pipeline.records import Event, LabeledItem, Part, Unresolved

MAX_SKIPS = 2
"""An item skipped by this many people (or by all, if there are fewer) is no longer queried."""
MAX_ASKED = 2
"""An item that is still tied after this many rounds is ignored."""


class Folded(Struct, frozen=True):
    """Result of the aggregation. An item in none of the three has no label yet and may be queried (again)."""

    labeled: tuple[LabeledItem, ...]
    """Labelled items of the pool, by item id."""
    test: tuple[LabeledItem, ...]
    """Labelled items of the test set, by item id."""
    unresolved: tuple[Unresolved, ...]
    """Items of both whose annotations give no label, by item id."""


class _Rules(Struct, frozen=True):
    """The rules for items without a label."""

    labels: Sequence[str]
    enough_skips: int
    asked: Mapping[str, int]

    def unresolved(
        self, item_id: str, part: Part, tied: frozenset[str], answers: Iterable[Answer]
    ) -> Unresolved | None:
        """The record of an item whose annotations give no label; None if it may simply be queried again."""
        asked = self.asked.get(item_id, 0)
        if tied:
            between = " and ".join(label for label in self.labels if label in tied)
            if asked >= MAX_ASKED:
                return Unresolved(item_id, part, "ignored", f"still a tie of {between} after {asked} rounds", asked)
            return Unresolved(item_id, part, "tie", f"a tie of {between}", asked)
        skips = len(votes_of(answers))
        if skips >= self.enough_skips:
            who = "1 person, the only one there is" if skips == 1 else f"{skips} people"
            return Unresolved(item_id, part, "ignored", f"skipped by {who}", asked)
        return None


def fold(
    events: Sequence[Event], labels: Sequence[str], everybody: int | None = None, asked: Mapping[str, int] | None = None
) -> Folded:
    """The labelled set, the labelled test set, and the items that are unresolved.

    `labels`: the schema's classes. `everybody`: the number of possible annotators; None: of those with a vote so far.
    `asked`: the number of rounds in which each item was queried, by item id.

    Each annotator has one vote on an item: the newest annotation. The newest adjudication or gold label wins; else the
    class with the most votes; else, if no person gave a label, the imported label. Equal numbers of votes for two or
    more classes are a tie: the item is unresolved, and ignored once it was queried in two rounds. Items that nobody
    labelled and two people (or `everybody`) skipped are ignored. So are items whose text was corrected, since their
    annotations are about another text.

    Raises SchemaInUse if an annotation names a class that the schema lacks, BadInput on events that contradict each
    other about an item's content or part.
    """
    counted = active(events)
    rules = _Rules(labels, skips_to_give_up(counted, everybody), asked or {})
    events_of = by_item(counted)
    labeled: list[LabeledItem] = []
    test: list[LabeledItem] = []
    unresolved: list[Unresolved] = []
    unknown: Counter[str] = Counter()
    corrected = corrected_items(counted)
    parts: dict[str, Part] = {event.item_id: event.part for event in counted if event.type == "correct"}
    for item_id in sorted(events_of.keys() | corrected.keys()):
        if now := corrected.get(item_id):
            reason = f"its text was corrected: {now}"
            unresolved.append(Unresolved(item_id, parts[now], "ignored", reason, rules.asked.get(item_id, 0)))
            continue
        content, part = _identity(item_id, events_of[item_id])
        answers = answers_of(events_of[item_id]).values()
        unknown.update(a.label for a in answers if a.label is not None and a.label not in labels)
        only = next(iter(answers)) if len(answers) == 1 else None
        if only is not None and only.label is not None:  # most items; the rules below give the same
            (labeled if part == "pool" else test).append(LabeledItem(item_id, content, only.label, 1.0, 1, only.round))
            continue
        result = resolve(answers)
        if isinstance(result, str):
            (labeled if part == "pool" else test).append(_labeled_item(item_id, content, result, answers))
        elif row := rules.unresolved(item_id, part, result, answers):
            unresolved.append(row)
    if problem := missing_in_use(labels, {name: f"{count} answers" for name, count in sorted(unknown.items())}):
        raise SchemaInUse(problem)
    return Folded(tuple(labeled), tuple(test), tuple(unresolved))


def skips_to_give_up(counted: Iterable[Event], everybody: int | None) -> int:
    """The number of skips after which an item is given up: MAX_SKIPS, or the number of people if it is lower."""
    return min(MAX_SKIPS, max(1, people(counted) if everybody is None else everybody))


def _labeled_item(item_id: str, content: str, label: str, answers: Collection[Answer]) -> LabeledItem:
    votes = [vote for vote in votes_of(answers) if vote.label is not None]
    agreement = sum(vote.label == label for vote in votes) / len(votes)
    return LabeledItem(item_id, content, label, agreement, len(votes), first_round(answers))


def _identity(item_id: str, events: Sequence[Event]) -> tuple[str, Part]:
    seen = {(event.content_hash, event.part) for event in events}
    if len(seen) > 1:
        raise BadInput(
            f"the ledger contradicts itself about item {item_id!r}: "
            + " and ".join(f"{part} item with content {content[:12]}" for content, part in sorted(seen))
            + "; quarantine the wrong events with `al labels revoke`"
        )
    return seen.pop()
