"""The runs of a simulation, one for each strategy and seed, in parallel processes; results are stored.

The result of a run is a file, written atomically, in a folder named by a digest of everything on which the runs depend.
Repeating a command therefore computes only the missing runs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import active_children, connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.batch import VectorsOf
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.names import name_scores
from al_pipeline.active_learning.relabeling import Relabel
from al_pipeline.active_learning.strategies import Samples
from al_pipeline.data.catalog import draw_test, drawn_size
from al_pipeline.errors import AlError
from al_pipeline.evaluation.metrics import evaluate
from al_pipeline.features.tfidf import fit as fit_tfidf
from al_pipeline.files import read_json, write_json
from al_pipeline.models.ensembles import draw_heads, sample_proba
from al_pipeline.models.estimators import HEAD, Estimate, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix, row_products
from al_pipeline.models.held_out import tempered_held_out_proba
from al_pipeline.models.linear import Head
from al_pipeline.params import MAJORITY, Labels, PluginName
from al_pipeline.records import RANDOM
from al_pipeline.simulation.annotators import Team, TeamLabels, draw_answers, nearest_classes
from al_pipeline.simulation.corpus import LabeledTexts
from al_pipeline.simulation.finish import finished
from al_pipeline.simulation.live import LIVE, LiveWork, live_features, replay_live
from al_pipeline.simulation.replay import Corpus, Curve, Indices, Predict, replay
from al_pipeline.threads import one_thread
from al_pipeline.workspace.fingerprint import STAGE_ENVIRONMENT

FULL = "all labels"
"""The run that trains on the whole pool: the reference for all others."""
WITHOUT = ", without names"
"""The end of the name of a strategy's run that does not use the names of the classes."""
OVERLAP = ", overlap "
"""Before the number of people who answer each item, in the name of a strategy's run with several."""
AGAIN = ", relabel "
"""Before the share of labels that are asked again at most, in the name of a strategy's run that asks some again."""
METRICS = ("macro_f1", "average_precision", "accuracy")
_ROUND_COST = 150
"""Fixed cost of a round, in labels, for the estimate of the remaining time."""
_LOOK_SECONDS = 0.2

Run = tuple[str, int]
"""A strategy (or FULL) and a seed."""
OnProgress = Callable[[int], None]
"""Callback for work done, in labels trained on."""


@dataclass(frozen=True)
class Work:
    """The inputs of all runs. In `config` each run sets its own strategy and seed."""

    texts: LabeledTexts
    dense: NDArray[np.float32] | None
    """The encoder's vectors (n, d)."""
    uses_tfidf: bool
    calibrate: bool
    config: QueryConfig
    rounds: int
    test_size: int
    guide: Mapping[str, NDArray[np.float32] | None] = field(default_factory=dict)
    """The vectors of the words and texts in `config.guide`, by class; None without an encoder."""
    classifier: str = HEAD
    """The head, or one of `ESTIMATORS`."""
    plugins: tuple[PluginName, ...] = ()
    """Models and strategies that are not al-pipeline's own."""
    root: Path = Path()
    """The workspace in which plug-ins are looked for."""

    def use_plugins(self) -> None:
        """Let this process use them."""
        if self.plugins:
            from al_pipeline.plugins.use import use

            use(self.plugins, self.root)

    prototypes: NDArray[np.float32] | None = None
    """The prototypes of the classes (C, d), if the runs may use their names."""
    names_train: bool = False
    """Whether the model uses the names; `config.names` says whether the search for rare classes does."""
    team: Team | None = None
    """The annotators; None: an answer is always right."""
    labels: Labels = MAJORITY
    """How their answers become labels."""
    live: LiveWork | None = None
    """How questions are asked in the live runs, if there are any."""
    finish: float | None = None
    """The error rate at which the model may label the rest at the end of each run; None: that is not simulated."""


@dataclass(frozen=True)
class Prepared:
    """The split of one seed: the corpus with its pool and test set, and the features."""

    corpus: Corpus
    matrix: FeatureMatrix
    guide: Mapping[str, NDArray[np.float64]]
    """For a class, the similarity of each text (n,) to its guide."""
    named: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """For a class, the `name_scores` of each text (n,), if the search uses the names."""
    given: Indices | None = None
    """(n, N) the class that each annotator gives to each text, if there is a team."""


