"""Models for few labels: candidates compared with the default, on the same labelled sets of ten corpora.

    python -m benchmarks.models --data FOLDER --work OTHER [--only REGEX] [--candidates REGEX]
    python -m benchmarks.models --data FOLDER --work OTHER --record

The second writes benchmarks/results/models.json from what the first has measured. `benchmarks/corpora.py` describes
FOLDER; the figures of each labelled set are stored in OTHER, so that an interrupted run continues.

Every candidate gets the labelled sets that the default gets: random ones, or those that `auto` selects with the default
as its model. Differences are paired. Candidates differ in the features (a kernel: all are linear), the weight of the
labels, the weights of the classes, and what is done to the scores afterwards. Unlabelled texts of the pool may be used,
those of the test set only for prediction.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import issparse
from threadpoolctl import threadpool_limits

from al_pipeline.evaluation.metrics import evaluate
from al_pipeline.evaluation.savings import mean_interval
from al_pipeline.features.tfidf import lsa_components
from al_pipeline.files import read_json, write_json, write_jsonl
from al_pipeline.models.calibration import stratified_folds
from al_pipeline.models.feature_matrix import FULL_TFIDF, FeatureMatrix
from al_pipeline.models.linear import STRENGTH, fit_head
from al_pipeline.models.probabilities import softmax
from al_pipeline.simulation.corpus import LabeledTexts, read_corpus
from al_pipeline.simulation.runs import Prepared, Work, prepare, simulate_run
from al_pipeline.simulation.simulate import Options, corpus_vectors, make_work
from benchmarks.corpora import READERS
from benchmarks.label_efficiency import CORPORA, CUTS, SPAM, corpus, parameters
from benchmarks.record import record

BUDGETS = (20, 40, 80, 160, 320, 500)
SEEDS = 5
ASKED = "auto"
DESIGNS = ("random", ASKED)
FAMILIES = {name: SPAM for name in CUTS} | {"bbc_news_tech_2pct": "bbc_news", "debian_games_2pct": "debian_sections"}
RARE = {"bbc_news_tech_2pct": ("bbc_news", "tech"), "debian_games_2pct": ("debian_sections", "games")}
UNLABELED = 1500
FIGURES = ("macro_f1", "average_precision", "log_loss")

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


# Data ---------------------------------------------------------------------------------------------------------------
def load(name: str, data: Path, work: Path) -> LabeledTexts:
    """A corpus; in those with a rare class, one class of another corpus, cut to 2 %, is opposed to all its others."""
    if name not in RARE:
        return corpus(name, data)
    path = work / f"{name}.jsonl"
    if not path.exists():
        base, rare = RARE[name]
        found = corpus(base, data)
        label = found.classes.index(rare)
        positive = [item.text for item, c in zip(found.items, found.truth, strict=True) if c == label]
        others = [item.text for item, c in zip(found.items, found.truth, strict=True) if c != label]
        few = positive[: round(len(others) * 0.02 / 0.98)]
        write_jsonl(path, [{"text": t, "label": "other"} for t in others] + [{"text": t, "label": rare} for t in few])
    return read_corpus(path)


@dataclass
class Split:
    """One seed's split, and what is computed from its texts without labels, once."""

    work: Work
    prepared: Prepared
    seed: int
    views: dict[str, Any] = field(default_factory=dict)

    @property
    def unlabeled(self) -> Ints:
        """A random sample of the pool."""
        pool = self.prepared.corpus.pool
        rng = np.random.default_rng([self.seed, 5])
        return np.sort(rng.choice(pool, min(UNLABELED, len(pool)), replace=False))

    def view(self, name: str) -> Any:
        """The rows of all texts in the view `name`."""
        if name not in self.views:
            self.views[name] = VIEWS[name](self)
        return self.views[name]


def _dense(split: Split) -> Any:
    return split.prepared.matrix.dense.astype(np.float64)


def _sparse(split: Split) -> Any:
    return split.prepared.matrix.sparse.astype(np.float64).tocsr()


def _centered(split: Split) -> Any:
    rows = _dense(split)
    return rows - rows[split.unlabeled].mean(axis=0)


def _rescaled(split: Split) -> Any:
    """Centred, and scaled so that the pool's mean square length is 1."""
    rows = _centered(split)
    return rows / np.sqrt((rows[split.unlabeled] ** 2).sum(axis=1).mean())


def _whitened(power: float) -> Callable[[Split], Any]:
    """Directions of large variance in the pool shortened: covariance to the power -power/2; mean square length 1."""

    def view(split: Split) -> Any:
        rows = _centered(split)
        values, turn = np.linalg.eigh(np.cov(rows[split.unlabeled].T))
        values = np.maximum(values, 0) + 0.1 * values.mean()
        rows = rows @ (turn * values ** (-power / 2))
        return rows / np.sqrt((rows[split.unlabeled] ** 2).sum(axis=1).mean())

    return view


