"""Predict with a published model: the promoted one, or any round's."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from al_pipeline.errors import BadInput, NothingToDo, RepositoryError
from al_pipeline.files import TEMPORARY_PREFIX, make_folder, read_json, sha256_tree, write_json
from al_pipeline.home import private_folder
from al_pipeline.operations.history import Record, read_history
from al_pipeline.operations.tick import open_dvc
from al_pipeline.records import content_hash, round_name
from al_pipeline.repository import Git
from al_pipeline.tables import BadRow, Row, read_table
from al_pipeline.workspace import Workspace

if TYPE_CHECKING:
    from al_pipeline.params import Features


def model_folder(workspace: Workspace, number: int | None = None) -> tuple[int, Path]:
    """The round (default: the promoted one) and a folder with its model, fetched once and checked by digest.

    Raises NothingToDo where no round is published, RepositoryError where its model cannot be had.
    """
    layout = workspace.layout
    history = read_history(layout, Git(layout.root))
    if number is None:
        if history.promoted is None:
            raise NothingToDo("no model is promoted yet; `al rounds` shows why, `--round N` takes a round's own model")
        number = int(history.promoted.removeprefix("round-"))
    record = history.record(number)
    folder = layout.private / "published" / round_name(number)
    wanted = record["hashes"]["model"]
    if read_json(folder / "complete.json") != wanted or sha256_tree(folder / "model") != wanted:
        _fetch(workspace, round_name(number), wanted, folder)
    return number, folder


def _fetch(workspace: Workspace, name: str, wanted: str, folder: Path) -> None:
    """Bring the model of a round into `folder`, whole or not at all: into a new one beside it, then in its place."""
    private_folder(workspace.layout.private)
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder.parent) as place:
        fresh = Path(place) / name
        fresh.mkdir()
        with replace(open_dvc(workspace.layout), state=None) as dvc:
            dvc.get("models/candidate", name, fresh / "model")
            dvc.get("models/encoder", name, fresh / "encoder")
        found = sha256_tree(fresh / "model")
        if found != wanted:
            raise RepositoryError(
                f"the model of {name} has digest {found[:12]}, its record says {wanted[:12]}; "
                "`al doctor` says what the DVC remote lacks"
            )
        write_json(fresh / "complete.json", found)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)


def predict(
    workspace: Workspace, texts: Iterator[list[tuple[str, str]]], number: int | None = None
) -> Iterator[dict[str, Any]]:
    """One row a text, in their order: `id`, `label`, and the probability of each class.

    `texts` come in batches of (id, text), so that a file of any size can be streamed.
    """
    from al_pipeline.classifiers import load_model
    from al_pipeline.encoding import Vectors, vectors_for
    from al_pipeline.records import Item

    number, folder = model_folder(workspace, number)
    git = Git(workspace.layout.root)
    features = _features(read_history(workspace.layout, git).record(number))
    model = load_model(folder / "model", folder / "encoder")
    vectors = Vectors(folder / "encoder", workspace.layout.features, features) if features.uses_encoder else None
    if vectors is not None and model.encoder != vectors.identity:
        raise BadInput(
            f"the encoder of {round_name(number)} is not the one that its model was fitted on (by digest); delete "
            f"{folder}, and `al predict` fetches both again"
        )
    for batch in texts:
        items = [Item(item_id, content_hash(text), text) for item_id, text in batch]
        proba = model.predict_proba([item.text for item in items], vectors_for(model, vectors, items))
        for item, row in zip(items, proba, strict=True):
            best = int(row.argmax())
            yield {
                "id": item.item_id,
                "label": model.classes[best],
                "probability": float(row[best]),
                "probabilities": dict(zip(model.classes, row.tolist(), strict=True)),
            }


def _features(record: Record) -> Features:
    """What the features were when the round was published."""
    from pydantic import ValidationError

    from al_pipeline.params import Features

    try:
        return Features.model_validate(record["params"]["features"])
    except ValidationError:
        raise BadInput(
            f"{round_name(record['round'])} was made with features that this engine does not know; "
            "install the engine that made it"
        ) from None


def read_texts(
    path: Path, text_column: str, id_column: str | None, warn: Callable[[str], None]
) -> Iterator[list[tuple[str, str]]]:
    """The (id, text) pairs of a user's file, in batches; a row that cannot be read is told to `warn` and passed over.

    Without an id column (by default `id`, where there is one) a row's id is its number in the file.
    """
    for batch in read_table(path, [text_column, *([id_column] if id_column else [])], [text_column, id_column or "id"]):
        texts = []
        for row in batch:
            text = row.values.get(text_column) if isinstance(row, Row) else None
            if isinstance(row, BadRow):
                warn(f"row {row.number} is passed over: {row.reason} {row.detail}".rstrip())
            elif not isinstance(text, str) or not text.strip():
                warn(f"row {row.number} is passed over: it has no text")
            else:
                known = row.values.get(id_column or "id")
                texts.append((str(row.number if known in (None, "") else known), text))
        yield texts
