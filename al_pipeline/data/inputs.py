"""Users' input files: which files a name stands for, their format, and access to their bytes.

A name stands for a file, the files of a folder, or standard input, alike in all commands. An unusable file is a
BadInput; rows are read elsewhere (`tables.py`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple, get_args

from msgspec import Struct
from msgspec.structs import replace

from al_pipeline.data.encodings import known
from al_pipeline.errors import BadInput, UsageError
from al_pipeline.records import shown_text

Format = Literal["csv", "jsonl", "parquet", "xlsx"]
WANTED = "CSV, JSONL, Parquet or XLSX"
STANDARD_INPUT = Path("-")
HEAD_BYTES = 64 * 1024

_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
}
_NOT_TABLES = {
    b"\xd0\xcf\x11\xe0": "is an old or protected Excel workbook; save it as .xlsx without a password, or as CSV",
    b"%PDF": f"is a PDF, not a table ({WANTED})",
    b"BZh": "is compressed with bzip2; unpack it, or compress it with gzip",
    b"\xfd7zXZ": "is compressed with xz; unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it, or compress it with gzip",
    b"ARROW1": "is an Arrow file; save it as Parquet",
    b"SQLite format 3": "is an SQLite database; export the table as CSV",
}
_GZIP = b"\x1f\x8b"
_ZIP = b"PK\x03\x04"

LARGEST_RATIO = 200
"""Highest compression ratio of a file that unpacks into more than SMALL bytes. Texts reach about 20."""
SMALL = 256 * 1024 * 1024
_SPARE_BYTES = 512 * 1024 * 1024
"""Bytes that a spooled pipe leaves free on the disk of temporary files."""


class Stamp(NamedTuple):
    """A file's `stat` values that reveal, without reading it, that it was written to or replaced."""

    size: int
    modified: int
    """mtime in nanoseconds since 1970; programs can set it."""
    changed: int
    """ctime in nanoseconds since 1970: the last change of content, name or permissions; programs cannot set it."""
    inode: int

    @property
    def last_change(self) -> float:
        """The later of mtime and ctime, in seconds since 1970."""
        return max(self.modified, self.changed) / 1e9


class Source(Struct, frozen=True):
    """A file to read. `format` and `encoding` are as the user declares them; None: detected from the content."""

    path: Path
    name: str = ""
    """Its name in messages; empty: its path."""
    format: Format | None = None
    encoding: str | None = None
    stamp: Stamp | None = None
    """The stamp that the file must have before and after it is read; None: the one it has before."""

    def __str__(self) -> str:
        return shown_text(self.name or str(self.path))


@dataclass
class Inputs:
    """The files that the user's names stand for, in the order given, those of a folder sorted by name."""

    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Files of a folder that are not read."""


def check_encoding(name: str | None) -> str | None:
    """Python's name of an encoding that a user typed. Raises UsageError for an unknown name."""
    if not name:
        return None
    first, *second = (known(part.strip()) for part in name.split("+"))
    if first is None or None in second or len(second) > 1 or (second and first != known("utf-8")):
        raise UsageError(
            f"unknown encoding {name!r}; common ones are utf-8, utf-16, cp1252, latin-1, cp1250, cp1251, koi8-r, "
            "shift_jis, gb18030, and utf-8+cp1252 for a file that mixes the two"
        )
    return "+".join(filter(None, (first, *second)))


@contextmanager
def open_inputs(
    names: Sequence[Path | Source], format: str | None = None, encoding: str | None = None
) -> Iterator[Inputs]:
    """The files that `names` stand for; `-` is standard input, spooled to a private file (0600) until the context ends.

    Raises BadInput if a folder or standard input cannot be read, UsageError for an unknown format or encoding.
    """
    if format is not None and format not in get_args(Format):
        raise UsageError(f"unknown format {format!r}; choose from {', '.join(get_args(Format))}")
    common = Source(Path(), format=format, encoding=check_encoding(encoding))  # type: ignore[arg-type]
    if list(names).count(STANDARD_INPUT) > 1:
        raise UsageError("standard input (-) can be read only once")
    found = Inputs()
    spool: str | None = None
    try:
        for name in names:
            if isinstance(name, Source):
                found.sources.append(name)
            elif name == STANDARD_INPUT:
                spool = tempfile.mkdtemp(prefix="al-stdin-")  # 0700
                found.sources.append(replace(common, path=_spool(Path(spool) / "stdin"), name="standard input"))
            elif name.is_dir():
                _list_folder(name, common, found)
            else:
                found.sources.append(replace(common, path=name))
        yield found
    finally:
        if spool is not None:
            shutil.rmtree(spool, ignore_errors=True)


def _spool(path: Path) -> Path:
    """Copy standard input into a file (0600), leaving _SPARE_BYTES free on its disk."""
    source = sys.stdin.buffer
    if source.isatty():
        raise UsageError("standard input is a terminal; pipe a file into it: `… - < FILE`")
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "wb") as out:
        while block := source.read(1024 * 1024):
            if shutil.disk_usage(path.parent).free < _SPARE_BYTES + len(block):
                raise BadInput(
                    f"{path.parent.parent} has no room for standard input; save the input to a file, or set TMPDIR"
                )
            out.write(block)
    return path


