"""What fitting the classifier costs from 500 to 50,000 labels: on the kernel, on the features, and by scikit-learn.

    python -m benchmarks.head_speed      writes benchmarks/results/head_speed.json

Features are drawn at random: dense vectors of the encoder's width around a centre for each class, and TF-IDF of 60
terms a text whose frequencies fall like 1 / rank. Fits are not calibrated. scikit-learn's LogisticRegression has the
same penalty and weights; it is measured with its own tolerance, and with the tolerance of our fit. Seconds are
processor time.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

from al_pipeline.models import linear, softmax
from al_pipeline.models.feature_matrix import FeatureMatrix
from benchmarks.record import record

WIDTH, TERMS_A_TEXT = 384, 60
TERMS = (5000, 30_000)
CLASSES = (2, 20)
LABELS = (500, 1000, 1500, 2000, 2900, 5000, 10_000, 50_000)
TOLERANCE = 1e-7
"""The slope at which our fit ends; both divide it by the number of labels."""

_TIGHT = 10_000
"""With more labels scikit-learn is not asked for our tolerance: it would take many minutes."""


def main() -> None:
    """Measure and write the record."""
    warnings.filterwarnings("ignore", module="sklearn")
    table = []
    with threadpool_limits(1):
        for classes in CLASSES:
            for terms in TERMS:
                for labels in LABELS:
                    table.append(measure(labels, classes, terms))
                    print(json.dumps(table[-1]), flush=True)  # noqa: T201
    record("head_speed", {"width": WIDTH, "terms_a_text": TERMS_A_TEXT, "table": table})


def measure(labels: int, classes: int, terms: int) -> dict[str, float | str | None]:
    """Seconds of each fit."""
    features, targets = draw(labels, classes, terms)
    names = sorted(set(targets))
    both = hstack([features.dense, features.sparse], format="csr").astype(np.float64)

    def ours(kernel: bool) -> float:
        rule = softmax._kernel_is_faster
        softmax._kernel_is_faster = lambda *_: kernel
        try:
            return cpu_seconds(lambda: linear.fit_head(features, targets, names, 0, calibrate=False))
        finally:
            softmax._kernel_is_faster = rule

    def theirs(tolerance: float) -> float:
        model = LogisticRegression(C=linear.STRENGTH, class_weight="balanced", max_iter=1000, tol=tolerance)
        return cpu_seconds(lambda: model.fit(both, targets))

    return {
        "classes": classes,
        "terms": terms,
        "labels": labels,
        "kernel": ours(True) if labels < softmax._MAX_KERNEL else None,
        "features": ours(False),
        "fit_head_uses": "kernel" if softmax._kernel_is_faster(labels, WIDTH + terms, classes) else "features",
        "scikit_learn": theirs(1e-4),
        "scikit_learn_our_tolerance": theirs(TOLERANCE) if labels <= _TIGHT else None,
    }


def draw(labels: int, classes: int, terms: int) -> tuple[FeatureMatrix, list[str]]:
    """Random features of classes that overlap."""
    rng = np.random.default_rng(labels + classes + terms)
    targets = np.arange(labels) % classes
    dense = rng.normal(0, 0.35, (classes, WIDTH))[targets] + rng.standard_normal((labels, WIDTH))
    share = 1 / np.arange(1, terms + 1)
    columns = rng.choice(terms, (labels, TERMS_A_TEXT), p=share / share.sum()).ravel()
    rows = np.repeat(np.arange(labels), TERMS_A_TEXT)
    sparse = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(labels, terms))
    return (
        FeatureMatrix(normalize(dense).astype(np.float32), normalize(sparse).astype(np.float32)),
        [f"class {target:02d}" for target in targets],
    )


def cpu_seconds(call: Callable[[], object]) -> float:
    """Processor seconds of all threads."""
    start = time.process_time()
    call()
    return round(time.process_time() - start, 3)


if __name__ == "__main__":
    main()
