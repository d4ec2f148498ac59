"""Export the labels of a published round as CSV, JSONL, Parquet, or a folder for Hugging Face `datasets`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from al_pipeline.annotation.votes import supporters
from al_pipeline.data.ledger import read_events
from al_pipeline.data.pool import fetch
from al_pipeline.errors import BadInput, NothingToDo, RepositoryError, UsageError
from al_pipeline.files import make_folder, remove_leftovers, replacing, temporary_folder, write_jsonl, write_text
from al_pipeline.integrations.git import Git
from al_pipeline.operations.close import refuse_changed
from al_pipeline.operations.facts import open_dvc
from al_pipeline.operations.history import events_known, read_history
from al_pipeline.operations.snapshots import snapshots
from al_pipeline.records import LabeledItem, round_name
from al_pipeline.rounds.manifests import RoundRecord
from al_pipeline.workspace.workspace import Workspace

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
FORMATS = (*SUFFIXES.values(), "datasets")
COLUMNS = ("item_id", "text", "label", "annotators", "agreement", "round")


@dataclass(frozen=True, slots=True)
class Row:
    """An exported labelled item."""

    item_id: str
    text: str
    label: str
    annotators: tuple[str, ...]
    """The people whose current answers are this label, sorted; `import` for an imported label."""
    agreement: float
    round: int
    """The first round whose answers gave it a label; -1 for imported labels."""
    part: str
    confidence: float | None = None
    """Probability that the label is right; None if `labels` in `params.yaml` did not ask for it."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of `export`."""

    out: str
    format: str
    round: str
    rows: int
    waiting: int
    """Interventions on labels that no published round has carried out yet."""


def export(
    workspace: Workspace,
    out: Path,
    form: str | None = None,
    number: int | None = None,
    *,
    test: bool = False,
    force: bool = False,
) -> Exported:
    """Write the labels of a round (default: the latest one not rolled back) to `out`, completely or not at all.

    Raises UsageError or BadInput if `out` cannot be written, NothingToDo if there is nothing to export,
    RemoteIncomplete if the labels cannot be fetched, RepositoryError if the ledger, pool or test set lacks data of the
    round, UnexpectedChange if they differ from git's records.
    """
    form = _format(out, form)
    _check_target(out, form, force)
    history = read_history(workspace.layout, Git(workspace.layout.root))
    if number is not None:
        record = history.record(number)
    else:
        standing = [record for record in history.rounds if record.round not in history.abandoned]
        if not standing:
            raise NothingToDo("no round is published yet; `al round` publishes one once its answers are in")
        record = standing[-1]
    name = round_name(record.round)
    rows = [row for row in _rows(workspace, record) if test or row.part == "pool"]
    if not rows:
        raise NothingToDo(f"{name} has no labels to export{'' if test else '; --test includes those of the test set'}")
    write_rows(out, form, rows, test)
    waiting = len(history.waiting) if number is None else 0
    return Exported(str(out), form, name, len(rows), waiting)


def _format(out: Path, form: str | None) -> str:
    found = form or SUFFIXES.get(out.suffix.lower())
    if found not in FORMATS:
        raise UsageError(
            f"--format must be one of {', '.join(FORMATS)}; without it, --out must end with {', '.join(SUFFIXES)}"
        )
    return found


def may_replace(out: Path, force: bool) -> bool:
    """Whether there is something at `out` that an export has to replace.

    Raises BadInput if its folder does not exist, or if there is something and `force` does not allow to replace it.
    """
    if not out.parent.is_dir():
        raise BadInput(f"the folder {out.parent} for {out.name} does not exist; create it first")
    taken = out.exists() or out.is_symlink()
    if taken and not force:
        raise BadInput(f"{out} already exists; give another --out, or --force to replace it")
    return taken


