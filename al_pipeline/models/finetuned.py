"""The fine-tuned classifier: the encoder and a linear layer on its vectors, trained on the labels.

Every round starts from the weights in the workspace, not from those of the previous round (a warm start generalises
worse: Ash & Adams 2020, arXiv:1910.08475). The linear layer is initialised as the head on frozen features, so that
training does not distort the pretrained features (Kumar et al. 2022, arXiv:2202.10054); then all weights are trained
with a small learning rate for a few epochs with warm-up and linear decay (Mosbach et al. 2021, arXiv:2006.04884).

On one machine and device the same labels give the same bytes at any number of threads (see `training.py`).

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.strategies import Samples
from al_pipeline.errors import BadInput
from al_pipeline.features.encoder import Encoder, encoder_identity
from al_pipeline.files import read_json, sha256_bytes, sha256_file, write_bytes, write_json
from al_pipeline.models.calibration import MIN_CALIBRATION, fit_temperature, stratified_folds
from al_pipeline.models.feature_matrix import Floats, row_products
from al_pipeline.models.probabilities import count_classes, over_all_classes, softmax
from al_pipeline.models.training import OnProgress, ProgressMeter, train
from al_pipeline.models.transformer import BIAS, EMBEDDINGS, ROWS, WEIGHT, Masks, Network, Tensors, Vectors
from al_pipeline.params import Finetune
from al_pipeline.records import CPU
from al_pipeline.validation import parse

FORMAT = "al-finetuned/1"
CARD_FILE = "card.json"
WEIGHTS_FILE = "weights.safetensors"
HELD_OUT = 5
"""One in this many labels is held out to fit the temperature, on a second model trained without them."""


@dataclass(frozen=True)
class FinetunedModel:
    """A trained transformer. With labels of fewer than two classes it has no weights and predicts from their counts."""

    classes: tuple[str, ...]
    counts: Mapping[str, int]
    """Number of labels of each class that has some, in the schema's order."""
    temperature: float
    max_tokens: int
    encoder: str
    """The `encoder_identity` of the pretrained weights, whose tokenizer and configuration it uses."""
    tensors: Tensors
    """The trained weights: the linear layer and all weights of the encoder. Of the embeddings, only the rows of tokens
    in the labelled texts, since no others change.
    """
    folder: Path
    """The folder of the pretrained encoder."""
    settings: Finetune
    device: str = CPU
    """The device that computes the vectors, as `find_device` describes it. Not saved."""

    @property
    def seen(self) -> tuple[str, ...]:
        """Classes that had labels."""
        return tuple(self.counts)

    @property
    def needs_vectors(self) -> bool:
        """False: it reads texts; only strategies use the frozen vectors."""
        return False

    def as_control(self) -> None:
        """None: a control would need a second training and twice the disk space."""

    def predict_proba(self, texts: Sequence[str], vectors: Vectors | None = None) -> Floats:
        """Class probabilities (n, C), strictly between 0 and 1; a text's do not depend on the other texts."""
        if not self.tensors:
            return over_all_classes(np.ones((len(texts), len(self.counts))), self.classes, self.counts)
        return self.proba_of(self._network.vectors(self._network.encoder.tokenize(texts)))

    def draw(
        self, kind: Samples, texts: Sequence[str], vectors: Vectors | None, labels: Sequence[str], seed: SeedSequence
    ) -> tuple[Masks, ...]:
        """K dropout masks: Monte Carlo dropout (Gal & Ghahramani 2016, arXiv:1506.02142).

        Used for both kinds of samples, since a committee of fine-tuned models would need K trainings.
        """
        return tuple(Masks(seed, number) for number in range(self.settings.passes))

    def sample_proba(self, samples: Sequence[Masks], texts: Sequence[str], vectors: Vectors | None = None) -> Floats:
        """Class probabilities under each dropout mask, (n, K, C)."""
        if not self.tensors:
            return np.repeat(self.predict_proba(texts)[:, None], len(samples), axis=1)
        tokens = self._network.encoder.tokenize(texts)
        return np.stack([self.proba_of(self._network.vectors(tokens, masks)) for masks in samples], axis=1)

    def likeness(
        self, texts: Sequence[str], vectors: Vectors | None, others: Sequence[str], other_vectors: Vectors | None
    ) -> Floats:
        """Cosine similarities of texts, (n, m), by the frozen encoder's vectors, which depend on no label."""
        if vectors is None or other_vectors is None:
            raise BadInput("the similarity of texts needs the encoder's vectors, but none were given")
        return np.asarray(row_products(vectors, other_vectors), np.float64)

    def save(self, folder: Path) -> None:
        """Write the weights, then `card.json` with their digests; equal models give equal bytes."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
        digests = {}
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        if self.tensors:
            data = save({name: np.ascontiguousarray(tensor) for name, tensor in sorted(self.tensors.items())})
            write_bytes(folder / WEIGHTS_FILE, data)
            digests[WEIGHTS_FILE] = sha256_bytes(data)
        card = {
            "classes": list(self.classes),
            "encoder": self.encoder,
            "finetune": msgspec.to_builtins(self.settings),
            "format": FORMAT,
            "labels": dict(self.counts),
            "max_tokens": self.max_tokens,
            "seen": list(self.counts),
            "sha256": digests,
            "temperature": self.temperature,
            "total_labels": sum(self.counts.values()),
        }
        write_json(folder / CARD_FILE, card)

    @property
    def trained(self) -> Encoder:
        """The encoder with the trained weights; only for a model that has some."""
        return self._network.encoder

    def proba_of(self, vectors: Vectors) -> Floats:
        """Class probabilities (n, C) of texts whose vectors (n, d) are those of the trained encoder."""
        weight, bias = (self.tensors[name].astype(np.float64) for name in (WEIGHT, BIAS))
        logits = row_products(vectors.astype(np.float64), weight) + bias
        return over_all_classes(softmax(logits / self.temperature), self.classes, self.counts)

    @cached_property
    def _network(self) -> Network:
        network = Network(self.folder, self.max_tokens, device=self.device)
        network.load(self.tensors)
        return network


def load_finetuned(folder: Path, encoder: Path, device: str = CPU) -> FinetunedModel:
    """Load what `FinetunedModel.save` wrote, for the pretrained encoder in `encoder`, to predict on `device`.

    Raises BadInput if the model is damaged or was trained from another encoder.
    """
    from safetensors import SafetensorError

    card = read_json(folder / CARD_FILE)
    try:
        if card["encoder"] != encoder_identity(encoder, card["max_tokens"]):
            raise BadInput(
                f"the model in {folder} was trained from another encoder (by digest) than the one in {encoder}; `dvc "
                "checkout` restores both"
            )
        counts = {name: int(card["labels"][name]) for name in card["seen"]}
        tensors = _load_tensors(folder / WEIGHTS_FILE, card["sha256"], len(counts))
        return FinetunedModel(
            classes=tuple(card["classes"]),
            counts=counts,
            temperature=float(card["temperature"]),
            max_tokens=int(card["max_tokens"]),
            encoder=card["encoder"],
            tensors=tensors,
            folder=encoder,
            settings=parse(Finetune, card["finetune"], CARD_FILE),
            device=device,
        )
    except (AttributeError, LookupError, TypeError, ValueError, SafetensorError) as error:
        raise BadInput(f"the model in {folder} is damaged: invalid card or weights ({error!r})") from None


def _load_tensors(path: Path, digests: Mapping[str, str], classes: int) -> Tensors:
    """Load the weights in `path`, checked by digest and shape; none if the card lists none."""
    from safetensors.numpy import load

    tensors: Tensors = {}
    for name, expected in digests.items():
        actual = sha256_file(path) if name == WEIGHTS_FILE and path.is_file() else "no such file"
        if actual != expected:
            raise BadInput(f"{path} does not match its card: sha256 {actual}, card {expected}")
        tensors = load(path.read_bytes())
    if tensors and {len(tensors[WEIGHT]), len(tensors[BIAS])} != {classes}:
        raise BadInput(f"{path} does not match its card: its shapes are not those of a model for {classes} classes")
    if missing := {EMBEDDINGS, ROWS} - tensors.keys() if tensors else ():
        raise BadInput(f"{path} lacks the tensors {', '.join(sorted(missing))}")
    return tensors


def fit_finetuned(
    texts: Sequence[str],
    labels: Sequence[str],
    classes: Sequence[str],
    encoder: Path,
    max_tokens: int,
    settings: Finetune,
    seed: int,
    calibrate: bool,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    device: str = CPU,
) -> FinetunedModel:
    """Train on labelled texts from the pretrained weights in `encoder`, on `device`.

    With labels of fewer than two classes nothing is trained, and the model predicts from their counts. `calibrate`:
    take the temperature of another training, fitted on a held-out fifth of the labels; 1 if that fifth has fewer
    than MIN_CALIBRATION labels. Raises BadInput if a label is not a class.
    """
    counts, targets = count_classes(labels, classes)
    identity = encoder_identity(encoder, max_tokens)

    def model(tensors: Tensors, temperature: float) -> FinetunedModel:
        return FinetunedModel(
            tuple(classes), counts, temperature, max_tokens, identity, tensors, encoder, settings, device
        )

    if len(counts) < 2:
        return model({}, 1.0)
    network = Network(encoder, max_tokens, threads, device)
    tokens = network.encoder.tokenize(texts)
    frozen = network.vectors(tokens)
    kept, held = _held_out(targets, seed) if calibrate else (np.arange(0), np.arange(0))
    meter = ProgressMeter(on_progress, settings.epochs * (len(texts) + len(kept)))
    temperature = 1.0
    if len(held):
        few = train(network, [tokens[row] for row in kept], frozen[kept], targets[kept], settings, seed, meter)
        unseen = network.vectors([tokens[row] for row in held]).astype(np.float64)
        logits = row_products(unseen, few[WEIGHT].astype(np.float64)) + few[BIAS]
        temperature = fit_temperature([(logits, targets[held])])
        network = Network(encoder, max_tokens, threads, device)
    return model(train(network, tokens, frozen, targets, settings, seed, meter), temperature)


def _held_out(targets: NDArray[np.intp], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to train on and rows to calibrate on; both empty if a class would have no row to train on."""
    kept, held = stratified_folds(targets, HELD_OUT, seed)[0]
    if len(held) < MIN_CALIBRATION or len(np.unique(targets[kept])) < len(np.unique(targets)):
        return np.arange(0), np.arange(0)
    return kept, held
