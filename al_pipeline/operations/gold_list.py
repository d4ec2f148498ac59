"""The gold items with their answers, for `al gold list`. Reads only."""

from __future__ import annotations

from collections import Counter
from typing import Any

from al_pipeline.annotation.active_events import active
from al_pipeline.annotation.gold import answers_to_gold, gold_items
from al_pipeline.data.ledger import read_events
from al_pipeline.integrations.git import Git
from al_pipeline.operations.gold_figures import GoldStatus, gold_status
from al_pipeline.operations.history import read_plans
from al_pipeline.operations.quality import gold_keys_of
from al_pipeline.workspace.workspace import Workspace


def gold_list(workspace: Workspace) -> tuple[list[dict[str, Any]], GoldStatus | None]:
    """Each gold item with its label, whether it is trained on and how many people have answered it; and the people."""
    layout, git = workspace.layout, Git(workspace.layout.root)
    counted = active(read_events(layout.events, layout.inbox_events))
    asked = Counter(one.item_id for one in answers_to_gold(counted, gold_keys_of(git)))
    items = [
        {"item": one.item_id, "label": one.label, "train": one.train, "answers": asked[one.item_id]}
        for one in sorted(gold_items(counted).values(), key=lambda one: one.item_id)
    ]
    return items, gold_status(workspace.params, counted, read_plans(git))
