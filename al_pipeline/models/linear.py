"""A linear classifier on frozen features: class-weighted softmax regression, calibrated on held-out labels.

It is fitted from scratch (`softmax.py`), and the same labels give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.models.approximate import ApproximateMargins, Columns
from al_pipeline.models.calibration import fit_temperature_and_shift
from al_pipeline.models.feature_matrix import FULL_TFIDF, FeatureMatrix, Floats, row_products
from al_pipeline.models.probabilities import FLOOR, count_classes, over_all_classes, softmax
from al_pipeline.models.softmax import Parts, compact, fit_softmax, held_out_logits
from al_pipeline.threads import one_thread

Weights = NDArray[np.float32]

STRENGTH = 3.0
"""Inverse strength of the L2 penalty (C); measured in benchmarks/results/head.json."""
_MAX_SLACK = 0.01
"""With a larger error bound, approximate margins are useless: the logits are too large for single precision."""


@dataclass(frozen=True, eq=False)
class NamesOfHead:
    """The prior from the names of classes that a head was fitted with, see `al_pipeline/models/names.py`."""

    weight: float
    """0: the names are not used."""
    prototypes: NDArray[np.float32] | None
    """The prototype of each class, (C, d); None with weight 0."""


@dataclass(frozen=True)
class Head:
    """A fitted classifier: `weights` holds one (seen, width) array for each feature block, `bias` is (seen,).

    With labels of fewer than two classes it has no weights and uses no features.
    """

    classes: tuple[str, ...]
    """The schema's classes, in its order: the columns of the probabilities."""
    counts: Mapping[str, int]
    """Number of labels of each class that it distinguishes, in the schema's order."""
    weights: tuple[Weights, ...]
    bias: Weights
    temperature: float
    widths: tuple[int, ...]
    shift: tuple[float, ...] = ()
    """Added to the logits of the seen classes after division by the temperature; empty: nothing."""
    names: NamesOfHead | None = None
    """What it knows from the names of the classes; None if it does not use them."""

    @property
    def seen(self) -> tuple[str, ...]:
        """Classes that it distinguishes: those with labels; with the help of names, all."""
        return tuple(self.counts)

    def logits(self, features: FeatureMatrix) -> Floats:
        """Logits of the seen classes before calibration, (n, seen). Raises BadInput for features of other widths."""
        if not self.weights:
            return np.zeros((len(features), len(self.seen)))
        return _sums(self._products(features), self.bias)

    def _products(self, features: FeatureMatrix) -> list[NDArray[Any]]:
        """Each block's term of the logits, (n, seen)."""
        if features.widths != self.widths:
            raise BadInput(
                f"the model was fitted on features of widths {self.widths}, but got widths {features.widths} (another "
                "encoder or vocabulary)"
            )
        return [row_products(block, part) for block, part in zip(features.blocks, self.weights, strict=True)]

    def predict_proba(self, features: FeatureMatrix) -> Floats:
        """Class probabilities (n, C), columns in the schema's order; rows sum to 1.

        A class without labels gets its probability by Laplace's rule of succession. Raises BadInput for features of
        other widths.
        """
        return self._proba(self.logits(features))

    def _proba(self, logits: Floats) -> Floats:
        """Probabilities (n, C) for logits (n, seen)."""
        shared = softmax(logits / self.temperature + self._shift) if self.seen else logits
        return over_all_classes(shared, self.classes, self.counts)

    @property
    def _shift(self) -> Floats:
        """`shift` as an array, (seen,)."""
        return np.array(self.shift) if self.shift else np.zeros(len(self.seen))

    @property
    def _columns(self) -> list[int]:
        return [self.classes.index(name) for name in self.seen]

    @property
    def _unseen(self) -> float:
        """Probability of a class without labels."""
        return 1 / (sum(self.counts.values()) + len(self.classes))

    @property
    def _seen_mass(self) -> float:
        """Total probability of the seen classes."""
        return 1 - self._unseen * (len(self.classes) - len(self.seen))

    def columns(self, features: FeatureMatrix) -> Columns | None:
        """Each block's term of the logits, transposed to (seen, n); None if the head uses no features.

        `approximate_margins` and `exact` take them; those of several parts can be concatenated along n.
        """
        if not self.weights:
            return None
        return [np.array(product.T, order="C") for product in self._products(features)]

    def exact(self, columns: Columns) -> Floats:
        """Class probabilities (n, C), equal to the bit to those of `predict_proba`."""
        return self._proba(_sums([np.array(part.T, order="C") for part in columns], self.bias))

    def approximate_margins(self, columns: Columns) -> ApproximateMargins:
        """Margins of n items in single precision, vectorised over items: a class is a row."""
        seen, count = columns[0].shape
        with np.errstate(over="ignore", invalid="ignore"):  # then the slack is infinite
            logits = np.add(columns[0], self.bias[:, None], dtype=np.float32)
            for part in columns[1:]:
                logits += part
            logits *= np.float32(1 / self.temperature)
            logits += self._shift.astype(np.float32)[:, None]
            first, next_ = _two_largest(logits)
            likeliest = logits == first
            logits -= first
            share = np.float32(self._seen_mass) / np.exp(logits, out=logits).sum(axis=0)
            second = np.exp(next_ - first) * share
        if seen < len(self.classes):
            np.maximum(second, np.float32(self._unseen), out=second)
            some, likeliest = likeliest, np.zeros((len(self.classes), count), np.bool_)
            likeliest[self._columns] = some
        return ApproximateMargins(1 - (share - second), self._slack(columns), likeliest)

    def _slack(self, columns: Columns) -> float:
        """Bound on the error of approximate margins: twice the worst case.

        With unit roundoff u and logits up to m, a difference of two is wrong by at most 12 m u, its exponential by
        5 u more; the sum of C of them and two divisions bring the margin to (24 m + C + 16) u. A floor of f under each
        probability moves it by C f.
        """
        if not columns[0].size:
            return 0.0
        largest = sum(max(float(part.max()), -float(part.min())) for part in (*columns, self.bias))
        classes = len(self.classes)
        largest = largest / self.temperature + float(np.abs(self._shift).max(initial=0.0))
        slack = np.finfo(np.float32).eps * (24 * largest + classes + 16) + classes * FLOOR
        return float(slack) if slack < _MAX_SLACK else np.inf


