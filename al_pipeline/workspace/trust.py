"""Trust in a workspace's files that control programs: a workspace may have been cloned from anybody.

DVC runs the commands of `dvc.yaml`, writes where its `.dvc` files point and, for some remotes, runs programs that
`.dvc/config` names. DVC is therefore started only if these files are as this engine writes them, or as the user has
accepted them on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import unified_diff
from importlib.resources import files
from pathlib import Path

from al_pipeline.errors import UnexpectedChange
from al_pipeline.files import read_object, sha256_bytes, write_json
from al_pipeline.sanitize import has_password, redact
from al_pipeline.workspace.home import al_home, check_unshared, private_folder
from al_pipeline.workspace.layout import Layout

_POINTER = re.compile(
    rb"outs:\n- md5: [0-9a-f]{32}\.dir\n(?:  (?:size|nfiles): \d+\n|  hash: md5\n)*  path: (?P<name>[\w.-]+)\n"
)
"""A `.dvc` file as `dvc add` writes it for a folder: one output beside it, no other source, no command."""

_SECTION = re.compile(r"\[(core|cache|'remote \"[\w.-]+\"')\]")
_SETTING = re.compile(r"""([a-z_]+)\s*=\s*(?:[^'"].*|"[^"]*"|'[^']*'|'{3}(?:(?!'{3}).)*'{3}|"{3}(?:(?!"{3}).)*"{3})?""")
"""A setting on one line: a value of several lines could hide another setting."""

_HARMLESS = frozenset(
    {
        "account_name", "acl", "allow_agent", "allow_anonymous_login", "analytics", "ask_passphrase", "ask_password",
        "auth", "autostage", "check_update", "checksum_jobs", "connect_timeout", "endpointurl", "gss_auth",
        "hardlink_lock", "jobs", "listobjects", "max_sessions", "method", "no_traverse", "port", "profile",
        "projectname", "protected", "read_timeout", "region", "remote", "shared", "slow_link_warning", "sse",
        "ssl_verify", "timeout", "type", "url", "use_ssl", "user", "verify",
    }
)  # fmt: skip
"""Settings of DVC that name no program, no file to read, no secret and no place outside the remote."""

_SECRET = re.compile(
    r"(?i)^(\s*[a-z_]*(?:password|passphrase|secret|token|access_key|account_key|connection_string))\s*=.*"
)
"""A setting whose value is not shown."""

_OURS = frozenset(
    {
        ".al", ".dvc", ".dvcignore", ".gitattributes", ".gitignore", "al-workspace.json", "data", "dvc.lock",
        "dvc.yaml", "engine.json", "models", "params.yaml", "plugins", "reports", "rounds",
    }
)  # fmt: skip
"""Names in a workspace's root that the engine uses."""

_STORE = "trusted.json"
"""The digests of accepted files, in `al`'s home."""

_LINK, _SUBMODULE = "120000", "160000"
_MACHINES_OWN = (".dvc/cache", ".dvc/tmp", ".dvc/config.local")
_SHARED = "/reports/"
"""Ignored by git, but harmless if a team commits it."""


def template(name: str) -> str:
    """This engine's text of a file that every workspace starts with (`params.yaml`, `dvc.yaml`)."""
    packaged = files("al_pipeline") / "template" / name
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[2] / name).read_text(encoding="utf-8")


def check_dvc(root: Path) -> None:
    """Raise UnexpectedChange if a file that controls DVC is neither this engine's nor accepted by the user.

    Raises UnsafeFolder if others than the user could have accepted it.
    """
    accepted: frozenset[str] | None = None
    for name, problem in _doubts(Layout(root)):
        accepted = accepted if accepted is not None else _accepted()
        if _digest(root / name) not in accepted:
            raise UnexpectedChange(
                f"{name} {problem}. If this workspace comes from somebody else, inspect the file first; if you know "
                "the reason, `al trust` shows the change and lets DVC use it on this machine"
            )


def doubtful(root: Path) -> dict[str, str]:
    """The files that control DVC and that `accept` would have to accept: name -> problem."""
    accepted = _accepted()
    return {name: problem for name, problem in _doubts(Layout(root)) if _digest(root / name) not in accepted}


