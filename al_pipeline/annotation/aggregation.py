"""Aggregation of annotations into labels: majority vote, overruled by adjudications and gold labels.

The result does not depend on how the events of different people are interleaved in the ledger, except that the newest
adjudication wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

from msgspec import Struct

from al_pipeline.annotation.active_events import corrected_items, counted
from al_pipeline.annotation.answers import IMPORT, Answer, answers_of, by_item, first_round, resolve, votes_of
from al_pipeline.annotation.confidence import ConsensusRule, ReadForecasts, decide, rule_for
from al_pipeline.annotation.gold import REASON, set_apart
from al_pipeline.annotation.schema_change import missing_in_use
from al_pipeline.annotation.votes import people, times_asked
from al_pipeline.errors import BadInput, SchemaInUse
from al_pipeline.params import Params
from al_pipeline.records import Event, LabeledItem, Part, Unresolved

if TYPE_CHECKING:
    from al_pipeline.annotation.class_changes import Reopened

MAX_SKIPS = 2
"""An item skipped by this many people (or by all, if there are fewer) is no longer queried."""
MAX_ASKED = 2
"""An item that is still tied after this many rounds is ignored."""
MAX_RELABELED = 5
"""The same where labelled items are asked again, each time of one person: their first two answers are often a tie."""


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
    most_asked: int

    def unresolved(
        self, item_id: str, part: Part, tied: frozenset[str], answers: Iterable[Answer]
    ) -> Unresolved | None:
        """The record of an item whose annotations give no label; None if it may simply be queried again."""
        asked = self.asked.get(item_id, 0)
        if tied:
            between = " and ".join(label for label in self.labels if label in tied)
            if asked >= self.most_asked:
                return Unresolved(item_id, part, "ignored", f"still a tie of {between} after {asked} rounds", asked)
            return Unresolved(item_id, part, "tie", f"a tie of {between}", asked)
        skips = len(votes_of(answers))
        if skips >= self.enough_skips:
            who = "1 person, the only one there is" if skips == 1 else f"{skips} people"
            return Unresolved(item_id, part, "ignored", f"skipped by {who}", asked)
        return None


def fold(
    events: Sequence[Event],
    labels: Sequence[str],
    everybody: int | None = None,
    asked: Mapping[str, int] | None = None,
    rule: ConsensusRule | None = None,
    most_asked: int = MAX_ASKED,
) -> Folded:
    """The labelled set, the labelled test set, and the items that are unresolved.

    `labels`: the schema's classes. `everybody`: the number of possible annotators; None: of those with a vote so far.
    `asked`: the number of rounds in which each item was queried, by item id. `rule`: another consensus than the
    majority, or the majority with the confidence of each label; None: the majority without. `most_asked`: the number of
    rounds after which a tie is ignored.

    Each annotator has one vote on an item: the newest annotation. The newest adjudication or gold label wins; else the
    class with the most votes, or that of `rule`; else, if no person gave a label, the imported label. If two or more
    classes are equal, that is a tie: the item is unresolved, and ignored after `most_asked` rounds. Items that
    nobody labelled and two people (or `everybody`) skipped are ignored. So are items whose text was corrected, since
    their annotations are about another text, and gold items whose label is not trained on. Items that lost their label
    with its class are asked again, or ignored if the class was retired.

    Raises SchemaInUse if an annotation names a class that the schema lacks, BadInput on events that contradict each
    other about an item's content or part.
    """
    given, reopened, schemas = counted(events)
    rules = _Rules(labels, skips_to_give_up(given, everybody), asked or {}, most_asked)
    events_of = by_item(given)
    found = _Found([], [], [])
    contested: dict[str, _Contested] = {}
    unknown: Counter[str] = Counter()
    corrected, gold = corrected_items(given), set_apart(given)
    known = frozenset(labels)
    parts: dict[str, Part] = {event.item_id: event.part for event in given if event.type == "correct"}
    for item_id in sorted(events_of.keys() | corrected.keys() | reopened.keys()):
        if now := corrected.get(item_id):
            reason = f"its text was corrected: {now}"
            found.unresolved.append(Unresolved(item_id, parts[now], "ignored", reason, rules.asked.get(item_id, 0)))
            continue
        about = events_of.get(item_id, [])
        if rule is None and item_id not in gold and item_id not in reopened:
            one = about[0]
            if len(about) == 1 and one.type == "label" and one.label in known:  # most items; below it is the same
                found.add(one.part, LabeledItem(item_id, one.content_hash, one.label, 1.0, 1, one.round))
                continue
        content, part = _identity(item_id, about, reopened.get(item_id))
        if item_id in gold:
            found.unresolved.append(Unresolved(item_id, part, "ignored", REASON, rules.asked.get(item_id, 0)))
            continue
        answers = answers_of(about).values()
        unknown.update(a.label for a in answers if a.label is not None and a.label not in labels)
        only = next(iter(answers)) if len(answers) == 1 else None
        if rule is not None and (votes := _open_votes(answers)):
            contested[item_id] = _Contested(content, part, answers, votes)
        elif rule is None and only is not None and only.label is not None:  # most items; the rules below give the same
            found.add(part, LabeledItem(item_id, content, only.label, 1.0, 1, only.round))
        else:
            result = resolve(answers)
            if isinstance(result, str):
                confidence = None if rule is None else 1.0  # binding or imported
                found.add(part, _labeled_item(item_id, content, result, answers, confidence))
            elif row := rules.unresolved(item_id, part, result, answers):
                found.unresolved.append(row)
            elif lost := reopened.get(item_id):
                kind: Literal["ignored", "again"] = "ignored" if lost.ignored else "again"
                found.unresolved.append(Unresolved(item_id, part, kind, lost.reason, rules.asked.get(item_id, 0)))
    if problem := missing_in_use(labels, {name: f"{count} answers" for name, count in sorted(unknown.items())}):
        raise SchemaInUse(problem)
    if rule is not None:
        _decide(contested, rule.in_present_classes(schemas, events), rules, found)
    return found.sorted()


def fold_by(
    params: Params,
    events: Sequence[Event],
    read_forecasts: ReadForecasts,
    classes: Sequence[str] | None = None,
) -> Folded:
    """`fold` with the annotators, consensus and limits of `params`: the labels of a workspace.

    `read_forecasts` is called only if the model takes part. `classes`: in place of the schema's.
    """
    return fold(
        events,
        params.schema_.labels if classes is None else classes,
        len(params.annotators) or None,
        times_asked(events),
        rule_for(params.labels, read_forecasts),
        most_asked(bool(params.select.relabel)),
    )


class _Found(NamedTuple):
    """What `fold` has found so far."""

    labeled: list[LabeledItem]
    test: list[LabeledItem]
    unresolved: list[Unresolved]

    def add(self, part: Part, row: LabeledItem) -> None:
        (self.labeled if part == "pool" else self.test).append(row)

    def sorted(self) -> Folded:
        by_id = attrgetter("item_id")
        return Folded(
            tuple(sorted(self.labeled, key=by_id)),
            tuple(sorted(self.test, key=by_id)),
            tuple(sorted(self.unresolved, key=by_id)),
        )


class _Contested(NamedTuple):
    """An item on which a consensus decides."""

    content: str
    part: Part
    answers: Collection[Answer]
    votes: Sequence[Answer]
    """People's votes, without skips."""


