"""What the reviews say: the error rates of the labels as people gave them, rulings, contradictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from al_pipeline.annotation.active_events import active
from al_pipeline.annotation.aggregation import fold_by
from al_pipeline.annotation.confidence import ReadForecasts
from al_pipeline.annotation.review import SAMPLE, Ruling, checked_answers, rulings, sample_drawn
from al_pipeline.data.ledger import read_events, read_forecasts
from al_pipeline.evaluation.figures import Estimate
from al_pipeline.evaluation.online import wilson
from al_pipeline.files import sha256_bytes
from al_pipeline.params import Params
from al_pipeline.quality.agreement import CONFIDENCE
from al_pipeline.quality.error_rate import ErrorRate, error_rate
from al_pipeline.records import Event, LabeledItem, Part, PlannedTask, is_of_review
from al_pipeline.rounds.reviews import parse_review, review_number
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

PARTS: tuple[Part, ...] = ("pool", "test")


class Checked(Struct, frozen=True):
    """Somebody's answers that were drawn at random and reviewed."""

    annotator: str
    wrong: int
    reviewed: int
    rate: Estimate


class Review(Struct, frozen=True, kw_only=True):
    """What the reviews say so far."""

    rates: Mapping[Part, ErrorRate]
    """Of the labelled set and of the labelled test set, from their random samples."""
    ruled: int
    """Items with a ruling in force; `changed` of them have another label by people's answers, or none."""
    changed: int
    test_ruled: int
    """Of `ruled`, items of the test set."""
    without: int
    """Items that reviewers skipped."""
    waiting: int
    """Tasks without an answer of a reviewer."""
    people: tuple[Checked, ...]
    """Each annotator's answers that were drawn at random and reviewed."""
    own: int
    """Rulings on items that only the reviewer had answered, which no error rate counts."""
    contradictions: tuple[Ruling, ...]
    """Rulings that other rulings or gold labels on the item contradict; the newest one counts."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {
            **asdict(self),
            "rates": {part: {**asdict(one), "rate": one.rate.to_row()} for part, one in self.rates.items()},
            "people": [{**asdict(one), "rate": one.rate.to_row()} for one in self.people],
            "contradictions": [asdict(one) for one in self.contradictions],
        }


def error_rate_sentence(part: Part, found: ErrorRate) -> str:
    """The error rate of the labels of a part in words."""
    of = "the labelled set" if part == "pool" else "the test set"
    if found.rate.value is None:
        return f"error rate of {of}: not known, {found.rate.reason}"
    low, high = found.rate.low or 0.0, found.rate.high or 0.0
    left = found.sampled - found.reviewed
    waits = f"; {left:,} more of the sample to review" if left else ""
    return (
        f"error rate of {of}, as people labelled it: {100 * found.rate.value:.1f} % ({100 * low:.1f} to "
        f"{100 * high:.1f}), from {found.wrong:,} of {found.reviewed:,} random labels{waits}"
    )


def read_reviews(layout: Layout) -> list[PlannedTask]:
    """The tasks of all reviews, in their order. Raises UnexpectedChange if a plan is not the engine's."""
    numbers = sorted(
        number for path in layout.reviews.glob("*.jsonl") if (number := review_number(path.name)) is not None
    )
    return [
        task for number in numbers for task in parse_review(layout.review(number).read_text(encoding="utf-8"), number)
    ]


def review_figures(workspace: Workspace) -> Review:
    """What the reviews say, with the rulings pulled since the last round."""
    layout, params = workspace.layout, workspace.params
    events, forecasts = read_events(layout.events, layout.inbox_events), partial(read_forecasts, layout.events)
    return figures_of(params, events, read_reviews(layout), forecasts)