def _check_target(out: Path, form: str, force: bool) -> None:
    if not may_replace(out, force):
        return
    if (form == "datasets") != (out.is_dir() and not out.is_symlink()):
        raise BadInput(f"{out} is {'a folder' if out.is_dir() else 'not a folder'}; --force does not replace it")
    if form == "datasets":
        for path in out.rglob("*"):
            inside = path.relative_to(out).as_posix()
            ours = inside in ("README.md", "data") or (path.parent == out / "data" and path.suffix == ".parquet")
            if not ours:
                raise BadInput(f"{out} contains {inside}, which no export wrote; --force does not delete it")


def _rows(workspace: Workspace, record: RoundRecord) -> list[Row]:
    layout, name = workspace.layout, round_name(record.round)
    with snapshots(workspace) as labels:
        items = {key: row for key, row in labels(record).items() if isinstance(row, LabeledItem)}
    with replace(open_dvc(layout), state=None) as dvc:
        refuse_changed(layout, dvc)
    events = read_events(layout.events)
    known = events_known(record, events)
    if known > len(events):
        raise RepositoryError(f"the ledger has {len(events)} events, but {name} had {known}; `dvc pull` restores them")
    people = supporters(events[:known], {key: row.label for key, row in items.items()})
    pool, test = fetch([layout.pool], items), fetch([layout.test], items)
    rows = []
    for key in sorted(items):
        item = pool.get(key) or test.get(key)
        if item is None:
            raise RepositoryError(f"item {key} of {name} is in neither pool nor test set; `dvc pull` restores them")
        part, row = "pool" if key in pool else "test", items[key]
        rows.append(Row(key, item.text, row.label, people[key], row.agreement, row.round, part, row.confidence))
    return rows


def write_rows(out: Path, form: str, rows: Sequence[Row], with_part: bool) -> None:
    """Write `rows` to `out` in the format `form`, one of FORMATS, completely or not at all."""
    sure = ("confidence",) if any(row.confidence is not None for row in rows) else ()
    names = (*COLUMNS, *sure, "part") if with_part else (*COLUMNS, *sure)
    if form == "csv":
        _write_csv(out, rows, names)
    elif form == "jsonl":
        write_jsonl(out, ({key: asdict(row)[key] for key in names} for row in rows))
    elif form == "parquet":
        _write_parquet(out, rows, names)
    else:
        _write_folder(out, rows, names)


def _write_csv(out: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    from al_pipeline.data.outputs import csv_cell

    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            values: dict[str, Any] = {**asdict(row), "annotators": ";".join(row.annotators)}
            writer.writerow([csv_cell(v) if isinstance(v, str) else v for v in (values[key] for key in names)])


def _write_parquet(out: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "annotators": pa.list_(pa.string()),
        "agreement": pa.float64(),
        "confidence": pa.float64(),
        "round": pa.int64(),
    }
    schema = pa.schema([(key, kinds.get(key, pa.string())) for key in names])
    table = pa.Table.from_pylist([{key: asdict(row)[key] for key in names} for row in rows], schema=schema)
    with replacing(out) as temporary:
        pq.write_table(table, temporary, compression="zstd", store_schema=False)


def _write_folder(out: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write a temporary folder beside `out`, rename it to `out`, then delete the folder that it replaced."""
    splits = {"train": [r for r in rows if r.part == "pool"], "test": [r for r in rows if r.part == "test"]}
    header = ["---", "configs:", "- config_name: default", "  data_files:"]
    remove_leftovers(out.parent)
    with temporary_folder(out.parent) as place:
        fresh = make_folder(place / "new")
        for split, some in splits.items():
            if some:
                _write_parquet(fresh / "data" / f"{split}-00000-of-00001.parquet", some, names)
                header += [f"  - split: {split}", f"    path: data/{split}-*"]
        text = "Labels exported by `al export`. Columns: " + ", ".join(f"`{key}`" for key in names)
        write_text(fresh / "README.md", "\n".join([*header, "---", "", f"{text}.", ""]))
        old = place / "old"
        if out.is_dir():
            out.replace(old)
        try:
            fresh.replace(out)
        except OSError:
            if old.is_dir():
                old.replace(out)  # else the clean-up of the temporary folder would delete the previous export
            raise
