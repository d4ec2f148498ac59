"""The results of a simulation as charts and as one page that opens offline, in the style of a round's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from al_pipeline.evaluation.savings import SHARES
from al_pipeline.records import RANDOM
from al_pipeline.reporting.charts import CurvePoint, comparison_png, comparison_svg
from al_pipeline.reporting.html import page
from al_pipeline.reporting.metrics_table import METRIC_NAMES
from al_pipeline.simulation.live import LIVE
from al_pipeline.simulation.runs import WITHOUT

Result = Mapping[str, Any]


def pictures(result: Result) -> dict[str, bytes]:
    """The learning curves as PNG, one file per metric."""
    return {
        f"{metric.replace('_', '-')}.png": comparison_png(
            _in_text(metric), _lines(result, metric), row["full"], result["unit"]
        )
        for metric, row in result["metrics"].items()
    }


def render(result: Result) -> str:
    """The page: self-contained HTML with inline style and pictures."""
    from markupsafe import Markup

    metrics = [
        {
            "key": metric,
            "name": METRIC_NAMES[metric],
            "chart": Markup(
                comparison_svg(
                    metric.replace("_", "-"), _in_text(metric), _lines(result, metric), row["full"], result["unit"]
                )
            ),
            "full": row["full"],
            "areas": [_area(row, arm) for arm in result["strategies"]],
            "savings": [_savings(row, arm) for arm in result["strategies"]],
            "wins": [[row["wins"][arm].get(other) for other in result["strategies"]] for arm in result["strategies"]],
        }
        for metric, row in _metrics(result)
    ]
    return page("simulation.html").render(
        result=result,
        summary=summary(result),
        metrics=metrics,
        shares=[str(share) for share in SHARES],
        shown={arm: arm.replace("_", " ") for arm in result["strategies"]},
        corpus=_corpus(result),
        team=_team_rows(result),
        team_words=team_sentence(result),
        live=live_table(result),
        hours=hours_table(result),
    )


def summary(result: Result) -> list[str]:
    """The results, one sentence for each strategy other than random."""
    row = result["metrics"][result["metric"]]
    name = _in_text(result["metric"])
    said = []
    for arm in result["strategies"]:
        if arm == RANDOM or arm in result.get("team", {"gains": {}})["gains"] or arm.endswith(LIVE):
            continue
        reached = [str(share) for share in SHARES if row["labels_needed"][arm][str(share)] is not None]
        if not reached:
            said.append(f"{arm} does not reach {SHARES[0]} % of the full-data {name} within the budget.")
            continue
        share = reached[-1]
        labels = row["labels_needed"][arm][share]
        text = f"{arm} reaches {share} % of the full-data {name} with {labels:.0f} {result['unit']}"
        if row["savings"][arm][share] is not None:
            text += f", random with {row['labels_needed'][RANDOM][share]:.0f}: {_times(row, arm, share)}"
        else:
            text += f"; random does not reach it: at least {row['savings_at_least'][arm][share]:.1f} times as many"
        said.append(text + "." + _hours_sentence(result, arm, share))
    return said + _team_summary(result) + _live_summary(result) + _finish_summary(result)


def _hours_sentence(result: Result, arm: str, share: str) -> str:
    """The hours that a strategy saves for a share of the score, after the sentence on its labels; empty: not known."""
    if (hours := result.get("hours")) is None or (needed := hours["needed"][arm][share]) is None:
        return ""
    fewer, low, high = hours["fewer"][arm][share]
    if fewer is None:
        return f" That takes {_hours(needed)} hours of answering."
    span = "" if low is None and high is None else f" ({_hours(low)} to {_hours(high)})"
    return f" That takes {_hours(needed)} hours of answering, {_hours(fewer)}{span} fewer than random."


def hours_table(result: Result) -> tuple[str, tuple[str, ...], list[list[str]]] | None:
    """The hours that answers take, for a terminal and the page: title, header, rows; None if they are not known."""
    if (hours := result.get("hours")) is None:
        return None
    rows = []
    for arm in result["strategies"]:
        cells = []
        for share in map(str, SHARES):
            saved, low, high = [None] * 3 if arm == RANDOM else hours["savings"][arm][share]
            ends = "" if low is None and high is None else f" ({_times_end(low)}–{_times_end(high)})"
            cells.append(f"{_hours(hours['needed'][arm][share])}{'' if saved is None else f'  {saved:.1f} ×{ends}'}")
        rows.append([arm, *cells])
    title = f"Hours of answering, at {hours['answer_seconds']:.1f} s for an answer to a text of the corpus on average"
    return title, ("strategy", *(f"hours for {share} %" for share in SHARES)), rows


def _hours(value: float | None) -> str:
    return "…" if value is None else f"{value:.2f}".replace("-", "−")


def _times_end(value: float | None) -> str:
    return "…" if value is None else f"{value:.1f}"


def team_sentence(result: Result) -> str:
    """Who answers in the simulation, in a sentence; empty if everybody is always right."""
    if (team := result.get("team")) is None:
        return ""
    how = {
        "uniform": "errors fall evenly on the other classes",
        "confusable": "errors name the most similar class",
        "careless-person": "one careless person makes most of them",
    }[team["kind"]]
    return f"{team['annotators']} simulated annotators, {100 * team['noise']:.3g} % of their answers wrong: {how}."


def _team_summary(result: Result) -> list[str]:
    """What several answers per item, or labels that are asked again, gain: one sentence each."""
    said = []
    for arm, gain in result.get("team", {"gains": {}})["gains"].items():
        value, low, high = gain["end"]
        if value is None:
            continue
        span = "" if low is None else f" ({_signed(low)} to {_signed(high)})"
        right = [result["team"]["arms"][name]["right"] for name in (arm, gain["plain"])]
        said.append(
            f"{arm}: {_in_text(result['metric'])} {_signed(value)}{span} against one answer per item, at "
            f"{gain['answers']:,} answers; {100 * right[0]:.0f} % of its labels are right, of the others "
            f"{100 * right[1]:.0f} %."
        )
    return said


def _live_summary(result: Result) -> list[str]:
    """What live questions save of each strategy's batches, also where it is nothing: one sentence each."""
    said = []
    for batch, row in result.get("live", {"against": {}})["against"].items():
        reached = [share for share, one in row["shares"].items() if one["fewer"][0] is not None]
        if not reached:
            said.append(f"{row['live']} cannot be compared with batches of {batch}: one of them reaches no target.")
            continue
        value, low, high = row["shares"][reached[-1]]["fewer"]
        what = f"for {reached[-1]} % of the full-data {_in_text(result['metric'])}"
        size, span = result["settings"]["batch_size"], _ends(low, high)
        if low is None and high is None:
            told = f"needs {value:.0f} labels fewer than batches of {size} by {batch}, without an interval"
        elif low is not None and low > 0:
            told = f"needs {value:.0f} labels{span} fewer than batches of {size} by {batch}"
        elif high is not None and high < 0:
            span = _ends(-high, None if low is None else -low)
            told = f"needs {-value:.0f} labels{span} more than batches of {size} by {batch}"
        else:
            told = f"saves nothing that shows against batches of {size} by {batch}: {_whole(value)} labels{span}"
        said.append(f"{row['live']} {told}, {what}.")
    return said