def _list_folder(folder: Path, common: Source, found: Inputs) -> None:
    """Add the files directly in `folder` whose names end like a table's; hidden files are ignored."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    except OSError as error:
        raise BadInput(f"{folder} cannot be read: {error.strerror or error}") from None
    files = [entry for entry in entries if format_by_name(entry.name) is not None and not entry.is_dir()]
    if not files:
        raise BadInput(f"{folder} contains no file to read ({WANTED}, by file extension)")
    if others := [shown_text(entry.name) for entry in entries if entry not in files]:
        shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
        found.notes.append(
            f"{folder}: {len(others):,} entries not read (folders, or files without the extension of a table): {shown}"
        )
    found.sources += [replace(common, path=entry) for entry in files]


def is_hidden(name: str) -> bool:
    """Whether a file's name is that of a hidden or auxiliary file: `._x.csv` (macOS), `.#x` (Emacs), `~$x.xlsx`."""
    return name.startswith((".", "~$", "#")) or name.endswith("~")


def format_by_name(name: str) -> Format | None:
    """The format by a file's extension, ignoring a final `.gz`."""
    path = Path(name.lower())
    if path.suffix == ".gz":
        path = path.with_suffix("")
    return _SUFFIXES.get(path.suffix)


def open_regular(source: Source) -> IO[bytes]:
    """Open a regular file without blocking. Raises BadInput, also for a pipe or a device."""
    try:
        handle = os.open(source.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadInput(f"{source} does not exist; check the name") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise BadInput(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise BadInput(f"{source} is a folder; name the files in it ({WANTED})")
        raise BadInput(f"{source} is not a regular file; pipe it in with `-`: `cat {source} | al … -`")
    return open(handle, "rb")


def stamp_of(path: Path) -> Stamp:
    """The present stamp of a file. Raises OSError."""
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def digest_of(source: Source) -> str:
    """The SHA-256 of a file's bytes, in hex. Raises BadInput if it is not a regular file or cannot be read."""
    with open_regular(source) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise BadInput(f"{source} cannot be read: {error.strerror or error}") from None


def read_head(source: Source) -> bytes:
    """The first HEAD_BYTES of a file, decompressed if it is gzip. Raises BadInput if it cannot be a table."""
    with open_regular(source) as file:
        head = _read(source, file, HEAD_BYTES)
    if not head:
        raise BadInput(f"{source} is empty; it must be a table with a header ({WANTED})")
    if head.startswith(_GZIP):
        with open_bytes(source) as file:
            head = _read(source, file, HEAD_BYTES)
        if not head:
            raise BadInput(f"{source} is empty after unpacking; it must be a table with a header ({WANTED})")
        if head.startswith((_GZIP, _ZIP, b"PAR1")):
            raise BadInput(f"{source} contains another compressed file or a binary table; unpack it first (`gunzip`)")
    if head[257:262] == b"ustar":
        raise BadInput(f"{source} is a tar archive; unpack it and name the files in it")
    for magic, complaint in _NOT_TABLES.items():
        if head.startswith(magic):
            raise BadInput(f"{source} {complaint}")
    return head


def _read(source: Source, file: IO[bytes], size: int) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise BadInput(f"{source} cannot be read: {error.strerror or error}") from None


def kind_of(source: Source, head: bytes) -> Format:
    """The format of a file: as the user declares it, by its first bytes, by its extension, or else CSV."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(_ZIP):
        if source.format in (None, "xlsx"):
            return "xlsx"
        raise BadInput(f"{source} is a ZIP archive or an Excel workbook, not {source.format}")
    if source.format is not None:
        return source.format
    return format_by_name(source.path.name) or "csv"


def open_bytes(source: Source) -> IO[bytes]:
    """Open a file, decompressed if it is gzip. Raises BadInput, also while it is read."""
    file = open_regular(source)
    if file.read(2) != _GZIP:
        file.seek(0)
        return file
    file.seek(0)
    return io.BufferedReader(_Decompressed(source, file), 256 * 1024)


class _Decompressed(io.RawIOBase):
    """A gzip file's content, read once from the start. Raises BadInput past LARGEST_RATIO (a decompression bomb)."""

    def __init__(self, source: Source, file: IO[bytes]) -> None:
        self._source = source
        self._packed = file
        self._file = gzip.GzipFile(fileobj=file, mode="rb")
        self._left = max(SMALL, LARGEST_RATIO * os.fstat(file.fileno()).st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            count = self._file.readinto(buffer)
        except (EOFError, zlib.error, OSError) as error:
            raise BadInput(f"{self._source} is truncated or damaged (gzip: {error}); get a new copy") from None
        self._left -= count
        if self._left < 0:
            raise BadInput(
                f"{self._source} unpacks to more than {LARGEST_RATIO} times its size; if that is right, unpack it "
                "yourself (`gunzip`) and name the resulting file"
            )
        return count

    def tell(self) -> int:
        """Bytes of the compressed file read so far, for progress."""
        return self._packed.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._packed.close()
        super().close()
