"""The fine-tuned classifier: the encoder itself, trained on the labels, with a linear layer on its vectors.

Every round starts from the weights in the workspace, never from those of the round before (a warm start generalises
worse: Ash & Adams 2020, arXiv:1910.08475). The linear layer starts as the head on frozen features, so that training
improves on it and does not first destroy what the encoder knows (Kumar et al. 2022, arXiv:2202.10054); after it all
weights are trained, slowly, for a few epochs with warm-up and linear decay (Mosbach et al. 2021, arXiv:2006.04884).

On one machine the same labels give the same bytes at any number of threads: a batch is cut into parts by its texts
alone, each part is worked on by one thread, and their gradients are added in one order. Nothing here touches torch's
global random generator.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.strategies import Samples
from al_pipeline.errors import BadInput
from al_pipeline.features.encoder import Encoder, encoder_identity
from al_pipeline.files import read_json, sha256_bytes, sha256_file, write_bytes, write_json
from al_pipeline.models.linear import (
    MIN_CALIBRATION,
    FeatureMatrix,
    Floats,
    class_weights,
    count_classes,
    fit_head,
    fit_temperature,
    over_all_classes,
    row_products,
    softmax,
    stratified_folds,
)
from al_pipeline.params import Finetune

if TYPE_CHECKING:
    import torch

FORMAT = "al-finetuned/1"
CARD_FILE = "card.json"
WEIGHTS_FILE = "weights.safetensors"

Vectors = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]
OnProgress = Callable[[int, int], None]
"""Callback `(done, total)`, in texts."""

DROPOUT = 0.1
"""Of the vector before the linear layer; inside the encoder what its own configuration says."""
WEIGHT_DECAY = 0.01
WARM_UP = 0.1
"""Share of the steps in which the learning rate warms up."""
LONGEST_GRADIENT = 1.0
HELD_OUT = 5
"""One in so many labels is held out for the temperature, in a training of its own."""
_PARTS = 4
"""Parts of a batch. Fixed, so that the bytes do not depend on how many threads there are."""

_ROWS = "embeddings.rows"
_EMBEDDINGS = "embeddings"
_WEIGHT = "head.weight"
_BIAS = "head.bias"


@dataclass(frozen=True)
class FinetunedModel:
    """A trained transformer. With labels of fewer than two classes it has no weights and reads no text."""

    classes: tuple[str, ...]
    counts: Mapping[str, int]
    """Labels of each class that was seen, in the schema's order."""
    temperature: float
    max_tokens: int
    encoder: str
    """The `encoder_identity` of the weights that it was trained from; tokenizer and configuration stay theirs."""
    tensors: Tensors
    """What training made: every weight of the encoder but the embeddings, of those the rows of tokens that the labelled
    texts hold (no other changes), and the linear layer."""
    folder: Path
    """Where the encoder lies."""
    settings: Finetune

    @property
    def seen(self) -> tuple[str, ...]:
        """Classes that had labels."""
        return tuple(self.counts)

    @property
    def needs_vectors(self) -> bool:
        """False: it reads texts; frozen vectors are for strategies alone."""
        return False

    def as_control(self) -> None:
        """None: a control would be a second training, and as many bytes again."""

    def predict_proba(self, texts: Sequence[str], vectors: Vectors | None = None) -> Floats:
        """Probabilities (n, C), strictly between 0 and 1; the same for a text whatever else is asked."""
        if not self.tensors:
            return over_all_classes(np.ones((len(texts), len(self.counts))), self.classes, self.counts)
        return self._proba(self._network.vectors(self._network.encoder.tokenize(texts)))

    def draw(
        self, kind: Samples, texts: Sequence[str], vectors: Vectors | None, labels: Sequence[str], seed: SeedSequence
    ) -> tuple[Masks, ...]:
        """K sampled networks: this one with other units dropped in each (Monte Carlo dropout).

        MC dropout (Gal & Ghahramani 2016, arXiv:1506.02142), for both kinds of samples: whoever wants a committee of
        fine-tuned models would wait for as many trainings.
        """
        return tuple(Masks(seed, number) for number in range(self.settings.passes))

    def sample_proba(self, judges: Sequence[Masks], texts: Sequence[str], vectors: Vectors | None = None) -> Floats:
        """Probabilities of each of `judges`, (n, K, C)."""
        if not self.tensors:
            return np.repeat(self.predict_proba(texts)[:, None], len(judges), axis=1)
        tokens = self._network.encoder.tokenize(texts)
        return np.stack([self._proba(self._network.vectors(tokens, masks)) for masks in judges], axis=1)

    def likeness(
        self, texts: Sequence[str], vectors: Vectors | None, others: Sequence[str], other_vectors: Vectors | None
    ) -> Floats:
        """Similarity of texts, (n, m): cosines of the frozen encoder's vectors, which use no label."""
        if vectors is None or other_vectors is None:
            raise BadInput("this model needs the encoder's vectors to say which texts are alike; none were given")
        return np.asarray(row_products(vectors, other_vectors), np.float64)

    def save(self, folder: Path) -> None:
        """Write the weights, and last `card.json`, which seals them; equal models give equal bytes."""
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
            "finetune": self.settings.model_dump(),
            "format": FORMAT,
            "labels": dict(self.counts),
            "max_tokens": self.max_tokens,
            "seen": list(self.counts),
            "sha256": digests,
            "temperature": self.temperature,
            "total_labels": sum(self.counts.values()),
        }
        write_json(folder / CARD_FILE, card)

    def _proba(self, vectors: Vectors) -> Floats:
        weight, bias = (self.tensors[name].astype(np.float64) for name in (_WEIGHT, _BIAS))
        logits = row_products(vectors.astype(np.float64), weight) + bias
        return over_all_classes(softmax(logits / self.temperature), self.classes, self.counts)

    @cached_property
    def _network(self) -> _Network:
        network = _Network(self.folder, self.max_tokens)
        network.load(self.tensors)
        return network


