"""Encoding on other machines: what a worker gets, what it returns, and whether it computes the same bytes as this one.

A worker shares no disk with the workspace: it gets texts and returns vectors, as bytes. It is used only if it has what
the encoder's fingerprint names, and gives the same bytes for a probe of texts of all lengths.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput, EngineChanged, ExternalServiceError
from al_pipeline.features.device import find_device
from al_pipeline.features.encoder import Encoder, encoder_identity, fingerprint_parts
from al_pipeline.features.shards import digest_rows, shard_bytes, shard_tensors
from al_pipeline.params import Features
from al_pipeline.records import CPU

_PROBE_ROWS = 4
"""Number of texts of each length in a probe."""
_DIGEST = 32
"""Length of a SHA-256 in bytes."""


class Recipe(msgspec.Struct, frozen=True):
    """How to encode: the encoder, its settings, and what a worker must agree with."""

    release: str
    """The version of al-pipeline."""
    folder: str
    """The workspace's copy of the encoder, for a worker that can read it."""
    features: Features
    device: str
    parts: dict[str, Any]
    """The encoder's `fingerprint_parts` here."""
    probe: str
    """The `probe` here."""

    @property
    def identity(self) -> str:
        """The encoder's identity."""
        return str(self.parts["identity"])


class Order(msgspec.Struct, frozen=True):
    """A shard to encode: texts, each with its content hash."""

    recipe: Recipe
    hashes: list[str]
    texts: list[str]


def recipe(folder: Path, features: Features, device: str, probe: str) -> Recipe:
    """The recipe for the encoder in `folder` on this machine."""
    identity = encoder_identity(folder, features.max_tokens)
    parts = fingerprint_parts(identity, features.precision, device)
    return Recipe(version("al-pipeline"), str(folder.resolve()), features, device, parts, probe)


def probe(encoder: Encoder) -> str:
    """Digest of the vectors of random texts, four in each sixteen lengths: another kind of machine rounds otherwise."""
    rng = np.random.default_rng(0)
    tokens = []
    for length in sorted({encoder.padded_length(range(size)) for size in range(1, encoder.max_tokens + 1)}):
        sizes = rng.integers(max(1, length - 15), min(length, encoder.max_tokens) + 1, _PROBE_ROWS)
        tokens += [rng.integers(0, encoder.vocabulary, size).tolist() for size in sizes]
    return hashlib.sha256(encoder.encode_tokens(tokens).tobytes()).hexdigest()


def to_bytes(order: Order) -> bytes:
    """The order as bytes, for a worker."""
    return _with_digest(msgspec.msgpack.encode(order))


def vectors_of(reply: bytes, hashes: Sequence[str]) -> NDArray[np.float32]:
    """The vectors in a worker's reply to an order of `hashes`, (n, d), in their order.

    Raises ExternalServiceError if they are damaged, or are not those of the order.
    """
    shard = _verified(reply)
    tensors = None if shard is None else shard_tensors(shard)
    if tensors is None or tensors.keys() != {"hashes", "vectors"}:
        raise ExternalServiceError("a worker's vectors arrived damaged; `al round` encodes their texts again")
    vectors: NDArray[np.float32] = tensors["vectors"]
    same = np.array_equal(tensors["hashes"], digest_rows(list(hashes)))
    if not same or vectors.dtype != np.float32 or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ExternalServiceError("a worker returned other vectors than those asked for; is its software the same?")
    return vectors


class Worker:
    """The worker's side: encodes orders, with one encoder in memory. `find` returns the folder of a recipe's encoder.

    Use it from several threads: one of them encodes at a time, with all `threads` of the worker.
    """

    def __init__(self, find: Callable[[Recipe], Path]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._loaded: tuple[Recipe, Encoder] | None = None

    def encode(self, order: bytes, threads: int | None = None) -> bytes:
        """The vectors of an order of `to_bytes`, for `vectors_of`: a SHA-256 and a shard.

        Raises EngineChanged if this machine computes other bytes, BadInput or ExternalServiceError if order or encoder
        are unusable.
        """
        body = _verified(order)
        if body is None:
            raise ExternalServiceError(f"an order arrived damaged on {_here()}; `al round` encodes its texts again")
        try:
            wanted = msgspec.msgpack.decode(body, type=Order)
        except msgspec.MsgspecError as error:
            raise BadInput(f"{_here()} cannot read its order: install the same al-pipeline there ({error})") from None
        with self._lock:
            vectors = self._encoder(wanted.recipe, threads).encode(wanted.texts)
        return _with_digest(shard_bytes({"hashes": digest_rows(wanted.hashes), "vectors": vectors}))

    def _encoder(self, wanted: Recipe, threads: int | None) -> Encoder:
        if self._loaded is None or self._loaded[0] != wanted:
            self._loaded = None
            check_parts(wanted)
            folder = self._find(wanted)
            features = wanted.features
            encoder = Encoder(folder, features.max_tokens, features.precision, threads, device=wanted.device)
            if probe(encoder) != wanted.probe:
                raise EngineChanged(
                    f"{_here()} has the versions and processor features of the workspace's machine but computes other "
                    f"vectors; {_ONE_KIND}"
                )
            self._loaded = wanted, encoder
        return self._loaded[1]


_ONE_KIND = "give the cluster only workers of the kind of machine that runs `al round`, or set engine.runner: local"


def check_parts(wanted: Recipe) -> None:
    """Raise EngineChanged, naming the differences, if this machine computes other vectors than `wanted` names."""
    here = fingerprint_parts(wanted.identity, wanted.features.precision, _device_like(wanted.device))
    mine, theirs = _flat(here, version("al-pipeline")), _flat(wanted.parts, wanted.release)
    differences = [
        f"{name}: {mine.get(name, 'absent')}, not {theirs.get(name, 'absent')}"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    if differences:
        raise EngineChanged(
            f"{_here()} would compute other vectors than the workspace's machine ({'; '.join(differences)}); "
            f"{_ONE_KIND}"
        )


def _device_like(wanted: str) -> str:
    """The device here of the kind that `wanted` names."""
    return CPU if wanted == CPU else find_device("auto")


def _flat(parts: dict[str, Any], release: str) -> dict[str, str]:
    flat = {name: str(value) for name, value in parts.items() if name != "versions"}
    return {"al-pipeline": release, **flat, **parts.get("versions", {})}


def _with_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data


def _verified(message: bytes) -> bytes | None:
    """The data of a message of `_with_digest`; None if they are damaged."""
    data = message[_DIGEST:]
    return data if hashlib.sha256(data).digest() == message[:_DIGEST] else None


def _here() -> str:
    return f"the worker {socket.gethostname()}"
