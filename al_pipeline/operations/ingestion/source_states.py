"""The state of the files of `ingest.sources` across ticks: ingested, waiting until they are quiet, or failing."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from al_pipeline.data.inputs import Stamp, stamp_of
from al_pipeline.errors import BadInput
from al_pipeline.files import json_line, read_object, write_text
from al_pipeline.quantities import format_duration
from al_pipeline.workspace.layout import Layout

QUIET_SECONDS = 60.0
"""How long a file must have been unchanged before a tick reads it."""
_LONG_SECONDS = 3600.0

_ENTRY: Mapping[str, type | tuple[type, ...]] = {
    "state": str,
    "stamp": list,
    "since": (int, float),
    "changed_at": (int, float),
    "waiting_since": (int, float),
    "failing_since": (int, float),
    "message": str,
    "digest": str,
    "settings": list,
    "taken": int,
}


class SourceNews(Struct, frozen=True):
    """A file of `ingest.sources` that was not read, as of the last tick."""

    file: str
    """Relative to the workspace."""
    state: Literal["failing", "waiting"]
    message: str
    since: datetime

    def sentence(self) -> str:
        """Format it as one line."""
        return f"{self.file} {self.message} (since {self.since:%Y-%m-%d %H:%M} UTC)"


def source_news(layout: Layout) -> list[SourceNews]:
    """The files that the last tick could not read, or not yet, according to the stored state alone."""
    return list(SourceStates(layout).news(time.time()))


class SourceStates:
    """`.al/ingested.json`: for each source file, what was seen of it, what was ingested, and what is wrong with it.

    A damaged file is treated as missing.
    """

    def __init__(self, layout: Layout) -> None:
        self._path = layout.ingested
        try:
            found = read_object(self._path)
        except BadInput:
            found = {}
        files = found.get("files")
        if not isinstance(files, dict):  # earlier versions stored only digests
            files = {name: {"digest": digest} for name, digest in found.items()}
        self._files: dict[str, dict[str, Any]] = {name: entry for name, entry in files.items() if _is_entry(entry)}
        count = found.get("drawn_from")
        self.drawn_from: int = count if isinstance(count, int) else 0
        """Number of files ingested while there was no test set, or one drawn from them."""
        self._stored = self._text()

    def _text(self) -> str:
        return json_line({"files": self._files, "drawn_from": self.drawn_from})

    def store(self) -> None:
        """Write the file if something changed."""
        if (text := self._text()) != self._stored:
            write_text(self._path, text, 0o600)
            self._stored = text

    def keep_only(self, names: Collection[str]) -> None:
        """Drop all other entries: files that are gone, and problems that are solved."""
        self._files = {name: entry for name, entry in self._files.items() if name in names}

    def in_order(self, names: Collection[str]) -> list[str]:
        """Sort `names`: files ingested before come first, in that order, since the last label of a text counts."""
        order = {name: entry["taken"] for name, entry in self._files.items() if "taken" in entry}
        return sorted(names, key=lambda name: (name not in order, order.get(name, 0), name))

    def is_taken(self, name: str, stamp: Stamp, settings: list[Any]) -> bool:
        """Whether the file was ingested with these settings and its stamp is unchanged since then."""
        entry = self._files.get(name, {})
        return entry.get("state") == "taken" and entry["stamp"] == list(stamp) and entry["settings"] == settings

    def holds(self, name: str, digest: str, settings: list[Any]) -> bool:
        """Whether the last content ingested with these settings was exactly this."""
        entry = self._files.get(name, {})
        return bool(entry.get("digest") == digest and entry.get("settings", settings) == settings)

    def see(self, name: str, stamp: Stamp, now: float) -> float:
        """Record the file's stamp; return for how many seconds it has been quiet."""
        entry = self._files.setdefault(name, {})
        if entry.get("stamp") != list(stamp) or entry["since"] > now:  # or the clock was set back
            entry |= {"stamp": list(stamp), "since": now}
        entry["changed_at"] = min(entry["since"], stamp.last_change)
        quiet: float = now - entry["changed_at"]
        if quiet < QUIET_SECONDS:
            entry["state"] = "waiting"
            entry.setdefault("waiting_since", now)
        return quiet

    def wait(self, name: str, stamp: Stamp, now: float) -> None:
        """Record that the file changed at time `now`, while it was being read."""
        entry = self._files[name]
        entry |= {"state": "waiting", "stamp": list(stamp), "since": now, "changed_at": now}
        entry.setdefault("waiting_since", now)

    def changed(self, name: str, path: Path) -> bool:
        """Whether the file's stamp differs from the one last seen; False if it cannot be read."""
        with suppress(OSError):
            return self._files.get(name, {}).get("stamp") != list(stamp_of(path))
        return False

    def fail(self, name: str, message: str, now: float) -> None:
        """Record that the file is unusable; it counts as failing since its first failure after the last success."""
        entry = self._files.setdefault(name, {})
        entry |= {"state": "failing", "message": message}
        entry.setdefault("failing_since", now)
        entry.pop("waiting_since", None)

    def took(self, name: str, digest: str, settings: list[Any]) -> None:
        """Record that the file was ingested as last seen."""
        entry = self._files[name]
        if entry.get("digest") != digest or "taken" not in entry:
            entry["taken"] = 1 + max((other.get("taken", 0) for other in self._files.values()), default=0)
        entry |= {"state": "taken", "digest": digest, "settings": settings}
        for key in ("message", "failing_since", "waiting_since"):
            entry.pop(key, None)

    def news(self, now: float) -> Iterator[SourceNews]:
        """Yield the failing and the waiting files, by name."""
        for name, entry in sorted(self._files.items()):
            if entry.get("state") == "failing":
                yield SourceNews(name, "failing", entry["message"], _moment(entry["failing_since"]))
            elif entry.get("state") == "waiting":
                message = _waits(now - entry["changed_at"], now - entry["waiting_since"])
                yield SourceNews(name, "waiting", message, _moment(entry["waiting_since"]))


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry[key], _ENTRY.get(key, ())) for key in entry):
        return False
    needed = {"failing": ("message", "failing_since"), "waiting": ("stamp", "since", "changed_at", "waiting_since")}
    needed["taken"] = ("stamp", "since", "digest", "settings")
    wanted = needed.get(entry.get("state", ""), () if "state" not in entry else ("?",))
    return ("stamp" in entry) == ("since" in entry) and all(key in entry for key in wanted)


def _waits(changed: float, waited: float) -> str:
    ago = format_duration(max(0.0, changed))
    if changed >= QUIET_SECONDS:
        return f"changed {ago} ago; the next tick reads it, unless it changes again"
    said = f"changed {ago} ago; it is read once it has not changed for a minute"
    if waited > _LONG_SECONDS:
        said += f", but it has kept changing for {format_duration(waited)}: `al ingest` reads it at once"
    return said


def _moment(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError):  # edited by hand
        return datetime.fromtimestamp(0, UTC)
