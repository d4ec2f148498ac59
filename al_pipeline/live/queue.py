"""Which question is asked next. Arrays and records in, choices out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from al_pipeline.active_learning.batch import ASK_AGAIN, ASKED, GUIDED, RANDOM_FILL
from al_pipeline.records import RANDOM, RANDOM_SLICE, RELABEL, PlannedTask

Slot = Literal["planned", "chosen", "random"]

_FIXED = frozenset({ASK_AGAIN, ASKED, GUIDED, RANDOM, RANDOM_FILL, RELABEL, "test_set", "gold"})


def is_fixed(task: PlannedTask) -> bool:
    """Whether a live round asks this task of its batch as it is: test items, requests, ties, gold, a seed's tasks.

    All others are places for the newest model's questions.
    """
    if task.part == "test" or task.first_round < task.round or task.strategy in _FIXED:
        return True
    return task.predicted is None


def next_slot(
    batch: Sequence[PlannedTask], asked: Sequence[str], share: float, rng: Generator
) -> tuple[Slot, PlannedTask | None]:
    """What the next question is: a task of the batch, or one chosen by the newest model or at random.

    A live round asks in the pattern of its batch, so that it has as many test items and as large a random share.
    `asked`: the push keys asked so far, in order. Behind the batch's end, what is left of it that is fixed comes first,
    then random questions with the probability `share`.
    """
    known, place = set(asked), len(asked)
    if place < len(batch):
        task = batch[place]
        if task.strategy == RANDOM_SLICE and not is_fixed(task):
            return "random", None
        if not is_fixed(task):
            return "chosen", None
        if task.push_key not in known:
            return "planned", task
    left = next((task for task in batch if is_fixed(task) and task.push_key not in known), None)
    if left is not None and place >= len(batch):
        return "planned", left
    return ("random" if rng.random() < share else "chosen"), None


def pick(
    scores: NDArray[np.float64],
    allowed: NDArray[np.bool_],
    vectors: NDArray[np.float32],
    near: Sequence[int],
    most_similar: float,
    looked_at: int = 64,
) -> int | None:
    """The row with the highest score that is unlike the rows `near`; None if no row is allowed.

    `scores`, `allowed`: (n,); `vectors`: (n, d) with rows of unit length, or of a few blocks of unit length. Rows whose
    cosine with one of `near` is at least `most_similar` are passed over, unless the `looked_at` best ones all are.
    """
    open_ = np.flatnonzero(allowed)
    if len(open_) == 0:
        return None
    values = scores[open_]
    size = min(looked_at, len(open_))
    best = open_[np.argpartition(-values, size - 1)[:size]]
    best = best[np.lexsort((best, -scores[best]))]
    if not near or most_similar >= 1:
        return int(best[0])
    theirs, mine = unit(np.asarray(vectors[list(near)])), unit(np.asarray(vectors[best]))
    distinct = np.flatnonzero((mine @ theirs.T).max(axis=1) < most_similar)
    return int(best[distinct[0]]) if len(distinct) else int(best[0])


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The rows scaled to unit length; rows of zeros stay."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), np.float32)


def draw(allowed: NDArray[np.bool_], rng: Generator) -> int | None:
    """A row drawn uniformly from the allowed ones; None if there is none."""
    open_ = np.flatnonzero(allowed)
    return int(open_[rng.integers(len(open_))]) if len(open_) else None