def _lsa(width: int, sharpen: bool = False) -> Callable[[Split], Any]:
    """TF-IDF projected on the pool's principal directions (LSA), with mean unit length."""

    def view(split: Split) -> Any:
        from scipy.sparse.linalg import svds

        rows = _sparse(split)
        some = rows[split.unlabeled]
        _, size, terms = svds(some, k=min(width, min(some.shape) - 1), v0=np.ones(min(some.shape)))
        found = np.asarray(rows @ terms.T)
        if sharpen:
            found = found / np.sqrt(size + 1e-9)
        return found / np.sqrt((found[split.unlabeled] ** 2).sum(axis=1).mean())

    return view


def _characters(split: Split) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [item.text[:1500] for item in split.work.texts.items]
    made = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), min_df=3, max_features=50_000, sublinear_tf=True)
    made.fit([texts[p] for p in split.unlabeled])
    return made.transform(texts).tocsr()


VIEWS: dict[str, Callable[[Split], Any]] = {
    "encoder": _dense,
    "tfidf": _sparse,
    "centered": _centered,
    "rescaled": _rescaled,
    "whitened .5": _whitened(0.5),
    "whitened 1": _whitened(1.0),
    "lsa": _lsa(128),
    "lsa sharp": _lsa(128, True),
    "chars": _characters,
}


@dataclass
class Task:
    """A labelled set: rows and targets (indices of the seen classes); `test` and `unlabeled` are rows to predict."""

    split: Split
    rows: Ints
    targets: Ints
    seen: list[int]

    @property
    def classes(self) -> int:
        """The number of classes with labels."""
        return len(self.seen)

    def kernels(self, blend: Mapping[str, float], rows: Ints | None = None) -> tuple[Floats, Floats]:
        """Inner products among the labelled (n, n), of `rows` (the test set) with them (m, n), scaled by `blend`."""
        test = self.split.prepared.corpus.test if rows is None else rows
        own, other = np.zeros((len(self.rows), len(self.rows))), np.zeros((len(test), len(self.rows)))
        for name, scale in blend.items():
            if not scale:
                continue
            view = self.split.view(name)
            labeled = view[self.rows]
            for total, part in ((own, labeled), (other, view[test])):
                product = part @ labeled.T
                total += scale**2 * (product.toarray() if issparse(product) else product)
        own[np.diag_indices(len(own))] += 1e-9
        return own, other


# Fits ---------------------------------------------------------------------------------------------------------------
def fit(block: Floats, targets: Ints, classes: int, strength: float, importance: Floats) -> tuple[Floats, Floats]:
    """The default's fit, with given weights."""
    hot = np.eye(classes)[targets]
    size = block.shape[1] * classes

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, bias = flat[:size].reshape(-1, classes), flat[size:]
        logits = block @ weights + bias
        logits -= logits.max(axis=1, keepdims=True)
        exp = np.exp(logits)
        total = exp.sum(axis=1, keepdims=True)
        value = -(importance * ((logits - np.log(total)) * hot).sum(axis=1)).sum() + (weights**2).sum() / (2 * strength)
        error = (exp / total - hot) * importance[:, None]
        return float(value), np.concatenate([(block.T @ error + weights / strength).ravel(), error.sum(axis=0)])

    options = {"maxiter": 500, "maxcor": 20, "gtol": 1e-4, "ftol": 1e-10}
    flat = minimize(loss, np.zeros(size + classes), jac=True, method="L-BFGS-B", options=options).x
    return flat[:size].reshape(-1, classes), flat[size:]


def weigh(targets: Ints, classes: int, power: float) -> Floats:
    """Weights of labels: 1 balances the classes, 0 leaves them unweighted; the mean is 1."""
    counts = np.bincount(targets, minlength=classes).astype(float)
    found = ((len(targets) / (classes * counts)) ** power)[targets]
    return np.asarray(found / found.mean())


@dataclass(frozen=True)
class Fitted:
    """Scores of the test set, and of the labelled items by models that had not seen them."""

    test: Floats
    held_out: Floats | None = None
    unlabeled: Floats | None = None


