"""Shards of the vector cache for other clones, sealed with a key that the team shares.

Whoever can write to the store could change vectors, and no record in git has their digests. So a shard carries a keyed
digest (HMAC-SHA256) over the encoder's fingerprint and its bytes: without the key nobody can make one that is accepted.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.shards import shard_name, shard_tensors

_SEAL = 32
"""Length of a seal in bytes."""


def seal(key: bytes, fingerprint: str, shard: bytes) -> bytes:
    """The bytes of a shard with its seal, to be stored under the shard's name."""
    return _seal_of(key, fingerprint, shard) + shard


def unsealed(key: bytes, fingerprint: str, name: str, data: bytes) -> bytes | None:
    """The shard in what was stored under `name`; None unless `key` sealed it, for this fingerprint, and it is whole."""
    shard = data[_SEAL:]
    if not hmac.compare_digest(data[:_SEAL], _seal_of(key, fingerprint, shard)) or name != shard_name(shard):
        return None
    tensors = shard_tensors(shard)
    if tensors is None or tensors.keys() != {"hashes", "vectors"}:
        return None
    vectors = tensors["vectors"]
    return shard if vectors.ndim == 2 and np.isfinite(vectors).all() else None


def digests_in(shard: bytes) -> NDArray[np.uint8]:
    """The content hashes in what `unsealed` returned, as bytes (n, 32)."""
    tensors = shard_tensors(shard)
    assert tensors is not None  # `unsealed` has checked it
    found: NDArray[np.uint8] = tensors["hashes"]
    return found


def _seal_of(key: bytes, fingerprint: str, shard: bytes) -> bytes:
    return hmac.digest(key, b"al-vectors/1\n" + fingerprint.encode() + b"\n" + shard, hashlib.sha256)


class Wanted:
    """Content hashes that have no vector yet."""

    def __init__(self, digests: NDArray[np.uint8]) -> None:
        """`digests`: as bytes, (n, 32)."""
        self._keys = np.unique(_as_keys(digests))
        self._open = np.ones(len(self._keys), np.bool_)
        self.left = len(self._keys)
        """The number of hashes that are left."""

    def discard(self, digests: NDArray[np.uint8]) -> None:
        """Remove hashes, as bytes (m, 32), at a cost that grows with m."""
        keys = _as_keys(digests)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        at = np.unique(at[self._keys[at] == keys])
        self.left -= int(self._open[at].sum())
        self._open[at] = False


def _as_keys(digests: NDArray[np.uint8]) -> NDArray[np.bytes_]:
    return np.ascontiguousarray(digests).view("S32").ravel()
