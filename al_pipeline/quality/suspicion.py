"""Who differs from the others, with the evidence: who answers whatever the item is, and who confuses two classes.

Whether somebody guesses is decided by what the others' answers alone say of each item: measured against somebody who
guesses, the others would look less able. For all else each answer is compared with the consensus of the item's other
annotators, in K (A, C, C): answers by annotator, class of that consensus, and class given. A colleague gives the
classes with the rates of all others. With fewer than three annotators nobody is named, since which of two is wrong
cannot be told.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from msgspec import Struct
from scipy.special import bdtrc

from al_pipeline.annotation.dawid_skene import FEWEST_PEOPLE, ErrorRates, posterior_classes, prior_answers
from al_pipeline.annotation.vote_arrays import Flags, Floats, Indices, VoteArrays
from al_pipeline.quality.answers import SKIP, Votes, consensus_of_others

SIGNIFICANCE = 0.015
"""The largest share of ordinary colleagues who are named as guessing. Most colleagues are better than ordinary ones."""
CONFUSING = 0.01
"""The largest share of ordinary colleagues who are named as confusing two classes."""
SKILL = 0.85
"""An ordinary colleague works as the others in at least this share of the answers, and guesses in the rest."""
WEAK = 0.7
"""A weak colleague works as the others in this share. Nobody is named who is more like one than like a guesser."""
FEWEST = 10
"""Nobody is named for fewer answers than this."""
RATE = 0.1
"""An ordinary colleague confuses two classes at most twice as often as the others, or this much more often."""
SEED = 20_230_711

_CONFUSED = -3.0
"""Whoever has a lower ratio to a colleague who confuses two classes is taken for one, and not for somebody who guesses.
"""
_DRAWS = 2000
_MOST_ITEMS = 1000
"""Of somebody's items, and of the others', so many decide."""
_BEYOND_DOUBT = 50.0
"""A ratio that no simulation reaches: the odds of an ordinary colleague are about exp(-50)."""


class Guesses(Struct, frozen=True):
    """Someone whose answers are better explained by guessing than by the work of a colleague."""

    annotator: int
    answers: int
    """Answers to items on which the others have a consensus."""
    agreeing: int
    expected: float
    """Share that a colleague would agree in, on the same items."""
    chance: float
    """Share that guessing with the same frequencies of classes would agree in."""
    ratio: float
    """Natural logarithm of how many times as likely guessing gives these answers as an ordinary colleague's work."""
    p: float
    """Probability that an ordinary colleague has such a ratio."""


class Confuses(Struct, frozen=True):
    """Someone who confuses two classes (numbers) more often than the others."""

    annotator: int
    first: int
    second: int
    answers: int
    """Answers with one of the two classes where the others agree on one of them."""
    wrong: int
    others: float
    """Share of the others' answers that are."""
    p: float
    """Probability of so many from an ordinary colleague, times the number of pairs of classes."""


class Standing(NamedTuple):
    """The result of `who_stands_out`."""

    guesses: tuple[Guesses, ...]
    confuses: tuple[Confuses, ...]
    cells: Cells
    """Counts against the consensus of others without those who guess."""


class Cells(NamedTuple):
    """K, as its values above 0: n cells."""

    annotator: Indices
    consensus: Indices
    label: Indices
    answers: Indices
    people: int
    classes: int

    @property
    def compared(self) -> int:
        """The number of annotators with an answer to compare."""
        return len(np.unique(self.annotator))

    def table(self, person: int | None = None) -> Floats:
        """(C, C) of one annotator, or of all together."""
        chosen = slice(None) if person is None else np.flatnonzero(self.annotator == person)
        cells = self.consensus[chosen] * self.classes + self.label[chosen]
        counts = np.bincount(cells, self.answers[chosen], self.classes**2)
        return counts.astype(np.float64).reshape(self.classes, self.classes)

    def but(self, without: Flags) -> Cells:
        """Those of other annotators."""
        kept = ~without[self.annotator]
        return self._replace(
            annotator=self.annotator[kept],
            consensus=self.consensus[kept],
            label=self.label[kept],
            answers=self.answers[kept],
        )


