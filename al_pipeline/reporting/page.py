"""Records -> one readable page: what was asked, answered and gained, what the model still gets wrong, what comes next.

Pure: the same records give the same bytes. The page opens offline and loads nothing; whatever came from people or
from the pool is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from al_pipeline.evaluation.figures import Accuracy, Decision, Estimate, Metrics, Running
from al_pipeline.evaluation.online import Saved
from al_pipeline.records import shown_text
from al_pipeline.reporting.charts import CurvePoint, histogram_svg, learning_curve_svg
from al_pipeline.sanitize import counted

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

EXCERPT_CHARACTERS = 280
SHOWN_ITEMS = 200
"""Longer lists of items are cut, and the page says by how much."""
DENSE_CLASSES = 5
"""With more classes the matrix takes the whole width, and its columns bear numbers."""
BARE_CLASSES = 12
"""With more classes the cells of the matrix hold counts alone; the shade still tells the share."""
MATRIX_CLASSES = 25
"""With more classes a matrix is unreadable: the most frequent confusions are listed instead."""

METRIC_NAMES = {
    "macro_f1": "Macro-F1",
    "accuracy": "Accuracy",
    "average_precision": "Average precision",
    "log_loss": "Log loss",
    "calibration_error": "Calibration error",
}
"""Every metric in the order shown, with what the page calls it."""

_MEANING = {
    "macro_f1": "F1 of each class, averaged; higher is better",
    "accuracy": "share of test items given the right label; higher is better",
    "average_precision": "how well the classes are ranked, over all thresholds; higher is better",
    "log_loss": "price of confident mistakes; lower is better, 0 is perfect",
    "calibration_error": "gap between stated and true confidence; lower is better",
}
_UNBOUNDED = frozenset({"log_loss"})
_NOTHING = "–"
_THIN = "\u202f"
_UNPRINTABLE = re.compile("[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")
"""C1 controls, non-characters, and bidi embeddings, which could turn the words around them."""


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round of the history. `labels`: it was trained on."""

    number: int
    labels: int
    metrics: Metrics | None = None
    decision: Decision | None = None
    date: str | None = None


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """The four disjoint parts of the pool."""

    labeled: int = 0
    pending: int = 0
    ignored: int = 0
    unlabeled: int = 0


@dataclass(frozen=True, slots=True)
class LabelMix:
    """How many items carry each class: in the labelled set, and in the test set."""

    labeled: Mapping[str, int] = field(default_factory=dict)
    test: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How uncertain the model is of the unlabelled pool. `edges` has one entry more than `counts`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    label: str = "uncertainty (right: the model is least sure)"


@dataclass(frozen=True, slots=True)
class AskedItem:
    """One item that this round asked about, with what came of it.

    `answer` is the label that the answers gave, `answers` how many people's were counted, `agreement` the share of
    them that gave it. Where there is no label, `outcome` says why: skipped, a tie, refused, not answered. `score` is
    None where no model scored the item.
    """

    item_id: str
    text: str
    score: float | None
    strategy: str
    answer: str | None = None
    answers: int = 0
    agreement: float | None = None
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One test item that the model gets wrong. `probability`: what it gave its own, wrong, label."""

    item_id: str
    text: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What came back from the annotators.

    `asked`: questions of this round, `for_test` of them about the test set; each is `answered` (with as many labels as
    asked for), `given_up` (skipped by two people, or by all there are) or `unanswered`. `skipped`: people's skips.
    `unanswered`: questions of this round that were still open when it closed, `kept` of them for the next round.
    `carried`: questions of this round that the round before had kept for it. `waiting`: questions that lie in
    Label Studio now, of whatever round. `refused` counts answers by the reason.
    """

    asked: int = 0
    for_test: int = 0
    answered: int = 0
    skipped: int = 0
    given_up: int = 0
    unanswered: int = 0
    kept: int = 0
    carried: int = 0
    late: int = 0
    waiting: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    annotators: int = 0
    lead_seconds: float | None = None
    """How long the tasks were shown until they were answered, idle time included, as Label Studio's page measures.

    Of all annotators together; None where Label Studio told none.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that a report says, from records alone (but for `links`).

    `history` is the closed rounds with this one, oldest first. `metrics` is None where nothing was measured.
    `baseline` is macro-F1 of random sampling at the same budgets, where it was simulated, and `baseline_note` how.
    `confidence` is that of every interval.
    """

    title: str
    question: str
    classes: tuple[str, ...]
    round: int
    state: str
    labels: int
    date: str | None = None
    history: tuple[RoundRow, ...] = ()
    metrics: Metrics | None = None
    decision: Decision | None = None
    pool: PoolCounts = PoolCounts()
    mix: LabelMix = LabelMix()
    histogram: Histogram | None = None
    asked: tuple[AskedItem, ...] = ()
    mistakes: tuple[Mistake, ...] = ()
    answers: Answers = Answers()
    next_step: str = ""
    params_digest: str = ""
    engine: Mapping[str, str] = field(default_factory=dict)
    baseline: tuple[CurvePoint, ...] = ()
    baseline_note: str = ""
    confidence: float = 0.95
    running: Running | None = None
    saved: Saved | None = None
    asked_because: str = ""
    """Why the strategy of this round's batch was chosen, where it is known."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Where items can be looked at, by id. Of this clone alone: no record holds them, and another clone shows none."""


