"""Random sampling and tie-breaking that depend on ids and seeds alone.

A choice uses a keyed hash of each id, not its position, so that it depends on neither the order of the ids nor the
version of a random generator.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]

_BLOCK = 10_000
"""Number of ids in memory at a time."""


def round_seed(project_seed: int, round_number: int, strategy: str) -> SeedSequence:
    """The seed of one round's selection, so that a repeated build selects the same batch."""
    return SeedSequence([project_seed, round_number, zlib.crc32(strategy.encode())])


def ensemble_seed(project_seed: int, round_number: int, strategy: str) -> SeedSequence:
    """The seed of the sampled models that score the pool in one round."""
    return SeedSequence([*round_seed(project_seed, round_number, strategy).generate_state(4), zlib.crc32(b"ensemble")])


def purpose_rng(seed: SeedSequence, purpose: str) -> np.random.Generator:
    """An independent random generator for each purpose of a seed."""
    return np.random.default_rng([*seed.generate_state(4), zlib.crc32(purpose.encode())])


def top_k(scores: ArrayLike, ids: Sequence[str], k: int, seed: SeedSequence) -> Positions:
    """Positions of the k highest scores in descending order; ties ordered by a hash of (seed, id).

    All rows if there are fewer than k. Raises ValueError on NaN (infinities are allowed) and on a negative k.
    """
    values: Floats = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(ids),):
        raise ValueError(f"{len(ids)} ids do not match scores of shape {values.shape}")
    if np.isnan(values).any():
        raise ValueError(f"the score of item {ids[int(np.argmax(np.isnan(values)))]!r} is NaN")
    k = at_most(k, len(ids))
    if k == 0:
        return np.empty(0, dtype=np.intp)
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    contenders = np.flatnonzero(values >= threshold)
    found, names = values[contenders], [ids[position] for position in contenders]
    keys = np.zeros(len(contenders), dtype=np.uint64)
    if len(tied := _tied(found)):
        keys[tied] = keyed_hashes([names[row] for row in tied], seed, "ties")
    return contenders[_lexsort(keys, -found, names)[:k]]


def _tied(values: Floats) -> Positions:
    """Positions of values that occur more than once."""
    order = np.argsort(values)
    same = values[order][1:] == values[order][:-1]
    return order[np.append(same, False) | np.append(False, same)] if same.any() else order[:0]


def sample(ids: Sequence[str], k: int, seed: SeedSequence, purpose: str = "sample") -> Positions:
    """Positions of a uniform random sample of k of the ids, in random order; all ids if there are fewer.

    It takes the k smallest hashes of (seed, purpose, id). Raises ValueError on a negative k.
    """
    k = at_most(k, len(ids))
    if k == 0:
        return np.empty(0, dtype=np.intp)
    keys = keyed_hashes(ids, seed, purpose)
    if k < len(ids):
        threshold = np.partition(keys, k)[k]
        contenders = np.flatnonzero(keys <= threshold)
    else:
        contenders = np.arange(len(ids))
    tied = [ids[position] for position in contenders]
    return contenders[_lexsort(keys[contenders], np.zeros(len(contenders)), tied)[:k]]


def draw(ids: Iterable[str], k: int, seed: SeedSequence, purpose: str = "sample") -> list[str]:
    """Like `sample`, for ids from an iterator, of which only a block is in memory; returns ids, not positions."""
    kept: list[str] = []
    keys = np.empty(0, dtype=np.uint64)
    if k == 0:
        return kept
    for block in _blocks(ids):
        fresh = keyed_hashes(block, seed, purpose)
        near = np.arange(len(block)) if len(kept) < k else np.flatnonzero(fresh <= keys[-1])
        names, both = kept + [block[row] for row in near], np.concatenate([keys, fresh[near]])
        order = _lexsort(both, np.zeros(len(both)), names)[: at_most(k, len(names))]
        kept, keys = [names[row] for row in order], both[order]
    return kept


def _blocks(ids: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(ids)
    while block := list(islice(rest, _BLOCK)):
        yield block


def keyed_hashes(ids: Sequence[str], seed: SeedSequence, purpose: str) -> NDArray[np.uint64]:
    """A 64-bit keyed hash (BLAKE2b) of each id, (n,), independent for each purpose."""
    key = seed.generate_state(8, np.uint32).astype("<u4").tobytes()
    person = zlib.crc32(purpose.encode()).to_bytes(8, "little")
    keyed = hashlib.blake2b(digest_size=8, key=key, person=person)
    digests = bytearray()
    for encoded in _encoded(ids):
        one = keyed.copy()
        one.update(encoded)
        digests += one.digest()
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def _encoded(ids: Sequence[str]) -> Iterable[bytes]:
    try:
        return list(map(str.encode, ids))
    except UnicodeEncodeError:
        return [item_id.encode("utf-8", "surrogatepass") for item_id in ids]


def _lexsort(keys: NDArray[np.uint64], primary: Floats, ids: Sequence[str]) -> Positions:
    """Order by `primary`, then `keys`, then id (hash collisions are possible)."""
    order: Positions = np.lexsort((keys, primary))
    same = (primary[order][1:] == primary[order][:-1]) & (keys[order][1:] == keys[order][:-1])
    if same.any():
        return np.array(sorted(range(len(ids)), key=lambda i: (primary[i], int(keys[i]), ids[i])), dtype=np.intp)
    return order


def at_most(k: int, available: int) -> int:
    """`k`, or `available` if that is fewer. Raises ValueError on a negative k."""
    if k < 0:
        raise ValueError(f"cannot choose {k} items")
    return min(k, available)


def first_repeat(ids: Sequence[str]) -> str:
    """The first id that repeats an earlier one; there must be one."""
    seen: set[str] = set()
    return next(item_id for item_id in ids if item_id in seen or seen.add(item_id))  # type: ignore[func-returns-value]
