"""How far annotators agree beyond chance: Krippendorff's alpha, Fleiss' kappa, Cohen's kappa.

Intervals are percentile bootstraps over items (Efron & Tibshirani 1993, chapter 13). Items with the same set of labels
are drawn together, by one multinomial, so that the time depends on the number of different sets. A figure that is not
defined is None, with the reason; NaN never leaves this module.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from msgspec import Struct
from numpy.random import Generator
from scipy.sparse import csr_matrix

from al_pipeline.annotation.vote_arrays import Floats, Indices
from al_pipeline.evaluation.figures import Estimate
from al_pipeline.quality.answers import Profiles, Votes, pairs, profiles

RESAMPLES = 500
CONFIDENCE = 0.95
MOST_INTERVALS = 200
"""The number of pairs of annotators with an interval: 20 annotators are 190 pairs."""

NO_OVERLAP = "no item has answers of two people"
ONE_CLASS = "all answers name the same class"
_ITEMS_A_SET = 20
"""With fewer items for each set, resamples are drawn item by item."""
_CELLS = 2_000_000
"""Number of weights in memory at a time."""


class Agreement(Struct, frozen=True):
    """How far people agree on the items that two or more of them labelled."""

    items: int
    answers: int
    """Answers to these items."""
    share: Estimate
    """Share of the pairs of answers to an item that are equal, the mean over answers."""
    alpha: Estimate
    """Krippendorff's alpha, nominal (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, part C)."""
    kappa: Estimate
    """Fleiss' kappa (Fleiss 1971, equation 7), over the items with `raters` answers."""
    raters: int
    """The most frequent number of answers of an item; 0 without overlap. Fleiss' kappa needs an equal number."""
    classes: tuple[Estimate, ...]
    """Alpha of each class against all others."""


class PairKappa(Struct, frozen=True):
    """Cohen's kappa of two annotators (numbers) on the items that both labelled (Cohen 1960)."""

    first: int
    second: int
    items: int
    kappa: Estimate


def agreement(votes: Votes, rng: Generator, resamples: int = RESAMPLES) -> Agreement:
    """The agreement of `votes`, without skips."""
    found, classes = profiles(votes), len(votes.classes)
    if not len(found.items):
        nothing = Estimate(value=None, reason=NO_OVERLAP)
        return Agreement(0, 0, nothing, nothing, nothing, 0, (nothing,) * classes)
    raters = int(np.bincount(found.size.astype(np.int64), found.items).argmax())
    features = _features(found, classes, raters)
    frequency = found.items.astype(float)
    values = _figures((features.T @ frequency)[None], classes)[0]
    blocks = [_figures((features.T @ drawn.T).T, classes) for drawn in _draws(found.items, rng, resamples)]
    estimates = [
        _estimate(float(value), drawn, ONE_CLASS)
        for value, drawn in zip(values, np.concatenate(blocks).T if blocks else np.empty((len(values), 0)), strict=True)
    ]
    share, alpha, kappa, *per_class = estimates
    used = np.bincount(found.column, found.counts * frequency[found.row], minlength=classes)
    if np.count_nonzero(used) > 1:
        per_class = [
            one if used[c] else Estimate(value=None, reason="no answer to these items names it")
            for c, one in enumerate(per_class)
        ]
    answers = int(frequency @ found.size)
    return Agreement(int(frequency.sum()), answers, share, alpha, kappa, raters, tuple(per_class))


def _features(found: Profiles, classes: int, raters: int) -> csr_matrix:
    """(P, 4 + 3 C): what the figures are sums of.

    1, answers, disagreement, agreement of items with `raters` answers; then by class the answers, the disagreement of
    the class with all others, and the answers to items with `raters` answers.
    """
    size, row, column, counts = found.size, found.row, found.column, found.counts
    others = size - 1
    # With x answers of a class among m: x (m - x) / (m - 1) disagreeing pairs for each class (Krippendorff's o_ck).
    apart = counts * (size[row] - counts) / others[row]
    disagreement = np.bincount(row, apart, minlength=len(size))
    equal = (size == raters).astype(float)
    agreeing = equal * (1 - disagreement / size)
    sets = np.arange(len(size))
    values = [np.ones(len(size)), size, disagreement, agreeing, counts, 2 * apart, counts * equal[row], equal]
    rows = [sets, sets, sets, sets, row, row, row, sets]
    base = 5
    columns = [
        *(np.full(len(size), place) for place in range(4)),
        base + column,
        base + classes + column,
        base + 2 * classes + column,
        np.full(len(size), 4),
    ]
    shape = (len(size), base + 3 * classes)
    return csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape)


