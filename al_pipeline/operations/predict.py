"""Predict with a published model: the promoted one, or that of any round."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from al_pipeline.data.catalog import item_id_from, text_from
from al_pipeline.data.inputs import Source
from al_pipeline.data.table_rows import BadRow, Row, excerpt
from al_pipeline.data.tables import read_table
from al_pipeline.errors import BadInput, NothingToDo, RepositoryError, UsageError
from al_pipeline.files import (
    json_line,
    make_folder,
    read_json,
    remove_leftovers,
    sha256_tree,
    temporary_folder,
    write_json,
)
from al_pipeline.integrations.git import Git
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import read_history
from al_pipeline.records import content_hash, round_name, shown_text
from al_pipeline.workspace.home import private_folder
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.models.text_model import Classifier
    from al_pipeline.operations.history import History
    from al_pipeline.params import Features
    from al_pipeline.rounds.manifests import RoundRecord


def model_folder(workspace: Workspace, number: int | None = None) -> tuple[int, Path]:
    """Return the round (default: the promoted one) and a folder with its model and encoder.

    They are fetched once and verified by digest. Raises NothingToDo if the round is not published or none is promoted,
    RepositoryError if its model cannot be obtained.
    """
    record = published_record(read_history(workspace.layout, Git(workspace.layout.root)), number)
    return record.round, _folder(workspace, record)


def published_record(history: History, number: int | None) -> RoundRecord:
    """The record of a round, by default of the promoted one."""
    if number is None:
        if history.promoted is None:
            raise NothingToDo(
                "no model is promoted yet; `al rounds` shows why, and `--round N` uses a round's own model"
            )
        number = int(history.promoted.removeprefix("round-"))
    return history.record(number)


def _folder(workspace: Workspace, record: RoundRecord) -> Path:
    """The folder with the model and the encoder of a round, fetched if it is not whole."""
    name, wanted = round_name(record.round), record.hashes["model"]
    folder = workspace.layout.private / "published" / name
    if not _is_whole(folder, wanted):
        _fetch(workspace, name, wanted, folder)
    return folder


@dataclass(frozen=True)
class PublishedModel:
    """The model of a published round, loaded, and what its features are computed with."""

    record: RoundRecord
    folder: Path
    """The folder with `model` and `encoder`, both as published."""
    features: Features
    device: str
    """The device that computes the vectors, as `find_device` describes it."""
    model: Classifier


def open_model(workspace: Workspace, number: int | None = None, history: History | None = None) -> PublishedModel:
    """Load the model of a round (default: the promoted one). `history`: None to read the workspace's.

    Raises what `model_folder` raises, and BadInput if this engine cannot load it.
    """
    from al_pipeline.features.device import device_like
    from al_pipeline.models.loading import load_model
    from al_pipeline.operations.plugins import use_plugin_of
    from al_pipeline.workspace.fingerprint import recorded_device

    record = published_record(history or read_history(workspace.layout, Git(workspace.layout.root)), number)
    folder = _folder(workspace, record)
    features, device = _features(record), device_like(recorded_device(record.engine.to_row()))
    use_plugin_of(folder / "model", workspace.layout)
    return PublishedModel(
        record, folder, features, device, load_model(folder / "model", folder / "encoder", device=device)
    )


def check_encoder(published: PublishedModel, identity: str) -> None:
    """Raise BadInput if a model was fitted on the vectors of an encoder with another identity."""
    if published.model.encoder != identity:
        raise BadInput(
            f"the encoder of {round_name(published.record.round)} (by digest) is not the one that its model was "
            f"fitted on; delete {published.folder}, and `al predict` fetches both again"
        )


def _is_whole(folder: Path, wanted: str) -> bool:
    """Whether model and encoder are as they were fetched, and the model has the digest `wanted`."""
    try:
        known = read_json(folder / "complete.json")
    except BadInput:
        return False
    return isinstance(known, dict) and known.get("model") == wanted and known == _digests(folder)


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256_tree(folder / name) for name in ("model", "encoder")}


def _fetch(workspace: Workspace, name: str, wanted: str, folder: Path) -> None:
    """Fetch the model of a round into `folder`, completely or not at all: a new folder beside it replaces it."""
    private_folder(workspace.layout.private)
    make_folder(folder.parent)
    remove_leftovers(folder.parent)
    with temporary_folder(folder.parent) as place:
        fresh = place / name
        fresh.mkdir()
        with replace(open_dvc(workspace.layout), state=None) as dvc:
            dvc.get("models/candidate", name, fresh / "model")
            dvc.get("models/encoder", name, fresh / "encoder")
        found = _digests(fresh)
        if found["model"] != wanted:
            raise RepositoryError(
                f"the model of {name} has digest {found['model'][:12]}, but its record has {wanted[:12]}; `al doctor` "
                "shows what the DVC remote lacks"
            )
        write_json(fresh / "complete.json", found)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)


TextRow = tuple[str, str] | tuple[str, str, Mapping[str, Any]]
"""The id, the text and, if they are kept, the other columns of a row."""


def predict(
    workspace: Workspace, texts: Iterator[Sequence[TextRow]], number: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row per text, in order: `id`, `label`, the probability of each class, and `columns` if the text has any.

    `texts` come in batches of (id, text) or (id, text, columns), so that a file of any size can be streamed.
    """
    from al_pipeline.features.vectors import open_vectors
    from al_pipeline.models.loading import vectors_for
    from al_pipeline.records import Item

    published = open_model(workspace, number)
    model, encoder = published.model, published.folder / "encoder"
    vectors = open_vectors(encoder, workspace.layout.features, published.features, published.device)
    if vectors is not None:
        check_encoder(published, vectors.identity)
    for batch in texts:
        items = [Item(row[0], content_hash(row[1]), row[1]) for row in batch]
        if not items:
            continue
        proba = model.predict_proba([item.text for item in items], vectors_for(model, vectors, items))
        for row, found in zip(batch, proba, strict=True):
            best = int(found.argmax())
            yield {
                "id": row[0],
                "label": model.classes[best],
                "probability": float(found[best]),
                "probabilities": dict(zip(model.classes, found.tolist(), strict=True)),
                **({"columns": row[2]} if len(row) > 2 else {}),
            }


