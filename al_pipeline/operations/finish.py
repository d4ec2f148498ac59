"""The whole pool as a labelled file: people's labels, and the model's where its error rate has a proven bound.

The model's labels never enter the ledger: nothing is trained on them, no figure uses them, and deleting the file undoes
them. Items for which no bound could be shown are left without a label, for people.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from msgspec import Struct

from al_pipeline.data.pool import iter_batches
from al_pipeline.errors import NothingToDo, UsageError
from al_pipeline.files import json_line, replacing
from al_pipeline.integrations.git import Git
from al_pipeline.operations.certify import labelled_predictions
from al_pipeline.operations.export import SUFFIXES, may_replace
from al_pipeline.operations.history import read_history
from al_pipeline.operations.predict import predict, published_record
from al_pipeline.operations.snapshots import snapshots
from al_pipeline.records import LabeledItem, round_name
from al_pipeline.stopping.rest import Rule, accepted, rules
from al_pipeline.workspace.workspace import Workspace

COLUMNS = ("item_id", "text", "label", "source", "confidence", "error_bound", "round")
_ROWS = 1000


class Finished(Struct, frozen=True, kw_only=True):
    """What `finish` wrote, or would write."""

    round: str
    bound: float
    confidence: float
    rules: tuple[Rule, ...]
    people: int
    """Items with a label of people, or brought along."""
    model: int
    """Items with a label of the model."""
    left: int
    """Items without a label."""
    by_class: Mapping[str, int]
    """The model's labels by class."""
    out: str | None
    """None if nothing was written."""


def finish(
    workspace: Workspace,
    out: Path | None,
    form: str | None = None,
    *,
    bound: float = 0.05,
    confidence: float = 0.95,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Finished:
    """Label the rest of the pool by the promoted model where its error rate is at most `bound`, and write all of it.

    `out` None: only say what would be written. `progress` gets the numbers of items that are done and of all. Raises
    UsageError for shares that are none or an `out` that cannot be written, NothingToDo if the bound cannot be shown
    for any class, with what is lacking, or if no model is promoted.
    """
    git = Git(workspace.layout.root)
    history = read_history(workspace.layout, git)
    record = published_record(history, None)
    form = None if out is None else _checked(out, form, force)
    place = 1 + [one.round for one in history.rounds].index(record.round)
    known = labelled_predictions(git, record)
    try:
        found = rules(known.predicted, known.confidence, known.is_right, known.classes, bound, confidence, place)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if all(rule.threshold is None for rule in found):
        raise NothingToDo(f"an error rate of at most {bound:.1%} cannot be shown yet: {lacking_sentence(found)}")
    newest = [one for one in history.rounds if one.round not in history.abandoned][-1]
    with snapshots(workspace) as labels:
        by_people = {key: row for key, row in labels(newest).items() if isinstance(row, LabeledItem)}
    counts: Counter[str] = Counter()
    rows = _rows(workspace, by_people, found, record.round, bound, counts, newest.counts.pool, progress)
    if out is None or form is None:
        for _ in rows:
            pass
    else:
        _write(out, form, rows)
    return Finished(
        round=round_name(record.round),
        bound=bound,
        confidence=confidence,
        rules=found,
        people=counts["people"],
        model=counts["model"],
        left=counts[""],
        by_class={rule.label: counts[f"model:{rule.label}"] for rule in found},
        out=None if out is None else str(out),
    )


def lacking_sentence(found: Sequence[Rule]) -> str:
    """What each class without a threshold lacks."""
    return "; ".join(_lacking(rule) for rule in found if rule.threshold is None)


def _lacking(rule: Rule) -> str:
    right = f"{rule.label}: {rule.tested - rule.wrong:,} of {rule.tested:,} random items predicted as it are right"
    if not rule.tested:
        return f"{rule.label}: no random item is predicted as it"
    if rule.lacking is None:
        return f"{right}, too few at any confidence"
    return f"{right}; about {rule.lacking:,} further random labels are lacking"


def _checked(out: Path, form: str | None, force: bool) -> str:
    found = form or SUFFIXES.get(out.suffix.lower())
    if found is None or found not in SUFFIXES.values():
        raise UsageError(
            f"--format must be one of {', '.join(SUFFIXES.values())}; without it, --out must end with "
            f"{', '.join(SUFFIXES)}"
        )
    if may_replace(out, force) and (out.is_dir() or out.is_symlink()):
        raise UsageError(f"{out} is not a file; --force does not replace it")
    return found


def _rows(
    workspace: Workspace,
    by_people: Mapping[str, LabeledItem],
    found: Sequence[Rule],
    number: int,
    bound: float,
    counts: Counter[str],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[dict[str, Any]]:
    """All items of the pool in its order; `counts` gets their numbers by source."""
    by_class, done = {rule.label: rule for rule in found}, 0
    rest = ([row for row in batch if row[0] not in by_people] for batch in _texts(workspace.layout.pool))
    predictions = predict(workspace, rest, number)
    for batch in _texts(workspace.layout.pool):
        for item, text in batch:
            label, source, sure, error, made = "", "", None, None, None
            if item in by_people:
                label, source, made = by_people[item].label, "people", by_people[item].round
            else:
                guess = next(predictions)
                sure = guess["probability"]
                if accepted(guess["label"], sure, by_class):
                    label, source, error, made = guess["label"], "model", bound, number
                    counts[f"model:{label}"] += 1
            counts[source] += 1
            yield dict(zip(COLUMNS, (item, text, label, source, sure, error, made), strict=True))
        done += len(batch)
        if progress is not None:
            progress(done, total)


def _texts(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """Id and text of all items, in batches."""
    for batch in iter_batches([folder], ("item_id", "text"), _ROWS):
        yield list(zip(batch.column("item_id").to_pylist(), batch.column("text").to_pylist(), strict=True))


def _write(out: Path, form: str, rows: Iterator[dict[str, Any]]) -> None:
    """Write the rows as they come, completely or not at all."""
    with replacing(out) as temporary:
        if form == "parquet":
            _write_parquet(temporary, rows)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if form == "jsonl":
                file.writelines(map(json_line, rows))
                return
            from al_pipeline.data.outputs import csv_cell

            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for row in rows:
                writer.writerow([csv_cell(cell) if isinstance(cell, str) else cell for cell in row.values()])


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"confidence": pa.float64(), "error_bound": pa.float64(), "round": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    with pq.ParquetWriter(path, schema, compression="zstd", store_schema=False) as writer:
        while some := list(islice(rows, 50 * _ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
