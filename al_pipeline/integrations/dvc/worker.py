"""One DVC process for many commands: reads a JSON line (`["repro", "-s", "train"]`), writes a line with the exit code.

A request that is an object (`{"do": "check"}`) goes to `objects.serve`, and its reply is an object too. A `repro` of
many stages begins each but the first at a request of its own; see `pacing`.

Starting DVC takes about a second, a command in a running process a tenth of that. The process leads its own group, so
that killing the group also ends the stage; it exits when its standard input closes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from types import SimpleNamespace
from typing import Any

from al_pipeline.integrations.dvc.digests import holds
from al_pipeline.integrations.dvc.objects import check_entry, serve
from al_pipeline.integrations.dvc.pacing import Requests, pace_stages
from al_pipeline.integrations.dvc.stage_server import StageServer, fork_stages, has_stages
from al_pipeline.sanitize import redact

_IMPORTED_LATE = (
    "configobj",
    "dulwich.ignore",
    "dulwich.index",
    "dulwich.worktree",
    "dvc.cachemgr",
    "dvc.data_cloud",
    "dvc.dirs",
    "dvc.repo.artifacts",
    "dvc.repo.brancher",
    "dvc.repo.datasets",
    "dvc.repo.graph",
    "dvc.repo.index",
    "dvc.repo.metrics",
    "dvc.repo.open_repo",
    "dvc.repo.params",
    "dvc.repo.plots",
    "dvc.repo.stage",
    "dvc.repo.trie",
    "dvc.repo.worktree",
    "dvc.rwlock",
    "dvc.utils.strictyaml",
    "dvc_data.hashfile._progress",
    "dvc_data.hashfile.db.index",
    "dvc_data.hashfile.db.local",
    "dvc_data.hashfile.status",
    "dvc_data.index.checkout",
    "dvc_data.index.fetch",
    "dvc_data.index.push",
    "dvc_render",
    "flatten_dict",
    "fsspec.implementations.memory",
    "networkx",
    "platformdirs.unix",
    "rich._emoji_codes",
    "rich.json",
    "rich.status",
    "ruamel.yaml.mergevalue",
    "scmrepo.git.backend.dulwich.client",
)
"""Modules that DVC's commands import when they run."""

_LOCK_FILE = "dvc.lock"
_PARSED_TEXTS = 64
"""The number of YAML texts whose parsed form is cached."""


def main() -> None:
    """Serve commands until standard input ends. What DVC and the stages print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout, sys.stderr = _Redacted(sys.stdout), _Redacted(sys.stderr)
    server = StageServer()
    if sys.argv[1:] == ["--stages"] or has_stages():  # a fork of ours forks at once, while it has one thread
        with contextlib.suppress(OSError):  # no dvc.yaml: DVC reports that
            server.start(os.curdir)
    from dvc.cli import main as dvc

    def reply(answer: Any) -> None:
        sys.stdout.flush()
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    change_dvc()
    fork_stages(server)
    requests = Requests(sys.stdin)
    pace_stages(requests, reply)
    for request in requests:
        try:
            answer = serve(request) if isinstance(request, dict) else dvc(request)
        except SystemExit as stop:
            answer = stop.code if isinstance(stop.code, int) else 1
        if not requests.all_replied:
            reply(answer)


def prepare() -> None:
    """Import what DVC's commands import when they run, and what they build once, for the processes forked from here."""
    from dvc.cli.parser import get_main_parser

    change_dvc()
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    get_main_parser()


@cache
def change_dvc() -> None:
    """Make DVC in this process refuse what must not be believed, and do once what it repeats for each stage."""
    guard_folders()
    guard_objects()
    keep_parsed_yaml()
    lock_paths_once()
    keep_state_open()


def guard_folders() -> None:
    """Make DVC refuse a folder whose listing names files outside it.

    The listing (a `.dir` object) comes from the remote, and DVC joins its names to the folder's path, and its digests
    to the cache's, unchecked: it would write `../../.bashrc`. Every listing is loaded by `Tree.from_list`.
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
    """Make DVC verify the digest of everything that it fetches, from every remote.

    That is DVC's setting `verify`, which `al init` writes, but a clone may lack it. DVC never verifies folders'
    listings, and uses them before it has fetched them; here a listing with another digest is a corrupt object.
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


