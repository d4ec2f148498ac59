"""What the names and descriptions of classes are worth: in training, and in the search for rare classes.

    python -m benchmarks.names --data FOLDER [--only REGEX]

Writes benchmarks/results/names.json. FOLDER is that of `benchmarks/corpora.py`, with two clones of public repositories
in it: https://github.com/clinc/oos-eval (CC BY 3.0) as `oos-eval` and
https://github.com/PolyAI-LDN/task-specific-datasets (CC BY 4.0) as `task-specific-datasets`. Finished seeds are stored
in FOLDER, so that an interrupted run continues.

The method was chosen on the corpora of DEVELOPMENT. Those of REPORTING were not looked at before, with one exception:
a first run on debian_sections showed that meaningless names cost something, and the prior on the weight was then
changed, on clinc_domains and spamassassin2. All descriptions
were written before any result.

**Training**: labels are a random sample, as are the test items; each seed fits the head without names and with them on
the same labels. `names`: the classes' names alone. `described`: with descriptions. `numbered`: the classes are called
"class 1", "class 2", ..., so that the names say nothing. `swapped`: each class has the description of another one.

**Search**: one class is cut to 1 or 2 % of the pool. How many of its items are in the seed batch of 40, searched by
name and description, and how many in a random one?
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray
from rich.console import Console

from al_pipeline.active_learning.batch import next_batch
from al_pipeline.active_learning.choice import QueryConfig
from al_pipeline.active_learning.names import name_scores
from al_pipeline.active_learning.shortlist import top_candidates
from al_pipeline.evaluation.savings import mean_interval
from al_pipeline.features.encoder import install_encoder, installed_source
from al_pipeline.features.names import class_prototypes
from al_pipeline.features.tfidf import fit as fit_tfidf
from al_pipeline.features.vectors import Vectors
from al_pipeline.files import read_json, write_json
from al_pipeline.models.estimators import HEAD, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.params import Meaning, Params, parse_params
from al_pipeline.records import content_hash
from al_pipeline.threads import one_thread
from al_pipeline.workspace.trust import template
from benchmarks.corpora import READERS, Rows
from benchmarks.record import record

DEVELOPMENT = ("bbc_news", "clinc_domains", "review_sentences2", "spamassassin2")
REPORTING = ("debian_sections", "tweets_sentiment3", "banking77")
LABELS = (20, 40, 80, 160, 320)
SEEDS = 10
LIMIT = 3300
"""The number of texts of a corpus: those with the smallest digests."""
POOL, TEST = 2300, 800
MAX_TOKENS = 96
SHARES = (0.01, 0.02)
SEED_BATCH = 40

DESCRIPTIONS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "bbc_news": {
        "business": ("companies, the economy, markets and trade", ()),
        "entertainment": ("films, music, television and celebrities", ()),
        "politics": ("government, parties, elections and ministers", ()),
        "sports": ("matches, players, teams and tournaments", ()),
        "tech": ("computers, software, the internet, phones and gadgets", ()),
    },
    "clinc_domains": {
        "banking": ("questions about a bank account: balance, bills, transfers, fraud", ()),
        "credit_cards": ("a credit card: its limit, rewards, a lost or new card", ()),
        "kitchen_and_dining": ("cooking, recipes, food and restaurants", ()),
        "home": ("the household: shopping and to-do lists, reminders, calendar, smart home, music", ()),
        "auto_and_commute": ("a car, its maintenance, traffic, directions and the way to work", ()),
        "travel": ("trips, flights, hotels, luggage and visas", ()),
        "utility": (
            "small helps of a phone: alarm, timer, weather, time, calculator, definitions, calls and texts",
            (),
        ),
        "work": ("one's job: holidays, pay, meetings, taxes and insurance", ()),
        "small_talk": ("chatting with the assistant itself: greetings, jokes, its name and age", ()),
        "meta": ("settings and commands of the assistant: language, volume, yes, no, cancel, repeat", ()),
    },
    "review_sentences2": {
        "0": ("a bad review, the customer is disappointed", ("This was terrible and a waste of money.",)),
        "1": ("a good review, the customer is happy", ("This was great, I love it.",)),
    },
    "spamassassin2": {
        "ham": ("a personal message or a technical mailing list discussion", ()),
        "spam": (
            "an unsolicited advertisement, an offer to make money, or a fraud",
            ("Buy now, limited offer, click here",),
        ),
    },
    "tweets_sentiment3": {
        "negative": ("the author is unhappy, angry or complains", ("I hate this, so disappointed",)),
        "neutral": ("a fact, a question or a headline, without emotion", ()),
        "positive": ("the author is happy, thankful or excited", ("I love this, so happy",)),
    },
    "debian_sections": {
        "admin": ("system administration", ()),
        "comm": ("communication: modems, fax and telephony", ()),
        "database": ("database servers and clients", ()),
        "editors": ("text editors and word processors", ()),
        "electronics": ("electronic circuits and hardware design", ()),
        "fonts": ("typefaces", ()),
        "games": ("games and amusement", ()),
        "graphics": ("images, drawing and photographs", ()),
        "hamradio": ("amateur radio", ()),
        "httpd": ("web servers and their modules", ()),
        "mail": ("e-mail programs and servers", ()),
        "math": ("mathematics and numerical computing", ()),
        "net": ("network programs and servers", ()),
        "science": ("scientific software: biology, chemistry, physics", ()),
        "sound": ("audio and music programs", ()),
        "tex": ("the TeX and LaTeX typesetting system", ()),
        "text": ("text processing and dictionaries", ()),
        "vcs": ("version control systems", ()),
        "video": ("video players, editors and capture", ()),
        "web": ("web browsers and web applications", ()),
    },
}
"""Description and examples of each class. Those of banking77 have none: their names are phrases."""


def read_clinc(folder: Path) -> Rows:
    """Requests to an assistant, ten domains."""
    data = folder / "oos-eval/data"
    domains = json.loads((data / "domains.json").read_text(encoding="utf-8"))
    domain = {intent: name for name, intents in domains.items() for intent in intents}
    found = json.loads((data / "data_full.json").read_text(encoding="utf-8"))
    return [(text, domain[intent]) for part in ("train", "val", "test") for text, intent in found[part]]


def read_banking(folder: Path) -> Rows:
    """Questions of a bank's customers, 77 intents."""
    rows: Rows = []
    for part in ("train", "test"):
        text = (folder / f"task-specific-datasets/banking_data/{part}.csv").read_text(encoding="utf-8")
        rows += [(row["text"], row["category"]) for row in csv.DictReader(io.StringIO(text, newline=""))]
    return rows


