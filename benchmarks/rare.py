"""Query strategies where one class is rare, and where none is: which of them pay.

    python -m benchmarks.rare --data FOLDER [--part reporting] [--arms NAMES] [--only REGEX]

Writes benchmarks/results/rare.json. FOLDER is that of `benchmarks/names.py`. Finished runs are stored in it, so that an
interrupted benchmark continues.

Each corpus gives several tasks:

- one class against the rest, cut to 1, 2 or 10 % of the pool, by average precision. The cut items are test items too,
  weighted so that the class has the same share in the test set: few positives in the pool, but many in the test set.
  Of banking77 three classes as they are, 1 to 2 % of the pool each;
- all classes as they are, by macro-F1 (average precision of two);
- all classes with sizes that fall geometrically to a twentieth, in an order drawn for each seed, by macro-F1.

The items are those of `benchmarks/names.py`, 30 % of them for the test. Rounds are as in `params.yaml`: 40 items, 4 of
them a random sample, no class planted in the seed round. Selection is the product's (`next_batch`), the model its head,
uncalibrated; it is fitted on Gram matrices of the corpus, computed once, so that a run takes less than a second.

The strategies were developed on DEVELOPMENT and on a corpus of questions that is not distributed in a package.
REPORTING was looked at twice. At the first look a class counted as rare below a quarter of an equal share of the labels
everywhere; that lost 0.010 of the area against `search and clusters` where sizes fall geometrically. Now it does so of
two classes alone, and below a half of more, as before.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray
from rich.console import Console
from scipy.linalg import cholesky, solve_triangular
from sklearn.metrics import average_precision_score, f1_score

from al_pipeline.active_learning.acquisition import margin
from al_pipeline.active_learning.batch import next_batch
from al_pipeline.active_learning.choice import AUTO, QueryConfig
from al_pipeline.active_learning.shortlist import Shortlist, top_candidates
from al_pipeline.active_learning.strategies import (
    RARE,
    STRATEGIES,
    Picked,
    Strategy,
    is_unbalanced,
    likely_of_the_rarest,
)
from al_pipeline.evaluation.savings import area, labels_needed, mean_interval
from al_pipeline.files import read_json, write_json
from al_pipeline.models.feature_matrix import FULL_TFIDF
from al_pipeline.models.linear import STRENGTH
from al_pipeline.models.probabilities import count_classes, over_all_classes, softmax
from al_pipeline.models.softmax import fit_softmax
from al_pipeline.threads import one_thread
from benchmarks.names import Texts
from benchmarks.record import record

DEVELOPMENT = ("spamassassin2", "clinc_domains", "tweets_sentiment3")
REPORTING = ("bbc_news", "debian_sections", "review_sentences2", "banking77")
PARTS = {"development": DEVELOPMENT, "reporting": REPORTING}
SHARES = (0.01, 0.02, 0.1)
RARE_CLASSES = 3
"""The maximum number of classes of a corpus that are cut, the largest first."""
SEEDS = 10
BATCH, BUDGET = 40, 400
TEST_SHARE = 0.3
SMALLEST = 1 / 20
"""The size of the smallest class compared with the largest, where sizes fall geometrically."""
TARGETS = (90, 95, 98)
REFERENCES = ("margin", "search and clusters")
"""The arms that the others are compared with; the second is `auto` as it was before herding."""

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


# The strategies that are compared -----------------------------------------------------------------------------------
class Arm(NamedTuple):
    """The strategies of a run: while a class is rare, while none is, and while all labels are of one class."""

    rare: str
    even: str
    alone: str = AUTO
    part: float = RARE
    """A class with less than this part of an equal share of the labels is rare."""


def pick_search(rest: str) -> Callable[[Shortlist, int, SeedSequence], Picked]:
    """A strategy: half of a batch likely items of the classes with the fewest labels, the other half by `rest`."""

    def pick(view: Shortlist, k: int, seed: SeedSequence) -> Picked:
        picked = likely_of_the_rarest(view, k // 2, seed)
        left = np.setdiff1d(np.arange(len(view.ids)), picked)
        others = left[STRATEGIES[rest].pick(view.rows(left), k - len(picked), seed).positions]
        return Picked(np.array([*picked, *others], dtype=np.intp), np.ones(k))

    return pick


_NEEDS = frozenset({"scores", "proba", "vectors", "labeled", "counts"})
OWN: dict[str, Strategy] = {
    f"search_{rest}": Strategy(pick_search(rest), _NEEDS, "margin") for rest in ("margin", "cluster_margin", "herding")
}
"""Strategies of this benchmark alone."""

ARMS = {
    "random": Arm("random", "random", "random"),
    "margin": Arm("margin", "margin", "margin"),
    "auto": Arm(AUTO, AUTO),
    "search and clusters": Arm("search_cluster_margin", "cluster_margin"),
    "search and margin": Arm("search_margin", "herding"),
    "search and herding": Arm("search_herding", "herding"),
    "margin after core-set": Arm("margin", "margin"),
    "clusters": Arm("cluster_margin", "cluster_margin"),
    "herding": Arm("herding", "herding"),
    "badge": Arm("badge", "badge"),
}
"""All but `random` and `margin` ask as `auto` does while all labels are of one class."""


# A task: a corpus, what is cut, and a seed --------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Task:
    """The pool and the test set of one seed, with the weights of the test items. Of two classes the second is rare."""

    ids: Sequence[str]
    truth: Indices
    classes: Sequence[str]
    pool: Indices
    test: Indices
    weights: Floats


class Kind(NamedTuple):
    """What is made of a corpus: `cut` (one class against the rest), `all` or `uneven`; of a cut its class and share."""

    name: str
    rare: int = -1
    share: float = 0.0

    @property
    def label(self) -> str:
        """Its name in the record."""
        return self.name if self.rare < 0 else f"class {self.rare} at {self.share:g}"

    @property
    def group(self) -> str:
        """The name of the tasks that are averaged with it."""
        return self.name if self.rare < 0 else f"cut to {self.share:g}" if self.share else "rare as it is"


def kinds_of(name: str, truth: Indices) -> list[Kind]:
    """The tasks of a corpus."""
    sizes = np.bincount(truth)
    largest = np.argsort(-sizes, kind="stable")[:RARE_CLASSES]
    if name == "banking77":
        cuts = [Kind("cut", int(rare)) for rare in largest]
    elif name == "spamassassin2":
        cuts = [Kind("cut", 1, share) for share in SHARES]
    else:
        cuts = [Kind("cut", int(rare), share) for share in SHARES for rare in largest]
    return [*cuts, Kind("all"), *([Kind("uneven")] if len(sizes) > 2 and name != "banking77" else [])]


def make_task(corpus: Texts, kind: Kind, seed: int) -> Task:
    """The task of one seed: the split, and the items that remain in the pool."""
    truth, classes = corpus.truth, list(corpus.classes)
    rng = np.random.default_rng([seed, 0x4A4E])
    order = rng.permutation(len(truth))
    tests = round(TEST_SHARE * len(truth))
    test, pool = order[:tests], order[tests:]
    weights = np.ones(len(test))
    if kind.name == "cut":
        truth, classes = (truth == kind.rare).astype(np.intp), ["the rest", "rare"]
        others, few = pool[truth[pool] == 0], pool[truth[pool] == 1]
        kept = max(2, round(len(others) * kind.share / (1 - kind.share))) if kind.share else len(few)
        pool, test = np.concatenate([others, few[:kept]]), np.concatenate([test, few[kept:]])
        positive = truth[test] == 1
        ratio = len(few[:kept]) / len(others)
        weights = np.where(positive, ratio * (~positive).sum() / positive.sum(), 1.0)
    elif kind.name == "uneven":
        sizes = SMALLEST ** (np.arange(len(classes)) / (len(classes) - 1))
        rows = [pool[truth[pool] == label] for label in rng.permutation(len(classes))]
        pool = np.concatenate([some[: max(2, round(len(some) * size))] for some, size in zip(rows, sizes, strict=True)])
    return Task(corpus.ids, truth, classes, np.sort(pool), test, weights)


class Gram:
    """Scalar products of all texts of a corpus, by feature block, (n, n) each."""

    def __init__(self, corpus: Texts) -> None:
        dense, sparse, components = corpus.matrix.dense, corpus.matrix.sparse, corpus.matrix.components
        assert dense is not None and sparse is not None
        self.dense = dense @ dense.T
        terms = (sparse @ sparse.T).toarray()
        if components is not None:
            reduced = np.asarray(sparse @ components.astype(np.float32))
            terms += reduced @ reduced.T
        self.terms = terms.astype(np.float32)

    def proba(self, labeled: Indices, labels: Sequence[str], classes: Sequence[str]) -> Floats:
        """Probabilities (n, C) of all texts by a head fitted on `labeled`, uncalibrated.

        The fit is that of `fit_head` on a kernel: the same features, scales and loss.
        """
        counts, targets = count_classes(labels, classes)
        if len(counts) < 2:
            return over_all_classes(np.ones((len(self.dense), len(counts))), classes, counts)
        dense, terms = self.dense[labeled], self.terms[labeled] * np.float32(min(1.0, len(labeled) / FULL_TFIDF))
        kernel = dense[:, labeled].astype(np.float64) + terms[:, labeled]
        kernel[np.diag_indices(len(kernel))] += 1e-6
        factor = cholesky(kernel, lower=True)
        (weights,), bias = fit_softmax([factor], targets, len(counts), STRENGTH)
        by_row = solve_triangular(factor, weights, lower=True, trans="T").T.astype(np.float32)
        logits = (by_row @ dense + by_row @ terms).T.astype(np.float64) + bias
        return over_all_classes(softmax(logits), classes, counts)


def score(task: Task, proba: Floats) -> float:
    """Average precision of two classes, macro-F1 of more, on the test set."""
    truth, own = task.truth[task.test], proba[task.test]
    if len(task.classes) == 2:
        return float(average_precision_score(truth, own[:, 1], sample_weight=task.weights))
    return float(f1_score(truth, own.argmax(axis=1), average="macro", zero_division=0, sample_weight=task.weights))


def play(task: Task, gram: Gram, vectors: NDArray[np.float32], arm: Arm, seed: int) -> list[float]:
    """The learning curve of one run, a score after each batch."""
    row = {task.ids[position]: int(position) for position in task.pool}
    labeled: dict[str, str] = {}
    curve: list[float] = []
    proba: Floats | None = None
    while len(labeled) < min(BUDGET, len(row)):
        unlabeled = [item_id for item_id in row if item_id not in labeled]
        counts = [sum(label == name for label in labeled.values()) for name in task.classes]
        seen = sum(count > 0 for count in counts)
        name = arm.alone if seen < 2 else arm.rare if is_unbalanced(counts, arm.part) else arm.even
        config = QueryConfig(seed, BATCH, name, BATCH, 0.1, 1000)
        shortlist = None
        if proba is not None:
            own = proba[[row[item_id] for item_id in unlabeled]]
            scores = margin(own)
            best = top_candidates(unlabeled, scores, config.shortlist, BATCH, seed)
            shortlist = Shortlist([unlabeled[place] for place in best], scores[best], own[best])
        queries, _ = next_batch(
            config, len(curve), unlabeled, shortlist, labeled, task.classes, lambda ids: vectors[[row[i] for i in ids]]
        )
        labeled |= {query.item_id: task.classes[task.truth[row[query.item_id]]] for query in queries}
        ids = sorted(labeled)
        proba = gram.proba(np.array([row[i] for i in ids]), [labeled[i] for i in ids], task.classes)
        curve.append(score(task, proba))
    return curve


def full_score(task: Task, gram: Gram) -> float:
    """The score of a model with all labels of the pool."""
    return score(task, gram.proba(task.pool, [task.classes[label] for label in task.truth[task.pool]], task.classes))


# The figures --------------------------------------------------------------------------------------------------------
def play_corpus(name: str, data: Path, arms: Sequence[str], seeds: int) -> dict[Kind, dict[str, Any]]:
    """The curves of each arm, (seeds, budgets), and the mean score with all labels, by task."""
    corpus = Texts(name, data)
    gram = Gram(corpus)
    found: dict[Kind, dict[str, Any]] = {}
    for kind in kinds_of(name, corpus.truth):
        folder = data / "rare" / name / kind.label.replace(" ", "-")
        curves: dict[str, list[list[float]]] = {arm: [] for arm in arms}
        full = []
        for seed in range(seeds):
            task = make_task(corpus, kind, seed)
            full.append(_stored(folder / f"full-{seed}.json", lambda task=task: full_score(task, gram)))
            for arm in arms:
                path = folder / f"{arm.replace(' ', '-')}-{seed}.json"
                run = lambda task=task, arm=arm, seed=seed: play(task, gram, corpus.dense, ARMS[arm], seed)  # noqa: E731
                curves[arm].append(_stored(path, run))
        found[kind] = {"full": float(np.mean(full)), "curves": curves}
    return found


def _stored(path: Path, compute: Callable[[], Any]) -> Any:
    if (stored := read_json(path)) is None:
        with one_thread():
            stored = compute()
        write_json(path, stored)
    return stored


def summary(tasks: Mapping[tuple[str, Kind], Mapping[str, Any]], arms: Sequence[str]) -> dict[str, Any]:
    """For each group of tasks and each arm: mean area, labels needed, and what it gains over the REFERENCES.

    `labels`: geometric mean over tasks of the labels that the mean curve needs for 90, 95 and 98 % of the score with
    all labels; at most the budget counts. Of each reference: `gain`, the mean difference of the areas, paired by seed;
    `over_tasks`, its Student interval over tasks, each the mean of its seeds, which says what to expect of another
    task; `over_runs`, that over all pairs of runs, of these tasks; `more` and `fewer`, the numbers of tasks that need
    over 5 % more or fewer labels.
    """
    found: dict[str, Any] = {}
    for group in dict.fromkeys(kind.group for _, kind in tasks):
        own = [task for (_, kind), task in tasks.items() if kind.group == group]
        found[group] = {"tasks": len(own), "arms": {arm: _row(own, arm, arms) for arm in arms}}
    return found


def _row(tasks: Sequence[Mapping[str, Any]], arm: str, arms: Sequence[str]) -> dict[str, Any]:
    mine, own = _areas(tasks, arm), _needed(tasks, arm)
    row: dict[str, Any] = {
        "area": float(np.mean([areas.mean() for areas in mine])),
        "labels": np.exp(np.log(own).mean(axis=0)).tolist(),
    }
    for other in REFERENCES:
        if other in arms and other != arm:
            gains = [areas - theirs for areas, theirs in zip(mine, _areas(tasks, other), strict=True)]
            ratio = own / _needed(tasks, other)
            row[f"against {other}"] = {
                "gain": float(np.mean([gain.mean() for gain in gains])),
                "over_tasks": _interval(np.array([gain.mean() for gain in gains])),
                "over_runs": _interval(np.concatenate(gains)),
                "more": (ratio > 1.05).sum(axis=0).tolist(),
                "fewer": (ratio < 1 / 1.05).sum(axis=0).tolist(),
            }
    return row


def _budgets(curves: Floats) -> Floats:
    return np.arange(1, curves.shape[1] + 1) * float(BATCH)


def _areas(tasks: Sequence[Mapping[str, Any]], arm: str) -> list[Floats]:
    """For each task the areas of an arm, (seeds,)."""
    curves = [np.array(task["curves"][arm]) for task in tasks]
    return [area(_budgets(own), own) for own in curves]


def _needed(tasks: Sequence[Mapping[str, Any]], arm: str) -> Floats:
    """The labels with which the mean curve of an arm reaches the targets, (tasks, targets); at most the budget."""
    found = []
    for task in tasks:
        curves = np.array(task["curves"][arm])
        mean = np.tile(curves.mean(axis=0), (len(TARGETS), 1))
        found.append(labels_needed(_budgets(curves), mean, np.array(TARGETS) / 100 * task["full"]))
    return np.minimum(np.array(found), BUDGET)


def _interval(values: Floats) -> list[float | None]:
    found = mean_interval(values, 0.95)
    return [found.low, found.high]


def show(title: str, found: Mapping[str, Any]) -> None:
    """Print a summary."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for group, rows in found.items():
        console.print(
            f"{title}, {group}: {rows['tasks']} tasks; area, labels for {TARGETS} %, gains (more, fewer labels)"
        )
        for arm, row in rows["arms"].items():
            cells = [f"{row['area']:.3f}", " ".join(f"{labels:.0f}" for labels in row["labels"])]
            for other in REFERENCES:
                if (gain := row.get(f"against {other}")) is not None:
                    spans = [gain[key] for key in ("over_tasks", "over_runs") if gain[key][0] is not None]
                    told = " ".join(f"[{low:+.3f}, {high:+.3f}]" for low, high in spans)
                    cells.append(f"over {other} {gain['gain']:+.3f} {told} {gain['more']} {gain['fewer']}")
            console.print(f"  {arm:22} {'   '.join(cells)}")


def main() -> None:
    """Run what is missing, print it, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="corpora whose name matches this; writes no record")
    parser.add_argument("--part", choices=[*PARTS, "both"], default="both")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    arms = options.arms.split(",")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"--arms: {unknown[0]!r} is none of {', '.join(ARMS)}")
    STRATEGIES.update(OWN)
    told = {}
    for part, names in PARTS.items():
        tasks = {
            (name, kind): task
            for name in names
            if options.part in (part, "both") and re.search(options.only, name)
            for kind, task in play_corpus(name, options.data, arms, options.seeds).items()
        }
        if tasks:
            told[part] = {"corpora": names, "groups": summary(tasks, arms)}
            show(part, told[part]["groups"])
    if not options.only:
        record("rare", {"seeds": options.seeds, "budget": BUDGET, "batch": BATCH, "targets": TARGETS, **told})


if __name__ == "__main__":
    sys.exit(main())