@dataclass(frozen=True)
class Model:
    """A candidate. `blend` gives the scales of the views for a number of labels."""

    blend: Callable[[int], dict[str, float]]
    strength: float = STRENGTH
    power: float = 1.0
    held_out: bool = False
    pool: bool = False

    def run(self, task: Task) -> Fitted:
        """Fit on the task's labels, and score."""
        blend = self.blend(len(task.rows))
        own, other = task.kernels(blend)
        factor = cholesky(own, lower=True)
        importance = weigh(task.targets, task.classes, self.power)
        by_row, bias, held = self._fit(factor, task, importance)
        unlabeled = None
        if self.pool:
            _, more = task.kernels(blend, task.split.unlabeled)
            unlabeled = more @ by_row + bias
        return Fitted(other @ by_row + bias, held, unlabeled)

    def _fit(self, factor: Floats, task: Task, importance: Floats) -> tuple[Floats, Floats, Floats | None]:
        weights, bias = fit(factor, task.targets, task.classes, self.strength, importance)
        by_row = solve_triangular(factor, weights, lower=True, trans="T")
        return by_row, bias, self.hold_out(factor, task) if self.held_out else None

    def hold_out(self, factor: Floats, task: Task) -> Floats:
        """Scores (n, C) by five-fold cross-validation; NaN if a class is missing from a fold."""
        found = np.full((len(task.rows), task.classes), np.nan)
        for train, test in stratified_folds(task.targets, 5, task.split.seed):
            if len(np.unique(task.targets[train])) < task.classes:
                known = np.unique(task.targets[train])
                if len(known) < 2:
                    continue
                targets = np.searchsorted(known, task.targets[train])
                own = weigh(targets, len(known), self.power)
                weights, bias = fit(factor[train], targets, len(known), self.strength, own)
                part = factor[test] @ weights + bias
                full = np.full((len(test), task.classes), -20.0)
                full[:, known] = part
                keep = np.isin(task.targets[test], known)
                found[test[keep]] = full[keep]
                continue
            targets = task.targets[train]
            own = weigh(targets, task.classes, self.power)
            weights, bias = fit(factor[train], targets, task.classes, self.strength, own)
            found[test] = factor[test] @ weights + bias
        return found


def standard(
    dense: str = "encoder",
    sparse: str = "tfidf",
    scale: float = 1.0,
    full: float = FULL_TFIDF,
    more: Mapping[str, float] | None = None,
) -> Callable[[int], dict[str, float]]:
    """The default's blend with other views or weights."""
    return lambda n: {dense: 1.0, sparse: scale * min(1.0, math.sqrt(n / full)), **(more or {})}


def ramped(views: Mapping[str, float]) -> Callable[[int], dict[str, float]]:
    """The encoder, and other views whose weight rises to full at a number of labels, as TF-IDF's does."""
    return lambda n: {"encoder": 1.0} | {k: v * min(1.0, math.sqrt(n / FULL_TFIDF)) for k, v in views.items()}


def fixed(views: Mapping[str, float]) -> Callable[[int], dict[str, float]]:
    """Fixed views, for any number of labels."""
    return lambda n: dict(views)


def only(name: str) -> Callable[[int], dict[str, float]]:
    """One view."""
    return fixed({name: 1.0})


# After the fit ------------------------------------------------------------------------------------------------------
def _usable(held: Floats, targets: Ints) -> tuple[Floats, Ints]:
    rows = ~np.isnan(held).any(axis=1)
    return held[rows], targets[rows]


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def temperature(held: Floats, targets: Ints) -> float:
    held, targets = _usable(held, targets)
    if len(held) < 20:
        return 1.0
    rows = np.arange(len(held))

    def loss(log: float) -> float:
        return -float(log_softmax(held / math.exp(log))[rows, targets].sum())

    found = minimize_scalar(loss, bounds=(math.log(0.2), math.log(5)), method="bounded")
    return float(math.exp(found.x))


def tempered(task: Task, found: Fitted) -> Floats:
    return found.test / temperature(found.held_out, task.targets)


def shifted(prior: float, power: float = 0.0) -> Callable[[Task, Fitted], Floats]:
    """Temperature and a bias for each class by held-out likelihood; `prior`: pull of the bias to 0, in labels."""

    def apply(task: Task, found: Fitted) -> Floats:
        held, targets = _usable(found.held_out, task.targets)
        if len(held) < 20:
            return found.test
        rows = np.arange(len(held))
        importance = weigh(task.targets, task.classes, power)[~np.isnan(found.held_out).any(axis=1)]

        def loss(flat: Floats) -> float:
            scores = held * math.exp(flat[0]) + flat[1:]
            value = -(importance * log_softmax(scores)[rows, targets]).sum()
            return float(value + prior * (flat[1:] ** 2).sum() / 2 + flat[0] ** 2 / 2)

        bounds = [(-1.6, 1.6)] + [(-6, 6)] * task.classes
        flat = minimize(loss, np.zeros(task.classes + 1), method="L-BFGS-B", bounds=bounds).x
        return np.asarray(found.test * math.exp(flat[0]) + flat[1:])

    return apply


def halved(after: Callable[[Task, Fitted], Floats]) -> Callable[[Task, Fitted], Floats]:
    """The mean of the calibrated scores and those of `after`."""
    return lambda task, found: 0.5 * (tempered(task, found) + after(task, found))


