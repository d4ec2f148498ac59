"""Refs: HEAD, the branch and the tags."""

from __future__ import annotations

import contextlib
import re

from al_pipeline.errors import RepositoryError
from al_pipeline.integrations.git.runner import GitRunner, failed


class Refs(GitRunner):
    """Reads HEAD, branches and tags."""

    def head(self) -> str | None:
        """The commit that is checked out; None before the first commit.

        Raises RepositoryError, with git's output, if git cannot read or find it.
        """
        found = self._read("rev-parse", "--verify", "--quiet", "HEAD^{commit}", check=False)
        if found.returncode == 0:
            return found.stdout.strip()
        self.run("rev-parse", "--git-dir")  # raises if git cannot open the repository
        try:  # read the file: `git symbolic-ref` does not name a branch whose ref is broken
            name = self.path("HEAD").read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise RepositoryError(f"git's HEAD cannot be read: {error}") from None
        if not name.startswith("ref: "):
            raise failed("log", self.run("log", "-1", "--format=%H", check=False))
        name = name.removeprefix("ref: ").strip()
        refs = self.run("for-each-ref", "--format=%(objectname)", name)
        if refs.stdout.strip():
            self.run("cat-file", "commit", refs.stdout.strip())
            raise RepositoryError(f"{name} names {refs.stdout.strip()}, which is not a commit")
        last = self._last_in_reflog(name)
        if "ignoring broken ref" in refs.stderr:
            raise RepositoryError(
                f"git cannot read {name}: {' '.join(refs.stderr.split())}. The commits still exist: delete "
                f"{self.path(name)}, then `git update-ref {name} {last or 'COMMIT'}` (`git fsck` and `git reflog` "
                "show commits)"
            )
        kinds = self.run("cat-file", "--batch-all-objects", "--batch-check=%(objecttype)").stdout.split()
        if last is not None or kinds.count("commit") > 1:  # one alone: `git commit` was killed before it set the ref
            raise RepositoryError(
                f"{name} points to no commit, although this repository has some: `git switch` to the branch of the "
                f"rounds, or, if it was lost, `git update-ref {name} {last or 'COMMIT'}` (`git fsck --lost-found` "
                "shows commits)"
            )
        return None

    def _last_in_reflog(self, ref: str) -> str | None:
        """The newest commit in the reflog of `ref`, or of HEAD; None if there is no reflog."""
        for name in (ref, "HEAD"):
            with contextlib.suppress(OSError):
                lines = self.path(f"logs/{name}").read_text(encoding="utf-8", errors="replace").splitlines()
                found = [parts[1] for parts in map(str.split, lines) if len(parts) > 1]
                if known := [commit for commit in found if re.fullmatch(r"[0-9a-f]{40,64}", commit)]:
                    return known[-1]
        return None

    def branch(self) -> str | None:
        """The branch that is checked out; None on a detached HEAD."""
        ref = self._ask("symbolic-ref", "--quiet", "HEAD", of_settings=True)  # a short name avoids that of a tag
        return None if ref is None else ref.removeprefix("refs/heads/")

    def tags(self) -> dict[str, str]:
        """The commit of every tag, by name. Raises RepositoryError if one cannot be read."""
        return self._tags("refs/tags")

    def unmerged_tags(self, pattern: str) -> dict[str, str]:
        """The tags that match `pattern` (a glob) and whose commits are not in the history of HEAD."""
        return self._tags(f"refs/tags/{pattern}", "--no-merged=HEAD")

    def tag_objects(self, *arguments: str) -> dict[str, tuple[str, str]]:
        """The tags that `git for-each-ref` lists: each tag's object and its commit."""
        form = "--format=%(refname:strip=2) %(objectname) %(*objectname) %(objecttype)"
        result = self._read("for-each-ref", form, *arguments)
        broken = [line for line in result.stderr.splitlines() if "ignoring broken ref" in line]
        if broken:
            name = broken[0].split()[-1]
            raise RepositoryError(
                f"git cannot read {name}: delete {self.path(name)}, then `git fetch --tags` (or `al round`, which "
                "creates a round's tag again)"
            )
        found: dict[str, tuple[str, str]] = {}
        for name, digest, *more in (line.split() for line in result.stdout.splitlines()):
            if len(more) == 2 or more == ["commit"]:
                found[name] = digest, (more[0] if len(more) == 2 else digest)
            elif name.startswith("round-"):
                raise RepositoryError(
                    f"the tag {name} points to no commit (object {digest}); was it damaged? `git tag -d {name}`, then "
                    "`git fetch --tags` (or `al round`, which creates a round's tag again)"
                )
        return found

    def _tags(self, *arguments: str) -> dict[str, str]:
        return {name: commit for name, (_, commit) in self.tag_objects(*arguments).items()}
