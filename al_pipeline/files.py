"""Atomic, durable writes: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from al_pipeline.errors import BadInput

TEMPORARY_PREFIX = ".al-tmp-"
SETTLED_NS = 50_000_000
"""A file that changed less than this long ago may change again without a new timestamp (clock granularity)."""
LARGEST_LOG, KEPT_LOG = 20 * 2**20, 2**20
"""Defaults of `bound_log`, in bytes."""
_STALE_SECONDS = 24 * 3600
"""The age from which temporary files count as leftovers where no lock says whether their writers live."""
_CANNOT_LOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_CANNOT_SYNC = {errno.EINVAL, errno.EROFS, errno.ENOTSUP, errno.EBADF}


def make_folder(path: Path) -> Path:
    """Create `path` and its missing parents, and return it; inside a private folder (0700) they are private too."""
    if not path.is_dir():
        parent = make_folder(path.parent)
        private = not parent.stat().st_mode & 0o077
        path.mkdir(mode=0o700 if private else 0o777, exist_ok=True)
        if private:
            path.chmod(0o700)
        sync(parent)
    return path


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, else it is deleted.

    The default `mode` is 0644, and 0600 in a private folder.
    """
    make_folder(path.parent)
    mode = _default_mode(path.parent) if mode is None else mode
    with _claimed(lambda: tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix=path.suffix, dir=path.parent)) as temporary:
        try:
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new private folder in `parent`; at the end it is deleted, if it was not renamed."""

    def make() -> tuple[int, str]:
        name = tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent)
        return os.open(name, os.O_RDONLY), name

    with _claimed(make) as folder:
        try:
            yield folder
        finally:
            if folder.exists():
                shutil.rmtree(folder)


@contextmanager
def _claimed(make: Callable[[], tuple[int, str]]) -> Iterator[Path]:
    """Make a temporary file or folder, and hold a lock on it, which says that its writer lives.

    `make` returns an open descriptor and the path.
    """
    handle, name = make()
    while True:
        with contextlib.suppress(OSError):  # a file system without locks: only old ones are leftovers
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name), os.fstat(handle)):
                break
        os.close(handle)  # `remove_leftovers` of another process came between
        handle, name = make()
    try:
        yield Path(name)
    finally:
        os.close(handle)


def _default_mode(folder: Path) -> int:
    return 0o644 if folder.stat().st_mode & 0o077 else 0o600


def write_bytes(path: Path, data: bytes, mode: int | None = None) -> None:
    """Replace the content of `path` atomically."""
    with replacing(path, mode) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, mode: int | None = None) -> None:
    """Replace the content of `path` atomically, as UTF-8."""
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, value: Any, mode: int | None = None) -> None:
    """Replace `path` by `value` as JSON with sorted keys, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n", mode)


def bound_log(path: Path, limit: int = LARGEST_LOG, keep: int = KEPT_LOG) -> None:
    """Truncate a log larger than `limit` bytes; its last `keep` bytes go to a file beside it with the suffix `.old`.

    Its writers must have opened it for appending: they then continue at the new end.
    """
    if not path.exists() or path.stat().st_size <= limit:
        return
    with path.open("rb") as log:
        log.seek(-keep, os.SEEK_END)
        write_bytes(path.with_name(f"{path.name}.old"), log.read(), 0o600)
    os.truncate(path, 0)


def read_json(path: Path, default: Any = None) -> Any:
    """The JSON value in `path`, or `default` if the file does not exist. Raises BadInput if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError):
        raise _damaged(path) from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty if the file does not exist. Raises BadInput if it holds anything else."""
    found = read_json(path, {})
    if not isinstance(found, dict):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> BadInput:
    return BadInput(
        f"{path} does not contain valid JSON of the expected form: it is damaged or was edited by hand. If git tracks "
        f"it, `git checkout -- {path}` restores it; otherwise delete it"
    )


def json_line(value: Any) -> str:
    """One line of canonical JSON: sorted keys, no whitespace, no NaN."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace `path` by one line of canonical JSON per row."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json_line(row) for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of `path`; empty if the file does not exist."""
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []


def sha256_bytes(data: bytes) -> str:
    """The SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(root: Path) -> str:
    """One SHA-256 over the names and contents of all files below `root` (or of `root` itself, if a file)."""
    if root.is_file():
        return sha256_file(root)
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def disk_usage(path: Path) -> int:
    """The bytes that a file, or everything below a folder, takes on disk; follows no links, skips vanished files."""
    found: dict[tuple[int, int], int] = {}
    todo = [path]
    while todo:
        place = todo.pop()
        try:
            one = place.lstat()
            if stat.S_ISDIR(one.st_mode):
                todo += [Path(entry) for entry in os.scandir(place)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        found[one.st_dev, one.st_ino] = one.st_blocks * 512
    return sum(found.values())


def remove_tree(path: Path) -> None:
    """Delete a file, or a folder with its contents; it disappears atomically. A link is deleted, not followed.

    If killed, this leaves a folder whose name begins with TEMPORARY_PREFIX, which can be passed to it again.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if not path.name.startswith(TEMPORARY_PREFIX):
        aside = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
        path = path.rename(aside / path.name).parent
    shutil.rmtree(path)


def move(source: Path, target: Path) -> None:
    """Move a file to another folder of the same file system, durably: a power cut cannot undo it."""
    make_folder(target.parent)
    source.chmod(_default_mode(target.parent))
    source.replace(target)
    sync(target.parent)
    sync(source.parent)


def remove_leftovers(*folders: Path) -> None:
    """Delete temporary files and folders in `folders` whose writers were killed; those of living ones stay."""
    for folder in folders:
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # its writer, or another process, was faster
                _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Delete a temporary file or folder, unless its writer lives."""
    kind = path.lstat()
    if stat.S_ISDIR(kind.st_mode) or stat.S_ISREG(kind.st_mode):
        # To lock a file on NFS it must be open for writing.
        handle = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if stat.S_ISDIR(kind.st_mode) else os.O_RDWR))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(path)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _CANNOT_LOCK:
                raise
            if kind.st_mtime < time.time() - _STALE_SECONDS:
                remove_tree(path)
        finally:
            os.close(handle)
    else:
        path.unlink()


def sync(file: Path | str | int) -> None:
    """Flush a file's bytes, or a folder's entries, to disk (fsync), before anything refers to them.

    Does nothing on a file system that does not support it; disk errors are raised.
    """
    handle = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        if not isinstance(file, int):
            os.close(handle)


def sync_names(files: Iterable[Path | str]) -> None:
    """Flush the directory entries of `files`, and of their parent folders on the same file system, to disk."""
    done: set[str] = set()
    for file in files:
        folder = os.path.dirname(os.path.realpath(file))
        device = os.stat(folder).st_dev
        while folder not in done and os.stat(folder).st_dev == device:
            done.add(folder)
            try:
                sync(folder)
            except PermissionError:  # somebody else's folder, in which we created nothing
                break
            folder = os.path.dirname(folder)
