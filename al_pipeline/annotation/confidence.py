"""How the votes on items become labels with a confidence: by which consensus, and with what a model said of the items.

The computation is in `consensus.py`, which is imported only where it is used: it needs numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from al_pipeline.annotation.answers import IMPORT, Answer
from al_pipeline.params import ConsensusName, Labels
from al_pipeline.records import Event, ModelForecast, is_of_review

if TYPE_CHECKING:
    from al_pipeline.annotation.class_changes import Schemas

Forecasts = Mapping[str, Mapping[str, float]]
"""Classes with a model's probabilities, by item id; the rest of the probability falls evenly on all other classes."""
ReadForecasts = Callable[[], Mapping[str, ModelForecast]]
"""Reads the forecasts of a ledger."""


class ConsensusRule(Struct, frozen=True):
    """Which consensus decides, and the forecasts that take part, made before anybody answered."""

    method: ConsensusName
    forecasts: Forecasts = {}
    known: Mapping[str, int] = {}
    """How many events of the ledger there were when a forecast was made, by item id, where that is known."""

    def in_present_classes(self, schemas: Schemas | None, ledger: Iterable[Event]) -> ConsensusRule:
        """The rule with forecasts of the present classes; `schemas`: those of `ledger`, None if they never changed.

        Where it is not known when a forecast was made, it was made in the schema in which the item's first task was
        answered first.
        """
        if schemas is None or not self.forecasts:
            return self
        places = {item: count - 1 for item, count in self.known.items()}
        if without := self.forecasts.keys() - places.keys():
            places |= _first_answers(ledger, without)
        return ConsensusRule(
            self.method, {item: schemas.shares(found, places.get(item)) for item, found in self.forecasts.items()}
        )


def rule_for(labels: Labels, read_forecasts: ReadForecasts) -> ConsensusRule | None:
    """The rule that the section `labels` of `params.yaml` asks for; None for the majority without confidence.

    `read_forecasts` is called only if they take part.
    """
    if not labels.have_confidence:
        return None
    return rule_with(labels.consensus, read_forecasts() if labels.uses_model else {})


def rule_with(method: ConsensusName, forecasts: Mapping[str, ModelForecast]) -> ConsensusRule:
    """The rule with the forecasts of a ledger."""
    known = {item: one.known for item, one in forecasts.items() if one.known is not None}
    return ConsensusRule(method, {item: one.proba for item, one in forecasts.items()}, known)


def _first_answers(ledger: Iterable[Event], items: Collection[str]) -> dict[str, int]:
    """The place in `ledger` of the first event of a task of each of `items`; an event counts at its first place."""
    found: dict[str, int] = {}
    for place, event in enumerate({event.event_id: event for event in ledger}.values()):
        if event.item_id in items and event.push_key and not is_of_review(event.annotation_key):
            found.setdefault(event.item_id, place)
    return found


class Decided(Struct, frozen=True):
    """What the votes on an item say."""

    label: str | None
    """None: a tie."""
    confidence: float
    """The probability that the label is right; of a tie, that of each of its classes."""
    tied: frozenset[str]
    """The classes of a tie; empty if there is none."""


def decide(
    votes: Mapping[str, Iterable[Answer]], labels: Sequence[str], rule: ConsensusRule, test: Iterable[str]
) -> dict[str, Decided]:
    """Decide on the items with people's `votes`, by item id; skips and imported labels are no votes here.

    `test`: ids of the items of the test set. All votes say how good an annotator is, but no forecast has an influence
    on the items of the test set, neither directly nor by what it says of annotators: the model is measured on them.
    """
    rows = [
        (item, vote.annotator, vote.label)
        for item, given in votes.items()
        for vote in given
        if vote.label is not None and vote.label in labels and vote.annotator != IMPORT
    ]
    if not rows:
        return {}
    from al_pipeline.annotation.consensus import TIE, consensus, tied_classes

    voted = {row[0] for row in rows}
    held_out = voted & set(test)
    seen = {item: rule.forecasts[item] for item in voted - held_out if item in rule.forecasts}
    found: dict[str, Decided] = {}
    for wanted, forecasts in ((voted - held_out, seen), (held_out, {})):
        if not wanted:
            continue
        result = consensus(rows, labels, rule.method, in_full(forecasts, labels))
        for place, item in enumerate(result.items):
            if item in wanted:
                label, confidence = result.of(place)
                tied = tied_classes(result, place) if result.label[place] == TIE else ()
                found[item] = Decided(label, confidence, frozenset(tied))
    return found


def in_full(forecasts: Forecasts, labels: Sequence[str]) -> dict[str, list[float]]:
    """The probability of each of `labels`, by item id; without forecasts that name none of them."""
    found = {}
    for item, shares in forecasts.items():
        rest = max(0.0, 1 - sum(shares.values())) / max(1, sum(name not in shares for name in labels))
        row = [shares.get(name, rest) for name in labels]
        if total := sum(row):
            found[item] = [share / total for share in row]
    return found
