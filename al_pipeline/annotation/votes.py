"""What the annotations that count say of items and annotators, by their votes (`answers`)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from al_pipeline.annotation.active_events import active, standing_answers
from al_pipeline.annotation.answers import answers_of, by_item, votes_of
from al_pipeline.records import Event, Part, is_of_review, round_name


def supporters(events: Iterable[Event], labels: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The annotators whose vote on an item is its label in `labels` (item id -> label), by item id, sorted."""
    about = by_item(event for event in active(events) if event.item_id in labels)
    return {
        item: tuple(
            sorted({v.annotator for v in votes_of(answers_of(about.get(item, ())).values()) if v.label == label})
        )
        for item, label in labels.items()
    }


def skips(events: Iterable[Event]) -> dict[str, int]:
    """The number of votes that are skips, by item id; items without one are left out."""
    counts = {
        item: sum(vote.label is None for vote in votes_of(answers_of(about).values()))
        for item, about in by_item(active(events)).items()
    }
    return {item: count for item, count in counts.items() if count}


def people(counted: Iterable[Event]) -> int:
    """The number of people with an annotation or skip among the events that count.

    Imports, adjudications and gold labels are left out.
    """
    return len({event.annotator for event in counted if event.type in ("label", "skip", "supersede")})


def labels_in_use(events: Iterable[Event]) -> dict[str, Counter[Part]]:
    """The number of annotations that count, by class and by the part that their items belong to."""
    found: defaultdict[str, Counter[Part]] = defaultdict(Counter)
    for about in by_item(active(events)).values():
        for answer in answers_of(about).values():
            if answer.label is not None:
                found[answer.label][about[0].part] += 1
    return dict(found)


def times_asked(events: Iterable[Event]) -> dict[str, int]:
    """The number of tasks of each item with an annotation or skip that counts, by item id; reviews are left out.

    A task that was kept for the next round counts once, although its annotations belong to two rounds.
    """
    first: dict[str, Event] = {}
    several: defaultdict[str, set[str]] = defaultdict(set)  # most items have one
    for event in standing_answers(events).values():
        if event.round >= 0 and not is_of_review(event.annotation_key):
            one = first.setdefault(event.item_id, event)
            if one is not event:
                several[event.item_id] |= {_task_of(one), _task_of(event)}
    return dict.fromkeys(first, 1) | {item: len(tasks) for item, tasks in several.items()}


def _task_of(event: Event) -> str:
    return event.push_key or round_name(event.round)
