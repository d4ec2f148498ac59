"""Texts that were corrected under their ids, as far as the ledger knows."""

from __future__ import annotations

from collections.abc import Sequence

from al_pipeline.annotation.active_events import active, superseded
from al_pipeline.records import Event

CORRECTION = "correction:"
"""Begins the annotation key of a correction; the user's id follows."""


class PastCorrections:
    """What the ledger says of corrected texts."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.superseded = superseded(events)
        self.families: dict[str, dict[str, None]] = {}
        """For each of the user's ids that was ever corrected all items that had a text of it, the first one first."""
        self.now: dict[str, str] = {}
        """The item that has the text of an id, where a correction in force says so."""
        self.last: dict[str, str] = {}
        """The id of the last correction, in force or not."""
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
        """The user's id that an item has a text of; an export names corrected texts by the ids that we gave them."""
        return self._roots.get(item_id, item_id)
