"""The state of the repository: its format, operations of a person in progress, what a partial clone lacks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from al_pipeline.errors import ManualActionRequired, RepositoryError, UnexpectedChange
from al_pipeline.integrations.git.refs import Refs

if TYPE_CHECKING:
    import psutil

_UNDER_WAY = (
    ("rebase-merge", "a rebase", "rebase"),
    ("rebase-apply/applying", "`git am`", "am"),
    ("rebase-apply", "a rebase", "rebase"),
    ("MERGE_HEAD", "a merge", "merge"),
    ("CHERRY_PICK_HEAD", "a cherry-pick", "cherry-pick"),
    ("REVERT_HEAD", "a revert", "revert"),
    ("sequencer", "a cherry-pick or revert of several commits", "cherry-pick"),
    ("BISECT_LOG", "a bisection", "bisect"),
)
"""Operations of a person that are in progress: git's file, the operation, and the command that continues it."""


class RepositoryState(Refs):
    """Creates the repository, and checks that it can be worked with."""

    def init(self) -> None:
        """Create the repository, with the branch main, unless it exists. Raises as `check_format` does."""
        self.run("init", "--quiet", "--initial-branch=main")
        self.check_format()

    def check_format(self) -> None:
        """Raise RepositoryError if the repository has a format that DVC cannot read."""
        settings = self.run("config", "--get-regexp", r"^extensions\.", check=False).stdout.lower().splitlines()
        for name, usable in (("objectformat", "sha1"), ("refstorage", "files")):
            found = next((line.split()[-1] for line in settings if line.startswith(f"extensions.{name} ")), usable)
            if found != usable:
                kind = "object" if name == "objectformat" else "ref"
                raise RepositoryError(
                    f"{self.root} is a git repository of the {kind} format {found}, which DVC cannot read; use one "
                    f"created with `git init --{kind}-format={usable}`"
                )

    def check_idle(self) -> None:
        """Raise UnexpectedChange, with a fix, if an operation of a person is in progress, or HEAD is detached.

        That is a merge, rebase, cherry-pick, revert, `git am` or bisection, or an unresolved conflict.
        """
        places = self.paths(name for name, _, _ in _UNDER_WAY)
        for (_, what, command), place in zip(_UNDER_WAY, places, strict=True):
            if place.exists():
                end = "`git bisect reset`" if command == "bisect" else f"`git {command} --continue` or `--abort`"
                raise UnexpectedChange(f"{what} is in progress in {self.root}: end it first ({end}), then try again")
        if unmerged := self.run("ls-files", "--unmerged", "-z").stdout:
            names = sorted({entry.partition("\t")[2] for entry in unmerged.split("\0") if entry})
            raise UnexpectedChange(
                f"unmerged files: {', '.join(names[:5])}. Resolve the conflict (`git status` shows it), `git add` the "
                "files, then try again"
            )
        if self.branch() is None:
            self.head()
            raise UnexpectedChange("HEAD is detached: `git switch main` (or your branch) first, then try again")

    def check_complete(self, paths: Iterable[Path]) -> None:
        """Raise ManualActionRequired, with a fix, if this clone lacks history or skips files of `paths`."""
        if self.path("shallow").exists():
            raise ManualActionRequired(
                f"{self.root} is a shallow clone, which lacks the commits of earlier rounds: "
                "`git fetch --unshallow --tags`, then try again"
            )
        partial = self._ask("config", "--get-regexp", r"^(extensions\.partialclone|remote\..*\.promisor)$")
        if partial:
            name = next((line.split(".")[1] for line in partial.splitlines() if line.startswith("remote.")), "origin")
            raise ManualActionRequired(
                f"{self.root} is a partial clone, which lacks files of earlier rounds: make a full one "
                "(`git clone ADDRESS`), or complete this one: "
                f"`git fetch --refetch --no-filter {name} && git config --unset-all remote.{name}.promisor && "
                f"git config --unset-all remote.{name}.partialclonefilter; "
                "git config --unset-all extensions.partialclone`"
            )
        listed = self.run("ls-files", "-t", "-v", "-z", "--", *map(self._name, paths)).stdout.split("\0")
        if skipped := [entry[2:] for entry in listed if entry and (entry[0] == "S" or entry[0].islower())]:
            raise ManualActionRequired(
                f"git is set to ignore changes of {', '.join(skipped[:3])}: `git sparse-checkout disable` (or `git "
                "update-index --no-skip-worktree --no-assume-unchanged FILE`), then try again"
            )

    def plain_index(self) -> None:
        """Convert the index to the format that DVC reads. Call only while holding the workspace's lock."""
        index = self.path("index")
        if not index.exists():
            return
        with index.open("rb") as file:
            header = file.read(8)
        if header[:4] == b"DIRC" and header[4:] != b"\0\0\0\2" or any(index.parent.glob("sharedindex.*")):
            self.clear_dead_lock()
            self.run("update-index", "--index-version", "2", "--no-split-index", "--force-write-index", check=False)

    def clear_dead_lock(self) -> None:
        """Remove the index lock of a killed git. Call only while holding the workspace's lock."""
        lock = self.path("index.lock")
        if not lock.exists():
            return
        from psutil import process_iter

        for process in process_iter(["name"]):
            if process.info["name"] == "git" and _may_work_in(process, self.root):
                raise RepositoryError(
                    f"git (process {process.pid}) is running in {self.root}; try again when it has ended"
                )
        lock.unlink(missing_ok=True)


def _may_work_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process runs in `folder`; True if that cannot be found out, False if it has ended meanwhile."""
    from psutil import AccessDenied, NoSuchProcess

    try:
        return process.cwd() == str(folder)
    except AccessDenied:
        return True
    except (NoSuchProcess, FileNotFoundError):  # a zombie, too
        return False
