"""What `al quality` and the report show of annotators and labels, computed once, with the evidence in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import asdict

from al_pipeline.annotation.dawid_skene import FEWEST_PEOPLE, ErrorRates, dawid_skene
from al_pipeline.annotation.vote_arrays import Flags, Floats
from al_pipeline.evaluation.figures import Estimate
from al_pipeline.evaluation.online import wilson
from al_pipeline.quality.accuracies import accuracies, enough_people
from al_pipeline.quality.agreement import CONFIDENCE, NO_OVERLAP, Agreement, agreement, pair_kappas
from al_pipeline.quality.answers import SKIP, Given, Votes, to_votes
from al_pipeline.quality.suspicion import Cells, Confuses, Guesses, Standing, who_stands_out

SEED = 20_111_125
"""Of all resamples, so that equal answers give equal intervals."""
RARE = 0.1
"""Two classes are confused if they are in more than this share of the answers with one of them."""
Cause = Literal["guideline", "training", "rare", "too few answers"]
"""Why two classes are confused: `guideline`: by several people, so that what the classes mean needs a clearer
description; `training`: only by those who are named; `rare`: they hardly are; or there are too few answers to tell."""

_NOBODY = "nobody else answered the same items, or the others disagree"
_SMALL = 0.005
"""Estimated rates below this are left out of JSON."""


class Person(Struct, frozen=True, kw_only=True):
    """One annotator."""

    name: str
    answers: int
    """Without skips."""
    skips: int
    seconds: float | None
    """Median time of an answer in seconds; `low_seconds` and `high_seconds` are its quartiles. None without times."""
    low_seconds: float | None
    high_seconds: float | None
    active_seconds: float
    """The times of all answers and skips together, each at most the cap."""
    compared: int
    """Answers to items on which the other annotators have a consensus."""
    agreement: Estimate
    """Share of these that are that consensus, with Wilson's interval."""
    by_class: tuple[tuple[int, int], ...]
    """For each class: answers where it is the consensus of the others, and those of them that agree."""
    accuracy: Estimate
    """Estimated share of right answers (Dawid & Skene)."""
    gold: Estimate
    """Share of right answers to gold, with Wilson's interval, of `gold_answers`."""
    gold_answers: int
    confusion: Mapping[str, Mapping[str, float]]
    """Estimated probability of each class given, by true class; small ones and classes without answers are left out.

    Empty if fewer than three people share items.
    """


class RoundAgreement(Struct, frozen=True):
    """The agreement of the answers to one round's tasks."""

    round: int
    agreement: Agreement


class PersonPair(Struct, frozen=True):
    """Cohen's kappa of two annotators on the items that both labelled."""

    first: str
    second: str
    items: int
    kappa: Estimate


class Remark(Struct, frozen=True):
    """An annotator who stands out, and the evidence."""

    annotator: str
    kind: Literal["guesses", "confuses"]
    evidence: str
    classes: tuple[str, ...]
    """The two classes that are confused; none for `guesses`."""
    p: float
    """The probability of such answers from an ordinary colleague; for `confuses`, times the number of pairs."""


class Confusion(Struct, frozen=True):
    """Two classes of which people give one where the others agree on the other."""

    first: str
    second: str
    answers: int
    """Answers with one of the two where the others agree on one of them, without those of people who guess."""
    wrong: int
    rate: Estimate
    rest: Estimate
    """The rate of all people except `annotators`."""
    annotators: tuple[str, ...]
    """Who stands out by it."""
    people: int
    """Number of people with such an answer."""
    cause: Cause


