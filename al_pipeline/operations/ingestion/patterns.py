"""Find the files that match the patterns of `ingest.sources`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from msgspec import Struct

from al_pipeline.data.inputs import is_hidden
from al_pipeline.params import stays_below
from al_pipeline.workspace.layout import Layout


class FoundSources(Struct, frozen=True):
    """What the patterns of `ingest.sources` match: files sorted by name, and unusable paths with the reason."""

    files: list[Path]
    problems: dict[str, str]


def find_sources(layout: Layout, patterns: Sequence[str]) -> FoundSources:
    """Find the files in the workspace that match, independent of the order of the patterns; open none.

    Hidden files and folders match only a pattern with an explicit dot, the engine's own files match none. Problems
    are links that are broken or lead out of the workspace, pipes, folders that cannot be listed, and patterns that
    lead out of the workspace.
    """
    walk = _Walk(layout)
    for pattern in patterns:
        if stays_below(pattern):
            walk.match(pattern)
        else:
            shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in pattern)
            walk.problems[shown] = "is not a path below the workspace; copy the files into it"
    return FoundSources(sorted(walk.found), dict(sorted(walk.problems.items())))


class _Walk:
    """Walks the folders that patterns match, each at most once for the same remainder of a pattern."""

    def __init__(self, layout: Layout) -> None:
        self.found: set[Path] = set()
        self.problems: dict[str, str] = {}
        self._names_one = False
        """Whether the pattern names a single file, so that it is a problem if that is missing."""
        self._root = layout.root
        self._real = layout.root.resolve()
        own = (layout.private, layout.root / ".git", layout.root / ".dvc", layout.rounds, layout.reports, layout.inbox)
        outputs = (layout.labeled, layout.test_labels, layout.unresolved, layout.model, layout.scores, layout.queries)
        self._own = {path.relative_to(layout.root) for path in (*own, layout.rejects, *layout.sources, *outputs)}
        self._own |= {path.relative_to(layout.root) for path in (*layout.tracked, *layout.steering)}

    def match(self, pattern: str) -> None:
        """Find the files of one pattern: `*`, `?` and `[…]` match within a name, `**` matches any folders."""
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
                raise OSError("it leads outside the workspace; copy the files into it")
            with os.scandir(folder) as entries:
                return list(entries)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            self._problem(folder, f"cannot be listed: {getattr(error, 'strerror', None) or error}")
            return []

    def _candidate(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
            inside = path.resolve().is_relative_to(self._real)
        except (OSError, RuntimeError) as error:
            if os.path.islink(path):  # unlike `stat`, this never raises
                self._problem(path, "is a link to a file that does not exist")
            elif self._names_one or not isinstance(error, FileNotFoundError):
                self._problem(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            return
        if not inside:
            self._problem(path, "is a link that leads outside the workspace; copy the file into it")
        elif self._is_own(path):
            if self._names_one:
                self._problem(path, "belongs to the workspace itself and cannot be a source")
        elif stat.S_ISREG(mode):
            self.found.add(path)
        elif not stat.S_ISDIR(mode):
            self._problem(path, "is not a regular file, but a pipe, a socket or a device")
        elif self._names_one:
            self._problem(path, "is a folder; to read its files, append `/*`")

    def _is_own(self, path: Path) -> bool:
        with suppress(OSError, RuntimeError, ValueError):
            inside = path.resolve().relative_to(self._real)
            return inside in self._own or any(parent in self._own for parent in inside.parents)
        return False

    def _problem(self, path: Path, problem: str) -> None:
        self.problems[shown_name(self._root, path)] = problem


def _is_pattern(part: str) -> bool:
    return not {*"*?["}.isdisjoint(part)


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and (pattern.startswith(".") or not is_hidden(name))


def _is_folder(path: Path) -> bool:
    with suppress(OSError):
        return path.is_dir()
    return False


def shown_name(root: Path, path: Path) -> str:
    """A file's path relative to `root`, encodable in JSON and on a terminal whatever its bytes are."""
    name = path.relative_to(root).as_posix()
    return os.fsencode(name).decode("utf-8", "backslashreplace")
