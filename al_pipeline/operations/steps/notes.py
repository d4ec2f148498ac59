"""Notes on a round that ticks keep: times, why it closed, Label Studio's task ids. They may be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from al_pipeline.files import read_object, write_json
from al_pipeline.workspace.layout import Layout


def recall(layout: Layout, planned: int | None) -> dict[str, Any]:
    """Read the notes on round `planned` (None: the first build); empty if there are none."""
    return read_object(_file(layout, planned))


def remember(layout: Layout, planned: int | None, **values: Any) -> None:
    """Add `values` to the notes on round `planned`."""
    write_json(_file(layout, planned), {**recall(layout, planned), **values})


def _file(layout: Layout, planned: int | None) -> Path:
    return layout.private / "rounds/genesis.json" if planned is None else layout.state(planned)
