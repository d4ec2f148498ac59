"""What stages write comes back as it was, and equal rows give equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from al_pipeline.data.outputs import (
    Predictions,
    flat,
    parse_predictions,
    read_labeled,
    read_queries,
    read_scores,
    read_unresolved,
    write_labeled,
    write_predictions,
    write_queries,
    write_scores,
    write_unresolved,
)
from al_pipeline.errors import BadInput
from al_pipeline.records import LabeledItem, Query, Unresolved

shared_folder = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WORD = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.integers(-(2**40), 2**40)
LABELED = st.lists(st.builds(LabeledItem, TEXT, TEXT, TEXT, NUMBER, SMALL, SMALL), max_size=5)
UNRESOLVED = st.lists(st.builds(Unresolved, TEXT, TEXT, TEXT, TEXT, SMALL), max_size=5)


@given(LABELED, UNRESOLVED)
@shared_folder
def test_sets_come_back_and_equal_rows_give_equal_bytes(
    tmp_path: Path, labeled: list[LabeledItem], unresolved: list[Unresolved]
) -> None:
    for name in ("one", "two"):
        write_labeled(tmp_path / name, labeled)
        write_unresolved(tmp_path / f"{name}-unresolved", unresolved)
    assert read_labeled(tmp_path / "one") == labeled
    assert read_unresolved(tmp_path / "one-unresolved") == unresolved
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one-unresolved").read_bytes() == (tmp_path / "two-unresolved").read_bytes()


@given(st.lists(st.tuples(TEXT, NUMBER), max_size=6))
@shared_folder
def test_scores_come_back_in_their_order(tmp_path: Path, rows: list[tuple[str, float]]) -> None:
    proba = np.array([[score, -score, 1.0] for _, score in rows]).reshape(-1, 3)
    write_scores(tmp_path / "scores", [row[0] for row in rows], np.array([row[1] for row in rows]), proba)
    ids, scores, found = read_scores(tmp_path / "scores")
    assert list(zip(ids, scores.tolist(), strict=True)) == rows
    assert found.tolist() == proba.tolist()
    assert scores.dtype == np.float64


@given(
    st.lists(st.builds(Query, item_id=TEXT, rank=SMALL, score=NUMBER, strategy=TEXT, probability=NUMBER), max_size=4)
)
@shared_folder
def test_queries_come_back_in_their_order(tmp_path: Path, queries: list[Query]) -> None:
    write_queries(tmp_path / "queries", queries)
    assert read_queries(tmp_path / "queries") == queries


@given(
    st.lists(WORD, min_size=2, max_size=4, unique=True),
    st.lists(st.tuples(WORD, st.integers(0, 1), st.floats(0, 1)), max_size=5),
)
@shared_folder
def test_predictions_come_back_to_nine_digits(
    tmp_path: Path, classes: list[str], rows: list[tuple[str, int, float]]
) -> None:
    proba = np.array([[row[2], *[(1 - row[2]) / (len(classes) - 1)] * (len(classes) - 1)] for row in rows])
    proba = proba.reshape(len(rows), len(classes))
    given_ = Predictions(tuple(r[0] for r in rows), tuple(classes[r[1]] for r in rows), tuple(classes), proba)
    write_predictions(tmp_path / "p.csv", given_)
    found = parse_predictions((tmp_path / "p.csv").read_text(encoding="utf-8"))
    assert (found.item_ids, found.labels, found.classes) == (given_.item_ids, given_.labels, given_.classes)
    np.testing.assert_allclose(found.proba, proba, rtol=1e-8, atol=1e-300)
    assert found.proba.shape == (len(rows), len(classes))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n",
        "item_id\n",
        "item_id,label,ham,spam\nx,ham,many,0.5\n",
        "item_id,label,ham,spam\nx,ham,0.5\n",
        "item_id,label,ham,spam\nx,ham,0.5,0.5,0.5\n",
        "item_id,label,ham,spam\nx,ham,0.5,0.5\n\n",
        "item_id,label,ham,spam\nx\n",
    ],
)
def test_what_is_no_file_of_predictions_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"predictions\.csv"):
        parse_predictions(text)


def test_nested_values_become_one_level() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
    assert flat({}) == {}
