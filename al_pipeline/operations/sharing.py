"""The team's cache of vectors on the DVC remote: fetched before the pool is encoded, filled afterwards. Opt-in.

A clone uses it if `AL_VECTORS_KEY` is set, see `features.sharing`. A remote that fails, and files that the key did not
seal, cost time alone: their texts are encoded here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from al_pipeline.data.pool import iter_digests
from al_pipeline.errors import RepositoryError, UsageError
from al_pipeline.features.sharing import Wanted, digests_in, seal, unsealed
from al_pipeline.features.vectors import Vectors, open_vectors
from al_pipeline.files import read_json, write_bytes
from al_pipeline.integrations.dvc.session import Dvc
from al_pipeline.params import Features
from al_pipeline.workspace.fingerprint import recorded_device
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.layout import Layout

KEY = "AL_VECTORS_KEY"
"""The environment variable with the key."""
_LEAST = 32
"""The minimum number of characters of a key."""
_AT_ONCE = 16
"""The number of shards that are copied before the next ones are prepared; bounds the disk space for copies."""


@dataclass(frozen=True)
class SharedVectors:
    """The shared cache of a workspace, for the encoder and the device of its build."""

    layout: Layout
    features: Features
    dvc: Dvc
    key: bytes
    warn: Callable[[str], None]

    def fetch(self) -> None:
        """Add shards from the remote to the cache of vectors, until no text of the pool and the test set lacks one.

        The pool is read once; then each shard says which texts it is for.
        """
        vectors = self._open()
        if vectors is None:
            return
        wanted = Wanted(vectors.missing_digests(iter_digests([self.layout.pool, self.layout.test])))
        if not wanted.left:
            return
        refused: list[str] = []
        try:
            here = vectors.shard_files()
            names = [name for name in self.dvc.shared_names(self._folder(vectors)) if name not in here]
            for start in range(0, len(names), _AT_ONCE):
                refused += self._take(vectors, names[start : start + _AT_ONCE], wanted)
                if not wanted.left:
                    break
        except RepositoryError as error:
            self.warn(f"the team's vectors could not be fetched, so texts are encoded here: {error}")
        if refused:
            self.warn(
                f"{len(refused)} files of the team's vectors are damaged or not sealed with this {KEY}, and were not "
                f"used: {self._folder(vectors)}/{refused[0]} in the DVC remote; delete them there"
            )

    def send(self) -> None:
        """Store what the remote lacks of the cache of vectors there."""
        vectors = self._open()
        if vectors is None:
            return
        folder, files = self._folder(vectors), vectors.shard_files()
        try:
            there = set(self.dvc.shared_names(folder))
            names = [name for name in files if name not in there]
            for start in range(0, len(names), _AT_ONCE):
                with self._copies() as copies:
                    for name in names[start : start + _AT_ONCE]:
                        sealed = seal(self.key, vectors.fingerprint, files[name].read_bytes())
                        write_bytes(copies / name, sealed, 0o600)
                    self.dvc.send_shared(folder, copies)
        except RepositoryError as error:
            self.warn(f"the team's vectors could not be stored; the next round tries again: {error}")

    def is_sealed(self) -> bool | None:
        """Whether the key sealed what the remote has, by one file; None if the remote has none for this encoder."""
        vectors = self._open()
        names = [] if vectors is None else self.dvc.shared_names(self._folder(vectors))[:1]
        if vectors is None or not names:
            return None
        with self._copies() as copies:
            self.dvc.fetch_shared(self._folder(vectors), names, copies)
            return unsealed(self.key, vectors.fingerprint, names[0], (copies / names[0]).read_bytes()) is not None

    def _take(self, vectors: Vectors, names: list[str], wanted: Wanted) -> list[str]:
        """Copy shards into the cache; return the names of those that the key did not seal."""
        refused = []
        with self._copies() as copies:
            self.dvc.fetch_shared(self._folder(vectors), names, copies)
            for name in names:
                shard = unsealed(self.key, vectors.fingerprint, name, (copies / name).read_bytes())
                if shard is None:
                    refused.append(name)
                else:
                    write_bytes(vectors.folder / name, shard)
                    wanted.discard(digests_in(shard))
        return refused

    def _open(self) -> Vectors | None:
        layout = self.layout
        return open_vectors(layout.encoder, layout.features, self.features, recorded_device(read_json(layout.engine)))

    def _folder(self, vectors: Vectors) -> str:
        return f"vectors/{vectors.fingerprint}"

    @contextmanager
    def _copies(self) -> Iterator[Path]:
        """A folder for copies of shards, which a killed tick may have left."""
        folder = self.layout.private / "sharing"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield private_folder(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def shared_vectors(layout: Layout, features: Features, dvc: Dvc, warn: Callable[[str], None]) -> SharedVectors | None:
    """The shared cache; None if the environment has no key. Raises UsageError if the key is too short to be one."""
    given = os.environ.get(KEY, "")
    if not given:
        return None
    if problem := key_problem(given):
        raise UsageError(problem)
    return SharedVectors(layout, features, dvc, given.encode(), warn)


def key_problem(key: str) -> str:
    """What is wrong with a key, in words; empty if nothing is, or without one."""
    if not key or len(key) >= _LEAST:
        return ""
    return f"{KEY} has {len(key)} characters, and a key has at least {_LEAST}: `openssl rand -hex 32`"
