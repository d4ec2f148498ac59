"""The answers of annotators in the ledger: the vote of each on each item, with its time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from al_pipeline.annotation.active_events import corrected_items
from al_pipeline.annotation.answers import IMPORT, answers_of, by_item, votes_of
from al_pipeline.quality.answers import Given
from al_pipeline.records import Event


def answers_given(counted: Sequence[Event]) -> Iterator[tuple[Given, bool]]:
    """The vote of each annotator on each item, and whether the model's guess was shown.

    Left out are imports, adjudications and gold labels, which are no annotator's work, and items whose text was
    corrected.
    """
    outdated = corrected_items(counted)
    for item, about in by_item(counted).items():
        if item in outdated:
            continue
        if (only := _only_answer(about)) is not None:
            label = None if only.type == "skip" else only.label
            seconds = None if only.lead_time is None else float(only.lead_time)
            yield Given(item, only.annotator, label, only.round, seconds), only.prelabel_shown and label is not None
            continue
        own = {key: one for key, one in answers_of(about).items() if one.annotator != IMPORT and not one.binding}
        times = {event.annotation_key: event.lead_time for event in about if event.lead_time is not None}
        key_of = {one.order: key for key, one in own.items()}
        for vote in votes_of(own.values()):
            seconds = times.get(key_of[vote.order])
            given = Given(item, vote.annotator, vote.label, vote.round, None if seconds is None else float(seconds))
            yield given, about[vote.order].prelabel_shown and vote.label is not None


def _only_answer(about: Sequence[Event]) -> Event | None:
    """A person's answer that is all that is known of an item, as of most items; the rules for others say the same."""
    only = about[0]
    if len(about) > 1 or only.annotator == IMPORT:
        return None
    return only if only.type == "skip" or (only.type == "label" and only.label is not None) else None
