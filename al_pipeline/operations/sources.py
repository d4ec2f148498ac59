"""Ingest what is new in the files that `params.yaml` names (`ingest.sources`), at every tick.

Reading a file while it is being written would store truncated texts for good, since a known id keeps its text. So a
file is read only once it has been unchanged for a minute, by its timestamps or, if they are in the future, by what
earlier ticks saw of it. `.al/ingested.json` records what was seen and ingested; losing it costs only a second reading,
since known content is not added twice.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from al_pipeline.data.inputs import Source, check_encoding, digest_of, stamp_of
from al_pipeline.data.pool import count_items
from al_pipeline.errors import BadInput, NoRoom, NothingToDo, UnusableFile, UsageError
from al_pipeline.operations.ingestion.patterns import find_sources, shown_name
from al_pipeline.operations.ingestion.source_states import QUIET_SECONDS, SourceNews, SourceStates
from al_pipeline.operations.ingestion.staging import finish_ingest
from al_pipeline.params import Ingest, Params
from al_pipeline.sanitize import counted
from al_pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:  # not needed by a tick whose files are unchanged
    from al_pipeline.operations.ingestion.report import IngestReport

MAX_LINES = 20
"""Maximum number of lines about sources in one tick: there may be thousands of files."""


def ingest_sources(workspace: Workspace, now: float | None = None) -> tuple[int, list[str]]:
    """Finish an ingest that was killed, then ingest every source file that is new or changed, and quiet.

    Returns the number of new items, and messages for the user: what was refused, and what waits. An unusable file does
    not stop the others, and is tried again. `now`: seconds since 1970. Call it while holding the workspace's lock.
    """
    layout, params = workspace.layout, workspace.params
    finish_ingest(layout)
    states = SourceStates(layout)
    now = time.time() if now is None else now
    try:
        _check_settings(params)
    except UsageError as error:
        states.fail(_SETTINGS, f"stops all sources: {error}", now)
        states.store()
        return 0, _bounded([], states.news(now))
    found = find_sources(layout, params.ingest.sources)
    names = {shown_name(layout.root, path): path for path in found.files}
    states.keep_only({*names, *found.problems})
    for name, problem in found.problems.items():
        states.fail(name, problem, now)
    settings, added = _settings(params), 0
    lines: list[str] = []
    about_test: tuple[str, ...] = ()
    for name in states.in_order(names):
        report = _take(workspace, states, name, names[name], settings, now)
        if report is not None:
            added += report.added + report.test_added
            lines += _describe(name, report, params.ingest)
            about_test = report.about_test
    if states.drawn_from > 1 and params.ingest.test_size:
        from al_pipeline.operations.ingestion.draw import redraw_test

        about_test = ()
        with suppress(NothingToDo):  # the first round has begun
            redraw_test(workspace, again=False)
    states.drawn_from = 0
    states.store()
    return added, _bounded([*lines, *about_test], states.news(now))


_SETTINGS = "params.yaml"


def _check_settings(params: Params) -> None:
    """Raise UsageError if no file can be read with these settings, whatever its content."""
    settings = params.ingest
    check_encoding(settings.encoding or None)
    if settings.sources and settings.label_column == settings.text_column:
        raise BadInput(f"ingest.text_column and ingest.label_column are both {settings.text_column!r}")


def _settings(params: Params) -> list[Any]:
    """The settings that affect what is read from a file: if they change, it is read again."""
    found = params.ingest
    labels = list(params.schema_.labels) if found.label_column else []
    return [found.text_column, found.label_column, found.encoding, found.max_characters, labels]


def _take(
    workspace: Workspace, states: SourceStates, name: str, path: Path, settings: list[Any], now: float
) -> IngestReport | None:
    """Ingest a file if it is new or changed, and quiet; return None if nothing was read."""
    from al_pipeline.operations.ingest import ingest

    params, layout = workspace.params.ingest, workspace.layout
    try:
        stamp = stamp_of(path)
        if states.is_taken(name, stamp, settings):
            return None
        if states.see(name, stamp, now) < QUIET_SECONDS:
            return None
        source = Source(path, name=name, encoding=check_encoding(params.encoding or None), stamp=stamp)
        digest = _digest(source)
        if states.holds(name, digest, settings):
            states.took(name, digest, settings)
            return None
        if states.drawn_from or not count_items([layout.test, layout.inbox_test]):
            states.drawn_from += 1  # the test set is drawn from all of the first files, even after a kill
            states.store()
        report = ingest(workspace, [source], text_column=params.text_column, label_column=params.label_column or None)
    except (UnusableFile, NoRoom, OSError) as error:
        if states.changed(name, path):
            states.wait(name, stamp_of(path), now)
        else:
            states.fail(name, f"was not ingested: {error}", now)
        return None
    states.took(name, digest, settings)
    states.store()
    return report


def _digest(source: Source) -> str:
    try:
        return digest_of(source)
    except BadInput as error:
        raise UnusableFile(str(error)) from None


def _command(params: Ingest, name: str) -> str:
    """The command that accepts the corrections of a source, to be run in the workspace's folder."""
    words = ["al", "ingest", name if not name.startswith("-") else f"./{name}", "--corrections"]
    words += ["--text-column", params.text_column] if params.text_column != "text" else []
    words += ["--label-column", params.label_column] if params.label_column else []
    words += ["--encoding", params.encoding] if params.encoding else []
    return shlex.join(words)


def _describe(name: str, report: IngestReport, params: Ingest) -> Iterator[str]:
    from al_pipeline.operations.ingestion.intake import ANOTHER_TEXT

    for note in report.notes:
        if note not in (*report.about_test, *report.about_corrections):
            yield note if note.startswith(name) else f"{name}: {note}"
    rejected = sum(report.rejected.values())
    if other := report.rejected.get(ANOTHER_TEXT, 0):
        yield (
            f"{name}: {counted(other, 'item')} {'has' if other == 1 else 'have'} a different text than before under "
            f"the same id. The pool keeps the first one; `{_command(params, name)}` replaces it by the new one. All "
            f"of them: {report.rejects_file}"
        )
    if rejected > other:
        yield f"{name}: {counted(rejected - other, 'row')} rejected; each with its reason: {report.rejects_file}"
    if labels := sum(report.labels_rejected.values()):
        yield f"{name}: {counted(labels, 'label')} not used; each with its reason: {report.rejects_file}"


def _bounded(lines: Sequence[str], news: Iterable[SourceNews]) -> list[str]:
    lines = [*lines, *(f"{one.file} {one.message}" for one in news)]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES:,} lines like these; `al doctor` shows them"]
    return [f"ingest.sources: {line}" for line in lines]
