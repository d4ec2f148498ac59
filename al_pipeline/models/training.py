"""Training of the encoder and a linear layer by AdamW; the same bytes at any number of threads.

A batch is cut into parts by its texts alone, one thread computes the gradients of each part, and they are added in a
fixed order. Nothing here uses torch's global random generator.

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import fit_head
from al_pipeline.models.probabilities import class_weights
from al_pipeline.models.transformer import BIAS, EMBEDDINGS, ROWS, WEIGHT, Network, Tensors, Vectors
from al_pipeline.params import Finetune

OnProgress = Callable[[int, int], None]
"""Callback `(done, total)`, in texts."""

WEIGHT_DECAY = 0.01
WARM_UP = 0.1
"""Share of the steps in which the learning rate warms up."""
LARGEST_GRADIENT_NORM = 1.0
_PARTS = 4
"""Number of parts of a batch. Fixed, so that the bytes do not depend on the number of threads."""


@dataclass
class ProgressMeter:
    on_progress: OnProgress | None
    total: int
    done: int = 0

    def add(self, texts: int) -> None:
        self.done += texts
        if self.on_progress:
            self.on_progress(self.done, self.total)


def train(
    network: Network,
    tokens: Sequence[Sequence[int]],
    frozen: Vectors,
    targets: NDArray[np.intp],
    settings: Finetune,
    seed: int,
    meter: ProgressMeter,
) -> Tensors:
    """Train `network`, which holds the pretrained weights, on texts and their classes. Returns the trained weights.

    Minimises the class-weighted cross-entropy by AdamW. `frozen`: the texts' vectors before training, (n, d).
    """
    import torch

    names = [str(c) for c in range(int(targets.max()) + 1)]
    start = fit_head(FeatureMatrix(frozen), [names[c] for c in targets], names, seed, calibrate=False)
    weight = torch.nn.Parameter(network.on_device(start.weights[0].copy()))
    bias = torch.nn.Parameter(network.on_device(start.bias.copy()))
    importance = network.on_device(class_weights(targets, len(names)).astype(np.float32))
    classes = network.on_device(targets.astype(np.int64))
    rows, own = _renumbered(network, tokens)
    rng = np.random.default_rng([seed, 0xF17E])
    with network.training(rows) as trained, network.encoder.workers() as pool:
        trained |= {WEIGHT: weight, BIAS: bias}
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
        used = {name: value.detach().cpu().numpy().copy() for name, value in trained.items() if value.grad is not None}
    return {**used, ROWS: rows}


def _renumbered(network: Network, tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], list[list[int]]]:
    """The token ids that occur, with padding, and the texts as indices into them.

    Padding keeps its id, by which a transformer may identify it; if that id is too high, all tokens keep theirs.
    """
    padding = int(network.encoder.pad([[]], 1)[0][0, 0])
    others = np.setdiff1d(np.concatenate([np.asarray(ids, np.int64) for ids in tokens]), [padding])
    if padding > len(others):
        return np.arange(network.vocabulary, dtype=np.int64), [list(ids) for ids in tokens]
    rows = np.insert(others, padding, padding)
    number = {int(token): place for place, token in enumerate(rows)}
    return rows, [[number[token] for token in ids] for ids in tokens]


def _parts(batch: NDArray[np.intp], tokens: Sequence[Sequence[int]]) -> list[NDArray[np.intp]]:
    """A batch in parts of texts of about equal length."""
    order = sorted(batch.tolist(), key=lambda row: (len(tokens[row]), row))
    return [part for part in np.array_split(np.array(order, np.intp), _PARTS) if len(part)]


def _optimizer(trained: Mapping[str, Any], rate: float, steps: int) -> Callable[[Sequence[tuple[Any, ...]]], None]:
    """A function that makes one AdamW step from the gradients of a batch's parts, added in order.

    Embeddings have no weight decay, so that tokens without gradient do not change.
    """
    import torch

    decayed = [value for name, value in trained.items() if value.dim() > 1 and name != EMBEDDINGS]
    others = [value for name, value in trained.items() if value.dim() <= 1 or name == EMBEDDINGS]
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
        torch.nn.utils.clip_grad_norm_(values, LARGEST_GRADIENT_NORM)
        done += 1
        now = rate * min(done / warm_up, (steps - done + 1) / max(1, steps - warm_up + 1))
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.step()

    return advance
