"""Everything that `al` prints: lines, JSON, CSV, tables and progress; text from outside cannot control the terminal."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from al_pipeline.cli import streams
from al_pipeline.sanitize import printable

_WIDE = 10_000
"""The width of the console for a table that goes to a file or a pipe."""

_TAG = re.compile(r"\[(?:bold|dim|green|red|yellow|/)\]")
"""Our own markup, which can be removed without Rich."""
_FOR_RICH = re.compile(r"[\[\\]|:(?!\d\d(?:[+-]\d\d)?:)[^\s:/]+:")
"""What Rich may not print as it is: other brackets, backslashes, emoji codes (`:smile:`). A time has no emoji code."""
_TIME = re.compile(r"(?<!\d)\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?[+-]\d\d:\d\d(?!\d)")
"""A time as records hold it: ISO 8601 with an offset."""


def escape(value: object) -> str:
    """Text from outside, safe for a terminal: no control sequences, no markup."""
    text = printable(str(value))
    if "[" not in text and "\\" not in text:
        return text
    from rich.markup import escape

    return escape(text)


def echo(text: str, err: bool = False) -> None:
    """Print a line of Rich markup; what comes from outside goes through `escape` first."""
    stream = sys.stderr if err else sys.stdout
    if (plain := without_markup(text)) is not None and not _is_terminal(stream):
        return _write_lines([plain], stream)
    from rich.console import Console

    Console(stderr=err, highlight=False, soft_wrap=True).print(text)


def without_markup(text: str) -> str | None:
    """What Rich prints for `text` outside a terminal; None if only Rich can tell.

    Rich takes a tenth of a short command's processor time, and its formatting is not shown to cron, scripts and pipes.
    """
    plain = _TAG.sub("", text)
    return plain if plain.isprintable() and not _FOR_RICH.search(plain) else None


def _is_terminal(stream: IO[str]) -> bool:
    """Whether Rich may treat `stream` as a terminal."""
    return stream.isatty() or "FORCE_COLOR" in os.environ or "TTY_COMPATIBLE" in os.environ


def _write_lines(lines: list[str], stream: IO[str]) -> None:
    stream.write("".join(f"{line}\n" for line in lines))
    stream.flush()


def warn(text: str) -> None:
    """Print a warning to standard error."""
    echo(f"[yellow]{escape(text)}[/]", err=True)


def print_step(line: str) -> None:
    """Print a step of a tick to standard error."""
    echo(f"[dim]{escape(line)}[/]", err=True)


def discard(_: str) -> None:
    """Print nothing; used instead of `print_step` if `--json` is given."""


def print_json(value: Any) -> None:
    """Print the one JSON object that a command with `--json` prints."""
    write_json(json.dumps(value, ensure_ascii=False, indent=2, default=str) + "\n", sys.stdout)


def write_json(text: str, out: IO[str]) -> None:
    """Write JSON as UTF-8; control characters and what UTF-8 cannot encode are escaped, so the value stays the same."""
    streams.utf8(out)  # type: ignore[arg-type]
    out.write("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def write_csv(line: str, out: IO[str]) -> None:
    """Write CSV as UTF-8; a terminal gets blanks for control characters, a file or a pipe gets every character."""
    streams.utf8(out)  # type: ignore[arg-type]
    out.write("".join(c if c.isprintable() or c == "\n" else " " for c in line) if out.isatty() else line)


def print_table(header: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print a table: whole lines outside a terminal; one line for each cell if the terminal is too narrow."""
    if not _is_terminal(sys.stdout) and "COLUMNS" not in os.environ and (lines := _plain_table(header, rows)):
        return _write_lines(lines, sys.stdout)
    from rich.console import Console
    from rich.table import Table

    whole = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE
    console = Console(highlight=False, width=whole)
    widths = _column_widths([*zip(header, *rows, strict=True)], console.width)
    if widths is not None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, width in zip(header, widths, strict=True):
            table.add_column(name, width=width)
        for row in rows:
            table.add_row(*map(escape, row))
        return console.print(table)
    for row in rows:
        for name, cell in zip(header, row, strict=True):
            if cell:
                echo(f"[dim]{escape(name)}:[/] {escape(cell)}" if name else escape(cell))


def _plain_table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """The lines of a table outside a terminal; empty if only Rich can tell."""
    table = [header, *rows]
    if not all(cell.isascii() and without_markup(cell) == cell for row in table for cell in row):
        return []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > _WIDE:
        return []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _column_widths(columns: list[tuple[str, ...]], room: int) -> list[int] | None:
    """The width of each column so that all fit into `room` and no word is cut; None if they cannot.

    Only as many columns as necessary are wrapped, the widest first.
    """
    from rich.cells import cell_len

    lines = [[line for cell in column for line in printable(cell).split("\n")] for column in columns]
    widths = [max(map(cell_len, column)) for column in lines]
    words = [max((cell_len(word) for line in column for word in line.split()), default=0) for column in lines]
    room -= 2 * (len(columns) - 1)
    for place in sorted(range(len(columns)), key=lambda place: words[place] - widths[place]):
        excess = sum(widths) - room
        if excess > 0:
            widths[place] = max(words[place], widths[place] - excess)
    return widths if sum(widths) <= room else None


def print_head(header: tuple[str, ...], rows: list[list[str]], most: int = 20) -> None:
    """Print a table of the first rows, and how many more there are."""
    if rows:
        print_table(header, rows[:most])
    if len(rows) > most:
        echo(f"[dim]… and {len(rows) - most} more; `--json` lists all[/]")


@contextmanager
def spinner(show: bool) -> Iterator[Callable[[str], None]]:
    """Show the progress of a long wait: in a terminal one line that changes, otherwise each message once."""
    if not show:
        yield discard
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("") as line:
            yield lambda text: line.update(escape(text))
    else:
        shown: set[str] = set()

        def show_once(text: str) -> None:
            text = re.sub(r" \(\d+ s\)$", "", text)
            if text not in shown:
                shown.add(text)
                echo(escape(text), err=True)

        yield show_once


@contextmanager
def progress_bar(what: str, show: bool) -> Iterator[Any]:
    """A progress bar on standard error, in a terminal; yields the function that operations call with (done, total)."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def format_time(zone: str, text: str) -> str:
    """A time (ISO 8601) in the time zone `zone`."""
    from datetime import datetime
    from zoneinfo import ZoneInfo

    return f"{datetime.fromisoformat(text).astimezone(ZoneInfo(zone)):%a %Y-%m-%d %H:%M %Z}"


def format_times(zone: str, text: str) -> str:
    """Replace each time in a sentence (ISO 8601 with an offset) by the one in the time zone `zone`."""

    def local(found: re.Match[str]) -> str:
        try:
            return format_time(zone, found[0])
        except (ValueError, OverflowError):  # a person can type anything as a reason
            return found[0]

    return _TIME.sub(local, text)


def format_score(value: float | None) -> str:
    """A metric with three decimals; a dash for none."""
    return "–" if value is None else f"{value:.3f}"
