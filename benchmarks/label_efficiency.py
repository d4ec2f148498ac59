"""How many labels each query strategy needs: the table and the curves of the README.

    python -m benchmarks.label_efficiency --data FOLDER [--only REGEX] [--peers NAMES]

Writes benchmarks/results/label_efficiency.json, the table in README.md and docs/label-efficiency.png.
`benchmarks/corpora.py` describes FOLDER. An interrupted run continues: vectors, and each run of a strategy and a seed,
are stored in FOLDER.

Every strategy gets the same features, classifier, splits and seeds. The spam corpus is also subsampled: all its ham,
and a random part of its spam, so that spam is 10, 2 and 1 % of the mails. None is planted in a seed round.

If a class is so rare that random sampling does not reach the score within the budget, random sampling continues to the
end of the pool, so that the saving is a number.

`--peers` names strategies of scikit-activeml, see benchmarks/peers.py; benchmarks/screening.py finds the best.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from threadpoolctl import threadpool_limits

from al_pipeline.evaluation.savings import compare
from al_pipeline.features.vectors import Vectors
from al_pipeline.files import read_json, write_jsonl
from al_pipeline.params import Params, parse_params
from al_pipeline.records import content_hash
from al_pipeline.simulation.corpus import LabeledTexts, read_corpus
from al_pipeline.simulation.runs import FULL, Work, prepare, read_run
from al_pipeline.simulation.simulate import Options, Simulation, corpus_vectors, make_work, simulate, table, to_row
from al_pipeline.workspace.fingerprint import THREADS
from al_pipeline.workspace.trust import template
from benchmarks.corpora import READERS
from benchmarks.efficiency_table import publish
from benchmarks.peers import PEERS, peer_run
from benchmarks.record import record

SPAM = "spamassassin2"
CUTS = {f"{SPAM}_{percent}pct": percent / 100 for percent in (10, 2, 1)}
"""The share of spam that is kept."""
CORPORA = (SPAM, *CUTS, "bbc_news", "tweets_sentiment3", "review_sentences2", "debian_sections")
LIMIT = 8_200
"""The maximum number of texts of a corpus; of a larger one a random sample is used."""
STRATEGIES = ("random", "margin", "auto")
BUDGET = 1000
TO_THE_END = (f"{SPAM}_2pct", f"{SPAM}_1pct")
"""Corpora whose whole pool random sampling asks."""
LONG_BATCH = 200
TARGETS = ("90", "95", "98")


def main() -> None:
    """Simulate what is missing; write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="corpora whose name matches this; writes no record")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--peers", default="", help=", ".join(PEERS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    strategies, peers = tuple(options.strategies.split(",")), tuple(filter(None, options.peers.split(",")))
    console = Console(stderr=True)
    found = {}
    for name in CORPORA:
        if re.search(options.only, name):
            found[name] = play(name, options.data, strategies, peers, options.seeds, options.workers, console)
            show(name, found[name], console)
    if options.only:
        return
    told = {"budget": BUDGET, "corpora": found, "means": means(found)}
    record("label_efficiency", told)
    publish(told)


def play(
    name: str,
    data: Path,
    strategies: Sequence[str],
    peers: Sequence[str],
    seeds: int,
    workers: int,
    console: Console,
    budget: int = BUDGET,
    limit: float | None = None,
) -> dict[str, Any]:
    """One corpus with all strategies: the figures of `al simulate --json` that the table needs.

    `limit`: as in `peer_run`.
    """
    texts = corpus(name, data)
    params = parameters(READERS[SPAM if name in CUTS else name][1])
    began = time.perf_counter()
    vectors = corpus_vectors(texts, params.features, data, None)
    console.print(f"{name}: {len(texts.items)} texts, vectors after {time.perf_counter() - began:.0f} s")
    options = Options(strategies=tuple(strategies), seeds=seeds, budget=budget, workers=workers)
    with shown_bar(name, console) as tell:
        done = simulate(texts, name, params, options, data / "runs", vectors, tell)
    found = figures(done.result)
    if name in TO_THE_END and budget == BUDGET:
        found["to_the_end"] = to_the_end(texts, name, params, options, data / "runs", vectors, done, console)
    if peers:
        work = make_work(texts, params, options, vectors)
        rows = play_peers(work, done.folder, peers, done.result["seeds"], workers, console, limit)
        found["peers"] = compared(done.folder, rows, done.result)
    return found


