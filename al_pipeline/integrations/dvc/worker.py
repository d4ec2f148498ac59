"""One DVC process for many commands: a line of JSON in (`["repro", "-s", "train"]`), a line with the exit code out.

A request that is an object (`{"do": "check"}`) goes to `objects.serve`, and its reply is one too.

Starting DVC costs about a second, a command in a running one a tenth of it. The process leads a group of its own, so
that a stage outlives no kill of the group; it ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from al_pipeline.integrations.dvc.digests import holds
from al_pipeline.integrations.dvc.objects import check_entry, serve
from al_pipeline.integrations.dvc.stage_server import fork_stages
from al_pipeline.sanitize import redact


def main() -> None:
    """Serve commands until standard input ends. What DVC and the stages print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout, sys.stderr = _Redacted(sys.stdout), _Redacted(sys.stderr)
    from dvc.cli import main as dvc

    guard_folders()
    guard_objects()
    fork_stages()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            code = serve(request) if isinstance(request, dict) else dvc(request)
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


def guard_objects() -> None:
    """Make DVC compare whatever it fetches with the digest that it asked for, in every remote.

    That is its own setting `verify`, which `al init` writes; a clone may come without it. Of folders' listings DVC
    compares none, and uses them before it has fetched them: here a listing of another digest is a corrupt object.
    """
    import dvc.data_cloud
    import dvc_data.hashfile.tree
    from dvc_objects.errors import ObjectFormatError

    remote: Any = dvc.data_cloud.Remote
    making = remote.__init__

    def init(self: Any, *given: Any, **named: Any) -> None:
        making(self, *given, **{**named, "verify": True})

    remote.__init__ = init
    tree: Any = dvc_data.hashfile.tree.Tree
    believing = tree.load.__func__

    def load(cls: Any, odb: Any, hash_info: Any, hash_name: str | None = None) -> Any:
        obj = odb.get(hash_info.value)
        if obj.fs.protocol != "memory" and not holds(obj.fs.cat_file(obj.path), hash_info.value):
            raise ObjectFormatError(f"{obj} is corrupted")
        return believing(cls, odb, hash_info, hash_name)

    tree.load = classmethod(load)


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
