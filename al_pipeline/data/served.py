"""Test items that were drawn from what a served model was asked: a second test set, measured apart from the first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from al_pipeline.data.pool import iter_items
from al_pipeline.records import Item

if TYPE_CHECKING:  # a tick with nothing to do needs no numpy
    from al_pipeline.data.outputs import Predictions

SOURCE = "traffic"
"""The column `source` of items that come from requests; their column of this name says more."""


def request_weights(items: Iterable[Item]) -> dict[str, float]:
    """The test items that were drawn from requests, by id: how many requests each is expected to stand for."""
    return {item.item_id: weight for item in items if (weight := _weight(item)) is not None}


def without_requests(found: Predictions, test: Path) -> Predictions:
    """The predictions of the items that were not drawn from requests. `test`: the folder of the test set."""
    weights = request_weights(item for batch in iter_items([test]) for item in batch)
    rows = [row for row, item in enumerate(found.item_ids) if item not in weights]
    return found if len(rows) == len(found.item_ids) else found.only(rows)


def _weight(item: Item) -> float | None:
    if f'"{SOURCE}"' not in item.metadata:  # most items: nothing to parse
        return None
    found = json.loads(item.metadata)
    about = found.get(SOURCE) if found.get("source") == SOURCE else None
    if not isinstance(about, dict) or about.get("policy") != "test":
        return None
    times, propensity = about.get("times"), about.get("propensity")
    if isinstance(times, int | float) and isinstance(propensity, int | float) and times > 0 and propensity > 0:
        return times / propensity
    return 1.0
