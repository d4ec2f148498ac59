"""The lines of a text file in a detected or given encoding. Undecodable bytes invalidate only their own record."""

from __future__ import annotations

import codecs
import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from al_pipeline.data import encodings, table_rows
from al_pipeline.data.inputs import Source, open_bytes
from al_pipeline.records import shown_text

UNDECODABLE = "\udcff"
"""Placeholder for bytes that the encoding cannot decode."""
MARK_UNDECODABLE = "al_pipeline.mark"
"""The error handler that replaces such bytes by UNDECODABLE."""
codecs.register_error(MARK_UNDECODABLE, lambda error: (UNDECODABLE, error.end))  # type: ignore[attr-defined]

_SAMPLE_BYTES = 200_000
_BLOCK_BYTES = 1024 * 1024
BLOCK_CHARACTERS = 1024 * 1024
"""Number of characters that are parsed at once; the end of a line is added."""
_SINGLE_BYTE = frozenset(name for name in encodings.USUAL if name.startswith(("cp125", "cp8", "iso", "koi8", "mac")))


@dataclass(frozen=True, slots=True)
class DetectedEncoding:
    """The encoding in which a text file is read, and the evidence for it."""

    encoding: str
    undecodable: bool = False
    """Whether the encoding cannot decode some bytes."""
    note: str = ""
    sample: bytes = b""
    """A sample of the lines that are not UTF-8."""
    mixed: bool = False
    """Whether the file mixes UTF-8 with another encoding."""
    guess: encodings.Guess = encodings.Guess((), False)

    def advice(self) -> str:
        """The `--encoding` values that would decode the file, each with a few decoded words for comparison."""
        if self.mixed:
            usual = self.guess.encodings[:1] if self.guess.sure else ()
            fits = next((encoding for encoding in usual if encoding in _SINGLE_BYTE), "cp1252")
            return (
                "Other rows are UTF-8 with accents: the file mixes two encodings. Convert it, or run this again with "
                f"`--encoding utf-8+{fits}`, which reads as {fits} what is not UTF-8: {_context(self.sample, fits)}"
            )
        others = [encoding for encoding in self.guess.encodings if encoding != self.encoding]
        if not others:
            return (
                "Run this again with `--encoding NAME`, where NAME is the encoding that the file was saved in, or "
                "save it as UTF-8"
            )
        shown = "; ".join(f"`--encoding {encoding}`: {_context(self.sample, encoding)}" for encoding in others)
        if len(others) == 1:
            return f"Run this again with {shown}"
        return f"Run this again with the encoding that gives the right text: {shown}"


def detect_encoding(source: Source, head: bytes) -> DetectedEncoding:
    """Read a text file once as bytes and detect its encoding. Raises BadInput if the file cannot be read."""
    chosen = source.encoding or encodings.by_first_bytes(head)
    if chosen is not None and chosen != encodings.UTF_8:
        undecodable = not _decodes(source, chosen)
        if not undecodable or source.encoding is None:
            return DetectedEncoding(chosen, undecodable)
    elif _decodes(source, encodings.UTF_8):
        return DetectedEncoding(encodings.UTF_8)
    sample, bad, accented = _lines_not_utf_8(source)
    guess = encodings.guess(sample) if bad else encodings.Guess((encodings.UTF_8,), True)
    if chosen is not None:
        return DetectedEncoding(chosen, True, sample=sample, guess=guess, mixed=bad > 0 and accented * 50 > bad)
    if accented * 50 > bad:
        return DetectedEncoding(encodings.UTF_8, True, sample=sample, guess=guess, mixed=True)
    if not guess.sure:
        return DetectedEncoding(encodings.UTF_8, True, sample=sample, guess=guess)
    best = guess.encodings[0]
    return DetectedEncoding(
        best,
        not _decodes(source, best),
        f"is not UTF-8; read as {best}: {_context(sample, best)}; `--encoding` chooses another",
        sample,
        guess=guess,
    )


def not_decodable(encoding: str) -> str:
    """The reason for rejecting a row that `encoding` cannot decode."""
    shown = {encodings.UTF_8: "UTF-8", "utf-16": "UTF-16", "utf-32": "UTF-32"}.get(encoding, encoding)
    return f"not valid {shown}"


def _context(sample: bytes, encoding: str) -> str:
    """A few words around the first character outside ASCII, quoted."""
    text = sample.decode(encoding, "replace")
    place = next((place for place, character in enumerate(text) if character > "\x7f"), 0)
    line = text[max(0, place - 20) : place + 30]
    return f"“{' '.join(shown_text(line).split())}”"


