"""One DVC process for many commands: a line of JSON in (`["repro", "-s", "train"]`), a line with the exit code out.

Starting DVC costs about a second, a command in a running one a tenth of it. The process leads a group of its own, so
that a stage outlives no kill of the group; it ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

from al_pipeline.plain import redact

_OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?\Z")


def main() -> None:
    """Serve commands until standard input ends. What DVC and the stages print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout, sys.stderr = _Redacted(sys.stdout), _Redacted(sys.stderr)
    from dvc.cli import main as dvc

    guard_folders()
    for line in sys.stdin:
        try:
            code = dvc(json.loads(line))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
        replies.write(json.dumps(code) + "\n")
        replies.flush()


def guard_folders() -> None:
    """Make DVC refuse a folder whose listing leads out of it.

    The listing (a `.dir` object) comes from the remote, and DVC joins its names to the folder, and its digests to the
    cache, as they are: `../../.bashrc` would be written there. Every way to a listing leads through `Tree.from_list`.
    """
    import dvc_data.hashfile.tree

    tree: Any = dvc_data.hashfile.tree.Tree
    believing = tree.from_list.__func__

    def from_list(cls: Any, entries: list[Any], hash_name: str | None = None) -> Any:
        for entry in entries:
            check_entry(entry)
        return believing(cls, entries, hash_name)

    tree.from_list = classmethod(from_list)


def check_entry(entry: Any) -> None:
    """Raise DvcException unless `entry` of a folder's listing is a file below the folder with a digest of DVC's."""
    from dvc.exceptions import DvcException

    name = entry.get("relpath") if isinstance(entry, dict) else None
    digest = entry.get("md5") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not isinstance(digest, str):
        raise DvcException("the listing of a folder in the DVC remote holds something that is no file")
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or not name.isprintable():
        raise DvcException(f"the listing of a folder in the DVC remote leads out of it: {name!r}; nothing was written")
    if not _OBJECT.match(digest):
        raise DvcException(f"the listing of a folder in the DVC remote holds {digest!r}, which is no digest")


class _Redacted:
    """A text stream that shows no password of an address."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(redact(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


if __name__ == "__main__":
    main()
