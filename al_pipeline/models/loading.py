"""Loading of saved models of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.terms import TermCache
from al_pipeline.features.vectors import Vectors
from al_pipeline.files import read_object
from al_pipeline.models.finetuned import FORMAT, load_finetuned
from al_pipeline.models.text_model import CARD_FILE, Classifier, load_text_model
from al_pipeline.records import CPU, Item


def load_model(folder: Path, encoder: Path, terms: TermCache | None = None, device: str = CPU) -> Classifier:
    """Load what `Classifier.save` wrote, checked by digest. A fine-tuned model uses the tokenizer in `encoder`, and
    computes on `device`.

    `terms`: the cache of TF-IDF rows, if any. Raises BadInput if it is damaged or not a model.
    """
    if read_object(folder / CARD_FILE).get("format") == FORMAT:
        return load_finetuned(folder, encoder, device)
    return load_text_model(folder, terms)


def estimator_name(folder: Path) -> str | None:
    """The name of the estimator that a saved model on frozen features was fitted by; None for other models."""
    name = read_object(folder / CARD_FILE).get("estimator")
    return name if isinstance(name, str) else None


def vectors_for(model: Classifier, vectors: Vectors | None, items: Sequence[Item]) -> NDArray[np.float32] | None:
    """The encoder's vectors of items, (n, d); None if the model uses none."""
    return vectors.of(items) if vectors is not None and model.needs_vectors else None
