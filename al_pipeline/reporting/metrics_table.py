"""A model's metrics as rows for the report: intervals, changes, metrics by class, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from al_pipeline.evaluation.figures import Estimate, Metrics
from al_pipeline.reporting.html import excerpt, fixed, interval
from al_pipeline.reporting.view_model import ReportData, RoundRow

DENSE_CLASSES = 5
"""With more classes the matrix takes the full width, and its columns are numbered."""
BARE_CLASSES = 12
"""With more classes the cells of the matrix show only counts; the shade still shows the share."""
MATRIX_CLASSES = 25
"""With more classes a matrix is unreadable: the most frequent confusions are listed instead."""

METRIC_NAMES = {
    "macro_f1": "Macro-F1",
    "accuracy": "Accuracy",
    "average_precision": "Average precision",
    "log_loss": "Log loss",
    "calibration_error": "Calibration error",
}
"""All metrics in display order, with their names on the page."""

_MEANING = {
    "macro_f1": "F1 of each class, averaged; higher is better",
    "accuracy": "share of test items given the right label; higher is better",
    "average_precision": "how well the classes are ranked, over all thresholds; higher is better",
    "log_loss": "penalises confident mistakes; lower is better, 0 is perfect",
    "calibration_error": "gap between predicted confidence and accuracy; lower is better",
}
_UNBOUNDED = frozenset({"log_loss"})


def figure(metrics: Metrics | None, name: str) -> Estimate:
    """A metric by name; an empty estimate if nothing was measured."""
    return metrics.figure(name) if metrics else Estimate(value=None)


def round_before(report: ReportData) -> RoundRow | None:
    """The previous round; None if there is none."""
    earlier = [row for row in report.history if row.number < report.round]
    return max(earlier, key=lambda row: row.number, default=None)


def metric_change(report: ReportData, name: str, digits: int = 2) -> str:
    """The change of a metric since the previous round, such as `+0.04`; empty if unknown, or if the classes changed."""
    if any(row.new_classes for row in report.history if row.number == report.round):
        return ""
    before = round_before(report)
    now, then = figure(report.metrics, name).value, figure(before.metrics if before else None, name).value
    if now is None or then is None:
        return ""
    change = round(now - then, digits)
    return f"{change:+.{digits}f}".replace("-", "−") if change else f"±{0:.{digits}f}"


def metric_name(report: ReportData, name: str) -> str:
    """A metric's name on the page. With two classes, average precision is that of one class, which is named."""
    of = report.metrics.average_precision_of if report.metrics and name == "average_precision" else "macro"
    return METRIC_NAMES[name] if of == "macro" else f"{METRIC_NAMES[name]} ({excerpt(of, 40)})"


def metric_row(report: ReportData, name: str) -> dict[str, Any]:
    """One metric with everything that the page shows of it."""
    estimate = figure(report.metrics, name)
    return {
        "name": metric_name(report, name),
        "meaning": _MEANING[name],
        "value": fixed(estimate.value, 3),
        "interval": interval(estimate, 3),
        "reason": estimate.reason or "",
        "change": metric_change(report, name, 3),
        "bar": None if name in _UNBOUNDED else interval_bar(estimate),
    }


def interval_bar(estimate: Estimate) -> dict[str, float] | None:
    """The positions of a value in [0, 1] and of its interval's start, and the interval's width, in per cent."""
    if estimate.value is None:
        return None
    bar = {"at": 100 * _unit(estimate.value)}
    if estimate.low is not None and estimate.high is not None:
        bar |= {"from": 100 * _unit(estimate.low), "width": 100 * (_unit(estimate.high) - _unit(estimate.low))}
    return bar


def averaged(report: ReportData) -> str:
    """A sentence naming the classes that macro metrics leave out; empty if there are none."""
    metrics = report.metrics
    if metrics is None or len(metrics.averaged) >= len(metrics.classes):
        return ""
    missing = [name for name in metrics.classes if name not in set(metrics.averaged)]
    return f"Averages leave out {', '.join(missing)}: not in the test set."


def per_class(metrics: Metrics | None) -> list[dict[str, Any]]:
    """The metrics of each class, in the schema's order."""
    if metrics is None:
        return []
    names = dict.fromkeys([*metrics.classes, *metrics.per_class])  # records sort them by name
    return [
        {
            "name": name,
            "precision": fixed(found.precision.value),
            "recall": fixed(found.recall.value),
            "f1": fixed(found.f1.value),
            "interval": interval(found.f1),
            "support": found.support,
        }
        for name in names
        if (found := metrics.per_class.get(name)) is not None
    ]


def confusion(metrics: Metrics | None) -> dict[str, Any] | None:
    """The matrix as rows of shaded cells; with many classes the most frequent confusions. None if not measured."""
    if metrics is None or not any(map(sum, metrics.confusion)):
        return None
    classes, matrix = metrics.classes, metrics.confusion
    pairs = sorted(
        (
            (count, classes[i], classes[j])
            for i, row in enumerate(matrix)
            for j, count in enumerate(row)
            if i != j and count
        ),
        key=lambda pair: -pair[0],
    )
    if len(classes) <= MATRIX_CLASSES:
        return _matrix(classes, matrix)
    shown, more = pairs[:MATRIX_CLASSES], len(pairs[MATRIX_CLASSES:])
    return {"rows": [], "pairs": shown, "more": more, "classes": classes, "dense": True}


def _matrix(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> dict[str, Any]:
    rows = []
    for i, row in enumerate(matrix):
        total = sum(row)
        cells = [{"count": n, "share": n / total if total else 0.0, "right": i == j} for j, n in enumerate(row)]
        rows.append({"name": classes[i], "cells": cells, "total": total})
    dense = len(classes) > DENSE_CLASSES
    return {
        "rows": rows,
        "pairs": [],
        "classes": classes,
        "dense": dense,
        "bare": len(classes) > BARE_CLASSES,
        "numbered": dense or max(len(name) for name in classes) > 16,
    }


def mistakes_in_all(metrics: Metrics | None) -> int | None:
    """Number of test items that the model gets wrong; None if nothing was measured."""
    if metrics is None or not any(map(sum, metrics.confusion)):
        return None
    return sum(count for i, row in enumerate(metrics.confusion) for j, count in enumerate(row) if i != j)


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
