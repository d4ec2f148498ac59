"""Search for the first items of each class by the names and descriptions of the classes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NAMED_LABELS = 3
"""A class with so many labels is not searched by its name any more: the model ranks its items better."""
EARLY_LABELS = 200
"""With so many labels no class is: what was not found until then is not in the pool, or unlike its name."""


def searched(classes: Mapping[str, int]) -> list[str]:
    """The classes to search by name, given the number of labels of each class, in the order of `classes`."""
    if sum(classes.values()) >= EARLY_LABELS:
        return []
    return [name for name, count in classes.items() if count < NAMED_LABELS]


def name_scores(cosines: Floats, centre: Floats) -> Floats:
    """How much more similar each text is to a class's prototype than to any other, (n, C), C >= 2.

    `cosines` (n, C): with each prototype; `centre` (C,): their means over the pool, which are subtracted, since some
    prototypes are similar to any text.
    """
    own = cosines - centre
    first = own.argmax(axis=1)
    rows = np.arange(len(own))
    highest = own[rows, first]
    others = np.array(own)
    others[rows, first] = -np.inf
    rivals = np.repeat(highest[:, None], own.shape[1], axis=1)
    rivals[rows, first] = others.max(axis=1)
    return np.asarray(own - rivals, np.float64)
