"""The interface of classifiers, and the classifier on frozen features: a linear head, or an estimator of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.strategies import Samples
from al_pipeline.errors import BadInput
from al_pipeline.features.tfidf import IDF_FILE, TERMS_FILE, Tfidf, load_tfidf
from al_pipeline.features.tfidf import fit as fit_tfidf
from al_pipeline.files import read_json, sha256_bytes, sha256_file, write_bytes, write_json
from al_pipeline.models.approximate import Columns
from al_pipeline.models.ensembles import draw_heads, sample_proba
from al_pipeline.models.estimators import ESTIMATORS, HEAD, Estimate, fit_classifier
from al_pipeline.models.linear import STRENGTH, FeatureMatrix, Head
from al_pipeline.params import Features

CARD_FILE = "card.json"
HEAD_FILE = "head.safetensors"
CONTROL_FILE = "control.safetensors"
FORMAT = "al-head/1"

Vectors = NDArray[np.float32]


class Classifier(Protocol):
    """A fitted model, whatever its kind, as the stages use it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns of the probabilities."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Labels of each class that it was fitted on, classes without labels left out."""
        ...

    @property
    def encoder(self) -> str | None:
        """The `encoder_identity` of the encoder that it fits, where that is known."""
        ...

    @property
    def needs_vectors(self) -> bool:
        """Whether it looks at the encoder's vectors."""
        ...

    def as_control(self) -> Classifier | None:
        """The same kind of model, fitted on the randomly drawn labels alone; None where there is none."""
        ...

    def predict_proba(self, texts: Sequence[str], vectors: Vectors | None) -> NDArray[np.float64]:
        """Probabilities, (n, C); `vectors` are the encoder's, for a model that needs them."""
        ...

    def draw(
        self, kind: Samples, texts: Sequence[str], vectors: Vectors | None, labels: Sequence[str], seed: SeedSequence
    ) -> Sequence[Any]:
        """K sampled models, from the data that it was fitted on; the same for the same seed."""
        ...

    def sample_proba(self, judges: Any, texts: Sequence[str], vectors: Vectors | None) -> NDArray[np.float64]:
        """Probabilities of each sampled model, (n, K, C)."""
        ...

    def likeness(
        self, texts: Sequence[str], vectors: Vectors | None, others: Sequence[str], other_vectors: Vectors | None
    ) -> NDArray[np.float64]:
        """Similarity of texts, (n, m)."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model; equal models give equal bytes."""
        ...