class Quality(Struct, frozen=True, kw_only=True):
    """The quality of the labels, and of each annotator's work."""

    classes: tuple[str, ...]
    items: int
    """Items with an answer; `shared` of them have answers of two people or more."""
    answers: int
    skips: int
    guess_shown: int
    """Answers given with the model's guess shown, with which people agree more than they would by themselves."""
    cap_seconds: float | None
    """The longest time that an answer counts for."""
    agreement: Agreement
    rounds: tuple[RoundAgreement, ...]
    people: tuple[Person, ...]
    pairs: tuple[PersonPair, ...]
    confusions: tuple[Confusion, ...]
    """The most frequent first."""
    remarks: tuple[Remark, ...]
    note: str
    """Why nobody can be named; empty if somebody could."""

    @property
    def shared(self) -> int:
        """The number of items with answers of two people or more."""
        return self.agreement.items

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {
            **asdict(self),
            "agreement": self._agreement(self.agreement),
            "rounds": [{"round": one.round, **self._agreement(one.agreement)} for one in self.rounds],
            "people": [
                {
                    **asdict(one),
                    "agreement": one.agreement.to_row(),
                    "accuracy": one.accuracy.to_row(),
                    "gold": one.gold.to_row(),
                    "by_class": {
                        name: {"answers": answers, "agreeing": agreeing}
                        for name, (answers, agreeing) in zip(self.classes, one.by_class, strict=True)
                        if answers
                    },
                }
                for one in self.people
            ],
            "pairs": [{**asdict(one), "kappa": one.kappa.to_row()} for one in self.pairs],
            "confusions": [
                {**asdict(one), "rate": one.rate.to_row(), "rest": one.rest.to_row()} for one in self.confusions
            ],
            "remarks": [asdict(one) for one in self.remarks],
        }

    def _agreement(self, one: Agreement) -> dict[str, Any]:
        return {
            **asdict(one),
            **{name: getattr(one, name).to_row() for name in ("share", "alpha", "kappa")},
            "classes": {name: value.to_row() for name, value in zip(self.classes, one.classes, strict=True)},
        }


def assess(
    given: Iterable[Given],
    classes: Sequence[str],
    guess_shown: int = 0,
    on_gold: Mapping[str, tuple[int, int]] | None = None,
) -> Quality:
    """The quality of the answers `given`, at most one for each annotator and item.

    `classes`: those of the schema. `on_gold`: right answers to gold and all of them, by annotator. Equal answers give
    an equal result, in whatever order.
    """
    everything = to_votes(given, classes)
    votes = everything.labels
    rng = np.random.default_rng(SEED)
    standing = who_stands_out(votes)
    whole = agreement(votes, rng)
    rounds = [(int(n), agreement(votes.where(votes.round == n), rng)) for n in np.unique(votes.round)]
    names = votes.annotators
    pairs = [PersonPair(names[one.first], names[one.second], one.items, one.kappa) for one in pair_kappas(votes, rng)]
    return Quality(
        classes=everything.classes,
        items=len(np.unique(votes.item)),
        answers=len(votes.item),
        skips=len(everything.item) - len(votes.item),
        guess_shown=guess_shown,
        cap_seconds=everything.cap,
        agreement=whole,
        rounds=tuple(RoundAgreement(number, one) for number, one in rounds),
        people=_people(everything, standing.cells, on_gold or {}),
        pairs=tuple(pairs),
        confusions=_confusions(standing, everything),
        remarks=_remarks(standing, everything),
        note=_note(whole, standing.cells),
    )


def _people(everything: Votes, cells: Cells, on_gold: Mapping[str, tuple[int, int]]) -> tuple[Person, ...]:
    votes = everything.labels
    errors = dawid_skene(votes.arrays)
    accuracy = accuracies(votes, errors)
    people = []
    for number, name in enumerate(everything.annotators):
        mine = everything.where(everything.annotator == number)
        times = mine.labels.seconds[~np.isnan(mine.labels.seconds)]
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist() if len(times) else [None] * 3
        skips, table = int((mine.label == SKIP).sum()), cells.table(number)
        people.append(
            Person(
                name=name,
                answers=len(mine.item) - skips,
                skips=skips,
                seconds=middle,
                low_seconds=low,
                high_seconds=high,
                active_seconds=float(np.nansum(mine.seconds)),
                compared=int(table.sum()),
                agreement=_share(int(np.trace(table)), int(table.sum()), _NOBODY),
                by_class=tuple(
                    zip(table.sum(axis=1).astype(int).tolist(), np.diag(table).astype(int).tolist(), strict=True)
                ),
                accuracy=accuracy[number],
                gold=_share(*on_gold.get(name, (0, 0)), "no answers to gold"),
                gold_answers=on_gold.get(name, (0, 0))[1],
                confusion=_error_rates(errors, number, everything.classes),
            )
        )
    return tuple(people)


