"""DVC's objects by their bytes: what the cache, the work tree and the remote really hold under a recorded digest.

Runs in DVC's process. DVC itself goes by names: an object that is there counts as right, whatever its bytes, a folder
whose list of files is in the remote counts as complete, and an object that exists is not pushed again.
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

from al_pipeline.integrations.dvc.digests import Digests, holds, listing_bytes, listing_digest

READ_BACK = 64 * 2**20
"""Bytes up to which an object is read back from a remote that is not a folder; of larger ones the size is compared."""

_CHUNK = 2**20
_MARKS = (
    *("ETag", "etag", "md5Hash", "content_md5", "version_id", "versionId", "generation"),
    *("LastModified", "last_modified", "updated", "modified", "mtime", "created", "ino"),
)
"""What a file system may tell of an object that changes with its bytes."""
FOLDERS_NEEDED = ("local", "ssh", "webdav", "webdavs", "hdfs", "webhdfs")
"""Remotes where a file needs its folder to be there; elsewhere making one could make a bucket."""
_NO_BUCKET = re.compile(r"(?i)\b(bucket|container)\b.*\bnot (exist|found)")
"""How stores say that not an object is missing, but what should hold it."""
_LISTING = " (its list of files)"
_OBJECT = re.compile(r"[0-9a-f]{32}(\.dir)?\Z")


@dataclass
class _Object:
    """One recorded object."""

    name: str
    """Where its bytes belong in the workspace."""
    places: list[Path] = field(default_factory=list)
    """Files of this machine that may hold them."""
    data: bytes | None = None
    """The bytes themselves, of a folder's listing that was found."""


