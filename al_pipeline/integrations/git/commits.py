"""Commits and tags that are on disk once they are made, with exactly the bytes of the files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from al_pipeline.errors import RepositoryError, UnexpectedChange
from al_pipeline.files import sync, sync_names
from al_pipeline.integrations.git.index import Index
from al_pipeline.integrations.git.objects import object_id, object_path
from al_pipeline.integrations.git.runner import NETWORK_TIMEOUT, named

_NAME, _EMAIL = "al", "al@localhost"
"""The author of commits if no identity is configured."""
_LOOSE_TAGS = 64
_LOOSE_OBJECTS = 6700
"""Git's default of `gc.auto`."""


class Commits(Index):
    """Creates commits of explicit paths, and annotated tags."""

    def has_identity(self) -> bool:
        """Whether commits would have the user's own name and address."""
        return {_NAME, _EMAIL}.isdisjoint(self._identity().values())

    def identity(self) -> str | None:
        """The user's own address for commits; None if git has none."""
        email = self._identity()["GIT_AUTHOR_EMAIL"]
        return None if email == _EMAIL else email

    def _identity(self) -> dict[str, str]:
        """Author and committer for git's environment, with defaults for what is not configured."""
        lines = self.run("config", "-z", "--get-regexp", r"^(user|author|committer)\.(name|email)$", check=False).stdout
        known = {key: value for key, _, value in (line.partition("\n") for line in lines.split("\0")) if value}
        found = {}
        for role in ("author", "committer"):
            for part, ours in (("name", _NAME), ("email", _EMAIL)):
                variable = f"GIT_{role}_{part}".upper()
                given = (os.environ.get(variable), known.get(f"{role}.{part}"), known.get(f"user.{part}"))
                # git strips these characters and refuses an empty result
                found[variable] = next((value for value in given if value and value.strip(" .,:;<>\"\\'\n\t")), ours)
        return found

    def commit(self, message: str, paths: Iterable[Path]) -> str:
        """Commit exactly `paths` (those that exist or are tracked) and return the commit; HEAD if nothing changed.

        Raises UnexpectedChange if an operation is in progress (`check_idle`), or one of the files is staged with
        other content; RepositoryError if git would store other bytes than the files hold.
        """
        paths = list(paths)
        if begun := self.head() is not None:
            self.check_idle()
        self.clear_dead_lock()
        changes = self._status(paths)
        if not changes:
            if not any(path.exists() for path in paths) and not self.run("ls-files", *map(self._name, paths)).stdout:
                raise RepositoryError("nothing to commit: none of the paths exists")
            return self.run("rev-parse", "HEAD").stdout.strip()
        names = sorted({name for _, name in changes})
        if begun and (staged := [n for letters, n in changes if letters[0] not in " ?!" and letters[1] != " "]):
            raise UnexpectedChange(
                f"staged, and changed again since: {', '.join(staged[:5])}. Commit the files or unstage them (`git "
                "restore --staged FILE` keeps their current content), then try again"
            )
        self._sync_files(names)
        listed = "".join(f"{name}\0" for name in names)
        from_feed = ("--pathspec-from-file=-", "--pathspec-file-nul")
        try:
            self.run("add", "--all", "--force", *from_feed, feed=listed)
            self._check_stored(names)
            command = ("commit", "--quiet", "--only", "--message", message)
            self.run(*command, *from_feed, feed=listed, more=self._identity())
        except RepositoryError:
            self.run(
                "restore", "--staged", *from_feed, feed=listed, check=False
            )  # leave nothing staged that would end up in somebody's own commit
            raise
        made = self.run("rev-parse", "HEAD").stdout.strip()
        self._sync_stored(made, made)
        return made

    def tag(self, name: str, message: str, revision: str = "HEAD") -> None:
        """Create an annotated tag unless it exists. Raises UnexpectedChange if it exists for another commit.

        The tag object depends only on name, commit and message, so that every clone creates the same one: tagger and
        time are the commit's committer and time.
        """
        commit = self.run("rev-parse", "--verify", f"{named(revision)}^{{commit}}").stdout.strip()
        existing = self.tags().get(name)
        if existing == commit:
            return
        if existing is not None:
            raise UnexpectedChange(
                f"the tag {name} points to {existing[:12]}, not to the commit of that round ({commit[:12]})"
            )
        header = self.run("cat-file", "commit", commit).stdout.partition("\n\n")[0]
        who = next(line for line in header.splitlines() if line.startswith("committer ")).removeprefix("committer ")
        text = f"object {commit}\ntype commit\ntag {name}\ntagger {who}\n\n{message.strip()}\n"
        made = self.run("mktag", feed=text).stdout.strip()
        self._sync_stored(made, commit)
        ref = f"refs/tags/{name}"
        self.run("update-ref", ref, made, "")
        self._sync_inside([ref])

    def _check_stored(self, names: Sequence[str]) -> None:
        """Raise RepositoryError if the staged content of `names` is not, byte for byte, that of the files.

        Also syncs the staged objects to disk, since DVC stages files without syncing.
        """
        here = [name for name in names if (self.root / name).is_file() and not (self.root / name).is_symlink()]
        lines = self.run("ls-files", "--stage", "-z", "--", *here).stdout.split("\0") if here else []
        stored = {name: about.split(" ")[1] for about, _, name in (line.partition("\t") for line in lines if line)}
        for name in here:
            if stored.get(name) != object_id((self.root / name).read_bytes(), len(stored.get(name, ""))):
                raise RepositoryError(
                    f"git would not store {name} unchanged: `git check-attr --all {name}` shows which filter or "
                    "line-ending conversion changes it (.gitattributes, .git/info/attributes); remove that"
                )
        self._sync_inside(object_path(one) for one in stored.values())

    def pack_tags(self) -> bool:
        """Put the tags into one file if many are files of their own; return whether it did.

        Git reads each of those, and so does `GitRunner` to find out whether a ref changed. A tag's file is deleted once
        it is in the other, which git syncs to disk.
        """
        folder = self.path("refs/tags")
        if not folder.is_dir() or len(os.listdir(folder)) < _LOOSE_TAGS:
            return False
        self.run("pack-refs")
        self._sync_inside(["packed-refs"])
        return True

    def pack(self) -> bool:
        """Pack all objects that refs, index and reflogs reach, if so many are loose that `git gc --auto` would.

        Returns whether it did. The commands that we run never start git's own maintenance. Nothing is pruned: an object
        file is deleted once a pack on disk holds the object, so that a kill at any point loses nothing.
        """
        sample = self.path("objects/17")  # ids are evenly distributed, and git too counts one folder of 256
        if not sample.is_dir() or len(os.listdir(sample)) * 256 <= _LOOSE_OBJECTS:
            return False
        self.run("repack", "--quiet", timeout=NETWORK_TIMEOUT)
        sync_names(self.path("objects/pack").glob("pack-*"))
        self.run("prune-packed", "--quiet", timeout=NETWORK_TIMEOUT)
        return True

    def _sync_files(self, names: Iterable[str]) -> None:
        """Sync files of the work tree to disk before a commit records them; another program may have written them."""
        here = [self.root / name for name in names if (self.root / name).is_file()]
        for path in here:
            sync(path)
        sync_names(here)

    def _sync_stored(self, name: str, commit: str) -> None:
        """Sync to disk the object `name`, all objects that `commit` added, their directory entries, and the branch.

        Git syncs the content that it writes (`core.fsync`) before the ref, but neither directories nor the index of a
        commit of named paths.
        """
        found = self.run("rev-list", "--objects", "--no-object-names", name, "--not", f"{commit}^@").stdout.split()
        branch = self.branch()
        refs = [] if branch is None else [f"refs/heads/{branch}"]
        self._sync_inside(["config", "index", "HEAD", *refs, *map(object_path, found)])

    def _sync_inside(self, names: Iterable[str]) -> None:
        """Sync git's own files and their directory entries to disk; a missing object is in a pack."""
        there = [place for place in self.paths(names) if place.is_file()]
        for place in there:
            sync(place)
        sync_names(there)
