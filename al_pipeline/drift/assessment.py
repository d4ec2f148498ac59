"""All of it at once: three tests, one alarm with a stated error rate, and the accuracy where it may be estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random import SeedSequence, default_rng
from numpy.typing import NDArray

from al_pipeline.drift.accuracy import calibrate, estimated_accuracy
from al_pipeline.drift.classes import ClassTest, class_test
from al_pipeline.drift.domain import DomainTest, domain_test
from al_pipeline.drift.permutations import permute
from al_pipeline.drift.vocabulary import NewWord, VocabularyTest, vocabulary_test
from al_pipeline.evaluation.figures import Estimate

if TYPE_CHECKING:
    from al_pipeline.drift.permutations import Floats

LEVEL = 0.03
"""The probability of an alarm if nothing has changed, at most."""
CARRIES_OVER = 0.05
"""The p-value of the domain classifier up to which no accuracy is estimated."""
PERMUTATIONS = 499
REFERENCE = 2000
"""Texts of the pool that are compared; a larger pool is sampled."""
WINDOW = 2000
"""Texts of the window that are compared; of more, a random sample."""
LEAST_WINDOW = 30
LEAST_TEST = 50
"""Items of the test set without which the predicted classes are not compared."""
_MOST_NEW = 10
_MOST_WORDS = 20
_EXAMPLES = 3
DOMAIN, CLASSES, WORDS = "domain classifier", "predicted classes", "vocabulary"


@dataclass(frozen=True)
class Texts:
    """Texts with what is known of them; (n,) each but for the arrays."""

    ids: Sequence[str]
    texts: Sequence[str]
    proba: Floats
    """By the model, (n, C)."""


@dataclass(frozen=True)
class Drift:
    """How the texts of a window differ from those of the pool."""

    reference: int
    window: int
    domain: DomainTest
    classes: ClassTest | None
    """None without a test set that is large enough."""
    vocabulary: VocabularyTest
    names: tuple[str, ...]
    accuracy: Estimate
    """Of the model on the window's texts."""
    ids: Sequence[str]
    texts: Sequence[str]
    """Of the window."""

    @property
    def p_values(self) -> dict[str, float]:
        """The p-value of each test that was made."""
        found = {DOMAIN: self.domain.p, WORDS: self.vocabulary.p}
        return found if self.classes is None else found | {CLASSES: self.classes.p}

    @property
    def found(self) -> tuple[str, ...]:
        """The tests that found a difference, the most significant first. If there is none, any does in 3 % at most."""
        return holm(self.p_values, LEVEL)

    @property
    def alarm(self) -> bool:
        """Whether any test did."""
        return bool(self.found)

    def newest(self, most: int = _MOST_NEW) -> list[dict[str, Any]]:
        """The window's texts that are the least like the reference by the domain classifier: id, text and score."""
        scores = self.domain.scores[self.reference :]
        rows = np.argsort(-scores, kind="stable")[:most]
        return [{"id": self.ids[row], "text": self.texts[row], "score": float(scores[row])} for row in rows]

    def words(self, most: int = _MOST_WORDS) -> list[NewWord]:
        """The new words, the most significant first."""
        return list(self.vocabulary.words[:most])

    def examples(self, word: NewWord) -> list[dict[str, str]]:
        """Some of the window's texts with a word, the least like the reference first: id and text."""
        scores = self.domain.scores[self.reference :]
        rows = sorted(word.rows, key=lambda row: (-scores[row], row))[:_EXAMPLES]
        return [{"id": self.ids[row], "text": self.texts[row]} for row in rows]

    def to_json(self) -> dict[str, Any]:
        """All figures, with examples."""
        shift = self.classes
        words = [
            {"word": one.word, "window": one.window, "reference": one.reference, "p": one.p}
            | {"examples": self.examples(one)}
            for one in self.words()
        ]
        return {
            "alarm": self.alarm,
            "found": list(self.found),
            "level": LEVEL,
            "permutations": PERMUTATIONS,
            "texts": {"reference": self.reference, "window": self.window},
            "domain": {"auc": self.domain.auc, "auc_p": self.domain.auc_p, "p": self.domain.p},
            "classes": None
            if shift is None
            else {
                "p": shift.p,
                "reference": dict(zip(self.names, shift.reference, strict=True)),
                "window": dict(zip(self.names, shift.window, strict=True)),
            },
            "vocabulary": {"p": self.vocabulary.p, "tested": self.vocabulary.tested, "words": words},
            "new": self.newest(),
            "accuracy": {name: getattr(self.accuracy, name) for name in ("value", "low", "high", "reason")},
        }


def compare(
    reference: Sequence[str],
    window: Texts,
    vectors: NDArray[np.floating],
    names: Sequence[str],
    test_proba: Floats,
    test_labels: Sequence[str | None],
    seed: int,
    permutations: int = PERMUTATIONS,
) -> Drift:
    """Compare the texts of a window with those of a reference; deterministic for a seed.

    `vectors` (n, d): of the reference's texts, then of the window's. `test_proba` (t, C): by the same model, of items
    that it was not trained on, drawn like the reference; predicted classes are compared with theirs, since a model
    predicts its training items too well. `test_labels` (t,): their labels, None where nobody has given one.
    """
    place = {name: number for number, name in enumerate(names)}
    truth = np.array([place.get(label, -1) if label is not None else -1 for label in test_labels], np.intp)
    first, second = (default_rng(one) for one in SeedSequence(seed).spawn(2))
    labels = permute(len(reference), len(window.texts), permutations, first)
    domain = domain_test(vectors, labels)
    classes = None
    if len(test_proba) >= LEAST_TEST:
        theirs, mine = (rows.argmax(axis=1) for rows in (test_proba, window.proba))
        classes = class_test(theirs, mine, len(names), permutations, second)
    known = truth >= 0
    return Drift(
        len(reference),
        len(window.texts),
        domain,
        classes,
        vocabulary_test([*reference, *window.texts], labels),
        tuple(names),
        _accuracy(window.proba, test_proba[known], truth[known], domain),
        window.ids,
        window.texts,
    )


def _accuracy(proba: Floats, test_proba: Floats, truth: NDArray[np.intp], domain: DomainTest) -> Estimate:
    """The estimated accuracy, withheld if the texts are of another kind than those that the calibration was made on."""
    if domain.p <= CARRIES_OVER:
        return Estimate(
            value=None,
            reason="the domain classifier tells these texts from the pool's "
            f"(p = {domain.p:.3f}), so the probabilities may not be calibrated on them; label a random sample",
        )
    return estimated_accuracy(proba, calibrate(test_proba, truth))


def holm(p_values: Mapping[str, float], level: float) -> tuple[str, ...]:
    """The tests rejected by Holm's method (1979): any true hypothesis with a probability of `level` at most."""
    found: list[str] = []
    for name, p in sorted(p_values.items(), key=lambda one: (one[1], one[0])):
        if p > level / (len(p_values) - len(found)):
            break
        found.append(name)
    return tuple(found)