def serve(request: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one request (`do` names it) in the repository of the current folder; `error` says what went wrong."""
    actions: dict[str, Callable[[_Objects, Mapping[str, Any]], dict[str, Any]]] = {
        "check": lambda objects, _: objects.check(),
        "where": lambda objects, _: {"absent": objects.absent_folder()},
        "push": lambda objects, _: objects.push(),
        "reach": lambda objects, _: objects.reach(),
        "set aside": lambda objects, asked: {"aside": objects.set_aside(Path(asked["place"]))},
        "compare": lambda objects, _: {"differences": objects.differences()},
    }
    from dvc.repo import Repo

    try:
        with closing(Repo(os.curdir)) as repo, Digests(Path(request["notes"])) as digests:
            objects = _Objects(repo, digests, request.get("targets") or (), request.get("revisions") or ())
            return actions[request["do"]](objects, request)
    except Exception as error:
        return {"error": _said(error)}


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


class _Objects:
    """What the records of a repository name: those of the work tree, or of `revisions` as well."""

    def __init__(self, repo: Any, digests: Digests, targets: Sequence[str], revisions: Sequence[str]) -> None:
        self.repo, self.digests = repo, digests
        self.targets = {target.removesuffix(".dvc") for target in targets}
        self.revisions = list(revisions)
        self.cache = repo.cache.local
        self._remote: Any = None
        self._out_of_reach = False
        """Whether the remote failed when it was asked: each further attempt would wait as long."""

    @property
    def remote(self) -> Any:
        """The default remote's store of objects. Raises what DVC raises where there is none, or none that works."""
        if self._remote is None:
            self._remote = self.repo.cloud.get_remote_odb(command="push")
        return self._remote

    # What is recorded ------------------------------------------------------------------------------------------------

    def _recorded(self) -> Iterator[tuple[str, str, bool]]:
        """Name, digest, and whether the work tree may hold it."""
        for revision in self.repo.brancher(revs=self.revisions or None):
            here = revision in ("", "workspace")
            for out in self.repo.index.outs:
                name = os.path.relpath(out.fs_path, self.repo.root_dir).replace(os.sep, "/")
                digest = out.hash_info.value if out.hash_info else None
                if not out.use_cache or not digest or (self.targets and name not in self.targets):
                    continue
                if _OBJECT.match(digest):
                    yield name, digest, here

    def collect(self) -> dict[str, _Object]:
        """Every recorded object by its digest; files of a folder stand before its listing."""
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
        """The list of a folder's files, from wherever it is whole: the cache, the folder itself, the remote."""
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
        except Exception:  # whoever needs the remote hears it when he looks at it
            self._out_of_reach = True
            return None
        return data if holds(data, digest) else None

    # Here ------------------------------------------------------------------------------------------------------------

    def _holds(self, path: Path, digest: str) -> bool:
        """Whether a file of this machine holds the object's bytes."""
        try:
            return self.digests.file(path) == digest.removesuffix(".dir")
        except FileNotFoundError:
            return False

    def _source(self, digest: str, wanted: _Object) -> Path | bytes | None:
        """Something of this machine that holds the object's bytes."""
        if wanted.data is not None:
            return wanted.data
        return next((path for path in wanted.places if self._holds(path, digest)), None)

    def set_aside(self, folder: Path) -> list[str]:
        """Move objects of the cache whose bytes are others than their name says out of it, into `folder`."""
        moved = []
        for digest, wanted in self.collect().items():
            path = Path(self.cache.oid_to_path(digest))
            if path.is_file() and not self._holds(path, digest):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                target = folder / f"{digest}-{self.digests.file(path)[:8]}"
                _move(path, target)
                moved.append(wanted.name)
        return moved

    def differences(self) -> list[dict[str, Any]]:
        """Files of the work tree that are not what is recorded, each with what cache and remote hold in its place.

        `here`: absent, other, or extra (recorded nowhere); `cache` and `remote`: good, other, absent or unknown;
        `alike`: whether the bytes here are those that the cache or the remote hold under the recorded name.
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
        """The digest of what the remote holds under a name; "" where it holds nothing, None where nobody can tell."""
        try:
            return _read(self.remote.fs, self.remote.oid_to_path(digest))
        except FileNotFoundError:
            return ""
        except Exception:  # whatever a remote's library raises
            return None

    def absent_folder(self) -> str:
        """The path of a remote that is a folder and is not there; else empty."""
        remote = self.repo.cloud.get_remote(command="status")
        return str(remote.path) if remote.fs.protocol == "local" and not os.path.lexists(remote.path) else ""

    # The remote ------------------------------------------------------------------------------------------------------

    def reach(self) -> dict[str, Any]:
        """Ask the remote for one object, if there is any that only it can have: DVC asks for each, again and again.

        Raises what a remote raises that is out of reach, or that does not let us in.
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
        """How many objects are recorded, and which of them the remote does not hold."""
        objects = self.collect()
        return {"checked": len(objects), "defects": self.defects_in_remote(objects)}

    def defects_in_remote(self, objects: Mapping[str, _Object]) -> list[dict[str, Any]]:
        """The objects that the remote lacks, or holds other bytes of: `name`, `object`, `at`, `why`, and whether this
        machine has them (`have`)."""
        odb, names = self.remote, list(objects)
        paths = [odb.oid_to_path(name) for name in names]
        odb.fs.fs.invalidate_cache()
        infos = odb.fs.info(paths, return_exceptions=True, batch_size=odb.fs.jobs) if paths else []
        with ThreadPoolExecutor(max_workers=min(16, odb.fs.jobs)) as pool:
            found = list(pool.map(self._why, names, paths, infos, (objects[name] for name in names)))
        for name, why in zip(names, found, strict=True):
            if not why and name.endswith(".dir") and objects[name].data is None:
                raise OSError(f"the DVC remote holds {objects[name].name} and does not give it; try again")
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
        """What is wrong with an object of the remote; empty where nothing is."""
        if isinstance(info, FileNotFoundError) and not _NO_BUCKET.search(str(info)):
            return "missing"
        if isinstance(info, BaseException):
            raise info
        size = info.get("size")
        if size == 0 and not holds(b"", digest):
            return "empty"
        local = self.remote.fs.protocol == "local"
        if local:
            return "" if self._holds(Path(path), digest) else "other bytes"
        source = self._source(digest, wanted)
        expected = None if source is None else len(source) if isinstance(source, bytes) else source.stat().st_size
        if None not in (expected, size) and size != expected:
            return f"{size:,} bytes of {expected:,}"
        key, mark = self.remote.fs.unstrip_protocol(path), [size, *(str(info.get(name)) for name in _MARKS)]
        found = self.digests.known(key, mark)
        if found is None and (size is None or size <= READ_BACK):
            found = _read(self.remote.fs, path)
            if len(set(mark)) > 2:  # it tells more than a size
                self.digests.remember(key, mark, found)
        return "" if found in (None, digest.removesuffix(".dir")) else "other bytes"

    def push(self) -> dict[str, Any]:
        """Send what the remote lacks or holds other bytes of, proved before it is sent; a listing after its files."""
        objects = self.collect()
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
    """The digest of a remote file, read in pieces."""
    import hashlib

    found = hashlib.md5(usedforsecurity=False)
    with fs.open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            found.update(piece)
    return found.hexdigest()


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError:  # a cache on another disk
        import shutil

        shutil.copyfile(source, target)
        source.unlink()
    with suppress(OSError):
        target.chmod(0o600)


def _said(error: BaseException) -> str:
    """An error's own words, with its cause's where those say more."""
    words: list[str] = []
    while error is not None and len(words) < 3:
        said = " ".join(str(error).split()) or type(error).__name__
        if said not in words:
            words.append(said)
        error = error.__cause__  # type: ignore[assignment]
    return ": ".join(words)[:600]
