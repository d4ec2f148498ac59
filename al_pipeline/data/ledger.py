"""The append-only event ledger (`data/events`) and its inbox, which holds pulled events until a round closes.

A folder holds events in `part-000007.jsonl` (ledger) or `pull-000007.jsonl` (inbox), one JSON object per line, and
refused annotations with the reason in `refused-000007.jsonl`. The ledger also has `forecasts-000007.jsonl`: what a
model said of items when it chose them, before anybody answered. Events are ordered by (file, line). A file is written
atomically and never changed. An event in two files counts once, at its first place, so that a move from the inbox to
the ledger can be interrupted and repeated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from al_pipeline.errors import BadInput
from al_pipeline.files import write_jsonl
from al_pipeline.records import Event, ModelForecast, author_digest, composed
from al_pipeline.validation import first_problem

SMALL = 64
"""Files with fewer events are small, and so many of them are many."""
_NUMBERED = re.compile(r"^(part|pull|refused|forecasts)-(\d{6,})\.jsonl$")
_DECODER = msgspec.json.Decoder(Event)

Refused = Mapping[str, Any]
"""An annotation that could not be used: `refused_id`, `reason`, annotator and task, and `result`, the raw JSON text."""


def read_events(*folders: Path) -> list[Event]:
    """All events of `folders` (such as the ledger, then the inbox), each once, in order.

    Raises BadInput with file and line if a line is truncated or not a valid event.
    """
    return list(_by_id(folders).values())


def signature(*folders: Path, refused: bool = False) -> tuple[tuple[str, int, int], ...]:
    """What tells whether the events of `folders` are still those read before: name, size and time of each file.

    `refused`: and the refused annotations.
    """
    kinds = ("part", "pull", *(("refused",) if refused else ()))
    return tuple(chain.from_iterable(_marked(folder, *kinds) for folder in folders))


def read_refused(*folders: Path) -> list[Refused]:
    """All refused annotations of `folders`, each once, in order. Raises BadInput with file and line."""
    refused: dict[str, Refused] = {}
    for folder in folders:
        for path in _files(folder, "refused"):
            for line, row in _rows(path):
                if not isinstance(row.get("refused_id"), str) or not isinstance(row.get("reason"), str):
                    raise BadInput(f"{path}:{line}: `refused_id` and `reason` must be text; {_FIX}")
                refused.setdefault(row["refused_id"], row)
    return list(refused.values())


def still_refused(refused: Collection[Refused], events: Iterable[Event]) -> list[Refused]:
    """The refused annotations that were not accepted later; of an edited annotation only the newest version."""
    if not refused:
        return []
    taken: dict[tuple[str, str], str] = {}
    ids: set[str] = set()
    for event in events:
        ids.add(event.event_id)
        if event.type in ("label", "skip", "supersede", "adjudicate"):
            taken[event.push_key, event.answer_name] = event.updated_at or ""
    newest: dict[Any, Refused] = {}
    for row in refused:
        if row["refused_id"] in ids:
            continue
        push_key, number = str(row.get("push_key")), str(row.get("annotation_id"))
        name = f"{number}-{author_digest(str(row.get('annotator')), row.get('created_at'))}"
        changed = str(row.get("updated_at") or "")
        # Keys of events written by an earlier version end with the annotation's number alone.
        if any(taken[known] >= changed for known in ((push_key, name), (push_key, number)) if known in taken):
            continue
        key = (push_key, name) if row.get("annotation_id") is not None else row["refused_id"]
        if key not in newest or str(newest[key].get("updated_at") or "") <= changed:
            newest[key] = row
    return list(newest.values())


def known_ids(*folders: Path) -> AbstractSet[str]:
    """Ids of all events in `folders`."""
    return _by_id(folders).keys()


def last_part(ledger: Path) -> int:
    """The number of a ledger's newest part; 0 for an empty ledger."""
    return max((_position_of(path) for path in _files(ledger, "part")), default=0)


def part_ids(ledger: Path, last: int) -> frozenset[str]:
    """Ids of the events in a ledger's parts up to number `last`."""
    paths = [path for path in _files(ledger, "part") if _position_of(path) <= last]
    return frozenset(event.event_id for path in paths for event in _parsed(path))


