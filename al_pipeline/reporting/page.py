"""The report of a round as one page: batch, answers, metrics, mistakes and next step.

Pure: the same records give the same bytes. The page is self-contained; all text from people or from the pool is
escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from al_pipeline.evaluation.figures import Accuracy, Running
from al_pipeline.reporting.charts import CurvePoint, histogram_svg, learning_curve_svg
from al_pipeline.reporting.html import NOTHING, clean, count, fixed, interval, page, thousands, verdict
from al_pipeline.reporting.metrics_table import (
    METRIC_NAMES,
    averaged,
    confusion,
    figure,
    metric_change,
    metric_name,
    metric_row,
    mistakes_in_all,
    per_class,
    round_before,
)
from al_pipeline.reporting.quality_section import quality_section
from al_pipeline.reporting.view_model import Answers, PoolCounts, ReportData, RoundRow

if TYPE_CHECKING:
    from markupsafe import Markup

SHOWN_ITEMS = 200
"""Longer lists of items are cut, and the page says how many are missing."""


def summary(report: ReportData) -> str:
    """The round in plain words, for a terminal or a flow's artifact; the page starts with the same words."""
    return clean(f"Round {report.round}: {_gist(report)}")


def _gist(report: ReportData) -> str:
    score = figure(report.metrics, "macro_f1")
    if score.value is None:
        measured = "nothing measured yet" + (f" ({score.reason})" if score.reason else "")
    else:
        measured = f"macro-F1 {score.value:.2f}" + (f" ({ends})" if (ends := interval(score)) else "")
    sentences = [f"{count(report.labels, 'label')}, {measured}."]
    if report.decision:
        because = f": {'; '.join(report.decision.reasons).rstrip('.')}" if report.decision.reasons else ""
        sentences.append(f"{verdict(report.decision).capitalize()}{because}.")
    if report.answers.waiting:
        are = "waits" if report.answers.waiting == 1 else "wait"
        sentences.append(f"{count(report.answers.waiting, 'question')} {are} in Label Studio.")
    return " ".join(sentences)


def render(report: ReportData) -> str:
    """The page of one round: self-contained HTML with inline style and charts."""
    curve = _curve(report.history, "macro_f1")
    return page("report.html").render(
        report=report,
        summary=_gist(report),
        charts=_charts(report, curve),
        tiles=_tiles(report),
        metrics=[metric_row(report, name) for name in METRIC_NAMES] if report.metrics else [],
        averaged=averaged(report),
        before=before.number if (before := round_before(report)) else None,
        test_items=report.metrics.items if report.metrics else 0,
        per_class=per_class(report.metrics),
        confusion=confusion(report.metrics),
        mix=_mix(report),
        pool=_pool(report.pool),
        comparison=_comparison(curve, report.baseline),
        running=_running(report.running),
        costs=_costs(report),
        quality=quality_section(report.quality),
        mistakes_in_all=mistakes_in_all(report.metrics),
        refused=sorted(report.answers.refused.items(), key=lambda pair: (-pair[1], pair[0])),
        history=[_history_row(row) for row in reversed(report.history)],
        new_classes=[row.number for row in report.history if row.new_classes],
        shown=SHOWN_ITEMS,
        percent=f"{100 * report.confidence:g}",
    )


def _charts(report: ReportData, curve: Sequence[CurvePoint]) -> dict[str, Markup]:
    """The charts by their place in the page; empty if there is nothing to draw."""
    from markupsafe import Markup

    ranking = _curve(report.history, "average_precision") if len(report.classes) == 2 else []
    histogram, label = report.histogram, "uncertainty (right: the model is least sure)"
    charts = {
        "macro_f1": learning_curve_svg("macro-f1", "macro-F1", curve, report.baseline),
        "average_precision": learning_curve_svg("average-precision", "average precision", ranking),
        "histogram": histogram_svg("histogram", label, histogram.edges, histogram.counts) if histogram else "",
    }
    return {name: Markup(svg) for name, svg in charts.items()}


