"""What choosing a batch costs on a large pool, compared with one matrix product of its cached features.

    python -m benchmarks.selection [--items 1000000]      writes benchmarks/results/selection.json

The pool is a file of float32 features of unit length, 384 wide, read part by part as the stage `score` reads the
cache; a head of 20 classes scores it with the functions that the stage calls; `next_batch` chooses 100 from the
shortlist. Features and head are random: the cost does not depend on their values. A strategy's seconds run from the
first feature to the finished batch, without the random slice, which costs the same for all and is reported separately
(it hashes every id). All of it runs on one thread, as stages do, and ratios are of that thread's processor time, which
other processes do not affect; the product's wall time on two cores is recorded too. BADGE runs on the shortlist, as the
strategy does, and once over the whole pool, in passes over the features. Core-set and TypiClust choose among all of
ROWS rows, next to scikit-activeml's. Memory is the peak of the process beyond the file's pages, for the pool and for a
quarter of it.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from al_pipeline.active_learning.batch import next_batch
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.clustering import seeds_of_products
from al_pipeline.active_learning.sampling import round_seed, sample
from al_pipeline.active_learning.shortlist import ScoreAccumulator, Shortlist, TopK
from al_pipeline.active_learning.strategies import STRATEGIES as ALL_STRATEGIES
from al_pipeline.active_learning.strategies import scoring_of
from al_pipeline.models.approximate import MarginAccumulator
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import Head
from al_pipeline.records import RANDOM_SLICE
from al_pipeline.stages.score import BINS
from al_pipeline.workspace.fingerprint import THREADS
from benchmarks.record import record

WIDTH, CLASSES, BATCH, SHORTLIST = 384, 20, 100, 1000
STRATEGIES = ("margin", "cluster_margin", "badge")
CORES = 2
ROWS, LABELLED = 10_000, 200
PART = 1000
"""Rows per part, as the stage reads them."""
_LOOK_SECONDS = 0.005

Features = NDArray[np.float32]


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(THREADS):
        pool = write_pool(Path(folder) / "pool.npy", options.items)
        figures = {**measure(pool, options.repeats), "all_rows": over_all_rows(pool)}
        quarter = {name: row["peak_memory_mib"] for name, row in strategies(pool[: len(pool) // 4], 1, 1.0).items()}
    sizes = {"items": options.items, "width": WIDTH, "classes": CLASSES, "batch": BATCH, "shortlist": SHORTLIST}
    record("selection", {**sizes, "threads": THREADS, **figures, "peak_memory_mib_of_a_quarter": quarter})


def write_pool(path: Path, items: int) -> Features:
    """Rows of unit length in a memory-mapped file."""
    rng = np.random.default_rng(0)
    pool = np.lib.format.open_memmap(path, "w+", np.float32, (items, WIDTH))
    for start in range(0, items, 50_000):
        rows = rng.standard_normal((min(50_000, items - start), WIDTH), dtype=np.float32)
        pool[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pool.flush()
    return np.load(path, mmap_mode="r")


def random_head() -> Head:
    """A head of all classes whose predictions are neither all certain nor all uncertain."""
    rng = np.random.default_rng(1)
    names = tuple(f"class {number}" for number in range(CLASSES))
    weights = rng.normal(0, 3, (CLASSES, WIDTH)).astype(np.float32)
    return Head(names, dict.fromkeys(names, 5), (weights,), np.zeros(CLASSES, np.float32), 1.0, (WIDTH,))


def measure(pool: Features, repeats: int) -> dict[str, object]:
    """Measure the product, the strategies, and BADGE over the whole pool."""
    weights = np.ascontiguousarray(random_head().weights[0].T)
    one = pool[0].copy()
    _, product = seconds(lambda: pool @ weights, repeats)
    with threadpool_limits(CORES):
        clock, _ = seconds(lambda: pool @ weights, repeats)
    _, one_pass = seconds(lambda: pool @ one, repeats)
    ids = names_of(len(pool))
    _, slice_seconds = seconds(lambda: sample(ids, BATCH // 10, round_seed(1, 1, "margin"), RANDOM_SLICE), 1)
    return {
        "matrix_product_cpu_seconds": round(product, 3),
        "matrix_product_seconds_on_two_cores": round(clock, 3),
        "one_pass_cpu_seconds": round(one_pass, 3),
        "random_slice_cpu_seconds": round(slice_seconds, 3),
        "strategies": strategies(pool, repeats, product),
        "badge_over_the_whole_pool": whole_badge(pool, one_pass),
    }


def strategies(pool: Features, repeats: int, product: float) -> dict[str, dict[str, float]]:
    """Each strategy from the first feature to the batch."""
    ids = names_of(len(pool))
    found = {}
    for name in STRATEGIES:
        with peak_memory() as peak:
            clock, spent = seconds(lambda name=name: select(name, pool, ids), repeats)
        found[name] = {
            "seconds": round(clock, 3),
            "cpu_seconds": round(spent, 3),
            "matrix_products": round(spent / product, 2),
            "peak_memory_mib": round(peak[0]),
        }
    return found


def select(strategy: str, pool: Features, ids: Sequence[str]) -> list[str]:
    """What the stages `score` and `select` do with cached features."""
    config = QueryConfig(1, BATCH, strategy, BATCH, 0.0, SHORTLIST)
    head = random_head()
    margins = MarginAccumulator(
        ScoreAccumulator(TopK(SHORTLIST, BATCH, config.seed, CLASSES), (0.0, 1.0), BINS, CLASSES), head
    )
    for start in range(0, len(pool), PART):
        columns = head.columns(FeatureMatrix(np.asarray(pool[start : start + PART])))
        assert columns is not None and scoring_of(strategy).acquisition == "margin"
        margins.add_approximate(ids[start : start + PART], columns)
    found = margins.result()
    assert found.counts.sum() == found.predicted.sum() == len(pool)
    labels = {f"label {number}": head.classes[number % CLASSES] for number in range(100)}

    def vectors(some: Sequence[str]) -> Features:
        return np.array(pool[[int(name, 16) for name in some]])

    queries, _ = next_batch(config, 1, ids, Shortlist(*found.kept), labels, head.classes, vectors)
    assert len({query.item_id for query in queries}) == BATCH and {query.strategy for query in queries} == {strategy}
    return [query.item_id for query in queries]


def whole_badge(pool: Features, one_pass: float) -> dict[str, float]:
    """BADGE's seeds over every row, in passes over the features; without the bias, which would copy them."""
    head = random_head()
    errors = np.empty((len(pool), CLASSES), np.float32)
    for start in range(0, len(pool), PART):
        errors[start : start + PART] = head.predict_proba(FeatureMatrix(np.asarray(pool[start : start + PART])))
    errors[np.arange(len(pool)), errors.argmax(axis=1)] -= 1
    with peak_memory() as peak:
        clock, spent = seconds(lambda: seeds_of_products(errors, pool, BATCH, np.random.default_rng(0)), 1)
    passes = spent / one_pass
    return {
        "seconds": round(clock, 2),
        "cpu_seconds": round(spent, 2),
        "passes_over_memory": round(passes, 1),
        "passes_a_pick": round(passes / BATCH, 2),
        "peak_memory_mib": round(peak[0]),
    }


