"""Ask anew or ask again: what a second answer to a doubtful label is worth at equal numbers of answers.

    python -m benchmarks.relabel --data FOLDER [--only REGEX] [--seeds N]

Writes benchmarks/results/relabel.json. FOLDER is that of `benchmarks/names.py`; finished runs are stored in it, so that
an interrupted benchmark continues.

Five annotators answer, with errors planted in labelled corpora (`al_pipeline/simulation/annotators.py`). As in Label
Studio, a task that asks again can fall to somebody who answered before. Rounds are as in `params.yaml`: 40 answers, 4
of them to a random sample, until 400, or 40 for each class; selection, the fold of the answers and the model (the head,
calibrated) are the product's. Scores are macro-F1 on 30 % of the items, with their true labels.

- `one answer`: each item is asked once, the baseline of all differences, which are paired by seed
- `overlap 3`: three people answer each item
- `activelab`: the score of ActiveLab puts unlabelled and labelled items on one scale, and the highest are asked
- `relabel`: `select.relabel: auto`
- `relabel, consensus`: with `labels.consensus: dawid_skene` too

The method (threshold, cap, prior of the accuracy) was chosen on DEVELOPMENT. A prior of 0.9 for 40 answers was tried
too (not in the record): without noise it loses nothing on clinc_domains, -0.002 [-0.007, +0.003] at the end, but with
30 % it asks hardly anything again on review_sentences2, +0.009 [-0.006, +0.024]: a weak model explains the errors.
That people who are asked again seldom contradict lowers all risks; without noise that saves a quarter of the repeated
answers. debian_sections (20 classes) and tweets_sentiment3 were looked at with four to six seeds: with 30 % noise
nothing was gained or lost at 400 answers, and 0.06 of macro-F1 gained on the former at 800.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray
from rich.console import Console
from sklearn.metrics import f1_score

from al_pipeline.active_learning.acquisition import margin
from al_pipeline.active_learning.batch import next_batch
from al_pipeline.active_learning.choice import AUTO, QueryConfig
from al_pipeline.active_learning.relabeling import Doubted, Labeled, Relabel, doubtful
from al_pipeline.active_learning.sampling import round_seed, top_k
from al_pipeline.active_learning.shortlist import Shortlist, top_candidates
from al_pipeline.evaluation.savings import area, mean_interval
from al_pipeline.files import read_json, write_json
from al_pipeline.models.estimators import HEAD, fit_classifier
from al_pipeline.models.held_out import tempered_held_out_proba
from al_pipeline.params import MAJORITY, Labels
from al_pipeline.records import RELABEL
from al_pipeline.simulation.annotators import NoiseKind, Team, TeamLabels, draw_answers, nearest_classes
from al_pipeline.threads import one_thread
from benchmarks.names import Texts
from benchmarks.record import record

DEVELOPMENT = ("spamassassin2", "bbc_news", "clinc_domains")
REPORTING = ("review_sentences2",)
SEEDS = 10
PEOPLE, BATCH = 5, 40
BUDGET, BUDGET_OF_CLASS = 400, 40
"""The number of answers: 400, or 40 for each class if those are more."""
TEST_SHARE = 0.3

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


class Arm(NamedTuple):
    """How a run spends its answers."""

    overlap: int = 1
    relabel: Relabel = 0.0
    activelab: bool = False
    labels: Labels = MAJORITY


ARMS = {
    "one answer": Arm(),
    "overlap 3": Arm(overlap=3),
    "activelab": Arm(relabel=1.0, activelab=True),
    "relabel": Arm(relabel="auto"),
    "relabel, consensus": Arm(relabel="auto", labels=Labels(consensus="dawid_skene")),
}
BASELINE = "one answer"
NOISES: Mapping[tuple[NoiseKind, float], Sequence[str]] = {
    ("uniform", 0.3): tuple(ARMS),
    ("uniform", 0.0): (BASELINE, "activelab", "relabel"),
    ("uniform", 0.2): (BASELINE, "relabel"),
}
"""The kinds and rates of noise, and the arms that are played with each."""


# ActiveLab ----------------------------------------------------------------------------------------------------------
def activelab(answers: Floats, who: Floats, held_out: Floats, unlabeled: Floats) -> tuple[Floats, Floats]:
    """ActiveLab's scores of labelled (n,) and unlabelled items (m,), higher = ask sooner: 1 minus those of the paper.

    `answers` (n, C): how many people gave each class. `who` (n, N): the class that each annotator gave, -1 for none.
    `held_out` (n, C) and `unlabeled` (m, C): probabilities by a model that was not trained on the item. An item's score
    in the paper is the probability of its most probable class in a weighted mean of the model's probabilities, a
    distribution for each answer, and the uniform distribution with the weight of a mean annotator; a weight is how much
    fewer errors a source makes than naming the most frequent class. While nobody shares an item all weights are 1.
    """
    classes, counts = answers.shape[1], answers.sum(axis=1)
    consensus = (answers + 1e-3 * held_out).argmax(axis=1)
    several = counts > 1
    if not several.any():
        quality = held_out[np.arange(len(consensus)), consensus]
        return 1 - ((counts + 1) * quality + 1 / classes) / (counts + 2), 1 - (unlabeled.max(axis=1) + 1 / classes) / 2
    given = who[several]
    agree = np.where(given >= 0, given == consensus[several][:, None], np.nan)
    certainty = float(np.nanmean(np.nanmean(agree, axis=1)))
    usual = np.bincount(consensus, minlength=classes).argmax()
    errors = max(1e-6, float((consensus[several] != usual).mean()))
    own = np.array([np.nanmean(column) if np.isfinite(column).any() else np.nan for column in agree.T])
    weights = np.maximum(1e-6, 1 - (1 - np.where(np.isnan(own), np.nanmean(own), own)) / errors)
    wrong = float((held_out[several].argmax(axis=1) != consensus[several]).mean())
    of_model = max(1e-6, 1 - wrong / errors) * float(np.sqrt(counts.mean()))
    total = ((who >= 0) * weights).sum(axis=1)
    votes = np.stack([((who == one) * weights).sum(axis=1) for one in range(classes)], axis=1)
    spread = votes * certainty + (total[:, None] - votes) * (1 - certainty) / (classes - 1)
    usual_weight = float(weights.mean())
    mixed = (spread + of_model * held_out).max(axis=1) + usual_weight / classes
    alone = of_model * unlabeled.max(axis=1) + usual_weight / classes
    return 1 - mixed / (total + of_model + usual_weight), 1 - alone / (of_model + usual_weight)


# A run --------------------------------------------------------------------------------------------------------------
class Split(NamedTuple):
    """The pool and the test set of one seed, and what each annotator would answer."""

    pool: Indices
    test: Indices
    given: Indices
    """(n, N) classes."""


def make_split(corpus: Texts, team: Team, seed: int) -> Split:
    """The split of one seed; the same for every arm and every noise."""
    order = np.random.default_rng([seed, 0x4A4E]).permutation(len(corpus.truth))
    tests = round(TEST_SHARE * len(order))
    truth, classes = corpus.truth.astype(np.intp), len(corpus.classes)
    near = nearest_classes(corpus.matrix, truth, classes) if team.kind == "confusable" else None
    return Split(np.sort(order[tests:]), order[:tests], draw_answers(team, truth, classes, seed, near))


def budget_of(classes: Sequence[str]) -> int:
    """The number of answers for a corpus."""
    return max(BUDGET, BUDGET_OF_CLASS * len(classes))


def play(corpus: Texts, split: Split, arm: Arm, seed: int) -> dict[str, list[float]]:
    """One run: after each batch the answers so far, macro-F1 on the test set, labels, and the share that is right."""
    classes, position = list(corpus.classes), {item_id: row for row, item_id in enumerate(corpus.ids)}
    names = [corpus.ids[row] for row in split.pool]
    given = {corpus.ids[row]: [classes[one] for one in split.given[row]] for row in split.pool}
    labeling = TeamLabels(given, classes, arm.overlap, bool(arm.relabel), seed, arm.labels)
    size = BATCH // arm.overlap
    config = QueryConfig(seed, size, AUTO, size, 0.1, 1000, relabel=arm.relabel)
    curve: dict[str, list[float]] = {"answers": [], "score": [], "labels": [], "right": [], "again": []}
    proba: Floats | None = None
    again = 0
    while labeling.answers + size * arm.overlap <= budget_of(corpus.classes):
        number, labels = len(curve["answers"]), labeling.labels
        closed = labels.keys() | set(labeling.ignored)
        unlabeled = [item_id for item_id in names if item_id not in closed]
        shortlist, doubted, forecasts = None, list[tuple[str, float]](), dict[str, dict[str, float]]()
        if proba is not None:
            own = proba[[position[item_id] for item_id in unlabeled]]
            scores = margin(own)
            best = top_candidates(unlabeled, scores, config.shortlist, size, seed)
            shortlist = Shortlist([unlabeled[row] for row in best], scores[best], own[best])
            if arm.relabel:
                doubted = doubt(corpus, labeling, arm, position, own, config, number)
        queries, _ = next_batch(
            config,
            number,
            unlabeled,
            shortlist,
            labels,
            classes,
            lambda ids: corpus.dense[[position[one] for one in ids]],
            first=labeling.ties,
            doubted=doubted,
        )
        if proba is not None:
            forecasts = {one.item_id: dict(zip(classes, proba[position[one.item_id]], strict=True)) for one in queries}
        again += sum(query.strategy == RELABEL for query in queries)
        labeling.ask(queries, number, forecasts)
        ids = sorted(labeling.labels)
        found = [labeling.labels[item_id] for item_id in ids]
        rows = np.array([position[item_id] for item_id in ids], np.intp)
        proba = fit_classifier(HEAD, corpus.matrix.rows(rows), found, classes, seed, True).predict_proba(corpus.matrix)
        predicted, truth = proba[split.test].argmax(axis=1), corpus.truth[split.test]
        curve["answers"].append(labeling.answers)
        curve["score"].append(float(f1_score(truth, predicted, average="macro", zero_division=0)))
        curve["labels"].append(len(ids))
        right = [classes[corpus.truth[row]] == label for row, label in zip(rows, found, strict=True)]
        curve["right"].append(float(np.mean(right)))
        curve["again"].append(again)
    return curve


def doubt(
    corpus: Texts,
    labeling: TeamLabels,
    arm: Arm,
    position: Mapping[str, int],
    unlabeled: Floats,
    config: QueryConfig,
    number: int,
) -> Doubted:
    """The labelled items that are asked again: by their risk, or those that ActiveLab ranks in the batch."""
    classes, answered = list(corpus.classes), labeling.answered()
    ids = [item_id for item_id in sorted(labeling.labels) if item_id in answered]
    labels = [labeling.labels[item_id] for item_id in ids]
    rows = np.array([position[item_id] for item_id in ids], np.intp)
    held_out = tempered_held_out_proba(corpus.matrix.rows(rows), labels, classes, config.seed)
    if held_out is None:
        return []
    votes = np.array([[answered[item_id].votes.get(name, 0) for name in classes] for item_id in ids])
    known = Labeled(ids, votes, [classes.index(one) for one in labels], [answered[item_id].open for item_id in ids])
    seed = round_seed(config.seed, number, RELABEL)
    if not arm.activelab:
        return doubtful(known, held_out, config.relabel, config.batch_size, seed)
    who = np.array([[_answer(labeling, item_id, person, classes) for person in range(PEOPLE)] for item_id in ids])
    mine, others = activelab(votes.astype(np.float64), who, held_out, unlabeled)
    mine = np.where(known.open, mine, -np.inf)
    every = [*ids, *(f"unlabelled {row}" for row in range(len(others)))]
    best = top_k(np.concatenate([mine, others]), every, config.batch_size, SeedSequence(config.seed))
    return [(ids[row], float(np.clip(mine[row], 0, 1))) for row in best if row < len(ids)]


def _answer(labeling: TeamLabels, item_id: str, person: int, classes: Sequence[str]) -> int:
    """The class that a person gave to an item; -1 if not asked."""
    return classes.index(labeling.given[item_id][person]) if person in labeling.asked(item_id) else -1


# The figures --------------------------------------------------------------------------------------------------------
def play_corpus(
    name: str, data: Path, arms: Sequence[str], rates: Sequence[float], seeds: int, stored: bool
) -> dict[str, Any]:
    """For each noise and arm the curves of all seeds; finished runs are read. `stored`: only arms that are finished."""
    folder = data / "relabel" / name
    played = {noise: [arm for arm in own if arm in arms] for noise, own in NOISES.items() if noise[1] in rates}
    wanted = [(noise, arm, seed) for noise, own in played.items() for arm in own for seed in range(seeds)]
    paths = {
        one: folder / f"{one[0][0]}-{one[0][1]:g}-{one[1].replace(', ', '-').replace(' ', '-')}-{one[2]}.json"
        for one in wanted
    }
    missing = [one for one in wanted if read_json(paths[one]) is None]
    if stored:
        played = {
            noise: [arm for arm in own if all((noise, arm, seed) not in missing for seed in range(seeds))]
            for noise, own in played.items()
        }
        played = {noise: own for noise, own in played.items() if own}
    elif missing:
        corpus = Texts(name, data)
        for noise, arm, seed in missing:
            team = Team(annotators=PEOPLE, noise=noise[1], kind=noise[0])
            with one_thread():
                write_json(paths[noise, arm, seed], play(corpus, make_split(corpus, team, seed), ARMS[arm], seed))
    return {
        f"{kind} {rate:g}": {arm: [read_json(paths[(kind, rate), arm, seed]) for seed in range(seeds)] for arm in own}
        for (kind, rate), own in played.items()
    }


def figures(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Of each arm: area and score at the end, labels, right ones, tasks asked again, and gains over BASELINE."""
    most = max(run["answers"][-1] for rows in runs.values() for run in rows)
    grid = np.arange(BATCH, most + 1, BATCH, dtype=np.float64)
    curves = {
        arm: np.array([np.interp(grid, run["answers"], run["score"]) for run in rows]) for arm, rows in runs.items()
    }
    found = {}
    for arm, own in curves.items():
        row: dict[str, Any] = {"area": float(area(grid, own).mean()), "end": float(own[:, -1].mean())}
        row |= {key: float(np.mean([run[key][-1] for run in runs[arm]])) for key in ("labels", "right", "again")}
        if arm != BASELINE and BASELINE in curves:
            gain = area(grid, own) - area(grid, curves[BASELINE])
            row["gain_area"] = _interval(gain)
            row["gain_end"] = _interval(own[:, -1] - curves[BASELINE][:, -1])
        found[arm] = row
    return found