def _error_rates(errors: ErrorRates, person: int, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    if not enough_people(errors):
        return {}
    return {
        classes[row]: {
            classes[column]: round(float(errors.rates[person, row, column]), 4)
            for column in np.flatnonzero(errors.rates[person, row] >= _SMALL)
        }
        for row in np.flatnonzero(errors.answers[person] >= 1)
    }


def _share(count: int, total: int, reason: str) -> Estimate:
    if not total:
        return Estimate(value=None, reason=reason)
    low, high = wilson(count, total, CONFIDENCE)
    return Estimate(value=count / total, low=low, high=high)


def _confusions(standing: Standing, votes: Votes) -> tuple[Confusion, ...]:
    """The pairs of classes that are confused, without the answers of those who guess."""
    guessing = _flags(votes, [one.annotator for one in standing.guesses])
    cells, classes = standing.cells.but(guessing), len(votes.classes)
    apart = cells.consensus != cells.label
    agreeing = np.bincount(cells.label[~apart], cells.answers[~apart], classes)
    keys = np.minimum(cells.consensus, cells.label) * classes + np.maximum(cells.consensus, cells.label)
    pairs, place = np.unique(keys[apart], return_inverse=True)
    wrong = np.bincount(place, cells.answers[apart], len(pairs))
    people = np.bincount(np.unique(place * cells.people + cells.annotator[apart]) // cells.people, minlength=len(pairs))
    named: dict[int, list[Confuses]] = {}
    for one in standing.confuses:
        named.setdefault(one.first * classes + one.second, []).append(one)
    found = []
    for number, pair in enumerate(pairs.tolist()):
        first, second = divmod(pair, classes)
        count, total = int(wrong[number]), int(wrong[number] + agreeing[first] + agreeing[second])
        theirs = named.get(pair, [])
        rest = _share(
            count - sum(one.wrong for one in theirs), total - sum(one.answers for one in theirs), "nobody else"
        )
        others = int(people[number]) - len(theirs)
        found.append(
            Confusion(
                votes.classes[first],
                votes.classes[second],
                total,
                count,
                _share(count, total, "no answers"),
                rest,
                tuple(votes.annotators[one.annotator] for one in theirs),
                int(people[number]),
                _cause(rest, others, bool(theirs)),
            )
        )
    return tuple(sorted(found, key=lambda one: (-one.wrong, one.first, one.second)))


def _cause(rest: Estimate, others: int, named: bool) -> Cause:
    """`rest`: the rate without those who are `named`; `others`: how many others have such an answer."""
    if others > 1 and rest.low is not None and rest.low > RARE:
        return "guideline"
    if named:
        return "training"
    return "rare" if rest.high is not None and rest.high < RARE else "too few answers"


def _flags(votes: Votes, people: Sequence[int]) -> Flags:
    flags = np.zeros(len(votes.annotators), bool)
    flags[list(people)] = True
    return flags


def _remarks(standing: Standing, votes: Votes) -> tuple[Remark, ...]:
    names, classes = votes.annotators, votes.classes
    guesses = [Remark(names[one.annotator], "guesses", _of_guesses(one), (), one.p) for one in standing.guesses]
    confuses = [
        Remark(
            names[one.annotator],
            "confuses",
            _of_confuses(one, standing.cells.table(one.annotator), classes),
            (classes[one.first], classes[one.second]),
            one.p,
        )
        for one in standing.confuses
    ]
    return (*guesses, *confuses)


def _of_guesses(one: Guesses) -> str:
    return (
        f"agrees with the others in {one.agreeing} of {one.answers} answers "
        f"({_percent(one.agreeing / one.answers)}). A colleague would agree in {_percent(one.expected)}, and who "
        f"guesses with the same frequencies of classes in {_percent(one.chance)}. Guessing explains these answers "
        f"{_times(one.ratio)} times as well as an ordinary colleague's work; {_in_thousand(one.p)} in 1,000 such "
        "colleagues would look like this."
    )


def _of_confuses(one: Confuses, table: Floats, classes: Sequence[str]) -> str:
    ways = [
        f"{classes[given]} for {int(table[true, given])} of {int(table[true, [true, given]].sum())} that the others "
        f"call {classes[true]}"
        for true, given in ((one.first, one.second), (one.second, one.first))
        if table[true, given]
    ]
    return (
        f"says {' and '.join(ways)}: {_percent(one.wrong / one.answers)} of {one.answers} answers on these two "
        f"classes, against {_percent(one.others)} of the others'. Fewer than 1 in 100 ordinary colleagues would on "
        "any two classes."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _times(ratio: float) -> str:
    return f"{np.exp(ratio):,.0f}" if ratio < np.log(1e6) else "more than a million"


def _in_thousand(p: float) -> str:
    return "fewer than 1" if p < 0.001 else f"{1000 * p:.0f}"


def _note(whole: Agreement, cells: Cells) -> str:
    if not whole.items:
        return f"{NO_OVERLAP}: nothing can be compared"
    if cells.compared < FEWEST_PEOPLE:
        return "fewer than three people have answers to compare: which of two is wrong cannot be told"
    return ""
