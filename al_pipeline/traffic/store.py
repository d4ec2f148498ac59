"""The folder of the log: journals that are written, segments that they become, what is deleted from both."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from al_pipeline.errors import BadInput
from al_pipeline.files import read_json, replacing, write_json
from al_pipeline.logs import get_logger
from al_pipeline.traffic import journal
from al_pipeline.traffic.rows import COLUMNS, LoggedText, from_batch, from_line, texts_of, to_table
from al_pipeline.workspace.home import private_folder

if TYPE_CHECKING:
    import pyarrow as pa

_logger = get_logger(__name__)

SEGMENT = "segment-"
_ROWS = 4096
"""Rows of a row group, and of what is read at once."""
_POLL_SECONDS = 0.2


class Held(NamedTuple):
    """What the log holds."""

    texts: int
    first: int | None
    """The time of the oldest text, in microseconds since 1970."""
    last: int | None
    bytes: int
    journals: int
    segments: int
    damaged: int
    """Lines of journals that cannot be read."""


class Deleted(NamedTuple):
    """What the deletion of a request's id did."""

    texts: int
    """Texts that were deleted from the log."""
    waiting: int
    """Texts that a running server has not let go of; nobody reads them any more, and it deletes them."""


class TrafficStore:
    """The log in `folder`. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged = 0
        """Lines that the last reading could not read."""

    # Reading ---------------------------------------------------------------------------------------------------------
    def journals(self) -> list[Path]:
        """The journals, oldest first."""
        return sorted(self.folder.glob(f"{journal.PREFIX}*{journal.SUFFIX}"))

    def segments(self) -> list[Path]:
        """The segments, by the time of their first row."""
        return sorted(self.folder.glob(f"{SEGMENT}*.parquet"))

    def rows(self, since: int = 0, until: int | None = None) -> Iterator[LoggedText]:
        """The texts with since < time <= until (microseconds since 1970), each once, in no particular order.

        Raises BadInput for a damaged segment.
        """
        gone, self.damaged = self.deleting(), 0
        converted = {journal.identity(path) for path in self.segments()}
        seen: set[str] = set()
        for path in self.journals():  # before the segments: meanwhile a journal can become one
            if journal.identity(path) not in converted:
                seen.add(journal.identity(path))
                for row in self._of_journal(path):
                    if since < row.time and (until is None or row.time <= until) and row.request_id not in gone:
                        yield row
        for path in self.segments():
            first, last = _span(path)
            if journal.identity(path) in seen or last <= since or (until is not None and first > until):
                continue
            for row in _of_segment(path):
                if since < row.time and (until is None or row.time <= until) and row.request_id not in gone:
                    yield row

    def held(self) -> Held:
        """Count what is there."""
        texts, first, last = 0, None, None
        for row in self.rows():
            texts += 1
            first = row.time if first is None else min(first, row.time)
            last = row.time if last is None else max(last, row.time)
        journals, segments = self.journals(), self.segments()
        size = sum(map(_size, [*journals, *segments]))
        return Held(texts, first, last, size, len(journals), len(segments), self.damaged)

    def _of_journal(self, path: Path) -> Iterator[LoggedText]:
        for line in journal.lines(path):
            request = from_line(line)
            if request is None:
                self.damaged += 1
            else:
                yield from texts_of(request)

    # Changing ------------------------------------------------------------------------------------------------------
    def convert(self) -> int:
        """Turn journals whose writers have ended into segments; return how many. Killed at any time, no row is lost."""
        with self._locked():
            return sum(self._convert(path) for path in self.journals())

    def _convert(self, path: Path) -> bool:
        with journal.taken(path) as free:
            if not free:
                return False
            damaged = self.damaged
            known = [one for one in self.segments() if journal.identity(one) == journal.identity(path)]
            gone = self.deleting()
            if not known and (rows := [row for row in self._of_journal(path) if row.request_id not in gone]):
                first, last = min(row.time for row in rows), max(row.time for row in rows)
                name = f"{SEGMENT}{first:016d}-{last:016d}-{journal.identity(path)}.parquet"
                _write(self.folder / name, rows)
            if self.damaged > damaged:
                _logger.error("%s had %d damaged lines, which are lost", path.name, self.damaged - damaged)
            path.unlink()
            return True

    def retain(self, days: float, most_bytes: int, now: float | None = None) -> int:
        """Delete segments whose last row is older than `days`, and the oldest ones above `most_bytes`; return how many.

        What is left of journals without writers, such as on a full disk, counts and is deleted too.
        """
        oldest = ((time.time() if now is None else now) - days * 86400) * 1e6
        with self._locked():
            segments = self.segments()
            old = [path for path in segments if _span(path)[1] < oldest]
            kept = [path for path in segments if path not in old]
            journals = self.journals()
            size = sum(map(_size, [*kept, *journals]))
            for path in old:
                path.unlink()
            count = len(old)
            for path in sorted([*kept, *journals], key=_begin):
                if size <= most_bytes:
                    break
                found = _size(path)
                with journal.taken(path) if path.suffix == journal.SUFFIX else contextlib.nullcontext(True) as free:
                    if free:
                        path.unlink()
                        size, count = size - found, count + 1
            return count

    # Deleting ------------------------------------------------------------------------------------------------------
    @property
    def _deleting(self) -> Path:
        return self.folder / "deleting.json"

    def deleting(self) -> frozenset[str]:
        """The ids that are being deleted: no reader gets their rows."""
        found = read_json(self._deleting, [])
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise BadInput(f"{self._deleting} is damaged; delete it, and delete the ids again")
        return frozenset(found)

    def delete(self, request_id: str, seconds: float = 10.0) -> Deleted:
        """Delete all texts of requests with this id, from segments and journals.

        A journal that a server writes to is left to that server, for `seconds` at most; what it has not deleted by then
        it deletes when it ends the journal.
        """
        with self._locked():
            write_json(self._deleting, sorted(self.deleting() | {request_id}), 0o600)
        until, count, done = time.monotonic() + seconds, 0, set[Path]()
        in_journals = self._in_journals(request_id)
        while True:
            with self._locked():
                for path in self.journals():
                    self._convert(path)
                for path in set(self.segments()) - done:
                    if found := sum(one == request_id for one in _ids(path)):
                        _rewrite(path, request_id)
                    count += found
                    done.add(path)
                waiting = self._in_journals(request_id)
                if not waiting:
                    write_json(self._deleting, sorted(self.deleting() - {request_id}), 0o600)
            if not waiting or time.monotonic() > until:
                return Deleted(count + in_journals - waiting, waiting)
            time.sleep(_POLL_SECONDS)

    def _in_journals(self, request_id: str) -> int:
        converted = {journal.identity(path) for path in self.segments()}
        paths = [path for path in self.journals() if journal.identity(path) not in converted]
        return sum(row.request_id == request_id for path in paths for row in self._of_journal(path))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Nobody else changes segments meanwhile."""
        handle = os.open(private_folder(self.folder) / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _write(path: Path, rows: Sequence[LoggedText]) -> None:
    import pyarrow.parquet as pq

    with replacing(path, 0o600) as temporary:
        pq.write_table(to_table(rows), temporary, row_group_size=_ROWS, compression="zstd")


def _rewrite(path: Path, request_id: str) -> None:
    kept = [row for row in _of_segment(path) if row.request_id != request_id]
    if kept:
        _write(path, kept)
    else:
        path.unlink()


def _of_segment(path: Path) -> Iterator[LoggedText]:
    """The rows of a segment; none if it was deleted meanwhile."""
    for batch in _batches(path, COLUMNS):
        try:
            rows = list(from_batch(batch))
        except (OSError, UnicodeError, KeyError, TypeError, ValueError) as error:
            raise _damaged(path, error) from None
        yield from rows


def _ids(path: Path) -> Iterator[str]:
    """The request's id of each row of a segment."""
    for batch in _batches(path, ["request_id"]):
        yield from batch.column(0).to_pylist()


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield from file.iter_batches(_ROWS, columns=list(columns))
    except FileNotFoundError:
        return
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> BadInput:
    return BadInput(f"{path} is damaged ({type(error).__name__}); move it away, its texts are lost")


def _span(path: Path) -> tuple[int, int]:
    """The times of a segment's first and last row, from its name."""
    try:
        _, first, last, _ = path.stem.split("-")
        return int(first), int(last)
    except ValueError:
        raise BadInput(f"{path} is no segment of the log; move it away") from None


def _begin(path: Path) -> str:
    """When a segment or a journal begins, for sorting."""
    return path.stem.split("-")[1]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
