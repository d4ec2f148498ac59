"""Several heads in place of one: what a committee or a posterior's samples say of an item, (n, K, C).

All of them are drawn before the first item is looked at, so that a pool read part by part gets the same answers in
whatever order it comes, and two items are judged by the same K models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator, SeedSequence

from al_pipeline.head import STRENGTH, FeatureMatrix, Floats, Head, class_weights, feature_scales, fit_head
from al_pipeline.query_strategies import Samples

SIZES: dict[Samples, int] = {"committee": 8, "posterior": 20}
"""How many heads: a fit each in a committee, a draw and a matrix product each from a posterior."""

_MAX_CURVATURE = 2000
"""Of more labels so many tell the posterior's curvature, weighted up: its cost grows with their cube."""
_RANK = 1e-10
"""Directions that carry less than this share of the largest one are no directions of the labels."""


def draw_heads(
    kind: Samples,
    head: Head,
    features: FeatureMatrix,
    labels: Sequence[str],
    seed: SeedSequence,
    size: int | None = None,
) -> tuple[Head, ...]:
    """K heads beside `head`, which was fitted on `labels` and their `features` (m rows); the same for the same seed.

    Copies of it where it has seen fewer than two classes: there is nothing to disagree about.
    """
    count = SIZES[kind] if size is None else size
    if len(head.seen) < 2:
        return (head,) * count
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return tuple(_DRAW[kind](head, features, labels, np.random.default_rng(seed), count))


def sample_proba(heads: Sequence[Head], features: FeatureMatrix) -> Floats:
    """Each head's probabilities, (n, K, C)."""
    return np.stack([head.predict_proba(features) for head in heads], axis=1)


def _committee(head: Head, features: FeatureMatrix, labels: Sequence[str], rng: Generator, count: int) -> list[Head]:
    """Heads fitted on bootstrap samples: query by bagging (Abe & Mamitsuka 1998).

    Labels are drawn with replacement within each class, so that no member lacks a class that has been seen. Each takes
    the temperature of the head that stands for all.
    """
    named = np.array(labels)
    members = []
    for _ in range(count):
        drawn = np.concatenate(
            [rng.choice(own, len(own)) for name in head.seen if len(own := np.flatnonzero(named == name))]
        )
        drawn.sort()
        member = fit_head(features.rows(drawn), named[drawn].tolist(), head.classes, 0, calibrate=False)
        members.append(replace(member, counts=head.counts, temperature=head.temperature))
    return members


def _posterior(head: Head, features: FeatureMatrix, labels: Sequence[str], rng: Generator, count: int) -> list[Head]:
    """Samples of the last layer's Laplace approximation around the fitted weights (MacKay 1992).

    The precision is that of Ritter, Botev & Barber 2018, `G (x) A + 1 / C`: A, the weighted second moment of the
    features, G, the mean curvature of softmax over the classes, and the penalty that the head was fitted with, which
    holds for the bias too. It is exact where every label's probabilities are alike.

    With m labels A has at most m directions, those of `basis`, in which a draw from the penalty is narrowed; in all
    others the labels say nothing, and it stays as wide as it is. So an item unlike all labels is one that the samples
    disagree about, and nothing as large as the features' width squared is ever made.
    """
    targets = np.array([head.seen.index(label) for label in labels], np.intp)
    importance = class_weights(targets, len(head.seen))
    scales = feature_scales(features)
    if len(targets) > _MAX_CURVATURE:
        rows = np.sort(rng.choice(len(targets), _MAX_CURVATURE, replace=False))
        importance = importance[rows] * (len(targets) / len(rows))
        features = features.rows(rows)
    blocks = [block.astype(np.float64) * scale for block, scale in zip(features.blocks, scales, strict=True)]
    root = np.sqrt(importance)
    moments, basis = _directions(blocks, root)
    curvature, turn = np.linalg.eigh(_curvature(head.logits(features), importance))
    wide = np.sqrt(STRENGTH)
    narrow = 1 / np.sqrt(moments[:, None] * np.maximum(curvature, 0.0)[None, :] + 1 / STRENGTH)
    lift = root[:, None] * basis / np.sqrt(moments)  # rows of the features -> an orthonormal basis of the directions
    drawn = []
    for _ in range(count):
        noise = [rng.standard_normal((block.shape[1], len(head.seen))) for block in blocks]
        shift = rng.standard_normal(len(head.seen))
        seen = shift + sum(np.asarray(block @ part) for block, part in zip(blocks, noise, strict=True))
        change = lift @ ((wide - narrow) * (lift.T @ seen @ turn)) @ turn.T
        weights = tuple(
            (own + scale * (wide * part - np.asarray(block.T @ change)).T).astype(np.float32)
            for own, scale, part, block in zip(head.weights, scales, noise, blocks, strict=True)
        )
        bias = head.bias + wide * shift - change.sum(axis=0)
        drawn.append(replace(head, weights=weights, bias=bias.astype(np.float32)))
    return drawn


def _directions(blocks: Sequence[Any], root: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues (r,) and eigenvectors (m, r) of the weighted kernel of the features with a 1 for the bias."""
    from scipy.sparse import issparse

    kernel = np.ones((len(root), len(root)))
    for block in blocks:
        product = block @ block.T
        kernel += product.toarray() if issparse(product) else product
    values, vectors = np.linalg.eigh(root[:, None] * kernel * root[None, :])
    kept = values > _RANK * values[-1]
    return values[kept], vectors[:, kept]


def _curvature(logits: Floats, importance: Floats) -> Floats:
    """The weighted mean of diag(p) - p p^T over the labels, (C, C)."""
    proba = np.exp(logits - logits.max(axis=1, keepdims=True))
    proba /= proba.sum(axis=1, keepdims=True)
    weights = importance / importance.sum()
    return np.asarray(np.diag(weights @ proba) - (proba * weights[:, None]).T @ proba)


_DRAW: dict[Samples, Callable[[Head, FeatureMatrix, Sequence[str], Generator, int], list[Head]]] = {
    "committee": _committee,
    "posterior": _posterior,
}