def prepare(work: Work, seed: int) -> Prepared:
    """The split that a workspace with this seed would draw, and its features."""
    items = work.texts.items
    count = drawn_size(work.test_size, len(items))
    drawn = draw_test((bytes.fromhex(item.content_hash) for item in items), count, seed)
    is_test = np.array([bytes.fromhex(item.content_hash) in drawn for item in items])
    pool, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    corpus = Corpus([item.item_id for item in items], work.texts.truth, pool, test, work.texts.classes)
    tfidf = fit_tfidf(items[p].text for p in pool) if work.uses_tfidf else None
    sparse, components = (
        (None, None) if tfidf is None else (tfidf.transform([item.text for item in items]), tfidf.components)
    )
    matrix = FeatureMatrix(work.dense, sparse, components)
    guide = {}
    for name, texts in work.config.guide.items():
        others = FeatureMatrix(work.guide[name], None if tfidf is None else tfidf.transform(texts))
        guide[name] = matrix.likeness(others).max(axis=1)
    return Prepared(corpus, matrix, guide, _named(work, pool), _given(work, matrix, seed))


def _given(work: Work, matrix: FeatureMatrix, seed: int) -> Indices | None:
    if work.team is None:
        return None
    truth, classes = work.texts.truth, len(work.texts.classes)
    nearest = nearest_classes(matrix, truth, classes) if work.team.kind == "confusable" else None
    return draw_answers(work.team, truth, classes, seed, nearest)


def _named(work: Work, pool: Indices) -> dict[str, NDArray[np.float64]]:
    if not work.config.names or work.dense is None or work.prototypes is None:
        return {}
    cosines = row_products(work.dense, work.prototypes).astype(np.float64)
    scores = name_scores(cosines, cosines[pool].mean(axis=0))
    return {name: scores[:, column] for column, name in enumerate(work.texts.classes) if name not in work.config.guide}


