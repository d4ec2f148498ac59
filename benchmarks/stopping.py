"""When to stop: how often a certificate is wrong, whether the bounds of `al finish` hold, what the stop proposal saves.

    python -m benchmarks.stopping --data FOLDER [--seeds 20]      writes benchmarks/results/stopping.json

`benchmarks/corpora.py` describes FOLDER. 100 projects: 20 seeds on five corpora, margin sampling, 20 labels and 22
batches of 40. The truth of a project is a fifth of the corpus, so its models' metrics are known exactly; the project's
own 500 test labels are drawn from it with replacement, 40 a round.

- `wrong`: projects in which a certificate was given at any look, with the target just above the best value that any of
  the project's models has: every certificate would be wrong. Looks: after each round, at each model so far, and every
  ten labels at the last one.
- `accuracy_uncorrected_wrong`: the same with the usual bound (Clopper and Pearson), as if one looked once.
- `finish`: share of the rest labelled by the model, the errors among these labels, and whether every class keeps the
  bound.
- `proposal`: labels saved by stopping when predictions are stable, against the whole budget, and the accuracy that
  costs, each with Student's interval over projects.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta
from threadpoolctl import threadpool_limits

from al_pipeline.evaluation.savings import mean_interval
from al_pipeline.models.estimators import HEAD, fit_classifier
from al_pipeline.simulation.runs import Work, prepare, simulate_run
from al_pipeline.simulation.simulate import Options, corpus_vectors, make_work
from al_pipeline.stopping.certificate import certify
from al_pipeline.stopping.proposal import is_stable
from al_pipeline.stopping.rest import rules
from al_pipeline.stopping.stability import cohens_kappa
from benchmarks.label_efficiency import corpus, parameters
from benchmarks.record import ROOT, record

CORPORA = ("spamassassin2", "bbc_news", "tweets_sentiment3", "review_sentences2", "debian_sections")
SEED, BATCH, BUDGET, TEST, PER_ROUND = 20, 40, 900, 500, 40
CONFIDENCE, BOUNDS, BELOW = 0.95, (0.05, 0.1), 0.03
Indices = NDArray[np.intp]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="stopping", help="name of the record in benchmarks/results")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in CORPORA:
        work = made(name, options.data)
        with ProcessPoolExecutor(options.workers, get_context("spawn"), _begin, (work,)) as pool:
            found[name] = list(pool.map(_project, range(options.seeds)))
        print(name, json.dumps(summed(found[name])["certificate"]), flush=True)  # noqa: T201
    figures = {
        "projects": sum(map(len, found.values())),
        "aims": {"wrong_share": 1 - CONFIDENCE, "finish_holds_share": 0.95},
        "all": summed([row for rows in found.values() for row in rows]),
        "corpora": {name: summed(rows) for name, rows in found.items()},
    }
    print(json.dumps(figures["all"], indent=2))  # noqa: T201
    print(record(options.name, figures).relative_to(ROOT))  # noqa: T201


def made(name: str, data: Path) -> Work:
    """The inputs of all projects on a corpus."""
    texts, params = corpus(name, data), parameters(128)
    vectors = corpus_vectors(texts, params.features, data, None)
    options = Options(
        strategies=("margin",), budget=BUDGET, batch_size=BATCH, seed_size=SEED, test_size=len(texts.items)
    )
    return make_work(texts, params, options, vectors)


class _Worker:
    work: Work


def _begin(work: Work) -> None:
    _Worker.work = work


def _project(seed: int) -> dict[str, Any]:
    with threadpool_limits(1):
        return project(_Worker.work, seed)


def project(work: Work, seed: int) -> dict[str, Any]:
    """One project: its rounds, and at each of them what would be certified, proposed and finished."""
    prepared = prepare(work, seed)
    known, classes = prepared.corpus, tuple(prepared.corpus.classes)
    curve = simulate_run(work, prepared, "margin", seed)
    place = {known.item_ids[int(p)]: int(p) for p in known.pool}
    labeled: list[int] = []
    predicted: list[Indices] = []
    counts = []
    truth = known.truth[known.test]
    head = None
    for point in curve.points:
        labeled += [place[query.item_id] for query in point.queries]
        rows, labels = np.array(labeled), [classes[int(c)] for c in known.truth[labeled]]
        last = point is curve.points[-1]
        head = fit_classifier(HEAD, prepared.matrix.rows(rows), labels, classes, seed, last, None)
        predicted.append(head.predict_proba(prepared.matrix.rows(known.test)).argmax(axis=1))
        counts.append(len(labeled))
    assert head is not None
    rng = np.random.default_rng([seed, 0x57])
    drawn = rng.integers(0, len(truth), TEST)
    rest = np.setdiff1d(known.pool, labeled)
    return {
        "certificate": certificates(classes, truth, predicted, drawn),
        "finish": finishes(
            classes,
            (head.predict_proba(prepared.matrix.rows(known.test[drawn])), truth[drawn]),
            (head.predict_proba(prepared.matrix.rows(rest)), known.truth[rest]),
            len(predicted),
        ),
        "proposal": proposal(truth, predicted, counts),
    }


def certificates(
    classes: tuple[str, ...], truth: Indices, predicted: Sequence[Indices], drawn: Indices
) -> dict[str, Any]:
    """For each metric: whether a wrong certificate was given at any look, and what a reachable target takes."""
    rare = classes[int(np.argmin(np.bincount(truth, minlength=len(classes))))]
    found = {}
    for metric in ("accuracy", "macro_f1", f"recall:{rare}"):
        values = [value_of(metric, classes, truth, one) for one in predicted]
        looks = [
            (min(TEST, PER_ROUND * (number + 1)), model)
            for number in range(len(predicted))
            for model in range(number + 1)
        ]
        looks += [(labels, len(predicted) - 1) for labels in range(10, TEST + 1, 10)]
        above = min(max(values) + 1e-9, 1 - 1e-9)
        told = []
        for labels, model in dict.fromkeys(looks):
            rows = drawn[:labels]
            told.append((confusion(truth[rows], predicted[model][rows], len(classes)), model))
        wrong = any(certify(one, classes, metric, above, CONFIDENCE, model + 1).certified for one, model in told)
        final = certify(told[-1][0], classes, metric, max(0.01, values[-1] - BELOW), CONFIDENCE, len(predicted))
        found["recall" if metric.startswith("recall") else metric] = {
            "wrong": wrong,
            "wrong_uncorrected": metric == "accuracy" and any(usual(one) > above for one, _ in told),
            "certified_below": final.certified,
            "lacking": final.lacking,
            "slack": values[-1] - final.low,
        }
    return found


def usual(counts: NDArray[np.float64]) -> float:
    """The lower bound of accuracy by Clopper and Pearson, as if one looked once."""
    hits, trials = counts.trace(), counts.sum()
    return 0.0 if hits == 0 else float(beta.ppf(1 - CONFIDENCE, hits, trials - hits + 1))


def value_of(metric: str, classes: tuple[str, ...], truth: Indices, predicted: Indices) -> float:
    """The metric on the whole truth; 1 if it is not defined there."""
    value = certify(confusion(truth, predicted, len(classes)), classes, metric, 0.5).value
    return 1.0 if value is None else value


def confusion(truth: Indices, predicted: Indices, classes: int) -> NDArray[np.float64]:
    """(C, C), rows: true classes."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes).astype(float)


