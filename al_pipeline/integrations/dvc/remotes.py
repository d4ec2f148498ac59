"""The kinds of DVC remotes, and the package that each one needs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from urllib.parse import urlsplit

from al_pipeline.errors import BadInput
from al_pipeline.sanitize import redact

EXTRAS = {
    "s3": "s3",
    "gs": "gs",
    "azure": "azure",
    "ssh": "ssh",
    "webdav": "webdav",
    "webdavs": "webdav",
    "hdfs": "hdfs",
    "webhdfs": "webhdfs",
    "oss": "oss",
    "gdrive": "gdrive",
}
"""URL scheme -> the extra of this package that installs DVC's plugin for it, the package `dvc-EXTRA`."""

_NO_EXTRA = ("http", "https")
"""Schemes that DVC supports without a plugin."""

_NO_PLUGIN = re.compile(
    r"requires 'dvc-(\w+)' to be installed"
    r"|URL '(\w+)://[^']*' is supported but requires these missing dependencies"
    r"|filesystem for '(\w+)': .* missing dependencies"
)
"""DVC's errors: the plugin is missing; a dependency of the plugin is, as reported by the command line or the API."""

_NO_SCHEME = re.compile(r"Unsupported URL type (\S*?)://")


def check_address(address: str) -> None:
    """Raise BadInput if DVC could not use `address` for a new remote on this machine. Imports no plugin."""
    scheme, _, rest = address.partition(":")
    scheme = scheme.lower()
    if "://" not in address:
        if scheme in (*EXTRAS, *_NO_EXTRA) and rest:
            raise BadInput(
                f"{redact(address)!r} looks like an address but would be a folder: write {scheme}://… for the "
                f"address, ./{redact(address)} for the folder"
            )
        return
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        return  # a folder whose path contains ://
    if scheme not in (*EXTRAS, *_NO_EXTRA):
        raise BadInput(unknown(scheme))
    try:
        place = urlsplit(address).netloc
    except ValueError as error:
        raise BadInput(f"the address {redact(address)!r} of the DVC remote cannot be read: {error}") from None
    if not place:
        raise BadInput(
            f"the address {redact(address)!r} of the DVC remote has no bucket or host: use "
            f"{scheme}://BUCKET-OR-HOST/PATH"
        )
    extra = EXTRAS.get(scheme)
    if extra is not None and find_spec(f"dvc_{extra}") is None:
        raise BadInput(missing(extra))


def explained(said: str) -> str | None:
    """What to do if DVC's message `said` means that it cannot use this kind of remote here; else None."""
    if found := _NO_PLUGIN.search(" ".join(said.split())):
        name = found[1] or found[2] or found[3]
        return missing(EXTRAS.get(name, name))
    if found := _NO_SCHEME.search(said):
        return f"{unknown(found[1])}. `dvc remote list` shows the remotes, `dvc remote modify` changes an address"
    return None


def missing(extra: str) -> str:
    """The message that a plugin is not installed, with the command that installs it."""
    return (
        f"the DVC remote needs the package dvc-{extra}, which is not installed here or cannot be imported: "
        f"`pip install 'al-pipeline[{extra}]'` in the environment that `al` runs in"
    )


def unknown(scheme: str) -> str:
    """The message that DVC does not support a scheme, with those that it supports."""
    known = ", ".join(f"{name}://" for name in (*EXTRAS, *_NO_EXTRA))
    return f"DVC does not support remotes at {scheme}://; use {known}, or the path of a folder"
