"""Models of every kind, as a workspace keeps them."""

from __future__ import annotations

from pathlib import Path

from al_pipeline.files import read_object
from al_pipeline.models.finetuned import FORMAT, load_finetuned
from al_pipeline.models.text_model import CARD_FILE, Classifier, load_text_model


def load_model(folder: Path, encoder: Path) -> Classifier:
    """What `Classifier.save` wrote, checked by digest; a fine-tuned one takes tokenizer and embeddings from `encoder`.

    Raises BadInput where it is damaged or something else.
    """
    if read_object(folder / CARD_FILE).get("format") == FORMAT:
        return load_finetuned(folder, encoder)
    return load_text_model(folder)