def simulate_run(
    work: Work,
    prepared: Prepared,
    strategy: str,
    seed: int,
    on_progress: OnProgress | None = None,
    at_end: Callable[[Predict, Indices], None] | None = None,
) -> Curve:
    """One strategy's learning curve. In the random arm, the baseline, the seed round is random too, without a guide.

    Neither it nor a strategy ending in WITHOUT uses the names of the classes. One ending in LIVE asks live. Several
    people answer each item if the name contains OVERLAP, in batches of as many answers as others have; labels are asked
    again if it contains AGAIN. `at_end` gets the last model and the positions of the labelled items.
    """
    vectors = None if work.dense is None else _vectors_of(prepared.corpus, work.dense)
    strategy, overlap, relabel = parse_arm(strategy)
    is_live, strategy = strategy.endswith(LIVE), strategy.removesuffix(LIVE)
    without = strategy.endswith(WITHOUT) or strategy == RANDOM
    strategy = strategy.removesuffix(WITHOUT)
    size, batch = (max(1, number // overlap) for number in (work.config.seed_size, work.config.batch_size))
    config = replace(work.config, strategy=strategy, seed=seed, seed_size=size, batch_size=batch, relabel=relabel)
    guide, labeling = prepared.guide, _labeling(work, prepared, overlap, bool(relabel), seed)
    if strategy == RANDOM:
        config, guide = replace(config, cold_start=RANDOM), {}
    if without:
        work = replace(work, names_train=False)

    newest: list[Head | Estimate] = []
    last: list[Indices] = []

    def fit(labeled: Indices) -> Predict:
        last[:] = [labeled]
        newest[:] = [_fit(work, prepared, labeled, labels_of(labeled), seed, work.calibrate)]
        return _predict(prepared, newest[0])

    def labels_of(positions: Indices) -> list[str]:
        corpus = prepared.corpus
        if labeling is None:
            return _labels(corpus, positions)
        return [labeling.labels[corpus.item_ids[int(place)]] for place in positions]

    def held_out(labeled: Indices) -> NDArray[np.float64] | None:
        rows, classes = prepared.matrix.rows(labeled), prepared.corpus.classes
        prototypes = work.prototypes if work.names_train else None
        return tempered_held_out_proba(rows, labels_of(labeled), classes, seed, work.classifier, prototypes)

    def draw(kind: Samples, labeled: Indices, from_seed: SeedSequence) -> Predict:
        heads = draw_heads(kind, newest[0], prepared.matrix.rows(labeled), labels_of(labeled), from_seed)
        return lambda positions: sample_proba(heads, prepared.matrix.rows(positions))

    def count(labels: int) -> None:
        if on_progress:
            on_progress(labels + _ROUND_COST)

    positive = work.texts.positive
    replayed = partial(
        replay,
        prepared.corpus,
        config,
        fit=fit,
        vectors=vectors,
        positive=positive,
        on_progress=count,
        guide=guide,
        draw=draw,
        named={} if without else prepared.named,
        labeling=labeling,
        held_out=held_out,
    )
    if is_live:
        assert work.live is not None
        curve = replay_live(
            prepared.corpus,
            config,
            work.rounds,
            fit,
            live_features(prepared.matrix, prepared.corpus.pool),
            work.live,
            partial(replayed, rounds=0),
            positive=positive,
            on_progress=count,
        )
    else:
        curve = replayed(rounds=work.rounds)
    if at_end is not None:
        at_end(_predict(prepared, newest[0]), last[0])
    return curve


def parse_arm(name: str) -> tuple[str, int, Relabel]:
    """The strategy of a run's name, the people who answer each item, and the share of labels asked again at most."""
    strategy, _, share = name.partition(AGAIN)
    strategy, _, overlap = strategy.partition(OVERLAP)
    return strategy, int(overlap or 1), "auto" if share == "auto" else float(share or 0)


def _labeling(work: Work, prepared: Prepared, overlap: int, relabels: bool, seed: int) -> TeamLabels | None:
    if prepared.given is None:
        return None
    corpus = prepared.corpus
    given = {
        corpus.item_ids[place]: [corpus.classes[one] for one in prepared.given[place].tolist()]
        for place in corpus.pool.tolist()
    }
    return TeamLabels(given, corpus.classes, overlap, relabels, seed, work.labels)


def full_score(work: Work, prepared: Prepared, seed: int) -> dict[str, float | None]:
    """The metrics of a model trained on all labels of the pool, calibrated as in the other runs."""
    corpus = prepared.corpus
    work = replace(work, names_train=False)
    predict = _predict(prepared, _fit(work, prepared, corpus.pool, _labels(corpus, corpus.pool), seed, work.calibrate))
    rng = np.random.default_rng(seed)
    truth = corpus.truth[corpus.test]
    return _figures(evaluate(predict(corpus.test), truth, corpus.classes, rng, 0, positive=work.texts.positive))


def _fit(
    work: Work, prepared: Prepared, labeled: Indices, labels: Sequence[str], seed: int, calibrate: bool
) -> Head | Estimate:
    rows = prepared.matrix.rows(labeled)
    prototypes = work.prototypes if work.names_train else None
    return fit_classifier(work.classifier, rows, labels, prepared.corpus.classes, seed, calibrate, prototypes)


def _labels(corpus: Corpus, positions: Indices) -> list[str]:
    return [corpus.classes[int(c)] for c in corpus.truth[positions]]


def _predict(prepared: Prepared, head: Head | Estimate) -> Predict:
    return lambda positions: head.predict_proba(prepared.matrix.rows(positions))


def _vectors_of(corpus: Corpus, dense: NDArray[np.float32]) -> VectorsOf:
    row = {item_id: number for number, item_id in enumerate(corpus.item_ids)}
    return lambda ids: dense[[row[item_id] for item_id in ids]]


def _figures(metrics: Any) -> dict[str, float | None]:
    return {name: getattr(metrics, name).value for name in METRICS}


# What is kept -------------------------------------------------------------------------------------------------------
def run_file(folder: Path, run: Run) -> Path:
    """The path of a run's result."""
    return folder / "runs" / f"{run[0].replace(',', '').replace(' ', '-')}-{run[1]}.json"


def read_run(folder: Path, run: Run) -> dict[str, Any] | None:
    """The result of a run; None if it is not finished."""
    found: dict[str, Any] | None = read_json(run_file(folder, run))
    return found


def _do(work: Work, prepared: Prepared, run: Run, folder: Path, on_progress: OnProgress | None) -> None:
    strategy, seed = run
    began = time.perf_counter()
    row: dict[str, Any] = {"strategy": strategy, "seed": seed}
    if strategy == FULL:
        row |= {"labels": len(prepared.corpus.pool), **full_score(work, prepared, seed)}
        if on_progress:
            on_progress(_cost(work, run))
    else:
        ended: list[tuple[Predict, Indices]] = []
        curve = simulate_run(work, prepared, strategy, seed, on_progress, lambda *end: ended.append(end))
        if work.finish is not None:
            row["finish"] = finished(prepared.corpus, *ended[0], work.finish, len(curve.points))
        row["budgets"] = [point.labels if work.team is None else point.answers for point in curve.points]
        if work.team is not None:
            row["labels"], row["right"] = zip(*[(point.labels, point.right) for point in curve.points], strict=True)
            row["again"] = _asked_again(curve)
        row["choices"] = [point.choice._asdict() for point in curve.points]
        row |= {name: [_figures(point.metrics)[name] for point in curve.points] for name in METRICS}
        row["found"] = _found(prepared.corpus, curve)
        row["asked"] = _asked(prepared.corpus, curve)
    write_json(run_file(folder, run), row | {"seconds": round(time.perf_counter() - began, 2)})


def _asked(corpus: Corpus, curve: Curve) -> list[list[int]]:
    """The places in the corpus of the items that each round asked."""
    place = {item_id: number for number, item_id in enumerate(corpus.item_ids)}
    return [[place[query.item_id] for query in point.queries] for point in curve.points]


def _asked_again(curve: Curve) -> list[int]:
    """The number of tasks of items asked before, after each round."""
    seen: set[str] = set()
    counts = []
    for point in curve.points:
        asked = [query.item_id for query in point.queries]
        counts.append(sum(item_id in seen for item_id in asked))
        seen.update(asked)
    return [int(number) for number in np.cumsum(counts)]


def _found(corpus: Corpus, curve: Curve) -> dict[str, list[int]]:
    """The number of items of each class that were asked, after each round."""
    position = {corpus.item_ids[p]: int(p) for p in corpus.pool}
    seen: set[str] = set()
    new = []
    for point in curve.points:
        items = [query.item_id for query in point.queries if query.item_id not in seen]
        new.append(np.array([corpus.truth[position[item_id]] for item_id in items], np.intp))
        seen.update(items)
    counts = np.cumsum([np.bincount(classes, minlength=len(corpus.classes)) for classes in new], axis=0)
    return {name: counts[:, column].tolist() for column, name in enumerate(corpus.classes)}


# Parallel runs ------------------------------------------------------------------------------------------------------
def run_all(
    work: Work,
    runs: Sequence[Run],
    folder: Path,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute those of `runs` that `folder` lacks; return their number. `progress` gets the work done and the total.

    With one worker they run in this process, else in `workers` processes with one linear algebra thread each. Raises
    AlError if a worker process was killed.
    """
    missing = [run for run in runs if read_run(folder, run) is None]
    total = sum(_cost(work, run) for run in runs)
    meter = _Meter(progress, total - sum(_cost(work, run) for run in missing), total)
    meter.add(0)
    groups = group_runs(missing, workers)
    if not groups:
        return 0
    if workers <= 1:
        with one_thread():
            for group in groups:
                _do_group(work, group, folder, meter.add)
    else:
        _in_processes(work, groups, folder, min(workers, len(groups)), meter)
    return len(missing)


def group_runs(runs: Sequence[Run], workers: int) -> list[list[Run]]:
    """Groups of runs that share a seed and so its split; at least `workers` groups, if possible."""
    seeds = dict.fromkeys(seed for _, seed in runs)
    parts = -(-workers // len(seeds)) if seeds else 1
    groups = []
    for seed in seeds:
        own = [run for run in runs if run[1] == seed]
        groups += [own[part::parts] for part in range(min(parts, len(own)))]
    return groups


def _cost(work: Work, run: Run) -> int:
    if run[0] == FULL:
        return len(work.texts.items)
    sizes = [work.config.seed_size + number * work.config.batch_size for number in range(work.rounds + 1)]
    return sum(size + _ROUND_COST for size in sizes)


@dataclass
class _Meter:
    progress: Callable[[int, int], None] | None
    done: int
    total: int

    def add(self, labels: int) -> None:
        self.done += labels
        if self.progress:
            self.progress(min(self.done, self.total), self.total)


def _do_group(work: Work, group: Sequence[Run], folder: Path, on_progress: OnProgress | None) -> None:
    prepared = prepare(work, group[0][1])
    for run in group:
        _do(work, prepared, run, folder, on_progress)


def _in_processes(work: Work, groups: Sequence[Sequence[Run]], folder: Path, workers: int, meter: _Meter) -> None:
    context = get_context("spawn")
    queue = context.SimpleQueue()
    others = set(active_children())
    with _environment(STAGE_ENVIRONMENT):
        pool = ProcessPoolExecutor(workers, context, _begin, (work, folder, queue))
        try:
            open_: set[Future[None]] = {pool.submit(_in_worker, list(group)) for group in groups}
            while open_:
                ended, open_ = wait(open_, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    meter.add(queue.get())
                for future in ended:
                    future.result()
        except BrokenProcessPool:
            raise AlError(
                "a worker process of the simulation was killed, possibly because memory ran out; finished runs are "
                "kept: the same command with --workers 1 continues from there"
            ) from None
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes started within the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Worker:
    """Arguments of a worker process."""

    work: Work
    folder: Path
    queue: Any


def _begin(work: Work, folder: Path, queue: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent process ends its workers
    _Worker.work, _Worker.folder, _Worker.queue = work, folder, queue
    work.use_plugins()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _in_worker(group: list[Run]) -> None:
    with one_thread():
        _do_group(_Worker.work, group, _Worker.folder, _Worker.queue.put)
