"""A client for git: explicit paths only, no prompts, hooks or signing, and never resets the user's changes.

An unreadable object raises RepositoryError, naming it, and never counts as missing: see `head`, `show`, `read`, `tags`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from al_pipeline.errors import ManualActionRequired, RepositoryError, UnexpectedChange
from al_pipeline.files import SETTLED_NS, sync, sync_names
from al_pipeline.logs import get_logger, shown
from al_pipeline.sanitize import has_password, redact
from al_pipeline.workspace.home import own_environment
from al_pipeline.workspace.layout import is_ours

_logger = get_logger(__name__)

_SETTINGS = {
    "advice.detachedHead": "false",
    "advice.graftFileDeprecated": "false",
    "color.ui": "false",
    "column.ui": "never",
    "commit.cleanup": "whitespace",
    "commit.gpgSign": "false",
    "commit.template": "",
    "commit.verbose": "false",
    "core.attributesFile": "/dev/null",
    "core.autocrlf": "false",
    "core.commentChar": "#",
    "core.excludesFile": "/dev/null",
    "core.fsmonitor": "false",
    "core.fsync": "all",
    "core.fsyncMethod": "fsync",
    "core.hooksPath": "/dev/null",
    "core.preferSymlinkRefs": "false",
    "core.quotePath": "false",
    "core.safecrlf": "false",
    "core.splitIndex": "false",
    "diff.ignoreSubmodules": "none",
    "diff.orderFile": "/dev/null",
    "diff.renames": "false",
    "feature.experimental": "false",
    "feature.manyFiles": "false",
    "fetch.all": "false",
    "fetch.prune": "false",
    "fetch.pruneTags": "false",
    "fetch.recurseSubmodules": "false",
    "fetch.writeCommitGraph": "false",
    "gc.auto": "0",
    "i18n.commitEncoding": "UTF-8",
    "i18n.logOutputEncoding": "UTF-8",
    "index.skipHash": "false",
    "index.sparse": "false",
    "index.version": "2",
    "init.defaultObjectFormat": "sha1",
    "init.defaultRefFormat": "files",
    "log.follow": "false",
    "log.showSignature": "false",
    "maintenance.auto": "false",
    "push.followTags": "false",
    "push.gpgSign": "false",
    "push.recurseSubmodules": "no",
    "status.renames": "false",
    "status.submoduleSummary": "false",
    "submodule.recurse": "false",
    "tag.forceSignAnnotated": "false",
    "tag.gpgSign": "false",
}
"""Settings that make the behaviour and output of our commands independent of the user's. Access to remotes
(`core.sshCommand`, `credential.*`, `http.*`, `url.*`), `safe.directory` and the identity stay the user's."""

_QUIET = tuple(word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}"))

_NAME, _EMAIL = "al", "al@localhost"
"""The author of commits if no identity is configured."""

NOT_OURS = (
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_ATTR_SOURCE",
    "GIT_AUTHOR_DATE",
    "GIT_COMMITTER_DATE",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_DEFAULT_HASH",
    "GIT_DEFAULT_REF_FORMAT",
    "GIT_DIFF_OPTS",
    "GIT_DIR",
    "GIT_EXTERNAL_DIFF",
    "GIT_GLOB_PATHSPECS",
    "GIT_ICASE_PATHSPECS",
    "GIT_INDEX_FILE",
    "GIT_INDEX_VERSION",
    "GIT_LITERAL_PATHSPECS",
    "GIT_NAMESPACE",
    "GIT_NOGLOB_PATHSPECS",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_QUARANTINE_PATH",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_TRACE",
    "GIT_TRACE2",
    "GIT_TRACE2_EVENT",
    "GIT_TRACE2_PERF",
    "GIT_TRACE_SETUP",
    "GIT_WORK_TREE",
)
"""Variables that git sets for its hooks. Inherited, they would direct our commands to another repository, or change
their behaviour or output."""