def append_part(folder: Path, events: Iterable[Event], refused: Iterable[Refused] = ()) -> Path | None:
    """Append the new events and refused annotations to a ledger as one part; its path, or None without new events."""
    return _append(folder, "part", events, refused, known=(folder,))


def add_to_inbox(
    inbox: Path, events: Iterable[Event], refused: Iterable[Refused] = (), ledger: Path | None = None
) -> Path | None:
    """Write what neither `inbox` nor `ledger` holds to a new inbox file; its path, or None without new events."""
    return _append(inbox, "pull", events, refused, known=(ledger, inbox) if ledger else (inbox,))


def merge_small_files(inbox: Path) -> bool:
    """Put the newest files of an inbox into one if they are many and small; return whether that was so.

    For a process that pulls each answer by itself: every reader looks at every file. Can be killed and repeated, since
    an event in two files counts once, at its first place.
    """
    small: list[Path] = []
    for path in reversed(_files(inbox, "pull")):
        if len(_parsed(path)) >= SMALL:
            break
        small.insert(0, path)
    if len(small) < SMALL:
        return False
    events = [event for path in small for event in _parsed(path)]
    write_jsonl(small[0], [event.to_row() for event in events])
    for path in small[1:]:
        path.unlink(missing_ok=True)
    old = {str(path) for path in small}
    for mark in [mark for mark in _parsed_files if mark[0] in old]:
        del _parsed_files[mark]  # so that no event is held twice
    found = small[0].stat()
    _parsed_files[str(small[0]), found.st_size, found.st_mtime_ns] = tuple(events)
    return True


def read_forecasts(ledger: Path) -> dict[str, ModelForecast]:
    """The forecasts of items, by item id. Raises BadInput with the line."""
    found: dict[str, ModelForecast] = {}
    for path in _files(ledger, "forecasts"):
        for line, row in _rows(path):
            item, proba, known = row.get("item_id"), row.get("proba"), row.get("known")
            if not isinstance(item, str) or not isinstance(proba, dict) or not all(map(_is_share, proba.values())):
                raise BadInput(f"{path}:{line}: needs `item_id` and `proba`, classes with probabilities; {_FIX}")
            if known is not None and (type(known) is not int or known < 0):
                raise BadInput(f"{path}:{line}: `known` must be a number of events; {_FIX}")
            found.setdefault(item, ModelForecast(proba, known))
    return found


def append_forecasts(ledger: Path, forecasts: Mapping[str, ModelForecast]) -> None:
    """Append the forecasts of items that have none yet. Can be killed and repeated."""
    there = read_forecasts(ledger)
    new = [
        {"item_id": item, "proba": dict(one.proba), **({} if one.known is None else {"known": one.known})}
        for item, one in forecasts.items()
        if item not in there
    ]
    if new:
        write_jsonl(_next(ledger, "forecasts"), new)


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def append_inbox(inbox: Path, ledger: Path) -> list[Path]:
    """Append the inbox to the ledger as one part. Returns the inbox files, which may then be deleted.

    Safe to interrupt and repeat: events that the ledger already holds are not appended again.
    """
    consumed = [*_files(inbox, "pull"), *_files(inbox, "refused")]
    append_part(ledger, read_events(inbox), read_refused(inbox))
    return consumed


def _append(
    folder: Path, prefix: str, events: Iterable[Event], refused: Iterable[Refused], known: Sequence[Path]
) -> Path | None:
    ids = known_ids(*known)
    new: dict[str, Event] = {}
    for event in events:
        if event.event_id not in ids:
            new.setdefault(event.event_id, event)
    refused_ids = {row["refused_id"] for row in read_refused(*known)}
    new_refused = [row for row in refused if row["refused_id"] not in refused_ids]
    # Refused annotations first: after a crash in between, the next call writes the events and no refusal twice.
    if new_refused:
        write_jsonl(_next(folder, "refused"), [dict(row) for row in new_refused])
    if not new:
        return None
    path = _next(folder, prefix)
    write_jsonl(path, [event.to_row() for event in new.values()])
    return path


def _files(folder: Path, *prefixes: str) -> list[Path]:
    return [folder / name for name in _names(folder, *prefixes)]