def summary(report: ReportData) -> str:
    """The round in plain words, for a terminal or a flow's artifact; the page begins with the same ones."""
    return _clean(f"Round {report.round}: {_gist(report)}")


def _gist(report: ReportData) -> str:
    score = _figure(report.metrics, "macro_f1")
    interval = _interval(score)
    if score.value is None:
        measured = "nothing measured yet" + (f" ({score.reason})" if score.reason else "")
    else:
        measured = f"macro-F1 {score.value:.2f}" + (f" ({interval})" if interval else "")
    sentences = [f"{_count(report.labels, 'label')}, {measured}."]
    if report.decision:
        because = f": {'; '.join(report.decision.reasons).rstrip('.')}" if report.decision.reasons else ""
        sentences.append(f"{verdict(report.decision).capitalize()}{because}.")
    if report.answers.waiting:
        are = "waits" if report.answers.waiting == 1 else "wait"
        sentences.append(f"{_count(report.answers.waiting, 'question')} {are} in Label Studio.")
    return " ".join(sentences)


def verdict(decision: Decision) -> str:
    """What a decision is called: `promoted`, or `promoted for now` where it is provisional."""
    return f"{decision.verdict} for now" if decision.provisional else decision.verdict


def excerpt(text: str, limit: int = EXCERPT_CHARACTERS) -> str:
    """The beginning of a text on one line, at most `limit` characters; control characters become blanks."""
    text = text.lstrip()
    words = _clean(text[: 4 * limit]).split()
    line = " ".join(words)
    if len(line) <= limit and len(text) <= 4 * limit:
        return line
    return line[: limit - 1].rstrip() + "…"


def render(report: ReportData) -> str:
    """The page of one round: HTML that holds its own style and pictures and loads nothing."""
    from markupsafe import Markup

    curve = _curve(report.history, "macro_f1")
    ranking = _curve(report.history, "average_precision") if len(report.classes) == 2 else []
    histogram = report.histogram
    charts = {
        "macro_f1": learning_curve_svg("macro-f1", "macro-F1", curve, report.baseline),
        "average_precision": learning_curve_svg("average-precision", "average precision", ranking),
        "histogram": histogram_svg("histogram", _clean(histogram.label), histogram.edges, histogram.counts)
        if histogram
        else "",
    }
    return page("report.html").render(
        report=report,
        summary=_gist(report),
        charts={name: Markup(svg) for name, svg in charts.items()},
        tiles=_tiles(report),
        metrics=[_metric_row(report, name) for name in METRIC_NAMES] if report.metrics else [],
        averaged=_averaged(report),
        before=_before_number(report),
        test_items=report.metrics.items if report.metrics else 0,
        per_class=_per_class(report.metrics),
        confusion=_confusion(report.metrics),
        mix=_mix(report),
        pool=_pool(report.pool),
        comparison=_comparison(curve, report.baseline),
        running=_running(report.running),
        mistakes_in_all=_mistakes_in_all(report.metrics),
        refused=sorted(report.answers.refused.items(), key=lambda pair: (-pair[1], pair[0])),
        history=[_history_row(row) for row in reversed(report.history)],
        shown=SHOWN_ITEMS,
        percent=f"{100 * report.confidence:g}",
    )


@cache
def page(name: str) -> Template:
    """A template of this package that becomes a page which loads nothing; what goes into it is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("al_pipeline", "reporting/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(
        verdict=verdict, excerpt=excerpt, count=_count, thousands=_thousands, duration=_duration, fixed=_fixed,
        sentence=_sentence,
    )  # fmt: skip
    return environment.get_template(name)


def _sentence(text: str) -> Markup:
    """A message of ours as a sentence of the page: a capital first, and what stands in backticks as code."""
    from markupsafe import Markup, escape

    shown = str(escape(_clean(text[:1].upper() + text[1:])))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", shown))


def _finalize(value: Any) -> Any:
    """Every value on its way into the page: nothing shows as a dash, text loses what no page may hold."""
    if value is None:
        return _NOTHING
    return _clean(value) if type(value) is str else value


def _clean(text: str) -> str:
    return _UNPRINTABLE.sub(" ", shown_text(text))


def _figure(metrics: Metrics | None, name: str) -> Estimate:
    """One figure by its name; an empty estimate where nothing was measured."""
    return metrics.figure(name) if metrics else Estimate(value=None)


def _interval(estimate: Estimate | Accuracy, digits: int = 2) -> str:
    """`0.89–0.96`, or nothing."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{estimate.low:.{digits}f}–{estimate.high:.{digits}f}"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _fixed(value: Any, digits: int = 2) -> str:
    number = _finite(value)
    return _NOTHING if number is None else f"{number:.{digits}f}"


