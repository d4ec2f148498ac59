"""The models of a workspace's published rounds, loaded to be served."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.encoder import encoder_identity
from al_pipeline.file_notes import FileNotes
from al_pipeline.integrations.git import Git
from al_pipeline.models.finetuned import FinetunedModel
from al_pipeline.models.text_model import Vectors
from al_pipeline.operations.history import History, read_history
from al_pipeline.operations.predict import PublishedModel, check_encoder, open_model
from al_pipeline.records import round_name
from al_pipeline.serving.versions import Served
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.features.encoder import Encoder

TORCH = "torch"
_TRIAL = "Is this text as good as any other to try a model?"

Encode = Callable[[Sequence[str]], Vectors]
Predict = Callable[[Sequence[str]], NDArray[np.float64]]


class WorkspaceModels:
    """The models of a workspace, computed by torch: the same probabilities as those of `al predict`, to the byte."""

    runtime = TORCH

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._git = Git(workspace.layout.root)
        self._files: dict[bytes, Path] = {}
        self._history: History | None = None
        self._encoders: WeakValueDictionary[tuple[Any, ...], Encoder] = WeakValueDictionary()
        self._small: dict[tuple[Any, ...], dict[int, tuple[int, ...]]] = {}
        """The small batches that encoders were found to allow."""
        self._notes = FileNotes()

    def mark(self) -> Hashable:
        """What HEAD names, from git's files; another value after each commit and checkout."""
        head = self._file(b"HEAD").read_bytes()
        name = head.removeprefix(b"ref: ").strip() if head.startswith(b"ref: ") else None
        packed = [self._stamp(self._file(file)) for file in (b"packed-refs", b"reftable/tables.list")]
        return head, name and self._content(self._file(name)), *packed

    def promoted(self) -> tuple[int, str] | None:
        """The promoted round and the digest of its model, by the newest commit."""
        self._history = history = read_history(self.workspace.layout, Git(self.workspace.layout.root))
        if history.promoted is None:
            return None
        record = history.record(int(history.promoted.removeprefix("round-")))
        return record.round, record.hashes["model"]

    def rounds(self) -> tuple[int, ...]:
        """The published rounds."""
        return () if self._history is None else tuple(record.round for record in self._history.rounds)

    def load(self, number: int) -> Served:
        """Load the model of a round, verified by digest, and predict a text with it."""
        published = open_model(self.workspace, number, self._history)
        encode = self.encoder(published) if encodes(published) else None
        return served(published, predictor(published, encode), self.runtime, gains=True)

    def encoder(self, published: PublishedModel) -> Encode:
        """What computes the vectors of texts for a model."""
        from al_pipeline.features.encoder import Encoder

        features, folder = published.features, published.folder / "encoder"
        identity = encoder_identity(folder, features.max_tokens, self._notes)
        if isinstance(published.model, FinetunedModel):
            trained = published.model.trained
            key: tuple[Any, ...] = (identity, "trained", published.device)
            self._small[key] = trained.allow_small_batches(self._small.get(key))
            return trained.encode
        check_encoder(published, identity)
        key = (identity, features.max_tokens, features.precision, published.device)
        encoder = self._encoders.get(key)
        if encoder is None:
            encoder = Encoder(folder, features.max_tokens, features.precision, device=published.device)
            self._small[key] = encoder.allow_small_batches(self._small.get(key))
            self._encoders[key] = encoder
        return encoder.encode

    def _file(self, name: bytes) -> Path:
        """The path of one of git's files."""
        if name not in self._files:
            self._files[name] = self._git.path(name.decode("utf-8", "surrogateescape"))
        return self._files[name]

    @staticmethod
    def _content(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except OSError:
            return None

    @staticmethod
    def _stamp(path: Path) -> tuple[int, int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def encodes(published: PublishedModel) -> bool:
    """Whether a model computes vectors of texts: by a frozen encoder, or by one that was trained."""
    model = published.model
    return bool(model.tensors) if isinstance(model, FinetunedModel) else model.needs_vectors


def proba_of(published: PublishedModel, texts: Sequence[str], vectors: Vectors) -> NDArray[np.float64]:
    """Class probabilities (n, C) of texts, from the vectors (n, d) of the frozen or the trained encoder."""
    model = published.model
    return model.proba_of(vectors) if isinstance(model, FinetunedModel) else model.predict_proba(texts, vectors)


def predictor(published: PublishedModel, encode: Encode | None) -> Predict:
    """What predicts texts with a model; `encode` computes their vectors, if it needs them."""
    if encode is None:
        return lambda texts: published.model.predict_proba(texts, None)
    return lambda texts: proba_of(published, texts, encode(texts))


def served(published: PublishedModel, predict_proba: Predict, runtime: str, gains: bool) -> Served:
    """A loaded model as it is served, after a trial. Raises what the trial raises."""
    record = published.record
    predict_proba([f"{_TRIAL} {round_name(record.round)}"])
    return Served(record.round, record.hashes["model"], runtime, tuple(published.model.classes), predict_proba, gains)
