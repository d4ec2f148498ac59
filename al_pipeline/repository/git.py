"""Git as we use it: named paths only, never a prompt, a hook or a signature, nothing of the user's reset."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil

from al_pipeline.errors import ForeignEdit, RepositoryError
from al_pipeline.home import own_environment
from al_pipeline.plain import has_password, redact

_SETTINGS = {
    "advice.detachedHead": "false",
    "color.ui": "false",
    "column.ui": "never",
    "commit.cleanup": "whitespace",
    "commit.gpgSign": "false",
    "commit.template": "",
    "commit.verbose": "false",
    "core.attributesFile": "/dev/null",
    "core.commentChar": "#",
    "core.excludesFile": "/dev/null",
    "core.fsmonitor": "false",
    "core.fsync": "all",
    "core.fsyncMethod": "fsync",
    "core.hooksPath": "/dev/null",
    "core.preferSymlinkRefs": "false",
    "core.quotePath": "false",
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
"""What our commands print and do must not hang on the user's settings. How a remote is reached (`core.sshCommand`,
`credential.*`, `http.*`, `url.*`), `safe.directory` and the identity stay the user's own."""

_QUIET = tuple(word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}"))

_NAME, _EMAIL = "al", "al@localhost"
"""Who commits where git knows nobody."""

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
"""What git sets for its hooks: inherited, it would turn our commands on another repository, or make them say or do
something else."""

_USER, _PASSWORD = "AL_GIT_USER", "AL_GIT_PASSWORD"
_HELPER = f'!f() {{ test "$1" != get || printf "username=%s\\npassword=%s\\n" "${_USER}" "${_PASSWORD}"; }}; f'
"""A credential helper that reads the environment, which only our own user can see."""

_NETWORK_TIMEOUT = 600.0
_LOOK_TIMEOUT = 30.0
_TIMEOUT = 120.0


