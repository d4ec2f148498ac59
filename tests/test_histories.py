"""A bounded run of random histories (tests/histories.py), and those that once failed."""

from __future__ import annotations

import pytest
from histories import Step, check, steps_of

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


@pytest.mark.parametrize("name", KEPT)
def test_histories_that_once_failed(name: str) -> None:
    check(KEPT[name])