OWN_READERS: dict[str, tuple[Callable[[Path], Rows], int]] = {
    "clinc_domains": (read_clinc, 64),
    "banking77": (read_banking, 64),
}


class Texts:
    """A corpus: features (n, d), classes, true class of each text, and prototypes by variant."""

    def __init__(self, name: str, data: Path) -> None:
        reader, tokens = {**READERS, **OWN_READERS}[name]
        by_digest = {content_hash(text): (text, label) for text, label in map(_clean, reader(data)) if text}
        rows = [by_digest[digest] for digest in sorted(by_digest)[:LIMIT]]
        texts = [text for text, _ in rows]
        self.ids = [content_hash(text)[:20] for text in texts]
        self.classes = sorted({label for _, label in rows})
        self.truth = np.array([self.classes.index(label) for _, label in rows])
        vectors = encoder_vectors(data, min(tokens, MAX_TOKENS))
        digests = [content_hash(text) for text in texts]
        vectors.prepare(zip(digests, texts, strict=True), len(texts))
        tfidf = fit_tfidf(texts)
        self.dense = vectors.of_texts(digests, texts)
        self.matrix = FeatureMatrix(self.dense, tfidf.transform(texts), tfidf.components)
        described = DESCRIPTIONS.get(name, {})
        meanings = {
            label: Meaning(description=text, examples=list(found)) for label, (text, found) in described.items()
        }
        numbers = [f"class {number}" for number in range(1, len(self.classes) + 1)]
        self.prototypes = {
            "names": class_prototypes(vectors, self.classes, {}),
            "described": class_prototypes(vectors, self.classes, meanings),
            "numbered": class_prototypes(vectors, numbers, {}),
        }
        if not described:
            del self.prototypes["described"]
        self.prototypes["swapped"] = np.roll(self.prototypes["described" if described else "names"], 1, axis=0)


def encoder_vectors(data: Path, max_tokens: int) -> Vectors:
    """The template's encoder, and the cache in the folder."""
    params: Params = parse_params(template("params.yaml"))
    features = structs.replace(params.features, max_tokens=max_tokens)
    if installed_source(data / "encoder") != features.encoder:
        install_encoder(features.encoder, data / "encoder")
    return Vectors(data / "encoder", data / "features", features)


def _clean(row: tuple[str, str]) -> tuple[str, str]:
    return row[0].replace("\0", " ").strip(), row[1]


def macro_f1(proba: NDArray[np.float64], truth: NDArray[np.intp]) -> float:
    """The mean F1 over the classes that occur in `truth`."""
    predicted, scores = proba.argmax(axis=1), []
    for label in np.unique(truth):
        both = int(((predicted == label) & (truth == label)).sum())
        scores.append(2 * both / int((predicted == label).sum() + (truth == label).sum()))
    return float(np.mean(scores))


def train_seed(corpus: Texts, seed: int) -> dict[str, list[float]]:
    """Macro-F1 for each number of labels, without names and by variant, and the chosen weights."""
    order = np.random.default_rng([seed, 0x4A3E]).permutation(len(corpus.truth))
    pool, test = order[:POOL], order[POOL : POOL + TEST]
    if len(order) < POOL + TEST:
        pool, test = order[: len(order) - TEST], order[len(order) - TEST :]
    found: dict[str, list[float]] = {}
    for count in LABELS:
        rows = np.sort(pool[:count])
        labels = [corpus.classes[place] for place in corpus.truth[rows]]
        known, asked = corpus.matrix.rows(rows), corpus.matrix.rows(test)
        for variant in ("without", *corpus.prototypes):
            prototypes = corpus.prototypes.get(variant)
            head = fit_classifier(HEAD, known, labels, corpus.classes, seed, True, prototypes)
            found.setdefault(variant, []).append(macro_f1(head.predict_proba(asked), corpus.truth[test]))
            if prototypes is not None:
                found.setdefault(f"{variant} weight", []).append(head.names.weight)  # type: ignore[union-attr]
    return found


