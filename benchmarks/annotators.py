"""Who is named among simulated annotators: how often somebody who answers at random is, and how often colleagues are.

    python -m benchmarks.annotators      writes benchmarks/results/annotators.json

Accuracies of colleagues are drawn evenly from a range, their errors fall equally on the other classes. `answers`: those
of each annotator, to items that two others or more answer too. `possible`: what the best rule names that knows the team
as a whole, see `limits`. Also: time and memory of `assess` for 100,000 answers.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.quality.answers import Given, Votes
from al_pipeline.quality.assessment import assess
from al_pipeline.quality.suspicion import who_stands_out
from benchmarks.record import record

TEAMS = [
    *(
        {"people": people, "classes": classes, "overlap": 3, "answers": 30}
        for classes in (2, 3, 5)
        for people in (6, 20)
    ),
    {"people": 20, "classes": 2, "overlap": 3, "answers": 60},
    {"people": 20, "classes": 2, "overlap": 5, "answers": 30},
    {"people": 20, "classes": 2, "overlap": 3, "answers": 30, "shares": [0.8, 0.2]},
    {"people": 20, "classes": 2, "overlap": 3, "answers": 200, "weakest": 0.7},
    {"people": 20, "classes": 5, "overlap": 3, "answers": 200},
]
COLLEAGUES = 6000
"""Simulated colleagues of each team, at least."""
WEAKEST, BEST = 0.8, 0.97


def main() -> None:
    """Measure and write the record."""
    random = [{**size, **at_random(**size), **limits(**size)} for size in TEAMS]
    confusing = [{"answers": answers, **confusers(answers)} for answers in (30, 60, 150)]
    speed = [hundred_thousand(classes) for classes in (2, 20, 200)]
    print(json.dumps([random, confusing, speed], indent=1))  # noqa: T201
    record("annotators", {"random": random, "confusing": confusing, "hundred_thousand": speed})


def simulate(
    accuracy: Sequence[float],
    classes: int = 2,
    items: int = 200,
    overlap: int = 3,
    seed: int = 0,
    shares: Sequence[float] | None = None,
    random: Sequence[int] = (),
    confusing: Sequence[tuple[int, int, int]] = (),
) -> tuple[Votes, NDArray[np.int64]]:
    """Answers, and the true classes. `random`: who answers at random; `confusing`: who, and which two classes."""
    draw = np.random.default_rng(seed)
    truth = draw.choice(classes, items, p=shares)
    who = np.sort(np.argsort(draw.random((items, len(accuracy))), axis=1)[:, :overlap], axis=1).ravel()
    item = np.repeat(np.arange(items), overlap)
    right = draw.random(len(item)) < np.asarray(accuracy)[who]
    label = np.where(right, truth[item], (truth[item] + draw.integers(1, max(2, classes), len(item))) % classes)
    label = np.where(np.isin(who, random), draw.integers(0, classes, len(item)), label)
    for person, first, second in confusing:
        either = (who == person) & np.isin(truth[item], (first, second)) & np.isin(label, (first, second))
        label = np.where(either, draw.choice([first, second], len(item)), label)
    people = tuple(f"p{number:03d}" for number in range(len(accuracy)))
    names = tuple(f"c{number:03d}" for number in range(classes))
    return Votes(item, who, label, np.zeros_like(item), np.full(len(item), np.nan), people, names, None), truth


def at_random(
    people: int,
    classes: int,
    overlap: int,
    answers: int,
    weakest: float = WEAKEST,
    shares: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The share of teams in which the first person, who answers at random, is named, and that of named colleagues."""
    runs = -(-COLLEAGUES // (people - 1))
    found = wrong = 0
    for seed in range(runs):
        accuracy = np.random.default_rng(seed).uniform(weakest, BEST, people).tolist()
        given, _ = simulate(accuracy, classes, answers * people // overlap, overlap, seed, shares, random=[0])
        standing = who_stands_out(given)
        found += 0 in {one.annotator for one in standing.guesses}
        wrong += len({one.annotator for one in (*standing.guesses, *standing.confuses)} - {0})
    return {"teams": runs, "named": round(found / runs, 3), "colleagues_named": round(wrong / runs / (people - 1), 4)}


def limits(
    classes: int,
    overlap: int,
    answers: int,
    weakest: float = WEAKEST,
    shares: Sequence[float] | None = None,
    runs: int = 10_000,
    **_: Any,
) -> dict[str, Any]:
    """How often any rule can name somebody who answers at random, if at most 1 % of colleagues may be named.

    The most powerful test is that of the likelihood ratio (Neyman & Pearson 1933). It knows the shares of the classes,
    that guesses fall equally on them, and the range of accuracies; it sees the others' answers, `possible`, or even the
    true classes, `possible_knowing_the_truth`. The product's rule knows none of these.
    """
    draw = np.random.default_rng(0)
    accuracies = np.linspace(weakest, BEST, 18)
    priors = np.full(classes, 1 / classes) if shares is None else np.array(shares)
    truth = draw.choice(classes, (2, runs, answers), p=priors)
    right = np.arange(classes) == truth[..., None]
    mean = accuracies.mean()
    told = np.log(priors) + np.zeros(right.shape)
    for _person in range(overlap - 1):
        label = _answered(truth, draw.uniform(weakest, BEST, truth.shape), classes, draw)
        told += np.where(np.arange(classes) == label[..., None], np.log(mean), np.log((1 - mean) / (classes - 1)))
    told = np.exp(told - told.max(axis=-1, keepdims=True))
    colleague = _answered(truth[0], draw.uniform(weakest, BEST, (runs, 1)), classes, draw)
    mine = np.stack([colleague, draw.integers(0, classes, (runs, answers))])[..., None]
    possible = []
    for known in (told / told.sum(axis=-1, keepdims=True), right.astype(float)):
        certain = np.take_along_axis(known, mine, -1)[..., 0]
        logs = np.stack(
            [np.log(one * certain + (1 - one) / (classes - 1) * (1 - certain)).sum(axis=-1) for one in accuracies]
        )
        highest = logs.max(axis=0)
        honest, guessing = -(highest + np.log(np.exp(logs - highest).mean(axis=0)))
        bound = np.quantile(honest, 0.99)
        # Where ratios are equal to the bound, a part of them is named, so that 1 % of the colleagues are.
        above, equal = (honest > bound + 1e-9).mean(), (np.abs(honest - bound) <= 1e-9).mean()
        part = min(1.0, max(0.0, (0.01 - above) / equal)) if equal else 0.0
        possible.append((guessing > bound + 1e-9).mean() + part * (np.abs(guessing - bound) <= 1e-9).mean())
    return {
        "possible": round(float(possible[0]), 3),
        "possible_knowing_the_truth": round(float(possible[1]), 3),
    }


def _answered(
    truth: NDArray[np.int64], accuracy: NDArray[np.float64], classes: int, draw: np.random.Generator
) -> NDArray[np.int64]:
    wrong = (truth + draw.integers(1, classes, truth.shape)) % classes
    return np.where(draw.random(truth.shape) < accuracy, truth, wrong)


def confusers(answers: int, runs: int = 200) -> dict[str, Any]:
    """Of eight people with four classes the first answers two of them at random: what is said of whom."""
    right = guesses = wrong = 0
    for seed in range(runs):
        accuracy = np.random.default_rng(seed).uniform(WEAKEST, BEST, 8).tolist()
        given, _ = simulate(accuracy, 4, answers * 8 // 3, 3, seed, confusing=[(0, 1, 2)])
        standing = who_stands_out(given)
        right += (0, 1, 2) in {(one.annotator, one.first, one.second) for one in standing.confuses}
        guesses += 0 in {one.annotator for one in standing.guesses}
        wrong += len({one.annotator for one in (*standing.guesses, *standing.confuses)} - {0})
    return {"named": right / runs, "called_careless": guesses / runs, "colleagues_named": round(wrong / runs / 7, 4)}


def hundred_thousand(classes: int) -> dict[str, Any]:
    """Processor seconds of `assess` for 20 annotators, three of whom answer each item, in ten rounds; peak memory."""
    accuracy = np.linspace(WEAKEST, BEST, 20).tolist()
    given, _ = simulate(accuracy, classes, 33_334, random=[0], confusing=[(1, 0, 1)])
    rows = zip(given.item.tolist(), given.annotator.tolist(), given.label.tolist(), strict=True)
    answers = [Given(f"i{item}", f"p{who}", f"c{label}", item // 3334, 4.0 + who) for item, who, label in rows]
    before, memory = time.process_time(), peak()
    assess(answers, [f"c{number}" for number in range(classes)])
    seconds = round(time.process_time() - before, 2)
    return {"classes": classes, "answers": len(answers), "seconds": seconds, "mib": round(peak() - memory)}


def peak() -> float:
    """The largest memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
