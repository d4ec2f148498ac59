"""Standard input, output and error of `al`, even if they are closed, full, no longer read, or not UTF-8.

No write to them raises, so a terminal that fails does not stop a command halfway. `lost` says why output could not be
written, for the exit code of a read-only command.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

_PLAIN = {"✓": "+", "✗": "x", "→": "->", "←": "<-", "–": "-", "−": "-", "…": "...", "·": "-", "±": "+/-", "≥": ">=",
          "“": '"', "”": '"', "’": "'", "\u202f": " ", "\u00a0": " "}  # fmt: skip
"""ASCII for the symbols that we print, for a terminal that cannot show them."""


class _Sink(io.RawIOBase):
    """Writes to a file descriptor (None: nowhere) until that fails for the first time; the rest is dropped."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, "the stream is closed")
        return self._descriptor

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        while self.failure is None:
            try:
                return os.write(self.fileno(), data)
            except BlockingIOError:  # another process made it non-blocking: the reader is slow, not gone
                select.select([], [self.fileno()], [])
            except OSError as error:
                self.failure = error
        return len(data)


def guard() -> None:
    """Replace the standard streams of this process with streams that never raise; open closed ones on the null device.

    A closed descriptor would be reused by the next file that is opened, and output of child processes would go into it.
    Streams that were replaced already are left alone.
    """
    codecs.register_error("al", _plainly)
    missing = [number for number in (0, 1, 2) if not _is_open(number)]
    while missing:
        opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if opened not in missing:
            os.close(opened)
            break
        missing.remove(opened)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until the process ends
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _guarded(stream))


def utf8(stream: TextIO) -> None:
    """Write UTF-8 to `stream` from now on, whatever the terminal or PYTHONIOENCODING asks for."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")


def lost(stream: TextIO) -> OSError | None:
    """Why output to `stream` was lost; None if none was, as far as is known."""
    with suppress(OSError, ValueError):
        stream.flush()
    sink = getattr(getattr(stream, "buffer", None), "raw", None)
    return sink.failure if isinstance(sink, _Sink) else None


def _guarded(stream: TextIO | None) -> TextIO:
    descriptor = None
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
        descriptor = stream.fileno()
    sink: Any = _Sink(descriptor)
    return io.TextIOWrapper(
        io.BufferedWriter(sink),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="al",
        line_buffering=sink.isatty() or stream is sys.__stderr__,
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """An encoding error handler: symbols that we print become ASCII, other characters escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return plain, error.end
