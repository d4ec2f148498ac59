"""The quality of the labels as the report shows it: agreement by round, annotators, people and classes, confusions."""

from __future__ import annotations

from typing import Any

from al_pipeline.evaluation.figures import Estimate
from al_pipeline.quality.agreement import CONFIDENCE
from al_pipeline.quality.assessment import Person, Quality
from al_pipeline.reporting.charts import CurvePoint, rounds_svg
from al_pipeline.reporting.html import fixed, interval
from al_pipeline.reporting.metrics_table import DENSE_CLASSES, MATRIX_CLASSES, interval_bar

SHOWN_PEOPLE = 50
"""With more people the page shows those with the most answers, and says how many are missing."""
SHOWN_CONFUSIONS = 10


def quality_section(quality: Quality | None) -> dict[str, Any] | None:
    """What the template `quality.html` shows; None if nobody has answered."""
    from markupsafe import Markup

    if quality is None or not quality.people:
        return None
    points = [
        CurvePoint(one.round, alpha.value, alpha.low, alpha.high)
        for one in quality.rounds
        if (alpha := one.agreement.alpha).value is not None
    ]
    people = sorted(quality.people, key=lambda one: (-one.answers, one.name))[:SHOWN_PEOPLE]
    slowest = max((one.high_seconds or 0 for one in people), default=0)
    return {
        "quality": quality,
        "percent": f"{100 * CONFIDENCE:g}",
        "alpha": _shown(quality.agreement.alpha),
        "kappa": _shown(quality.agreement.kappa),
        "share": quality.agreement.share.value,
        "reason": quality.agreement.alpha.reason or "",
        "chart": Markup(rounds_svg("agreement", "Krippendorff's alpha", points)) if len(points) > 1 else "",
        "people": [_person(one, slowest) for one in people],
        "gold": any(one.gold_answers for one in people),
        "more": len(quality.people) - len(people),
        "matrix": _matrix(quality, people) if len(quality.classes) <= MATRIX_CLASSES else None,
        "dense": len(quality.classes) > DENSE_CLASSES or max(map(len, quality.classes)) > 16,
        "confusions": [
            {"row": one, "rate": _shown(one.rate), "rest": _shown(one.rest)}
            for one in quality.confusions[:SHOWN_CONFUSIONS]
        ],
        "more_confusions": max(0, len(quality.confusions) - SHOWN_CONFUSIONS),
    }


def _shown(estimate: Estimate) -> str:
    ends = interval(estimate)
    return fixed(estimate.value) + (f" ({ends})" if ends else "")


def _person(one: Person, slowest: float) -> dict[str, Any]:
    times = None
    if one.seconds is not None and one.low_seconds is not None and one.high_seconds is not None and slowest:
        low, middle, high = (100 * part / slowest for part in (one.low_seconds, one.seconds, one.high_seconds))
        times = {"at": middle, "from": low, "width": high - low}
    return {
        "person": one,
        "seconds": fixed(one.seconds, 1),
        "times": times,
        "agreement": fixed(one.agreement.value),
        "agreement_interval": interval(one.agreement),
        "agreement_bar": interval_bar(one.agreement),
        "accuracy": fixed(one.accuracy.value),
        "accuracy_interval": interval(one.accuracy),
        "gold": fixed(one.gold.value),
        "gold_interval": interval(one.gold),
    }


def _matrix(quality: Quality, people: list[Person]) -> dict[str, Any] | None:
    """Rows of cells, a person's for each class: the share that agrees with the others; None if nothing is compared."""
    if not any(one.compared for one in people):
        return None
    rows = [
        {
            "name": one.name,
            "cells": [
                {"answers": answers, "share": agreeing / answers if answers else 0.0}
                for answers, agreeing in one.by_class
            ],
        }
        for one in people
    ]
    return {"rows": rows, "alphas": [fixed(one.value) for one in quality.agreement.classes]}