def _thousands(number: int) -> str:
    return f"{number:,}".replace(",", _THIN)


def _count(number: int, noun: str) -> str:
    return counted(number, noun).replace(",", _THIN)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "under a minute"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _curve(history: Sequence[RoundRow], metric: str) -> list[CurvePoint]:
    points = []
    for row in history:
        estimate = _figure(row.metrics, metric)
        if estimate.value is not None:
            promoted = row.decision is None or row.decision.verdict == "promoted"
            points.append(CurvePoint(row.labels, estimate.value, estimate.low, estimate.high, solid=promoted))
    return points


def _before(report: ReportData) -> RoundRow | None:
    """The newest measured round before this one."""
    earlier = [row for row in report.history if row.number < report.round and row.metrics]
    return max(earlier, key=lambda row: row.number, default=None)


def _before_number(report: ReportData) -> int | None:
    before = _before(report)
    return before.number if before else None


def _change(report: ReportData, name: str, digits: int = 2) -> str:
    """How the metric moved since the newest measured round before this one, such as `+0.04`."""
    before = _before(report)
    now, then = _figure(report.metrics, name).value, _figure(before.metrics if before else None, name).value
    if now is None or then is None:
        return ""
    change = round(now - then, digits)
    return f"{change:+.{digits}f}".replace("-", "−") if change else f"±{0:.{digits}f}"


def _on(change: str, before: RoundRow | None) -> str:
    return f"{change} on round {before.number}" if change and before else ""


def _tiles(report: ReportData) -> list[dict[str, str]]:
    """The figures at the head of the page: name, value, interval or remark, change."""
    tiles = []
    before = _before(report)
    second = "average_precision" if len(report.classes) == 2 else "accuracy"
    for name in ("macro_f1", second):
        estimate = _figure(report.metrics, name)
        note = _interval(estimate) or estimate.reason or "not measured"
        tiles.append(
            {
                "name": _metric_name(report, name),
                "value": _fixed(estimate.value),
                "note": note,
                "change": _on(_change(report, name), before),
            }
        )
    gained = f"{report.labels - before.labels:+d}".replace("-", "−").replace("+0", "±0") if before else ""
    answers = report.answers
    tiles.append(
        {
            "name": "Labels",
            "value": _thousands(report.labels),
            "note": f"{_thousands(report.pool.unlabeled)} more items unlabelled and not asked now",
            "change": _on(gained, before),
        }
    )
    tiles.append(
        {
            "name": "Answered",
            "value": f"{_thousands(answers.answered)} / {_thousands(answers.asked)}" if answers.asked else _NOTHING,
            "note": "questions of this round" + (f"; {_refused(answers)} not counted" if answers.refused else ""),
            "change": f"{_count(answers.waiting, 'question')} waiting now" if answers.waiting else "",
        }
    )
    return tiles


def _refused(answers: Answers) -> str:
    return _count(sum(answers.refused.values()), "refused answer")


def _metric_name(report: ReportData, name: str) -> str:
    """What the page calls a metric; average precision of two classes is that of one of them, which is named."""
    of = report.metrics.average_precision_of if report.metrics and name == "average_precision" else "macro"
    return METRIC_NAMES[name] if of == "macro" else f"{METRIC_NAMES[name]} ({excerpt(of, 40)})"


def _metric_row(report: ReportData, name: str) -> dict[str, Any]:
    estimate = _figure(report.metrics, name)
    bar = None
    if name not in _UNBOUNDED and estimate.value is not None:
        bar = {"at": 100 * _unit(estimate.value)}
        if estimate.low is not None and estimate.high is not None:
            bar |= {"from": 100 * _unit(estimate.low), "width": 100 * (_unit(estimate.high) - _unit(estimate.low))}
    return {
        "name": _metric_name(report, name),
        "meaning": _MEANING[name],
        "value": _fixed(estimate.value, 3),
        "interval": _interval(estimate, 3),
        "reason": estimate.reason or "",
        "change": _change(report, name, 3),
        "bar": bar,
    }


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def _averaged(report: ReportData) -> str:
    """Which classes macro-F1 leaves out, as a sentence; empty where none."""
    metrics = report.metrics
    if metrics is None or len(metrics.averaged) >= len(metrics.classes):
        return ""
    missing = [name for name in metrics.classes if name not in set(metrics.averaged)]
    return f"Averages leave out {', '.join(missing)}: not in the test set."


