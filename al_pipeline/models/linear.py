"""A linear classifier on frozen features: class-weighted softmax regression, calibrated on held-out labels.

It is fitted from scratch by L-BFGS in float64 on one thread, so that the same labels give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.models.approximate import ApproximateMargins, Columns
from al_pipeline.models.calibration import calibration_folds, fit_temperature_and_shift
from al_pipeline.models.feature_matrix import FULL_TFIDF, FeatureMatrix, Floats, feature_scales, row_products
from al_pipeline.models.probabilities import FLOOR, class_weights, count_classes, log_softmax, over_all_classes, softmax
from al_pipeline.threads import one_thread

Weights = NDArray[np.float32]

STRENGTH = 3.0
"""Inverse strength of the L2 penalty (C); measured in benchmarks/results/head.json."""
_MAX_KERNEL = 3000
"""With more labels the fit uses the features instead of the kernel, whose size grows with the square of the labels."""
_SURE_KERNEL = 500
"""With fewer labels than columns, and at most so many, the fit always uses the kernel."""
_KERNEL_RATE = 1000
"""Between the two the kernel is faster for n labels up to n^2.5 = rate * classes * columns: its cost grows with n^2 to
n^3, that of the features with classes * columns (measured by benchmarks/head_speed.py).
"""
_JITTER = 1e-9
"""Added to the kernel's diagonal, to keep it positive definite even if two texts have the same features."""
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
) -> Head:
    """Fit a classifier from scratch; with labels of fewer than two classes it predicts from their counts alone.

    All classes have the same total weight. `calibrate` fits a temperature and a shift for each class on the logits of
    held-out stratified folds. Raises BadInput if a label is not a class, ValueError if labels and features differ
    in number.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(features)} rows of features")
    counts, targets = count_classes(labels, classes)
    if len(counts) < 2:
        return Head(tuple(classes), counts, (), np.zeros(len(counts), np.float32), 1.0, ())
    with one_thread():
        blocks, restore = compact(features, len(counts), full_tfidf)
        fitted, bias = fit_softmax(blocks, targets, len(counts), strength)
        held_out = held_out_logits(blocks, targets, len(counts), strength, seed) if calibrate else []
        temperature, shift = fit_temperature_and_shift(held_out, targets, len(counts))
        weights = tuple(np.ascontiguousarray(part.T, np.float32) for part in restore(fitted))
    return Head(tuple(classes), counts, weights, bias.astype(np.float32), temperature, features.widths, shift)


def compact(
    features: FeatureMatrix, classes: int, full_tfidf: int = FULL_TFIDF
) -> tuple[list[Any], Callable[[list[Floats]], list[Floats]]]:
    """Blocks that give the same fit in fewer columns, and a function that maps the weights back to the features.

    By the representer theorem W = X^T A, so with n < d rows it suffices to fit V = L^T A on a Cholesky factor L of the
    kernel X X^T = L L^T, (n, n). Twenty classes on 50,000 terms then take seconds, not minutes.
    """
    scales = feature_scales(features, full_tfidf)
    own = [block.astype(np.float64) * scale for block, scale in zip(features.blocks, scales, strict=True)]
    components = (
        None if features.sparse is None or features.components is None else features.components.astype(np.float64)
    )
    if components is not None:
        own += [np.asarray(own[-1] @ components)]

    def scale_back(fitted: list[Floats]) -> list[Floats]:
        """Weights on the features from weights on `own`."""
        if components is not None:
            fitted = [*fitted[:-2], fitted[-2] + components @ fitted[-1]]
        return [part * scale for part, scale in zip(fitted, scales, strict=True)]

    if not _kernel_is_faster(len(features), sum(block.shape[1] for block in own), classes):
        return own, scale_back
    from scipy.linalg import cholesky, solve_triangular
    from scipy.sparse import issparse

    kernel = np.zeros((len(features), len(features)))
    for block in own:
        product = block @ block.T
        kernel += product.toarray() if issparse(product) else product
    kernel[np.diag_indices(len(kernel))] += _JITTER
    factor = cholesky(kernel, lower=True)

    def restore(fitted: list[Floats]) -> list[Floats]:
        by_row = solve_triangular(factor, fitted[0], lower=True, trans="T")
        return scale_back([np.asarray(block.T @ by_row) for block in own])

    return [factor], restore


def _kernel_is_faster(labels: int, columns: int, classes: int) -> bool:
    """Whether a fit on the kernel's factor, (labels, labels), is faster than one on the features."""
    if labels >= min(columns, _MAX_KERNEL):
        return False
    return labels <= _SURE_KERNEL or labels**2.5 <= _KERNEL_RATE * classes * columns


def fit_softmax(
    blocks: Sequence[Any], targets: NDArray[np.intp], classes: int, strength: float, offset: Floats | None = None
) -> tuple[list[Floats], Floats]:
    """Minimise  sum_i w_i * -log softmax(x_i W + b + o_i)[y_i]  +  |W|^2 / (2 C),  with w_i = n / (classes * n of y_i).

    `offset`: o, (n, classes); None for 0. Returns W for each block, (width, classes), and b.
    """
    widths = [block.shape[1] for block in blocks]
    from scipy.optimize import minimize

    rows = np.arange(len(targets))
    importance = class_weights(targets, classes)
    cuts = np.cumsum([width * classes for width in widths])

    def unpack(flat: Floats) -> tuple[list[Floats], Floats]:
        *parts, bias = np.split(flat, cuts)
        return [part.reshape(-1, classes) for part in parts], bias

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights, bias = unpack(flat)
        logits = _logits(blocks, weights, bias)
        log_proba = log_softmax(logits if offset is None else logits + offset)
        value = -(importance * log_proba[rows, targets]).sum() + (flat[: cuts[-1]] ** 2).sum() / (2 * strength)
        error = np.exp(log_proba)
        error[rows, targets] -= 1
        error *= importance[:, None]
        slopes = [(block.T @ error + part / strength).ravel() for block, part in zip(blocks, weights, strict=True)]
        return float(value), np.concatenate([*slopes, error.sum(axis=0)])

    start = np.zeros(int(cuts[-1]) + classes)
    options = {"maxiter": 1000, "maxcor": 20, "gtol": 1e-5, "ftol": 1e-12}
    return unpack(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)


def held_out_logits(
    blocks: Sequence[Any],
    targets: NDArray[np.intp],
    classes: int,
    strength: float,
    seed: int,
    offset: Floats | None = None,
) -> list[tuple[NDArray[np.intp], Floats]]:
    """For each calibration fold the held-out rows and their logits (rows, classes), -inf for unknown classes.

    `offset`: as in `fit_softmax`, for all rows.
    """
    held_out: list[tuple[NDArray[np.intp], Floats]] = []
    for train, test, known in calibration_folds(targets, seed):
        own = None if offset is None else offset[np.ix_(train, known)]
        weights, bias = fit_softmax(
            [block[train] for block in blocks], np.searchsorted(known, targets[train]), len(known), strength, own
        )
        logits = np.full((len(test), classes), -np.inf)
        logits[:, known] = _logits([block[test] for block in blocks], weights, bias)
        if offset is not None:
            logits += offset[test]
        held_out.append((test, logits))
    return held_out


def _logits(blocks: Sequence[Any], weights: Sequence[NDArray[Any]], bias: NDArray[Any]) -> Floats:
    """x W + b over all blocks, (n, classes)."""
    return _sums([block @ part for block, part in zip(blocks, weights, strict=True)], bias)


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
