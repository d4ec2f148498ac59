"""Labels from few answers: consensus with the model, and adaptive overlap, against the majority of three.

    python -m benchmarks.consensus --data FOLDER [--seeds 4]      writes benchmarks/results/consensus.json

`benchmarks/corpora.py` describes FOLDER; it also has VADER's ratings, in which everybody is a real person:

    pip download --no-deps --no-binary :all: -d FOLDER vaderSentiment==0.5

Rounds are played as a workspace plays them: the model chooses what it is least sure of, and what it said of an item is
noted before anybody answers. All arms label the same items, those that a model trained on the majority of three
chooses; each arm's own model learns from its own labels. Planted people are right as often as an even draw from
PEOPLE says; how they err is the kind of noise. VADER's truth is the class that most of the raters give who are not
among the people. A tie takes the first answer. Intervals are of the mean over seeds.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from al_pipeline.annotation.consensus import METHODS, TIE, Consensus, consensus_of
from al_pipeline.annotation.vote_arrays import VoteArrays
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.linear import Head, fit_head
from al_pipeline.params import ConsensusName
from benchmarks.corpora import READERS, Rows
from benchmarks.head import Corpus, choose_texts, load
from benchmarks.record import record

CORPORA = ("review_sentences2", "tweets_sentiment3", "bbc_news")
CHOICES = ("random", "margin")
"""How the items are chosen: of those that the model is unsure of it can say least."""
REAL = "real raters"
KINDS = ("uniform", "careless person", "confusable")
PLANNED = [("vader", REAL), *((name, kind) for kind in KINDS for name in CORPORA)]
PEOPLE = (0.7, 0.95)
TEAM = 6
ROUNDS, BATCH, SEED_SIZE = 5, 100, 50
MOST = 3
LEVELS = (0.9, 0.95)
"""`labels.min_confidence`."""
VADER_PEOPLE = 6
WEIGHED = ("1 answer", "dawid_skene of 2 and the model", "adaptive 0.9, with the model")
"""Arms on whose labels a classifier is trained, with and without their confidence as weights."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Crowd(NamedTuple):
    """What everybody would answer: `answers` (n, P); `order` (n, P) is who is asked first, second and so on."""

    answers: Indices
    order: Indices
    truth: Indices
    classes: int

    def votes(self, items: Indices, counts: Indices) -> VoteArrays:
        """The votes of the first `counts` people on `items`."""
        row = np.repeat(np.arange(len(items)), counts)
        place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        who = self.order[items[row], place]
        order = np.lexsort((who, row))
        label = self.answers[items[row], who]
        people = self.answers.shape[1]
        return VoteArrays(
            row[order],
            who[order],
            label[order],
            tuple(f"p{n:02d}" for n in range(people)),
            tuple(map(str, range(self.classes))),
        )


