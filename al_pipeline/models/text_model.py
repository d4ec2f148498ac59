"""The interface of classifiers, and the classifier on frozen features: a linear head or a plug-in estimator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.strategies import Samples
from al_pipeline.errors import BadInput
from al_pipeline.features.terms import TermCache
from al_pipeline.features.tfidf import IDF_FILE, TERMS_FILE, Tfidf, load_tfidf
from al_pipeline.files import read_json, sha256_bytes, sha256_file, write_bytes, write_json
from al_pipeline.models.approximate import Columns
from al_pipeline.models.ensembles import draw_heads, sample_proba
from al_pipeline.models.estimators import ESTIMATORS, HEAD, Estimate, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import STRENGTH, Head, NamesOfHead
from al_pipeline.params import Features
from al_pipeline.threads import one_thread

CARD_FILE = "card.json"
HEAD_FILE = "head.safetensors"
CONTROL_FILE = "control.safetensors"
FORMAT = "al-head/1"

Vectors = NDArray[np.float32]


class Classifier(Protocol):
    """A fitted model of any kind: the interface that stages use."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns of the probabilities."""
        ...

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of labels of each class that it was fitted on, without classes that have none."""
        ...

    @property
    def encoder(self) -> str | None:
        """The `encoder_identity` of the encoder that it was fitted with, if known."""
        ...

    @property
    def needs_vectors(self) -> bool:
        """Whether it uses the encoder's vectors."""
        ...

    def as_control(self) -> Classifier | None:
        """The control: the same kind of model, fitted on the randomly sampled labels alone; None without one."""
        ...

    def predict_proba(self, texts: Sequence[str], vectors: Vectors | None) -> NDArray[np.float64]:
        """Class probabilities (n, C); `vectors` (n, d) are the encoder's, for a model that needs them."""
        ...

    def draw(
        self, kind: Samples, texts: Sequence[str], vectors: Vectors | None, labels: Sequence[str], seed: SeedSequence
    ) -> Sequence[Any]:
        """K sampled models, given the data that it was fitted on; deterministic for a seed."""
        ...

    def sample_proba(self, samples: Any, texts: Sequence[str], vectors: Vectors | None) -> NDArray[np.float64]:
        """Class probabilities of each sampled model, (n, K, C)."""
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
    """A head with everything that turns a text into its features, except the encoder."""

    head: Head | Estimate
    tfidf: Tfidf | None
    uses_encoder: bool
    encoder: str | None = None
    """The `encoder_identity` of the vectors that it was fitted on, if known."""
    vectors: str | None = None
    """The SHA-256 of those vectors, which shows whether a model differs because its features do."""
    strength: float = STRENGTH
    control: Head | Estimate | None = None
    """The same classifier fitted on the randomly sampled labels alone, to compare with random sampling."""

    @property
    def kind(self) -> str:
        """Its features, by the names of `features.kind` in `params.yaml`."""
        if self.tfidf is None:
            return "encoder"
        return "encoder+tfidf" if self.uses_encoder else "tfidf"

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns of the probabilities, in the schema's order."""
        return self.head.classes

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of labels of each class that has some, in the schema's order."""
        return self.head.counts

    @property
    def needs_vectors(self) -> bool:
        """Whether the encoder's vectors are part of its features."""
        return self.uses_encoder

    def as_control(self) -> TextModel | None:
        """The control as a separate model; None if there is none."""
        return None if self.control is None else replace(self, head=self.control, control=None)

    def predict_proba(self, texts: Sequence[str], vectors: Vectors | None) -> NDArray[np.float64]:
        """Class probabilities (n, C), strictly between 0 and 1; rows sum to 1.

        Raises BadInput if vectors are missing or have another width than those of the fit.
        """
        return self.head.predict_proba(self._head_features(texts, vectors))

    def columns(self, texts: Sequence[str], vectors: Vectors | None) -> Columns | None:
        """The argument of the head's `approximate_margins`; None for a head without weights or an estimator."""
        return self.head.columns(self._head_features(texts, vectors)) if isinstance(self.head, Head) else None

    def draw(
        self, kind: Samples, texts: Sequence[str], vectors: Vectors | None, labels: Sequence[str], seed: SeedSequence
    ) -> tuple[Head | Estimate, ...]:
        """Sampled heads, given the data that this model was fitted on; deterministic for a seed."""
        return draw_heads(kind, self.head, self._head_features(texts, vectors), labels, seed)

    def sample_proba(
        self, samples: Sequence[Head | Estimate], texts: Sequence[str], vectors: Vectors | None
    ) -> NDArray[np.float64]:
        """Class probabilities of each sampled head, (n, K, C)."""
        return sample_proba(samples, self._head_features(texts, vectors))

    def features_of(self, texts: Sequence[str], vectors: Vectors | None) -> FeatureMatrix:
        """The features of texts that this kind of model is fitted on."""
        return text_features(texts, vectors, self.uses_encoder, self.tfidf)

    def _head_features(self, texts: Sequence[str], vectors: Vectors | None) -> FeatureMatrix:
        """The features that the head uses; of width 0 if it was fitted on fewer than two classes."""
        if not self.head.widths:
            return FeatureMatrix(np.zeros((len(texts), 0), np.float32))
        return text_features(texts, vectors, self.uses_encoder, self.tfidf)

    def likeness(
        self, texts: Sequence[str], vectors: Vectors | None, others: Sequence[str], other_vectors: Vectors | None
    ) -> NDArray[np.float64]:
        """Similarity of texts by their features, (n, m): cosines, summed over the feature blocks."""
        mine = text_features(texts, vectors, self.uses_encoder, self.tfidf)
        return mine.likeness(text_features(others, other_vectors, self.uses_encoder, self.tfidf))

    def save(self, folder: Path) -> None:
        """Write the head and, if any, control and vocabulary, then `card.json` with their digests."""
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
    """The attributes of a head that its tensors do not hold."""
    names = {"names": head.names.weight} if isinstance(head, Head) and head.names is not None else {}
    return names | {
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
    if head.names is not None and head.names.prototypes is not None:
        tensors["prototypes"] = head.names.prototypes
    return save({**tensors, "bias": head.bias})


def fit_text_model(
    texts: Sequence[str],
    vectors: Vectors | None,
    labels: Sequence[str],
    classes: Sequence[str],
    features: Features,
    tfidf: Tfidf | None,
    seed: int,
    calibrate: bool,
    encoder: str | None = None,
    control: Sequence[int] | None = None,
    classifier: str = HEAD,
    prototypes: Vectors | None = None,
    weights: NDArray[np.float64] | None = None,
) -> TextModel:
    """Fit a classifier on frozen features of labelled texts; without labels it predicts the prior.

    `classifier`: the head, or one of `ESTIMATORS`. `control`: the rows that the control is fitted on; None for a model
    without one. `vectors` (n, d): the encoder's for `texts`, if the features use it. `tfidf`: the vocabulary
    fitted on the pool's texts, labelled or not, if the features use TF-IDF. `encoder` is recorded in the card.
    `prototypes` (C, d): those of the classes, if their names are to be used; see `al_pipeline/models/names.py`.
    `weights` (n,): those of the labels, for the head without names.
    Raises BadInput if a label is not a class, or vectors are missing.
    """
    matrix = text_features(texts, vectors, features.uses_encoder, tfidf)

    def fit(own: FeatureMatrix, known: Sequence[str], sure: NDArray[np.float64] | None) -> Head | Estimate:
        return fit_classifier(classifier, own, known, classes, seed, calibrate, prototypes, weights=sure)

    def fit_control() -> Head | Estimate | None:
        if control is None:
            return None
        rows = np.array(control, dtype=np.intp)
        return fit(matrix.rows(rows), [labels[row] for row in rows], None if weights is None else weights[rows])

    def digest() -> str | None:
        if vectors is None or not features.uses_encoder:
            return None
        return hashlib.sha256(np.ascontiguousarray(vectors, np.float32).data).hexdigest()

    import scipy.linalg  # first: one_thread() limits the libraries that are loaded
    import scipy.optimize  # noqa: F401

    # Side by side: neither uses two cores all the time. A plug-in need not be able to run twice at once.
    with one_thread(), ThreadPoolExecutor(1) as beside:
        digested = beside.submit(digest)
        if classifier == HEAD:
            made = beside.submit(fit_control)
            head, control_head = fit(matrix, labels, weights), made.result()
        else:
            head, control_head = fit(matrix, labels, weights), fit_control()
        known = digested.result()
    return TextModel(
        head, tfidf, features.uses_encoder, None if known is None else encoder, known, control=control_head
    )


def load_text_model(folder: Path, terms: TermCache | None = None) -> TextModel:
    """Load what `TextModel.save` wrote, checked by digest; `terms` caches TF-IDF rows, if given.

    Raises BadInput if it is damaged or not such a model.
    """
    from safetensors import SafetensorError

    card = read_json(folder / CARD_FILE)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else None
        raise BadInput(f"this engine cannot read the model in {folder}: its format is {found!r}, expected {FORMAT!r}")
    try:
        return _load(folder, card, terms)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise BadInput(f"the model in {folder} is damaged: invalid card or weights ({error!r})") from None


def _load(folder: Path, card: dict[str, Any], terms: TermCache | None) -> TextModel:
    kinds = card["features"].split("+")
    control = (CONTROL_FILE,) if card.get("control") else ()
    for name in (HEAD_FILE, *control, *((TERMS_FILE, IDF_FILE) if "tfidf" in kinds else ())):
        expected = card["sha256"].get(name)
        actual = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if actual != expected:
            raise BadInput(f"{folder / name} does not match its card: sha256 {actual}, card {expected}")
    tfidf = load_tfidf(folder) if "tfidf" in kinds else None
    return TextModel(
        head=_load_head(folder / HEAD_FILE, card["classes"], card),
        tfidf=tfidf if tfidf is None or terms is None else terms.attached_to(tfidf),
        uses_encoder="encoder" in kinds,
        encoder=card["encoder"],
        vectors=card.get("vectors"),
        strength=card["strength"],
        control=_load_head(folder / CONTROL_FILE, card["classes"], card["control"]) if control else None,
    )


def _load_head(path: Path, classes: Sequence[str], card: dict[str, Any]) -> Head | Estimate:
    from safetensors.numpy import load

    tensors = load(path.read_bytes())
    widths = tuple(card["widths"])
    if (name := card.get("estimator", HEAD)) != HEAD:
        if name not in ESTIMATORS:
            raise BadInput(
                f"{path} was saved by the estimator {name!r}, which al_pipeline/models/estimators.py does not have"
            )
        own = {label: card["labels"][label] for label in card["seen"]}
        return Estimate(name, tuple(classes), own, tensors, widths, card["temperature"])
    weights = tuple(tensors[f"weights.{number}"] for number in range(len(widths)))
    counts = {name: card["labels"][name] for name in card["seen"]}
    expected = [(len(counts), width) for width in widths]
    if [part.shape for part in weights] != expected or tensors["bias"].shape != (len(counts),):
        raise BadInput(
            f"{path} does not match its card: the weights have shapes {[part.shape for part in weights]}, the card "
            f"says {expected}"
        )
    shift = tuple(card.get("shift", ()))
    if len(shift) not in (0, len(counts)):
        raise BadInput(f"{path} does not match its card: {len(counts)} classes, but shifts for {len(shift)}")
    names = NamesOfHead(float(card["names"]), tensors.get("prototypes")) if "names" in card else None
    return Head(tuple(classes), counts, weights, tensors["bias"], card["temperature"], widths, shift, names)


def text_features(
    texts: Sequence[str], vectors: Vectors | None, uses_encoder: bool, tfidf: Tfidf | None
) -> FeatureMatrix:
    """The features of n texts; `vectors` (n, d) are the encoder's. Raises BadInput if they are needed and missing."""
    if uses_encoder and vectors is None:
        raise BadInput("this model uses an encoder, but no vectors were given")
    if tfidf is None:
        return FeatureMatrix(vectors)
    return FeatureMatrix(vectors if uses_encoder else None, tfidf.transform(texts), tfidf.components)
