"""Verify DVC's objects by content: what the cache, the work tree and the remote really hold under a recorded digest.

Runs in DVC's process. DVC itself checks names only: an object that exists counts as correct whatever its bytes, a
folder whose listing is in the remote counts as complete, and an object that exists is not pushed again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from al_pipeline.integrations.dvc import shared
from al_pipeline.integrations.dvc.digests import Digests, holds, listing_bytes, listing_digest

READ_BACK = 64 * 2**20
"""Largest object, in bytes, that is read back from a remote that is not a folder; above it, only sizes are compared."""

_CHUNK = 2**20
_MARKS = (
    *("ETag", "etag", "md5Hash", "content_md5", "version_id", "versionId", "generation"),
    *("LastModified", "last_modified", "updated", "modified", "mtime", "created", "ino"),
)
"""Metadata of remote file systems that changes with an object's bytes; each has only some of them."""
FOLDERS_NEEDED = ("local", "ssh", "webdav", "webdavs", "hdfs", "webhdfs")
"""Protocols where a file's folder must exist first; with others, creating one could create a bucket."""
_NO_BUCKET = re.compile(r"(?i)\b(bucket|container)\b.*\bnot (exist|found)")
"""Matches the errors for a missing bucket or container, as opposed to a missing object."""
_LISTING = " (its list of files)"
_OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?\Z")


@dataclass
class _Object:
    """One recorded object."""

    name: str
    """The path in the workspace that it is the content of."""
    places: list[Path] = field(default_factory=list)
    """Local files that may hold its content, the cache's last."""
    data: bytes | None = None
    """Its content, if it is a folder's listing that was found."""


