"""Objects: the files and folders of a commit, and whether all objects can be read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from al_pipeline.errors import RepositoryError
from al_pipeline.integrations.git.runner import GitRunner, failed, named

Tree = dict[str, tuple[str, str, str]]
"""Files and folders of a commit by path: mode, kind, object."""

_DAMAGE = re.compile(
    r"missing|corrupt|broken|is empty|unable to|mismatch|could not|invalid sha1|bad object|hash-path", re.I
)
"""Matches `git fsck`'s lines about unreadable objects; its other lines are about style."""


class Objects(GitRunner):
    """Reads the files and folders of commits."""

    def show(self, revision: str, path: str) -> str | None:
        """The text of `path` at `revision`; None if it does not exist there.

        Raises RepositoryError if its object is lost, or the revision does not exist.
        """
        found = self.blob(revision, path)
        return None if found is None else found.decode("utf-8", "surrogateescape")

    def blob(self, revision: str, path: str) -> bytes | None:
        """Like `show`, as bytes."""
        tree = self.tree(revision, path)
        if path not in tree or tree[path][1] != "blob":
            return None
        return self._blobs(revision, {path: tree[path][2]})[path]

    def read(self, revision: str, names: Sequence[str], tree: Tree | None = None) -> dict[str, str]:
        """The texts of many files at `revision`, without those that do not exist there.

        Takes two git processes, or one with `tree`, the revision's tree. Raises RepositoryError, naming the file, if
        git has lost the object of one.
        """
        if not names:
            return {}
        tree = self.tree(revision) if tree is None else tree
        wanted = {name: tree[name][2] for name in names if name in tree and tree[name][1] == "blob"}
        return {name: found.decode("utf-8", "replace") for name, found in self._blobs(revision, wanted).items()}

    def files(self, revision: str, folder: str) -> list[str]:
        """The files below `folder` at `revision`."""
        return [name for name, (_, kind, _) in self.tree(revision, folder).items() if kind != "tree"]

    def modes(self, revision: str) -> dict[str, str]:
        """Every file at `revision` with its git mode, such as 100644; 120000 is a symbolic link."""
        return {name: mode for name, (mode, kind, _) in self.tree(revision).items() if kind != "tree"}

    def tree(self, revision: str, *paths: str) -> Tree:
        """Mode, kind (blob, tree or commit) and object of every file and folder at `revision`, by path.

        `paths` limits this to them and what is below or above them. Raises RepositoryError if the revision is unknown
        or an object is lost.
        """
        command = ("ls-tree", "-r", "-t", "-z", "--full-tree", named(revision), "--", *paths)
        result = self._read(*command, check=False)
        entries = (line.partition("\t") for line in result.stdout.split("\0") if line)
        tree = {name: tuple(about.split(" ")[:3]) for about, _, name in entries}
        if result.returncode == 0:
            return tree  # type: ignore[return-value]
        if "Not a valid object name" in result.stderr:
            raise RepositoryError(
                f"git has no {revision} here: `git fetch --tags` fetches a tag from the git remote, `al round` "
                "creates a missing one"
            )
        lost = next((name for name, entry in tree.items() if entry[-1] in result.stderr), None)
        raise failed("ls-tree", result, f"{lost} at {revision}: " if lost else f"{revision}: ")

    def _blobs(self, revision: str, wanted: Mapping[str, str]) -> dict[str, bytes]:
        """The bytes of files by name; `wanted`: the object of each. Raises RepositoryError if one is lost."""
        if not wanted:
            return {}
        objects = "".join(f"{digest}\n" for digest in wanted.values())
        result = self._read("cat-file", "--batch", feed=objects, check=False)
        output = result.stdout.encode("utf-8", "surrogateescape")
        found: dict[str, bytes] = {}
        place = 0
        for name, digest in wanted.items():
            end = output.find(b"\n", place)
            header = output[place:end].split(b" ") if end >= 0 else []
            if header[:2] == [digest.encode(), b"blob"]:
                size = int(header[2])
                found[name] = output[end + 1 : end + 1 + size]
                place = end + 1 + size + 1
            elif header[1:] == [b"missing"]:
                place = end + 1
            if name not in found or object_id(found[name], len(digest)) != digest:
                words = " ".join(result.stderr.split())[-300:]
                raise RepositoryError(
                    f"git has lost {name} of {revision} (object {digest}){f': {words}' if words else ''}. Nothing was "
                    "changed. `git fsck` shows other losses; restore it from a complete clone or the git remote"
                )
        return found

    def check_objects(self) -> list[str]:
        """Git's report on lost or damaged objects, one line each; empty if all are readable.

        Files and folders of HEAD come first, by name. Reads every object of the history, so only `al doctor` calls it.
        """
        result = self.run("fsck", "--no-dangling", "--no-progress", "--name-objects", check=False)
        if result.returncode == 0:
            return []
        lines = [line for line in (*result.stderr.splitlines(), *result.stdout.splitlines()) if line]
        bad = [line for line in lines if _DAMAGE.search(line)]
        if not bad and not any(line.startswith(("error", "warning", "dangling")) for line in lines):
            raise failed("fsck", result)
        listed = self.run("ls-tree", "-r", "-t", "-z", "--full-tree", "HEAD", check=False).stdout.split("\0")
        names = {about.split(" ")[2]: name for about, _, name in (line.partition("\t") for line in listed if line)}
        lost = dict.fromkeys(digest for line in bad for digest in re.findall(r"\b[0-9a-f]{40}\b", line))
        return [*(f"{names[digest]} (object {digest})" for digest in lost if digest in names), *bad]


def object_path(name: str) -> str:
    return f"objects/{name[:2]}/{name[2:]}"


def object_id(content: bytes, digits: int) -> str:
    """Git's id of a file with this content, in a repository whose ids have `digits` hex digits."""
    make = hashlib.sha256 if digits == 64 else hashlib.sha1
    return make(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()
