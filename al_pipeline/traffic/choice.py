"""Which logged texts enter the pool: a random sample with its probabilities, and those that the model is unsure of.

The texts of a window can be many, so they are gone through once, and only those in the running are kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from al_pipeline.traffic.rows import LoggedText

Policy = Literal["test", "random", "uncertain", "novel"]


@dataclass(slots=True)
class Chosen:
    """A text that was chosen."""

    row: LoggedText
    """Its first occurrence."""
    policy: Policy
    times: int = 0
    """How often it was logged in the window."""
    weight: float = 0.0
    """How many requests those stand for: the sum of 1 / propensity."""
    propensity: float | None = None
    """The probability that an occurrence of this text was logged and its text drawn; None unless drawn at random.

    `times / propensity` estimates without bias how often the text was asked.
    """


def choose(
    rows: Iterable[tuple[bytes, LoggedText]], random: int, uncertain: int, seed: str, test: int = 0
) -> list[Chosen]:
    """Choose up to `test` and `random` texts at random and up to `uncertain` others of the smallest margins.

    Oldest first. Those of `test` are drawn first.

    `rows`: the texts with a digest each (32 bytes); those with equal digests are one text. The same rows and seed give
    the same choice, whatever the order of the texts.
    """
    seen: set[bytes] = set()
    drawn = _Smallest(test + random)
    unsure = _Smallest(test + random + uncertain if uncertain else 0)
    for digest, row in rows:
        if digest[:8] not in seen:
            seen.add(digest[:8])
            key = int.from_bytes(sha256(seed.encode() + digest).digest()[:8])
            drawn.offer((key, 0.0), digest, Chosen(row, "random"))
            unsure.offer((row.margin, float(key)), digest, Chosen(row, "uncertain"))
        for one in (drawn.kept.get(digest), unsure.kept.get(digest)):
            if one is not None:
                one.times += 1
                one.weight += 1 / row.propensity
    for place, digest in enumerate(drawn.in_order()):
        one = drawn.kept[digest]
        one.policy = "test" if place < test else "random"
        count = min(test, len(drawn.kept)) if place < test else len(drawn.kept) - test
        one.propensity = count / len(seen) * one.times / one.weight
    others = [digest for digest in unsure.in_order() if digest not in drawn.kept][:uncertain]
    return sorted([*drawn.kept.values(), *(unsure.kept[one] for one in others)], key=lambda one: one.row.time)


class _Smallest:
    """The `count` texts with the smallest keys. One that is not among them at first never is later."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[tuple[float, float], bytes]] = []
        self.kept: dict[bytes, Chosen] = {}

    def offer(self, key: tuple[float, float], digest: bytes, one: Chosen) -> None:
        """Keep a text if its key is small enough."""
        entry = ((-key[0], -key[1]), digest)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
            self.kept[digest] = one
        elif self._count and entry > self._heap[0]:
            _, lost = heapq.heapreplace(self._heap, entry)
            del self.kept[lost]
            self.kept[digest] = one

    def in_order(self) -> list[bytes]:
        """The texts, the smallest key first."""
        return [digest for _, digest in sorted(self._heap, reverse=True)]