def live_table(result: Result) -> tuple[str, tuple[str, ...], list[list[str]]] | None:
    """What live questions save, for a terminal and the page: title, header, rows; None without live runs."""
    if (live := result.get("live")) is None:
        return None
    rows = []
    for batch, row in live["against"].items():
        cells = []
        for one in row["shares"].values():
            value, low, high = one["fewer"]
            need = f"{_fixed(one['batch_labels'], 0)} → {_fixed(one['live_labels'], 0)}"
            cells.append(need if value is None else f"{need}: {_whole(value)}{_ends(low, high)}")
        gain, low, high = row["gain"]
        span = _span((low, high), 3)
        rows.append(
            [batch, row["live"], *cells, "–" if gain is None else f"{_signed(gain)}{f' ({span})' if span else ''}"]
        )
    people = "1 person" if live["people"] == 1 else f"{live['people']} people"
    title = (
        f"Live against batches of {result['settings']['batch_size']}: labels fewer, with {people} at work and "
        f"{live['open_questions']} open questions"
    )
    return title, ("batches", "live", *(f"for {share} %" for share in SHARES), "gain of the area"), rows


def _whole(value: float) -> str:
    return f"{value:+.0f}".replace("-", "−")


def _ends(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f" ({'…' if low is None else _whole(low)} to {'…' if high is None else _whole(high)})"


def _finish_summary(result: Result) -> list[str]:
    """What the model may label at the end: one sentence for each strategy."""
    if (found := result.get("finish")) is None:
        return []
    said = []
    for arm, one in found["arms"].items():
        share, low, high = one["share"]
        span = "" if low is None else f" ({100 * max(0, low):.0f} to {100 * min(1, high):.0f})"
        told = (
            f"{arm}: at the end the model may label {100 * share:.0f} %{span} of the rest at an error rate of at most "
        )
        told += f"{found['bound']:.1%} in each class"
        if one["error"] is not None:
            told += (
                f"; {one['error']:.1%} of these labels are wrong, at most {one['worst']:.1%} in a run, and the bound "
                f"holds in {one['holds']} of {one['runs']} runs"
            )
        said.append(f"{told}.")
    return said


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _team_rows(result: Result) -> list[dict[str, Any]]:
    """The table of labels, right labels and gains, by strategy."""
    if (team := result.get("team")) is None:
        return []
    rows = []
    for arm, row in team["arms"].items():
        gain = team["gains"].get(arm)
        told = (
            {key: "" for key in ("area", "end")}
            if gain is None
            else {key: "–" if gain[key][0] is None else _signed(gain[key][0]) for key in ("area", "end")}
        )
        spans = {f"{key}_interval": "" if gain is None else _span(gain[key][1:], 3) for key in ("area", "end")}
        rows.append({"strategy": arm, **row, **told, **spans})
    return rows


def team_table(result: Result) -> tuple[str, tuple[str, ...], list[list[str]]] | None:
    """The table of the page for a terminal: title, header, rows; None if everybody is always right."""
    rows = [
        [
            row["strategy"],
            _fixed(row["labels"], 0),
            "–" if row["right"] is None else f"{100 * row['right']:.0f} %",
            _fixed(row["again"], 0),
            *(f"{row[key]} ({span})" if (span := row[f"{key}_interval"]) else row[key] for key in ("end", "area")),
        ]
        for row in _team_rows(result)
    ]
    if not rows:
        return None
    header = ("strategy", "labels", "right", "asked again", "gain at the end", "gain of the area")
    return f"At {result['budgets'][-1]:,} answers. {team_sentence(result)}", header, rows


def table(result: Result) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """The results for a terminal, one table per metric, the main metric first: title, header, rows."""
    tables = []
    for metric, row in _metrics(result):
        rows = []
        for arm in result["strategies"]:
            area = _area(row, arm)
            gain = "" if area["gain"] is None else f"{area['gain']:+.3f} ({area['gain_interval']})"
            cells = [f"{_fixed(cell['labels'], 0)}  {cell['saved']}" for cell in _savings(row, arm)["cells"]]
            rows.append([arm, _fixed(area["area"]), gain, *cells])
        shares = [f"{result['unit']} for {share} %" for share in SHARES]
        name = f"{METRIC_NAMES[metric]}; {_fixed(row['full'])} with all labels"
        tables.append((name, ("strategy", "area", "gain", *shares), rows))
    return tables


def names_tables(result: Result) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """The learning curves with and without the names of the classes side by side: one table per strategy and metric.

    A curve has a row for the seed round, each time the labels have doubled since the last one, and the end.
    """
    tables: list[tuple[str, tuple[str, ...], list[list[str]]]] = []
    for metric, row in _metrics(result):
        for without in (arm for arm in result["strategies"] if arm.endswith(WITHOUT)):
            arm, rows, last = without.removesuffix(WITHOUT), [], 0
            for number, labels in enumerate(result["budgets"]):
                if labels >= 2 * last or number == len(result["budgets"]) - 1:
                    last = labels
                    named, plain = (row["curves"][one][number][0] for one in (arm, without))
                    difference = "" if None in (named, plain) else f"{named - plain:+.3f}".replace("-", "−")
                    rows.append([f"{labels:,}", _fixed(named), _fixed(plain), difference])
            name = f"{arm}: {_in_text(metric)} with and without the names of the classes"
            tables.append((name, ("labels", "with", "without", "difference"), rows))
    return tables


def _metrics(result: Result) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(result["metrics"].items(), key=lambda pair: pair[0] != result["metric"])


def _fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _in_text(metric: str) -> str:
    name = METRIC_NAMES[metric]
    return name[0].lower() + name[1:]


def _lines(result: Result, metric: str) -> dict[str, list[CurvePoint]]:
    curves = result["metrics"][metric]["curves"]
    return {
        arm: [
            CurvePoint(labels, value, low, high)
            for labels, (value, low, high) in zip(result["budgets"], curves[arm], strict=True)
            if value is not None
        ]
        for arm in result["strategies"]
    }


def _area(row: Mapping[str, Any], arm: str) -> dict[str, Any]:
    return {
        "strategy": arm,
        "area": row["area"][arm],
        "interval": _span(row["area_interval"][arm], 3),
        "gain": None if arm == RANDOM else row["gain"][arm],
        "gain_interval": "" if arm == RANDOM else _span(row["gain_interval"][arm], 3),
        "below": row["below_random"][arm],
    }


def _savings(row: Mapping[str, Any], arm: str) -> dict[str, Any]:
    cells = []
    for share in map(str, SHARES):
        labels = row["labels_needed"][arm][share]
        saved = ""
        if arm != RANDOM and labels is not None:
            at_least = row["savings_at_least"][arm][share]
            saved = _times(row, arm, share) if at_least is None else f"at least {at_least:.1f} ×"
        cells.append({"labels": labels, "saved": saved})
    return {"strategy": arm, "cells": cells}


def _times(row: Mapping[str, Any], arm: str, share: str) -> str:
    """For example `2.4 × (1.8–3.1)`: how many times as many labels random sampling needs."""
    low, high = row["savings_interval"][arm][share]
    value = f"{row['savings'][arm][share]:.1f} ×"
    if low is None and high is None:
        return value
    return f"{value} ({'…' if low is None else f'{low:.1f}'}–{'…' if high is None else f'{high:.1f}'})"


def _span(ends: tuple[float | None, float | None], digits: int) -> str:
    low, high = ends
    return "" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}".replace("-", "−")


def _corpus(result: Result) -> list[dict[str, Any]]:
    """For each class: its number of texts, and how many each strategy had found at the end (mean over seeds)."""
    return [
        {"name": label, "count": count, "found": [result["found"][arm][label][-1] for arm in result["strategies"]]}
        for label, count in result["corpus"]["classes"].items()
    ]
