"""Remotes: push, fetch and clone, without a password in any argument."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from al_pipeline.errors import RepositoryError
from al_pipeline.integrations.git.history import History
from al_pipeline.integrations.git.runner import NETWORK_TIMEOUT
from al_pipeline.sanitize import has_password

_USER, _PASSWORD = "AL_GIT_USER", "AL_GIT_PASSWORD"
_HELPER = f'!f() {{ test "$1" != get || printf "username=%s\\npassword=%s\\n" "${_USER}" "${_PASSWORD}"; }}; f'
"""A credential helper that reads the environment, which only the same user can see."""

_NO_CONVERSION = "* -text -ident -filter !working-tree-encoding\n"
"""Attributes with which git checks out exactly the stored bytes."""

_KEPT = ("--no-tags", "--no-prune", "--no-prune-tags")
"""A remote's settings could otherwise delete our tags."""

_LOOK_TIMEOUT = 30.0


class Remotes(History):
    """Compares this clone with its remotes, and exchanges commits and tags with them."""

    def remote(self) -> str | None:
        """The remote that rounds are pushed to: the branch's own, else `origin`; None if there is none."""
        remotes = self._read("remote", of_settings=True).stdout.split()
        own = self._ask("config", f"branch.{self.branch()}.remote", of_settings=True)
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
            "push", "--quiet", "--atomic", remote, *whole, timeout=NETWORK_TIMEOUT, more=self._without_password(remote)
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
            self.run("fetch", "--quiet", *_KEPT, remote, *refs, timeout=NETWORK_TIMEOUT, more=more)
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
        self.run("fetch", "--quiet", *_KEPT, remote, name, timeout=NETWORK_TIMEOUT, more=more)
        if (counts := self.ahead_behind(there[1])) is None:
            raise RepositoryError(f"commit {there[1]} of {branch} was fetched from {remote} but is missing; try again")
        return counts[1]

    def clone(self, target: Path, revision: str) -> Self:
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
        self.run(*ours, *command, "--branch", revision, str(self.root), str(target), timeout=NETWORK_TIMEOUT)
        clone = type(self)(target)
        attributes = target / ".git/info/attributes"
        attributes.parent.mkdir(exist_ok=True)
        attributes.write_text(_NO_CONVERSION, encoding="utf-8")
        clone.run("checkout", "--quiet", "HEAD", "--", ".", timeout=NETWORK_TIMEOUT)
        return clone

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