def _open_votes(answers: Collection[Answer]) -> list[Answer]:
    """People's votes with a label; none if one of them is binding."""
    votes = [vote for vote in votes_of(answers) if vote.label is not None and vote.annotator != IMPORT]
    return [] if any(vote.binding for vote in votes) else votes


def _decide(contested: Mapping[str, _Contested], rule: ConsensusRule, rules: _Rules, found: _Found) -> None:
    """Add the items on which the consensus decides to `found`."""
    votes = {item: one.votes for item, one in contested.items()}
    test = [item for item, one in contested.items() if one.part == "test"]
    for item, decided in decide(votes, rules.labels, rule, test).items():
        content, part, answers, _ = contested[item]
        if decided.label is not None:
            found.add(part, _labeled_item(item, content, decided.label, answers, decided.confidence))
        elif row := rules.unresolved(item, part, decided.tied, answers):
            found.unresolved.append(row)


def most_asked(relabels: bool) -> int:
    """The number of rounds after which a tie is ignored, by whether `select.relabel` asks labelled items again."""
    return MAX_RELABELED if relabels else MAX_ASKED


def skips_to_give_up(counted: Iterable[Event], everybody: int | None) -> int:
    """The number of skips after which an item is given up: MAX_SKIPS, or the number of people if it is lower."""
    return min(MAX_SKIPS, max(1, people(counted) if everybody is None else everybody))


def _labeled_item(
    item_id: str, content: str, label: str, answers: Collection[Answer], confidence: float | None
) -> LabeledItem:
    votes = [vote for vote in votes_of(answers) if vote.label is not None]
    agreement = sum(vote.label == label for vote in votes) / len(votes)
    return LabeledItem(item_id, content, label, agreement, len(votes), _labelled_in(answers, votes), confidence)


def _labelled_in(answers: Collection[Answer], votes: Sequence[Answer]) -> int:
    """The first round in which the majority gives a label; of a tie, that a consensus decided, the first with votes."""
    if isinstance(resolve(answers), str):
        return first_round(answers)
    return min(vote.round for vote in votes)


def _identity(item_id: str, events: Sequence[Event], reopened: Reopened | None) -> tuple[str, Part]:
    seen = {(one.content_hash, one.part) for one in (*events, *((reopened,) if reopened else ()))}
    if len(seen) > 1:
        raise BadInput(
            f"the ledger contradicts itself about item {item_id!r}: "
            + " and ".join(f"{part} item with content {content[:12]}" for content, part in sorted(seen))
            + "; quarantine the wrong events with `al labels revoke`"
        )
    return seen.pop()
