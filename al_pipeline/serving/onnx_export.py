"""A published model as one ONNX graph, with all that predicting with it needs."""

from __future__ import annotations

import json
from pathlib import Path

from al_pipeline.errors import NothingToDo
from al_pipeline.features.encoder import encoder_identity
from al_pipeline.files import write_bytes, write_json, write_text
from al_pipeline.models.finetuned import FinetunedModel
from al_pipeline.models.text_model import TextModel
from al_pipeline.operations.predict import PublishedModel, check_encoder
from al_pipeline.serving.agreement import Agreement, compare
from al_pipeline.serving.head_arrays import head_arrays
from al_pipeline.serving.onnx_encoder import QUANTIZED, missing_extra, parts_of, weights_of
from al_pipeline.serving.onnx_models import OnnxModels, comparison_sample
from al_pipeline.workspace.workspace import Workspace

CARD_FILE, GRAPH_FILE = "card.json", "model.onnx"
PROGRAM = Path(__file__).parent / "exported.py"
"""The program that goes with a graph."""


def write_onnx(workspace: Workspace, published: PublishedModel, folder: Path, runtime: str) -> Agreement:
    """Write graph, tokenizer, vocabulary, `predict.py` and `requirements.txt`; the comparison with the original.

    Raises BadInput if the model cannot be converted, UsageError without the extra, NothingToDo without texts to compare
    it on.
    """
    _write_model(workspace, published, folder, runtime)
    needs = ["numpy", "onnxruntime", *(["tokenizers"] if (folder / "tokenizer.json").exists() else [])]
    write_text(folder / "requirements.txt", "\n".join(needs) + "\n", 0o644)
    write_text(folder / "predict.py", PROGRAM.read_text(encoding="utf-8"), 0o644)
    return compared(workspace, published, folder, runtime)


def _write_model(workspace: Workspace, published: PublishedModel, folder: Path, runtime: str) -> None:
    """Write the graph, the tokenizer and the vocabulary.

    With a quantized encoder the graph holds the exact one too, for texts near the boundary of two classes.
    """
    try:
        from onnx import TensorProto

        from al_pipeline.serving.onnx_graph import Graph, add_encoder
        from al_pipeline.serving.onnx_head import add_head, add_refined
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name)) from None
    model, features = published.model, published.features
    head = head_arrays(model)
    graph = Graph()
    if head.dense is not None:
        encoder = published.folder / "encoder"
        if isinstance(model, FinetunedModel):
            weights, config, tokenizer = parts_of(model.trained)
        else:
            check_encoder(published, encoder_identity(encoder, features.max_tokens))
            weights, config, tokenizer = weights_of(encoder, features.max_tokens)
        ids = graph.input("input_ids", TensorProto.INT64, ["texts", "tokens"])
        mask = graph.input("attention_mask", TensorProto.INT64, ["texts", "tokens"])

        def exact() -> str:
            return add_head(graph, head, add_encoder(graph, ids, mask, weights, config, quantized=False))

        if runtime == QUANTIZED:
            rough = add_head(graph, head, add_encoder(graph, ids, mask, weights, config, quantized=True))
            margin = OnnxModels(workspace, runtime).agreement(published).margin
            proba = add_refined(graph, rough, margin, len(model.classes), exact)
        else:
            proba = exact()
        write_text(folder / "tokenizer.json", tokenizer, 0o644)
    else:
        proba = add_head(graph, head, None)
    whole = graph.model({"probabilities": (proba, TensorProto.DOUBLE, ["texts", len(model.classes)])})
    write_bytes(folder / GRAPH_FILE, whole.SerializeToString(), 0o644)
    if isinstance(model, TextModel) and model.tfidf is not None:
        text = json.dumps({"terms": list(model.tfidf.terms)}, ensure_ascii=False)
        write_text(folder / "vocabulary.json", f"{text}\n", 0o644)
    precision = "int8" if runtime == QUANTIZED else "float32"
    card = {"classes": list(model.classes), "max_tokens": features.max_tokens, "precision": precision}
    write_json(folder / CARD_FILE, card, 0o644)


def compared(workspace: Workspace, published: PublishedModel, folder: Path, runtime: str) -> Agreement:
    """What is in `folder` compared with the original, by the code that goes with it."""
    try:
        from al_pipeline.serving.exported import ExportedModel
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name)) from None
    sample = comparison_sample(workspace, published)
    if not sample.items:
        raise NothingToDo("there is neither a test set nor a pool to compare the model on; `dvc pull` fetches them")
    original = OnnxModels(workspace, runtime).original_proba(published, sample)
    converted = ExportedModel(folder).predict_proba([item.text for item in sample.items])
    return compare(original, converted, sample.truth, published.model.classes)