def _curve(history: Sequence[RoundRow], metric: str) -> list[CurvePoint]:
    points = []
    begins = False
    for row in history:
        begins = begins or row.new_classes
        estimate = figure(row.metrics, metric)
        if estimate.value is not None:
            promoted = row.decision.verdict == "promoted"
            points.append(CurvePoint(row.labels, estimate.value, estimate.low, estimate.high, promoted, begins))
            begins = False
    return points


def _tiles(report: ReportData) -> list[dict[str, str]]:
    """The metrics at the top of the page: name, value, interval or note, change."""
    second = "average_precision" if len(report.classes) == 2 else "accuracy"
    return [
        _metric_tile(report, "macro_f1"),
        _metric_tile(report, second),
        _labels_tile(report),
        _answered_tile(report),
    ]


def _metric_tile(report: ReportData, name: str) -> dict[str, str]:
    estimate = figure(report.metrics, name)
    return {
        "name": metric_name(report, name),
        "value": fixed(estimate.value),
        "note": interval(estimate) or estimate.reason or "not measured",
        "change": _on(metric_change(report, name), round_before(report)),
    }


def _labels_tile(report: ReportData) -> dict[str, str]:
    before = round_before(report)
    gained = f"{report.labels - before.labels:+d}".replace("-", "−").replace("+0", "±0") if before else ""
    return {
        "name": "Labels",
        "value": thousands(report.labels),
        "note": f"{thousands(report.pool.unlabeled)} more items unlabelled and not asked now",
        "change": _on(gained, before),
    }


def _answered_tile(report: ReportData) -> dict[str, str]:
    answers = report.answers
    return {
        "name": "Answered",
        "value": f"{thousands(answers.answered)} / {thousands(answers.asked)}" if answers.asked else NOTHING,
        "note": "questions of this round" + (f"; {_refused(answers)} not counted" if answers.refused else ""),
        "change": f"{count(answers.waiting, 'question')} waiting now" if answers.waiting else "",
    }


def _on(change: str, before: RoundRow | None) -> str:
    return f"{change} since round {before.number}" if change and before else ""


def _refused(answers: Answers) -> str:
    return count(sum(answers.refused.values()), "refused answer")


def _mix(report: ReportData) -> list[dict[str, Any]]:
    """Every class with its count and share in the labelled set and the test set; the schema's classes come first."""
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
    total = pool.total
    return [{"name": name, "count": items, "share": items / total if total else 0.0} for name, items in parts]


def _comparison(curve: Sequence[CurvePoint], baseline: Sequence[CurvePoint]) -> str:
    """One sentence that compares the model with random sampling at the largest common number of labels, gain or not."""
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


def _costs(report: ReportData) -> list[str]:
    """What the answers have cost, what the budget leaves, and what a further round is expected to bring."""
    lines, cost = [], report.cost
    if cost is not None and cost.seconds is not None and cost.answers:
        lines.append(
            f"{count(cost.answers, 'answer')} took {cost.seconds / 3600:.1f} hours, "
            f"{cost.seconds / cost.answers:.1f} seconds each."
        )
        if cost.timed < cost.answers:
            lines.append(f"Only {thousands(cost.timed)} of them have a time; the others count as the mean of these.")
    lines += [f"Budget: {line}." for line in report.budget]
    if report.outlook is not None:
        lines.append(f"Forecast: {report.outlook.sentence()}.")
    if report.proposal:
        lines.append(f"Proposal: {report.proposal}.")
    return lines


def _running(running: Running | None) -> list[dict[str, Any]]:
    """The running accuracy over the newest rounds, then over all rounds if those are more."""
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
        "accuracy": fixed(one.accuracy, 3),
        "interval": interval(one, 3),
        "right": one.right,
        "answered": one.answered,
        "asked": one.asked,
    }


def _history_row(row: RoundRow) -> dict[str, Any]:
    f1, accuracy = figure(row.metrics, "macro_f1"), figure(row.metrics, "accuracy")
    return {
        "number": row.number,
        "labels": row.labels,
        "f1": fixed(f1.value, 3),
        "f1_interval": interval(f1),
        "accuracy": fixed(accuracy.value, 3),
        "accuracy_interval": interval(accuracy),
        "decision": row.decision,
        "reasons": "; ".join(row.decision.reasons),
        "date": row.date or "",
    }
