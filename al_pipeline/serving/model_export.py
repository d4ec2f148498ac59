"""Export a published model with a model card: a folder or an archive, written only if it agrees with the original."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from al_pipeline.errors import BadInput, UsageError
from al_pipeline.files import (
    make_folder,
    read_object,
    remove_leftovers,
    replacing,
    sha256_file,
    temporary_folder,
    write_json,
    write_text,
)
from al_pipeline.operations.export import may_replace
from al_pipeline.operations.predict import PublishedModel, open_model
from al_pipeline.records import round_name
from al_pipeline.serving.agreement import Agreement
from al_pipeline.serving.huggingface_export import write_huggingface
from al_pipeline.serving.mlflow_export import write_mlflow
from al_pipeline.serving.model_card import UNKNOWN_LICENSE, card_fields, model_card
from al_pipeline.serving.onnx_encoder import EXACT, QUANTIZED
from al_pipeline.serving.onnx_export import write_onnx
from al_pipeline.workspace.workspace import Workspace

CARD_FILE, README_FILE = "card.json", "README.md"


class Format(NamedTuple):
    """A way to write a model."""

    name: str
    """In `card.json`."""
    title: str
    """As the model card has it."""
    library: str
    """What loads it, by Hugging Face's names."""
    write: Callable[[Workspace, PublishedModel, Path], Agreement]
    """Writes all files but the cards, and says how far the model agrees with the original."""
    use: tuple[str, ...]
    """Lines that say how it is used."""


_ONNX_USE = (
    '    pip install -r requirements.txt && python predict.py "a text"',
    "",
    "`predict.py` shows how the inputs of `model.onnx` are made: token ids, and the columns and counts of terms.",
)
FORMATS: Mapping[str, Format] = {
    EXACT: Format("al-onnx/1", "as ONNX in float32", "onnx", partial(write_onnx, runtime=EXACT), _ONNX_USE),
    QUANTIZED: Format(
        "al-onnx/1",
        "as ONNX in 8 bits, with a second pass in float32 for texts near the boundary of two classes",
        "onnx",
        partial(write_onnx, runtime=QUANTIZED),
        _ONNX_USE,
    ),
    "mlflow": Format(
        "al-mlflow/1",
        "as an MLflow model (ONNX in float32)",
        "mlflow",
        write_mlflow,
        (
            "    pip install mlflow -r requirements.txt",
            "",
            "    import mlflow, pandas",
            "    model = mlflow.pyfunc.load_model('.')",
            "    model.predict(pandas.DataFrame({'text': ['a text']}))",
            "",
            "It answers with a table: label, probability, and the probability of each class.",
        ),
    ),
    "huggingface": Format(
        "al-huggingface/1",
        "for Hugging Face transformers",
        "transformers",
        write_huggingface,
        (
            "The architecture (mean of the token vectors, calibrated head) is none of transformers' own, so its code",
            "is here, in `modeling_al.py`: read it, then allow it.",
            "",
            "    from transformers import pipeline",
            "    classify = pipeline('text-classification', model='.', trust_remote_code=True)",
            "    classify('a text', top_k=None)",
            "",
            "`AutoModelForSequenceClassification.from_pretrained('.', trust_remote_code=True)` loads the model alone.",
            "Its logits are the logarithms of the calibrated probabilities. With TF-IDF it needs `terms` and `counts`",
            "as well, which the pipeline makes of a text. The weights are safetensors.",
        ),
    ),
}  # fmt: skip
"""The formats of models, by their names on the command line."""


@dataclass(frozen=True, slots=True)
class ExportedTo:
    """The result of `export_model`."""

    out: str
    format: str
    round: str
    digest: str
    bytes: int
    agreement: str


def export_model(
    workspace: Workspace,
    out: Path,
    form: str,
    number: int | None = None,
    *,
    force: bool = False,
    license_name: str = UNKNOWN_LICENSE,
) -> ExportedTo:
    """Write the model of a round (default: the promoted one) to a folder, or to an archive if `out` ends with .zip.

    `form` is one of `FORMATS`. It is written only if it agrees with the original. Raises BadInput with the reason if
    it does not, or cannot be converted, UsageError if `out` cannot be written or an extra is missing, NothingToDo
    without such a model.
    """
    written = FORMATS[form]
    _check_license(license_name)
    is_archive = out.suffix.lower() == ".zip"
    _check_target(out, is_archive, force)
    published = open_model(workspace, number)
    name = round_name(published.record.round)
    remove_leftovers(out.parent)
    with temporary_folder(out.parent) as place:
        fresh = make_folder(place / "new")
        fresh.chmod(0o755)
        agreement = written.write(workspace, published, fresh)
        agreement.check(name, form)
        card = model_card(published, written.title, agreement, written.use, written.library, license_name)
        write_text(fresh / README_FILE, card, 0o644)
        files = {path.relative_to(fresh).as_posix(): sha256_file(path) for path in _files(fresh)}
        known = read_object(fresh / CARD_FILE)
        fields = {**card_fields(published, agreement), "license": license_name, "sha256": files}
        write_json(fresh / CARD_FILE, {**known, "format": written.name, "kind": form, **fields}, 0o644)
        size = sum(path.stat().st_size for path in _files(fresh))
        if is_archive:
            _write_archive(fresh, out)
        else:
            if out.is_dir():
                out.rename(place / "old")
            fresh.rename(out)
    return ExportedTo(str(out), form, name, published.record.hashes["model"], size, agreement.sentence())


def _check_license(name: str) -> None:
    if not name or len(name) > 100 or any(not (one.isascii() and one.isalnum()) and one not in ".-+" for one in name):
        raise UsageError(f"--license {name!r} is no identifier of a license, such as apache-2.0")


def _check_target(out: Path, is_archive: bool, force: bool) -> None:
    if not may_replace(out, force):
        return
    if is_archive != out.is_file() or out.is_symlink():
        raise BadInput(f"{out} is {'not a file' if is_archive else 'not a folder'}; --force does not replace it")
    if not is_archive:
        card = read_object(out / CARD_FILE)
        if card.get("format") not in {form.name for form in FORMATS.values()}:
            raise BadInput(f"{out} has no {CARD_FILE} that this export wrote; --force does not delete it")
        ours = {CARD_FILE, README_FILE, *card.get("sha256", ())}
        others = [name for path in _files(out) if (name := path.relative_to(out).as_posix()) not in ours]
        others = [name for name in others if "__pycache__" not in name.split("/")]  # who loaded it left these
        if others:
            raise BadInput(f"{out} contains {others[0]}, which this export did not write; --force does not delete it")


def _files(folder: Path) -> list[Path]:
    """All files below a folder but its card, sorted."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / CARD_FILE)


def _write_archive(folder: Path, out: Path) -> None:
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [folder / CARD_FILE, *_files(folder)]:
            name = f"{out.stem}/{path.relative_to(folder).as_posix()}"
            entry = zipfile.ZipInfo(name)  # without a time: equal models, equal bytes
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as target, path.open("rb") as source:
                shutil.copyfileobj(source, target)
