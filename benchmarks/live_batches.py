"""What live questions save against batches of 40, in labels: `al simulate --live` on three corpora.

    python -m benchmarks.live_batches --data FOLDER [--seeds 8]      writes benchmarks/results/live_batches.json

`benchmarks/corpora.py` describes FOLDER. Both ask by margin, with one person at work and three open questions, and are
measured with the stages' model at the same numbers of labels. An interrupted run continues: vectors, and each run of a
strategy and a seed, are stored in FOLDER.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from al_pipeline.simulation.page import live_table, summary
from al_pipeline.simulation.simulate import Options, corpus_vectors, simulate
from benchmarks.corpora import READERS
from benchmarks.label_efficiency import corpus, parameters, shown_bar
from benchmarks.record import ROOT, record

CORPORA = ("spamassassin2", "bbc_news", "debian_sections")
"""2, 5 and 20 classes."""
BUDGET = 800
BATCH = 40


def main() -> None:
    """Simulate what is missing; write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--people", type=int, default=1, help="at work")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="this corpus alone; writes no record")
    options = parser.parse_args()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    began, found = time.perf_counter(), {}
    for name in CORPORA if not options.only else (options.only,):
        found[name] = play(name, options, console)
    if options.only:
        return
    told = {
        "budget": BUDGET,
        "batch": BATCH,
        "seeds": options.seeds,
        "people": options.people,
        "seconds": round(time.perf_counter() - began, 1),
        "corpora": found,
    }
    print(record("live_batches", told).relative_to(ROOT))  # noqa: T201


def play(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """One corpus: what live questions save of the labels of batches."""
    texts, params = corpus(name, options.data), parameters(READERS[name][1])
    vectors = corpus_vectors(texts, params.features, options.data, None)
    asked = Options(
        strategies=("margin",), seeds=options.seeds, budget=BUDGET, batch_size=BATCH, workers=options.workers,
        live=options.people,
    )  # fmt: skip
    with shown_bar(name, console) as tell:
        done = simulate(texts, name, params, asked, options.data / "runs", vectors, tell)
    table = live_table(done.result)
    assert table is not None
    console.print(table[0])
    for row in table[2]:
        console.print("  " + "   ".join(row))
    for sentence in summary(done.result):
        console.print(f"  {sentence}")
    curves = done.result["metrics"][done.result["metric"]]["curves"]
    return {
        **done.result["live"],
        "texts": len(texts.items),
        "classes": len(texts.classes),
        "metric": done.result["metric"],
        "budgets": done.result["budgets"],
        "curves": {
            arm: [[round(v, 4) if v is not None else None for v in point] for point in curve]
            for arm, curve in curves.items()
        },
        "run_seconds": done.result["seconds"],
    }


if __name__ == "__main__":
    main()
