"""Columns of Parquet files, built without pandas.

pyarrow imports pandas when it converts a list or a numpy array, or reads a file with `read_table`. The import costs a
third of a second and 40 MB in each process of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def strings(values: Sequence[str]) -> pa.Array:
    """A string column, shape (n,), equal to `pa.array(values, pa.string())`."""
    builder = pa.lib.StringBuilder()
    builder.append_values(values)
    return builder.finish()


def integers(values: Sequence[int] | NDArray[np.signedinteger[Any]]) -> pa.Array:
    """An int64 column, shape (n,)."""
    return _numbers(np.array(values, dtype=np.int64), pa.int64())


def floats(values: Sequence[float] | NDArray[np.float64]) -> pa.Array:
    """A float64 column, shape (n,)."""
    return _numbers(np.array(values, dtype=np.float64), pa.float64())


def float_rows(values: NDArray[np.float64]) -> pa.Array:
    """A column of float64 lists of equal length: the rows of an (n, m) array."""
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(_numbers(ends, pa.int32()), floats(values.ravel()))


def _numbers(values: NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