def _names(folder: Path, *prefixes: str) -> list[str]:
    """The names of a folder's files of some kinds, in order."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(position, name) for name in names if (position := _position(name)) and position[0] in prefixes]
    return [name for _, name in sorted(found)]


def _marked(folder: Path, *prefixes: str) -> Iterator[tuple[str, int, int]]:
    """The paths of these files, each with its size and time of change: there are hundreds, asked for often."""
    place = os.fspath(folder)
    for name in _names(folder, *prefixes):
        path = os.path.join(place, name)
        found = os.stat(path)
        yield path, found.st_size, found.st_mtime_ns


@cache
def _position(name: str) -> tuple[str, int] | None:
    """The kind and number of a ledger's file; None for another file."""
    match = _NUMBERED.match(name)
    return None if match is None else (match[1], int(match[2]))


def _position_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _next(folder: Path, prefix: str) -> Path:
    last = max((_position_of(path) for path in _files(folder, prefix)), default=0)
    return folder / f"{prefix}-{last + 1:06d}.jsonl"


_FIX = "restore the file with `dvc checkout` (ledger), or inspect and remove the bad line (inbox)"


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield number, _row(line, f"{path}:{number}")


def _row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        raise BadInput(f"{place}: not a JSON object (truncated or edited); {_FIX}") from None
    if not isinstance(row, dict):
        raise BadInput(f"{place}: not a JSON object (truncated or edited); {_FIX}")
    return row


def _parsed(path: Path) -> tuple[Event, ...]:
    found = path.stat()
    return _events(str(path), found.st_size, found.st_mtime_ns)


def _by_id(folders: Sequence[Path]) -> Mapping[str, Event]:
    """The events of folders by id, each once, in order."""
    return _merged(signature(*folders))


_Files = tuple[tuple[str, int, int], ...]
_MERGED = 4
_merged_before: tuple[tuple[_Files, Mapping[str, Event]], ...] = ()
"""The newest results of `_merged`, the last one first: at most `_MERGED`."""


def _merged(files: _Files) -> Mapping[str, Event]:
    """The events of files, each with its mark: a tick asks for the same ones before each step.

    Only what follows the files of an earlier result is added to it.
    """
    global _merged_before
    known: tuple[_Files, Mapping[str, Event]] = ((), {})
    for before, found in _merged_before:
        if len(known[0]) < len(before) <= len(files) and files[: len(before)] == before:
            known = before, found
    if known[0] == files:
        return known[1]
    events = dict(known[1])
    for file in files[len(known[0]) :]:
        for event in _events(*file):
            events.setdefault(event.event_id, event)
    _merged_before = ((files, events), *_merged_before[: _MERGED - 1])
    return events


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


_parsed_files: dict[tuple[str, int, int], tuple[Event, ...]] = {}
"""The events of each file that was read, by its mark."""


def _events(path: str, size: int, changed: int) -> tuple[Event, ...]:
    """The events of a file, parsed once: a file never changes, and a tick reads the ledger several times."""
    mark = path, size, changed
    if (found := _parsed_files.get(mark)) is None:
        found = _parsed_files[mark] = _events_in(path)
    return found


def _events_in(path: str) -> tuple[Event, ...]:
    with open(path, "rb") as file:
        data = file.read()
    try:
        events = _DECODER.decode_lines(data)
    except (msgspec.DecodeError, RecursionError):
        events = []
    if len(events) == data.count(b"\n") + (data[-1:] not in (b"", b"\n")):
        return tuple(map(_composed, events))
    lines = enumerate(BytesIO(data), start=1)  # one is invalid or, which msgspec skips, empty
    return tuple(_event(line, f"{path}:{number}") for number, line in lines)


def _event(line: bytes, place: str) -> Event:
    try:
        event = _DECODER.decode(line)
    except (msgspec.DecodeError, RecursionError):  # invalid, or half of a surrogate pair, which `json` takes
        row = _row(line, place)
        try:
            event = msgspec.convert(row, Event)
        except msgspec.ValidationError as error:
            problem = first_problem(Event, row) or error
            raise BadInput(f"{place}: {problem} (was it written by a newer engine?); {_FIX}") from None
    return _composed(event)


def _composed(event: Event) -> Event:
    """The event with its label in Unicode's NFC form."""
    if event.label is None or event.label.isascii():
        return event
    return replace(event, label=composed(event.label))
