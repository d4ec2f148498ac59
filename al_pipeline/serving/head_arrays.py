"""A classifier as plain arrays: what a conversion to another format needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.models.estimators import SHARPNESS, Estimate
from al_pipeline.models.finetuned import FinetunedModel
from al_pipeline.models.linear import Head
from al_pipeline.models.probabilities import FLOOR
from al_pipeline.models.text_model import Classifier, TextModel
from al_pipeline.models.transformer import BIAS, WEIGHT

Array = NDArray[Any]

CENTROID = "centroid"


@dataclass(frozen=True, eq=False)
class HeadArrays:
    """Probabilities of C classes from vectors of width d and TF-IDF of m terms; s classes have labels.

    The logits are `bias + vectors @ dense.T + tfidf @ sparse.T`. With `is_estimate` they are replaced by the logarithm
    of the softmax of `scale` times them. Their softmax, after division by `temperature` and addition of `shift`, is
    multiplied by `spread`, `base` is added, and the rows are divided by their sums.
    """

    dense: Array | None
    """(s, d)."""
    sparse: Array | None
    """(s, m)."""
    idf: Array | None
    """(m,)."""
    bias: Array
    """(s,)."""
    scale: float
    is_estimate: bool
    temperature: float
    shift: Array
    """(s,)."""
    spread: Array
    """(s, C)."""
    base: Array
    """(C,)."""


def head_arrays(model: Classifier) -> HeadArrays:
    """The arrays of a classifier. Raises BadInput if it has none, with the reason."""
    if isinstance(model, FinetunedModel):
        if not model.tensors:
            raise BadInput(_FEW)
        found = [model.tensors[name].astype(np.float64) for name in (WEIGHT, BIAS)]
        none = np.zeros(len(model.seen))
        return HeadArrays(
            found[0], None, None, found[1], 1.0, False, model.temperature, none, *_over_all(model, model.seen)
        )
    if not isinstance(model, TextModel):
        raise BadInput(f"a model of the kind {type(model).__name__} cannot be converted")
    head = model.head
    if isinstance(head, Estimate) and head.name != CENTROID:
        raise BadInput(f"the model {head.name!r} is code of its own, which cannot be converted")
    if not head.widths:
        raise BadInput(_FEW)
    shift: Array = np.zeros(len(head.seen))
    bias: Array = np.zeros(len(head.seen))
    weights: list[Array]
    scale = 1.0
    if isinstance(head, Head):
        weights, bias = list(head.weights), head.bias
        shift = np.array(head.shift) if head.shift else shift
    else:
        weights, scale = [head.arrays[f"means.{number}"] for number in range(len(head.widths))], SHARPNESS
    dense = weights.pop(0) if model.uses_encoder else None
    sparse, idf = (weights.pop(0), model.tfidf.idf) if model.tfidf is not None else (None, None)
    is_estimate = isinstance(head, Estimate)
    spread, base = _over_all(model, head.seen)
    return HeadArrays(dense, sparse, idf, bias, scale, is_estimate, head.temperature, shift, spread, base)


_FEW = "the model has labels of fewer than two classes, so there is nothing to convert yet"


def _over_all(model: Classifier, seen: tuple[str, ...]) -> tuple[Array, Array]:
    """`spread` and `base` with which `over_all_classes` is a product and a sum."""
    count = len(model.classes)
    prior = 1 / (sum(model.counts.values()) + count)
    places = [model.classes.index(name) for name in seen]
    spread = np.zeros((len(places), count))
    spread[np.arange(len(places)), places] = 1 - prior * (count - len(places))
    base = np.full(count, prior)
    base[places] = 0
    return spread, base + FLOOR
