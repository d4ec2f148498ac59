"""Annotators who make mistakes on a corpus whose true classes are known, and the labels that their answers give.

Who answers what is a function of the seed, the item and the annotator alone: simulations with other strategies or more
answers per item get the same answers where they ask the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.random import SeedSequence
from numpy.typing import NDArray

from al_pipeline.active_learning.relabeling import MOST_TASKS
from al_pipeline.active_learning.sampling import keyed_hashes
from al_pipeline.annotation.aggregation import fold, most_asked
from al_pipeline.annotation.answered import Answered, answered_items
from al_pipeline.annotation.confidence import Forecasts, rule_for
from al_pipeline.annotation.votes import times_asked
from al_pipeline.errors import UsageError
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.params import MAJORITY, Labels
from al_pipeline.records import Event, ModelForecast, Query, push_key

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
NoiseKind = Literal["uniform", "confusable", "careless-person"]
KINDS: tuple[NoiseKind, ...] = get_args(NoiseKind)
WORKSPACE = "simulation"
"""The workspace id in push keys."""


@dataclass(frozen=True, kw_only=True)
class Team:
    """How many annotators there are, and how often and how they are wrong."""

    annotators: int
    noise: float
    """Mean share of wrong answers."""
    kind: NoiseKind = "uniform"

    def check(self, classes: int) -> None:
        """Raise UsageError if there cannot be such a team for a corpus of `classes` classes."""
        if self.annotators < 1:
            raise UsageError(f"--annotators must be at least 1, got {self.annotators}")
        if self.kind not in KINDS:
            raise UsageError(f"unknown kind of noise {self.kind!r}; choose from {', '.join(KINDS)}")
        guessing = (classes - 1) / classes
        if not 0 <= self.noise < guessing:
            raise UsageError(
                f"--noise {self.noise:g} must be at least 0 and below {guessing:.2f}, the share of wrong answers of "
                f"somebody who guesses among {classes} classes"
            )


def error_rates(team: Team, classes: int) -> Floats:
    """(N,) each annotator's share of wrong answers; their mean is `team.noise`.

    A careless person makes all mistakes, up to those of somebody who guesses; the others make the rest, evenly.
    """
    rates = np.full(team.annotators, team.noise)
    if team.kind == "careless-person":
        total = team.noise * team.annotators
        rates[0] = min(total, (classes - 1) / classes) if team.annotators > 1 else team.noise
        rates[1:] = (total - rates[0]) / max(1, team.annotators - 1)
    return rates


def nearest_classes(features: FeatureMatrix, truth: Indices, classes: int) -> Indices:
    """(C,) for each class the other one whose centroid is most similar to its own, by the features of all texts."""
    members = np.eye(classes)[truth]
    similarity = np.zeros((classes, classes))
    for block in features.blocks:
        means = np.asarray(block.T @ members).T
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        similarity += means @ means.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1), np.intp)


def draw_answers(team: Team, truth: Indices, classes: int, seed: int, nearest: Indices | None = None) -> Indices:
    """(n, N) the class that each annotator gives to each item if asked.

    Wrong answers fall evenly on the other classes; with the kind `confusable` all on `nearest` (C,).
    """
    rng = np.random.default_rng([seed, 0x7EA])
    shape = len(truth), team.annotators
    wrong = rng.random(shape) < error_rates(team, classes)
    others = (truth[:, None] + rng.integers(1, max(2, classes), shape)) % classes
    if team.kind == "confusable":
        if nearest is None:
            raise ValueError("confusable classes need to know which are near")
        others = np.broadcast_to(nearest[truth][:, None], shape)
    return np.where(wrong, others, truth[:, None]).astype(np.intp)


class Labeling(Protocol):
    """How queries become labels in a simulation."""

    @property
    def labels(self) -> Mapping[str, str]:
        """The class of each labelled item, by id."""
        ...

    @property
    def ties(self) -> Sequence[str]:
        """Items to ask again because their answers are tied."""
        ...

    @property
    def ignored(self) -> Collection[str]:
        """Items that are not asked any more and have no label."""
        ...

    @property
    def answers(self) -> int:
        """The number of answers so far."""
        ...

    def ask(self, queries: Sequence[Query], round_number: int, forecasts: Forecasts) -> None:
        """Answer a batch. `forecasts`: what the newest model says of its items; empty before the first label."""
        ...

    def answered(self) -> Mapping[str, Answered]:
        """The items that people answered; empty if nothing can be gained by asking again."""
        ...


@dataclass
class TrueLabels:
    """Everybody is right: an answer to an item is its label."""

    truth: Mapping[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    ties: Sequence[str] = ()
    ignored: Collection[str] = frozenset()

    @property
    def answers(self) -> int:
        """The number of answers so far."""
        return len(self.labels)

    def ask(self, queries: Sequence[Query], round_number: int, forecasts: Forecasts) -> None:
        """Answer a batch."""
        self.labels |= {query.item_id: self.truth[query.item_id] for query in queries}

    def answered(self) -> Mapping[str, Answered]:
        """Nothing, since all labels are right."""
        return {}


@dataclass
class TeamLabels:
    """A team answers, `overlap` people each task, and the product's fold makes labels of the answers.

    A task of an item that was asked in an earlier round can fall to somebody who answered it then, as in Label Studio;
    that person repeats the answer.
    """

    given: Mapping[str, Sequence[str]]
    """The class that each annotator gives, by item id."""
    classes: Sequence[str]
    overlap: int
    relabels: bool
    seed: int
    method: Labels = MAJORITY
    """By which consensus; adaptive overlap is not simulated."""
    labels: dict[str, str] = field(default_factory=dict)
    ties: Sequence[str] = ()
    ignored: Collection[str] = frozenset()
    answers: int = 0
    _events: list[Event] = field(default_factory=list)
    _forecasts: dict[str, Mapping[str, float]] = field(default_factory=dict)
    _tasks: dict[str, int] = field(default_factory=dict)
    _people: dict[str, set[int]] = field(default_factory=dict)

    @property
    def people(self) -> int:
        """The number of annotators."""
        return len(next(iter(self.given.values()), ()))

    def ask(self, queries: Sequence[Query], round_number: int, forecasts: Forecasts) -> None:
        """Answer a batch, and fold all answers again; a forecast counts if it was made before the first answer."""
        self._forecasts |= {item_id: shares for item_id, shares in forecasts.items() if item_id not in self._tasks}
        for query in queries:
            self._answer(query.item_id, round_number)
        events, people = self._events, self.people
        rule = rule_for(self.method, lambda: {item: ModelForecast(one) for item, one in self._forecasts.items()})
        folded = fold(events, self.classes, people, times_asked(events), rule, most_asked(self.relabels))
        self.labels = {row.item_id: row.label for row in folded.labeled}
        self.ties = [row.item_id for row in folded.unresolved if row.kind == "tie"]
        self.ignored = {row.item_id for row in folded.unresolved if row.kind == "ignored"}

    def answered(self) -> Mapping[str, Answered]:
        """The items that people answered."""
        return answered_items(self._events, self.classes, MOST_TASKS, self.people)

    def asked(self, item_id: str) -> frozenset[int]:
        """The numbers of the people who answered an item."""
        return frozenset(self._people.get(item_id, ()))

    def _answer(self, item_id: str, round_number: int) -> None:
        task = self._tasks[item_id] = self._tasks.get(item_id, 0) + 1
        names = [f"person-{number + 1}" for number in range(self.people)]
        order = np.argsort(keyed_hashes(names, SeedSequence([self.seed, task]), f"task {item_id}"), kind="stable")
        key = push_key(WORKSPACE, round_number, item_id)
        for person in order[: self.overlap].tolist():
            self.answers += 1
            self._people.setdefault(item_id, set()).add(person)
            event_id = annotation = f"{key}#{person}"
            self._events.append(
                Event(
                    event_id,
                    "label",
                    item_id,
                    item_id,
                    "pool",
                    round_number,
                    annotation,
                    names[person],
                    self.given[item_id][person],
                )
            )