def figures_of(
    params: Params, events: Sequence[Event], tasks: Sequence[PlannedTask], forecasts: ReadForecasts
) -> Review:
    """What the rulings among `events` say. `tasks`: those of all reviews; `forecasts`: as in `fold_by`."""
    counted = active(events)
    found = {ruling.item_id: ruling for ruling in rulings(counted)}
    answered = {event.push_key for event in events if is_of_review(event.annotation_key)}
    reviewed = {event.item_id for event in counted if event.type == "adjudicate"}
    samples = _samples(params, events, counted, forecasts)
    planned = {task.item_id for task in tasks if task.strategy == SAMPLE}
    given = {item: label for sample in samples.values() for item, label in sample.given.items()}
    rates: dict[Part, ErrorRate] = {}
    for part, sample in samples.items():
        checked = [
            found[item]
            for item in sample_drawn(sample.order, planned)
            if item in found and found[item].independent and item in sample.given
        ]
        wrong = sum(one.label != sample.given[one.item_id] for one in checked)
        rates[part] = error_rate(len(sample.given), len(sample.order), len(checked), wrong)
    return Review(
        rates=rates,
        ruled=len(found),
        changed=sum(one.label != given[one.item_id] for one in found.values() if one.item_id in given),
        test_ruled=sum(one.part == "test" for one in found.values()),
        without=len(reviewed - found.keys()),
        waiting=sum(task.push_key not in answered for task in tasks),
        people=_people(counted, found, tasks),
        own=sum(not one.independent for one in found.values()),
        contradictions=tuple(one for one in found.values() if one.contradicts),
    )


def _people(counted: Sequence[Event], found: Mapping[str, Ruling], tasks: Sequence[PlannedTask]) -> tuple[Checked, ...]:
    reasons: dict[str, set[str]] = {}
    for task in tasks:
        reasons.setdefault(task.item_id, set()).add(task.strategy)
    people = []
    for who, (wrong, total) in checked_answers(counted, found, reasons).items():
        low, high = wilson(wrong, total, CONFIDENCE)
        people.append(Checked(who, wrong, total, Estimate(value=wrong / total, low=low, high=high)))
    return tuple(people)


def sample_left(workspace: Workspace) -> list[str]:
    """The items of both random samples, in their order, pool and test set in turn."""
    layout, params = workspace.layout, workspace.params
    events = read_events(layout.events, layout.inbox_events)
    samples = _samples(params, events, active(events), partial(read_forecasts, layout.events))
    queues = [list(sample.order) for sample in samples.values()]
    longest = max(map(len, queues), default=0)
    return [queue[place] for place in range(longest) for queue in queues if place < len(queue)]


class _Sample(Struct, frozen=True):
    """The labels of one part as people gave them, and the ids of its random sample, in order."""

    given: Mapping[str, str]
    order: Sequence[str]


def _samples(
    params: Params, events: Sequence[Event], counted: Sequence[Event], forecasts: ReadForecasts
) -> dict[Part, _Sample]:
    """The random samples: of each part the first `quality.review_sample` items in an order that never changes."""
    classes = dict.fromkeys([*params.schema_.labels, *sorted({e.label for e in counted if e.label is not None})])
    folded = fold_by(params, events, forecasts, list(classes))
    votes = [event for event in events if not is_of_review(event.annotation_key)]
    any_review = len(votes) < len(events)
    people = fold_by(params, votes, forecasts, list(classes)) if any_review else folded
    people_rows: Mapping[Part, Sequence[LabeledItem]] = {"pool": people.labeled, "test": people.test}
    found: dict[Part, _Sample] = {}
    rows_of: Mapping[Part, Sequence[LabeledItem]] = {"pool": folded.labeled, "test": folded.test}
    for part in PARTS:
        rows = rows_of[part]
        given = {row.item_id: row.label for row in rows}
        if any_review:
            by_people = {row.item_id: row.label for row in people_rows[part]}
            given = {item: by_people[item] for item in given if item in by_people}
        order = in_random_order({r.item_id: r.content_hash for r in rows if r.item_id in given}, params.seed)
        found[part] = _Sample(given, order[: params.quality.review_sample])
    return found


def in_random_order(items: Mapping[str, str], seed: int) -> list[str]:
    """Item ids in an order that depends on their contents and the seed alone. `items`: content hashes by id."""
    return sorted(items, key=lambda item: (sha256_bytes(f"{seed} review {items[item]}".encode()), item))