@dataclass(frozen=True)
class Masks:
    """Which units one stochastic pass drops: by place in the network and in the text, the same for every text.

    So each pass is one network, all texts are judged by the same ones, and what shares a batch has no influence.
    """

    seed: SeedSequence
    number: int

    def of(self, place: int, rate: float, rows: int, width: int) -> Vectors:
        """What the units at `place` are multiplied by, (rows, width); more rows begin with those of fewer."""
        rng = np.random.default_rng([*self.seed.generate_state(4), self.number, place])
        return _keep(rng, rate, rows, width)


def _keep(rng: Generator, rate: float, rows: int, width: int) -> Vectors:
    kept = rng.random((rows, width), dtype=np.float32) >= rate
    return np.asarray(kept / np.float32(1 - rate), np.float32)


def load_finetuned(folder: Path, encoder: Path) -> FinetunedModel:
    """What `FinetunedModel.save` wrote, for the encoder in `encoder`. Raises BadInput where the two do not fit or the
    model is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    card = read_json(folder / CARD_FILE)
    try:
        if card["encoder"] != encoder_identity(encoder, card["max_tokens"]):
            raise BadInput(
                f"the model in {folder} was trained from another encoder than the one in {encoder} (by digest); "
                "`dvc checkout` brings both back"
            )
        tensors: Tensors = {}
        for name, expected in card["sha256"].items():
            path = folder / WEIGHTS_FILE
            actual = sha256_file(path) if name == WEIGHTS_FILE and path.is_file() else "no such file"
            if actual != expected:
                raise BadInput(f"{path} is not what the model was saved with: sha256 {actual}, card {expected}")
            tensors = load(path.read_bytes())
        counts = {name: int(card["labels"][name]) for name in card["seen"]}
        if tensors and {len(tensors[_WEIGHT]), len(tensors[_BIAS])} != {len(counts)}:
            raise BadInput(f"{folder / WEIGHTS_FILE} has other shapes than its card says")
        if missing := {_EMBEDDINGS, _ROWS} - tensors.keys() if tensors else ():
            raise BadInput(f"{folder / WEIGHTS_FILE} lacks {', '.join(sorted(missing))}")
        return FinetunedModel(
            classes=tuple(card["classes"]),
            counts=counts,
            temperature=float(card["temperature"]),
            max_tokens=int(card["max_tokens"]),
            encoder=card["encoder"],
            tensors=tensors,
            folder=encoder,
            settings=Finetune.model_validate(card["finetune"]),
        )
    except (AttributeError, LookupError, TypeError, ValueError, SafetensorError) as error:
        raise BadInput(f"{folder} holds no whole model: its card says something impossible ({error!r})") from None


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
) -> FinetunedModel:
    """Train on labelled texts from the weights in `encoder`; with labels of fewer than two classes it is the prior.

    `calibrate`: a second training, without a fifth of the labels, whose temperature on that fifth the model takes;
    none where the fifth is too small to say anything. Raises BadInput where a label is no class.
    """
    counts, targets = count_classes(labels, classes)
    identity = encoder_identity(encoder, max_tokens)

    def model(tensors: Tensors, temperature: float) -> FinetunedModel:
        return FinetunedModel(tuple(classes), counts, temperature, max_tokens, identity, tensors, encoder, settings)

    if len(counts) < 2:
        return model({}, 1.0)
    network = _Network(encoder, max_tokens, threads)
    tokens = network.encoder.tokenize(texts)
    frozen = network.vectors(tokens)
    kept, held = _held_out(targets, seed) if calibrate else (np.arange(0), np.arange(0))
    meter = _Meter(on_progress, settings.epochs * (len(texts) + len(kept)))
    temperature = 1.0
    if len(held):
        few = _fit(network, [tokens[row] for row in kept], frozen[kept], targets[kept], settings, seed, meter)
        unseen = network.vectors([tokens[row] for row in held]).astype(np.float64)
        logits = row_products(unseen, few[_WEIGHT].astype(np.float64)) + few[_BIAS]
        temperature = fit_temperature([(logits, targets[held])])
        network = _Network(encoder, max_tokens, threads)
    return model(_fit(network, tokens, frozen, targets, settings, seed, meter), temperature)


def _held_out(targets: NDArray[np.intp], seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows to train on and rows to calibrate on; none at all where a class would have no row to train on."""
    kept, held = stratified_folds(targets, HELD_OUT, seed)[0]
    if len(held) < MIN_CALIBRATION or len(np.unique(targets[kept])) < len(np.unique(targets)):
        return np.arange(0), np.arange(0)
    return kept, held


