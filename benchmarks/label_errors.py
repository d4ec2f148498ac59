"""Planted label errors: how well the review's ranking finds them, beside cleanlab's on the same probabilities.

    python -m benchmarks.label_errors --data FOLDER      writes benchmarks/results/label_errors.json

FOLDER is that of `benchmarks/names.py`. Of a random sample of each corpus some labels are replaced. `uniform`: by any
other class; `neighbours`: by one fixed other class; `overlooked`: items of rarer classes get the most frequent one. The
probabilities are those of the workspace's default model by cross-validation. Measured is the area under the
precision-recall curve (average precision), as a mean over seeds with the 95 % interval of the difference to cleanlab's
default (`get_label_quality_scores`, by self-confidence), and to the same adjusted to classes.

The ranking was chosen on the first four corpora; clinc_domains and debian_sections were not used for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.evaluation.savings import mean_interval
from al_pipeline.models.held_out import held_out_proba
from al_pipeline.quality.label_errors import error_probability
from al_pipeline.threads import one_thread
from benchmarks.names import Texts
from benchmarks.record import record

CORPORA = ("review_sentences2", "bbc_news", "tweets_sentiment3", "spamassassin2", "clinc_domains", "debian_sections")
LABELS = (300, 1000)
RATES = (0.05, 0.15)
KINDS = ("uniform", "neighbours", "overlooked")
SEEDS = 5
ENDS = ("value", "low", "high")


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    found = {}
    for name in CORPORA:
        found[name] = measure(Texts(name, options.data), options.seeds)
        print(name, json.dumps(found[name], indent=1))  # noqa: T201
    record("label_errors", {"seeds": options.seeds, "labels": LABELS, "rates": RATES, "corpora": found})


def measure(corpus: Texts, seeds: int) -> dict[str, Any]:
    """The areas of one corpus, by kind of errors, over numbers of labels, rates and seeds."""
    figures: dict[str, Any] = {}
    for kind in KINDS:
        rows = [areas(corpus, labels, rate, kind, seed) for labels in LABELS for rate in RATES for seed in range(seeds)]
        ours, plain, adjusted = np.array(rows).T
        figures[kind] = {
            "ours": round(float(ours.mean()), 4),
            "cleanlab": round(float(plain.mean()), 4),
            "cleanlab_adjusted": round(float(adjusted.mean()), 4),
            "gain": interval(ours - plain),
            "gain_over_adjusted": interval(ours - adjusted),
        }
    return figures


def interval(gains: NDArray[np.float64]) -> dict[str, float | None]:
    """The mean difference with its 95 % interval."""
    found = mean_interval(gains, 0.95)
    return {name: None if (end := getattr(found, name)) is None else round(end, 4) for name in ENDS}


def areas(corpus: Texts, labels: int, rate: float, kind: str, seed: int) -> tuple[float, float, float]:
    """Average precision of our ranking, and of cleanlab's without and with its adjustment."""
    from cleanlab.rank import get_label_quality_scores
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng([seed, labels, KINDS.index(kind)])
    rows = np.sort(rng.permutation(len(corpus.truth))[:labels])
    truth = corpus.truth[rows]
    given = planted(truth, len(corpus.classes), rate, kind, rng)
    names = [corpus.classes[label] for label in given]
    with one_thread():
        proba = held_out_proba(corpus.matrix.rows(rows), names, corpus.classes, seed, True)
    usable = ~np.isnan(proba).any(axis=1)
    proba, given, truth = proba[usable], given[usable], truth[usable]
    wrong = given != truth
    plain, adjusted = (
        -get_label_quality_scores(given, proba, method="self_confidence", adjust_pred_probs=adjust)
        for adjust in (False, True)
    )
    ours = error_probability(proba, given)
    scores = [float(average_precision_score(wrong, found)) for found in (ours, plain, adjusted)]
    return scores[0], scores[1], scores[2]


def planted(
    truth: NDArray[np.intp], classes: int, rate: float, kind: str, rng: np.random.Generator
) -> NDArray[np.intp]:
    """The labels (n,) with a share `rate` of them replaced; at most half of a class is."""
    given = truth.copy()
    if kind == "overlooked":
        most = np.bincount(truth, minlength=classes).argmax()
        others = rng.permutation(np.flatnonzero(truth != most))
        given[others[: min(round(rate * len(truth)), len(others) // 2)]] = most
        return given
    rows = rng.permutation(len(truth))[: round(rate * len(truth))]
    if kind == "uniform":
        given[rows] = (truth[rows] + rng.integers(1, classes, len(rows))) % classes
    else:
        given[rows] = (truth[rows] + 1) % classes
    return given


if __name__ == "__main__":
    main()