def _features(record: RoundRecord) -> Features:
    """The feature parameters of a round. Raises BadInput if this engine does not know them."""
    from al_pipeline.params import Features
    from al_pipeline.validation import parse

    try:
        return parse(Features, record.params.features, "features")
    except ValueError:
        raise BadInput(
            f"{round_name(record.round)} uses features that this engine does not have; install the engine that built it"
        ) from None


def typed_texts(texts: Sequence[str]) -> Iterator[list[TextRow]]:
    """Yield the texts of the command line as one batch, numbered from 1. Raises UsageError if one is invalid."""
    for text in texts:
        try:
            text_from(text, _LONGEST)
        except ValueError as error:
            raise UsageError(f"--text {excerpt(text)!r}: {' '.join(error.args).strip()}") from None
    yield [(str(number), text) for number, text in enumerate(texts, start=1)]


def read_texts(
    files: Path | Sequence[Source],
    text_column: str,
    id_column: str | None,
    warn: Callable[[str], None],
    *,
    columns: bool = False,
) -> Iterator[list[TextRow]]:
    """Yield the (id, text) pairs of the user's files in batches; skip unusable rows and report them to `warn`.

    `columns` keeps the other columns. Ids are those that `al ingest` would give, from `id_column` (default: `id`, if
    present); otherwise a row's id is its number in the file, prefixed with the file's name if there are several files.
    """
    sources = [Source(files)] if isinstance(files, Path) else files
    passed = 0
    for source in sources:
        prefix = "" if len(sources) == 1 else f"{shown_text(source.name or source.path.name)}:"
        required = [text_column, *([id_column] if id_column else [])]
        keep = None if columns else [text_column, id_column or "id"]
        for batch in read_table(source, required, keep, on_note=warn):
            texts: list[TextRow] = []
            for row in batch:
                problem = _problem(row, text_column)
                if problem is not None:
                    passed += 1
                    if passed <= _MOST_WARNINGS:
                        warn(f"row {prefix}{row.number} is skipped: {problem}")
                    continue
                assert isinstance(row, Row)
                known = _id(row.values.get(id_column or "id")) or f"{prefix}{row.number}"
                text = row.values[text_column]
                texts.append((known, text, row.values) if columns else (known, text))
            yield texts
    if passed > _MOST_WARNINGS:
        warn(f"{passed:,} rows were skipped, {passed - _MOST_WARNINGS:,} of them not shown here")


_LONGEST = 2**31
_MOST_WARNINGS = 20


def _problem(row: Row | BadRow, text_column: str) -> str | None:
    """Why nothing can be predicted for a row; None if it is usable."""
    if isinstance(row, BadRow):
        return f"{row.reason} {row.detail}".rstrip()
    try:
        text_from(row.values.get(text_column), _LONGEST)
    except ValueError as error:
        return " ".join(error.args).strip()
    return None


