"""What `al finish` would label at the end of a simulated project, and how much of it would be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from al_pipeline.evaluation.savings import mean_interval
from al_pipeline.simulation.replay import Corpus, Indices, Predict
from al_pipeline.stopping.rest import rules

CONFIDENCE = 0.95


def finished(corpus: Corpus, predict: Predict, labeled: Indices, bound: float, rounds: int) -> dict[str, Any]:
    """The end of a run: `share` of the rest of the pool that the model may label, `error` of these labels, `holds`.

    The rules follow from the test set, as in a workspace after `rounds` published rounds. `holds`: whether the errors
    of each class stay within `bound`. `error` is None if the model may label nothing.
    """
    rest = np.setdiff1d(corpus.pool, labeled)
    test, own = predict(corpus.test), predict(rest)
    found = rules(
        test.argmax(axis=1), test.max(axis=1), test.argmax(axis=1) == corpus.truth[corpus.test], corpus.classes, bound,
        CONFIDENCE, rounds,
    )  # fmt: skip
    least = np.array([np.inf if rule.threshold is None else rule.threshold for rule in found])
    predicted = own.argmax(axis=1)
    taken = own.max(axis=1, initial=0.0) >= least[predicted]
    wrong = predicted != corpus.truth[rest]
    errors = [wrong[taken & (predicted == place)] for place in range(len(found))]
    return {
        "share": float(taken.mean()) if len(rest) else 0.0,
        "error": float(wrong[taken].mean()) if taken.any() else None,
        "holds": all(not len(one) or bool(one.mean() <= bound) for one in errors),
    }


def finish_figures(
    bound: float, arms: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The key `finish` of `result.json`: for each arm the means over its runs, with Student's interval of the share."""
    found = {}
    for arm in arms:
        ends = rows[arm]
        share = mean_interval(np.array([end["share"] for end in ends]), CONFIDENCE)
        errors = [end["error"] for end in ends if end["error"] is not None]
        found[arm] = {
            "share": [share.value, share.low, share.high],
            "error": float(np.mean(errors)) if errors else None,
            "worst": max(errors, default=None),
            "holds": sum(end["holds"] for end in ends),
            "runs": len(ends),
        }
    return {"bound": bound, "confidence": CONFIDENCE, "arms": found}
