"""Take in what is new in the files that `params.yaml` names (`ingest.sources`), at every tick.

A file that is read while it is still being written leaves cut texts for ever, since a known id keeps its text. So a
file is read only once it has been quiet for a minute: by its own times, or by what earlier ticks saw of it, where its
times lie in the future. What was seen and taken in is remembered in `.al/ingested.json`; losing that costs a second
reading, since known content is not added twice.
"""

from __future__ import annotations

import os
import shlex
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from al_pipeline.data.inputs import Source, Stamp, check_encoding, digest_of, is_hidden, stamp_of
from al_pipeline.data.pool import count_items
from al_pipeline.errors import BadInput, NothingToDo, UnusableFile, UsageError
from al_pipeline.files import json_line, read_object, write_text
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.ingestion.draw import redraw_test
from al_pipeline.operations.ingestion.intake import ANOTHER_TEXT
from al_pipeline.operations.ingestion.report import IngestReport
from al_pipeline.operations.ingestion.staging import finish_ingest
from al_pipeline.params import Ingest, Params, stays_below
from al_pipeline.sanitize import counted
from al_pipeline.workspace.layout import Layout
from al_pipeline.workspace.workspace import Workspace

QUIET_SECONDS = 60.0
"""How long a file must not have changed before a tick reads it."""
MAX_LINES = 20
"""Lines that one tick says about sources: there may be thousands of files."""


@dataclass(frozen=True, slots=True)
class SourceNews:
    """A file of `ingest.sources` that was not read, as the last tick saw it."""

    file: str
    """Relative to the workspace."""
    state: Literal["failing", "waiting"]
    message: str
    since: datetime

    def sentence(self) -> str:
        """The whole as one line."""
        return f"{self.file} {self.message} (since {self.since:%Y-%m-%d %H:%M} UTC)"


def ingest_sources(workspace: Workspace, now: float | None = None) -> tuple[int, list[str]]:
    """Finish an ingest that was killed, then ingest every source file that is new or changed, and quiet.

    Returns how many items came in, and what a person should know: what was refused, and what waits. A file that cannot
    be used stops no other, and is tried again. `now`: seconds since 1970. Call it while holding the workspace's lock.
    """
    layout, params = workspace.layout, workspace.params
    finish_ingest(layout)
    memory = _Memory(layout)
    now = time.time() if now is None else now
    try:
        _check_settings(params)
    except UsageError as error:
        memory.fail(_SETTINGS, f"stops all sources: {error}", now)
        memory.store()
        return 0, _bounded([], memory.news(now))
    found = find_sources(layout, params.ingest.sources)
    names = {_name(layout.root, path): path for path in found.files}
    memory.keep_only({*names, *found.problems})
    for name, problem in found.problems.items():
        memory.fail(name, problem, now)
    settings, added = _settings(params), 0
    lines: list[str] = []
    about_test: tuple[str, ...] = ()
    for name in memory.in_order(names):
        report = _take(workspace, memory, name, names[name], settings, now)
        if report is not None:
            added += report.added + report.test_added
            lines += _describe(name, report, params.ingest)
            about_test = report.about_test
    if memory.drawn_from > 1 and params.ingest.test_size:
        about_test = ()
        with suppress(NothingToDo):  # the first round has begun
            redraw_test(workspace, again=False)
    memory.drawn_from = 0
    memory.store()
    return added, _bounded([*lines, *about_test], memory.news(now))


def source_news(layout: Layout) -> list[SourceNews]:
    """What the last tick could not read, or not yet. Reads what it remembers alone."""
    return list(_Memory(layout).news(time.time()))


_SETTINGS = "params.yaml"


def _check_settings(params: Params) -> None:
    """Raise UsageError where no file can be read by these settings, whatever it holds."""
    settings = params.ingest
    check_encoding(settings.encoding or None)
    if settings.sources and settings.label_column == settings.text_column:
        raise BadInput(f"ingest.text_column and ingest.label_column are both {settings.text_column!r}")


def _settings(params: Params) -> list[Any]:
    """What decides, beside its content, what is taken from a file: another value has it read again."""
    found = params.ingest
    labels = list(params.schema_.labels) if found.label_column else []
    return [found.text_column, found.label_column, found.encoding, found.max_characters, labels]