@dataclass(frozen=True)
class Git:
    """The git repository at `root`."""

    root: Path

    def run(
        self,
        *arguments: str,
        check: bool = True,
        timeout: float = _TIMEOUT,
        feed: str = "",
        more: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run git in the repository, with `more` in its environment. Raises RepositoryError with git's last words."""
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        quiet = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
        environment = {**inherited, **own_environment(inherited), **quiet, **(more or {})}
        try:
            result = subprocess.run(
                ["git", *_QUIET, *arguments],
                cwd=self.root,
                env=environment,
                input=feed,
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                timeout=timeout,
                check=False,
            )
        except FileNotFoundError:
            missing = "git is not installed, or not on the PATH" if self.root.is_dir() else f"{self.root} is gone"
            raise RepositoryError(missing) from None
        except subprocess.TimeoutExpired:
            raise RepositoryError(f"git {arguments[0]} did not end within {timeout:.0f} s") from None
        if check and result.returncode != 0:
            said = redact(" ".join((result.stderr or result.stdout).split()))[-500:]
            raise RepositoryError(f"git {arguments[0]} failed ({result.returncode}): {said}")
        return result

    def init(self) -> None:
        """Make the repository, its branch named main; harmless where there is one."""
        self.run("init", "--quiet", "--initial-branch=main")
        self.check_format()

    def check_format(self) -> None:
        """Raise RepositoryError where git keeps the repository in a form that DVC cannot read."""
        settings = self.run("config", "--get-regexp", r"^extensions\.", check=False).stdout.lower().splitlines()
        for name, usable in (("objectformat", "sha1"), ("refstorage", "files")):
            found = next((line.split()[-1] for line in settings if line.startswith(f"extensions.{name} ")), usable)
            if found != usable:
                kind = "object" if name == "objectformat" else "ref"
                raise RepositoryError(
                    f"{self.root} is a git repository of the {kind} format {found}, which DVC cannot read; use one "
                    f"that `git init --{kind}-format={usable}` makes"
                )

    def plain_index(self) -> None:
        """Bring the index into the form that DVC reads. Call only while holding the workspace's lock."""
        index = self._path("index")
        if not index.exists():
            return
        with index.open("rb") as file:
            header = file.read(8)
        if header[:4] == b"DIRC" and header[4:] != b"\0\0\0\2" or any(index.parent.glob("sharedindex.*")):
            self.clear_dead_lock()
            self.run("update-index", "--index-version", "2", "--no-split-index", "--force-write-index", check=False)

    def clone(self, target: Path, revision: str) -> Git:
        """A fresh clone in `target` with `revision` (a tag or a branch) checked out; nothing changes here."""
        command = ("clone", "--quiet", "--no-hardlinks", "--template=", "--branch", revision)
        ours = ("-c", "protocol.file.allow=always")
        self.run(*ours, *command, str(self.root), str(target), timeout=_NETWORK_TIMEOUT)
        return Git(target)

    def has_identity(self) -> bool:
        """Whether commits would carry the user's own name and address."""
        return {_NAME, _EMAIL}.isdisjoint(self._identity().values())

    def identity(self) -> str | None:
        """The user's own address for commits; None where git knows none."""
        email = self._identity()["GIT_AUTHOR_EMAIL"]
        return None if email == _EMAIL else email

    def _identity(self) -> dict[str, str]:
        """Author and committer for git's environment, complete: where git knows a half, the other one is ours."""
        lines = self.run("config", "-z", "--get-regexp", r"^(user|author|committer)\.(name|email)$", check=False).stdout
        known = {key: value for key, _, value in (line.partition("\n") for line in lines.split("\0")) if value}
        found = {}
        for role in ("author", "committer"):
            for part, ours in (("name", _NAME), ("email", _EMAIL)):
                variable = f"GIT_{role}_{part}".upper()
                given = (os.environ.get(variable), known.get(f"{role}.{part}"), known.get(f"user.{part}"))
                # git takes these characters away, and refuses what is empty then
                found[variable] = next((value for value in given if value and value.strip(" .,:;<>\"\\'\n\t")), ours)
        return found

    def head(self) -> str | None:
        """The commit that is checked out; None before the first."""
        result = self.run("rev-parse", "--verify", "--quiet", "HEAD", check=False)
        return result.stdout.strip() or None

    def branch(self) -> str | None:
        """The branch that is checked out; None on a detached HEAD."""
        return self.run("symbolic-ref", "--quiet", "--short", "HEAD", check=False).stdout.strip() or None

    def commit_time(self, revision: str = "HEAD") -> int:
        """When `revision` was committed, in seconds since 1970."""
        return int(self.run("log", "-1", "--format=%ct", _named(revision)).stdout)

    def show(self, revision: str, path: str) -> str | None:
        """The text of `path` at `revision`; None where it is not there."""
        result = self.run("show", f"{_named(revision)}:{path}", check=False)
        return result.stdout if result.returncode == 0 else None

    def read(self, revision: str, names: Sequence[str]) -> dict[str, str]:
        """The texts of many files at `revision`, by one git process; those that are not there are left out."""
        asked = "".join(f"{revision}:{name}\n" for name in names)
        output = self.run("cat-file", "--batch", feed=asked).stdout.encode("utf-8", "surrogateescape")
        found: dict[str, str] = {}
        place = 0
        for name in names:
            end = output.index(b"\n", place)
            header, place = output[place:end], end + 1
            if not header.endswith(b" missing"):
                size = int(header.rsplit(b" ", 1)[1])
                found[name] = output[place : place + size].decode("utf-8", "replace")
                place += size + 1
        return found

    def files(self, revision: str, folder: str) -> list[str]:
        """The files below `folder` at `revision`."""
        result = self.run("ls-tree", "-r", "-z", "--name-only", _named(revision), "--", folder, check=False)
        return [name for name in result.stdout.split("\0") if name]

    def modes(self, revision: str) -> dict[str, str]:
        """Every file at `revision` with git's mode of it, such as 100644; 120000 is a symbolic link."""
        listed = self.run("ls-tree", "-r", "-z", _named(revision)).stdout.split("\0")
        return {name: about.split(" ", 1)[0] for about, _, name in (line.partition("\t") for line in listed if line)}

    def tags(self) -> dict[str, str]:
        """Every tag, with the commit that it names."""
        lines = self.run("for-each-ref", "--format=%(refname:short) %(*objectname) %(objectname)", "refs/tags").stdout
        return {parts[0]: parts[1] for parts in (line.split() for line in lines.splitlines())}

    def changed(self, paths: Iterable[Path]) -> list[str]:
        """Which of `paths` (or files below them) differ from HEAD, untracked ones included."""
        result = self.run("status", "--porcelain", "-z", "--untracked-files=all", "--", *map(self._name, paths))
        return [entry[3:] for entry in result.stdout.split("\0") if entry]

    def commit(self, message: str, paths: Iterable[Path]) -> str:
        """Commit exactly `paths` (those that exist or are tracked) and return the commit; HEAD where nothing changed.

        Raises ForeignEdit on a detached HEAD, where a commit would be lost at the next checkout.
        """
        if self.head() is not None and self.branch() is None:
            raise ForeignEdit("HEAD is detached: `git switch main` (or your branch) first, then try again")
        self.clear_dead_lock()
        named = [
            name
            for path, name in ((path, self._name(path)) for path in paths)
            if path.exists() or self.run("ls-files", "-z", "--", name).stdout
        ]
        if not named:
            raise RepositoryError("nothing to commit: none of the paths exists")
        self.run("add", "--all", "--", *named)
        if self.head() is None or self.run("diff", "--cached", "--quiet", "HEAD", "--", *named, check=False).returncode:
            self.run("commit", "--quiet", "--message", message, "--", *named, more=self._identity())
        return self.run("rev-parse", "HEAD").stdout.strip()

    def tag(self, name: str, message: str, revision: str = "HEAD") -> None:
        """Make an annotated tag; harmless where it names that commit. Raises ForeignEdit where it names another."""
        commit = self.run("rev-parse", f"{revision}^{{commit}}").stdout.strip()
        existing = self.tags().get(name)
        if existing == commit:
            return
        if existing is not None:
            raise ForeignEdit(f"the tag {name} names {existing[:12]}, not the commit of that round ({commit[:12]})")
        self.run("tag", "--annotate", "--message", message, name, commit, more=self._identity())

    def remote(self) -> str | None:
        """The remote that rounds are pushed to: the branch's own, else `origin`; None where there is none."""
        remotes = self.run("remote").stdout.split()
        own = self.run("config", f"branch.{self.branch()}.remote", check=False).stdout.strip()
        return own if own in remotes else "origin" if "origin" in remotes else None

    def remotes_with_password(self) -> list[str]:
        """The remotes whose address holds a password."""
        lines = self.run("config", "--get-regexp", r"^remote\..*\.(push)?url$", check=False).stdout.splitlines()
        pairs = (line.partition(" ")[::2] for line in lines)
        return sorted({key.split(".", 1)[1].rpartition(".")[0] for key, url in pairs if has_password(url)})

    def push(self, remote: str, refs: Sequence[str]) -> None:
        """Push branch and tags in one atomic step."""
        whole = [ref if ":" in ref else f"{ref}:{ref}" for ref in refs]  # else `push.default` may choose another name
        self.run(
            "push", "--quiet", "--atomic", remote, *whole, timeout=_NETWORK_TIMEOUT, more=self._without_password(remote)
        )

    def remote_has_tag(self, name: str) -> bool:
        """Whether the remote has a tag, as of now; False where there is no remote."""
        if (remote := self.remote()) is None:
            return False
        more = self._without_password(remote)
        return bool(
            self.run("ls-remote", "--tags", remote, f"refs/tags/{name}", timeout=_LOOK_TIMEOUT, more=more).stdout
        )

    def lacks(self) -> int:
        """How many commits the remote's branch has and this clone has not, as of now; 0 where there is no remote."""
        remote, branch = self.remote(), self.branch()
        if remote is None or branch is None:
            return 0
        kept = ("--no-tags", "--no-prune", "--no-prune-tags")  # a remote's own settings would delete tags of ours
        self.run("fetch", "--quiet", *kept, remote, timeout=_NETWORK_TIMEOUT, more=self._without_password(remote))
        found = self.run("rev-list", "--count", f"HEAD..refs/remotes/{remote}/{branch}", check=False)
        return int(found.stdout) if found.returncode == 0 else 0

    def _without_password(self, remote: str) -> dict[str, str]:
        """What makes git give a password that stands in the remote's address by other means; empty where none does.

        Git hands the address to a helper as an argument, and everybody on the machine can read arguments.
        """
        keys = (f"remote.{remote}.pushurl", f"remote.{remote}.url")
        address = next((a for key in keys if (a := self.run("config", "--get", key, check=False).stdout.strip())), "")
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
        """Remove an index lock that a killed git left. Call only while holding the workspace's lock."""
        lock = self._path("index.lock")
        if not lock.exists():
            return
        for process in psutil.process_iter(["name", "cwd"]):
            if process.info["name"] == "git" and process.info["cwd"] in (str(self.root), None):
                raise RepositoryError(f"git (process {process.pid}) works in {self.root}; try again when it has ended")
        lock.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        """Where git keeps a file of this work tree: in a linked one `.git` is a file, which names the place."""
        if not (self.root / ".git").is_file():
            return self.root / ".git" / name
        return self.root / self.run("rev-parse", "--git-path", name).stdout.rstrip("\n")

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_absolute() else path)


def _named(revision: str) -> str:
    """`revision`, which must not pass for an option: `--output=FILE` would have git write there."""
    if revision.startswith("-"):
        raise RepositoryError(f"{revision!r} names no commit")
    return revision