_USER, _PASSWORD = "AL_GIT_USER", "AL_GIT_PASSWORD"
_HELPER = f'!f() {{ test "$1" != get || printf "username=%s\\npassword=%s\\n" "${_USER}" "${_PASSWORD}"; }}; f'
"""A credential helper that reads the environment, which only the same user can see."""

_AS_STORED = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_GRAFT_FILE": os.devnull, "GIT_LITERAL_PATHSPECS": "1"}
"""History as stored, without `git replace` and grafts; file names are not patterns."""

_NO_CONVERSION = "* -text -ident -filter !working-tree-encoding\n"
"""Attributes with which git checks out exactly the stored bytes."""

_KEPT = ("--no-tags", "--no-prune", "--no-prune-tags")
"""A remote's settings could otherwise delete our tags."""

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

_ANSWER_BYTES = 256 * 2**10
"""Longer outputs of git are not cached."""

_NETWORK_TIMEOUT = 600.0
_LOOK_TIMEOUT = 30.0
_TIMEOUT = 120.0


Tree = dict[str, tuple[str, str, str]]
"""Files and folders of a commit by path: mode, kind, object."""


@dataclass(frozen=True)
class Git:
    """The git repository at `root`.

    Output that depends only on refs, objects and settings is cached until one of them changes: a tick runs the same
    queries before each of its steps.
    """

    root: Path
    _answers: dict[tuple[str, ...], Any] = field(default_factory=dict, compare=False, repr=False)
    """Cached results by command; under () the value of `_mark` for which they hold."""

    def run(
        self,
        *arguments: str,
        check: bool = True,
        timeout: float = _TIMEOUT,
        feed: str = "",
        more: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run git in the repository, with `more` added to its environment. Raises RepositoryError with git's output."""
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        quiet = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
        here = {"GIT_CEILING_DIRECTORIES": str(self.root.resolve().parent)}  # do not find an enclosing repository
        environment = {**inherited, **own_environment(inherited), **quiet, **_AS_STORED, **here, **(more or {})}
        begin = time.perf_counter()
        try:
            ended = subprocess.run(
                ["git", *_QUIET, *arguments],
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
            missing = "git is not installed, or not on the PATH" if self.root.is_dir() else f"{self.root} is gone"
            raise RepositoryError(missing) from None
        except subprocess.TimeoutExpired:
            raise RepositoryError(f"git {arguments[0]} did not end within {timeout:.0f} s") from None
        seconds = time.perf_counter() - begin
        _logger.debug("git %s ended with %d after %.3f s", shown(arguments), result.returncode, seconds)
        if check and result.returncode != 0:
            raise _failed(arguments[0], result)
        return result

    def _read(self, *arguments: str, check: bool = True, feed: str = "") -> subprocess.CompletedProcess[str]:
        """Like `run`, with a cache, for a command whose output depends only on refs, objects and settings."""
        mark, key = self._mark(), (feed, *arguments)
        if mark is None or self._answers.get(()) != mark:
            self._answers.clear()
            self._answers[()] = mark
        result: subprocess.CompletedProcess[str] | None = self._answers.get(key)
        if result is None:
            result = self.run(*arguments, check=False, feed=feed)
            plain = result.returncode in (0, 1) and not result.stderr and len(result.stdout) <= _ANSWER_BYTES
            if mark is not None and plain and self._mark() == mark:
                self._answers[key] = result
        if check and result.returncode != 0:
            raise _failed(arguments[0], result)
        return result

    def _mark(self) -> tuple[object, ...] | None:
        """A value that changes with refs and settings; None in a linked work tree, or if one changed just now."""
        folder = self.root / ".git"
        try:
            files = [folder / "HEAD", folder / "config", folder / "packed-refs"]
            marks = [(path.name, *_stamp(path.stat())) for path in files if path.exists()]
            folders = [os.fspath(folder / "refs")]
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

    def _ask(self, *arguments: str) -> str | None:
        """The output of a command; None for exit code 1, which means "no". Raises RepositoryError if it fails."""
        result = self._read(*arguments, check=False)
        if result.returncode not in (0, 1):
            raise _failed(arguments[0], result)
        return result.stdout.strip() if result.returncode == 0 else None

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

    def clone(self, target: Path, revision: str) -> Git:
        """Clone into `target` and check out `revision` (a tag or a branch), byte for byte as stored, without the
        conversions of the user's settings.
        """
        command = (
            "clone",
            "--quiet",
            "--no-hardlinks",
            "--template=",
            "--no-checkout",
            "--config",
            "core.autocrlf=false",
        )
        ours = ("-c", "protocol.file.allow=always")
        self.run(*ours, *command, "--branch", revision, str(self.root), str(target), timeout=_NETWORK_TIMEOUT)
        clone = Git(target)
        attributes = target / ".git/info/attributes"
        attributes.parent.mkdir(exist_ok=True)
        attributes.write_text(_NO_CONVERSION, encoding="utf-8")
        clone.run("checkout", "--quiet", "HEAD", "--", ".", timeout=_NETWORK_TIMEOUT)
        return clone

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
            raise _failed("log", self.run("log", "-1", "--format=%H", check=False))
        name = name.removeprefix("ref: ").strip()
        refs = self.run("for-each-ref", "--format=%(objectname)", name)
        if refs.stdout.strip():
            self.run("cat-file", "commit", refs.stdout.strip())
            raise RepositoryError(f"{name} names {refs.stdout.strip()}, which is not a commit")
        last = self._last_in_reflog(name)
        if "ignoring broken ref" in refs.stderr:
            raise RepositoryError(
                f"git cannot read {name}: {' '.join(refs.stderr.split())}. The commits are still there: delete "
                f"{self.path(name)}, then `git update-ref {name} {last or 'COMMIT'}` (`git fsck` and `git reflog` show "
                "commits)"
            )
        kinds = self.run("cat-file", "--batch-all-objects", "--batch-check=%(objecttype)").stdout.split()
        if last is not None or kinds.count("commit") > 1:  # one alone: `git commit` was killed before it set the ref
            raise RepositoryError(
                f"{name} names no commit, although this repository holds some: `git switch` to the branch of the "
                f"rounds, or, where it was lost, `git update-ref {name} {last or 'COMMIT'}` (`git fsck --lost-found` "
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

    def path(self, name: str) -> Path:
        """The path of one of git's own files, such as MERGE_HEAD.

        Git runs only in a linked work tree, where `.git` is a file; elsewhere the path is also defined for a missing
        repository, or one that git cannot open.
        """
        if not (self.root / ".git").is_file():
            return self.root / ".git" / name
        return self.root / self.run("rev-parse", "--git-path", name).stdout.rstrip("\n")

    def branch(self) -> str | None:
        """The branch that is checked out; None on a detached HEAD."""
        return self._ask("symbolic-ref", "--quiet", "--short", "HEAD")

    def check_idle(self) -> None:
        """Raise UnexpectedChange, with a fix, if an operation of a person is in progress, or HEAD is detached.

        That is a merge, rebase, cherry-pick, revert, `git am` or bisection, or an unresolved conflict.
        """
        asked = [word for name, _, _ in _UNDER_WAY for word in ("--git-path", name)]
        places = self.run("rev-parse", *asked).stdout.splitlines()
        for (_, what, command), place in zip(_UNDER_WAY, places, strict=True):
            if (self.root / place).exists():
                end = "`git bisect reset`" if command == "bisect" else f"`git {command} --continue` or `--abort`"
                raise UnexpectedChange(f"{what} is under way in {self.root}: end it first ({end}), then try again")
        if unmerged := self.run("ls-files", "--unmerged", "-z").stdout:
            names = sorted({entry.partition("\t")[2] for entry in unmerged.split("\0") if entry})
            raise UnexpectedChange(
                f"not merged yet: {', '.join(names[:5])}. Resolve the conflict (`git status` shows it), `git add` the "
                "file, then try again"
            )
        if self.branch() is None:
            self.head()
            raise UnexpectedChange("HEAD is detached: `git switch main` (or your branch) first, then try again")

    def check_complete(self, paths: Iterable[Path]) -> None:
        """Raise ManualActionRequired, with a fix, if this clone lacks history or skips files of `paths`."""
        if self.run("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
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

    def commit_time(self, revision: str = "HEAD") -> int:
        """The commit time of `revision`, in seconds since 1970."""
        found = self._read("log", "-1", "--format=%ct", _named(revision))
        if not found.stdout.strip().isdigit():
            raise _failed("log", found, f"{revision}: ")
        return int(found.stdout)

    def brought(self, path: str) -> str:
        """The oldest commit in the history of HEAD that added `path`, merges included.

        Raises ManualActionRequired if there is none, since history was truncated or rewritten.
        """
        found = self._read("log", "-m", "--topo-order", "--no-renames", "--format=%H", "--diff-filter=A", "--", path)
        if not (commits := found.stdout.split()):
            self.head()  # raises if it cannot be read
            if found.stderr:
                raise _failed("log", found)
            raise ManualActionRequired(
                f"no commit in the history of {self.branch() or 'HEAD'} brought {path}: `git log --all -- {path}` "
                "shows where it came from; `git merge` that branch, then try again"
            )
        return commits[-1]

    def ahead_behind(self, other: str) -> tuple[int, int] | None:
        """The number of commits that only HEAD has, and that only `other` has; None if `other` is missing here."""
        if self.run("cat-file", "--batch-check", feed=f"{other}\n").stdout.split()[1:2] != ["commit"]:
            return None
        ahead, behind = self.run("rev-list", "--left-right", "--count", f"HEAD...{other}").stdout.split()
        return int(ahead), int(behind)

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

    def unmerged_tags(self, pattern: str) -> dict[str, str]:
        """The tags that match `pattern` (a glob) and whose commits are not in the history of HEAD."""
        return self._tags(f"refs/tags/{pattern}", "--no-merged=HEAD")

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
        command = ("ls-tree", "-r", "-t", "-z", "--full-tree", _named(revision), "--", *paths)
        result = self._read(*command, check=False)
        entries = (line.partition("\t") for line in result.stdout.split("\0") if line)
        tree = {name: tuple(about.split(" ")[:3]) for about, _, name in entries}
        if result.returncode == 0:
            return tree  # type: ignore[return-value]
        if "Not a valid object name" in result.stderr:
            raise RepositoryError(
                f"git knows no {revision} here: `git fetch --tags` fetches a tag of the remote, `al round` creates a "
                "missing one"
            )
        lost = next((name for name, entry in tree.items() if entry[-1] in result.stderr), None)
        raise _failed("ls-tree", result, f"{lost} at {revision}: " if lost else f"{revision}: ")

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
            if name not in found or _object_id(found[name], len(digest)) != digest:
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
            raise _failed("fsck", result)
        listed = self.run("ls-tree", "-r", "-t", "-z", "--full-tree", "HEAD", check=False).stdout.split("\0")
        names = {about.split(" ")[2]: name for about, _, name in (line.partition("\t") for line in listed if line)}
        lost = dict.fromkeys(digest for line in bad for digest in re.findall(r"\b[0-9a-f]{40}\b", line))
        return [*(f"{names[digest]} (object {digest})" for digest in lost if digest in names), *bad]

    def tags(self) -> dict[str, str]:
        """The commit of every tag, by name. Raises RepositoryError if one cannot be read."""
        return self._tags("refs/tags")

    def _tags(self, *arguments: str) -> dict[str, str]:
        return {name: commit for name, (_, commit) in self.tag_objects(*arguments).items()}

    def tag_objects(self, *arguments: str) -> dict[str, tuple[str, str]]:
        """The tags that `git for-each-ref` lists: each tag's object and its commit."""
        form = "--format=%(refname:strip=2) %(objectname) %(*objectname) %(objecttype)"
        result = self._read("for-each-ref", form, *arguments)
        broken = [line for line in result.stderr.splitlines() if "ignoring broken ref" in line]
        if broken:
            name = broken[0].split()[-1]
            raise RepositoryError(
                f"git cannot read {name}: delete {self.path(name)}, then `git fetch --tags` (or `al round`, which "
                "makes a round's tag again)"
            )
        found: dict[str, tuple[str, str]] = {}
        for name, digest, *more in (line.split() for line in result.stdout.splitlines()):
            if len(more) == 2 or more == ["commit"]:
                found[name] = digest, (more[0] if len(more) == 2 else digest)
            elif name.startswith("round-"):
                raise RepositoryError(
                    f"the tag {name} names no commit (object {digest}); was it damaged? `git tag -d {name}`, then "
                    "`git fetch --tags` (or `al round`, which makes a round's tag again)"
                )
        return found

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
            raise _failed("check-ignore", result)
        words = iter(result.stdout.split("\0"))
        rows = zip(words, words, words, words, strict=False)  # file, line, pattern, path
        return {name: f"{file}:{line}: {text}" for file, line, text, name in rows if not text.startswith("!")}

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
                f"staged, and changed again since: {', '.join(staged[:5])}. Commit it or take it back "
                "(`git restore --staged FILE` keeps what the file holds now), then try again"
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

    def _sync_files(self, names: Iterable[str]) -> None:
        """Sync files of the work tree to disk before a commit records them; another program may have written them."""
        here = [self.root / name for name in names if (self.root / name).is_file()]
        for path in here:
            sync(path)
        sync_names(here)

    def _sync_stored(self, name: str, commit: str, ref: str | None = None) -> None:
        """Sync to disk the object `name`, all objects that `commit` added, their directory entries, and `ref`.

        Git syncs the content that it writes (`core.fsync`) before the ref, but neither directories nor the index of a
        commit of named paths.
        """
        found = self.run("rev-list", "--objects", "--no-object-names", name, "--not", f"{commit}^@").stdout.split()
        refs = [one for one in (ref, self._ask("symbolic-ref", "--quiet", "HEAD")) if one is not None]
        self._sync_inside(["config", "index", "HEAD", *refs, *map(_object_path, found)])

    def _sync_inside(self, names: Iterable[str]) -> None:
        """Sync git's own files and their directory entries to disk; a missing object is in a pack."""
        asked = [word for name in names for word in ("--git-path", name)]
        places = [self.root / place for place in self.run("rev-parse", *asked).stdout.splitlines()]
        there = [place for place in places if place.is_file()]
        for place in there:
            sync(place)
        sync_names(there)

    def _check_stored(self, names: Sequence[str]) -> None:
        """Raise RepositoryError if the staged content of `names` is not, byte for byte, that of the files.

        Also syncs the staged objects to disk, since DVC stages files without syncing.
        """
        here = [name for name in names if (self.root / name).is_file() and not (self.root / name).is_symlink()]
        lines = self.run("ls-files", "--stage", "-z", "--", *here).stdout.split("\0") if here else []
        stored = {name: about.split(" ")[1] for about, _, name in (line.partition("\t") for line in lines if line)}
        for name in here:
            if stored.get(name) != _object_id((self.root / name).read_bytes(), len(stored.get(name, ""))):
                raise RepositoryError(
                    f"git would not store {name} as it is: `git check-attr --all {name}` shows which filter or "
                    "line-end conversion changes it (.gitattributes, .git/info/attributes); take that out"
                )
        self._sync_inside(_object_path(one) for one in stored.values())

    def refresh(self, names: Sequence[str]) -> None:
        """Update the index for files whose content is as staged: git reports any change of size as a change."""
        feed = "".join(f"{name}\0" for name in names)
        self.run("add", "--pathspec-from-file=-", "--pathspec-file-nul", feed=feed)

    def tracked(self, paths: Iterable[Path]) -> list[str]:
        """The tracked files of `paths` and below them."""
        listed = self.run("ls-files", "-z", "--", *map(self._name, paths)).stdout
        return [name for name in listed.split("\0") if name]

    def unstage(self, paths: Iterable[Path]) -> None:
        """Unstage those of `paths` that are staged exactly as the files are now: an interrupted commit left them."""
        names = [name for letters, name in self._status(paths) if letters[0] not in " ?!" and letters[1] == " "]
        if names:
            self.clear_dead_lock()
            listed = "".join(f"{name}\0" for name in names)
            self.run("restore", "--staged", "--pathspec-from-file=-", "--pathspec-file-nul", feed=listed)

    def tag(self, name: str, message: str, revision: str = "HEAD") -> None:
        """Create an annotated tag unless it exists. Raises UnexpectedChange if it exists for another commit.

        The tag object depends only on name, commit and message, so that every clone creates the same one: tagger and
        time are the commit's committer and time.
        """
        commit = self.run("rev-parse", "--verify", f"{_named(revision)}^{{commit}}").stdout.strip()
        existing = self.tags().get(name)
        if existing == commit:
            return
        if existing is not None:
            raise UnexpectedChange(
                f"the tag {name} names {existing[:12]}, not the commit of that round ({commit[:12]})"
            )
        header = self.run("cat-file", "commit", commit).stdout.partition("\n\n")[0]
        who = next(line for line in header.splitlines() if line.startswith("committer ")).removeprefix("committer ")
        text = f"object {commit}\ntype commit\ntag {name}\ntagger {who}\n\n{message.strip()}\n"
        made = self.run("mktag", feed=text).stdout.strip()
        self._sync_stored(made, commit)
        self.run("update-ref", f"refs/tags/{name}", made, "")
        self._sync_stored(made, commit, f"refs/tags/{name}")

    def remote(self) -> str | None:
        """The remote that rounds are pushed to: the branch's own, else `origin`; None if there is none."""
        remotes = self._read("remote").stdout.split()
        own = self._ask("config", f"branch.{self.branch()}.remote")
        return own if own is not None and own in remotes else "origin" if "origin" in remotes else None

    def remotes_with_password(self) -> list[str]:
        """The remotes whose address contains a password."""
        lines = (self._ask("config", "--get-regexp", r"^remote\..*\.(push)?url$") or "").splitlines()
        pairs = (line.partition(" ")[::2] for line in lines)
        return sorted({key.split(".", 1)[1].rpartition(".")[0] for key, url in pairs if has_password(url)})

    def push(self, remote: str, refs: Sequence[str]) -> None:
        """Push branch and tags atomically."""
        whole = [ref if ":" in ref else f"{ref}:{ref}" for ref in refs]  # else `push.default` may choose another name
        self.run(
            "push", "--quiet", "--atomic", remote, *whole, timeout=_NETWORK_TIMEOUT, more=self._without_password(remote)
        )

    def remote_has_tag(self, name: str) -> bool:
        """Whether the remote has this tag at present; False if there is no remote."""
        if (remote := self.remote()) is None:
            return False
        more = self._without_password(remote)
        return bool(
            self.run("ls-remote", "--tags", remote, f"refs/tags/{name}", timeout=_LOOK_TIMEOUT, more=more).stdout
        )

    def remote_refs(self, remote: str, *patterns: str) -> dict[str, tuple[str, str]]:
        """The remote's present references that match `patterns`: the object and the commit of each.

        Names are complete, such as `refs/tags/round-0001`.
        """
        more = self._without_password(remote)
        lines = self.run("ls-remote", remote, *patterns, timeout=_LOOK_TIMEOUT, more=more).stdout.splitlines()
        found = {name: digest for digest, name in (line.split("\t") for line in lines)}
        return {
            name: (digest, found.get(f"{name}^{{}}", digest))
            for name, digest in found.items()
            if not name.endswith("^{}")
        }

    def fetch_tags(self, remote: str, pattern: str) -> dict[str, str]:
        """Fetch the remote's tags that match `pattern` (a glob) and are missing here; existing tags do not change.

        Returns the tags whose object differs, with the remote's object.
        """
        there = {name.removeprefix("refs/tags/"): found for name, found in self._remote_tags(remote, pattern).items()}
        here = self.tag_objects("refs/tags")
        if missing := sorted(there.keys() - here.keys()):
            refs = [f"refs/tags/{name}:refs/tags/{name}" for name in missing]
            more = self._without_password(remote)
            self.run("fetch", "--quiet", *_KEPT, remote, *refs, timeout=_NETWORK_TIMEOUT, more=more)
        return {name: found[0] for name, found in there.items() if name in here and here[name][0] != found[0]}

    def _remote_tags(self, remote: str, pattern: str) -> dict[str, tuple[str, str]]:
        return self.remote_refs(remote, f"refs/tags/{pattern}")

    def lacks(self) -> int:
        """The number of commits on the remote's branch that this clone lacks at present; 0 if there is no remote."""
        remote, branch = self.remote(), self.branch()
        if remote is None or branch is None:
            return 0
        name = f"refs/heads/{branch}"
        there = self.remote_refs(remote, name).get(name)
        if there is None:
            return 0
        more = self._without_password(remote)
        self.run("fetch", "--quiet", *_KEPT, remote, name, timeout=_NETWORK_TIMEOUT, more=more)
        if (counts := self.ahead_behind(there[1])) is None:
            raise RepositoryError(f"commit {there[1]} of {branch} was fetched from {remote} but is missing; try again")
        return counts[1]

    def _without_password(self, remote: str) -> dict[str, str]:
        """Variables that make git pass a password in the remote's address through the environment; empty without one.

        Git passes the address to a helper as an argument, and every user of the machine can read arguments.
        """
        keys = (f"remote.{remote}.pushurl", f"remote.{remote}.url")
        address = next((a for key in keys if (a := self._ask("config", "--get", key))), "")
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.password:
            return {}
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        settings = [(f"url.{bare}.insteadOf", address), ("credential.helper", ""), ("credential.helper", _HELPER)]
        first = int(os.environ.get("GIT_CONFIG_COUNT") or 0)
        login = {_USER: unquote(parts.username or ""), _PASSWORD: unquote(parts.password)}
        more = {"GIT_CONFIG_COUNT": str(first + len(settings)), **login}
        for number, (key, value) in enumerate(settings, first):
            more |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        return more

    def clear_dead_lock(self) -> None:
        """Remove the index lock of a killed git. Call only while holding the workspace's lock."""
        lock = self.path("index.lock")
        if not lock.exists():
            return
        from psutil import process_iter

        for process in process_iter(["name", "cwd"]):
            if process.info["name"] == "git" and process.info["cwd"] in (str(self.root), None):
                raise RepositoryError(f"git (process {process.pid}) works in {self.root}; try again when it has ended")
        lock.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_absolute() else path)


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return max(found.st_mtime_ns, found.st_ctime_ns), found.st_size, found.st_ino


def _object_path(name: str) -> str:
    return f"objects/{name[:2]}/{name[2:]}"


def _named(revision: str) -> str:
    """`revision`, which must not be an option: with `--output=FILE` git would write a file."""
    if revision.startswith("-"):
        raise RepositoryError(f"{revision!r} names no commit")
    return revision


_DAMAGE = re.compile(
    r"missing|corrupt|broken|is empty|unable to|mismatch|could not|invalid sha1|bad object|hash-path", re.I
)
"""Matches `git fsck`'s lines about unreadable objects; its other lines are about style."""


def _failed(command: str, result: subprocess.CompletedProcess[str], about: str = "") -> RepositoryError:
    """The error for a failed git command, with the end of its output."""
    said = redact(" ".join((result.stderr or result.stdout).split()))[-500:]
    return RepositoryError(f"{about}git {command} failed ({result.returncode}): {said}")


def _object_id(content: bytes, digits: int) -> str:
    """Git's id of a file with this content, in a repository whose ids have `digits` hex digits."""
    make = hashlib.sha256 if digits == 64 else hashlib.sha1
    return make(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()
