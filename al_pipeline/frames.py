"""A workspace as pandas tables, for notebooks: published rounds, the labelled set, predictions on the test set.

frames.rounds("spam").plot(x="labelled", y="macro_f1")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from al_pipeline.data.outputs import parse_predictions, read_labeled
from al_pipeline.data.pool import iter_items
from al_pipeline.errors import NothingToDo
from al_pipeline.evaluation.figures import FIGURES
from al_pipeline.integrations.git import Git
from al_pipeline.operations import status
from al_pipeline.operations.history import read_history
from al_pipeline.workspace.workspace import open_workspace


def rounds(workspace: str | Path = ".") -> pd.DataFrame:
    """One row per published round: its number, labels, verdict, and each metric with its interval (`_low`, `_high`)."""
    rows: list[dict[str, Any]] = []
    for found in status.rounds(open_workspace(Path(workspace))):
        row: dict[str, Any] = {
            "round": found.number,
            "labelled": found.labels,
            "test_labelled": found.test_labels,
            "verdict": found.decision.verdict,
        }
        for name in FIGURES:
            estimate = found.metrics.figure(name)
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        rows.append(row)
    return pd.DataFrame(rows)


def labeled(workspace: str | Path = ".") -> pd.DataFrame:
    """The labelled set: item_id, text, label, agreement, answers, round, and confidence if labels have one.

    Raises NothingToDo if nothing is labelled.
    """
    layout = open_workspace(Path(workspace)).layout
    if not layout.labeled.exists():
        raise NothingToDo("nothing is labelled yet; `al status` says what the round waits for")
    columns, rows = ["item_id", "label", "agreement", "answers", "round"], read_labeled(layout.labeled)
    columns += ["confidence"] if any(row.confidence is not None for row in rows) else []
    labels = pd.DataFrame([[getattr(row, name) for name in columns] for row in rows], columns=columns)
    wanted = set(labels["item_id"])
    texts = {item.item_id: item.text for batch in iter_items([layout.pool]) for item in batch if item.item_id in wanted}
    labels.insert(1, "text", labels["item_id"].map(texts))
    return labels


def predictions(workspace: str | Path = ".") -> pd.DataFrame:
    """The newest published model's test predictions: item_id, label, predicted, and `p_<class>` for each class.

    Raises NothingToDo if no model is published yet.
    """
    layout = open_workspace(Path(workspace)).layout
    git = Git(layout.root)
    if read_history(layout, git).latest is None:
        raise NothingToDo("no model is published yet; `al status` says what the round waits for")
    found = parse_predictions(git.show("HEAD", "rounds/predictions.csv") or "item_id,label\n")
    table = pd.DataFrame(found.proba, columns=[f"p_{name}" for name in found.classes])
    best = [found.classes[column] for column in found.proba.argmax(axis=1)] if len(table) else []
    table.insert(0, "predicted", best)
    table.insert(0, "label", list(found.labels))
    table.insert(0, "item_id", list(found.item_ids))
    return table
