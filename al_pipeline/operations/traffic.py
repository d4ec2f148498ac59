"""The log of served requests as `al traffic` shows it, and the deletion of one request from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from al_pipeline.data.pool import iter_items
from al_pipeline.data.served import SOURCE
from al_pipeline.errors import NothingToDo
from al_pipeline.files import json_line, read_jsonl, write_text
from al_pipeline.operations.drift_looks import forget_request
from al_pipeline.operations.ingestion.traffic import TAKING, taken
from al_pipeline.traffic.store import TrafficStore
from al_pipeline.workspace.workspace import Workspace


@dataclass(frozen=True)
class Deletion:
    """What the deletion of a request did."""

    texts: int
    """Texts that were deleted from the log."""
    waiting: int
    """Texts that a running server still holds, which nobody reads any more."""
    items: tuple[str, ...]
    """Items of the pool and the test set that are from this request; they are not deleted."""


def show(workspace: Workspace) -> dict[str, Any]:
    """What the log of requests holds, and how many texts were taken into the pool."""
    layout, settings = workspace.layout, workspace.params.serve.log
    store = TrafficStore(layout.traffic)
    held = store.held()
    return {
        "folder": str(layout.traffic),
        "share": settings.share,
        "texts": held.texts,
        "from": _shown(held.first),
        "to": _shown(held.last),
        "bytes": held.bytes,
        "damaged_lines": held.damaged,
        "files": [str(path) for path in store.segments()],
        "chosen": taken(layout),
        "deleting": len(store.deleting()),
    }


def delete(workspace: Workspace, request_id: str, seconds: float = 10.0) -> Deletion:
    """Delete a request's texts from the log, and name the items of the pool that are from it.

    Waits up to `seconds` for a running server to let go of them. Raises NothingToDo if there is nothing of it.
    """
    layout = workspace.layout
    deleted = 0
    for path in layout.traffic.glob(TAKING):
        deleted += _drop(path, request_id)
    done = TrafficStore(layout.traffic).delete(request_id, seconds)
    forget_request(layout, request_id)
    folders = (layout.pool, layout.inbox_pool, layout.test, layout.inbox_test)
    items = tuple(
        item.item_id
        for batch in iter_items(folders)
        for item in batch
        if '"traffic"' in item.metadata and _request_of(item.metadata) == request_id
    )
    if not (deleted or done.texts or done.waiting or items):
        raise NothingToDo(f"the log of requests has no request {request_id!r}, and the pool no item of it")
    return Deletion(done.texts, done.waiting, items)


def _request_of(metadata: str) -> str | None:
    """The request that an item is from; None if it is from none."""
    found = json.loads(metadata)
    about = found.get("traffic") if found.get("source") == SOURCE else None
    return about.get("request_id") if isinstance(about, dict) else None


def _drop(path: Path, request_id: str) -> int:
    """Delete a request's rows from a file of chosen texts that waits for its tick."""
    rows = read_jsonl(path)
    kept = [row for row in rows if row["traffic"]["request_id"] != request_id]
    if len(kept) < len(rows):
        write_text(path, "".join(map(json_line, kept)), 0o600)
    return len(rows) - len(kept)


def _shown(time: int | None) -> str | None:
    return None if time is None else datetime.fromtimestamp(time / 1e6, UTC).isoformat(timespec="seconds")