@contextmanager
def shown_bar(label: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; yields a callback `(done, total)`."""
    columns = (TextColumn(label), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("runs", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def to_the_end(
    texts: LabeledTexts,
    name: str,
    params: Params,
    options: Options,
    out: Path,
    vectors: Vectors | None,
    short: Simulation,
    console: Console,
) -> dict[str, Any]:
    """What the strategies save of the labels that random sampling needs if it may ask the whole pool.

    Beyond the budget of the others its batches are large, to save time: its curve has fewer points there.
    """
    pool = short.result["corpus"]["texts"] - short.result["corpus"]["test"]
    options = replace(options, strategies=("random",), budget=pool + LONG_BATCH, batch_size=LONG_BATCH)
    with shown_bar(f"{name}, random to the pool's end", console) as tell:
        long = simulate(texts, name, params, options, out, vectors, tell)
    seeds, metric, near = short.result["seeds"], short.result["metric"], short.result["budgets"]
    far = [labels for labels in long.result["budgets"] if labels > near[-1]]
    beyond = table([(read_run(long.folder, ("random", seed)) or {})[metric][-len(far) :] for seed in seeds])
    curves = {}
    for arm in short.result["strategies"]:
        known = table([(read_run(short.folder, (arm, seed)) or {})[metric] for seed in seeds])
        curves[arm] = np.hstack([known, beyond if arm == "random" else np.full(beyond.shape, np.nan)])
    full = table([(read_run(short.folder, (FULL, seed)) or {})[metric] for seed in seeds])
    row = to_row(compare([*near, *far], curves, full, np.random.default_rng(0)))
    return {key: row[key] for key in ("labels_needed", "savings", "savings_interval")} | {"pool": pool}


def play_peers(
    work: Work,
    folder: Path,
    peers: Sequence[str],
    seeds: Sequence[int],
    workers: int,
    console: Console,
    limit: float | None = None,
) -> dict[tuple[str, int], Mapping[str, Any]]:
    """The runs of scikit-activeml's strategies, one process for each seed."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, shown_bar("theirs", console) as tell:
        tasks = [pool.submit(play_seed, work, folder, tuple(peers), seed, limit) for seed in seeds]
        for number, task in enumerate(as_completed(tasks), 1):
            rows += task.result()
            tell(number, len(tasks))
    return {(row["strategy"], row["seed"]): row for row in rows}


def play_seed(work: Work, folder: Path, peers: Sequence[str], seed: int, limit: float | None) -> list[dict[str, Any]]:
    """All peers with one seed, each on one thread, as ours."""
    with threadpool_limits(THREADS):
        paths = {peer: folder / "peers" / f"{peer.replace(' ', '-')}-{seed}.json" for peer in peers}
        prepared = None if all(path.exists() for path in paths.values()) else prepare(work, seed)
        return [
            read_json(path) if prepared is None else peer_run(work, prepared, peer, seed, path, limit)
            for peer, path in paths.items()
        ]


def compared(
    folder: Path, rows: Mapping[tuple[str, int], Mapping[str, Any]], result: Mapping[str, Any]
) -> dict[str, Any]:
    """Ours and theirs by the metric of the corpus: area, gain over random, wins, where it is below random."""
    seeds, metric = result["seeds"], result["metric"]
    failed = {name: row["failed"] for (name, _), row in rows.items() if "failed" in row}
    runs = {run: row for run, row in rows.items() if run[0] not in failed} | {
        (arm, seed): read_run(folder, (arm, seed)) or {} for arm in result["strategies"] for seed in seeds
    }
    arms = dict.fromkeys(arm for arm, _ in runs)
    curves = {arm: table([runs[arm, seed][metric] for seed in seeds]) for arm in arms}
    full = table([(read_run(folder, (FULL, seed)) or {})[metric] for seed in seeds])
    found = to_row(compare(result["budgets"], curves, full, np.random.default_rng(0)))
    kept = ("area", "area_interval", "gain", "gain_interval", "labels_needed", "wins", "below_random", "curves")
    cpu: dict[str, float] = {}
    for (name, _), row in rows.items():
        cpu[name] = cpu.get(name, 0.0) + row["cpu_seconds"] / len(seeds)
    return {key: found[key] for key in kept} | {"failed": failed, "cpu_seconds": cpu}


def parameters(max_tokens: int) -> Params:
    """The template's parameters with this corpus's `max_tokens`, uncalibrated.

    Calibration takes five times the fits. It changes no ranking of two classes, and hardly any of more classes. It does
    raise F1 if a class is rare.
    """
    params = parse_params(template("params.yaml"))
    features = structs.replace(params.features, max_tokens=max_tokens)
    return structs.replace(params, features=features, train=structs.replace(params.train, calibrate=False))


def corpus(name: str, data: Path) -> LabeledTexts:
    """Texts and labels, filtered as `al simulate` does."""
    path = data / "corpora" / f"{name}.jsonl"
    if not path.exists():
        rows = READERS[SPAM if name in CUTS else name][0](data)
        if name in CUTS:
            rows = cut(rows, "spam", CUTS[name])
        write_jsonl(path, ({"text": text.replace("\0", " ").strip(), "label": label} for text, label in rows))
    return read_corpus(path, limit=LIMIT)


def cut(rows: Sequence[tuple[str, str]], rare: str, share: float) -> list[tuple[str, str]]:
    """All rows of the other classes, and as many of `rare`, in the order of their digests, as give it this share."""
    others = [row for row in rows if row[1] != rare]
    few = sorted({content_hash(text): (text, label) for text, label in rows if label == rare}.items())
    return others + [row for _, row in few[: round(len(others) * share / (1 - share))]]


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded part of a simulation's result."""
    metrics = {}
    for metric, found in result["metrics"].items():
        metrics[metric] = {
            key: found[key]
            for key in ("full", "area", "area_interval", "gain", "gain_interval", "labels_needed", "savings")
        } | {key: found[key] for key in ("savings_interval", "savings_at_least", "below_random", "wins")}
    metrics[result["metric"]]["curves"] = result["metrics"][result["metric"]]["curves"]
    return {
        "texts": result["corpus"]["texts"],
        "test": result["corpus"]["test"],
        "classes": result["corpus"]["classes"],
        "metric": result["metric"],
        "seeds": len(result["seeds"]),
        "budgets": result["budgets"],
        "strategies": result["strategies"],
        "seconds": result["seconds"],
        "metrics": metrics,
    }


def show(name: str, found: Mapping[str, Any], console: Console) -> None:
    """Print one corpus: the mean ALC of each strategy and the labels needed."""
    metric = found["metrics"][found["metric"]]
    shown = Table("strategy", "area", "less random's", *(f"{t} %" for t in TARGETS), "saving", "below random at")
    shown.title = f"{name}: {found['metric']}, {metric['full']:.3f} with all labels"
    for strategy in found["strategies"]:
        needed, saving = metric["labels_needed"][strategy], metric["savings"][strategy]
        least = metric["savings_at_least"][strategy]
        shown.add_row(
            strategy,
            f"{metric['area'][strategy]:.3f}",
            f"{metric['gain'][strategy]:+.3f}",
            *("–" if needed[t] is None else f"{needed[t]:.0f}" for t in TARGETS),
            " ".join(f"{saving[t]:.1f}" if saving[t] else f">{least[t]:.1f}" if least[t] else "–" for t in TARGETS),
            ", ".join(map(str, metric["below_random"][strategy])),
        )
    console.print(shown)


def means(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The mean over the corpora of the area under each strategy's curve, ours and theirs."""
    areas = [
        {**row["metrics"][row["metric"]]["area"], **row.get("peers", {}).get("area", {})} for row in found.values()
    ]
    return {strategy: float(np.mean([area[strategy] for area in areas])) for strategy in areas[0]}


if __name__ == "__main__":
    sys.exit(main())
