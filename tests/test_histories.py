"""A bounded run of random histories (tests/histories.py and real_histories.py), and those that once failed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from harness import Played, copy_workspace, go_on
from histories import Step, check, steps_of
from real_histories import BEGINNING, RealWorld, play_real, real_steps_of

KEPT: dict[str, list[Step]] = {
    "a revocation after the snapshot stayed in force": [
        ("begin", 1198),
        ("answer", 250206),
        ("restore", 149416),
        ("close_the_round", 95646),
        ("revoke", 114355),
        ("roll_back", 130873),
    ],
    "a restoration spoke of an answer that counts, and brought its withdrawal back": [
        ("begin", 902385),
        ("another_class", 14160),
        ("another_class", 771590),
        ("answer", 733475),
        ("close_the_round", 238286),
        ("delete", 960698),
        ("roll_back", 316371),
        ("restore", 296545),
    ],
}
"""Histories that failed, with what was wrong."""


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_histories_keep_all_promises(first: int) -> None:
    for seed in range(first, first + 10):
        check(steps_of(seed))


@pytest.mark.parametrize("first", range(60, 100, 10))
def test_random_histories_of_days_keep_all_promises(first: int) -> None:
    """An hour passes between two steps, so that a pull reads what is new and an audit must find the rest."""
    for seed in range(first, first + 10):
        check(steps_of(seed), pause=3600, rolling=1, audits=seed % 2 == 1)


@pytest.mark.parametrize("name", KEPT)
def test_histories_that_once_failed(name: str) -> None:
    check(KEPT[name])


@pytest.fixture(scope="module")
def begun(started: Played, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RealWorld]:
    """A workspace with a published round, and its people."""
    folder = tmp_path_factory.mktemp("begun")
    workspace, oracle, _ = go_on(started, folder)
    world = RealWorld(workspace, oracle)
    play_real(world, BEGINNING)
    return folder / "copy", world


@pytest.mark.slow
@pytest.mark.parametrize("seed", [16, 5, 8])  # which go back, take that back, revoke, restore and close
def test_random_histories_of_real_ticks_and_builds(begun: Any, tmp_path: Path, seed: int) -> None:
    world = copy.deepcopy(begun[1])
    world.move(copy_workspace((begun[0], {}), tmp_path))
    play_real(world, real_steps_of(seed, rounds=2))