def finishes(
    classes: tuple[str, ...],
    test: tuple[NDArray[np.float64], Indices],
    rest: tuple[NDArray[np.float64], Indices],
    models: int,
) -> dict[str, Any]:
    """What the last model may label of the rest, by the error rate allowed."""
    found = {}
    for bound in BOUNDS:
        proba, truth = test
        made = rules(
            proba.argmax(axis=1), proba.max(axis=1), proba.argmax(axis=1) == truth, classes, bound, CONFIDENCE, models
        )
        least = np.array([np.inf if rule.threshold is None else rule.threshold for rule in made])
        guess, sure = rest[0].argmax(axis=1), rest[0].max(axis=1)
        taken, wrong = sure >= least[guess], guess != rest[1]
        own = [wrong[taken & (guess == place)] for place in range(len(classes))]
        found[f"{bound:g}"] = {
            "share": float(taken.mean()),
            "error": float(wrong[taken].mean()) if taken.any() else None,
            "holds": all(not len(one) or bool(one.mean() <= bound) for one in own),
        }
    return found


def proposal(truth: Indices, predicted: Sequence[Indices], counts: Sequence[int]) -> dict[str, Any]:
    """Where stabilising predictions propose to stop, and what is lost by it."""
    kappas = [cohens_kappa(*pair) for pair in zip(predicted, predicted[1:], strict=False)]
    stop = next((number for number in range(len(predicted)) if is_stable(kappas[:number])), None)
    accuracy = [float((one == truth).mean()) for one in predicted]
    if stop is None:
        return {"stops": False, "saved": 0, "lost": 0.0, "at": counts[-1]}
    return {
        "stops": True,
        "saved": counts[-1] - counts[stop],
        "lost": accuracy[-1] - accuracy[stop],
        "at": counts[stop],
    }


def summed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of some projects."""
    metrics = rows[0]["certificate"]
    return {
        "projects": len(rows),
        "certificate": {
            metric: {
                "wrong": sum(row["certificate"][metric]["wrong"] for row in rows),
                "certified_3_points_below": sum(row["certificate"][metric]["certified_below"] for row in rows),
                "median_slack": float(np.median([row["certificate"][metric]["slack"] for row in rows])),
            }
            for metric in metrics
        }
        | {"accuracy_uncorrected_wrong": sum(row["certificate"]["accuracy"]["wrong_uncorrected"] for row in rows)},
        "finish": {
            bound: {
                "holds": sum(row["finish"][bound]["holds"] for row in rows),
                "share": interval([row["finish"][bound]["share"] for row in rows]),
                "error": interval([np.nan if (e := row["finish"][bound]["error"]) is None else e for row in rows]),
            }
            for bound in rows[0]["finish"]
        },
        "proposal": {
            "stops": sum(row["proposal"]["stops"] for row in rows),
            "labels_saved": interval([row["proposal"]["saved"] for row in rows]),
            "accuracy_lost": interval([row["proposal"]["lost"] for row in rows]),
            "labels_at_stop": float(np.median([row["proposal"]["at"] for row in rows])),
        },
    }


def interval(values: Sequence[float]) -> list[float | None]:
    """Mean and Student's interval of the defined values."""
    found = mean_interval(np.asarray(values, np.float64), CONFIDENCE)
    return [found.value, found.low, found.high]


if __name__ == "__main__":
    main()
