"""When predictions no longer change: the agreement of successive models on a fixed set of items.

Bloodgood & Vijay-Shanker 2009, A method for stopping active learning based on stabilizing predictions: stop once the
mean of Cohen's kappa over the last `patience` pairs of successive models is at least .99 on a set of unlabelled items.
It says that more labels of this kind hardly change the model, not that the model is good.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

AGREEMENT = 0.99
PATIENCE = 3


def cohens_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """The agreement beyond chance of two predictions (n,) of the same items (Cohen 1960); 1 if both are one class.

    Raises ValueError without an item.
    """
    one, two = np.asarray(first), np.asarray(second)
    if one.shape != two.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"predictions of shapes {one.shape} and {two.shape} cannot be compared")
    names = np.unique(np.concatenate([one, two]))
    chance = sum(float((one == name).mean()) * float((two == name).mean()) for name in names)
    observed = float((one == two).mean())
    return 1.0 if chance >= 1 else (observed - chance) / (1 - chance)


def is_stable(kappas: Sequence[float], patience: int = PATIENCE, agreement: float = AGREEMENT) -> bool:
    """Whether the last `patience` agreements of successive models, oldest first, are `agreement` on average."""
    newest = kappas[-patience:]
    return len(newest) == patience and sum(newest) / patience >= agreement - 1e-12
