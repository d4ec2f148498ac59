"""What `select.cost: seconds` saves in seconds at equal accuracy, and how often a forecast's interval holds the score.

    python -m benchmarks.cost --data FOLDER [--only REGEX] [--seeds N]

Writes benchmarks/results/cost.json. FOLDER is that of `benchmarks/names.py`; finished runs are stored in it.

**Seconds.** The corpora have no answer times, so they are simulated, by two models that differ in how much a longer
text costs: `reads`: 2 s and 1 s for each 25 characters; `skims`: 2 s and 0.3 s times the root of the characters. Both
times a log-normal factor (sigma 0.5) for the answer and one (sigma 0.3) for its annotator, of five. As in the product,
the seconds are predicted by `fit_seconds` from the answers so far, and the scores of the shortlist are divided by them.
Texts longer than 20,000 characters count as that long: nobody reads on.

An arm ends at BUDGET labels; the one that saves seconds goes on until it has spent as many seconds. Compared are the
seconds at which the mean curves reach a share of the score with all labels, with intervals from resampled seeds.

**Forecasts.** Each history (corpus, arm, seed) is forecast round by round from its third score on, with the whole test
set and with one that grows by 40 items a round up to 500, as in a workspace.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import f1_score

from al_pipeline.active_learning.acquisition import margin
from al_pipeline.active_learning.batch import next_batch
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.shortlist import Shortlist, top_candidates
from al_pipeline.costs.forecast import LEAST_ROUNDS, forecast
from al_pipeline.costs.seconds import fit_seconds, predict
from al_pipeline.evaluation.savings import compare, over_seconds
from al_pipeline.files import read_json, write_json
from al_pipeline.records import RANDOM, content_hash
from al_pipeline.threads import one_thread
from benchmarks.corpora import READERS
from benchmarks.names import LIMIT, Texts, _clean
from benchmarks.rare import Gram, Kind, Task, make_task
from benchmarks.record import record

Floats = NDArray[np.float64]

CORPORA = ("spamassassin2", "bbc_news", "debian_sections", "review_sentences2")
STRATEGIES = ("margin", "herding")
BATCH, BUDGET, MOST_LABELS = 40, 600, 1200
SEEDS = 10
SLOW = {"debian_sections": 5}
"""Seeds of a corpus whose runs take long: it has twenty classes."""
LONGEST = 20_000
PEOPLE = 5
SHARES = (90, 95, 98)
MODELS = ("reads", "skims")


def answer_seconds(model: str, characters: Floats, seed: int) -> tuple[Floats, NDArray[np.intp]]:
    """The time of an answer to each text (n,), and who gives it (n,)."""
    rng = np.random.default_rng([seed, 0x5EC0])
    people = rng.integers(0, PEOPLE, len(characters))
    pace = rng.normal(0, 0.3, PEOPLE)[people]
    length = np.minimum(characters, LONGEST)
    plain = 2 + (length / 25 if model == "reads" else 0.3 * np.sqrt(length))
    return plain * np.exp(rng.normal(0, 0.5, len(characters)) + pace), people


def score(task: Task, proba: Floats, test: NDArray[np.intp]) -> float:
    """Macro-F1 on test items."""
    return float(f1_score(task.truth[test], proba[test].argmax(axis=1), average="macro", zero_division=0))


def play(
    task: Task,
    gram: Gram,
    vectors: NDArray[np.float32],
    strategy: str,
    seed: int,
    characters: Floats,
    model: str | None,
) -> dict[str, list[Any]]:
    """One run: labels asked, by round, and the scores on the whole test set and on one that grows.

    `model`: of the times, by which scores are divided; None: they are not.
    """
    row = {task.ids[position]: int(position) for position in task.pool}
    names, asked = {position: item for item, position in row.items()}, list[int]()
    labeled: dict[str, str] = {}
    curve, growing, sizes = list[float](), list[float](), list[int]()
    seconds, people = answer_seconds(model or MODELS[0], characters, seed)
    limit = None if model is None else _spent_by_items(task, gram, vectors, strategy, seed, characters, seconds)
    proba: Floats | None = None
    while len(labeled) < (BUDGET if limit is None else MOST_LABELS) and len(labeled) < len(row):
        if limit is not None and seconds[asked].sum() >= limit:
            break
        unlabeled = [item_id for item_id in row if item_id not in labeled]
        config = QueryConfig(seed, BATCH, strategy, BATCH, 0.1, 1000)
        shortlist = None
        if proba is not None:
            own = proba[[row[item_id] for item_id in unlabeled]]
            scores = margin(own)
            best = top_candidates(unlabeled, scores, config.shortlist, BATCH, seed)
            shortlist = Shortlist([unlabeled[place] for place in best], scores[best], own[best])
            if model is not None:
                fitted = fit_seconds(
                    seconds[asked].tolist(),
                    characters[asked].astype(int).tolist(),
                    [labeled[names[position]] for position in asked],
                    [str(people[position]) for position in asked],
                )
                if fitted is not None:
                    lengths = characters[[row[item] for item in shortlist.ids]]
                    shortlist = shortlist.per_second(predict(fitted.cost, lengths, shortlist.proba, task.classes))
        queries, _ = next_batch(
            config, len(curve), unlabeled, shortlist, labeled, task.classes, lambda ids: vectors[[row[i] for i in ids]]
        )
        labeled |= {query.item_id: task.classes[task.truth[row[query.item_id]]] for query in queries}
        asked += [row[query.item_id] for query in queries]
        ids = sorted(labeled)
        proba = gram.proba(np.array([row[i] for i in ids]), [labeled[i] for i in ids], task.classes)
        curve.append(score(task, proba, task.test))
        growing.append(score(task, proba, task.test[: min(500, 40 * (len(curve) + 1))]))
        sizes.append(len(labeled))
    return {"asked": asked, "labels": sizes, "scores": curve, "growing": growing}


_ITEMS: dict[tuple[str, int], dict[str, list[Any]]] = {}
"""The runs that count items, by strategy and seed, of the present corpus."""


def _spent_by_items(
    task: Task, gram: Gram, vectors: Any, strategy: str, seed: int, characters: Floats, seconds: Floats
) -> float:
    """The seconds that the arm that counts items has spent at its end."""
    return float(seconds[_ITEMS[strategy, seed]["asked"]].sum())


def play_corpus(name: str, data: Path, seeds: int) -> dict[str, Any]:
    """All runs of a corpus: by arm and seed, and what the tasks are."""
    corpus = Texts(name, data)
    gram, kind = Gram(corpus), Kind("all")
    characters = lengths(name, data)
    runs: dict[tuple[str, str, int], dict[str, list[Any]]] = {}
    full = []
    _ITEMS.clear()
    for seed in range(seeds):
        task = make_task(corpus, kind, seed)
        full.append(_stored(data / f"cost/{name}/full-{seed}.json", lambda task=task: _full(task, gram)))
        for strategy in (RANDOM, *STRATEGIES):
            for model in (None,) if strategy == RANDOM else (None, *MODELS):
                path = data / f"cost/{name}/{strategy}-{model or 'items'}-{seed}.json"
                found = _stored(
                    path,
                    lambda task=task, strategy=strategy, seed=seed, model=model: play(
                        task, gram, corpus.dense, strategy, seed, characters, model
                    ),
                )
                runs[strategy, model or "items", seed] = found
                if model is None:
                    _ITEMS[strategy, seed] = found
    tests = len(make_task(corpus, kind, 0).test)
    return {"runs": runs, "full": full, "characters": characters, "tests": tests, "texts": len(corpus.ids)}


def lengths(name: str, data: Path) -> Floats:
    """The characters of each text of a corpus (n,), in the order of `Texts`."""
    by_digest = {content_hash(text): text for text, _ in map(_clean, READERS[name][0](data)) if text}
    return np.array([len(by_digest[digest]) for digest in sorted(by_digest)[:LIMIT]], dtype=np.float64)


def _full(task: Task, gram: Gram) -> float:
    labels = [task.classes[label] for label in task.truth[task.pool]]
    return score(task, gram.proba(task.pool, labels, task.classes), task.test)


def _stored(path: Path, compute: Any) -> Any:
    if (stored := read_json(path)) is None:
        with one_thread():
            stored = compute()
        write_json(path, stored)
    return stored


def savings(found: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """By model of the times and strategy: seconds needed by items, by seconds and at random, and what is saved."""
    told: dict[str, Any] = {}
    for model in MODELS:
        times = [answer_seconds(model, found["characters"], seed)[0] for seed in range(seeds)]
        for strategy in STRATEGIES:
            arms = {RANDOM: (RANDOM, "items"), "items": (strategy, "items"), "seconds": (strategy, model)}
            curves, spent = {}, {}
            for arm, key in arms.items():
                runs = [found["runs"][*key, seed] for seed in range(seeds)]
                curves[arm] = [np.array(run["scores"]) for run in runs]
                spent[arm] = [
                    np.array([time[run["asked"][:size]].sum() for size in run["labels"]])
                    for run, time in zip(runs, times, strict=True)
                ]
            grid, tables = over_seconds(curves, spent)
            full = np.array(found["full"])
            rng = np.random.default_rng(0)
            spans, pair = grid.round().astype(int).tolist(), {RANDOM: tables["items"], "seconds": tables["seconds"]}
            against = compare(spans, pair, full, rng, shares=SHARES)
            chance = compare(spans, tables, full, rng, shares=SHARES)
            told[f"{model}, {strategy}"] = {
                "hours": [round(float(grid[0]) / 3600, 2), round(float(grid[-1]) / 3600, 2)],
                "labels_at_the_end": {
                    arm: float(np.mean([found["runs"][*key, seed]["labels"][-1] for seed in range(seeds)]))
                    for arm, key in arms.items()
                },
                "area_gain": _interval(against.arms["seconds"].gain),
                "hours_needed": {
                    arm: {str(share): _hours(chance.arms[arm].savings[share].labels) for share in SHARES}
                    for arm in arms
                },
                "items_over_seconds": {
                    str(share): _interval(against.arms["seconds"].savings[share].saving) for share in SHARES
                },
                "random_over_seconds": {
                    str(share): _interval(chance.arms["seconds"].savings[share].saving) for share in SHARES
                },
            }
    return told


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds / 3600, 3)


def _interval(one: Any) -> list[float | None]:
    return [None if value is None else round(value, 4) for value in (one.value, one.low, one.high)]


def coverage(found: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """How often the next score lies in the interval of its forecast, by size of the test set."""
    told = {}
    for kind, tests in (("scores", found["tests"]), ("growing", 500)):
        inside: dict[float, list[bool]] = {0.95: [], 0.8: []}
        errors, widths = [], []
        for strategy in (RANDOM, *STRATEGIES):
            for seed in range(seeds):
                run = found["runs"][strategy, "items", seed]
                for rounds in range(LEAST_ROUNDS, len(run[kind])):
                    now = run[kind][rounds - 1]
                    size = tests if kind == "scores" else min(tests, 40 * (rounds + 1))
                    noise = float(np.sqrt(max(now * (1 - now), 0.01) / size))
                    for confidence, held in inside.items():
                        one = forecast(run["labels"][:rounds], run[kind][:rounds], BATCH, noise, confidence)
                        assert one is not None
                        held.append(one.low <= run[kind][rounds] <= one.high)
                        if confidence == 0.95:
                            errors.append(one.value - run[kind][rounds])
                            widths.append(one.high - one.low)
        told["whole test set" if kind == "scores" else "growing test set"] = {
            "forecasts": len(errors),
            "coverage": {str(confidence): round(float(np.mean(held)), 3) for confidence, held in inside.items()},
            "bias": round(float(np.mean(errors)), 4),
            "absolute_error": round(float(np.mean(np.abs(errors))), 4),
            "median_width": round(float(np.median(widths)), 4),
        }
    return told


def show(name: str, told: Mapping[str, Any]) -> None:
    """Print the figures of a corpus."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"{name}: {told['texts']} texts, characters {told['characters']}")
    for key, row in told["savings"].items():
        console.print(f"  {key:16} items/seconds {row['items_over_seconds']}  area {row['area_gain']}")
    for key, row in told["forecasts"].items():
        console.print(f"  {key}: {row}")


def main() -> None:
    """Run what is missing, print it, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="corpora whose name matches this; writes no record")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    told: dict[str, Any] = {}
    for name in CORPORA:
        if not re.search(options.only, name):
            continue
        seeds = min(options.seeds, SLOW.get(name, options.seeds))
        found = play_corpus(name, options.data, seeds)
        quantiles: Sequence[float] = np.quantile(found["characters"], [0.1, 0.5, 0.9]).tolist()
        told[name] = {
            "texts": found["texts"],
            "characters": [round(one) for one in quantiles],
            "seeds": seeds,
            "savings": savings(found, seeds),
            "forecasts": coverage(found, seeds),
        }
        show(name, told[name])
    if not options.only:
        record(
            "cost", {"seeds": options.seeds, "budget": BUDGET, "batch": BATCH, "shares": list(SHARES), "corpora": told}
        )


if __name__ == "__main__":
    sys.exit(main())
