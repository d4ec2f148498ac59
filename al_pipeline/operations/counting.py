"""The events that count in the ledger and the inbox, found once for the same files: a tick asks before each step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from al_pipeline.annotation.active_events import Counted, corrected_items, counted
from al_pipeline.data.ledger import read_events, signature


def counted_events(*folders: Path) -> Counted:
    """`counted` of the events of `folders`, such as the ledger, then the inbox. Its lists must not be changed.

    Raises BadInput as `read_events` and `counted` do.
    """
    return _counted(signature(*folders), folders)


def corrected_texts(*folders: Path) -> Mapping[str, str]:
    """`superseded` of the events of `folders`."""
    return _corrected(signature(*folders), folders)


@lru_cache(maxsize=4)
def _counted(_files: tuple[tuple[str, int, int], ...], folders: tuple[Path, ...]) -> Counted:
    return counted(read_events(*folders))


@lru_cache(maxsize=4)
def _corrected(_files: tuple[tuple[str, int, int], ...], folders: tuple[Path, ...]) -> Mapping[str, str]:
    return corrected_items(counted_events(*folders).events)
