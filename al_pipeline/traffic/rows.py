"""The rows of the log: a line of a journal for each request, a row of a segment for each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = (
    "time", "request_id", "place", "text", "redacted", "round", "digest", "runtime", "label", "probability", "classes",
    "probabilities", "propensity",
)  # fmt: skip
"""The columns of a segment, in their order."""


class LoggedRequest(Struct, frozen=True):
    """Texts of one request, with the answer to each."""

    time: int
    """Microseconds since 1970."""
    request_id: str
    round: int
    digest: str
    runtime: str
    propensity: float
    """The probability with which a request is logged."""
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    places: tuple[int, ...]
    """The number of each text in its request, from 0: a redaction can leave texts out."""
    proba: tuple[tuple[float, ...], ...]
    """The probability of each class, for each text."""
    redacted: tuple[bool, ...] = ()
    """Whether each text was changed before it was written; empty: none was."""


class LoggedText(Struct, frozen=True):
    """One text, with what the model said of it."""

    time: int
    request_id: str
    place: int
    text: str
    redacted: bool
    round: int
    digest: str
    runtime: str
    label: str
    """The most probable class, also where the model abstained."""
    probability: float
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    propensity: float

    @property
    def margin(self) -> float:
        """The difference of the two largest probabilities."""
        first, second = sorted(self.probabilities, reverse=True)[:2]
        return first - second


def to_line(request: LoggedRequest) -> bytes:
    """A line of a journal. Raises UnicodeError for a text that UTF-8 cannot encode."""
    return msgspec.json.encode(request) + b"\n"


def from_line(line: bytes) -> LoggedRequest | None:
    """The request of a line; None if the line is damaged."""
    try:
        found = _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    shown = len(found.texts)
    whole = len(found.places) == len(found.proba) == shown and len(found.redacted) in (0, shown)
    return found if whole and all(len(row) == len(found.classes) > 1 for row in found.proba) else None


_DECODER = msgspec.json.Decoder(LoggedRequest)


def texts_of(request: LoggedRequest) -> Iterator[LoggedText]:
    """The texts of a request."""
    redacted = request.redacted or (False,) * len(request.texts)
    for place, text, changed, row in zip(request.places, request.texts, redacted, request.proba, strict=True):
        best = row.index(max(row))
        yield LoggedText(
            request.time,
            request.request_id,
            place,
            text,
            changed,
            request.round,
            request.digest,
            request.runtime,
            request.classes[best],
            row[best],
            request.classes,
            row,
            request.propensity,
        )


def to_table(rows: Sequence[LoggedText]) -> pa.Table:
    """The rows as a table with the columns COLUMNS."""
    import pyarrow as pa

    from al_pipeline.data.parquet import floats, integers, strings

    times = integers([row.time for row in rows]).view(pa.timestamp("us", "UTC"))
    ends = pa.Array.from_buffers(
        pa.int32(),
        len(rows) + 1,
        [None, pa.py_buffer(np.cumsum([0, *(len(row.classes) for row in rows)], dtype=np.int32))],
    )
    classes = strings(list(chain.from_iterable(row.classes for row in rows)))
    proba = floats(list(chain.from_iterable(row.probabilities for row in rows)))
    changed = integers([row.redacted for row in rows]).cast(pa.bool_())
    columns = {
        "time": times,
        "request_id": strings([row.request_id for row in rows]),
        "place": integers([row.place for row in rows]),
        "text": strings([row.text for row in rows]),
        "redacted": changed,
        "round": integers([row.round for row in rows]),
        "digest": strings([row.digest for row in rows]),
        "runtime": strings([row.runtime for row in rows]),
        "label": strings([row.label for row in rows]),
        "probability": floats([row.probability for row in rows]),
        "classes": pa.ListArray.from_arrays(ends, classes),
        "probabilities": pa.ListArray.from_arrays(ends, proba),
        "propensity": floats([row.propensity for row in rows]),
    }
    return pa.Table.from_arrays([columns[name] for name in COLUMNS], names=list(COLUMNS))


def from_batch(batch: Any) -> Iterator[LoggedText]:
    """The rows of a record batch with the columns COLUMNS."""
    import pyarrow as pa

    columns = {
        name: (column.cast(pa.int64()) if name == "time" else column).to_pylist()
        for name, column in zip(COLUMNS, (batch.column(name) for name in COLUMNS), strict=True)
    }
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(COLUMNS, values, strict=True))
        yield LoggedText(**{**row, "classes": tuple(row["classes"]), "probabilities": tuple(row["probabilities"])})