def against_consensus(votes: Votes, without: Flags | None = None) -> Cells:
    """Count answers against the consensus of others; `votes` without skips. `without`: see `consensus_of_others`."""
    consensus, classes = consensus_of_others(votes, without), max(1, len(votes.classes))
    chosen = consensus != SKIP
    keys = (votes.annotator[chosen] * classes + consensus[chosen]) * classes + votes.label[chosen]
    cells, counts = np.unique(keys, return_counts=True)
    rest, label = np.divmod(cells, classes)
    annotator, agreed = np.divmod(rest, classes)
    return Cells(annotator, agreed, label, counts, len(votes.annotators), classes)


def who_stands_out(votes: Votes) -> Standing:
    """Name those who guess, one after another, each no longer part of the others; then those who confuse classes.

    At most half of the annotators are named as guessing: the others are the measure.
    """
    out = np.zeros(len(votes.annotators), bool)
    guesses: list[Guesses] = []
    cells = against_consensus(votes)
    for _ in range((cells.compared - 1) // 2):
        found = _most_suspect(votes, cells, out)
        if found is None:
            break
        guesses.append(found)
        out[found.annotator] = True
        cells = against_consensus(votes, out)
    confuses = _confusions(cells, out) if cells.but(out).compared >= FEWEST_PEOPLE else []
    return Standing(tuple(guesses), tuple(confuses), cells)


def _most_suspect(votes: Votes, cells: Cells, out: Flags) -> Guesses | None:
    team = cells.but(out).table()
    found: list[Guesses] = []
    for person in map(int, np.unique(cells.annotator)):
        mine = cells.table(person)
        if not out[person] and mine.sum() >= FEWEST:
            one = _guessing(person, mine, team - mine, votes, out)
            found.extend([] if one is None else [one])
    return max(found, key=lambda one: (one.ratio, -one.annotator), default=None)


def _guessing(person: int, mine: Floats, others: Floats, votes: Votes, out: Flags) -> Guesses | None:
    """Whether someone's answers, `mine` (C, C) in K, are more likely from guessing than from a colleague of `others`.

    K is a first look: what the others agree on among themselves is partly against this person's answers.
    """
    counts = others + prior_answers(len(others))
    rates = counts / counts.sum(axis=1, keepdims=True)
    total, mix = mine.sum(), mine.sum(axis=0) / mine.sum()
    first = SKILL * rates + (1 - SKILL) * mix
    if (mine * np.log(np.maximum(mix, 1e-12) / np.maximum(first, 1e-12))).sum() <= 0:
        return None
    expected, label, seen = _by_others(person, votes, out)
    if _ratio(label, expected, WEAK)[0] <= 0:
        return None
    p = _tail(label, expected)
    if p > SIGNIFICANCE:
        return None
    pair = _worst_pair(label, seen.posteriors, expected)
    if pair is not None:
        confused = seen.rates[0].copy()
        confused[list(pair)] = confused[list(pair)].mean(axis=0)
        if _ratio(label, seen.posteriors @ confused)[0] <= _CONFUSED:
            return None  # a colleague, apart from these two classes
    return Guesses(
        person,
        int(total),
        int(np.trace(mine)),
        float(mine.sum(axis=1) @ np.diag(rates) / total),
        float(mine.sum(axis=1) @ mix / total),
        float(_ratio(label, expected)[0]),
        p,
    )


def _by_others(person: int, votes: Votes, out: Flags) -> tuple[Floats, Indices, ErrorRates]:
    """What an average colleague would answer (n, C) to the items that somebody answered, what that person did (n,).

    Of the others' answers alone, which all have the same error rates; `out`: annotators without a say. Of more than
    _MOST_ITEMS items, a sample. The third: rates (1, C, C), and the classes' probabilities (n, C).
    """
    said = ~out[votes.annotator] & (votes.annotator != person)
    mine = votes.annotator == person
    told = np.zeros(votes.item[-1] + 1, bool)
    told[votes.item[said]] = True
    order = np.random.default_rng(SEED).permutation(len(told))
    shared = np.zeros(len(told), bool)
    shared[votes.item[mine]] = True
    shared &= told
    used = np.concatenate([order[shared[order]][:_MOST_ITEMS], order[(told & ~shared)[order]][:_MOST_ITEMS]])
    place = np.full(len(told), -1)
    place[used] = np.arange(len(used))
    said &= place[votes.item] >= 0
    mine &= place[votes.item] >= 0
    item = place[votes.item[said]]
    others = VoteArrays(item, np.zeros_like(item), votes.label[said], ("others",), votes.classes)
    found = posterior_classes(others, len(used))
    found = found._replace(posteriors=found.posteriors[place[votes.item[mine]]])
    return found.posteriors @ found.rates[0], votes.label[mine], found


def _ratio(label: Indices, expected: Floats, skill: float = SKILL) -> Floats:
    """(b,) log-likelihood of guessing minus that of an ordinary colleague, of answers (b, n) or (n,).

    Guessing gives each class with its share of the person's answers, whatever the item. `expected` (n, C): what an
    average colleague gives.
    """
    label = label.reshape(-1, label.shape[-1])
    rows = np.arange(len(label))[:, None]
    mix = np.zeros((len(label), expected.shape[1]))
    np.add.at(mix, (rows, label), 1 / label.shape[1])
    guess = mix[rows, label]
    colleague = skill * expected[np.arange(label.shape[1]), label] + (1 - skill) * guess
    return np.asarray(np.log(guess / colleague).sum(axis=1))


def _tail(label: Indices, expected: Floats) -> float:
    """The probability that an ordinary colleague has a ratio as high, by simulation with a fixed seed.

    What is no work of such a colleague's falls on the classes like this person's answers, or evenly: the more probable.
    """
    observed, (answers, classes) = _ratio(label, expected)[0], expected.shape
    if observed > _BEYOND_DOUBT:
        return 1 / (_DRAWS + 1)
    places, reached = np.arange(answers), []
    for rest in (np.bincount(label, minlength=classes) / answers, np.full(classes, 1 / classes)):
        rng = np.random.default_rng(SEED)
        bounds = np.cumsum(SKILL * expected + (1 - SKILL) * rest, axis=1)
        # One search for all items: the classes of item i lie between i and i + 1.
        bounds = (bounds / bounds[:, -1:] + places[:, None]).ravel()
        count, step = 0, max(1, 2_000_000 // answers)
        for start in range(0, _DRAWS, step):
            points = rng.random((min(step, _DRAWS - start), answers)) + places
            drawn = np.searchsorted(bounds, points, "right") - places * classes
            count += int((_ratio(np.minimum(drawn, classes - 1), expected) >= observed).sum())
        reached.append(count)
    return (max(reached) + 1) / (_DRAWS + 1)


def _worst_pair(label: Indices, true: Floats, expected: Floats) -> tuple[int, int] | None:
    """The two classes that someone confuses most in excess of the others; None with two classes or without any.

    `label` (n,): the answers; `true` (n, C): the probabilities of the classes; `expected`: see `_by_others`.
    """
    classes = true.shape[1]
    if classes < 3:
        return None
    given = np.zeros_like(true)
    given[np.arange(len(label)), label] = 1
    excess = true.T @ (given - expected)
    np.fill_diagonal(excess, 0)
    both = np.triu(excess + excess.T, 1)
    place = int(both.argmax())
    return divmod(place, classes) if both.flat[place] > 0 else None


def _confusions(cells: Cells, out: Flags) -> list[Confuses]:
    """Those who confuse two classes more often than an ordinary colleague, and do not guess."""
    team, classes = cells.but(out).table(), cells.classes
    tests = max(1, classes * (classes - 1) // 2)
    found = []
    for person in np.unique(cells.annotator):
        if out[person]:
            continue
        mine = cells.table(int(person))
        others = team - mine
        wrong, both = _pair_counts(mine)
        their_wrong, their_both = _pair_counts(others)
        rate = (their_wrong + 0.5) / (their_both + 1)
        ordinary = np.minimum(np.maximum(2 * rate, rate + RATE), 1)
        p = np.ones_like(rate)
        tested = (both >= FEWEST) & (wrong > 1) & (ordinary < 1)
        p[tested] = bdtrc(wrong[tested] - 1, both[tested].astype(int), ordinary[tested]) * tests
        for first, second in np.argwhere(np.triu(p <= CONFUSING, 1)).tolist():
            found.append(
                Confuses(
                    int(person),
                    first,
                    second,
                    int(both[first, second]),
                    int(wrong[first, second]),
                    float(rate[first, second]),
                    float(p[first, second]),
                )
            )
    return sorted(found, key=lambda one: (one.p, one.annotator, one.first, one.second))


def _pair_counts(table: Floats) -> tuple[Floats, Floats]:
    """(C, C) for every two classes: answers that name the other of the two, and all that name one of them."""
    right = np.diag(table)
    wrong = table + table.T
    return wrong, wrong + right[:, None] + right[None, :]
