"""Interventions: their words, which of them stand, and what they say of rounds. (Random histories: test_histories.)"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec.structs import replace

from al_pipeline.errors import BadInput
from al_pipeline.files import write_json
from al_pipeline.params import load_overrides
from al_pipeline.records import Selection, moment
from al_pipeline.rounds.interventions import (
    Intervention,
    abandoned,
    holding,
    in_effect,
    parse_intervention,
    pausing,
    promoted,
    read_intervention,
    waiting,
)
from al_pipeline.workspace.layout import is_ours


def intervention(number: int, kind: str = "rollback", at: int = 5, **values: object) -> Intervention:
    return Intervention(number, kind, at, "ann", "2026-01-01T00:00:00+00:00", "", **values)  # type: ignore[arg-type]


def back(number: int, at: int, to: int) -> Intervention:
    return intervention(number, "rollback", at, labels=True, to=to, parts=1)


def test_a_intervention_comes_back_as_it_went_and_nothing_else_is_one() -> None:
    one = replace(back(1, 5, 3), selection=Selection(annotator="ann"), before={"serves": None})
    assert parse_intervention(one.to_row(), "here") == one
    for bad in (
        {},
        [],
        None,
        {**one.to_row(), "kind": "dance"},
        {**one.to_row(), "new": 1},
        {**one.to_row(), "to": "3"},
        {**one.to_row(), "selection": {"label": 3}},
    ):
        with pytest.raises(BadInput, match="here is not a valid intervention"):
            parse_intervention(bad, "here")
    by_class = intervention(1, "revoke", labels=True, selection=Selection(label="ham"))
    assert parse_intervention(by_class.to_row(), "here") == by_class and "(label ham)" in by_class.sentence()
    assert "label" not in one.to_row()["selection"], "an earlier version reads an intervention without one"


def test_what_is_abandoned_and_what_takes_it_back() -> None:
    assert abandoned([back(1, at=9, to=5)]) == dict.fromkeys((6, 7, 8, 9), 1)
    undo = intervention(2, "undo", 10, labels=True, undoes=1)
    assert abandoned([back(1, 9, 5), undo]) == {}
    later = back(3, at=11, to=8)
    assert abandoned([back(1, 9, 5), later]) == dict.fromkeys((9, 10, 11), 3), "8 was before the first rollback"
    assert abandoned([back(1, 9, 5), back(3, at=11, to=9)]) == {**dict.fromkeys((6, 7, 8, 9), 1), 10: 3, 11: 3}
    assert abandoned([back(1, 9, 5), undo, back(3, at=12, to=9)]).keys() == {6, 7, 8, 9, 10, 11, 12}, (
        "the undo goes too"
    )
    assert [one.number for one in in_effect([back(1, 9, 5), undo])] == [2]


def test_the_newest_word_says_which_model_is_served() -> None:
    rounds = [(0, True), (1, False), (2, True)]
    assert promoted([], rounds) == "round-0002" and promoted([], []) is None
    serve = intervention(1, at=3, serves="round-0000", hold=True)
    assert promoted([serve], rounds) == "round-0000"
    assert promoted([serve], [*rounds, (3, True)]) == "round-0003", "a later record"
    approve = intervention(2, "approve", at=3, serves="round-0001", hold=False)
    assert promoted([serve, approve], rounds) == "round-0001"
    assert holding([serve]) is serve and holding([serve, approve]) is None


def test_pauses_and_what_waits() -> None:
    pause, resume = intervention(1, "pause"), intervention(2, "resume")
    assert pausing([pause]) is pause and pausing([pause, resume]) is None
    assert waiting([pause, back(2, 5, 3), back(3, 5, 2)], {2}) == [back(3, 5, 2)]


def test_since_takes_dates_and_zones() -> None:
    assert moment("2026-03-01") == datetime(2026, 3, 1, tzinfo=UTC)
    assert moment("2026-03-01T01:00+01:00") == moment("2026-03-01")


def test_files_and_records_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They were called rulings, and lay in `rounds/rulings/`."""
    one = back(1, 5, 3)
    assert read_intervention(json.dumps(one.to_row()), "rounds/rulings/000001.json") == one
    assert is_ours("rounds/rulings/000001.json") and is_ours("rounds/interventions/000001.json")
    write_json(tmp_path / "overrides.json", {"round": 1, "rulings": [1]})
    assert load_overrides(tmp_path / "overrides.json").interventions == [1]
