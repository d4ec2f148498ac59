"""Columns are what pyarrow would have made of the same lists, without pandas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.data.parquet import floats, integers, strings

WRITE_AND_READ = """
import sys
import numpy as np
from pathlib import Path
from al_pipeline.data import outputs as results
from al_pipeline.data import pool as items
from al_pipeline.records import Item, LabeledItem, Unresolved
folder = Path(sys.argv[1])
results.write_labeled(folder / "labeled", [LabeledItem("a", "0" * 64, "ham", 1.0, 1, 0)])
results.write_unresolved(folder / "unresolved", [Unresolved("b", "pool", "tie", "", 1)])
results.write_scores(folder / "scores", ["a", "b"], np.array([0.5, 0.25]), np.eye(2))
print(results.read_labeled(folder / "labeled")[0].item_id, results.read_unresolved(folder / "unresolved")[0].kind)
print([found.tolist() for found in results.read_scores(folder / "scores")[1:]])
items.write_items(folder / "part-000001.parquet", [[Item("a", "0" * 64, "text")]])
print(list(items.read_ids([folder]).ids()), items.fetch([folder], ["a"])["a"].text)
print([name for name in ("pandas", "pyarrow.dataset", "sklearn", "torch") if name in sys.modules])
"""


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings(values: list[str]) -> None:
    assert strings(values).equals(pa.array(values, pa.string()))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers(values: list[int]) -> None:
    assert integers(values).equals(pa.array(values, pa.int64()))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(allow_nan=False)))
def test_floats(values: list[float]) -> None:
    assert floats(values).equals(pa.array(values, pa.float64()))


def test_what_stages_read_and_write_takes_no_heavy_import(tmp_path: Path) -> None:
    """Each of these would cost every process of a round a third of a second or more."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_READ, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    scores = "[[0.5, 0.25], [[1.0, 0.0], [0.0, 1.0]]]"
    assert done.stdout.splitlines() == ["a tie", scores, "['a'] text", "[]"], done.stdout + done.stderr
