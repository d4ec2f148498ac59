"""The files that stages write: labelled sets, scores, queries, predictions.

Equal rows give equal bytes of Parquet: fixed schema, one row group, no timestamps.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from al_pipeline.data.parquet import float_rows, floats, integers, strings
from al_pipeline.errors import BadInput
from al_pipeline.files import read_jsonl, replacing, write_jsonl, write_text
from al_pipeline.records import LabeledItem, Query, Unresolved

Floats = np.ndarray[Any, np.dtype[np.float64]]

_RecordT = TypeVar("_RecordT", LabeledItem, Unresolved)

_LABELED = pa.schema(
    [
        ("item_id", pa.string()),
        ("content_hash", pa.string()),
        ("label", pa.string()),
        ("agreement", pa.float64()),
        ("answers", pa.int64()),
        ("round", pa.int64()),
    ]
)
_UNRESOLVED = pa.schema(
    [
        ("item_id", pa.string()),
        ("part", pa.string()),
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("asked", pa.int64()),
    ]
)
_MAKE: Mapping[pa.DataType, Callable[[Any], pa.Array]] = {
    pa.string(): strings,
    pa.int64(): integers,
    pa.float64(): floats,
}
_SCORES = pa.schema([("item_id", pa.string()), ("score", pa.float64()), ("proba", pa.list_(pa.float64()))])


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'", "＝", "＋", "－", "＠")
"""First characters of cells that a spreadsheet may evaluate as formulas; `'` too, so that the escape is reversible."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """A model's class probabilities for test items. `proba` has shape (n, C), its columns in the order of `classes`.

    An item without a label has the empty label: a later model is compared on the items that are labelled by then.
    """

    item_ids: tuple[str, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    proba: np.ndarray[Any, np.dtype[np.float64]]

    def only(self, rows: Sequence[int]) -> Predictions:
        """The predictions of the items with these numbers."""
        ids, labels = (tuple(found[row] for row in rows) for found in (self.item_ids, self.labels))
        return Predictions(ids, labels, self.classes, self.proba[np.array(rows, dtype=np.intp)])


def write_labeled(path: Path, rows: Sequence[LabeledItem]) -> None:
    """Write a labelled set; the column `confidence` only if labels have one."""
    confident = any(row.confidence is not None for row in rows)
    _write(path, _LABELED.append(pa.field("confidence", pa.float64())) if confident else _LABELED, rows)


def read_labeled(path: Path) -> list[LabeledItem]:
    """Read the labelled set that `write_labeled` wrote."""
    return _records(path, LabeledItem)


def write_unresolved(path: Path, rows: Sequence[Unresolved]) -> None:
    """Write the items whose annotations give no label."""
    _write(path, _UNRESOLVED, rows)


def read_unresolved(path: Path) -> list[Unresolved]:
    """Read the items that `write_unresolved` wrote."""
    return _records(path, Unresolved)


def write_scores(path: Path, item_ids: Sequence[str], scores: Floats, proba: Floats) -> None:
    """Write the shortlist: the candidates with the highest scores, in descending order; `proba` has shape (n, C)."""
    columns = [strings(item_ids), floats(scores), float_rows(proba)]
    _store(path, pa.Table.from_arrays(columns, schema=_SCORES))


def read_scores(path: Path) -> tuple[list[str], Floats, Floats]:
    """Read the shortlist: ids, scores (n,) and class probabilities (n, C)."""
    table = _read(path)
    ids, rows = table.column("item_id").to_pylist(), table.column("proba").to_pylist()
    scores = np.array(table.column("score").to_pylist(), dtype=np.float64)
    return ids, scores, np.array(rows, dtype=np.float64).reshape(len(ids), len(rows[0]) if rows else 0)


def write_queries(path: Path, queries: Sequence[Query]) -> None:
    """Write a batch in order of rank."""
    write_jsonl(path, (query.to_row() for query in queries))


def read_queries(path: Path) -> list[Query]:
    """Read the batch that `write_queries` wrote."""
    return [msgspec.convert(row, Query) for row in read_jsonl(path)]


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions as CSV: `item_id`, `label`, then a column of probabilities for each class."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["item_id", "label", *map(csv_cell, predictions.classes)])
    proba: Any = predictions.proba.tolist()
    for item_id, label, row in zip(predictions.item_ids, predictions.labels, proba, strict=True):
        writer.writerow([csv_cell(item_id), csv_cell(label), *(f"{value:.9g}" for value in row)])
    write_text(path, out.getvalue())


def parse_predictions(text: str, unlabelled: bool = False) -> Predictions:
    """Parse the CSV of `write_predictions`: the predictions for labelled items, or (`unlabelled`) for all items.

    Raises BadInput for any other file.
    """
    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise BadInput(f"predictions.csv is not CSV: {error}") from None
    if not rows or rows[0][:2] != ["item_id", "label"]:
        raise BadInput("predictions.csv does not begin with the columns item_id, label")
    classes = tuple(map(from_csv_cell, rows[0][2:]))
    if any(len(row) != len(rows[0]) for row in rows):
        raise BadInput("predictions.csv has a row whose number of fields differs from the header")
    try:
        proba = np.array([[float(value) for value in row[2:]] for row in rows[1:]], dtype=np.float64)
        proba = proba.reshape(len(rows) - 1, len(classes))
    except ValueError:
        raise BadInput("predictions.csv contains a probability that is not a number") from None
    if not np.isfinite(proba).all():
        raise BadInput("predictions.csv contains a probability that is not a number")
    names, labels = ([from_csv_cell(row[column]) for row in rows[1:]] for column in (0, 1))
    if unknown := set(labels) - {*classes, ""}:
        raise BadInput(f"predictions.csv has the label {min(unknown)!r}, but no column for it")
    kept = [row for row, label in enumerate(labels) if label or unlabelled]
    return Predictions(tuple(names[row] for row in kept), tuple(labels[row] for row in kept), classes, proba[kept])


def csv_cell(text: str) -> str:
    """A text as a CSV cell: one that a spreadsheet could evaluate as a formula is escaped by a leading `'`."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def from_csv_cell(cell: str) -> str:
    """The text from which `csv_cell` made this cell."""
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_FORMULA) else cell


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping flattened to one level, its keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _write(path: Path, schema: pa.Schema, rows: Sequence[LabeledItem] | Sequence[Unresolved]) -> None:
    columns = [_MAKE[field.type](list(map(attrgetter(field.name), rows))) for field in schema]
    _store(path, pa.Table.from_arrays(columns, schema=schema))


def _records(path: Path, kind: type[_RecordT]) -> list[_RecordT]:
    table = _read(path)
    names = kind.__struct_fields__[: table.num_columns]
    columns = [table.column(name).to_pylist() for name in names]
    return [kind(*row) for row in zip(*columns, strict=True)]


def _read(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read()


def _store(path: Path, table: pa.Table) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", store_schema=False)
