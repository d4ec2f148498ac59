"""Which annotators have not answered for days, though tasks wait for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime, timedelta

from al_pipeline.annotation.active_events import CONTROLS
from al_pipeline.annotation.answers import IMPORT, NOT_ANNOTATIONS
from al_pipeline.notifications.messages import Message, annotator_silent
from al_pipeline.records import Event, moment


def silent_annotators(
    events: Iterable[Event],
    open_tasks: Collection[str],
    allowed: Collection[str],
    opened: datetime,
    now: datetime,
    days: float,
    planned: int,
) -> Iterator[Message]:
    """A message for each annotator whose last answer or skip is more than `days` old.

    `open_tasks`: push keys of the round's tasks that wait for an answer. Those whom nothing waits for, since they have
    answered or skipped all of these, are not silent. The time counts from the opening of the round at the earliest.
    `allowed`: the allowed annotators; without any, those who answered in round `planned` or the one before. A time
    stamp of the future counts as now, an unreadable one not at all.
    """
    last: dict[str, datetime] = {}
    answered: defaultdict[str, set[str]] = defaultdict(set)
    recent: set[str] = set()
    for event in events:
        if event.type in (*CONTROLS, *NOT_ANNOTATIONS) or event.annotator in (IMPORT, ""):
            continue
        answered[event.annotator].add(event.push_key)
        if event.round >= planned - 1:
            recent.add(event.annotator)
        if (at := _time_of(event, now)) is not None:
            last[event.annotator] = max(at, last.get(event.annotator, at))
    for name in sorted({address.strip().lower() for address in allowed} or recent):
        waiting = len(set(open_tasks) - answered[name])
        since = max(last.get(name, opened), opened)
        if waiting and now - since > timedelta(days=days):
            yield annotator_silent(name, last.get(name), (now - since) / timedelta(days=1), waiting)


def _time_of(event: Event, now: datetime) -> datetime | None:
    for stamp in (event.updated_at, event.created_at, event.observed_at):
        if stamp is not None:
            try:
                return min(moment(stamp), now)
            except (ValueError, OverflowError):
                continue
    return None
