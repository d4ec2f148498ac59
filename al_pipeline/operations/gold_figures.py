"""Accuracy on gold: of each annotator, with its interval, and who is below the bound."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from al_pipeline.annotation.gold import GOLD, answers_to_gold, gold_items, is_below, right_and_all, unexpired
from al_pipeline.evaluation.online import wilson
from al_pipeline.params import Params
from al_pipeline.records import Event, PlannedTask

_CONFIDENCE = 0.95


class OnGold(Struct, frozen=True):
    """Somebody's answers to gold."""

    annotator: str
    right: int
    answers: int
    low: float
    high: float
    """The ends of the 95 % interval of the share of right answers."""

    def sentence(self) -> str:
        """The accuracy in words."""
        return (
            f"gave the known label to {self.right} of {self.answers} gold items "
            f"({100 * self.low:.0f} to {100 * self.high:.0f} %)"
        )


class GoldStatus(Struct, frozen=True, kw_only=True):
    """The gold items of a workspace, and how people answered them."""

    items: int
    trained: int
    """Of `items`, those whose label is trained on too."""
    left: int
    """Items that somebody has not answered yet; the others are not asked again."""
    people: tuple[OnGold, ...]
    below: tuple[str, ...]
    """Those whose whole interval is below `quality.min_gold`."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return asdict(self) | {"people": [asdict(one) for one in self.people]}


def on_gold(counted: Sequence[Event], keys: Collection[str]) -> tuple[OnGold, ...]:
    """The accuracy of everybody who has answered gold. `keys`: the push keys of the tasks that asked it."""
    if not keys:
        return ()
    counts = right_and_all(answers_to_gold(counted, keys), gold_items(counted))
    found = []
    for who, (right, total) in counts.items():
        low, high = wilson(right, total, _CONFIDENCE)
        assert low is not None and high is not None
        found.append(OnGold(who, right, total, low, high))
    return tuple(found)


def below_bound(params: Params, counted: Sequence[Event], keys: Collection[str]) -> dict[str, str]:
    """Who is below `quality.min_gold`, with the evidence in words: after FIRST answers, the whole interval is below."""
    bound = params.quality.min_gold
    return {
        one.annotator: f"{one.sentence()}; quality.min_gold is {100 * bound:.0f} %"
        for one in on_gold(counted, keys)
        if is_below(one.right, one.answers, bound)
    }


def gold_status(params: Params, counted: Sequence[Event], plans: Mapping[str, PlannedTask]) -> GoldStatus | None:
    """The gold items and how people answered them; None without gold."""
    gold = gold_items(counted)
    if not gold:
        return None
    keys = frozenset(key for key, task in plans.items() if task.strategy == GOLD)
    seen = answers_to_gold(counted, keys)
    everybody = params.annotators or {
        event.annotator for event in counted if event.type in ("label", "skip", "supersede")
    }
    return GoldStatus(
        items=len(gold),
        trained=sum(one.train for one in gold.values()),
        left=len(unexpired(gold, seen, frozenset(address.strip().lower() for address in everybody))),
        people=on_gold(counted, keys),
        below=tuple(f"{who} {why}" for who, why in below_bound(params, counted, keys).items()),
    )
