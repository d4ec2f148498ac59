"""A user's labelled table as a corpus: texts with one label each, ordered by id."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from al_pipeline.data.catalog import draw_test, item_id_from, label_from, text_from
from al_pipeline.data.inputs import Source, open_inputs
from al_pipeline.data.table_rows import BadRow, Progress, Row
from al_pipeline.data.tables import read_table
from al_pipeline.errors import BadInput
from al_pipeline.files import sha256_bytes
from al_pipeline.params import is_class_name
from al_pipeline.records import Item, content_hash

LEAST = 50
"""Minimum number of texts."""
MAX_CLASSES = 200
MAX_CHARACTERS = 200_000
"""Maximum length of a text without a `params.yaml`."""


@dataclass(frozen=True)
class LabeledTexts:
    """A corpus: items ordered by id, the class index of each (n,), and the names of the classes."""

    items: tuple[Item, ...]
    truth: NDArray[np.intp]
    classes: tuple[str, ...]
    left_out: Mapping[str, int]
    """Number of rows left out, by reason."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of texts of each class."""
        sizes = np.bincount(self.truth, minlength=len(self.classes))
        return {name: int(size) for name, size in zip(self.classes, sizes, strict=True)}

    @property
    def digest(self) -> str:
        """A digest of texts and labels that does not depend on their order."""
        rows = (f"{item.content_hash} {self.classes[c]}" for item, c in zip(self.items, self.truth, strict=True))
        return sha256_bytes("\n".join(rows).encode())

    @property
    def positive(self) -> str | None:
        """The positive class of a binary corpus: the rarer one, or the later in a tie; None with more classes."""
        if len(self.classes) != 2:
            return None
        first, second = self.counts.values()
        return self.classes[0] if first < second else self.classes[1]


def read_corpus(
    path: Path,
    text_column: str = "text",
    label_column: str = "label",
    limit: int | None = None,
    seed: int = 0,
    schema: Sequence[str] = (),
    progress: Progress | None = None,
    *,
    max_characters: int = MAX_CHARACTERS,
    format: str | None = None,
    encoding: str | None = None,
    on_note: Callable[[str], None] | None = None,
) -> LabeledTexts:
    """Read texts and labels from a CSV, JSONL, Parquet or XLSX file; from a folder's files, or a pipe (`-`).

    Rows that `al ingest` would reject are left out and counted by reason. A repeated text counts once; a text with
    different labels is left out. Of more than `limit` texts a random sample is kept. `schema`: the order of the
    classes, if it has all of them. Raises BadInput if there are fewer than LEAST texts, a single class, or more than
    MAX_CLASSES.
    """
    with open_inputs([path], format, encoding) as inputs:
        if on_note is not None:
            for note in inputs.notes:
                on_note(note)
        rows = _rows(inputs.sources, (text_column, label_column), progress, on_note)
        found, left_out = _different(_taken(row, text_column, label_column, max_characters) for row in rows)
    if limit is not None and len(found) > limit:
        left_out["beyond the limit: a random sample is used"] = len(found) - limit
        kept = draw_test((bytes.fromhex(known) for known in found), limit, seed)
        found = {known: row for known, row in found.items() if bytes.fromhex(known) in kept}
    names = sorted({label for _, label in found.values()})
    classes = tuple(schema) if set(names) <= set(schema) else tuple(names)
    _check(path, len(found), names, label_column)
    items = sorted((Item(item_id_from(None, known), known, text) for known, (text, _) in found.items()), key=_id)
    truth = np.array([classes.index(found[item.content_hash][1]) for item in items], dtype=np.intp)
    return LabeledTexts(tuple(items), truth, classes, {reason: count for reason, count in left_out.items() if count})


def _id(item: Item) -> str:
    return item.item_id


def _rows(
    sources: Sequence[Source],
    columns: tuple[str, str],
    progress: Progress | None,
    on_note: Callable[[str], None] | None,
) -> Iterator[Row | BadRow]:
    for source in sources:
        for batch in read_table(source, columns, columns, progress=progress, on_note=on_note):
            yield from batch


def _taken(row: Row | BadRow, text_column: str, label_column: str, max_characters: int) -> tuple[str, str] | str:
    """Text and label of a row, or the reason why it is left out."""
    if isinstance(row, BadRow):
        return row.reason
    try:
        text = text_from(row.values.get(text_column), max_characters)
        label = label_from(row.values.get(label_column))
    except ValueError as error:
        return str(error.args[0])
    if label is None:
        return "no label"
    if not is_class_name(label):
        return "the label is not a valid class name: at most 100 printable characters"
    return text, label


def _different(rows: Iterable[tuple[str, str] | str]) -> tuple[dict[str, tuple[str, str]], Counter[str]]:
    """Text and label of each different text, by its hash, and how many rows are left out, by reason.

    `rows` are what `_taken` returns.
    """
    found: dict[str, tuple[str, str]] = {}
    contradicted: set[str] = set()
    left_out: Counter[str] = Counter()
    for row in rows:
        if isinstance(row, str):
            left_out[row] += 1
            continue
        text, label = row
        known = content_hash(text)
        if known not in found:
            found[known] = (text, label)
        elif found[known][1] == label:
            left_out["a duplicate of an earlier text"] += 1
        else:
            contradicted.add(known)
            left_out["the same text has another label elsewhere"] += 1
    for known in contradicted:
        del found[known]
    left_out["the same text has another label elsewhere"] += len(contradicted)
    return found, left_out


def _check(path: Path, texts: int, names: Sequence[str], label_column: str) -> None:
    if texts < LEAST:
        raise BadInput(f"{path} has {texts} different labelled texts; a simulation needs at least {LEAST}")
    if len(names) < 2:
        raise BadInput(f"{path}: every label in `{label_column}` is {names[0]!r}; a classifier needs two classes")
    if len(names) > MAX_CLASSES:
        raise BadInput(
            f"{path}: `{label_column}` has {len(names):,} different values, but at most {MAX_CLASSES} classes are "
            "supported; set the right column with --label-column"
        )
