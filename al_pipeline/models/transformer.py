"""The encoder as a trainable network, with dropout that is off, random, or given by fixed masks.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.features.encoder import Encoder
from al_pipeline.features.packing import current_layout
from al_pipeline.records import CPU

if TYPE_CHECKING:
    import torch

Vectors = NDArray[np.float32]
Tensors = Mapping[str, NDArray[Any]]

DROPOUT = 0.1
"""Dropout rate of the vector before the linear layer; inside the encoder its own configuration sets the rates."""

ROWS = "embeddings.rows"
"""Name of the tensor with the token ids of the trained embeddings."""
EMBEDDINGS = "embeddings"
WEIGHT = "head.weight"
BIAS = "head.bias"


@dataclass(frozen=True)
class Masks:
    """The dropout masks of one stochastic pass, fixed by layer and token position, the same for every text.

    Each pass is thus one sampled network, and a text's result does not depend on the other texts in its batch.
    """

    seed: SeedSequence
    number: int

    def of(self, place: int, rate: float, rows: int, width: int) -> Vectors:
        """The mask of dropout layer `place`, (rows, width); with more rows its first rows stay the same."""
        rng = np.random.default_rng([*self.seed.generate_state(4), self.number, place])
        return _keep(rng, rate, rows, width)


def _keep(rng: Generator, rate: float, rows: int, width: int) -> Vectors:
    kept = rng.random((rows, width), dtype=np.float32) >= rate
    return np.asarray(kept / np.float32(1 - rate), np.float32)


class Network:
    """The encoder with controlled dropout: off, random for each part of a batch, or given by masks.

    The transformer itself stays in evaluation mode, in which its own dropout is off. Attention weights are not dropped.
    """

    def __init__(self, folder: Path, max_tokens: int, threads: int | None = None, device: str = CPU) -> None:
        self.encoder = Encoder(folder, max_tokens, "float32", threads, device)
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
        """One vector for each text, (n, d), of unit length without `masks`; independent of the other texts."""
        self._masks, self._made = masks, {}
        try:
            found = self.encoder.encode_tokens(tokens)
        finally:
            self._masks, self._made = None, {}
        return found if masks is None else found * masks.of(self._last, DROPOUT, 1, self.encoder.dimension)

    def load(self, tensors: Tensors) -> None:
        """Load trained weights. Raises BadInput if their shapes or token ids do not fit the encoder."""
        import torch

        own, rows, width = dict(self.encoder.model.named_parameters()), tensors[ROWS], self.encoder.dimension
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        shapes |= {EMBEDDINGS: (len(rows), self._embeddings.embedding_dim), ROWS: (len(rows),)}
        shapes |= {WEIGHT: (len(tensors[BIAS]), width), BIAS: (len(tensors[BIAS]),)}
        for name, tensor in tensors.items():
            if shapes.get(name) != tensor.shape:
                raise BadInput(
                    f"the model's {name!r} does not fit the encoder in the workspace: shape {tensor.shape}, "
                    f"expected {shapes.get(name)}"
                )
        if rows.dtype != np.int64 or not ((rows >= 0) & (rows < self.vocabulary)).all():
            raise BadInput("the model has embeddings for tokens that the encoder in the workspace does not have")
        with torch.no_grad():
            self._embeddings.weight[rows] = self.on_device(tensors[EMBEDDINGS].copy())
            for name in tensors.keys() & own.keys():
                own[name].copy_(torch.from_numpy(tensors[name].copy()))

    def on_device(self, array: NDArray[Any]) -> torch.Tensor:
        """The array as a tensor on the device that holds the weights."""
        import torch

        return torch.from_numpy(array).to(self.encoder.device)

    @property
    def vocabulary(self) -> int:
        """Number of tokens with an embedding."""
        return int(self._embeddings.num_embeddings)

    @property
    def _embeddings(self) -> Any:
        return self.encoder.model.get_input_embeddings()

    @contextmanager
    def training(self, rows: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        """The trainable weights, by name. The embeddings of the tokens `rows` replace the full table until the end."""
        import torch

        model, full = self.encoder.model, self._embeddings
        few = torch.nn.Embedding(len(rows), full.embedding_dim, _weight=full.weight[rows].detach().clone())
        model.set_input_embeddings(few)
        model.requires_grad_(True)
        known = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            others = {name: value for name, value in model.named_parameters() if value is not few.weight}
            yield {EMBEDDINGS: few.weight, **others}
        finally:
            torch.use_deterministic_algorithms(known)
            model.requires_grad_(False)
            with torch.no_grad():
                full.weight[rows] = few.weight
            model.set_input_embeddings(full)

    def loss(
        self, tokens: Sequence[Sequence[int]], weight: Any, bias: Any, targets: Any, importance: Any, seed: list[int]
    ) -> torch.Tensor:
        """Summed weighted cross-entropy of some texts, with dropout masks drawn from `seed`."""
        import torch

        self._drawn.generator = generator = torch.Generator()
        generator.manual_seed(int(SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        try:
            ids, mask = map(self.on_device, self._padded(tokens))
            hidden = self.encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            vectors = torch.nn.functional.normalize(mean)
            kept = torch.rand(vectors.shape, generator=generator) >= DROPOUT
            logits = (vectors * kept.to(vectors.device) / (1 - DROPOUT)) @ weight.T + bias
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
                    self._made[place] = self.on_device(mask)
            layout = current_layout()
            return output * self._made[place][slice(output.shape[1]) if layout is None else layout.positions]
        generator = getattr(self._drawn, "generator", None)
        if generator is None:
            return output
        kept = torch.rand(output.shape, generator=generator) >= module.p
        return output * kept.to(output.device) / (1 - module.p)
