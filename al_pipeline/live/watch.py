"""The state of `al live` as tables, for a terminal and for Prefect."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from al_pipeline.live.state import SILENT_SECONDS, Interval, LiveState
from al_pipeline.sanitize import counted

NOTHING = "–"


class Table(Struct, frozen=True):
    """A table of texts."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def figures(state: LiveState) -> list[tuple[str, str]]:
    """What the page shows at its top, as name and value."""
    running, at_work = state.running, sum(one.at_work for one in state.people)
    opened = "none open" if state.round is None else f"{state.round}: {state.settled} of {state.round_size} answered"
    return [
        ("running accuracy", NOTHING if running is None else accuracy(running)),
        ("labels", f"{state.labels:,}, and {state.test_labels:,} of the test set"),
        ("labels per hour", f"{state.labels_per_hour:,.0f}"),
        ("round", opened),
        ("at work", f"{at_work} of {len(state.people)} who answered in this round"),
        ("open questions", f"{len(state.queue)}, {state.stale} of them by an earlier model"),
        ("newest model", f"knows {counted(state.model_labels, 'label')}"),
        ("stop", f"{'proposed' if state.stop.proposed else 'not yet'}: {state.stop.sentence}"),
    ]


def tables(state: LiveState, *, texts: bool = True) -> list[Table]:
    """What the page shows below: curve, questions, classes, people. `texts`: with the texts of open questions."""
    curve = tuple(
        (f"{p.labels:,}", p.what, f"{p.round}", _percent(p.value), _span(p.low, p.high)) for p in state.curve[-8:]
    )
    queue = tuple(
        (
            one.text if texts and one.text else one.item_id,
            one.kind,
            one.predicted or NOTHING,
            NOTHING if one.confidence is None else _percent(one.confidence),
            f"{one.score:.3f}",
            _ago(one.seconds),
        )
        for one in state.queue
    )
    classes = tuple(
        (
            one.name,
            f"{one.labels:,}",
            f"{one.predicted:,}",
            NOTHING if one.uncertainty is None else f"{one.uncertainty:.3f}",
        )
        for one in state.classes
    )
    people = tuple(
        (one.name, f"{one.answers:,}", f"{_ago(one.seconds_ago)} ago", "yes" if one.at_work else "no")
        for one in state.people
    )
    shown = [
        Table("Learning curve, its newest points", ("labels", "measure", "round", "accuracy", "interval"), curve),
        Table("Unsure of", ("text" if texts else "item", "asked", "guess", "confidence", "score", "waits"), queue),
        Table("Classes", ("class", "labels", "predicted in a sample", "uncertainty"), classes),
        Table("People", ("person", "answers", "last answer", "at work"), people),
    ]
    return [table for table in shown if table.rows]


def standing(state: LiveState, now: float, runs: bool) -> str:
    """Whether the state is of a process that runs and is well, in a sentence. `now`: seconds since 1970."""
    age = max(0.0, now - state.time)
    if not runs:
        return f"`al live` does not run; this is what it showed {_ago(age)} ago"
    if age > SILENT_SECONDS:
        return f"`al live` runs, but has shown nothing new for {_ago(age)}; {state.health}"
    if state.health != "up":
        return state.health
    return f"up, updated {age:.0f} s ago" + (f"; {state.waits_for}" if state.waits_for else "")


def accuracy(found: Interval) -> str:
    """An accuracy with its interval and the number of answers that it is from."""
    if found.value is None:
        return NOTHING
    span = _span(found.low, found.high)
    return f"{_percent(found.value)}{f' ({span})' if span else ''}, from {counted(found.answers, 'random answer')}"


def for_prefect(state: LiveState) -> Sequence[dict[str, str]]:
    """The rows of Prefect's table. Without texts: they stay in the workspace and Label Studio."""
    rows = [{"what": name, "value": value} for name, value in figures(state)]
    for table in tables(state, texts=False):
        rows += [
            {
                "what": f"{table.title}: {row[0]}",
                "value": ", ".join(f"{n} {v}" for n, v in zip(table.header[1:], row[1:], strict=True)),
            }
            for row in table.rows
        ]
    return rows


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _span(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_percent(low)} to {_percent(high)}"


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"
