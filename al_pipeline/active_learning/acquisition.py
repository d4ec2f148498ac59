"""Acquisition functions: class probabilities (n, C) -> one score per item (n,), higher = ask sooner.

Those of `SAMPLE_ACQUISITION` take the probabilities of K models, (n, K, C), and score their disagreement.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]
Acquisition = Callable[[ArrayLike], Floats]

_SUM_TOLERANCE = 1e-3
"""Tolerance of a row's sum: enough for a softmax in bfloat16, too narrow for logits."""


def check_proba(proba: ArrayLike) -> Floats:
    """`proba` as float64 of shape (n, C), C >= 2, rows distributions. Raises ValueError naming the first bad row."""
    checked = np.asarray(proba, dtype=np.float64)
    if checked.ndim != 2 or checked.shape[1] < 2:
        raise ValueError(f"probabilities must have shape (items, 2 or more classes), got {checked.shape}")
    _check_rows(checked)
    return checked


def check_samples(samples: ArrayLike) -> Floats:
    """`samples` as float64 of shape (n, K, C), C >= 2, each model's answer a distribution. Raises ValueError."""
    checked = np.asarray(samples, dtype=np.float64)
    if checked.ndim != 3 or checked.shape[1] < 1 or checked.shape[2] < 2:
        raise ValueError(f"samples must have shape (items, models, 2 or more classes), got {checked.shape}")
    _check_rows(checked)
    return checked


def _check_rows(checked: Floats) -> None:
    """Raise ValueError, naming the first bad item, unless the last axis holds probability distributions."""
    inner = tuple(range(1, checked.ndim))
    if not np.isfinite(checked).all():
        row = int(np.argmin(np.isfinite(checked).all(axis=inner)))
        raise ValueError(f"row {row} of the probabilities is not finite: {checked[row].tolist()}")
    near = np.abs(checked.sum(axis=-1) - 1) <= _SUM_TOLERANCE
    if not (near.all() and (checked >= 0).all()):
        row = int(np.argmin((checked >= 0).all(axis=inner) & near.all(axis=inner[:-1])))
        raise ValueError(f"row {row} of the probabilities must be >= 0 and sum to 1, got {checked[row].tolist()}")


def least_confidence(proba: ArrayLike) -> Floats:
    """Least confidence: `1 - p(most likely class)`, from 0 to 1 - 1/C (Lewis & Gale 1994, arXiv:cmp-lg/9407020)."""
    return np.asarray(1.0 - check_proba(proba).max(axis=1))


def margin(proba: ArrayLike) -> Floats:
    """Margin: `1 - (p(first class) - p(second class))`, from 0 to 1 (Scheffer, Decomain & Wrobel 2001)."""
    ordered = np.partition(check_proba(proba), -2, axis=1)
    return np.asarray(1.0 - (ordered[:, -1] - ordered[:, -2]))


def entropy(proba: ArrayLike) -> Floats:
    """Entropy of the predicted distribution in nats, from 0 to log C (Shannon 1948; Settles 2009, section 3.1)."""
    checked = np.sort(check_proba(proba), axis=1)  # one order of summation: equal distributions, equal bits
    logs = np.log(checked, out=np.zeros_like(checked), where=checked > 0)
    return np.asarray(-(checked * logs).sum(axis=1) + 0.0)


ACQUISITION: dict[str, Acquisition] = {
    "least_confidence": least_confidence,
    "margin": margin,
    "entropy": entropy,
}
"""Every acquisition function, by the name that `params.yaml` uses."""


def vote_entropy(samples: ArrayLike) -> Floats:
    """Vote entropy of a committee's predicted classes in nats, from 0 to log min(K, C) (Dagan & Engelson 1995).

    A model for which several classes are equally likely votes for the first of them.
    """
    checked = check_samples(samples)
    votes = np.eye(checked.shape[2])[checked.argmax(axis=2)]
    return entropy(votes.mean(axis=1))


def consensus_entropy(samples: ArrayLike) -> Floats:
    """Consensus entropy: of the committee's mean distribution, from 0 to log C (soft votes: Settles 2009, section 3.2).

    It is also high if all members agree and are uncertain.
    """
    return entropy(check_samples(samples).mean(axis=1))


def kl_disagreement(samples: ArrayLike) -> Floats:
    """KL disagreement: mean divergence of the members from their consensus, 0 to log C (McCallum & Nigam 1998)."""
    checked = check_samples(samples)
    consensus = np.broadcast_to(checked.mean(axis=1, keepdims=True), checked.shape)
    ratio = np.divide(checked, consensus, out=np.ones_like(checked), where=checked > 0)
    return np.asarray(np.maximum((checked * np.log(ratio)).sum(axis=2).mean(axis=1), 0.0))


def bald(samples: ArrayLike) -> Floats:
    """BALD: entropy of the mean minus the mean entropy, from 0 to log C (Houlsby et al. 2011, arXiv:1112.5745).

    It is the mutual information between the item's label and the model's parameters: high where samples of the
    posterior disagree and each is confident. Over a committee it equals `kl_disagreement`.
    """
    checked = check_samples(samples)
    items, models, classes = checked.shape
    each = entropy(checked.reshape(-1, classes)).reshape(items, models)
    return np.asarray(np.maximum(entropy(checked.mean(axis=1)) - each.mean(axis=1), 0.0))


SAMPLE_ACQUISITION: dict[str, Acquisition] = {
    "vote_entropy": vote_entropy,
    "consensus_entropy": consensus_entropy,
    "kl_disagreement": kl_disagreement,
    "bald": bald,
}
"""Every acquisition function of samples (n, K, C), by name."""


def score_bounds(name: str, classes: int, models: int = 1) -> tuple[float, float]:
    """The lowest and the highest possible score (approximate for consensus entropy with more classes than models)."""
    certain, uniform = np.eye(classes)[0], np.full(classes, 1 / classes)
    if name in ACQUISITION:
        low, high = ACQUISITION[name](np.stack([certain, uniform]))
        return float(low), float(high)
    disagreeing = np.eye(classes)[np.arange(models) % classes]
    extremes = np.stack([np.tile(certain, (models, 1)), np.tile(uniform, (models, 1)), disagreeing])
    scores = SAMPLE_ACQUISITION[name](extremes)
    return float(scores.min()), float(scores.max())