def _take(
    workspace: Workspace, memory: _Memory, name: str, path: Path, settings: list[Any], now: float
) -> IngestReport | None:
    """Ingest a file if it is new or changed, and quiet; None where nothing was read."""
    params, layout = workspace.params.ingest, workspace.layout
    try:
        stamp = stamp_of(path)
        if memory.is_taken(name, stamp, settings):
            return None
        if memory.see(name, stamp, now) < QUIET_SECONDS:
            return None
        source = Source(path, name=name, encoding=check_encoding(params.encoding or None), stamp=stamp)
        digest = _digest(source)
        if memory.holds(name, digest, settings):
            memory.took(name, digest, settings)
            return None
        if memory.drawn_from or not count_items([layout.test, layout.inbox_test]):
            memory.drawn_from += 1  # of several first files the test set is drawn from all, also after a kill
            memory.store()
        report = ingest(workspace, [source], text_column=params.text_column, label_column=params.label_column or None)
    except (UnusableFile, OSError) as error:
        if memory.changed(name, path):
            memory.wait(name, stamp_of(path), now)
        else:
            memory.fail(name, f"was not taken in: {error}", now)
        return None
    memory.took(name, digest, settings)
    memory.store()
    return report


def _digest(source: Source) -> str:
    try:
        return digest_of(source)
    except BadInput as error:
        raise UnusableFile(str(error)) from None


def _command(params: Ingest, name: str) -> str:
    """How a person takes the corrections of a source; in the workspace's folder."""
    words = ["al", "ingest", name if not name.startswith("-") else f"./{name}", "--corrections"]
    words += ["--text-column", params.text_column] if params.text_column != "text" else []
    words += ["--label-column", params.label_column] if params.label_column else []
    words += ["--encoding", params.encoding] if params.encoding else []
    return shlex.join(words)


def _describe(name: str, report: IngestReport, params: Ingest) -> Iterator[str]:
    for note in report.notes:
        if note not in (*report.about_test, *report.about_corrections):
            yield note if note.startswith(name) else f"{name}: {note}"
    rejected = sum(report.rejected.values())
    if other := report.rejected.get(ANOTHER_TEXT, 0):
        yield (
            f"{name}: {counted(other, 'item')} {'has' if other == 1 else 'have'} another text than before, under the "
            f"same id. The pool keeps the first one; `{_command(params, name)}` takes the new for the old. Each of "
            f"them: {report.rejects_file}"
        )
    if rejected > other:
        yield f"{name}: {counted(rejected - other, 'row')} rejected; each with its reason: {report.rejects_file}"
    if labels := sum(report.labels_rejected.values()):
        yield f"{name}: {counted(labels, 'label')} not taken; each with its reason: {report.rejects_file}"


def _bounded(lines: Sequence[str], news: Iterable[SourceNews]) -> list[str]:
    lines = [*lines, *(f"{one.file} {one.message}" for one in news)]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"and {len(lines) - MAX_LINES:,} lines like these; `al doctor` shows them"]
    return [f"ingest.sources: {line}" for line in lines]


# Files --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class FoundSources:
    """What the patterns of `ingest.sources` stand for: files by name, and what cannot be one, with the reason."""

    files: list[Path]
    problems: dict[str, str]


def find_sources(layout: Layout, patterns: Sequence[str]) -> FoundSources:
    """The files below the workspace that match, whatever the order of the patterns; nothing is opened.

    Hidden files and folders match only a pattern that names their dot, the engine's own files none. What is no file
    (a link that leads nowhere or out of the workspace, a pipe, a folder that cannot be listed) is a problem, and so is
    a pattern that leads out of the workspace.
    """
    walk = _Walk(layout)
    for pattern in patterns:
        if stays_below(pattern):
            walk.match(pattern)
        else:
            shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in pattern)
            walk.problems[shown] = "is no path below the workspace; copy the files into it"
    return FoundSources(sorted(walk.found), dict(sorted(walk.problems.items())))