def keep_parsed_yaml() -> None:
    """Make DVC parse and validate each YAML text once, not at every command, and write its own records with libyaml.

    For each stage DVC parses and writes `dvc.lock` in pure Python, to keep comments, which nobody writes in a lock
    file: that was half of a command's time. The text is the same, but for a few quotes and for characters that libyaml
    escapes; DVC does not read all of them back unescaped (U+0085 becomes a blank). It still writes what people comment.
    """
    import dvc.utils.serialize
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml
    from ruamel.yaml.comments import CommentedMap

    parse, dump, validate = _yaml.parse_yaml, _yaml._dump, strictyaml.validate
    parsed: dict[Any, Any] = {}
    valid: dict[str, Any] = {}

    def remember(text: str, data: Any) -> None:
        while len(parsed) >= _PARSED_TEXTS:
            valid.pop(oldest := next(iter(parsed)), None)
            parsed.pop(oldest)
        parsed[text] = data

    def validate_once(data: Any, schema: Any, text: Any = None, *where: Any, **named: Any) -> Any:
        if text not in parsed:
            return validate(data, schema, text, *where, **named)
        if valid.get(text) is not schema:
            validate(data, schema, text, *where, **named)
            valid[text] = schema
        return data  # DVC's `load` goes on with what it gave, not with what it gets

    def parse_once(text: Any, path: Any, typ: str = "safe") -> Any:
        if typ != "safe" and os.path.basename(path) != _LOCK_FILE:
            return parse(text, path, typ)
        if text not in parsed:
            remember(text, parse(text, path))
        return deepcopy(parsed[text])

    def dump_plain(data: Any, stream: Any) -> None:
        if isinstance(data, CommentedMap):
            dump(data, stream)
            return
        written = io.StringIO()
        _plain_yaml().dump(data, written)
        stream.write(written.getvalue())
        remember(written.getvalue(), deepcopy(data))  # what it would be read as

    _yaml.parse_yaml = dvc.utils.serialize.parse_yaml = strictyaml.parse_yaml = parse_once
    _yaml._dump = dump_plain
    strictyaml.validate = validate_once


def lock_paths_once() -> None:
    """Make DVC write to its list of locked paths only for those that this process has not locked already.

    For each stage it locks the same paths about ten times, one within the other, and each time rewrites the list twice.
    """
    import dvc.rwlock as module

    locking: Any = module.rwlock
    reads, writes = set[str](), set[str]()

    @contextlib.contextmanager
    def lock_once(place: Any, fs: Any, cmd: str, read: list[str], write: list[str], hardlink: bool) -> Iterator[None]:
        read = [path for path in read if path not in reads]
        write = [path for path in write if path not in writes]
        if not read and not write:
            yield
            return
        with locking(place, fs, cmd, read, write, hardlink):
            reads.update(read)
            writes.update(write)
            try:
                yield
            finally:
                reads.difference_update(read)
                writes.difference_update(write)

    module.rwlock = lock_once


def _plain_yaml() -> Any:
    """A writer of what DVC's own writes for data without comments."""
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.Representer.add_representer(OrderedDict, yaml.Representer.represent_dict)
    return yaml


def keep_state_open() -> None:
    """Make DVC open its state and read its settings once for a command, not again before and after each stage."""
    from dvc.repo import Repo

    reset = Repo._reset

    def reset_all_else(repo: Any) -> None:
        state, settings = repo.state, repo.__dict__.get("config")
        repo.state = SimpleNamespace(close=lambda: None)
        try:
            reset(repo)
        finally:
            repo.state = state
            if settings is not None:
                repo.__dict__["config"] = settings

    Repo._reset = reset_all_else


class _Redacted:
    """A text stream that removes passwords from URLs."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(redact(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


if __name__ == "__main__":
    main()
