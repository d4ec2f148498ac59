"""Runs git commands, and keeps the output of those that read until refs or settings change."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from al_pipeline.errors import RepositoryError
from al_pipeline.files import SETTLED_NS
from al_pipeline.integrations.git.settings import QUIET, command_environment
from al_pipeline.logs import get_logger, shown
from al_pipeline.sanitize import redact

_logger = get_logger(__name__)

_ANSWER_BYTES = 256 * 2**10
"""Longer outputs of git are not cached."""

_TIMEOUT = 120.0
NETWORK_TIMEOUT = 600.0
"""Seconds until a command is given up; the second for one that may transfer objects."""


@dataclass
class _Cache:
    """Results by command, and the value of `GitRunner._mark` for which they hold."""

    mark: tuple[object, ...] | None = None
    results: dict[tuple[str, ...], subprocess.CompletedProcess[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class GitRunner:
    """Runs git in the repository at `root`.

    Output that depends only on refs, objects and settings is cached until one of them changes: a tick runs the same
    queries before each of its steps.
    """

    root: Path
    _cached: dict[bool, _Cache] = field(default_factory=dict, compare=False, repr=False)
    """What depends on refs, objects and settings, and what depends on HEAD's name and the settings alone (True)."""

    def run(
        self,
        *arguments: str,
        check: bool = True,
        timeout: float = _TIMEOUT,
        feed: str = "",
        more: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run git in the repository, with `more` added to its environment. Raises RepositoryError with git's output."""
        environment = command_environment(self.root, more or {})
        begin = time.perf_counter()
        try:
            ended = subprocess.run(
                ["git", *QUIET, *arguments],
                cwd=self.root,
                env=environment,
                input=feed.encode("utf-8", "surrogateescape"),
                capture_output=True,  # as bytes: text mode would convert the line ends of files
                timeout=timeout,
                check=False,
            )
            said = (part.decode("utf-8", "surrogateescape") for part in (ended.stdout, ended.stderr))
            result = subprocess.CompletedProcess(ended.args, ended.returncode, *said)
        except FileNotFoundError:
            missing = (
                "git is not installed, or not on the PATH" if self.root.is_dir() else f"{self.root} no longer exists"
            )
            raise RepositoryError(missing) from None
        except subprocess.TimeoutExpired:
            raise RepositoryError(f"git {arguments[0]} did not end within {timeout:.0f} s") from None
        seconds = time.perf_counter() - begin
        _logger.debug("git %s ended with %d after %.3f s", shown(arguments), result.returncode, seconds)
        if check and result.returncode != 0:
            raise failed(arguments[0], result)
        return result

    def _read(
        self, *arguments: str, check: bool = True, feed: str = "", of_settings: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Like `run`, with a cache, for a command whose output depends only on refs, objects and settings.

        `of_settings`: it depends on the name of the branch and the settings alone, which a commit does not change.
        """
        mark, key = self._mark(of_settings), (feed, *arguments)
        cache = self._cached.setdefault(of_settings, _Cache())
        if mark is None or cache.mark != mark:
            cache.mark = mark
            cache.results.clear()
        if (result := cache.results.get(key)) is None:
            result = self.run(*arguments, check=False, feed=feed)
            plain = result.returncode in (0, 1) and not result.stderr and len(result.stdout) <= _ANSWER_BYTES
            if mark is not None and plain and self._mark(of_settings) == mark:
                cache.results[key] = result
        if check and result.returncode != 0:
            raise failed(arguments[0], result)
        return result

    def _mark(self, of_settings: bool) -> tuple[object, ...] | None:
        """A value that changes with refs and settings; None in a linked work tree, or if one changed just now."""
        folder = self.root / ".git"
        try:
            files = [folder / "HEAD", folder / "config", *([] if of_settings else [folder / "packed-refs"])]
            marks = [(path.name, *_stamp(path.stat())) for path in files if path.exists()]
            folders = [] if of_settings else [os.fspath(folder / "refs")]
            while folders:
                with os.scandir(folders.pop()) as entries:
                    for entry in entries:
                        marks.append((entry.path, *_stamp(entry.stat(follow_symlinks=False))))
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
        except OSError:
            return None
        newest = max((mark[1] for mark in marks), default=0)
        return None if time.time_ns() - newest < SETTLED_NS else tuple(sorted(marks))

    def _ask(self, *arguments: str, of_settings: bool = False) -> str | None:
        """The output of a command; None for exit code 1, which means "no". Raises RepositoryError if it fails."""
        result = self._read(*arguments, check=False, of_settings=of_settings)
        if result.returncode not in (0, 1):
            raise failed(arguments[0], result)
        return result.stdout.strip() if result.returncode == 0 else None

    def path(self, name: str) -> Path:
        """The path of one of git's own files, such as MERGE_HEAD.

        Git runs only in a linked work tree, where `.git` is a file; elsewhere the path is also defined for a missing
        repository, or one that git cannot open.
        """
        return self.paths([name])[0]

    def paths(self, names: Iterable[str]) -> list[Path]:
        """Like `path`, for many files."""
        if not (self.root / ".git").is_file():
            return [self.root / ".git" / name for name in names]
        asked = [word for name in names for word in ("--git-path", name)]
        return [self.root / place for place in self.run("rev-parse", *asked).stdout.splitlines()]

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_absolute() else path)


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return max(found.st_mtime_ns, found.st_ctime_ns), found.st_size, found.st_ino


def named(revision: str) -> str:
    """`revision`, which must not be an option: with `--output=FILE` git would write a file."""
    if revision.startswith("-"):
        raise RepositoryError(f"{revision!r} is not a commit")
    return revision


def failed(command: str, result: subprocess.CompletedProcess[str], about: str = "") -> RepositoryError:
    """The error for a failed git command, with the end of its output."""
    said = redact(" ".join((result.stderr or result.stdout).split()))[-500:]
    return RepositoryError(f"{about}git {command} failed ({result.returncode}): {said}")