def over_all_rows(pool: Features) -> dict[str, dict[str, float]]:
    """Core-set and TypiClust of ROWS rows: ours and scikit-activeml's, in turns."""
    from skactiveml.pool import CoreSet, TypiClust

    vectors, known = np.array(pool[:ROWS], np.float64), np.array(pool[ROWS : ROWS + LABELLED], np.float64)
    view = Shortlist(names_of(len(vectors)), vectors=vectors, labeled=known)
    rows = np.concatenate([vectors, known])
    labels = np.full(len(rows), np.nan)
    labels[len(vectors) :] = np.arange(len(known)) % CLASSES
    found = {}
    for name, make in (("core_set", CoreSet), ("typiclust", TypiClust)):
        spent, theirs = [], []
        for seed in range(3):
            pick = partial(ALL_STRATEGIES[name].pick, view, BATCH, round_seed(seed, 1, name))
            query = partial(make(random_state=seed).query, rows, labels, batch_size=BATCH)
            spent.append(seconds(pick, 1)[1])
            theirs.append(seconds(query, 1)[1])
        found[name] = {
            "cpu_seconds": round(median(spent), 2),
            "scikit_activeml_cpu_seconds": round(median(theirs), 2),
            "times_faster": round(median(theirs) / median(spent), 2),
        }
    return found


def names_of(items: int) -> list[str]:
    """Ids as ingest creates them: twenty hexadecimal digits."""
    return [f"{number:020x}" for number in range(items)]


def seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Wall time and this thread's processor time: the medians of some runs, after one that reads the file in."""
    if repeats > 1:
        call()
    spent = []
    for _ in range(repeats):
        clock, cpu = time.perf_counter(), time.thread_time()
        call()
        spent.append((time.perf_counter() - clock, time.thread_time() - cpu))
    return median(run[0] for run in spent), median(run[1] for run in spent)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The peak of anonymous memory during the call, in MiB beyond that at its beginning."""
    before, peak, ended = _anonymous(), [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            peak[0] = max(peak[0], _anonymous() - before)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def _anonymous() -> float:
    """Memory of this process without file pages, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    main()