def thresholded(shrink: float) -> Callable[[Task, Fitted], Floats]:
    """Two classes: the threshold with the best held-out macro-F1, pulled to 0 if the rarer class has few labels."""

    def apply(task: Task, found: Fitted) -> Floats:
        test = tempered(task, found)
        held, targets = _usable(found.held_out, task.targets)
        if task.classes != 2 or len(held) < 20:
            return test
        scale = temperature(found.held_out, task.targets)
        margin = (held[:, 1] - held[:, 0]) / scale
        cuts = np.linspace(-4, 4, 81)
        scores = []
        for cut in cuts:
            guess = margin > cut
            hits = [((targets == c) & (guess == bool(c))).sum() for c in (0, 1)]
            sizes = [(targets == c).sum() + (guess == bool(c)).sum() for c in (0, 1)]
            scores.append(np.mean([2 * hit / max(1, size) for hit, size in zip(hits, sizes, strict=True)]))
        best = np.array(scores) >= max(scores) - 1e-9
        cut = cuts[best].mean()
        few = np.bincount(targets, minlength=2).min()
        cut *= few / max(few + shrink, 1)
        return test + np.array([cut, 0.0])

    return apply


def em_prior(task: Task, found: Fitted) -> Floats:
    """Saerens et al. 2002: the pool's class shares by EM, from balanced scores; half of the change in the logits."""
    test, pool = tempered(task, found), found.unlabeled / temperature(found.held_out, task.targets)
    proba = softmax(pool)
    prior = np.full(task.classes, 1 / task.classes)
    for _ in range(50):
        after = proba * prior
        after /= after.sum(axis=1, keepdims=True)
        prior = (after.sum(axis=0) + 1) / (len(after) + task.classes)
    return test + 0.5 * np.log(prior * task.classes)


# Candidates that are no blend ----------------------------------------------------------------------------------------
GRID_TFIDF = (0.0, 0.35, 1.0, 2.0)
GRID_STRENGTH = (1.0, 3.0, 10.0, 30.0)


def leave_one_out(own: Floats, targets: Ints, classes: int, strength: float, importance: Floats) -> Floats:
    """Scores (n, C) of kernel ridge regression on +-1 without the item itself, in closed form."""
    aims = 2 * np.eye(classes)[targets] - 1
    matrix = own + 1.0 * own.diagonal().mean() * 4  # a wide prior on the bias
    matrix = matrix + np.diag(4 / strength / importance)
    inverse = np.linalg.inv(matrix)
    return np.asarray(aims - (inverse @ aims) / np.diag(inverse)[:, None])


def loo_losses(task: Task, power: float) -> tuple[list[tuple[float, float]], Floats]:
    """For each point of the grid the losses (n,) of held-out labels, classes balanced, at its best temperature."""
    dense, _ = task.kernels({"encoder": 1.0}, task.rows[:1])
    sparse, _ = task.kernels({"tfidf": 1.0}, task.rows[:1])
    importance = weigh(task.targets, task.classes, power)
    points, losses = [], []
    rows = np.arange(len(task.rows))
    for scale in GRID_TFIDF:
        for strength in GRID_STRENGTH:
            scores = leave_one_out(dense + scale**2 * sparse, task.targets, task.classes, strength, importance)
            options = [-log_softmax(scores * t)[rows, task.targets] * importance for t in (0.5, 1, 2, 3, 5, 8)]
            losses.append(min(options, key=lambda one: one.sum()))
            points.append((scale, strength))
    return points, np.array(losses)


def selected(rule: str) -> Callable[[Task], Fitted]:
    """TF-IDF's weight and the regularisation strength, chosen by leave-one-out."""

    def run(task: Task) -> Fitted:
        points, losses = loo_losses(task, 1.0)
        n = len(task.rows)
        start = min(1.0, math.sqrt(n / FULL_TFIDF))
        near = [abs(math.log((s + 0.2) / (start + 0.2))) + 0.5 * abs(math.log(c / STRENGTH)) for s, c in points]
        home = int(np.argmin(near))
        total = losses.sum(axis=1)
        if rule == "best":
            choice = int(total.argmin())
        else:
            gap = losses - losses[total.argmin()]
            noise = gap.std(axis=1) * math.sqrt(n)
            fine = np.flatnonzero(gap.sum(axis=1) <= noise)
            choice = int(min(fine, key=lambda k: (near[k], total[k]))) if home not in fine else home
        if rule == "blend":
            weight = np.exp(-(total - total.min()))
            weight /= weight.sum()
            kept = [(w, s, c) for w, (s, c) in zip(weight, points, strict=True) if w > 0.05]
            parts = [(w, Model(fixed({"encoder": 1.0, "tfidf": s}), c).run(task).test) for w, s, c in kept]
            return Fitted(sum(w * log_softmax(part) for w, part in parts) / sum(w for w, _ in parts))
        scale, strength = points[choice]
        if choice == home:
            scale, strength = start, STRENGTH
        return Model(fixed({"encoder": 1.0, "tfidf": scale}), strength).run(task)

    return run