@dataclass
class _Meter:
    on_progress: OnProgress | None
    total: int
    done: int = 0

    def add(self, texts: int) -> None:
        self.done += texts
        if self.on_progress:
            self.on_progress(self.done, self.total)


class _Network:
    """The encoder with controlled dropout: off, drawn for one part of a batch, or by given masks.

    The transformer itself stays in its mode for use, in which its own dropout does nothing. Attention is never dropped.
    """

    def __init__(self, folder: Path, max_tokens: int, threads: int | None = None) -> None:
        self.encoder = Encoder(folder, max_tokens, "float32", threads)
        import torch

        self._masks: Masks | None = None
        self._made: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()
        self._drawn = threading.local()
        places = [module for module in self.encoder.model.modules() if isinstance(module, torch.nn.Dropout)]
        for place, module in enumerate(places):
            module.register_forward_hook(partial(self._drop, place))
        self._last = len(places)

    def vectors(self, tokens: Sequence[Sequence[int]], masks: Masks | None = None) -> Vectors:
        """One vector a text, (n, d), of unit length without `masks`; the same whatever shares its batch."""
        self._masks, self._made = masks, {}
        try:
            found = self.encoder.encode_tokens(tokens)
        finally:
            self._masks, self._made = None, {}
        return found if masks is None else found * masks.of(self._last, DROPOUT, 1, self.encoder.dimension)

    def load(self, tensors: Tensors) -> None:
        """Load trained weights. Raises BadInput where it is of another transformer."""
        import torch

        own, rows, width = dict(self.encoder.model.named_parameters()), tensors[_ROWS], self.encoder.dimension
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        shapes |= {_EMBEDDINGS: (len(rows), self._embeddings.embedding_dim), _ROWS: (len(rows),)}
        shapes |= {_WEIGHT: (len(tensors[_BIAS]), width), _BIAS: (len(tensors[_BIAS]),)}
        for name, tensor in tensors.items():
            if shapes.get(name) != tensor.shape:
                raise BadInput(f"the model's {name!r} fits no part of the encoder in the workspace")
        if rows.dtype != np.int64 or not ((rows >= 0) & (rows < self.vocabulary)).all():
            raise BadInput("the model has embeddings of tokens that the encoder in the workspace does not know")
        with torch.no_grad():
            self._embeddings.weight[rows] = torch.from_numpy(tensors[_EMBEDDINGS].copy())
            for name in tensors.keys() & own.keys():
                own[name].copy_(torch.from_numpy(tensors[name].copy()))

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have an embedding."""
        return int(self._embeddings.num_embeddings)

    @property
    def _embeddings(self) -> Any:
        return self.encoder.model.get_input_embeddings()

    @contextmanager
    def training(self, rows: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """The weights that are trained, by name. Of the embeddings only `rows`, in a table of their own meanwhile."""
        import torch

        model, whole = self.encoder.model, self._embeddings
        few = torch.nn.Embedding(len(rows), whole.embedding_dim, _weight=whole.weight[rows].detach().clone())
        model.set_input_embeddings(few)
        model.requires_grad_(True)
        known = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            others = {name: value for name, value in model.named_parameters() if value is not few.weight}
            yield {_EMBEDDINGS: few.weight, **others}
        finally:
            torch.use_deterministic_algorithms(known)
            model.requires_grad_(False)
            with torch.no_grad():
                whole.weight[rows] = few.weight
            model.set_input_embeddings(whole)

    def loss(
        self, tokens: Sequence[Sequence[int]], weight: Any, bias: Any, targets: Any, importance: Any, seed: list[int]
    ) -> torch.Tensor:
        """Summed weighted cross-entropy of some texts, with dropout masks drawn from `seed`."""
        import torch

        self._drawn.generator = generator = torch.Generator()
        generator.manual_seed(int(SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        try:
            ids, mask = (torch.from_numpy(part) for part in self._padded(tokens))
            hidden = self.encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            vectors = torch.nn.functional.normalize(mean)
            kept = torch.rand(vectors.shape, generator=generator) >= DROPOUT
            logits = (vectors * kept / (1 - DROPOUT)) @ weight.T + bias
            losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            loss: torch.Tensor = (losses * importance).sum()
            return loss
        finally:
            self._drawn.generator = None

    def _padded(self, tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.encoder.pad(tokens, max(map(self.encoder.padded_length, tokens)))

    def _drop(self, place: int, module: Any, _: Any, output: Any) -> Any:
        import torch

        if output.dim() != 3 or not module.p:
            return output
        if self._masks is not None:
            with self._lock:
                if place not in self._made:
                    mask = self._masks.of(place, module.p, self.encoder.max_tokens, output.shape[2])
                    self._made[place] = torch.from_numpy(mask)
            return output * self._made[place][: output.shape[1]]
        generator = getattr(self._drawn, "generator", None)
        if generator is None:
            return output
        return output * (torch.rand(output.shape, generator=generator) >= module.p) / (1 - module.p)


def _fit(
    network: _Network,
    tokens: Sequence[Sequence[int]],
    frozen: Vectors,
    targets: NDArray[np.intp],
    settings: Finetune,
    seed: int,
    meter: _Meter,
) -> Tensors:
    """Train `network`, which holds the encoder's own weights, on texts and their classes; what came out.

    Minimises the head's weighted cross-entropy by AdamW. `frozen`: the texts' vectors before it, (n, d).
    """
    import torch

    names = [str(c) for c in range(int(targets.max()) + 1)]
    start = fit_head(FeatureMatrix(frozen), [names[c] for c in targets], names, seed, calibrate=False)
    weight = torch.nn.Parameter(torch.from_numpy(start.weights[0].copy()))
    bias = torch.nn.Parameter(torch.from_numpy(start.bias.copy()))
    importance = torch.from_numpy(class_weights(targets, len(names)).astype(np.float32))
    classes = torch.from_numpy(targets.astype(np.int64))
    rows, own = _renumbered(network, tokens)
    rng = np.random.default_rng([seed, 0xF17E])
    with network.training(rows) as trained, network.encoder.workers() as pool:
        trained |= {_WEIGHT: weight, _BIAS: bias}
        values = list(trained.values())
        steps = settings.epochs * -(-len(own) // settings.batch_size)
        advance = _optimizer(trained, settings.learning_rate, steps)

        def gradients(part: NDArray[np.intp], step: int, number: int, size: int) -> tuple[Any, ...]:
            some = [own[row] for row in part]
            loss = network.loss(some, weight, bias, classes[part], importance[part], [seed, step, number])
            return torch.autograd.grad(loss / size, values, allow_unused=True)

        step = 0
        for _ in range(settings.epochs):
            order = rng.permutation(len(own))
            for begin in range(0, len(order), settings.batch_size):
                batch = order[begin : begin + settings.batch_size]
                parts = _parts(batch, own)
                work = [pool.submit(gradients, part, step, number, len(batch)) for number, part in enumerate(parts)]
                advance([job.result() for job in work])
                step += 1
                meter.add(len(batch))
        used = {name: value.detach().numpy().copy() for name, value in trained.items() if value.grad is not None}
    return {**used, _ROWS: rows}


def _renumbered(network: _Network, tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], list[list[int]]]:
    """The tokens that occur, padding among them, and the texts in numbers of these.

    Padding keeps its own number, by which a transformer may know it; where that is too high, every token does.
    """
    padding = int(network.encoder.pad([[]], 1)[0][0, 0])
    others = np.setdiff1d(np.concatenate([np.asarray(ids, np.int64) for ids in tokens]), [padding])
    if padding > len(others):
        return np.arange(network.vocabulary, dtype=np.int64), [list(ids) for ids in tokens]
    rows = np.insert(others, padding, padding)
    number = {int(token): place for place, token in enumerate(rows)}
    return rows, [[number[token] for token in ids] for ids in tokens]


def _parts(batch: NDArray[np.intp], tokens: Sequence[Sequence[int]]) -> list[NDArray[np.intp]]:
    """A batch in parts of texts that are about equally long."""
    order = sorted(batch.tolist(), key=lambda row: (len(tokens[row]), row))
    return [part for part in np.array_split(np.array(order, np.intp), _PARTS) if len(part)]


def _optimizer(trained: Mapping[str, Any], rate: float, steps: int) -> Callable[[Sequence[tuple[Any, ...]]], None]:
    """A step of AdamW from the gradients of a batch's parts, which are added up in their order.

    Embeddings are not decayed: a token that no labelled text holds stays as it was.
    """
    import torch

    decayed = [value for name, value in trained.items() if value.dim() > 1 and name != _EMBEDDINGS]
    others = [value for name, value in trained.items() if value.dim() <= 1 or name == _EMBEDDINGS]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, foreach=False)
    warm_up = max(1, round(WARM_UP * steps))
    values, done = list(trained.values()), 0

    def advance(parts: Sequence[tuple[Any, ...]]) -> None:
        nonlocal done
        for value, own in zip(values, zip(*parts, strict=True), strict=True):
            found = [gradient for gradient in own if gradient is not None]
            value.grad = None
            for gradient in found:
                value.grad = gradient if value.grad is None else value.grad + gradient
        torch.nn.utils.clip_grad_norm_(values, LONGEST_GRADIENT)
        done += 1
        now = rate * min(done / warm_up, (steps - done + 1) / max(1, steps - warm_up + 1))
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.step()

    return advance