def search_seed(corpus: Texts, rare: int, share: float, prototypes: NDArray[np.float32], seed: int) -> tuple[int, int]:
    """The number of items of a rare class in a seed batch that is searched by names, and in a random one."""
    rng = np.random.default_rng([seed, rare])
    others = np.flatnonzero(corpus.truth != rare)
    few = rng.permutation(np.flatnonzero(corpus.truth == rare))[: round(len(others) * share / (1 - share))]
    rows = np.concatenate([others, few])
    cosines = corpus.dense[rows].astype(np.float64) @ prototypes.T.astype(np.float64)
    scores = name_scores(cosines, cosines.mean(axis=0))
    ids = [corpus.ids[row] for row in rows]
    guided = {
        name: [ids[place] for place in top_candidates(ids, scores[:, column], SEED_BATCH, SEED_BATCH, seed)]
        for column, name in enumerate(corpus.classes)
    }
    is_rare = {item_id: corpus.truth[row] == rare for item_id, row in zip(ids, rows, strict=True)}
    config = QueryConfig(seed, SEED_BATCH, "auto", SEED_BATCH, 0.1, 1000)
    both = []
    for wanted in (guided, None):
        queries, _ = next_batch(config, 0, ids, None, {}, corpus.classes, None, guided=wanted)
        both.append(sum(bool(is_rare[query.item_id]) for query in queries))
    return both[0], both[1]


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean with its 95 % interval."""
    found = mean_interval(np.array(values, dtype=np.float64), 0.95)
    return {"mean": found.value, "low": found.low, "high": found.high}


def play(name: str, data: Path, seeds: int) -> dict[str, Any]:
    """The figures of one corpus."""
    corpus = Texts(name, data)
    runs: list[Mapping[str, list[float]]] = []
    for seed in range(seeds):
        path = data / "names" / f"{name}-{seed}.json"
        if (stored := read_json(path)) is None:
            with one_thread():
                stored = train_seed(corpus, seed)
            write_json(path, stored)
        runs.append(stored)
    training = {}
    for variant in ("without", *corpus.prototypes):
        scores = np.array([run[variant] for run in runs])
        training[variant] = {"macro_f1": [interval(column) for column in scores.T]}
        if variant != "without":
            gains = scores - np.array([run["without"] for run in runs])
            training[variant]["gain"] = [interval(column) for column in gains.T]
            weights = np.array([run[f"{variant} weight"] for run in runs])
            training[variant]["weight"] = weights.mean(axis=0).tolist()
    search = {}
    prototypes = corpus.prototypes.get("described", corpus.prototypes["names"])
    for share in SHARES:
        counts = [
            search_seed(corpus, rare, share, prototypes, seed)
            for rare, size in enumerate(np.bincount(corpus.truth))
            if size >= share * len(corpus.truth)
            for seed in range(seeds)
        ]
        if not counts:  # its classes are rarer as they are
            continue
        named, drawn = np.array(counts).T
        search[str(share)] = {
            "searched": interval(named), "random": interval(drawn), "without_any": float((named == 0).mean()),
            "random_without_any": float((drawn == 0).mean()),
        }  # fmt: skip
    return {"texts": len(corpus.truth), "classes": len(corpus.classes), "training": training, "search": search}


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print one corpus."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{name}: {found['texts']} texts, {found['classes']} classes; labels {LABELS}")
    for variant, row in found["training"].items():
        cells = [f"{point['mean']:.3f}" for point in row["macro_f1"]]
        for place, gain in enumerate(row.get("gain", ())):
            cells[place] += f" ({gain['mean']:+.3f}: {gain['low']:+.3f} to {gain['high']:+.3f})"
        console.print(
            f"  {variant:10} {'  '.join(cells)}  weights {[round(value, 1) for value in row.get('weight', ())]}"
        )
    for share, row in found["search"].items():
        console.print(
            f"  at {share}: {row['searched']['mean']:.2f} of {SEED_BATCH} in the seed batch, at random "
            f"{row['random']['mean']:.2f}; none in {row['without_any']:.0%}, {row['random_without_any']:.0%}"
        )


def main() -> None:
    """Run what is missing, print it, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="", help="corpora whose name matches this; writes no record")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    found = {}
    for name in (*DEVELOPMENT, *REPORTING):
        if re.search(options.only, name):
            found[name] = play(name, options.data, options.seeds)
            show(name, found[name])
    if not options.only:
        told = {"development": DEVELOPMENT, "reporting": REPORTING, "labels": LABELS, "seeds": options.seeds}
        record("names", {**told, "seed_batch": SEED_BATCH, "corpora": found})


if __name__ == "__main__":
    sys.exit(main())
