"""Ensembles of heads: a committee, or samples of the posterior, with probabilities (n, K, C).

All K heads are drawn before the first item is scored, so that every item is scored by the same heads, whatever the
order of the pool's parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence

from al_pipeline.active_learning.strategies import Samples
from al_pipeline.models.estimators import HEAD, Estimate, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix, Floats, feature_scales
from al_pipeline.models.linear import STRENGTH, Head
from al_pipeline.models.probabilities import class_weights, softmax
from al_pipeline.threads import one_thread

SIZES: dict[Samples, int] = {"committee": 8, "posterior": 20}
"""Number of heads K. A member of a committee costs a fit, a sample of the posterior only a matrix product."""

_MAX_CURVATURE = 2000
"""Maximum number of labels in the posterior's curvature, whose cost grows cubically; more are subsampled."""


def draw_heads(
    kind: Samples,
    head: Head | Estimate,
    features: FeatureMatrix,
    labels: Sequence[str],
    seed: SeedSequence,
    size: int | None = None,
) -> tuple[Head | Estimate, ...]:
    """K samples of `head`, which was fitted on `labels` and their `features` (m rows); deterministic for a seed.

    Copies of `head` if it has seen fewer than two classes. For a plug-in estimator, whose posterior is not
    known, the samples are fits on resampled labels, as in deep ensembles (Lakshminarayanan et al. 2017).
    """
    count = SIZES[kind] if size is None else size
    if len(head.seen) < 2:
        return (head,) * count
    features = replace(features, components=None)  # a loaded model has none; the draw must not depend on that
    with one_thread():
        if kind == "posterior" and isinstance(head, Head):
            return tuple(_posterior(head, features, labels, seed, count))
        return tuple(_committee(head, features, labels, seed, count))


def sample_proba(heads: Sequence[Head | Estimate], features: FeatureMatrix) -> Floats:
    """Class probabilities of each head, (n, K, C)."""
    return np.stack([head.predict_proba(features) for head in heads], axis=1)


def _committee(
    head: Head | Estimate, features: FeatureMatrix, labels: Sequence[str], seed: SeedSequence, count: int
) -> list[Head | Estimate]:
    """Heads fitted on bootstrap samples: query by bagging (Abe & Mamitsuka 1998).

    Labels are drawn with replacement within each class, so that every member has every seen class. Members take the
    calibration of `head`.
    """
    named, rng = np.array(labels), np.random.default_rng(seed)
    name = HEAD if isinstance(head, Head) else head.name
    members: list[Head | Estimate] = []
    for _ in range(count):
        own = [np.flatnonzero(named == name) for name in head.seen]
        drawn = np.sort(np.concatenate([rng.choice(rows, len(rows)) for rows in own]))
        member = fit_classifier(
            name, features.rows(drawn), named[drawn].tolist(), head.classes, 0, calibrate=False, **_names_of(head)
        )
        member = replace(member, counts=head.counts, temperature=head.temperature)
        if isinstance(head, Head) and isinstance(member, Head):
            member = replace(member, shift=head.shift)
        members.append(member)
    return members


def _names_of(head: Head | Estimate) -> dict[str, Any]:
    """The arguments of `fit_classifier` with which a member knows the names of the classes as `head` does."""
    if not isinstance(head, Head) or head.names is None or head.names.prototypes is None:
        return {}
    return {"prototypes": head.names.prototypes, "name_weight": head.names.weight}


