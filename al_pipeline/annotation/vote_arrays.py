"""Votes as arrays: who gave which class to which item."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


class VoteArrays(NamedTuple):
    """V votes without skips, sorted by item and annotator, as numbers: of items 0 to N - 1, annotators and classes."""

    item: Indices
    annotator: Indices
    label: Indices
    annotators: tuple[str, ...]
    """Names by number, sorted."""
    classes: tuple[str, ...]

    def where(self, chosen: Flags) -> VoteArrays:
        """A part of the votes; annotators and classes keep their numbers."""
        return self._replace(item=self.item[chosen], annotator=self.annotator[chosen], label=self.label[chosen])

    @property
    def shared(self) -> Flags:
        """(V,) whether the vote's item has another one."""
        return np.bincount(self.item)[self.item] > 1 if len(self.item) else np.zeros(0, bool)


def to_arrays(
    rows: Iterable[tuple[str, str, str]], classes: Sequence[str], items: Sequence[str] | None = None
) -> tuple[VoteArrays, tuple[str, ...]]:
    """The votes (item, annotator, class) as arrays, and the items by number: `items`, by default sorted.

    The order of `rows` has no influence. Raises ValueError if a vote's class or item is unknown, or an annotator has
    two votes on an item.
    """
    given = list(rows)
    ids = tuple(sorted({row[0] for row in given})) if items is None else tuple(items)
    names = tuple(sorted({row[1] for row in given}))
    item_of, number_of, class_of = ({name: place for place, name in enumerate(all_)} for all_ in (ids, names, classes))
    try:
        table = np.array([(item_of[a], number_of[b], class_of[c]) for a, b, c in given], np.int64).reshape(-1, 3)
    except KeyError as error:
        raise ValueError(f"a vote names {error.args[0]!r}, which is no item or class here") from None
    item, annotator, label = table[np.lexsort((table[:, 1], table[:, 0]))].T
    if np.any((np.diff(item) == 0) & (np.diff(annotator) == 0)):
        raise ValueError("an annotator has two votes on one item")
    return VoteArrays(item, annotator, label, names, tuple(classes)), ids