def _figures(sums: Floats, classes: int) -> Floats:
    """(b, 3 + C) share, alpha, Fleiss' kappa and alpha by class, of `sums` (b, 5 + 3 C); NaN where not defined."""
    _, answers, disagreement, agreeing, equal = sums[:, :5].T
    used, apart, rated = (sums[:, 5 + part * classes : 5 + (part + 1) * classes] for part in range(3))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = 1 - disagreement / answers
        alpha = _beyond((answers - 1) * disagreement, answers**2 - (used**2).sum(axis=1))
        total = rated.sum(axis=1)
        chance = ((rated / total[:, None]) ** 2).sum(axis=1)
        kappa = _beyond(1 - agreeing / equal, np.where(total**2 == (rated**2).sum(axis=1), 0.0, 1 - chance))
        per_class = _beyond((answers - 1)[:, None] * apart, 2 * used * (answers[:, None] - used))
    return np.column_stack([share, alpha, kappa, per_class])


def _beyond(observed: Floats, expected: Floats) -> Floats:
    """1 - observed / expected; NaN where nothing is expected."""
    return np.where(expected > 0, 1 - observed / expected, np.nan)


def _draws(items: Indices, rng: Generator, resamples: int) -> Iterator[Floats]:
    """Resamples of items as numbers of each label set, (b, P), some at a time.

    One multinomial, or where sets have few items, as with many classes, item by item: the same distribution, in the
    time that takes less.
    """
    sets, total = len(items), int(items.sum())
    step = max(1, _CELLS // sets)
    by_item = total < _ITEMS_A_SET * sets
    set_of = np.repeat(np.arange(sets, dtype=np.int32), items) if by_item else None
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        if set_of is None:
            yield rng.multinomial(total, items / total, size).astype(float)
            continue
        drawn = np.empty((size, sets))
        for row in drawn:
            row[:] = np.bincount(set_of[rng.integers(0, total, total, np.int32)], minlength=sets)
        yield drawn


def _estimate(value: float, drawn: Floats, undefined: str) -> Estimate:
    """A value with its interval, which is None if most resamples have no value."""
    if not np.isfinite(value):
        return Estimate(value=None, reason=undefined)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Estimate(value=value)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def pair_kappas(votes: Votes, rng: Generator, resamples: int = RESAMPLES) -> tuple[PairKappa, ...]:
    """Cohen's kappa of every two annotators with an item in common; `votes` without skips.

    Only the MOST_INTERVALS pairs with the most items have an interval.
    """
    people, classes = len(votes.annotators), max(1, len(votes.classes))
    keys: list[Indices] = []
    for first, second in pairs(votes):  # in the order of annotators, as `to_votes` sorts them
        both = votes.annotator[first] * people + votes.annotator[second]
        keys.append((both * classes + votes.label[first]) * classes + votes.label[second])
    if not keys:
        return ()
    cells, counts = np.unique(np.concatenate(keys), return_counts=True)
    both, labels = np.divmod(cells, classes**2)
    known, pair = np.unique(both, return_inverse=True)
    first_label, second_label = np.divmod(labels, classes)
    values = _cohen(pair, first_label, second_label, counts[None].astype(float))[0]
    items = np.bincount(pair, counts).astype(int)
    drawn = np.full((resamples, len(known)), np.nan)
    largest = np.sort(np.argsort(-items, kind="stable")[:MOST_INTERVALS])
    for number in largest if resamples else ():
        mine = pair == number
        weights = np.concatenate([*_draws(counts[mine], rng, resamples)])
        drawn[:, number] = _cohen(np.zeros_like(pair[mine]), first_label[mine], second_label[mine], weights)[:, 0]
    return tuple(
        PairKappa(
            *divmod(int(known[number]), people),
            int(items[number]),
            _estimate(float(values[number]), drawn[:, number], ONE_CLASS),
        )
        for number in range(len(known))
    )


def _cohen(pair: Indices, first: Indices, second: Indices, items: Floats) -> Floats:
    """(b, pairs) Cohen's kappa; NaN where it is not defined.

    `pair`, `first`, `second` (n,): the pair of annotators of a cell of their table, and the class that each of them
    gave; `items` (b, n): the number of items in each cell.
    """
    cells, ones = np.arange(len(pair)), np.ones(len(pair))
    classes = int(max(first.max(), second.max())) + 1
    used, place = np.unique(np.concatenate([pair * classes + first, pair * classes + second]), return_inverse=True)
    shape = (len(used), len(pair))
    mine, theirs = (csr_matrix((ones, (part, cells)), shape) for part in np.split(place, 2))
    sums = csr_matrix((ones, (pair, cells)))
    total, equal = (sums @ items.T).T, (sums @ (items * (first == second)).T).T
    products = (mine @ items.T) * (theirs @ items.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = (csr_matrix((np.ones(len(used)), (used // classes, np.arange(len(used))))) @ products).T / total**2
        return _beyond(1 - equal / total, np.where(chance == 1, 0.0, 1 - chance))
