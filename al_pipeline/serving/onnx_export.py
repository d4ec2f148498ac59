"""Export a published model as one ONNX graph with all that it needs, and a model card."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from al_pipeline.errors import BadInput, NothingToDo
from al_pipeline.evaluation.figures import Estimate as Figure
from al_pipeline.features.encoder import encoder_identity, installed_source
from al_pipeline.files import (
    make_folder,
    read_object,
    remove_leftovers,
    replacing,
    sha256_file,
    temporary_folder,
    write_bytes,
    write_json,
    write_text,
)
from al_pipeline.models.text_model import TextModel
from al_pipeline.operations.export import may_replace
from al_pipeline.operations.predict import PublishedModel, check_encoder, open_model
from al_pipeline.records import round_name
from al_pipeline.serving.agreement import Agreement, compare
from al_pipeline.serving.onnx_encoder import QUANTIZED, missing_extra, weights_of
from al_pipeline.serving.onnx_models import OnnxModels, comparison_sample, refuse_finetuned
from al_pipeline.workspace.workspace import Workspace

FORMAT = "al-onnx/1"
CARD_FILE, GRAPH_FILE = "card.json", "model.onnx"
_OURS = frozenset(
    {CARD_FILE, GRAPH_FILE, "README.md", "predict.py", "requirements.txt", "tokenizer.json", "vocabulary.json"}
)


@dataclass(frozen=True, slots=True)
class ExportedTo:
    """The result of `export_onnx`."""

    out: str
    format: str
    round: str
    digest: str
    bytes: int
    agreement: str


def export_onnx(
    workspace: Workspace, out: Path, number: int | None = None, runtime: str = "onnx", *, force: bool = False
) -> ExportedTo:
    """Write the model of a round (default: the promoted one) to a folder, or to an archive if `out` ends with .zip.

    It is written only if it agrees with the original. Raises BadInput with the reason if it does not, or cannot be
    converted, UsageError if `out` cannot be written or the extra is missing, NothingToDo without such a model.
    """
    is_archive = out.suffix.lower() == ".zip"
    _check_target(out, is_archive, force)
    published = open_model(workspace, number)
    refuse_finetuned(published, runtime)
    remove_leftovers(out.parent)
    with temporary_folder(out.parent) as place:
        fresh = make_folder(place / "new")
        fresh.chmod(0o755)
        _write_model(workspace, published, fresh, runtime)
        agreement = _compared(workspace, published, fresh, runtime)
        agreement.check(round_name(published.record.round), runtime)
        _write_cards(published, fresh, runtime, agreement)
        size = sum(path.stat().st_size for path in fresh.iterdir())
        if is_archive:
            _write_archive(fresh, out)
        else:
            if out.is_dir():
                out.rename(place / "old")
            fresh.rename(out)
    digest = published.record.hashes["model"]
    return ExportedTo(str(out), runtime, round_name(published.record.round), digest, size, agreement.sentence())


def _check_target(out: Path, is_archive: bool, force: bool) -> None:
    if not may_replace(out, force):
        return
    if is_archive != out.is_file() or out.is_symlink():
        raise BadInput(f"{out} is {'not a file' if is_archive else 'not a folder'}; --force does not replace it")
    if not is_archive:
        others = sorted(path.name for path in out.iterdir() if path.name not in _OURS)
        if others or read_object(out / CARD_FILE).get("format") != FORMAT:
            what = f"contains {others[0]}, which" if others else f"has no {CARD_FILE} that"
            raise BadInput(f"{out} {what} this export wrote; --force does not delete it")


def _write_model(workspace: Workspace, published: PublishedModel, folder: Path, runtime: str) -> None:
    """Write the graph, the tokenizer and the vocabulary.

    With a quantized encoder the graph holds the exact one too, for texts near the boundary of two classes.
    """
    try:
        from onnx import TensorProto

        from al_pipeline.serving.onnx_graph import Graph, add_encoder
        from al_pipeline.serving.onnx_head import add_head, add_refined, check_head
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name)) from None
    model, features = published.model, published.features
    if not isinstance(model, TextModel):
        raise BadInput(f"a model of the kind {type(model).__name__} cannot be converted to ONNX")
    check_head(model)
    graph = Graph()
    if model.uses_encoder:
        encoder = published.folder / "encoder"
        check_encoder(published, encoder_identity(encoder, features.max_tokens))
        weights, config, tokenizer = weights_of(encoder, features.max_tokens)
        ids = graph.input("input_ids", TensorProto.INT64, ["texts", "tokens"])
        mask = graph.input("attention_mask", TensorProto.INT64, ["texts", "tokens"])

        def exact() -> str:
            return add_head(graph, model, add_encoder(graph, ids, mask, weights, config, quantized=False))

        if runtime == QUANTIZED:
            rough = add_head(graph, model, add_encoder(graph, ids, mask, weights, config, quantized=True))
            margin = OnnxModels(workspace, runtime).agreement(published).margin
            proba = add_refined(graph, rough, margin, len(model.classes), exact)
        else:
            proba = exact()
        write_text(folder / "tokenizer.json", tokenizer, 0o644)
    else:
        proba = add_head(graph, model, None)
    whole = graph.model({"probabilities": (proba, TensorProto.DOUBLE, ["texts", len(model.classes)])})
    write_bytes(folder / GRAPH_FILE, whole.SerializeToString(), 0o644)
    if model.tfidf is not None:
        write_text(
            folder / "vocabulary.json", json.dumps({"terms": list(model.tfidf.terms)}, ensure_ascii=False) + "\n", 0o644
        )
    write_json(folder / CARD_FILE, {"classes": list(model.classes), "max_tokens": features.max_tokens}, 0o644)


def _compared(workspace: Workspace, published: PublishedModel, folder: Path, runtime: str) -> Agreement:
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


def _write_cards(published: PublishedModel, folder: Path, runtime: str, agreement: Agreement) -> None:
    record, model = published.record, published.model
    needs = ["numpy", "onnxruntime", *(["tokenizers"] if model.needs_vectors else [])]
    write_text(folder / "requirements.txt", "\n".join(needs) + "\n", 0o644)
    write_text(folder / "predict.py", (Path(__file__).parent / "exported.py").read_text(encoding="utf-8"), 0o644)
    encoder = installed_source(published.folder / "encoder") if model.needs_vectors else None
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name != CARD_FILE}
    card: dict[str, Any] = {
        "format": FORMAT,
        "round": round_name(record.round),
        "digest": record.hashes["model"],
        "classes": list(model.classes),
        "max_tokens": published.features.max_tokens,
        "precision": "int8" if runtime == QUANTIZED else "float32",
        "encoder": encoder,
        "agreement": agreement.to_json(),
        "sha256": files,
    }
    write_json(folder / CARD_FILE, card, 0o644)
    write_text(folder / "README.md", "\n".join(_readme(published, card, agreement)) + "\n", 0o644)


def _readme(published: PublishedModel, card: Mapping[str, Any], agreement: Agreement) -> Iterator[str]:
    """The model card as lines."""
    record = published.record
    schema, counts, metrics = record.params.schema_, record.counts, record.metrics
    yield f"# {card['round']}: {schema.question}"
    yield ""
    yield f"A text classifier, trained by active learning, exported by al-pipeline as ONNX in {card['precision']}."
    yield ""
    yield f"- **Round**: {card['round']}; decision: {record.decision.verdict}"
    yield f"- **SHA-256 of the original model**: `{card['digest']}`"
    yield f"- **Features**: {record.params.features.get('kind', '')}" + (
        f"; encoder {card['encoder']}, at most {card['max_tokens']} tokens" if card["encoder"] else ""
    )
    yield f"- **Export against the original**: {agreement.sentence()}"
    yield ""
    yield "## Intended use"
    yield ""
    yield f"It answers one question about a text, “{schema.question}”, with one of: {', '.join(card['classes'])}."
    yield "The probabilities are calibrated on texts like those of the pool; on other texts neither they nor the"
    yield "figures below hold. Let a person decide where an error is costly, above all at low probabilities."
    yield ""
    yield "## Data"
    yield ""
    yield f"Trained on {counts.labelled:,} labelled texts of a pool of {counts.pool:,}, evaluated on"
    yield f"{counts.test_labelled:,} random texts that were never trained on. Labels by class:"
    yield ""
    yield "| class | training | test |"
    yield "|---|---|---|"
    for name in card["classes"]:
        yield f"| {name} | {counts.labels.get(name, 0):,} | {counts.test_labels.get(name, 0):,} |"
    yield ""
    yield "## Metrics"
    yield ""
    level = f"{metrics.confidence:.0%} interval" if metrics.confidence else "interval"
    yield f"On {metrics.items:,} test texts, of the original model:"
    yield ""
    yield f"| metric | value | {level} |"
    yield "|---|---|---|"
    for title, figure in (
        ("accuracy", metrics.accuracy), ("macro-F1", metrics.macro_f1), ("log loss", metrics.log_loss),
        ("calibration error", metrics.calibration_error),
    ):  # fmt: skip
        yield _row(title, figure)
    for name, per_class in metrics.per_class.items():
        yield _row(f"F1 of {name}", per_class.f1)
    yield ""
    yield "## Use"
    yield ""
    yield '    pip install -r requirements.txt && python predict.py "a text"'
    yield ""
    yield "`predict.py` shows how the inputs of `model.onnx` are made: token ids, and the columns and counts of terms."


def _row(title: str, figure: Figure) -> str:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    low, high = (figure.low, figure.high)
    return f"| {title} | {shown(figure.value)} | {shown(low)} to {shown(high)} |"


def _write_archive(folder: Path, out: Path) -> None:
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            entry = zipfile.ZipInfo(f"{out.stem}/{path.name}")  # without a time: equal models, equal bytes
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as target, path.open("rb") as source:
                shutil.copyfileobj(source, target)