def _decodes(source: Source, encoding: str) -> bool:
    """Whether the encoding decodes every byte of a file."""
    first, _, second = encoding.partition("+")
    if second:
        return True
    decoder = codecs.getincrementaldecoder(first)()
    try:
        with open_bytes(source) as file:
            while block := file.read(_BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", True)
    except UnicodeError:
        return False
    return True


def _lines_not_utf_8(source: Source) -> tuple[bytes, int, int]:
    """A sample, from all parts of a file, of the lines that are not UTF-8; their number; and the number of other lines
    with characters outside ASCII.
    """
    kept: list[bytes] = []
    size, every, bad, accented = 0, 1, 0, 0
    for line in _byte_lines(source):
        if line.isascii():
            continue
        try:
            line.decode()
            accented += 1
            continue
        except UnicodeDecodeError:
            bad += 1
        if bad % every == 0:
            kept.append(line[:_SAMPLE_BYTES])
            size += len(kept[-1])
        while size > _SAMPLE_BYTES and len(kept) > 1:  # keep every second one
            kept, every = kept[::2], 2 * every
            size = sum(map(len, kept))
    return b"\n".join(kept), bad, accented


def _byte_lines(source: Source) -> Iterator[bytes]:
    rest = b""
    with open_bytes(source) as file:
        while block := file.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
            yield from lines
            if len(rest) > table_rows.RECORD_LIMIT:
                yield rest
                rest = b""
    yield rest


class TextLines(Iterator[str]):
    """The physical lines of a text file, each with its ending; remembers the lines of the current record.

    Bytes that the encoding cannot decode become UNDECODABLE, so that only their record is rejected. Raises
    RecordTooLong once a record exceeds RECORD_LIMIT; the caller may then skip the rest of that record.
    """

    def __init__(self, source: Source, encoding: str) -> None:
        self._source = source
        self._encoding, _, second = encoding.partition("+")
        self._errors = _fallback_handler(second) if second else MARK_UNDECODABLE
        self._file = self._open()
        self._pushed_back: deque[str] = deque()
        self.number = 0
        self.record: list[str] = []
        self.characters = 0

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(open_bytes(self._source), self._encoding, self._errors, newline="")

    def begin(self) -> None:
        """Start a new record at the next line."""
        self.record = []
        self.characters = 0

    def __next__(self) -> str:
        line = self._pushed_back.popleft() if self._pushed_back else self._file.readline(table_rows.RECORD_LIMIT + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.record.append(line)
        self.characters += len(line)
        if self.characters > table_rows.RECORD_LIMIT:
            raise RecordTooLong
        return line

    def read_lines(self) -> list[str]:
        """The next lines, about BLOCK_CHARACTERS together; none at the end. Only the last may lack its ending, if it
        is longer than RECORD_LIMIT or the file ends with it.
        """
        if self._pushed_back:
            lines = list(self._pushed_back)
            self._pushed_back.clear()
        else:
            text = self._file.read(BLOCK_CHARACTERS)
            if not text.endswith("\n"):
                text += self._file.readline(table_rows.RECORD_LIMIT + 1)
            lines = io.StringIO(text, newline="").readlines()
        self.number += len(lines)
        return lines

    def push_back(self, lines: Sequence[str]) -> None:
        """Read `lines`, the last ones of `read_lines`, again."""
        self._pushed_back.extendleft(reversed(lines))
        self.number -= len(lines)

    @property
    def has_pushed_back(self) -> bool:
        """Whether lines are to be read again."""
        return bool(self._pushed_back)

    def push_back_all_but_first(self) -> None:
        """End the record after its first line and read the other lines again: a stray quote had joined them."""
        self.push_back(self.record[1:])

    def skip_line(self, line: str) -> None:
        """Read past the end of a line that was too long."""
        self._rest_of_line(line)

    def skip_quoted(self) -> None:
        """Read past the end of the quoted field that was too long; if it never ends, only past its first line."""
        first = self.number - len(self.record) + 1
        quotes = sum(line.count('"') for line in self.record) + self._rest_of_line(self.record[-1])
        while quotes % 2:
            line = self._pushed_back.popleft() if self._pushed_back else self._file.readline(table_rows.RECORD_LIMIT)
            if not line:
                self._go_to(first + 1)
                return
            self.number += 1
            quotes += line.count('"') + self._rest_of_line(line)

    def _rest_of_line(self, line: str) -> int:
        """Read up to the end of the physical line that begins with `line`. Returns the number of quotes read."""
        quotes = 0
        while line and not line.endswith(("\n", "\r")) and not self._pushed_back:
            line = self._file.readline(table_rows.RECORD_LIMIT)
            quotes += line.count('"')
        return quotes

    def _go_to(self, number: int) -> None:
        self._file.close()
        self._pushed_back.clear()
        self._file = self._open()
        for _ in range(number - 1):
            self._rest_of_line(self._file.readline(table_rows.RECORD_LIMIT))
        self.number = number - 1

    def position(self) -> int:
        """Bytes read so far."""
        buffer: Any = self._file.buffer
        return int(getattr(buffer, "raw", buffer).tell())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RecordTooLong(Exception):
    """The current record is longer than RECORD_LIMIT."""


def _fallback_handler(encoding: str) -> str:
    """The name of an error handler that decodes bytes that are not UTF-8 in another, single-byte encoding."""
    name = f"al_pipeline.{encoding}"

    def decode(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        return error.object[error.start : error.end].decode(encoding, MARK_UNDECODABLE), error.end

    codecs.register_error(name, decode)
    return name