@dataclass(frozen=True)
class TextModel:
    """A head with everything that turns a text into what the head sees, except the encoder."""

    head: Head | Estimate
    tfidf: Tfidf | None
    uses_encoder: bool
    encoder: str | None = None
    """The `encoder_identity` of the vectors that it was fitted on, where that is known."""
    vectors: str | None = None
    """The SHA-256 of those vectors: where a model comes out different, it tells whether the features did."""
    strength: float = STRENGTH
    control: Head | Estimate | None = None
    """The same classifier fitted on the randomly drawn labels alone: the result of random sampling."""

    @property
    def kind(self) -> str:
        """Which features it uses, as `features.kind` in `params.yaml` names them."""
        if self.tfidf is None:
            return "encoder"
        return "encoder+tfidf" if self.uses_encoder else "tfidf"

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns of the probabilities, in the schema's order."""
        return self.head.classes

    @property
    def counts(self) -> Mapping[str, int]:
        """Labels of each class that was seen, in the schema's order."""
        return self.head.counts

    @property
    def needs_vectors(self) -> bool:
        """Whether the encoder's vectors are part of its features."""
        return self.uses_encoder

    def as_control(self) -> TextModel | None:
        """The control as a model of its own; None where there is none."""
        return None if self.control is None else replace(self, head=self.control, control=None)

    def predict_proba(self, texts: Sequence[str], vectors: Vectors | None) -> NDArray[np.float64]:
        """Probabilities (n, C), strictly between 0 and 1, rows sum to 1. Raises BadInput for unfit vectors."""
        return self.head.predict_proba(self._seen(texts, vectors))

    def columns(self, texts: Sequence[str], vectors: Vectors | None) -> Columns | None:
        """What the head's `approximate_margins` takes; None where it has learnt nothing, or is no linear head."""
        return self.head.columns(self._seen(texts, vectors)) if isinstance(self.head, Head) else None

    def draw(
        self, kind: Samples, texts: Sequence[str], vectors: Vectors | None, labels: Sequence[str], seed: SeedSequence
    ) -> tuple[Head | Estimate, ...]:
        """Sampled heads, from the data that this model was fitted on; the same for the same seed."""
        return draw_heads(kind, self.head, self._seen(texts, vectors), labels, seed)

    def sample_proba(
        self, judges: Sequence[Head | Estimate], texts: Sequence[str], vectors: Vectors | None
    ) -> NDArray[np.float64]:
        """Probabilities of each of the heads `judges`, (n, K, C)."""
        return sample_proba(judges, self._seen(texts, vectors))

    def _seen(self, texts: Sequence[str], vectors: Vectors | None) -> FeatureMatrix:
        """What the head looks at: nothing, where it has learnt nothing."""
        if not self.head.widths:
            return FeatureMatrix(np.zeros((len(texts), 0), np.float32))
        return _features(texts, vectors, self.uses_encoder, self.tfidf)

    def likeness(
        self, texts: Sequence[str], vectors: Vectors | None, others: Sequence[str], other_vectors: Vectors | None
    ) -> NDArray[np.float64]:
        """How alike texts are by what the model sees of them, (n, m)."""
        mine = _features(texts, vectors, self.uses_encoder, self.tfidf)
        return mine.likeness(_features(others, other_vectors, self.uses_encoder, self.tfidf))

    def save(self, folder: Path) -> None:
        """Write the head, control and vocabulary where there are such, and last `card.json`, which seals them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
        data = _tensors(self.head)
        write_bytes(folder / HEAD_FILE, data)
        digests = {HEAD_FILE: sha256_bytes(data)}
        (folder / CONTROL_FILE).unlink(missing_ok=True)
        if self.control:
            write_bytes(folder / CONTROL_FILE, _tensors(self.control))
            digests[CONTROL_FILE] = sha256_file(folder / CONTROL_FILE)
        if self.tfidf:
            self.tfidf.save(folder)
            digests |= {name: sha256_file(folder / name) for name in (TERMS_FILE, IDF_FILE)}
        else:
            for name in (TERMS_FILE, IDF_FILE):
                (folder / name).unlink(missing_ok=True)
        write_json(folder / CARD_FILE, self._card(digests))

    def _card(self, digests: dict[str, str]) -> dict[str, Any]:
        return {
            **_head_card(self.head),
            "classes": list(self.head.classes),
            "control": _head_card(self.control) if self.control else None,
            "encoder": self.encoder,
            "features": self.kind,
            "format": FORMAT,
            "sha256": digests,
            "strength": self.strength,
            "total_labels": sum(self.head.counts.values()),
            "vectors": self.vectors,
        }


def _head_card(head: Head | Estimate) -> dict[str, Any]:
    """What the tensors of a head do not say."""
    return {
        "estimator": head.name if isinstance(head, Estimate) else HEAD,
        "labels": dict(head.counts),
        "seen": list(head.seen),
        "shift": list(head.shift) if isinstance(head, Head) else [],
        "temperature": head.temperature,
        "widths": list(head.widths),
    }


def _tensors(head: Head | Estimate) -> bytes:
    from safetensors.numpy import save

    if isinstance(head, Estimate):
        return save(dict(sorted(head.arrays.items())))
    tensors = {f"weights.{number}": weights for number, weights in enumerate(head.weights)}
    return save({**tensors, "bias": head.bias})


def fit_text_model(
    texts: Sequence[str],
    vectors: Vectors | None,
    labels: Sequence[str],
    classes: Sequence[str],
    features: Features,
    tfidf_corpus: Iterable[str],
    seed: int,
    calibrate: bool,
    encoder: str | None = None,
    control: Sequence[int] | None = None,
    classifier: str = HEAD,
) -> TextModel:
    """Fit a classifier on frozen features of labelled texts; with no labels it is the prior.

    `classifier`: the head, or one of `ESTIMATORS`. `control`: the rows that the control is fitted on, None for a model
    without one.

    `vectors` are the encoder's for `texts`, where the features use it. `tfidf_corpus` gives the vocabulary: the
    pool's texts, labelled or not; it is read only where the features use TF-IDF. `encoder` is noted in the card.
    """
    tfidf = fit_tfidf(tfidf_corpus) if features.uses_tfidf else None
    matrix = _features(texts, vectors, features.uses_encoder, tfidf)
    head = fit_classifier(classifier, matrix, labels, classes, seed, calibrate)
    beside = None
    if control is not None:
        rows = np.array(control, dtype=np.intp)
        drawn = [labels[row] for row in rows]
        beside = fit_classifier(classifier, matrix.rows(rows), drawn, classes, seed, calibrate)
    if vectors is None or not features.uses_encoder:
        return TextModel(head, tfidf, features.uses_encoder, control=beside)
    digest = sha256_bytes(np.ascontiguousarray(vectors, np.float32).tobytes())
    return TextModel(head, tfidf, True, encoder, digest, control=beside)


def load_text_model(folder: Path) -> TextModel:
    """What `TextModel.save` wrote, checked by digest. Raises BadInput where it is damaged or something else."""
    from safetensors import SafetensorError

    card = read_json(folder / CARD_FILE)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise BadInput(f"{folder} holds no model that this engine reads: its format is {found!r}, not {FORMAT!r}")
    try:
        return _load(folder, card)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise BadInput(f"{folder} holds no whole model: its card says something impossible ({error!r})") from None


def _load(folder: Path, card: dict[str, Any]) -> TextModel:
    kinds = card["features"].split("+")
    beside = (CONTROL_FILE,) if card.get("control") else ()
    for name in (HEAD_FILE, *beside, *((TERMS_FILE, IDF_FILE) if "tfidf" in kinds else ())):
        expected = card["sha256"].get(name)
        actual = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if actual != expected:
            raise BadInput(f"{folder / name} is not what the model was saved with: sha256 {actual}, card {expected}")
    return TextModel(
        head=_load_head(folder / HEAD_FILE, card["classes"], card),
        tfidf=load_tfidf(folder) if "tfidf" in kinds else None,
        uses_encoder="encoder" in kinds,
        encoder=card["encoder"],
        vectors=card.get("vectors"),
        strength=card["strength"],
        control=_load_head(folder / CONTROL_FILE, card["classes"], card["control"]) if beside else None,
    )


def _load_head(path: Path, classes: Sequence[str], card: dict[str, Any]) -> Head | Estimate:
    from safetensors.numpy import load

    tensors = load(path.read_bytes())
    widths = tuple(card["widths"])
    if (name := card.get("estimator", HEAD)) != HEAD:
        if name not in ESTIMATORS:
            raise BadInput(f"{path} is of an estimator {name!r}, which is not in al_pipeline/models/estimators.py")
        own = {label: card["labels"][label] for label in card["seen"]}
        return Estimate(name, tuple(classes), own, tensors, widths, card["temperature"])
    weights = tuple(tensors[f"weights.{number}"] for number in range(len(widths)))
    counts = {name: card["labels"][name] for name in card["seen"]}
    expected = [(len(counts), width) for width in widths]
    if [part.shape for part in weights] != expected or tensors["bias"].shape != (len(counts),):
        raise BadInput(f"{path} has other shapes than its card says: expected weights {expected}")
    shift = tuple(card.get("shift", ()))
    if len(shift) not in (0, len(counts)):
        raise BadInput(f"{path} is of {len(counts)} classes, and its card shifts {len(shift)}")
    return Head(tuple(classes), counts, weights, tensors["bias"], card["temperature"], widths, shift)


def _features(texts: Sequence[str], vectors: Vectors | None, uses_encoder: bool, tfidf: Tfidf | None) -> FeatureMatrix:
    if uses_encoder and vectors is None:
        raise BadInput("this model uses an encoder, but no vectors were given")
    if tfidf is None:
        return FeatureMatrix(vectors)
    return FeatureMatrix(vectors if uses_encoder else None, tfidf.transform(texts), tfidf.components)
