"""The answers as arrays, and what is counted of them: label sets of items, pairs of answers, the consensus of others.

Everything is counted by numpy on arrays as long as the answers; no table of items and classes is ever dense for more
than `_BLOCK` cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from msgspec import Struct

from al_pipeline.annotation.vote_arrays import Flags, Floats, Indices, VoteArrays
from al_pipeline.costs.answer_times import capped

SKIP = -1
"""The class of a skip, and the consensus of others where they have none."""

_BLOCK = 4_000_000
"""Number of cells of a dense table in memory at a time."""


class Given(Struct, frozen=True):
    """One annotator's answer to one item."""

    item: str
    annotator: str
    label: str | None
    """None: a skip."""
    round: int
    seconds: float | None = None
    """How long the task was shown, as Label Studio's page measures it: wall time, so idle time counts."""


class Votes(NamedTuple):
    """V answers, sorted by item, as numbers: of items 0 to N - 1, annotators, classes (or SKIP) and rounds."""

    item: Indices
    annotator: Indices
    label: Indices
    round: Indices
    seconds: Floats
    """NaN where it is not known; never above the cap."""
    annotators: tuple[str, ...]
    """Names by number, sorted."""
    classes: tuple[str, ...]
    cap: float | None
    """The cap of `seconds`; None if no answer has a time."""

    @property
    def labels(self) -> Votes:
        """The answers that are no skips."""
        return self.where(self.label != SKIP)

    @property
    def arrays(self) -> VoteArrays:
        """The same without rounds and times; there must be no skips."""
        return VoteArrays(self.item, self.annotator, self.label, self.annotators, self.classes)

    def where(self, chosen: Flags) -> Votes:
        """A part of the answers; annotators and classes keep their numbers."""
        return self._replace(
            item=self.item[chosen],
            annotator=self.annotator[chosen],
            label=self.label[chosen],
            round=self.round[chosen],
            seconds=self.seconds[chosen],
        )


def to_votes(given: Iterable[Given], classes: Sequence[str]) -> Votes:
    """The answers as arrays, at most one for each annotator and item.

    `classes`: those of the schema; other classes that answers name come after them. Raises ValueError if an annotator
    has two answers to an item.
    """
    rows = list(given)
    names = tuple(sorted({row.annotator for row in rows}))
    labels = tuple(dict.fromkeys([*classes, *sorted({row.label for row in rows if row.label is not None})]))
    number_of = {name: number for number, name in enumerate(names)}
    class_of: dict[str | None, int] = {label: number for number, label in enumerate(labels)} | {None: SKIP}
    item_of = {item: number for number, item in enumerate(sorted({row.item for row in rows}))}
    table = np.array(
        [(item_of[row.item], number_of[row.annotator], class_of[row.label], row.round) for row in rows], np.int64
    ).reshape(-1, 4)
    seconds, cap = capped(np.array([np.nan if row.seconds is None else row.seconds for row in rows], np.float64))
    order = np.lexsort((table[:, 1], table[:, 0]))
    item, annotator, label, round_ = table[order].T
    if np.any((np.diff(item) == 0) & (np.diff(annotator) == 0)):
        raise ValueError("an annotator has two answers to one item")
    return Votes(item, annotator, label, round_, seconds[order], names, labels, cap)


class Profiles(NamedTuple):
    """The distinct sets of labels that items with two answers or more have: P sets of C classes.

    Items with equal sets weigh the same in every figure of agreement, so a resample of items is one of sets.
    """

    counts: Floats
    """(P, C) is never stored: these are its values above 0, in the order of `row`."""
    row: Indices
    column: Indices
    size: Floats
    """(P,) number of answers of an item."""
    items: Indices
    """(P,) number of items."""


def profiles(votes: Votes) -> Profiles:
    """The label sets of items with two answers or more; `votes` without skips."""
    item, label, classes = votes.item, votes.label, max(1, len(votes.classes))
    cells, counts = np.unique(item * classes + label, return_counts=True)
    rows, columns = np.divmod(cells, classes)
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    if not len(firsts):
        nothing = np.empty(0)
        return Profiles(nothing, np.empty(0, np.int64), np.empty(0, np.int64), nothing, np.empty(0, np.int64))
    sizes = np.add.reduceat(counts, firsts)
    # A set is known by the sum of one random number for each of its labels, modulo 2 ** 64.
    codes = np.random.default_rng(classes).integers(0, 2**64, classes, np.uint64)
    sums = np.add.reduceat(codes[columns] * counts.astype(np.uint64), firsts)
    distinct, first, items = np.unique(sums[sizes > 1], return_index=True, return_counts=True)
    kept = np.flatnonzero(sizes > 1)[first]
    ends = np.append(firsts, len(cells))
    widths = ends[kept + 1] - ends[kept]
    places = np.repeat(ends[kept] - np.cumsum(widths) + widths, widths) + np.arange(widths.sum())
    row = np.repeat(np.arange(len(distinct)), widths)
    return Profiles(counts[places].astype(float), row, columns[places], sizes[kept].astype(float), items)


def pairs(votes: Votes) -> Iterator[tuple[Indices, Indices]]:
    """All pairs of answers to one item, as positions in `votes`: some pairs at a time, each once."""
    distance = 1
    while len(votes.item) > distance:
        first = np.flatnonzero(votes.item[distance:] == votes.item[:-distance])
        if not len(first):
            return
        yield first, first + distance
        distance += 1


def consensus_of_others(votes: Votes, without: Flags | None = None) -> Indices:
    """For each answer the class that most of the item's other annotators gave; SKIP without others or if they tie.

    `votes` has no skips. `without` (A,): annotators whose answers are no part of a consensus; they still have one of
    others. Returns (V,).
    """
    classes = len(votes.classes)
    counted = np.ones(len(votes.item), bool) if without is None else ~without[votes.annotator]
    found = np.full(len(votes.item), SKIP)
    bounds = np.append(np.flatnonzero(np.diff(votes.item, prepend=-1)), len(votes.item))
    start = 0
    while start < len(bounds) - 1:
        end = max(start + 1, int(np.searchsorted(bounds, bounds[start] + _BLOCK // max(1, classes), "right")) - 1)
        block = slice(bounds[start], bounds[end])
        found[block] = _others(votes.item[block], votes.label[block], counted[block], classes)
        start = end
    return found


def _others(item: Indices, label: Indices, counted: Flags, classes: int) -> Indices:
    item = item - item[0]
    cells = np.bincount((item * classes + label)[counted], minlength=(item[-1] + 1) * classes)
    others = cells.reshape(-1, classes)[item].astype(np.int32)
    others[np.arange(len(item)), label] -= counted
    most = others.max(axis=1)
    alone = (others == most[:, None]).sum(axis=1) == 1
    return np.where(alone & (most > 0), others.argmax(axis=1), SKIP)
