"""How often `al drift` raises an alarm: without a change, and where a tenth of the texts are of a new topic.

    python -m benchmarks.drift --data FOLDER [--windows 200] [--seconds 120]

Writes benchmarks/results/drift.json. FOLDER is that of `benchmarks.label_efficiency`, which also keeps the vectors;
with an empty cache of vectors it takes some minutes more.

- `without_change`: windows of 500 texts drawn at random from five corpora, a reference of up to 2,000 others, and a
  model fitted on 500 further labels: alarms, each test alone, and the estimated accuracy against the window's.
- `new_topic`: windows in which 50 of 500 texts are of a class that neither the reference nor the labels have, for each
  class of the two corpora by topic.
- `scikit_learn`: the domain classifier beside scikit-learn's logistic regression with cross-validated AUC on the same
  windows, with the same number of permutations (19, the fewest that reach p = 0.05): processor seconds, windows found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from al_pipeline.drift.assessment import CLASSES, DOMAIN, REFERENCE, WORDS, Drift, Texts, compare
from al_pipeline.drift.domain import domain_test
from al_pipeline.drift.permutations import Permutations, p_value, permute
from al_pipeline.models.text_model import fit_text_model
from al_pipeline.simulation.simulate import corpus_vectors
from benchmarks.corpora import READERS
from benchmarks.label_efficiency import corpus, parameters
from benchmarks.record import record

BY_TOPIC = ("bbc_news", "debian_sections")
WINDOW, NEW, LABELS, TEST = 500, 50, 500, 400
FEWEST = 19
"""The fewest permutations with which a p-value can be 0.05."""


@dataclass(frozen=True)
class Corpus:
    """A corpus with its vectors (n, d) and classes (n,) as indices."""

    name: str
    texts: list[str]
    vectors: NDArray[np.float32]
    truth: NDArray[np.intp]
    classes: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Windows:
    """Positions of texts: what is compared with what."""

    reference: NDArray[np.intp]
    window: NDArray[np.intp]
    train: NDArray[np.intp]
    test: NDArray[np.intp]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=200, help="without a change; half as many with a new topic")
    parser.add_argument("--seconds", type=float, default=120, help="at most, for scikit-learn")
    options = parser.parse_args()
    corpora = [_read(name, options.data) for name in READERS]
    with threadpool_limits(1):
        figures: dict[str, Any] = {
            "window": WINDOW,
            "reference_at_most": REFERENCE,
            "without_change": _without_change(corpora, options.windows),
            "new_topic": _new_topic([one for one in corpora if one.name in BY_TOPIC], options.windows // 2),
            "scikit_learn": _beside([one for one in corpora if one.name in BY_TOPIC], options.seconds),
        }
    same, new = figures["without_change"], figures["new_topic"]
    figures["aims"] = {
        "alarms_without_change": same["alarms"],
        "alarms_without_change_wanted": 0.05,
        "new_topic_found": new["found"],
        "new_topic_found_wanted": 0.9,
        "accuracy_error": same["accuracy"]["mean_error"],
        "accuracy_error_wanted": 0.02,
    }
    _tell(json.dumps(figures, indent=1))
    record("drift", figures)


def _read(name: str, data: Path) -> Corpus:
    found, params = corpus(name, data), parameters(READERS[name][1])
    vectors = corpus_vectors(found, params.features, data, None)
    assert vectors is not None
    _tell(f"{name}: {len(found.items)} texts")
    return Corpus(
        name,
        [item.text for item in found.items],
        vectors.of(found.items),
        found.truth,
        found.classes,
        READERS[name][1],
    )


def _draw(one: Corpus, rng: Generator, topic: int | None = None) -> Windows:
    """Disjoint random texts; with a topic, it is in the window alone, as `NEW` of its texts."""
    known = rng.permutation(np.flatnonzero(one.truth != (-1 if topic is None else topic)))
    new = np.empty(0, np.intp) if topic is None else rng.permutation(np.flatnonzero(one.truth == topic))[:NEW]
    sizes = np.cumsum([WINDOW - len(new), TEST, min(LABELS, len(known) // 5)])
    window, test, train, reference = np.split(known, sizes)
    return Windows(reference[:REFERENCE], np.concatenate([window, new]), train, test)


def _compare(one: Corpus, drawn: Windows, seed: int) -> tuple[Drift, float]:
    """What `al drift` finds, and the accuracy of the model on the window."""
    features = parameters(one.max_tokens).features
    vectors, texts, classes = one.vectors, one.texts, one.classes
    model = fit_text_model(
        [texts[row] for row in drawn.train],
        vectors[drawn.train],
        [classes[one.truth[row]] for row in drawn.train],
        classes,
        _encoder_only(features),
        None,
        seed,
        False,
    )
    proba, tested = (
        model.predict_proba([texts[row] for row in rows], vectors[rows]) for rows in (drawn.window, drawn.test)
    )
    found = compare(
        [texts[row] for row in drawn.reference],
        Texts([str(row) for row in drawn.window], [texts[row] for row in drawn.window], proba),
        vectors[np.concatenate([drawn.reference, drawn.window])],
        classes,
        tested,
        [classes[one.truth[row]] for row in drawn.test],
        seed,
    )
    return found, float((proba.argmax(axis=1) == one.truth[drawn.window]).mean())


def _encoder_only(features: Any) -> Any:
    from msgspec.structs import replace

    return replace(features, kind="encoder")


def _without_change(corpora: list[Corpus], windows: int) -> dict[str, Any]:
    alarms: list[bool] = []
    p_values: dict[str, list[float]] = {name: [] for name in (DOMAIN, CLASSES, WORDS)}
    apart, within = [], []
    began = time.process_time()
    for number in range(windows):
        one = corpora[number % len(corpora)]
        found, accuracy = _compare(one, _draw(one, default_rng([number, 1])), number)
        alarms.append(found.alarm)
        for name, p in found.p_values.items():
            p_values[name].append(p)
        estimate = found.accuracy
        if estimate.value is not None:
            assert estimate.low is not None
            assert estimate.high is not None
            apart.append(estimate.value - accuracy)
            within.append(estimate.low <= accuracy <= estimate.high)
        _tell(f"without a change: {number + 1} of {windows}, {sum(alarms)} alarms")
    return {
        "windows": windows,
        "alarms": _share(alarms),
        "p_at_most_0.05": {name: _share([p <= 0.05 for p in own]) for name, own in p_values.items()},
        "processor_seconds_each": round((time.process_time() - began) / windows, 2),
        "accuracy": {
            "estimated": len(apart),
            "mean_error": round(float(np.abs(apart).mean()), 4),
            "bias": round(float(np.mean(apart)), 4),
            "interval_holds": _share(within),
        },
    }


def _new_topic(corpora: list[Corpus], windows: int) -> dict[str, Any]:
    found: dict[str, list[Drift]] = {one.name: [] for one in corpora}
    firsts: list[float] = []
    for number in range(windows):
        one = corpora[number % len(corpora)]
        topic = number // len(corpora) % len(one.classes)
        result, _ = _compare(one, _draw(one, default_rng([number, 2]), topic), number)
        found[one.name].append(result)
        firsts.append(float(np.mean([int(one.truth[int(row["id"])] == topic) for row in result.newest(10)])))
        _tell(f"new topic {one.classes[topic]}: {', '.join(result.found) or 'not found'}")
    every = [result for own in found.values() for result in own]
    return {
        "windows": windows,
        "new_texts": NEW,
        "found": _share([result.alarm for result in every]),
        "found_by_corpus": {name: _share([result.alarm for result in own]) for name, own in found.items()},
        "found_by_test": {
            name: _share([name in result.found for result in every]) for name in (DOMAIN, CLASSES, WORDS)
        },
        "median_auc": round(float(np.median([result.domain.auc for result in every])), 3),
        "new_among_the_first_ten": round(float(np.mean(firsts)), 3),
        "accuracy_withheld": _share([result.accuracy.value is None for result in every]),
    }


def _beside(corpora: list[Corpus], seconds: float) -> dict[str, Any]:
    """Both domain classifiers on the same windows with a new topic, until `seconds` have passed."""
    tests: dict[str, Callable[[NDArray[np.float32], Permutations], float]] = {
        "al drift": lambda vectors, labels: domain_test(vectors, labels).p,
        "al drift, AUC alone": lambda vectors, labels: domain_test(vectors, labels).auc_p,
        "scikit-learn": _logistic,
    }
    p_values: dict[str, list[float]] = {name: [] for name in tests}
    spent = dict.fromkeys(tests, 0.0)
    began, number = time.perf_counter(), 0
    while number < 2 or time.perf_counter() - began < seconds:
        one = corpora[number % len(corpora)]
        rng = default_rng([number, 3])
        drawn = _draw(one, rng, number // len(corpora) % len(one.classes))
        vectors = one.vectors[np.concatenate([drawn.reference, drawn.window])]
        labels = permute(len(drawn.reference), len(drawn.window), FEWEST, rng)
        for name, test in tests.items():
            start = time.process_time()
            p_values[name].append(test(vectors, labels))
            spent[name] += time.process_time() - start
        number += 1
        _tell(f"beside scikit-learn: {number} windows")
    return {"windows": number, "permutations": FEWEST} | {
        name: {"found": _share([p <= 0.05 for p in own]), "processor_seconds_each": round(spent[name] / number, 3)}
        for name, own in p_values.items()
    }


def _logistic(vectors: NDArray[np.float32], labels: Permutations) -> float:
    """The permutation test of the AUC of plain logistic regression, cross-validated on the same folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    aucs = []
    for column in labels.member.T:
        scores = np.empty(len(column))
        for own in labels.folds:
            others = np.setdiff1d(np.arange(len(column)), own)
            fitted = LogisticRegression(max_iter=1000).fit(vectors[others], column[others])
            scores[own] = fitted.decision_function(vectors[own])
        aucs.append(roc_auc_score(column, scores))
    return p_value(np.array(aucs))


def _share(values: list[bool]) -> float:
    return round(float(np.mean(values)), 3) if values else 0.0


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
