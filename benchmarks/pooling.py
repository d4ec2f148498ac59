"""Which part of the encoder's output makes the best vector, and how much of a long text it has to see.

    python -m benchmarks.pooling --data FOLDER [--seeds 5]      writes benchmarks/results/pooling.json

`benchmarks/corpora.py` describes FOLDER. The head is the default's, joined with TF-IDF and LSA, on 40 to 300 random
labels, the same for every variant; one pass of the transformer serves all poolings of a length.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from al_pipeline.features.encoder import Encoder, install_encoder
from al_pipeline.features.tfidf import fit as fit_tfidf
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import fit_head
from benchmarks.corpora import READERS
from benchmarks.head import ENCODER, TEST, choose_texts
from benchmarks.record import record

CORPORA = ("review_sentences2", "tweets_sentiment3", "debian_sections", "bbc_news", "spamassassin2")
LONG = ("bbc_news", "spamassassin2")
"""Corpora for which shorter and longer cuts are compared."""
LENGTHS = (64, 128, 512)
BUDGETS = (40, 100, 300)
DEFAULT = "mean of the last layer"
_BATCH = 32

Floats = NDArray[np.float64]
Layers = Sequence[Floats]
"""The states of each layer, the embeddings first, for one text: (tokens, d) each."""


def _mean(*numbers: int) -> Callable[[Layers], Floats]:
    return lambda layers: unit(np.mean([layers[number].mean(axis=0) for number in numbers], axis=0))


POOLINGS: Mapping[str, Callable[[Layers], Floats]] = {
    DEFAULT: _mean(-1),
    "first token": lambda layers: unit(layers[-1][0]),
    "maximum": lambda layers: unit(layers[-1].max(axis=0)),
    "mean and maximum": lambda layers: unit(np.concatenate([_mean(-1)(layers), unit(layers[-1].max(axis=0))])),
    "mean of the last but one": _mean(-2),
    "mean of the last two layers": _mean(-1, -2),
    "mean of the last four layers": _mean(-1, -2, -3, -4),
    "means of the last and the third layer": lambda layers: unit(np.concatenate([_mean(-1)(layers), _mean(3)(layers)])),
}


def main() -> None:
    """Encode, fit, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    weights = options.data / "encoder"
    if not (weights / "source.json").exists():
        install_encoder(ENCODER, weights)
    scores: dict[str, dict[str, list[float]]] = {}
    for name in CORPORA:
        began = time.perf_counter()
        read, usual = READERS[name]
        texts, truth = choose_texts(read(options.data))
        vectors = encode(Encoder(weights, usual, "float32"), texts, POOLINGS)
        for length in LENGTHS if name in LONG else ():
            found = encode(Encoder(weights, length, "float32"), texts, {DEFAULT: POOLINGS[DEFAULT]})
            vectors[f"{length} tokens"] = found[DEFAULT]
        scores[name] = {variant: learn(dense, texts, truth, options.seeds) for variant, dense in vectors.items()}
        print(f"{name}: done after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
    sizes = {"texts": {name: len(choose_texts(READERS[name][0](options.data))[0]) for name in CORPORA}}
    settings = {
        "usual_tokens": {name: READERS[name][1] for name in CORPORA},
        "budgets": BUDGETS,
        "seeds": options.seeds,
    }
    record("pooling", {**sizes, **settings, "less_the_default": differences(scores)})


def unit(vector: Floats) -> Floats:
    """Scaled to length 1, as the head expects it."""
    return np.asarray(vector / max(1e-12, float(np.linalg.norm(vector))))


def encode(
    encoder: Encoder, texts: Sequence[str], poolings: Mapping[str, Callable[[Layers], Floats]]
) -> dict[str, NDArray[np.float32]]:
    """For each pooling, one unit vector per text."""
    import torch

    tokens = encoder.tokenize(texts)
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    rows: dict[str, dict[int, Floats]] = {name: {} for name in poolings}
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        ids, mask = encoder.pad([tokens[row] for row in batch], max(1, len(tokens[batch[-1]])))
        with torch.inference_mode():
            output = encoder.model(
                input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True
            )
        states = [layer.double().numpy() for layer in output.hidden_states]
        for place, row in enumerate(batch):
            layers = [layer[place, : max(1, len(tokens[row]))] for layer in states]
            for name, pool in poolings.items():
                rows[name][row] = pool(layers)
    return {
        name: np.stack([found[row] for row in range(len(tokens))]).astype(np.float32) for name, found in rows.items()
    }


def learn(dense: NDArray[np.float32], texts: Sequence[str], truth: NDArray[np.str_], seeds: int) -> list[float]:
    """Macro-F1 on the test set, one value for each budget and seed."""
    from sklearn.metrics import f1_score  # type: ignore[import-untyped, unused-ignore]

    pool = len(texts) - TEST
    tfidf = fit_tfidf(texts[:pool])
    matrix = FeatureMatrix(dense, tfidf.transform(texts), tfidf.components)
    test, classes, found = np.arange(pool, len(texts)), sorted(set(truth.tolist())), []
    with threadpool_limits(1):
        for budget in BUDGETS:
            for seed in range(seeds):
                chosen = np.random.default_rng(seed).permutation(pool)[:budget]
                head = fit_head(matrix.rows(chosen), truth[chosen].tolist(), classes, seed, calibrate=False)
                guess = np.array(classes)[head.predict_proba(matrix.rows(test)).argmax(axis=1)]
                found.append(float(f1_score(truth[test], guess, average="macro")))
    return found


def differences(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Each variant's macro-F1 minus the default's on the same labels: mean for each corpus, and over them."""
    told: dict[str, dict[str, Any]] = {}
    for variant in dict.fromkeys(name for found in scores.values() for name in found):
        at = {
            corpus: round(float(np.mean(np.subtract(found[variant], found[DEFAULT]))), 4)
            for corpus, found in scores.items()
            if variant in found
        }
        told[variant] = {"corpora": at, "mean": round(float(np.mean(list(at.values()))), 4)}
    told[DEFAULT] = {corpus: round(float(np.mean(found[DEFAULT])), 4) for corpus, found in scores.items()}
    return told


if __name__ == "__main__":
    main()