def _interval(values: Floats) -> list[float | None]:
    found = mean_interval(values, 0.95)
    return [found.value, found.low, found.high]


def show(name: str, told: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a corpus."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for noise, arms in told.items():
        console.print(f"{name}, {noise}")
        for arm, row in arms.items():
            cells = [
                f"{row['area']:.3f} {row['end']:.3f}",
                f"{row['labels']:.0f} labels, {row['right']:.2f} right, {row['again']:.0f} again",
            ]
            for key in ("gain_area", "gain_end"):
                if (gain := row.get(key)) is not None:
                    cells.append(
                        f"{key[5:]} {gain[0]:+.3f}" + ("" if gain[1] is None else f" [{gain[1]:+.3f}, {gain[2]:+.3f}]")
                    )
            console.print(f"  {arm:20} {'   '.join(cells)}")


def main() -> None:
    """Run what is missing, print it, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="corpora whose name matches this; writes no record")
    parser.add_argument("--arms", default="+".join(ARMS), help="joined by +")
    parser.add_argument("--rates", default="+".join(f"{rate:g}" for _, rate in NOISES), help="joined by +")
    parser.add_argument("--stored", action="store_true", help="record the arms whose runs are all finished; run none")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    arms = options.arms.split("+")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"--arms: {unknown[0]!r} is none of {', '.join(ARMS)}")
    rates = [float(rate) for rate in options.rates.split("+")]
    told = {}
    for name in (*DEVELOPMENT, *REPORTING):
        if re.search(options.only, name):
            played = play_corpus(name, options.data, arms, rates, options.seeds, options.stored)
            told[name] = {noise: figures(runs) for noise, runs in played.items()}
            show(name, told[name])
    if not options.only:
        settings = {
            "seeds": options.seeds,
            "annotators": PEOPLE,
            "batch": BATCH,
            "budget": BUDGET,
            "budget_of_class": BUDGET_OF_CLASS,
        }
        record("relabel", {**settings, "development": DEVELOPMENT, "reporting": REPORTING, "corpora": told})


if __name__ == "__main__":
    sys.exit(main())
