"""How far two models predict the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


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