def _id(value: Any) -> str:
    """The id of a row as `al ingest` reads it, unchanged if `al ingest` would refuse it; empty if there is none."""
    try:
        return item_id_from(value, "")
    except ValueError:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Output -------------------------------------------------------------------------------------------------------------
SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
_OURS = ("id", "label", "probability")


def output_format(form: str | None, out: Path | None, inputs: Sequence[Source]) -> str:
    """Return csv or jsonl: `form`, else by the suffix of `out`, else jsonl. Raises UsageError if either is unusable."""
    if out is not None and out.is_dir():
        raise UsageError(f"{out} is a folder; name the file to write")
    if out is not None and any(
        out.exists() and source.path.exists() and out.samefile(source.path) for source in inputs
    ):
        raise UsageError(f"{out} is the input file; write to another one")
    suffix = "" if out is None else out.suffix.lower()
    if form is None and suffix in (".parquet", ".xlsx", ".gz", ".tsv"):
        raise UsageError(f"predictions are written as CSV or JSONL, not {suffix}; --format chooses one")
    form = SUFFIXES.get(suffix, "jsonl") if form is None else form
    if form not in ("csv", "jsonl"):
        raise UsageError(f"--format must be csv or jsonl, not {form!r}; without it, --out must end with .csv or .jsonl")
    return form


def predicted_lines(
    workspace: Workspace,
    texts: Iterator[Sequence[TextRow]],
    number: int | None,
    form: str,
    columns: Sequence[str] = (),
    id_column: str | None = None,
) -> Iterator[str]:
    """The rows of `predict` as lines of a file in the format `form`: csv or jsonl; see `csv_lines`."""
    rows = predict(workspace, texts, number)
    if form == "csv":
        return csv_lines(rows, classes_of(workspace, number), columns, id_column)
    return map(json_line, rows)


def csv_lines(
    rows: Iterable[Mapping[str, Any]], classes: Sequence[str], names: Sequence[str], id_column: str | None
) -> Iterator[str]:
    """Yield predictions as CSV: the input's columns `names`, `id`, `label`, `probability`, and one column per class.

    Cells that a spreadsheet could evaluate as a formula are escaped. An input column with the name of one of ours gets
    the prefix `input_`; the id column is not repeated. Nothing is yielded before the first row is predicted.
    """
    rows = iter(rows)
    first = next(rows, None)
    ours = [*_OURS, *(f"probability_{name}" for name in classes)]
    kept = [name for name in names if name != (id_column or "id")]
    taken, header = {*ours}, []
    for name in kept:
        shown = name
        while shown in taken:
            shown = f"input_{shown}"
        taken.add(shown)
        header.append(shown)
    yield _csv_line([*header, *ours])
    for row in rows if first is None else chain([first], rows):
        theirs = row.get("columns", {})
        probabilities = row["probabilities"]
        yield _csv_line(
            [
                *(theirs.get(name) for name in kept),
                *(row[name] for name in _OURS),
                *(probabilities[name] for name in classes),
            ]
        )


def _csv_line(cells: Sequence[Any]) -> str:
    from al_pipeline.data.outputs import csv_cell

    out = io.StringIO()
    shown = [
        csv_cell(cell)
        if isinstance(cell, str)
        else json.dumps(cell, ensure_ascii=False)
        if isinstance(cell, bool | list | dict)
        else cell
        for cell in cells
    ]
    csv.writer(out, lineterminator="\n").writerow(shown)
    return out.getvalue()


def classes_of(workspace: Workspace, number: int | None) -> list[str]:
    """The classes of a round's model (default: the promoted one), in the order of its probabilities."""
    history = read_history(workspace.layout, Git(workspace.layout.root))
    name = history.promoted
    if number is None and name is not None:
        number = int(name.removeprefix("round-"))
    return [] if number is None else list(history.record(number).params.schema_.labels)


def columns_in(sources: Sequence[Source]) -> list[str]:
    """The names of all columns, in order of first appearance: the last row of a JSONL file may add one."""
    names: dict[str, None] = {}
    for source in sources:
        for batch in read_table(source):
            for row in batch:
                if isinstance(row, Row) and not row.values.keys() <= names.keys():
                    names.update(dict.fromkeys(row.values))
                    if len(names) > _MOST_COLUMNS:
                        raise BadInput(f"{source} has more than {_MOST_COLUMNS:,} columns; leave --columns out")
    return list(names)


_MOST_COLUMNS = 2_000