class _Walk:
    """Goes through the folders that patterns lead to, each at most once for the same rest of a pattern."""

    def __init__(self, layout: Layout) -> None:
        self.found: set[Path] = set()
        self.problems: dict[str, str] = {}
        self._names_one = False
        """Whether the pattern stands for one file, which ought to be there then."""
        self._root = layout.root
        self._real = layout.root.resolve()
        own = (layout.private, layout.root / ".git", layout.root / ".dvc", layout.rounds, layout.reports, layout.inbox)
        outputs = (layout.labeled, layout.test_labels, layout.unresolved, layout.model, layout.scores, layout.queries)
        self._own = {path.relative_to(layout.root) for path in (*own, layout.rejects, *layout.sources, *outputs)}
        self._own |= {path.relative_to(layout.root) for path in (*layout.tracked, *layout.steering)}

    def match(self, pattern: str) -> None:
        """Look for the files of one pattern: `*`, `?` and `[…]` within a name, `**` for any folders."""
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        parts = [part for place, part in enumerate(parts) if part != "**" or parts[place - 1 : place] != ["**"]]
        if parts[-1:] == ["**"]:
            parts.append("*")
        self._names_one = not any(map(_is_pattern, parts))
        if self._names_one:
            self._candidate(self._root.joinpath(*parts))
            return
        todo = [(self._root, tuple(parts))]
        seen = set(todo)
        while todo:
            for step in self._step(*todo.pop()):
                if step not in seen:
                    seen.add(step)
                    todo.append(step)

    def _step(self, folder: Path, parts: tuple[str, ...]) -> Iterator[tuple[Path, tuple[str, ...]]]:
        head, rest = parts[0], parts[1:]
        if head == "**":
            yield folder, rest
            for entry in self._entries(folder):
                if not is_hidden(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield folder / entry.name, parts
            return
        if _is_pattern(head):
            names = [entry.name for entry in self._entries(folder) if _fits(entry.name, head)]
        else:
            names = [head]
        for name in names:
            if not rest:
                self._candidate(folder / name)
            elif _is_folder(folder / name):
                yield folder / name, rest

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        if self._is_own(folder):
            return []
        try:
            if not folder.resolve().is_relative_to(self._real):
                raise OSError("it leads out of the workspace; copy the files into it")
            with os.scandir(folder) as entries:
                return list(entries)
        except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
            self._problem(folder, f"cannot be listed: {getattr(error, 'strerror', None) or error}")
            return []

    def _candidate(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
            inside = path.resolve().is_relative_to(self._real)
        except (OSError, RuntimeError) as error:
            if os.path.islink(path):  # which raises nothing
                self._problem(path, "is a link that leads nowhere")
            elif self._names_one or not isinstance(error, FileNotFoundError):
                self._problem(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            return
        if not inside:
            self._problem(path, "is a link that leads out of the workspace; copy the file into it")
        elif self._is_own(path):
            if self._names_one:
                self._problem(path, "belongs to the workspace itself and is no source")
        elif stat.S_ISREG(mode):
            self.found.add(path)
        elif not stat.S_ISDIR(mode):
            self._problem(path, "is no regular file, but a pipe, a socket or a device")
        elif self._names_one:
            self._problem(path, "is a folder; `*` behind it stands for its files")

    def _is_own(self, path: Path) -> bool:
        with suppress(OSError, RuntimeError, ValueError):
            inside = path.resolve().relative_to(self._real)
            return inside in self._own or any(parent in self._own for parent in inside.parents)
        return False

    def _problem(self, path: Path, problem: str) -> None:
        self.problems[_name(self._root, path)] = problem


def _is_pattern(part: str) -> bool:
    return not {*"*?["}.isdisjoint(part)


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (pattern.startswith(".") or not is_hidden(name))


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def _name(root: Path, path: Path) -> str:
    name = path.relative_to(root).as_posix()
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# What earlier ticks saw ---------------------------------------------------------------------------------------------
_ENTRY: Mapping[str, type | tuple[type, ...]] = {
    "state": str,
    "stamp": list,
    "since": (int, float),
    "changed_at": (int, float),
    "waiting_since": (int, float),
    "failing_since": (int, float),
    "message": str,
    "digest": str,
    "settings": list,
    "taken": int,
}


class _Memory:
    """`.al/ingested.json`: for each source file what was seen of it, what was taken, and what is wrong with it.

    One that is damaged is as good as lost.
    """

    def __init__(self, layout: Layout) -> None:
        self._path = layout.ingested
        try:
            found = read_object(self._path)
        except BadInput:
            found = {}
        files = found.get("files")
        if not isinstance(files, dict):  # an earlier version remembered digests alone
            files = {name: {"digest": digest} for name, digest in found.items()}
        self._files: dict[str, dict[str, Any]] = {name: entry for name, entry in files.items() if _is_entry(entry)}
        count = found.get("drawn_from")
        self.drawn_from: int = count if isinstance(count, int) else 0
        """Files taken in while there was no test set, or one drawn from them."""
        self._stored = self._text()

    def _text(self) -> str:
        return json_line({"files": self._files, "drawn_from": self.drawn_from})

    def store(self) -> None:
        """Write it down, where something changed."""
        if (text := self._text()) != self._stored:
            write_text(self._path, text, 0o600)
            self._stored = text

    def keep_only(self, names: Collection[str]) -> None:
        """Forget the others: files that are gone, problems that are."""
        self._files = {name: entry for name, entry in self._files.items() if name in names}

    def in_order(self, names: Collection[str]) -> list[str]:
        """What was taken in before comes first, in that order: of two files that label a text the later one counts."""
        order = {name: entry["taken"] for name, entry in self._files.items() if "taken" in entry}
        return sorted(names, key=lambda name: (name not in order, order.get(name, 0), name))

    def is_taken(self, name: str, stamp: Stamp, settings: list[Any]) -> bool:
        """Whether the file was taken in by these settings and looks untouched since then."""
        entry = self._files.get(name, {})
        return entry.get("state") == "taken" and entry["stamp"] == list(stamp) and entry["settings"] == settings

    def holds(self, name: str, digest: str, settings: list[Any]) -> bool:
        """Whether exactly this content was the last that was taken in by these settings."""
        entry = self._files.get(name, {})
        return bool(entry.get("digest") == digest and entry.get("settings", settings) == settings)

    def see(self, name: str, stamp: Stamp, now: float) -> float:
        """Note what the file looks like; returns for how many seconds it has been quiet."""
        entry = self._files.setdefault(name, {})
        if entry.get("stamp") != list(stamp) or entry["since"] > now:  # the clock was set back: count anew
            entry |= {"stamp": list(stamp), "since": now}
        entry["changed_at"] = min(entry["since"], stamp.last_change)
        quiet: float = now - entry["changed_at"]
        if quiet < QUIET_SECONDS:
            entry["state"] = "waiting"
            entry.setdefault("waiting_since", now)
        return quiet

    def wait(self, name: str, stamp: Stamp, now: float) -> None:
        """The file changed just now, while it was read."""
        entry = self._files[name]
        entry |= {"state": "waiting", "stamp": list(stamp), "since": now, "changed_at": now}
        entry.setdefault("waiting_since", now)

    def changed(self, name: str, path: Path) -> bool:
        """Whether the file is another than the one last seen; False where that cannot be told."""
        with suppress(OSError):
            return self._files.get(name, {}).get("stamp") != list(stamp_of(path))
        return False

    def fail(self, name: str, message: str, now: float) -> None:
        """The file cannot be used; since when stays what it is while nothing of it was taken."""
        entry = self._files.setdefault(name, {})
        entry |= {"state": "failing", "message": message}
        entry.setdefault("failing_since", now)
        entry.pop("waiting_since", None)

    def took(self, name: str, digest: str, settings: list[Any]) -> None:
        """The file as it was last seen is taken in."""
        entry = self._files[name]
        if entry.get("digest") != digest or "taken" not in entry:
            entry["taken"] = 1 + max((other.get("taken", 0) for other in self._files.values()), default=0)
        entry |= {"state": "taken", "digest": digest, "settings": settings}
        for key in ("message", "failing_since", "waiting_since"):
            entry.pop(key, None)

    def news(self, now: float) -> Iterator[SourceNews]:
        """What fails and what waits, by name."""
        for name, entry in sorted(self._files.items()):
            if entry.get("state") == "failing":
                yield SourceNews(name, "failing", entry["message"], _moment(entry["failing_since"]))
            elif entry.get("state") == "waiting":
                message = _waits(now - entry["changed_at"], now - entry["waiting_since"])
                yield SourceNews(name, "waiting", message, _moment(entry["waiting_since"]))


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry[key], _ENTRY.get(key, ())) for key in entry):
        return False
    needed = {"failing": ("message", "failing_since"), "waiting": ("stamp", "since", "changed_at", "waiting_since")}
    needed["taken"] = ("stamp", "since", "digest", "settings")
    wanted = needed.get(entry.get("state", ""), () if "state" not in entry else ("?",))
    return ("stamp" in entry) == ("since" in entry) and all(key in entry for key in wanted)


def _waits(changed: float, waited: float) -> str:
    ago = _duration(max(0.0, changed))
    if changed >= QUIET_SECONDS:
        return f"changed {ago} ago; the next tick reads it, unless it changes again"
    said = f"changed {ago} ago; it is read once it has been quiet for a minute"
    if waited > _LONG_SECONDS:
        said += f", which it has not been for {_duration(waited)}: `al ingest` reads it at once"
    return said


_LONG_SECONDS = 3600.0


def _duration(seconds: float) -> str:
    for unit, length in (("days", 172_800.0), ("h", 7200.0), ("min", 120.0)):
        if seconds >= length:
            return f"{seconds // (length / 2):.0f} {unit}"
    return f"{seconds:.0f} s"


def _moment(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):  # edited by hand
        return datetime.fromtimestamp(0, UTC)
