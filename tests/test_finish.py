"""What a model may label: the bounds hold, and `al finish` writes a file that nothing is trained on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from harness import Played, go_on, play
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from al_pipeline.cli.app import app
from al_pipeline.data.ledger import read_events
from al_pipeline.data.outputs import read_labeled
from al_pipeline.errors import BadInput, NothingToDo, UsageError
from al_pipeline.stopping.rest import GRID, Rule, accepted, rules
from al_pipeline.workspace.workspace import open_workspace

CLASSES = ("a", "b")


def drawn(rng: np.random.Generator, items: int) -> tuple[Any, Any, Any]:
    """Predicted classes, confidences, and whether right; class b is overconfident."""
    predicted = (rng.random(items) < 0.3).astype(np.intp)
    confidence = 0.5 + 0.5 * rng.beta(3, 1, items)
    chance = np.where(predicted == 1, confidence * 0.9, confidence)
    return predicted, confidence, rng.random(items) < chance


def test_the_bounds_hold_together_in_nearly_all_projects() -> None:
    rng, broken, covered = np.random.default_rng(3), 0, 0.0
    predicted, confidence, is_right = drawn(rng, 400_000)
    for _ in range(200):
        sample = rng.integers(0, len(predicted), 1500)
        found = rules(predicted[sample], confidence[sample], is_right[sample], CLASSES, 0.08)
        taken = np.zeros(len(predicted), bool)
        for place, rule in enumerate(found):
            if rule.threshold is not None:
                own = (predicted == place) & (confidence >= rule.threshold)
                broken += bool((~is_right[own]).mean() > 0.08)
                taken |= own
        covered += taken.mean() / 200
    assert broken <= 4, "at most 5 % are allowed, and Bonferroni leaves some of that"
    assert covered > 0.1


@given(st.integers(0, 10**6), st.floats(0.01, 0.5), st.integers(1, 30))
def test_a_rule_is_the_lowest_threshold_that_passes(seed: int, bound: float, model: int) -> None:
    predicted, confidence, is_right = drawn(np.random.default_rng(seed), 600)
    found = rules(predicted, confidence, is_right, CLASSES, bound, model=model)
    by_class = {rule.label: rule for rule in found}
    for place, rule in enumerate(found):
        own = predicted == place
        if rule.threshold is None:
            assert (rule.tested, rule.wrong) == (own.sum(), (~is_right[own]).sum())
            assert rule.error is None
            assert not accepted(rule.label, 1.0, by_class)
            continue
        assert rule.threshold in GRID
        own &= confidence >= rule.threshold
        assert (rule.tested, rule.wrong) == (own.sum(), (~is_right[own]).sum())
        assert rule.error is not None
        assert rule.wrong / rule.tested <= rule.error <= bound
        assert rule.lacking == 0
        assert accepted(rule.label, rule.threshold, by_class)
        assert rule.threshold == 0 or not accepted(rule.label, rule.threshold - 1e-9, by_class)


def test_what_is_lacking_suffices() -> None:
    predicted, confidence = np.zeros(60, np.intp), np.full(60, 0.99)
    is_right = np.ones(60, bool)
    (first, second) = rules(predicted, confidence, is_right, CLASSES, 0.05)
    assert first == Rule("a", None, 60, 0, None, first.lacking)
    assert second == Rule("b", None, 0, 0, None, None)
    assert first.lacking is not None
    more = first.lacking
    grown = rules(np.zeros(60 + more, np.intp), np.full(60 + more, 0.99), np.ones(60 + more, bool), CLASSES, 0.05)
    assert grown[0].threshold == 0.0
    fewer = 60 + more - 6
    assert (
        rules(np.zeros(fewer, np.intp), np.full(fewer, 0.99), np.ones(fewer, bool), CLASSES, 0.05)[0].threshold is None
    )


@pytest.mark.parametrize(("bound", "level"), [(0.0, 0.95), (1.0, 0.95), (0.1, 0.0), (0.1, 1.0)])
def test_shares_that_are_none_are_refused(bound: float, level: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and below 1"):
        rules(np.zeros(1, np.intp), np.ones(1), np.ones(1, bool), CLASSES, bound, level)


def test_al_finish(twice: Played, tmp_path: Path) -> None:
    workspace, oracle, truth = go_on(twice, tmp_path)
    root, layout = workspace.layout.root, workspace.layout

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["-C", str(root), "finish", *words])

    assert call("--dry-run").exit_code != 0, "nothing can be shown with 16 test items"
    refused = call("--dry-run").exception
    assert isinstance(refused, NothingToDo)
    assert "random labels are lacking" in str(refused)
    before = [event.event_id for event in read_events(layout.events, layout.inbox_events)]
    shown = call("--dry-run", "--bound", "0.9", "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["out"] is None
    labelled = {row.item_id: row.label for row in read_labeled(layout.labeled)}
    assert found["people"] == len(labelled)
    assert found["model"] > 0
    out = tmp_path / "labels.parquet"
    assert call("-o", str(out), "--bound", "0.9").exit_code == 0
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == found["people"] + found["model"] + found["left"]
    for row in rows:
        if row["source"] == "people":
            assert row["label"] == labelled.pop(row["item_id"])
        else:
            assert (row["source"] == "model") == bool(row["label"])
            assert row["error_bound"] == (0.9 if row["label"] else None)
            assert row["confidence"] > 0
    assert not labelled
    assert isinstance(call("-o", str(out), "--bound", "0.9").exception, BadInput), "it exists"
    for suffix in ("csv", "jsonl"):
        path = tmp_path / f"labels.{suffix}"
        assert call("-o", str(path), "--bound", "0.9").exit_code == 0
        lines = path.read_text(encoding="utf-8").splitlines()
        read = list(csv.DictReader(lines)) if suffix == "csv" else [json.loads(line) for line in lines]
        assert [row["item_id"] for row in read] == [row["item_id"] for row in rows]
        assert [row["label"] for row in read] == [row["label"] for row in rows]
    for words in (("-o", str(tmp_path / "x.txt")), ("-o", str(out), "--dry-run"), (), ("--dry-run", "--bound", "2")):
        assert isinstance(call(*words).exception, UsageError)
    assert [event.event_id for event in read_events(layout.events, layout.inbox_events)] == before
    play(open_workspace(root), oracle, truth, 1)
    assert sum(row.round >= 0 for row in read_labeled(layout.labeled)) < len(rows) / 2, "people's labels alone"