def _per_class(metrics: Metrics | None) -> list[dict[str, Any]]:
    if metrics is None:
        return []
    names = dict.fromkeys([*metrics.classes, *metrics.per_class])  # records hold them by the alphabet
    return [
        {
            "name": name,
            "precision": _fixed(found.precision.value),
            "recall": _fixed(found.recall.value),
            "f1": _fixed(found.f1.value),
            "interval": _interval(found.f1),
            "support": found.support,
        }
        for name in names
        if (found := metrics.per_class.get(name)) is not None
    ]


def _confusion(metrics: Metrics | None) -> dict[str, Any] | None:
    """The matrix as rows of shaded cells, or for many classes the most frequent confusions. None where not measured."""
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
    if len(classes) > MATRIX_CLASSES:
        return {
            "rows": [],
            "pairs": pairs[:MATRIX_CLASSES],
            "more": len(pairs[MATRIX_CLASSES:]),
            "classes": classes,
            "dense": True,
        }
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


def _mistakes_in_all(metrics: Metrics | None) -> int | None:
    """How many items of the test set the model gets wrong; None where none was measured."""
    if metrics is None or not any(map(sum, metrics.confusion)):
        return None
    return sum(count for i, row in enumerate(metrics.confusion) for j, count in enumerate(row) if i != j)


def _mix(report: ReportData) -> list[dict[str, Any]]:
    """Every class with its count and share in the labelled set and the test set; the schema's order first."""
    names = dict.fromkeys([*report.classes, *report.mix.labeled, *report.mix.test])
    labeled, test = sum(report.mix.labeled.values()), sum(report.mix.test.values())
    return [
        {
            "name": name,
            "labeled": report.mix.labeled.get(name, 0),
            "labeled_share": report.mix.labeled.get(name, 0) / labeled if labeled else 0.0,
            "test": report.mix.test.get(name, 0),
            "test_share": report.mix.test.get(name, 0) / test if test else 0.0,
        }
        for name in names
    ]


def _pool(pool: PoolCounts) -> list[dict[str, Any]]:
    parts = (
        ("labelled", pool.labeled), ("pending: asked now", pool.pending), ("ignored", pool.ignored),
        ("unlabelled, not asked now", pool.unlabeled),
    )  # fmt: skip
    total = sum(count for _, count in parts)
    return [{"name": name, "count": count, "share": count / total if total else 0.0} for name, count in parts]


def _comparison(curve: Sequence[CurvePoint], baseline: Sequence[CurvePoint]) -> str:
    """The newest common budget of the model and random sampling in one sentence, gain or none."""
    chance = {point.labels: point for point in baseline}
    common = [point for point in curve if point.labels in chance]
    if not common:
        return ""
    mine = max(common, key=lambda point: point.labels)
    other = chance[mine.labels]
    text = f"At {mine.labels} labels: {mine.value:.3f} here, {other.value:.3f} with random sampling"
    if other.low is None or other.high is None:
        return text + "."
    text += f" ({other.low:.3f}–{other.high:.3f})"
    if mine.value > other.high:
        return text + ": above that range."
    if mine.value < other.low:
        return text + ": below that range."
    return text + ": inside that range, so no clear gain."


def _running(running: Running | None) -> list[dict[str, Any]]:
    """The running accuracy over the newest rounds, then over all of them, where those are more."""
    if running is None:
        return []
    accuracies = dict.fromkeys([running.recent, running.whole])
    return [_accuracy_row(one) for one in accuracies if one.accuracy is not None]


def _accuracy_row(one: Accuracy) -> dict[str, Any]:
    rounds = (
        f"round {one.first_round}"
        if one.first_round == one.last_round
        else f"rounds {one.first_round}–{one.last_round}"
    )
    return {
        "rounds": rounds,
        "accuracy": _fixed(one.accuracy, 3),
        "interval": _interval(one, 3),
        "right": one.right,
        "answered": one.answered,
        "asked": one.asked,
    }


def _history_row(row: RoundRow) -> dict[str, Any]:
    f1, accuracy = _figure(row.metrics, "macro_f1"), _figure(row.metrics, "accuracy")
    return {
        "number": row.number,
        "labels": row.labels,
        "f1": _fixed(f1.value, 3),
        "f1_interval": _interval(f1),
        "accuracy": _fixed(accuracy.value, 3),
        "accuracy_interval": _interval(accuracy),
        "decision": row.decision,
        "reasons": "; ".join(row.decision.reasons) if row.decision else "",
        "date": row.date or "",
    }
