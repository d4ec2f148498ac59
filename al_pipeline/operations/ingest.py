"""Ingest users' files into the inbox: new items, the test set, existing labels.

Everything is staged in a separate folder; writing `commit.json` there, as the last step, commits the ingest. A kill
before that has no effect; after it, the next ingest or tick finishes the moves. Deduplication by content makes it safe
to repeat the command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from msgspec.structs import replace

from al_pipeline.data.inputs import WANTED, Source, Stamp, open_inputs, stamp_of
from al_pipeline.data.ledger import read_events
from al_pipeline.data.pool import count_items, write_items
from al_pipeline.data.table_rows import BadRow, Block, Progress, Row
from al_pipeline.data.tables import check_readable, read_blocks
from al_pipeline.errors import BadInput, UnusableFile, UsageError
from al_pipeline.integrations.git import Git
from al_pipeline.logs import get_logger
from al_pipeline.operations.close import next_round
from al_pipeline.operations.history import read_history
from al_pipeline.operations.ingestion.draw import draw_from_new
from al_pipeline.operations.ingestion.intake import Columns, Intake
from al_pipeline.operations.ingestion.notes import about_corrections, about_cut_off
from al_pipeline.operations.ingestion.rejects import Rejects
from al_pipeline.operations.ingestion.report import IngestReport
from al_pipeline.operations.ingestion.staging import (
    commit,
    drawn_parts,
    finish_ingest,
    stage_events,
    stage_parts,
    staging_folder,
)
from al_pipeline.operations.needs import LARGE, check_ingest, next_encoding
from al_pipeline.operations.schema import check_schema
from al_pipeline.records import Item
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    import pyarrow as pa

_logger = get_logger(__name__)

_T = TypeVar("_T")

_FEW_ROWS = 16
"""A block with so many rows is taken in row by row."""


def ingest(
    workspace: Workspace,
    files: Sequence[Path | Source],
    *,
    text_column: str = "text",
    id_column: str | None = None,
    label_column: str | None = None,
    test: bool = False,
    test_size: int | None = None,
    corrections: bool = False,
    format: str | None = None,
    encoding: str | None = None,
    progress: Progress | None = None,
) -> IngestReport:
    """Add the rows of CSV, JSONL, Parquet or XLSX files to the pool (with `test`: to the test set), all or none.

    A folder stands for its files, `-` for standard input. Set `format` and `encoding` if they cannot be detected.

    `id_column` defaults to `id` if there is such a column. Rows without an id get one derived from their content. The
    first ingest draws the test set at random from its items, unless there is one already: `test_size` items (default:
    `ingest.test_size`), at most a fifth. Labels become `import` events; a label that differs from the one imported
    before replaces it.

    `corrections`: a different text for a known id replaces the old one. It becomes a separate item, `ID~2` for the id
    `ID`, in the same part (pool or test set); the old item is not asked again and its labels do not count, since they
    were given to another text. An earlier text of an id can be restored in the same way. Call only while holding the
    workspace's lock.

    Raises UnusableFile if a whole file cannot be used or changes while it is read, NoRoom if a disk has no room for the
    items; rows that cannot be used are set aside with the reason.
    """
    columns = Columns(text_column, id_column, label_column)
    _check_request(files, columns, test=test, corrections=corrections)
    with open_inputs(files, format, encoding) as inputs:
        stamps = [_stamp(source) for source in inputs.sources]
        sizes = [_usable(partial(check_readable, source)) for source in inputs.sources]
        _usable(partial(check_ingest, workspace.layout, inputs.sources, sizes))
        layout = workspace.layout
        if label_column is not None and (layout.root / ".git").exists():
            check_schema(workspace, read_history(layout, Git(layout.root)))  # imported labels must be among its classes
        finish_ingest(layout)
        taken = Intake(workspace, columns, "test" if test else "pool", corrections)
        size = _test_size(taken, test_size)
        return _take_in(taken, _Files(inputs.sources, stamps, sizes, inputs.notes, progress), size)


def before_first_model(workspace: Workspace) -> str | None:
    """Describe what people will label before there is a model; None once a round is planned."""
    layout, params = workspace.layout, workspace.params
    if next_round(layout) is not None:
        return None
    labels = [e.label for e in read_events(layout.inbox_events) if e.part == "pool" and e.label is not None]
    if len(set(labels)) > 1 and len(labels) >= params.round.min_labels:
        return f"The next `al round` trains a model on {len(labels):,} labels, before anybody answers."
    pool, test = count_items([layout.inbox_pool]), count_items([layout.inbox_test])
    labelled = sum(e.part == "test" and e.label is not None for e in read_events(layout.inbox_events))
    seed, first = min(params.round.seed_size, pool), min(params.round.test_tasks, max(test - labelled, 0))
    return (
        f"People label {seed + first:,} items before the first model: {seed:,} to learn from (round.seed_size) and "
        f"{first:,} of the test set (round.test_tasks), which grows by as many each round. If you have labels already "
        "(--label-column), a model is trained at once."
    )


@dataclass(frozen=True)
class _Files:
    """The files of one ingest."""

    sources: Sequence[Source]
    stamps: Sequence[Stamp | None]
    """The `stat` values of each file before it was read."""
    sizes: Sequence[int]
    notes: list[str]
    """Messages for the user about the files; reading adds more."""
    progress: Progress | None


def _check_request(files: Sequence[Path | Source], columns: Columns, *, test: bool, corrections: bool) -> None:
    """Raise BadInput or UsageError if the files, columns or options make no sense together."""
    if not files:
        raise BadInput(f"name at least one file ({WANTED})")
    if len(set(columns.required)) < len(columns.required):
        raise BadInput("text, id and label must be three different columns")
    if corrections and test:
        raise UsageError(
            "a correction goes where the replaced text is, into the pool or the test set: leave out either --test or "
            "--corrections"
        )


def _test_size(taken: Intake, wanted: int | None) -> int:
    """The size of the test set to draw. Raises BadInput if a size is given but none is to be drawn."""
    if wanted is None:
        return taken.workspace.params.ingest.test_size
    if taken.part == "test" or taken.had_test:
        raise BadInput(
            "there is a test set already: `al ingest --redraw-test --test-size N` draws another one until the first "
            "`al round`, and `al ingest --test FILE` adds to it"
        )
    return wanted


def _take_in(taken: Intake, files: _Files, test_size: int) -> IngestReport:
    """Read the files, stage what is new, and commit the ingest."""
    layout, to_pool = taken.workspace.layout, taken.part == "pool"
    with staging_folder(layout) as staging:
        staged = staging / "staged" / "new.parquet"
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as lines:
            rejects = Rejects(lines)
            draws = to_pool and not taken.had_test and test_size > 0
            new = write_items(staged, _new_items(taken, files, rejects), draft=draws)
            _refuse_changed(files)
            files.notes.extend(about_cut_off(taken))
            corrections = about_corrections(taken)
            rejects_file = rejects.keep(staging, layout.rejects, files.sources[0])
        drawn, said = draw_from_new(taken, test_size, taken.workspace.params.seed) if to_pool else (0, [])
        added = new - taken.new_corrections
        if new and to_pool:
            said += _about_earlier_draw(taken)
        stage_parts(taken, staging, staged, draft=draws)
        labels = stage_events(taken, staging)
        if added or labels or taken.corrected:
            commit(layout, staging, drawn=drawn > 0)
    if new:
        files.notes.extend(_about_encoding(taken.workspace))
    report = IngestReport(
        rows=taken.rows,
        added=added - drawn if to_pool else 0,
        test_added=drawn if to_pool else added,
        drawn=drawn > 0,
        duplicates=taken.duplicates,
        rejected=taken.rejected,
        labels=labels,
        labels_rejected=taken.labels_rejected,
        rejects_file=rejects_file,
        corrected=len(taken.corrected),
        notes=(*files.notes, *corrections, *said),
        about_corrections=tuple(corrections),
        about_test=tuple(said),
    )
    for line in report.lines():
        _logger.info("%s", line)
    if refused := sum(report.rejected.values()):
        _logger.warning("%d rows were left out: %s", refused, report.rejects_file)
    return report


def _new_items(taken: Intake, files: _Files, rejects: Rejects) -> Iterator[list[Item] | pa.RecordBatch]:
    """Yield the new items of the files in batches; rejected rows go to `rejects`."""
    total, before = sum(files.sizes), 0
    for source, size in zip(files.sources, files.sizes, strict=True):
        taken.open_file(source.name or source.path.name)

        def report(done: int, _: int, before: int = before) -> None:
            if files.progress is not None:
                files.progress(before + done, total)

        pieces = read_blocks(source, taken.columns.required, progress=report, on_note=files.notes.append)
        while (piece := _usable(partial(next, pieces, None))) is not None:
            yield from _items_of(taken, source, piece, rejects)
        before += size
    if note := rejects.note():
        files.notes.append(note)


def _items_of(
    taken: Intake, source: Source, piece: Row | BadRow | Block, rejects: Rejects
) -> Iterator[list[Item] | pa.RecordBatch]:
    """Yield the new items of a row or a block; a block with a row that needs a closer look is halved."""
    if isinstance(piece, Block) and len(piece) > _FEW_ROWS:
        if (found := taken.take_block(piece)) is None:
            half = len(piece) // 2
            yield from _items_of(taken, source, piece.part(0, half), rejects)
            yield from _items_of(taken, source, piece.part(half, len(piece)), rejects)
            return
        new, refused_labels = found
        for labelled, refused in refused_labels:
            rejects.add(source, labelled, refused, taken.columns.text)
        yield new
        return
    items = []
    rows: Iterable[Row | BadRow] = piece.rows() if isinstance(piece, Block) else (piece,)
    for row in rows:
        item, why = taken.take(row)
        if item is not None:
            items.append(item)
        if why is not None:
            rejects.add(source, row, why, taken.columns.text)
    yield items


def _about_encoding(workspace: Workspace) -> list[str]:
    """A note if the next build has much to encode; else empty."""
    if not workspace.params.features.uses_encoder:
        return []
    found = next_encoding(workspace.layout, workspace.params.features)
    return [f"{found.sentence()}, in the next `al round` that builds"] if found.bytes > LARGE else []


def _about_earlier_draw(taken: Intake) -> list[str]:
    """A note if the test set was drawn before all files were ingested; else empty."""
    layout = taken.workspace.layout
    if not taken.had_test or next_round(layout) is not None or drawn_parts(layout) is None:
        return []
    return [
        "the test set was drawn from earlier files alone and represents only texts like theirs; until the first `al "
        "round`, `al ingest --redraw-test` draws it again from all files"
    ]


def _usable(read: Callable[[], _T]) -> _T:
    """Call `read`, turning BadInput into UnusableFile: the error concerns a user's file, not the workspace's data."""
    try:
        return read()
    except BadInput as error:
        raise UnusableFile(str(error)) from None


def _stamp(source: Source) -> Stamp | None:
    """The stamp that the file must still have after it is read; None if there is no file, which is reported later."""
    if source.stamp is not None:
        return source.stamp
    try:
        return stamp_of(source.path)
    except (OSError, ValueError):
        return None


def _refuse_changed(files: _Files) -> None:
    """Raise UnusableFile if a file changed while it was read: the rows may be truncated."""
    for source, stamp in zip(files.sources, files.stamps, strict=True):
        if stamp is None or _stamp(replace(source, stamp=None)) != stamp:
            raise UnusableFile(
                f"{source} changed while it was read; nothing was added. Run this again once the file is complete"
            )