def two_heads(task: Task) -> Fitted:
    """Mean of the log-probabilities of a head on each view."""
    parts = [log_softmax(Model(only(name)).run(task).test) for name in ("encoder", "tfidf")]
    scale = min(1.0, math.sqrt(len(task.rows) / FULL_TFIDF))
    return Fitted((parts[0] + scale * parts[1]) / (1 + scale) * 1.5)


@dataclass(frozen=True)
class SelfTrained:
    """Unlabelled texts with the default's predictions beside the labels.

    `weight`: their total weight relative to that of the labels; `soft`: as probabilities, otherwise the most likely
    class, weighted by its confidence; `sure`: only the most confident of each class; `shift`: predictions by scores
    with a bias for each class, by held-out likelihood.
    """

    weight: float = 0.5
    soft: bool = False
    sure: bool = False
    count: int = 400
    shift: float | None = None
    balanced: bool = True
    rounds: int = 1
    blend: Callable[[int], dict[str, float]] | None = None

    def __call__(self, task: Task) -> Fitted:
        blend = self.blend or standard()
        first = Model(blend, held_out=True, pool=True).run(task)
        known = set(task.rows.tolist())
        free = np.array([k for k, row in enumerate(task.split.unlabeled) if int(row) not in known])
        if self.shift is None:
            scores = first.unlabeled / temperature(first.held_out, task.targets)
        else:
            scores = shifted(self.shift)(task, replace(first, test=first.unlabeled))
        for _ in range(self.rounds):
            proba = softmax(scores)
            guess, sure = proba.argmax(axis=1), proba.max(axis=1)
            chosen = np.random.default_rng([task.split.seed, 77]).permutation(free)[: self.count]
            if self.sure:
                each = max(5, self.count // task.classes // 2)
                parts = [sorted(free[guess[free] == c], key=lambda k: -sure[k])[:each] for c in range(task.classes)]
                chosen = np.array([row for part in parts for row in part], np.intp)
            rows = np.concatenate([task.rows, task.split.unlabeled[chosen]])
            bigger = replace(task, rows=rows)
            own, other = bigger.kernels(blend(len(task.rows)))
            more = np.zeros((len(chosen), task.classes))
            if self.soft:
                more[:] = proba[chosen]
            else:
                more[np.arange(len(chosen)), guess[chosen]] = sure[chosen]
            if self.balanced:  # equal total weight of every class that is predicted at all
                more /= np.maximum(more.sum(axis=0), 1.0)
            more *= self.weight * len(task.rows) / more.sum()
            labeled = np.eye(task.classes)[task.targets] * weigh(task.targets, task.classes, 1.0)[:, None]
            mass = np.concatenate([labeled, more])
            factor = cholesky(own, lower=True)
            weights, bias = fit_soft(factor, mass, STRENGTH)
            by_row = solve_triangular(factor, weights, lower=True, trans="T")
            if self.rounds > 1:
                _, again = bigger.kernels(blend(len(task.rows)), task.split.unlabeled)
                scores = again @ by_row + bias
        return Fitted(other @ by_row + bias)


def fit_soft(block: Floats, mass: Floats, strength: float) -> tuple[Floats, Floats]:
    """The default's fit with weights `mass` (n, C) of each row for each class."""
    classes = mass.shape[1]
    size, each = block.shape[1] * classes, mass.sum(axis=1, keepdims=True)

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, bias = flat[:size].reshape(-1, classes), flat[size:]
        log = log_softmax(block @ weights + bias)
        error = np.exp(log) * each - mass
        value = -(mass * log).sum() + (weights**2).sum() / (2 * strength)
        return float(value), np.concatenate([(block.T @ error + weights / strength).ravel(), error.sum(axis=0)])

    options = {"maxiter": 500, "maxcor": 20, "gtol": 1e-4, "ftol": 1e-10}
    flat = minimize(loss, np.zeros(size + classes), jac=True, method="L-BFGS-B", options=options).x
    return flat[:size].reshape(-1, classes), flat[size:]


def contrastive(task: Task) -> Fitted:
    """A linear map of the encoder's vectors trained on pairs (supervised contrastive), then the default's head."""
    import torch

    torch.manual_seed(task.split.seed)
    torch.set_num_threads(1)
    view = task.split.view("encoder")
    inputs = torch.from_numpy(view[task.rows]).float()
    targets = torch.from_numpy(task.targets)
    same = (targets[:, None] == targets[None, :]).float()
    same.fill_diagonal_(0)
    matrix = torch.eye(inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([matrix], lr=1e-3)
    mask = -1e9 * torch.eye(len(inputs))
    weight = torch.from_numpy(weigh(task.targets, task.classes, 1.0)).float() * (same.sum(1) > 0)
    for _ in range(60):
        optimizer.zero_grad()
        out = torch.nn.functional.normalize(inputs @ matrix, dim=1)
        log = (out @ out.T / 0.1 + mask).log_softmax(1)
        loss = -(weight * (same * log).sum(1) / same.sum(1).clamp(min=1)).sum() / weight.sum().clamp(min=1e-9)
        (loss + 1e-3 * ((matrix - torch.eye(len(matrix))) ** 2).sum()).backward()
        optimizer.step()
    mapped = view @ matrix.detach().double().numpy()
    mapped /= np.linalg.norm(mapped, axis=1, keepdims=True)
    views = dict(task.split.views) | {"mapped": mapped, "tfidf": task.split.view("tfidf")}
    return Model(standard("mapped")).run(replace(task, split=replace(task.split, views=views)))


def prototypes(task: Task) -> Fitted:
    """Distance to the class means in the whitened view: linear discriminant analysis with the pool's covariance."""
    view = task.split.view("whitened 1")
    rows, test = view[task.rows], view[task.split.prepared.corpus.test]
    own = [task.targets == c for c in range(task.classes)]
    means = np.stack([rows[one].sum(axis=0) / (one.sum() + 1) for one in own])
    return Fitted(4 * (test @ means.T - 0.5 * (means**2).sum(axis=1)))


def mixed_prototypes(task: Task) -> Fitted:
    """The default's scores plus those of the class means, whose weight falls with the number of labels."""
    share = 10 / (10 + len(task.rows) / task.classes)
    return Fitted((1 - share) * Model(standard()).run(task).test + share * prototypes(task).test)


def as_implemented(task: Task) -> Floats:
    """`fit_head` of this tree, calibrated, with the components that it would get."""
    views, matrix, seen = task.split.views, task.split.prepared.matrix, task.split.prepared.corpus.classes
    if "components" not in views:
        views["components"] = lsa_components(matrix.sparse[task.split.unlabeled])
    matrix = replace(matrix, components=views["components"])
    names = [seen[task.seen[target]] for target in task.targets]
    head = fit_head(matrix.rows(task.rows), names, seen, task.split.seed, True)
    found = head.logits(matrix.rows(task.split.prepared.corpus.test)) / head.temperature
    return np.asarray(found + np.array(head.shift)) if head.shift else found


def plain(model: Model, after: Callable[[Task, Fitted], Floats] | None = None) -> Callable[[Task], Floats]:
    def run(task: Task) -> Floats:
        found = model.run(task)
        return found.test if after is None else after(task, found)

    return run


def other(make: Callable[[Task], Fitted]) -> Callable[[Task], Floats]:
    return lambda task: make(task).test


DEFAULT, CHOSEN = "default", "with lsa, ramped, shifted"
_HELD = Model(standard(), held_out=True, pool=True)
CANDIDATES: dict[str, Callable[[Task], Floats]] = {
    DEFAULT: plain(Model(standard())),
    **{f"C={c:g}": plain(Model(standard(), c)) for c in (0.3, 1.0, 10.0, 30.0)},
    "encoder alone": plain(Model(only("encoder"))),
    "tfidf alone": plain(Model(only("tfidf"))),
    "tfidf x2": plain(Model(standard(scale=2))),
    "tfidf full from 50": plain(Model(standard(full=50))),
    "classes unweighted": plain(Model(standard(), power=0)),
    "classes half weighted": plain(Model(standard(), power=0.5)),
    "centered": plain(Model(standard("centered"))),
    "rescaled": plain(Model(standard("rescaled"))),
    "rescaled C=1": plain(Model(standard("rescaled"), 1.0)),
    "whitened .5": plain(Model(standard("whitened .5"))),
    "whitened .5 C=1": plain(Model(standard("whitened .5"), 1.0)),
    "whitened 1": plain(Model(standard("whitened 1"))),
    "with lsa": plain(Model(standard(more={"lsa": 1.0}))),
    "lsa for tfidf": plain(Model(standard(sparse="lsa"))),
    "with lsa, ramped": plain(Model(ramped({"tfidf": 1.0, "lsa": 1.0}))),
    "with lsa x.5, ramped": plain(Model(ramped({"tfidf": 1.0, "lsa": 0.5}))),
    "half lsa": plain(Model(ramped({"tfidf": 0.7, "lsa": 0.7}))),
    CHOSEN: plain(Model(ramped({"tfidf": 1.0, "lsa": 1.0}), held_out=True), shifted(1.0, 0.5)),
    "half lsa, shifted": plain(Model(ramped({"tfidf": 0.7, "lsa": 0.7}), held_out=True), shifted(1.0, 0.5)),
    "tfidf x.7, lsa x1, shifted": plain(Model(ramped({"tfidf": 0.7, "lsa": 1.0}), held_out=True), shifted(1.0, 0.5)),
    "as implemented": as_implemented,
    "half lsa, calibrated": plain(Model(ramped({"tfidf": 0.7, "lsa": 0.7}), held_out=True), tempered),
    "half lsa, self-trained": other(SelfTrained(blend=ramped({"tfidf": 0.7, "lsa": 0.7}))),
    "with sharp lsa": plain(Model(standard(more={"lsa sharp": 0.7}))),
    "with chars": plain(Model(standard(more={"chars": 0.7}))),
    "two heads": other(two_heads),
    "selected by loo": other(selected("best")),
    "selected by loo, 1 se": other(selected("1se")),
    "blended by loo": other(selected("blend")),
    "self-trained": other(SelfTrained()),
    "self-trained, sure": other(SelfTrained(sure=True)),
    "self-trained, soft": other(SelfTrained(soft=True)),
    "self-trained, weight 1": other(SelfTrained(weight=1.0)),
    "self-trained, weight 2": other(SelfTrained(weight=2.0)),
    "self-trained, twice": other(SelfTrained(rounds=2)),
    "self-trained, shifted": other(SelfTrained(shift=1.0)),
    "self-trained, shifted, unbalanced": other(SelfTrained(shift=1.0, balanced=False)),
    "self-trained, shifted, soft, weight 1": other(SelfTrained(weight=1.0, shift=1.0, soft=True)),
    "contrastive": other(contrastive),
    "prototypes": other(prototypes),
    "prototypes mixed in": other(mixed_prototypes),
}
AFTER: dict[str, Callable[[Task, Fitted], Floats]] = {
    "calibrated": tempered,
    "calibrated with bias": shifted(0.1),
    "calibrated with bias, middle": shifted(1.0),
    "calibrated with shrunk bias": shifted(3.0),
    "calibrated with balanced bias": shifted(1.0, 1.0),
    "calibrated with half balanced bias": shifted(1.0, 0.5),
    "calibrated with bias, half": halved(shifted(0.1)),
    "threshold by folds": thresholded(0),
    "threshold by folds, shrunk": thresholded(5),
    "pool shares by EM, half": em_prior,
}
"""Transformations of the default's scores; they share its fit."""


# Measuring ----------------------------------------------------------------------------------------------------------
def probabilities(task: Task, scores: Floats, classes: int) -> Floats:
    """As the product does it: a class without labels gets 1 / (labels + classes)."""
    least = 1 / (len(task.rows) + classes)
    proba = np.full((len(scores), classes), least)
    proba[:, task.seen] = (1 - least * (classes - task.classes)) * softmax(scores)
    proba += 1e-9
    return np.asarray(proba / proba.sum(axis=1, keepdims=True))


def measure(task: Task, scores: Floats) -> dict[str, float]:
    corpus = task.split.prepared.corpus
    proba = probabilities(task, scores, len(corpus.classes))
    truth, positive = corpus.truth[corpus.test], task.split.work.texts.positive
    found = evaluate(proba, truth, corpus.classes, np.random.default_rng(0), 0, positive=positive)
    return {name: float(getattr(found, name).value) for name in FIGURES}


def open_split(work: Work, seed: int, path: Path) -> Split:
    """The split with its TF-IDF, cached at `path`: counting the words of mails takes a minute."""
    from scipy.sparse import load_npz, save_npz

    if not path.exists():
        prepared = prepare(work, seed)
        beginning = path.with_name(f"part-{path.name}")
        save_npz(beginning, prepared.matrix.sparse)
        beginning.replace(path)
    prepared = prepare(replace(work, uses_tfidf=False), seed)
    return Split(work, replace(prepared, matrix=FeatureMatrix(work.dense, load_npz(path))), seed)


def labeled_sets(split: Split, design: str, seed: int) -> dict[int, Ints]:
    """Rows of the pool by number of labels, each set a subset of the next."""
    pool = split.prepared.corpus.pool
    if design == "random":
        order = pool[np.random.default_rng([seed, 1]).permutation(len(pool))]
        return {n: np.sort(order[:n]) for n in BUDGETS if n <= len(pool) // 2}
    curve = simulate_run(split.work, split.prepared, ASKED, seed)
    position = {split.prepared.corpus.item_ids[p]: int(p) for p in pool}
    rows = [position[query.item_id] for point in curve.points for query in point.queries]
    return {n: np.sort(np.array(rows[:n])) for n in BUDGETS if n >= 40 and n <= len(rows)}


def play(split: Split, design: str, seed: int, wanted: Sequence[str], path: Path) -> None:
    """Measure what the file lacks of this split's figures."""
    kept: dict[str, Any] = read_json(path, {}) or {}
    if "sets" not in kept:
        kept["sets"] = {str(n): rows.tolist() for n, rows in labeled_sets(split, design, seed).items()}
    corpus = split.prepared.corpus
    for n, listed in kept["sets"].items():
        rows = np.array(listed, np.intp)
        truth = corpus.truth[rows]
        seen = sorted(set(truth.tolist()))
        if len(seen) < 2:
            continue
        task = Task(split, rows, np.searchsorted(seen, truth), seen)
        found = kept.setdefault("figures", {}).setdefault(n, {})
        spent = kept.setdefault("seconds", {}).setdefault(n, {})
        shared: list[Fitted] = []
        for name in wanted:
            if name in found:
                continue
            began = time.process_time()
            if name in AFTER:
                if not shared:
                    shared.append(_HELD.run(task))
                scores = AFTER[name](task, shared[0])
            else:
                scores = CANDIDATES[name](task)
            spent[name] = round(time.process_time() - began, 3)
            if not np.isfinite(scores).all():
                raise ValueError(f"{name}: scores are not finite")
            found[name] = measure(task, scores)
        write_json(path, kept)
    write_json(path, kept)


def table(folder: Path) -> dict[str, Any]:
    """For each kind of labelled set, candidate and metric: its paired difference from the default."""
    found: dict[str, Any] = {}
    for design in DESIGNS:
        differences: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
        levels: dict[str, dict[str, list[float]]] = {}
        for path in sorted(folder.glob(f"*-{design}-*.json")):
            name = path.name.removesuffix(".json").rpartition(f"-{design}-")[0]
            for n, figures in (read_json(path, {}) or {}).get("figures", {}).items():
                for candidate, measured in figures.items():
                    for figure in FIGURES:
                        if candidate == DEFAULT:
                            levels.setdefault(figure, {}).setdefault(name, []).append(measured[figure])
                            continue
                        gap = measured[figure] - figures[DEFAULT][figure]
                        own = differences.setdefault((candidate, figure), {}).setdefault(name, {})
                        own.setdefault(int(n), []).append(gap)
        rows: dict[str, Any] = {}
        for (candidate, figure), by_corpus in differences.items():
            rows.setdefault(candidate, {})[figure] = summarize(by_corpus, lower_is_better=figure == "log_loss")
        means = {f: {name: rounded(np.mean(v)) for name, v in own.items()} for f, own in levels.items()}
        found[design] = {"default": means, "differences": rows}
    return found


def summarize(by_corpus: Mapping[str, Mapping[int, Sequence[float]]], lower_is_better: bool) -> dict[str, Any]:
    """Means over the sets of each corpus, then over corpora; Student's interval over corpora; the worst corpus."""
    sign = -1.0 if lower_is_better else 1.0
    means = {name: float(np.mean([v for values in own.values() for v in values])) for name, own in by_corpus.items()}
    values = np.array(list(means.values()))
    row: dict[str, Any] = {"mean": rounded(values.mean())}
    if len(values) > 1:
        found = mean_interval(values, 0.95)
        row["interval"] = [rounded(found.low), rounded(found.high)]
    worst = min(means, key=lambda name: sign * means[name])
    row |= {"worst": [worst, rounded(means[worst])], "better_on": int((sign * values > 0).sum())}
    budgets = sorted({n for own in by_corpus.values() for n in own})
    row["by_labels"] = {
        str(n): rounded(np.mean([np.mean(own[n]) for own in by_corpus.values() if n in own])) for n in budgets
    }
    row["by_corpus"] = {name: rounded(value) for name, value in sorted(means.items())}
    row["sets"] = {name: sum(map(len, own.values())) for name, own in sorted(by_corpus.items())}
    return row


def rounded(value: Any) -> float:
    """Round to four decimals."""
    return round(float(value), 4)


def spent(folder: Path) -> dict[str, float]:
    """The maximum CPU seconds of a candidate on one labelled set, once its views exist."""
    most: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        for by_candidate in (read_json(path, {}) or {}).get("seconds", {}).values():
            for candidate, seconds in by_candidate.items():
                most[candidate] = max(most.get(candidate, 0.0), seconds)
    return most


def main() -> None:
    """Measure what is missing; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--candidates", default="")
    parser.add_argument("--designs", default=",".join(DESIGNS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--record", action="store_true", help="write the record of what there is, and measure nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.record:
        sizes = {"budgets": list(BUDGETS), "unlabeled": UNLABELED, "chosen": CHOSEN}
        record("models", {**sizes, **table(options.work), "most_cpu_seconds": spent(options.work)})
        return
    names = [name for name in (*CORPORA, *RARE) if re.search(options.only, name)]
    wanted = [DEFAULT] + [c for c in (*CANDIDATES, *AFTER) if c != DEFAULT and re.search(options.candidates, c)]
    began = time.perf_counter()
    with threadpool_limits(1):
        for number in range(options.seeds):
            for name in names:
                texts = load(name, options.data, options.work)
                params = parameters(READERS[FAMILIES.get(name, name)][1])
                vectors = corpus_vectors(texts, params.features, options.data, None)
                work = make_work(texts, params, Options(strategies=(ASKED,), budget=500), vectors)
                seed = params.seed + number
                split: Split | None = None
                for design in options.designs.split(","):
                    path = options.work / f"{name}-{design}-{seed}.json"
                    split = split or open_split(work, seed, options.work / f"{name}-{seed}.npz")
                    play(split, design, seed, wanted, path)
                print(f"{name} {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
