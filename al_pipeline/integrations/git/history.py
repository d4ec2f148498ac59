"""The history of HEAD: when a commit was made, which commit added a file, what another branch has more."""

from __future__ import annotations

from al_pipeline.errors import ManualActionRequired
from al_pipeline.integrations.git.refs import Refs
from al_pipeline.integrations.git.runner import failed, named


class History(Refs):
    """Reads the history of HEAD."""

    def commit_time(self, revision: str = "HEAD") -> int:
        """The commit time of `revision`, in seconds since 1970."""
        found = self._read("log", "-1", "--format=%ct", named(revision))
        if not found.stdout.strip().isdigit():
            raise failed("log", found, f"{revision}: ")
        return int(found.stdout)

    def brought(self, path: str) -> str:
        """The oldest commit in the history of HEAD that added `path`, merges included.

        Raises ManualActionRequired if there is none, since history was truncated or rewritten.
        """
        found = self._read("log", "-m", "--topo-order", "--no-renames", "--format=%H", "--diff-filter=A", "--", path)
        if not (commits := found.stdout.split()):
            self.head()  # raises if it cannot be read
            if found.stderr:
                raise failed("log", found)
            raise ManualActionRequired(
                f"no commit in the history of {self.branch() or 'HEAD'} added {path}: `git log --all -- {path}` shows "
                "where it came from; `git merge` that branch, then try again"
            )
        return commits[-1]

    def newcomers(self, folder: str) -> dict[str, str]:
        """For each file below `folder`, the oldest commit in the history of HEAD that added it; by one git process.

        If merged histories added a file twice, `brought` may return another commit; that one is correct.
        """
        command = ("log", "-m", "--topo-order", "--no-renames", "--format=%x01%H", "--diff-filter=A", "--name-only")
        found: dict[str, str] = {}
        for entry in self.run(*command, "-z", "--", folder).stdout.split("\1")[1:]:
            commit, _, names = entry.partition("\0")
            found |= {name.lstrip("\n"): commit for name in names.split("\0") if name.strip("\n")}
        return found

    def ahead_behind(self, other: str) -> tuple[int, int] | None:
        """The number of commits that only HEAD has, and that only `other` has; None if `other` is missing here."""
        if self.run("cat-file", "--batch-check", feed=f"{other}\n").stdout.split()[1:2] != ["commit"]:
            return None
        ahead, behind = self.run("rev-list", "--left-right", "--count", f"HEAD...{other}").stdout.split()
        return int(ahead), int(behind)