Arm = Callable[[Crowd, Indices, Floats], tuple[Indices, Consensus]]
"""From the crowd, the items labelled so far and the forecasts: the numbers of answers, and the consensus."""


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    settings = {"rounds": ROUNDS, "batch": BATCH, "people": PEOPLE, "team": TEAM, "seeds": options.seeds}
    for name, kind in PLANNED:
        rows, tokens = (READERS[name][0](options.data), READERS[name][1]) if kind != REAL else vader(options.data)
        plain = [(text, label.split("|")[0]) for text, label in rows]
        corpus, texts = load(plain, tokens, options.data), choose_texts(plain)[0]
        began = time.process_time()
        people = [crowd(kind, corpus, dict(rows), texts, seed) for seed in range(options.seeds)]
        for choice in CHOICES:
            runs = [play(corpus, one, seed, choice) for seed, one in enumerate(people)]
            found[f"{name}, {kind}, {choice}"] = summary(runs)
        print(f"{name}, {kind}: {time.process_time() - began:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
        record("consensus", {"settings": settings, "found": found})


# Crowds --------------------------------------------------------------------------------------------------------------


def crowd(kind: str, corpus: Corpus, labels: Mapping[str, str], texts: Sequence[str], seed: int) -> Crowd:
    """The people of one run."""
    draw = np.random.default_rng([seed, 20])
    truth = np.array([corpus.classes.index(label) for label in corpus.labels])
    if kind == REAL:
        return real([labels[text].split("|")[1] for text in texts[: len(truth)]], draw)
    classes, size = len(corpus.classes), len(truth)
    accuracy = draw.uniform(*PEOPLE, TEAM)
    if kind == "careless person":
        accuracy[0] = 1 / classes
    answers = np.empty((size, TEAM), np.int64)
    for person in range(TEAM):
        wrong = (truth + draw.integers(1, max(2, classes), size)) % classes
        if kind == "confusable":  # nearly all errors go to one class
            wrong = np.where(draw.random(size) < 0.8, (truth + 1) % classes, wrong)
        answers[:, person] = np.where(draw.random(size) < accuracy[person], truth, wrong)
    return Crowd(answers, np.argsort(draw.random((size, TEAM)), axis=1), truth, classes)


def vader(folder: Path) -> tuple[Rows, int]:
    """Product reviews' sentences, with the class that most raters give, then all raters' classes: `label|ratings`."""
    with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip") as outer:
        name = next(name for name in outer.namelist() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = io.BytesIO(outer.read(name))
    with tarfile.open(fileobj=inner) as files:

        def lines(name: str) -> list[list[str]]:
            file = files.extractfile(f"hutto_ICWSM_2014/amazonReviewSnippets_{name}.txt")
            assert file is not None
            return [line.split("\t") for line in file.read().decode("utf-8-sig", "replace").splitlines()]

        texts = {row[0]: row[2] for row in lines("GroundTruth")}
        ratings = {row[0]: ast.literal_eval(row[3]) for row in lines("anonDataRatings")}
    rows = []
    for item, text in texts.items():
        given = [int(np.sign(one)) + 1 for one in ratings.get(item, ())]
        if len(given) == 20:
            rows.append(
                (
                    text.replace("\0", " ").strip(),
                    f"{np.bincount(given, minlength=3).argmax()}|{''.join(map(str, given))}",
                )
            )
    return rows, 64


def real(ratings: Sequence[str], draw: np.random.Generator) -> Crowd:
    """VADER_PEOPLE of VADER's raters are the people; the others say what is true."""
    table = np.array([[int(one) for one in row] for row in ratings])
    people = draw.permutation(20)
    others = table[:, people[VADER_PEOPLE:]]
    truth = np.stack([(others == label).sum(axis=1) for label in range(3)], axis=1).argmax(axis=1)
    size = (len(table), VADER_PEOPLE)
    return Crowd(table[:, people[:VADER_PEOPLE]], np.argsort(draw.random(size), axis=1), truth, 3)


# Arms ----------------------------------------------------------------------------------------------------------------


def fixed(count: int, method: ConsensusName, uses_model: bool) -> Arm:
    """The same number of answers for each item."""

    def run(people: Crowd, items: Indices, forecasts: Floats) -> tuple[Indices, Consensus]:
        counts = np.full(len(items), count)
        names = [str(one) for one in items]
        return counts, consensus_of(people.votes(items, counts), names, method, forecasts if uses_model else None)

    return run


class Adaptive:
    """Another answer while the confidence is below `level`; items of earlier rounds are closed."""

    def __init__(self, level: float, method: ConsensusName, uses_model: bool) -> None:
        self.level, self.method, self.uses_model = level, method, uses_model
        self.counts = np.empty(0, np.int64)

    def __call__(self, people: Crowd, items: Indices, forecasts: Floats) -> tuple[Indices, Consensus]:
        closed = len(self.counts)
        counts = np.concatenate([self.counts, np.ones(len(items) - closed, np.int64)])
        model, names = forecasts if self.uses_model else None, [str(one) for one in items]
        while True:
            found = consensus_of(people.votes(items, counts), names, self.method, model)
            more = (found.confidence < self.level) & (counts < MOST)
            more[:closed] = False
            if not more.any():
                self.counts = counts
                return counts, found
            counts = counts + more


def arms() -> dict[str, Arm]:
    """The arms by name; the first one chooses the items."""
    return {
        "majority of 3": fixed(3, "majority", False),
        "majority of 2": fixed(2, "majority", False),
        "1 answer": fixed(1, "majority", False),
        **{f"{method} of 3": fixed(3, method, False) for method in METHODS if method != "majority"},
        **{f"{method} of 2 and the model": fixed(2, method, True) for method in METHODS[1:]},
        **{f"adaptive {level:g}, with the model": Adaptive(level, "auto", True) for level in LEVELS},
        **{f"adaptive {level:g}, people alone": Adaptive(level, "auto", False) for level in LEVELS},
    }


# A run ---------------------------------------------------------------------------------------------------------------


def play(corpus: Corpus, people: Crowd, seed: int, choice: str) -> dict[str, dict[str, float]]:
    """Play the rounds of all arms on the same items; for each the accuracy of its labels, confidence and answers."""
    draw, features = np.random.default_rng([seed, 7]), corpus.pool
    chosen = draw.choice(len(people.truth), SEED_SIZE, replace=False)
    tried, forecasts = arms(), {name: np.full((SEED_SIZE, people.classes), np.nan) for name in arms()}
    results: dict[str, tuple[Indices, Consensus, Indices]] = {}
    for number in range(ROUNDS):
        heads: dict[str, Head | None] = {}
        for name, arm in tried.items():
            counts, found = arm(people, chosen, forecasts[name])
            label = settled(found, people, chosen)
            results[name] = counts, found, label
            needed = name == next(iter(tried)) or "model" in name
            heads[name] = learn(features, chosen, label, people.classes, seed) if needed else None
        if number == ROUNDS - 1:
            break
        rest = np.setdiff1d(np.arange(len(people.truth)), chosen)
        first = heads[next(iter(tried))]
        assert first is not None
        proba = np.sort(first.predict_proba(features.rows(rest)), axis=1)
        sureness = proba[:, -1] - proba[:, -2] if choice == "margin" else draw.random(len(rest))
        batch = rest[np.argsort(sureness, kind="stable")[:BATCH]]
        for name, head in heads.items():
            nothing = np.full((BATCH, people.classes), np.nan)
            said = nothing if head is None else head.predict_proba(features.rows(batch))
            forecasts[name] = np.concatenate([forecasts[name], said])
        chosen = np.concatenate([chosen, batch])
    right = people.truth[chosen]
    return {
        name: {
            "accuracy": float((label == right).mean()),
            "confidence": float(found.confidence.mean()),
            "answers": float(counts.mean()),
            "error_of_confidence": calibration(found.confidence, label == right),
            "after_seed": float((label == right)[SEED_SIZE:].mean()),
            **(weighing(corpus, people, chosen, label, found) if name in WEIGHED else {}),
        }
        for name, (counts, found, label) in results.items()
    }


def settled(found: Consensus, people: Crowd, items: Indices) -> Indices:
    """The labels; of a tie the first answer."""
    first = people.answers[items, people.order[items, 0]]
    return np.where(found.label == TIE, first, found.label)


def learn(features: FeatureMatrix, items: Indices, label: Indices, classes: int, seed: int) -> Head:
    """The product's classifier, calibrated."""
    names = [str(one) for one in range(classes)]
    return fit_head(features.rows(items), [names[one] for one in label], names, seed, calibrate=True)


def weighing(corpus: Corpus, people: Crowd, items: Indices, label: Indices, found: Consensus) -> dict[str, float]:
    """What training gets out of the labels, and out of their confidence."""
    plain = learned(corpus, items, label, people.classes, None)
    return {"f1": plain, "f1_by_weighing": learned(corpus, items, label, people.classes, found.confidence) - plain}


def learned(corpus: Corpus, items: Indices, label: Indices, classes: int, sure: Floats | None) -> float:
    """Macro-F1 on the test set of a classifier trained on the labels, which weigh as much as they are `sure`."""
    from sklearn.metrics import f1_score  # type: ignore[import-untyped, unused-ignore]

    names = [str(one) for one in range(classes)]
    head = fit_head(corpus.pool.rows(items), [names[one] for one in label], names, 0, calibrate=False, weights=sure)
    truth = np.array([corpus.classes.index(one) for one in corpus.truth])
    return float(f1_score(truth, head.predict_proba(corpus.test).argmax(axis=1), average="macro"))


def calibration(confidence: Floats, right: NDArray[np.bool_], bins: int = 10) -> float:
    """The expected calibration error, in bins of equal width."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == one].mean() - right[place == one].mean()) * (place == one).mean()
            for one in np.unique(place)]  # fmt: skip
    return float(sum(gaps))


def summary(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Means over the runs, and the accuracy minus that of the majority of three with its 95 % interval."""
    told = {}
    for name in runs[0]:
        gain = np.array([run[name]["accuracy"] - run["majority of 3"]["accuracy"] for run in runs])
        later = np.array([run[name]["after_seed"] - run["majority of 3"]["after_seed"] for run in runs])
        told[name] = {
            **{key: round(float(np.mean([run[name][key] for run in runs])), 4) for key in runs[0][name]},
            **(
                {"f1_by_weighing": interval(np.array([run[name]["f1_by_weighing"] for run in runs]))}
                if name in WEIGHED
                else {}
            ),
            "gain": interval(gain),
            "gain_after_seed": interval(later),
        }
    return told


def interval(values: Floats) -> list[float]:
    """The mean, and its 95 % interval."""
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return [round(float(one), 4) for one in (values.mean(), values.mean() - half, values.mean() + half)]


if __name__ == "__main__":
    main()
