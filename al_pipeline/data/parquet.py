"""Columns of Parquet files, made without pandas.

pyarrow imports pandas as soon as it is handed a list, a numpy array or a file to `read_table`: a third of a second and
40 MB for each of the processes that a round starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def strings(values: Sequence[str]) -> pa.Array:
    """Texts, shape (n,), as `pa.array(values, pa.string())` would have them."""
    builder = pa.lib.StringBuilder()
    builder.append_values(values)
    return builder.finish()


def integers(values: Sequence[int]) -> pa.Array:
    """Whole numbers, (n,), of 64 bits."""
    return _numbers(np.array(values, dtype=np.int64), pa.int64())


def floats(values: Sequence[float] | NDArray[np.float64]) -> pa.Array:
    """Numbers, (n,), of 64 bits."""
    return _numbers(np.array(values, dtype=np.float64), pa.float64())


def float_rows(values: NDArray[np.float64]) -> pa.Array:
    """Equally long lists of numbers of 64 bits: the rows of (n, m)."""
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(_numbers(ends, pa.int32()), floats(values.ravel()))


def _numbers(values: NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