def serve(request: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one request (`do` names it) in the repository of the current folder; on failure return `error`."""
    actions: dict[str, Callable[[_Objects, Mapping[str, Any]], dict[str, Any] | None]] = {
        "check": lambda objects, _: objects.check(),
        "where": lambda objects, _: {"absent": objects.absent_folder()},
        "push": lambda objects, asked: objects.push(Path(asked["place"])),
        "reach": lambda objects, _: objects.reach(),
        "set aside": lambda objects, asked: {"aside": objects.set_aside(Path(asked["place"]))},
        "compare": lambda objects, _: {"differences": objects.differences()},
        "track": lambda objects, asked: objects.track(asked["unchanged"]),
        "names of shared": lambda objects, asked: {"names": shared.names(objects.repo, asked["folder"])},
        "fetch shared": lambda objects, asked: shared.fetch(
            objects.repo, asked["folder"], asked["names"], Path(asked["place"])
        ),
        "send shared": lambda objects, asked: shared.send(objects.repo, asked["folder"], Path(asked["place"])),
    }
    from dvc.repo import Repo

    try:
        with closing(Repo(os.curdir)) as repo, Digests(Path(request["notes"])) as digests:
            objects = _Objects(repo, digests, request.get("targets") or (), request.get("revisions") or ())
            return actions[request["do"]](objects, request) or {}
    except Exception as error:
        return {"error": _said(error)}


def check_entry(entry: Any) -> None:
    """Raise DvcException unless `entry` of a folder's listing names a file below the folder and a valid digest."""
    from dvc.exceptions import DvcException

    name = entry.get("relpath") if isinstance(entry, dict) else None
    digest = entry.get("md5") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not isinstance(digest, str):
        raise DvcException("a folder listing in the DVC remote contains an invalid entry")
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or not name.isprintable():
        raise DvcException(
            f"a folder listing in the DVC remote names a path outside the folder: {name!r}; nothing was written"
        )
    if not _OBJECT.match(digest):
        raise DvcException(f"a folder listing in the DVC remote contains {digest!r}, which is not a digest")


class _Objects:
    """The objects that a repository's records name: those of the work tree, and of `revisions` if given."""

    def __init__(self, repo: Any, digests: Digests, targets: Sequence[str], revisions: Sequence[str]) -> None:
        self.repo, self.digests = repo, digests
        self.targets = {target.removesuffix(".dvc") for target in targets}
        self.revisions = list(revisions)
        self.cache = repo.cache.local
        self._remote: Any = None
        self._out_of_reach = False
        """Whether a request to the remote failed: each further attempt would wait as long."""

    @property
    def remote(self) -> Any:
        """The default remote's object store. Raises DVC's error if there is no remote, or it does not work."""
        if self._remote is None:
            self._remote = self.repo.cloud.get_remote_odb(command="push")
        return self._remote

    # What is recorded ------------------------------------------------------------------------------------------------

    def _recorded(self) -> Iterator[tuple[str, str, bool]]:
        """Yield name, digest, and whether the work tree's records name it (else only those of a revision)."""
        for revision in self.repo.brancher(revs=self.revisions or None):
            here = revision in ("", "workspace")
            for out in sorted(self.repo.index.outs, key=lambda out: out.fs_path):  # else in the disk's order
                name = os.path.relpath(out.fs_path, self.repo.root_dir).replace(os.sep, "/")
                digest = out.hash_info.value if out.hash_info else None
                if not out.use_cache or not digest or (self.targets and name not in self.targets):
                    continue
                if _OBJECT.match(digest):
                    yield name, digest, here

    def collect(self) -> dict[str, _Object]:
        """Every recorded object by its digest; a folder's files come before its listing."""
        found: dict[str, _Object] = {}
        for name, digest, here in self._recorded():
            path = Path(self.repo.root_dir, name)
            if digest.endswith(".dir"):
                data = self._listing(digest, path if here else None)
                for entry in json.loads(data) if data else ():
                    check_entry(entry)
                    inner = f"{name}/{entry['relpath']}"
                    self._add(found, entry["md5"], inner, path / entry["relpath"] if here else None)
                self._add(found, digest, f"{name}{_LISTING}", None).data = data
            else:
                self._add(found, digest, name, path if here else None)
        return found

    def _add(self, found: dict[str, _Object], digest: str, name: str, place: Path | None) -> _Object:
        known = found.get(digest)
        if known is None:
            known = found[digest] = _Object(name, [Path(self.cache.oid_to_path(digest))])
        if place is not None:
            known.places.insert(0, place)
        return known

    def _listing(self, digest: str, folder: Path | None) -> bytes | None:
        """A folder's listing, from the first intact source: the cache, the folder itself, the remote; else None."""
        with suppress(OSError):
            cached = Path(self.cache.oid_to_path(digest)).read_bytes()
            if holds(cached, digest):
                return cached
        if folder is not None and folder.is_dir():
            listing = self.digests.listing(folder)
            if listing_digest(listing) == digest:
                return listing_bytes(listing)
        if self._out_of_reach:
            return None
        try:
            data: bytes = self.remote.fs.cat_file(self.remote.oid_to_path(digest))
        except FileNotFoundError:
            return None
        except Exception:  # calls that need the remote raise this error themselves
            self._out_of_reach = True
            return None
        return data if holds(data, digest) else None

    # Here ------------------------------------------------------------------------------------------------------------

    def _holds(self, path: Path, digest: str) -> bool:
        """Whether a local file holds the object's content."""
        try:
            return self.digests.file(path) == digest.removesuffix(".dir")
        except FileNotFoundError:
            return False

    def _source(self, digest: str, wanted: _Object) -> Path | bytes | None:
        """The object's content on this machine, as a file or bytes; None if it is not here."""
        if wanted.data is not None:
            return wanted.data
        return next((path for path in wanted.places if self._holds(path, digest)), None)

    def track(self, unchanged: Mapping[str, str]) -> dict[str, Any]:
        """Have DVC record the targets as they are now and copy them to its cache.

        Those in `unchanged`, which maps a target to its recorded digest, only if the cache lacks something of them:
        DVC's `add` does much even for data that did not change.
        """
        changed = sorted(name for name in self.targets if not self._is_cached(unchanged.get(name, "")))
        if changed:
            self.repo.add(changed)
        return {"added": changed}

    def _is_cached(self, digest: str) -> bool:
        """Whether the cache has an object of this digest, and all files that it lists."""
        try:
            path = Path(self.cache.oid_to_path(digest)) if digest else None
            listing = json.loads(path.read_bytes()) if path and digest.endswith(".dir") else []
            files = [Path(self.cache.oid_to_path(entry["md5"])) for entry in listing]
        except (OSError, ValueError, TypeError, KeyError):  # lost, or damaged
            return False
        return path is not None and all(one.is_file() for one in (path, *files))

    def set_aside(self, folder: Path, objects: Mapping[str, _Object] | None = None) -> list[str]:
        """Move cache objects whose content does not match their name to `folder`; return their workspace paths.

        `objects`: what `collect` returned, if it is known.
        """
        moved = []
        for digest, wanted in (self.collect() if objects is None else objects).items():
            path = Path(self.cache.oid_to_path(digest))
            if path.is_file() and not self._holds(path, digest):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                target = folder / f"{digest}-{self.digests.file(path)[:8]}"
                _move(path, target)
                moved.append(wanted.name)
        return moved

    def differences(self) -> list[dict[str, Any]]:
        """Files of the work tree that differ from the record, with what cache and remote hold under its digest.

        `here`: absent, other, extra (not recorded) or unknown; `cache` and `remote`: good, other, absent or unknown;
        `alike`: whether the bytes here are those that the cache or the remote holds under the recorded digest.
        """
        rows: list[dict[str, Any]] = []
        for digest, wanted in self.collect().items():
            if digest.endswith(".dir"):
                if wanted.data is None:
                    unknown = dict.fromkeys(("here", "cache", "remote"), "unknown")
                    rows.append({"name": wanted.name, "object": digest, "alike": False, **unknown})
                else:
                    rows += self._extra(wanted.name.removesuffix(_LISTING), wanted.data)
                continue
            for place in wanted.places[:-1]:
                if self._holds(place, digest):
                    continue
                here = self.digests.file(place) if place.is_file() else None
                cached = Path(self.cache.oid_to_path(digest))
                cache = self.digests.file(cached) if cached.is_file() else None
                remote = self._digest_in_remote(digest)
                rows.append(
                    {
                        "name": place.relative_to(self.repo.root_dir).as_posix(),
                        "object": digest,
                        "here": "absent" if here is None else "other",
                        "cache": "absent" if cache is None else "good" if cache == digest else "other",
                        "remote": {digest: "good", "": "absent", None: "unknown"}.get(remote, "other"),
                        "alike": here is not None and here in (cache, remote),
                    }
                )
        return rows

    def _extra(self, folder: str, data: bytes) -> list[dict[str, Any]]:
        known = {entry["relpath"] for entry in json.loads(data)}
        root = Path(self.repo.root_dir, folder)
        names = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file())
        return [
            {
                "name": f"{folder}/{name}",
                "object": "",
                "here": "extra",
                "cache": "absent",
                "remote": "absent",
                "alike": False,
            }
            for name in names
            if name not in known
        ]

    def _digest_in_remote(self, digest: str) -> str | None:
        """The digest of what the remote holds under a name; "" if it holds nothing, None if it cannot be read."""
        try:
            return _read(self.remote.fs, self.remote.oid_to_path(digest))
        except FileNotFoundError:
            return ""
        except Exception:  # whatever a remote's library raises
            return None

    def absent_folder(self) -> str:
        """The path of the default remote if it is a folder that does not exist; else empty."""
        remote = self.repo.cloud.get_remote(command="status")
        return str(remote.path) if remote.fs.protocol == "local" and not os.path.lexists(remote.path) else ""

    # The remote ------------------------------------------------------------------------------------------------------

    def reach(self) -> dict[str, Any]:
        """Ask the remote for one object that the cache lacks, if any: DVC would ask for each one, with retries.

        Raises the remote's error if it is unreachable or denies access.
        """
        for _, digest, _ in self._recorded():
            if not Path(self.cache.oid_to_path(digest)).is_file():
                (info,) = self.remote.fs.info([self.remote.oid_to_path(digest)], return_exceptions=True)
                if isinstance(info, Exception) and (
                    not isinstance(info, FileNotFoundError) or _NO_BUCKET.search(str(info))
                ):
                    raise info
                break
        return {}

    def check(self) -> dict[str, Any]:
        """The number of recorded objects (`checked`), and the `defects` among them in the remote."""
        objects = self.collect()
        return {"checked": len(objects), "defects": self.defects_in_remote(objects)}

    def defects_in_remote(self, objects: Mapping[str, _Object]) -> list[dict[str, Any]]:
        """The objects that the remote lacks or holds with other bytes: `name`, `object`, `at`, `why`, `have`.

        `have`: whether this machine has the content. Raises OSError if the remote does not return a listing.
        """
        odb, names = self.remote, list(objects)
        paths = [odb.oid_to_path(name) for name in names]
        odb.fs.fs.invalidate_cache()
        infos = odb.fs.info(paths, return_exceptions=True, batch_size=odb.fs.jobs) if paths else []
        with ThreadPoolExecutor(max_workers=min(16, odb.fs.jobs)) as pool:
            found = list(pool.map(self._why, names, paths, infos, (objects[name] for name in names)))
        for name, why in zip(names, found, strict=True):
            if not why and name.endswith(".dir") and objects[name].data is None:
                raise OSError(f"the DVC remote lists {objects[name].name} but does not deliver it; try again")
        return [
            {
                "name": objects[name].name,
                "object": name,
                "at": odb.fs.unstrip_protocol(path),
                "why": why,
                "have": self._source(name, objects[name]) is not None,
            }
            for name, path, why in zip(names, paths, found, strict=True)
            if why
        ]

    def _why(self, digest: str, path: str, info: Any, wanted: _Object) -> str:
        """What is wrong with an object in the remote; empty if nothing is."""
        if isinstance(info, FileNotFoundError) and not _NO_BUCKET.search(str(info)):
            return "missing"
        if isinstance(info, BaseException):
            raise info
        size = info.get("size")
        if size == 0 and not holds(b"", digest):
            return "empty"
        local = self.remote.fs.protocol == "local"
        if local:
            return "" if self._holds(Path(path), digest) else "wrong content"
        source = self._source(digest, wanted)
        expected = None if source is None else len(source) if isinstance(source, bytes) else source.stat().st_size
        if None not in (expected, size) and size != expected:
            return f"{size:,} bytes of {expected:,}"
        key, mark = self.remote.fs.unstrip_protocol(path), [size, *(str(info.get(name)) for name in _MARKS)]
        found = self.digests.known(key, mark)
        if found is None and (size is None or size <= READ_BACK):
            found = _read(self.remote.fs, path)
            if len(set(mark)) > 2:  # more than the size is known
                self.digests.remember(key, mark, found)
        return "" if found in (None, digest.removesuffix(".dir")) else "wrong content"

    def push(self, damaged: Path) -> dict[str, Any]:
        """Upload what the remote lacks or holds with other bytes, verified first; listings after their files.

        Damaged objects of the cache are moved to `damaged` before.
        """
        objects = self.collect()
        self.set_aside(damaged, objects)
        defects = self.defects_in_remote(objects)
        ready = [row["object"] for row in defects if row["have"]]
        odb = self.remote
        if odb.fs.protocol in FOLDERS_NEEDED:
            for folder in sorted({odb.fs.parent(odb.oid_to_path(digest)) for digest in ready}):
                odb.fs.makedirs(folder, exist_ok=True)
        for listings in (False, True):
            with ThreadPoolExecutor(max_workers=min(16, odb.fs.jobs)) as pool:
                names = [digest for digest in ready if digest.endswith(".dir") == listings]
                list(pool.map(self._send, names, (objects[name] for name in names)))
        return {
            "sent": len(ready),
            "defects": self.defects_in_remote({row["object"]: objects[row["object"]] for row in defects}),
        }

    def _send(self, digest: str, wanted: _Object) -> None:
        source, path = self._source(digest, wanted), self.remote.oid_to_path(digest)
        if isinstance(source, Path):
            self.remote.fs.put_file(os.fspath(source), path)
        elif source is not None:
            if self.remote.fs.protocol == "local":
                from al_pipeline.files import write_bytes

                write_bytes(Path(path), source)
            else:
                self.remote.fs.pipe_file(path, source)
        if self.remote.fs.protocol == "local":
            self.remote.protect(path)


def _read(fs: Any, path: str) -> str:
    """The MD5 digest of a remote file, read in chunks."""
    import hashlib

    found = hashlib.md5(usedforsecurity=False)
    with fs.open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            found.update(piece)
    return found.hexdigest()


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError:  # the cache is on another disk
        import shutil

        shutil.copyfile(source, target)
        source.unlink()
    with suppress(OSError):
        target.chmod(0o600)


def _said(error: BaseException) -> str:
    """The error's message, followed by its causes' if they differ."""
    words: list[str] = []
    while error is not None and len(words) < 3:
        said = " ".join(str(error).split()) or type(error).__name__
        if said not in words:
            words.append(said)
        error = error.__cause__  # type: ignore[assignment]
    return ": ".join(words)[:600]