def changes(root: Path, name: str) -> list[str]:
    """The lines of a file that controls DVC, or of its diff to this engine's own, without secrets."""
    lines = (root / name).read_bytes().decode("utf-8", "replace").splitlines()
    if name != "dvc.yaml":
        return [_SECRET.sub(r"\1 = ***", redact(line)) for line in lines]
    return list(unified_diff(template(name).splitlines(), lines, "the engine's", "this workspace's", n=1, lineterm=""))


def holds_secret(config: Path) -> bool:
    """Whether one of DVC's configuration files holds a secret."""
    if not config.exists():
        return False
    lines = config.read_bytes().decode("utf-8", "replace").splitlines()
    return any(_SECRET.match(line) or has_password(line) for line in lines)


def accept(root: Path) -> None:
    """Accept the files that control DVC as they are now; recorded by content, outside the workspace."""
    _accept({_digest(root / name) for name in doubtful(root)})


def is_accepted(content: bytes) -> bool:
    """Whether the user has accepted these bytes. Raises UnsafeFolder if others than the user could have."""
    return sha256_bytes(content) in _accepted()


def accept_contents(contents: Iterable[bytes]) -> None:
    """Accept bytes that stand for code, such as a plug-in's; recorded by digest, outside the workspace."""
    _accept({sha256_bytes(content) for content in contents})


def check_tree(modes: Mapping[str, str], layout: Layout) -> None:
    """Raise UnexpectedChange if git holds links out of the workspace, or files that belong to DVC or one machine.

    `modes`: git's mode of every file of the commit, by name.
    """
    ignored = tuple(line.strip("/") for line in layout.ignored if line != _SHARED)
    for name, mode in modes.items():
        if mode in (_LINK, _SUBMODULE) and name.partition("/")[0] in _OURS:
            raise UnexpectedChange(
                f"{name} is a {'symbolic link' if mode == _LINK else 'submodule'} in git where the workspace keeps "
                "its own files, and could lead anywhere; replace it by a file or folder and commit that"
            )
        if any(name == place or name.startswith(f"{place}/") for place in (*ignored, *_MACHINES_OWN)):
            raise UnexpectedChange(
                f"git tracks {name}, which belongs to DVC or to a single machine; remove it with `git rm -r --cached "
                f"{name}` and a commit"
            )


def _doubts(layout: Layout) -> Iterator[tuple[str, str]]:
    if layout.dvc_yaml.exists() and _unix(layout.dvc_yaml.read_bytes()) != template("dvc.yaml").encode():
        yield "dvc.yaml", "differs from this engine's, and DVC runs the commands in it"
    for source, pointer in zip(layout.sources, layout.pointers, strict=True):
        if pointer.exists():
            found = _POINTER.fullmatch(_unix(pointer.read_bytes()))
            if found is None or found["name"].decode() != source.name:
                yield (
                    f"{pointer.relative_to(layout.root)}",
                    "differs from what `dvc add` writes, and DVC could write elsewhere",
                )
    config = layout.root / ".dvc/config"
    if config.exists() and (line := odd_setting(config.read_bytes().decode("utf-8", "replace"))):
        yield (
            ".dvc/config",
            f"contains `{line}`: a setting that names a secret, a program or a file belongs in .dvc/config.local "
            "(`dvc config --local`, `dvc remote modify --local`), which git does not track",
        )


def _unix(text: bytes) -> bytes:
    """`text` with Unix line ends, which git may have converted on checkout."""
    return text.replace(b"\r\n", b"\n")


def odd_setting(text: str) -> str | None:
    """The name of the first setting that is not on the list of harmless ones; None if all are."""
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#") or _SECTION.fullmatch(line):
            continue
        found = _SETTING.fullmatch(line)
        if found is None or found[1] not in _HARMLESS:
            return line.partition("=")[0].strip()[:60]
        if has_password(line):
            return f"{found[1]} with a password"
    return None


def _accept(new: set[str]) -> None:
    if new:
        write_json(private_folder(al_home()) / _STORE, {"sha256": sorted(new | _accepted())}, mode=0o600)


def _digest(path: Path) -> str:
    """Digest of name and content, so that a file is not accepted under another name."""
    return sha256_bytes(f"{path.name}\0".encode() + path.read_bytes())


def _accepted() -> frozenset[str]:
    store = al_home() / _STORE
    check_unshared(store)
    found = read_object(store).get("sha256", [])
    return frozenset(found if isinstance(found, list) else ())
