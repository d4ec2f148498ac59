"""A round's record is written from the type that reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from al_pipeline.evaluation.figures import FIGURES, Control, Decision, Estimate, Metrics
from al_pipeline.files import write_json
from al_pipeline.records import Selection
from al_pipeline.rounds.interventions import Intervention
from al_pipeline.rounds.manifests import Counts, Engine, NextBatch, Params, RoundRecord, TaskCounts, parse_record

NAME = "rounds/0003/round.json"
PARAMS = {
    "schema": {"version": 1, "question": "Is it spam?", "labels": ["ham", "spam"], "fields": ["text"]},
    "round": {"overlap": 1, "seed_size": 5},
    "evaluate": {"confidence": 0.95, "bootstrap": 100},
    "features": {"kind": "tfidf"},
    "annotators": [],
    "seed": 7,
    "schedule": {"cron": None},
    "gate": {"max_drop": 0.01},
}
ENGINE = {"version": "1", "sources": "ab", "packages": {"numpy": "2"}, "threads": 1}

words = st.text(st.characters(codec="utf-8"), max_size=8)
counts = st.integers(0, 10**6)
numbers = st.floats(-1e6, 1e6)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
moments = st.none() | st.floats(0, 2e11)
tallies = st.dictionaries(words, counts, max_size=3)
estimates = st.builds(Estimate, value=st.none() | numbers, low=st.none() | numbers)
interventions = st.builds(
    Intervention,
    number=counts,
    kind=st.just("revoke"),
    round=st.integers(0, 3),
    by=st.just("ann"),
    at=st.just("2026-03-01T14:00:00+00:00"),
    reason=st.just("a test"),
    labels=st.just(True),
    selection=st.just(Selection(annotator="ben")),
)
records = st.builds(
    RoundRecord,
    round=st.just(3),
    counts=st.builds(
        Counts, pool=counts, labelled=counts, pending=counts, ignored=counts, unlabelled=counts, ties=counts,
        test=counts, test_labelled=counts, events=counts, refused=counts, labels=tallies, test_labels=tallies,
    ),
    hashes=st.fixed_dictionaries({"model": digests, "params": digests}),
    params=st.just(Params.from_row(PARAMS)),
    overrides=st.just({}) | st.just({"size": 20, "strategy": "margin"}),
    engine=st.just(Engine.from_row(ENGINE)),
    metrics=st.builds(
        Metrics, items=counts, classes=st.just(("ham", "spam")), averaged=st.just(("ham",)),
        average_precision_of=st.just("macro"), per_class=st.just({}), confusion=st.just(((1, 2), (3, 4))),
        **dict.fromkeys(FIGURES, estimates),
    ),
    build=digests,
    project=st.none() | st.just({"project_id": 1, "project_uid": "ab"}),
    promoted_before=st.none() | st.just("round-0002"),
    reason=st.none() | words,
    opened_at=moments,
    closed_at=moments,
    seconds=st.dictionaries(words, numbers, max_size=3),
    parent=st.none() | st.just("a" * 40),
    control=st.none() | st.builds(Control, labels=counts, macro_f1=estimates),
    next_batch=st.none() | st.builds(NextBatch, strategy=words, reason=words),
    interventions=st.lists(interventions, max_size=2).map(tuple),
    decision=st.builds(Decision, verdict=st.just("held"), provisional=st.booleans(), reasons=st.just(("a", "b"))),
    answers=st.builds(
        TaskCounts, tasks=counts, answered=counts, given_up=counts, unanswered=counts, kept=counts, refused=tallies
    ),
)  # fmt: skip


@given(record=records)
def test_a_record_is_read_as_it_was_written_and_written_again_as_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, record: RoundRecord
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.json"
    write_json(path, record.to_json())
    written = path.read_bytes()
    read = parse_record(written.decode(), NAME)
    assert read == record
    assert read.to_row() == json.loads(written), "each key is written, also of what is unknown"
    write_json(path, read.to_json())
    assert path.read_bytes() == written


@given(record=records, left_out=st.sets(st.sampled_from(["build", "project", "reason", "opened_at", "seconds"])))
def test_a_record_of_another_version_keeps_its_own_keys(record: RoundRecord, left_out: set[str]) -> None:
    row: dict[str, Any] = {name: value for name, value in record.to_json().items() if name not in left_out}
    row["counts"] = {name: value for name, value in row["counts"].items() if name not in ("ties", "events")}
    row["of_a_newer_engine"] = {"any": [1, 2.5, None]}
    assert parse_record(json.dumps(row), NAME).to_row() == row
