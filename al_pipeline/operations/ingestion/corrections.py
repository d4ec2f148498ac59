"""Corrections of texts, read from the events."""

from __future__ import annotations

from collections.abc import Sequence

from al_pipeline.annotation.active_events import active, superseded
from al_pipeline.records import Event

CORRECTION = "correction:"
"""Prefix of the annotation key of a correction; the user's id follows."""


class PastCorrections:
    """The corrections in a list of events."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.superseded = superseded(events)
        self.families: dict[str, dict[str, None]] = {}
        """For each of the user's ids that was ever corrected, all items that have had a text of it, oldest first."""
        self.now: dict[str, str] = {}
        """The item with the current text of an id, for ids with a correction in force."""
        self.last: dict[str, str] = {}
        """Event id of the last correction of each of the user's ids, in force or not."""
        self._roots: dict[str, str] = {}
        for event in events:
            if event.type == "correct":
                root = event.annotation_key.removeprefix(CORRECTION)
                family = self.families.setdefault(root, {root: None})
                family.update(dict.fromkeys((*event.targets, event.item_id)))
                self._roots.update(dict.fromkeys(family, root))
                self.last[root] = event.event_id
        if self.families:
            counted = [event for event in active(events) if event.type == "correct"]
            self.now = {event.annotation_key.removeprefix(CORRECTION): event.item_id for event in counted}

    def root(self, item_id: str) -> str:
        """The user's id to which an item's text belongs. Exports use the ids that we gave to corrected texts."""
        return self._roots.get(item_id, item_id)
