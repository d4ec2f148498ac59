"""A published model as a folder for Hugging Face transformers: configuration, safetensors, tokenizer and its code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.features.encoder import Encoder, encoder_identity
from al_pipeline.files import write_text
from al_pipeline.models.finetuned import FinetunedModel
from al_pipeline.models.text_model import TextModel
from al_pipeline.operations.predict import PublishedModel, check_encoder
from al_pipeline.serving.agreement import Agreement, compare
from al_pipeline.serving.head_arrays import HeadArrays, head_arrays
from al_pipeline.serving.onnx_encoder import EXACT
from al_pipeline.serving.onnx_models import OnnxModels, comparison_sample
from al_pipeline.workspace.workspace import Workspace

_MODULE = "modeling_al"


def write_huggingface(workspace: Workspace, published: PublishedModel, folder: Path) -> Agreement:
    """Write the folder; the comparison with the original, by the code that goes with it.

    Raises BadInput for a model without encoder, or one that is code of its own, NothingToDo without texts to compare it
    on.
    """
    model, features = published.model, published.features
    head = head_arrays(model)
    if head.dense is None:
        raise BadInput("the model uses TF-IDF alone, no transformer; use --format onnx or mlflow")
    encoder = published.folder / "encoder"
    if isinstance(model, FinetunedModel):
        loaded = model.trained
    else:
        check_encoder(published, encoder_identity(encoder, features.max_tokens))
        loaded = Encoder(encoder, features.max_tokens, "float32", threads=1)
    _save(folder, loaded, head, model.classes)
    shutil.copyfile(Path(__file__).parent / "huggingface_model.py", folder / f"{_MODULE}.py")
    if isinstance(model, TextModel) and model.tfidf is not None:
        text = json.dumps({"terms": list(model.tfidf.terms)}, ensure_ascii=False)
        write_text(folder / "vocabulary.json", f"{text}\n", 0o644)
    for path in folder.iterdir():
        path.chmod(0o644)
    sample = comparison_sample(workspace, published)
    if not sample.items:
        raise NothingToDo("there is neither a test set nor a pool to compare the model on; `dvc pull` fetches them")
    original = OnnxModels(workspace, EXACT).original_proba(published, sample)
    found = _predict(folder, [item.text for item in sample.items], model.classes)
    return compare(original, found, sample.truth, model.classes)


def _save(folder: Path, encoder: Encoder, head: HeadArrays, classes: Sequence[str]) -> None:
    """Write configuration, weights and tokenizer."""
    import torch

    from al_pipeline.serving.huggingface_model import ClassifierConfig, TextClassifier

    if encoder.model.config.is_encoder_decoder:
        raise BadInput("half of an encoder-decoder transformer cannot be exported for transformers")
    own = {key: value for key, value in encoder.model.config.to_dict().items() if not key.startswith("_")}
    config = ClassifierConfig(
        encoder={key: value for key, value in own.items() if key != "transformers_version"},
        head={
            "seen": len(head.bias), "terms": 0 if head.idf is None else len(head.idf),
            "temperature": float(head.temperature), "scale": float(head.scale), "is_estimate": head.is_estimate,
        },
        id2label=dict(enumerate(classes)),
        label2id={name: place for place, name in enumerate(classes)},
        auto_map={
            "AutoConfig": f"{_MODULE}.ClassifierConfig",
            "AutoModelForSequenceClassification": f"{_MODULE}.TextClassifier",
        },
        custom_pipelines={
            "text-classification": {
                "impl": f"{_MODULE}.TextPipeline", "pt": ["AutoModelForSequenceClassification"], "tf": [],
            }
        },
    )  # fmt: skip
    model = TextClassifier(config)
    model.encoder.load_state_dict(encoder.model.state_dict())
    for name, parameter in model.head.items():
        array = np.asarray(getattr(head, name), np.float32)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(array.T if name == "sparse" else array)))
    model.save_pretrained(str(folder))
    encoder.save_tokenizer(folder)


def _predict(folder: Path, texts: Sequence[str], classes: Sequence[str]) -> Any:
    """The probabilities (n, C) of the exported model, text by text."""
    from transformers import PreTrainedTokenizerFast

    from al_pipeline.serving.huggingface_model import TextClassifier, TextPipeline

    model: Any = TextClassifier.from_pretrained(str(folder), use_safetensors=True, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    classify: Any = TextPipeline(model=model.eval(), tokenizer=tokenizer, device="cpu")  # type: ignore[no-untyped-call]
    found = np.empty((len(texts), len(classes)))
    for row, text in enumerate(texts):
        scores = {one["label"]: one["score"] for one in classify(text, top_k=None)}
        found[row] = [scores[name] for name in classes]
    return found