def _posterior(
    head: Head, features: FeatureMatrix, labels: Sequence[str], seed: SeedSequence, count: int
) -> list[Head]:
    """Samples of the last layer's Laplace approximation around the fitted weights (MacKay 1992).

    The precision is the Hessian of the head's loss, with the penalty applied to the bias too. In the eigenbasis of the
    mean softmax curvature, each label's curvature is approximated by its diagonal: exact for two classes and for equal
    probabilities, else close, with C systems of m equations instead of one of m C.

    A draw from the prior is updated by the labels with Matheron's rule (Wilson et al. 2020, arXiv:2002.09309). In
    directions without labels it keeps the prior's variance, so samples disagree about items unlike all labels; and no
    matrix of the square of the features' width is needed.
    """
    from scipy.linalg import cho_factor, cho_solve

    targets = np.array([head.seen.index(label) for label in labels], np.intp)
    labelled = sum(count > 0 for count in head.counts.values())
    importance, scales = class_weights(targets, labelled), feature_scales(features)
    if len(targets) > _MAX_CURVATURE:
        rows = np.sort(_rng(seed, count).choice(len(targets), _MAX_CURVATURE, replace=False))
        importance = importance[rows] * (len(targets) / len(rows))
        features = features.rows(rows)
    blocks = [block.astype(np.float64) * scale for block, scale in zip(features.blocks, scales, strict=True)]
    turn, curvature = _curvature(head.logits(features), importance)
    known = np.stack([_product(blocks, *_noise(_rng(seed, draw), blocks, turn)) for draw in range(count)])
    doubt = _rng(seed, count + 1).standard_normal(known.shape)
    kernel = _kernel(blocks)
    change = np.empty_like(known)
    for column, root in enumerate(np.sqrt(curvature.T)):
        system = STRENGTH * root[:, None] * kernel * root[None, :]
        system[np.diag_indices(len(root))] += 1
        solved = cho_solve(cho_factor(system, lower=True), (root * known[:, :, column] + doubt[:, :, column]).T)
        change[:, :, column] = STRENGTH * root * solved.T
    heads = []
    for draw in range(count):
        noise, shift = _noise(_rng(seed, draw), blocks, turn)
        moved = [np.asarray(part - block.T @ change[draw]) @ turn.T for part, block in zip(noise, blocks, strict=True)]
        weights = tuple(
            (own + scale * part.T).astype(np.float32)
            for own, scale, part in zip(head.weights, scales, moved, strict=True)
        )
        bias = head.bias + turn @ (shift - change[draw].sum(axis=0))
        heads.append(replace(head, weights=weights, bias=bias.astype(np.float32)))
    return heads


def _rng(seed: SeedSequence, number: int) -> Generator:
    return np.random.default_rng([*seed.generate_state(4), number])


def _noise(rng: Generator, blocks: Sequence[Any], turn: Floats) -> tuple[list[Floats], Floats]:
    """A draw from the prior: weights of each block (width, C) and bias (C,). Drawn twice rather than kept in memory."""
    wide = np.sqrt(STRENGTH)
    return (
        [wide * rng.standard_normal((block.shape[1], len(turn))) for block in blocks],
        wide * rng.standard_normal(len(turn)),
    )


def _product(blocks: Sequence[Any], weights: Sequence[Floats], bias: Floats) -> Floats:
    """Logits of the labels' rows under these weights, (m, C)."""
    total = np.tile(bias, (blocks[0].shape[0], 1))
    for block, part in zip(blocks, weights, strict=True):
        total += block @ part
    return total


def _kernel(blocks: Sequence[Any]) -> Floats:
    """The kernel matrix of the rows, with 1 added for the bias, (m, m)."""
    from scipy.sparse import issparse

    kernel = np.ones((blocks[0].shape[0], blocks[0].shape[0]))
    for block in blocks:
        product = block @ block.T
        kernel += product.toarray() if issparse(product) else product
    return kernel


def _curvature(logits: Floats, importance: Floats) -> tuple[Floats, Floats]:
    """Eigenvectors (C, C) of the mean of diag(p) - p p^T, and each label's weighted curvature along them, (m, C)."""
    proba = softmax(logits)
    mean = np.diag(importance @ proba) - (proba * importance[:, None]).T @ proba
    _, turn = np.linalg.eigh(mean / importance.sum())
    own = importance[:, None] * (proba @ turn**2 - (proba @ turn) ** 2)
    return turn, np.maximum(own, 0.0)
