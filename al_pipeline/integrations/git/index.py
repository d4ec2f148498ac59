"""The index and the work tree: which files differ from HEAD, which are tracked, staged or ignored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from al_pipeline.integrations.git.runner import failed
from al_pipeline.integrations.git.state import RepositoryState
from al_pipeline.workspace.layout import is_ours


class Index(RepositoryState):
    """Compares the work tree with HEAD, by explicit paths."""

    def changed(self, paths: Iterable[Path]) -> list[str]:
        """The files of `paths`, or below them, that differ from HEAD, with untracked and ignored files of ours."""
        return [name for _, name in self._status(paths)]

    def _status(self, paths: Iterable[Path]) -> list[tuple[str, str]]:
        """Git's two status letters and the name of each path that differs from HEAD.

        An ignored file counts if it is in `paths` itself, or is one that the engine writes.
        """
        named = {self._name(path) for path in paths}
        command = ("status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--ignored=traditional")
        entries = [entry for entry in self.run(*command, "--", *sorted(named)).stdout.split("\0") if entry]
        rows = [(entry[:2], entry[3:]) for entry in entries]
        return [(letters, name) for letters, name in rows if letters != "!!" or name in named or is_ours(name)]

    def ignored(self, paths: Iterable[Path]) -> dict[str, str]:
        """Those of `paths` that git would ignore if they were new, with the responsible line: `.gitignore:3: *.dvc`."""
        feed = "".join(f"{self._name(path)}\0" for path in paths)
        magic = {"GIT_LITERAL_PATHSPECS": "0"}  # check-ignore does not support literal pathspecs, nor patterns
        command = ("check-ignore", "--verbose", "--no-index", "--stdin", "-z")
        result = self.run(*command, check=False, feed=feed, more=magic)
        if result.returncode not in (0, 1):
            raise failed("check-ignore", result)
        words = iter(result.stdout.split("\0"))
        rows = zip(words, words, words, words, strict=False)  # file, line, pattern, path
        return {name: f"{file}:{line}: {text}" for file, line, text, name in rows if not text.startswith("!")}

    def tracked(self, paths: Iterable[Path]) -> list[str]:
        """The tracked files of `paths` and below them."""
        listed = self.run("ls-files", "-z", "--", *map(self._name, paths)).stdout
        return [name for name in listed.split("\0") if name]

    def refresh(self, names: Sequence[str]) -> None:
        """Update the index for files whose content is as staged: git reports any change of size as a change."""
        feed = "".join(f"{name}\0" for name in names)
        self.run("add", "--pathspec-from-file=-", "--pathspec-file-nul", feed=feed)

    def unstage(self, paths: Iterable[Path]) -> None:
        """Unstage those of `paths` that are staged exactly as the files are now: an interrupted commit left them."""
        names = [name for letters, name in self._status(paths) if letters[0] not in " ?!" and letters[1] == " "]
        if names:
            self.clear_dead_lock()
            listed = "".join(f"{name}\0" for name in names)
            self.run("restore", "--staged", "--pathspec-from-file=-", "--pathspec-file-nul", feed=listed)
