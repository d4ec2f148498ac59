"""Simulated colleagues: how right they are, and that a larger overlap adds people and changes nobody's answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.errors import NothingToDo
from al_pipeline.params import load_params
from examples.spam import demo, live, team
from examples.spam.colleagues import Colleague, acts_for

LABELS = ("ham", "spam")
ROOT = Path(__file__).parents[1]


def colleagues(skip_rate: float = 0.02) -> list[Colleague]:
    return [Colleague(who, "token", skip_rate=skip_rate, **care) for who, care in team.CARE.items()]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(key=st.text(max_size=20), seed=st.integers(0, 2**31), overlap=st.integers(0, 6), skips=st.sampled_from([0, 0.3]))
def test_a_larger_overlap_adds_people_and_changes_nothing(key: str, seed: int, overlap: int, skips: float) -> None:
    people = colleagues(skips)
    acts = acts_for(key, overlap, "spam", LABELS, people, seed)
    assert acts == acts_for(key, overlap + 1, "spam", LABELS, people[::-1], seed)[: len(acts)]
    assert len({act.email for act in acts}) == len(acts)
    answers = sum(act.kind == "answer" for act in acts)
    assert answers == overlap or (answers < overlap and len(acts) == len(people))
    assert all((act.label is None) == (act.kind == "skip") and act.seconds > 0 for act in acts)


def test_people_are_as_right_as_their_care_says() -> None:
    people = colleagues()
    right = {person.email: [0, 0] for person in people}
    for number in range(4000):
        for act in acts_for(f"ws:0001:{number}", 2, LABELS[number % 2], LABELS, people, 7):
            if act.kind == "answer":
                right[act.email][0] += act.label == LABELS[number % 2]
                right[act.email][1] += 1
    for person in people:
        hits, total = right[person.email]
        assert total == pytest.approx(4000 * 2 / len(people), rel=0.1)
        assert hits / total == pytest.approx(person.share_right(2), abs=0.03)


@pytest.mark.parametrize("settings", [demo.SETTINGS, team.SETTINGS, live.SETTINGS | {"live.enabled": "true"}])
def test_the_settings_are_valid_parameters(tmp_path: Path, settings: dict[str, str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    demo.set_params(path, settings)
    params = load_params(path)
    assert params.round.quorum == float(settings.get("round.quorum", 0.9))
    assert params.labels.min_confidence == float(settings.get("labels.min_confidence", 0))
    assert params.live.enabled == ("live.enabled" in settings)
    assert params.serve is None or params.serve.min_confidence == 0, "of another section"
    with pytest.raises(NothingToDo, match=r"0 lines for round\.no_such"):
        demo.set_params(path, {"round.no_such": "1"})
