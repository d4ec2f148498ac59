"""The names, descriptions and examples of classes as vectors of the encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.vectors import Vectors, guide_vectors
from al_pipeline.params import Meaning


def class_texts(name: str, meaning: Meaning | None) -> list[str]:
    """The texts that say what a class is: its name in words, with its description; then its examples."""
    words = " ".join(re.split(r"[\s_\-]+", name)).strip() or name
    if meaning is None:
        return [words]
    return [f"{words}: {meaning.description}" if meaning.description else words, *meaning.examples]


def class_prototypes(vectors: Vectors, classes: Sequence[str], meanings: Mapping[str, Meaning]) -> NDArray[np.float32]:
    """The prototype of each class, (C, d): the mean vector of its `class_texts`, of unit length."""
    rows = []
    for name in classes:
        found = guide_vectors(vectors, class_texts(name, meanings.get(name)))
        assert found is not None
        mean = found.astype(np.float64).mean(axis=0)
        rows.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
    return np.array(rows).astype(np.float32)