def fit_head(
    features: FeatureMatrix,
    labels: Sequence[str],
    classes: Sequence[str],
    seed: int,
    calibrate: bool,
    strength: float = STRENGTH,
    full_tfidf: int = FULL_TFIDF,
    weights: Floats | None = None,
) -> Head:
    """Fit a classifier from scratch; with labels of fewer than two classes it predicts from their counts alone.

    All classes have the same total weight; `weights` (n,) are those of the labels within a class, None: equal ones.
    `calibrate` fits a temperature and a shift for each class on the logits of held-out stratified folds. Raises
    BadInput if a label is not a class, ValueError if labels and features differ in number.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(features)} rows of features")
    counts, targets = count_classes(labels, classes)
    if len(counts) < 2:
        return Head(tuple(classes), counts, (), np.zeros(len(counts), np.float32), 1.0, ())
    with one_thread():
        blocks, restore = compact(features, len(counts), full_tfidf)
        parts = Parts(blocks, weights)
        fit = fitted, bias = fit_softmax(parts, targets, len(counts), strength)
        held_out = held_out_logits(parts, targets, len(counts), strength, seed, fit) if calibrate else []
        temperature, shift = fit_temperature_and_shift(held_out, targets, len(counts))
        columns = tuple(np.ascontiguousarray(part.T, np.float32) for part in restore(fitted))
    return Head(tuple(classes), counts, columns, bias.astype(np.float32), temperature, features.widths, shift)


def _sums(products: Sequence[NDArray[Any]], bias: NDArray[Any]) -> Floats:
    """The sum of the blocks' terms and the bias, (n, classes)."""
    logits = np.empty(products[0].shape)
    np.add(products[0], bias.astype(np.float64), out=logits)
    for product in products[1:]:
        logits += product
    return logits


def _two_largest(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The largest and the second largest value of each column of (C, n), C >= 2; equal in a tie."""
    first, second = np.maximum(rows[0], rows[1]), np.minimum(rows[0], rows[1])
    for row in rows[2:]:
        np.maximum(second, np.minimum(first, row), out=second)
        np.maximum(first, row, out=first)
    return first, second
