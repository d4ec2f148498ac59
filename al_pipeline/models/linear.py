"""A linear classifier on frozen features: weighted softmax regression, calibrated on held-out labels.

Fitted from scratch by L-BFGS in float64 on one thread, so that the same labels give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput
from al_pipeline.models.approximate import ApproximateMargins, Columns

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Floats = NDArray[np.float64]
Weights = NDArray[np.float32]

STRENGTH = 3.0
"""How much the labels count against the penalty (C): see benchmarks/results/head.json."""
FULL_TFIDF = 200
"""Labels from which TF-IDF weighs as much as the encoder's vectors."""
FOLDS = 5
MIN_CALIBRATION = 20
"""With fewer held-out predictions nothing is calibrated."""
_TEMPERATURES = (0.2, 5.0)
_SHIFT_PRIOR = 1.0
"""How many labels' worth of evidence hold the shifts, and the temperature, where they are."""
_SHIFT_BALANCE = 0.5
"""Classes count in the calibration by this power of what they count in the fit: half-way between equal and as
they come.

With all of it a rare class is predicted far too often, with none of it hardly ever.
"""
_MAX_KERNEL = 3000
"""Above so many labels the fit goes by columns, not by rows: the kernel would grow with their square."""
_JITTER = 1e-9
"""Keeps the kernel's factor defined where two texts have the same features."""
_FLOOR = 1e-9
"""No class is impossible, none is certain."""
_ROUGH = 0.01
"""Approximate margins with a larger error bound are useless: logits are too large for single precision."""


def row_products(rows: Any, others: Any) -> Any:
    """`rows @ others.T`, (n, m), in which no row depends on how many there are, nor on threads.

    BLAS chooses its kernel by the shape of the whole product, so that the same text would get other probabilities alone
    than in a pool. numpy's own sum goes row by row; a sparse product does so anyway.
    """
    if isinstance(rows, np.ndarray):
        return np.einsum("nd,md->nm", np.ascontiguousarray(rows), np.ascontiguousarray(others), optimize=False)
    return rows @ others.T


@dataclass(frozen=True)
class FeatureMatrix:
    """What the classifier sees of n texts: dense vectors (n, d) float32, sparse TF-IDF (n, v), or both.

    The rows of each block have unit length.
    """

    dense: NDArray[np.float32] | None = None
    sparse: csr_matrix | None = None
    components: NDArray[np.float32] | None = None
    """LSA components (v, k), on which a fit also projects the texts (`tfidf.lsa_components`); the weights that come out
    of it are the terms' again, so that predicting knows nothing of them."""

    def __post_init__(self) -> None:
        sizes = {block.shape[0] for block in self.blocks}
        if len(sizes) != 1:
            raise ValueError(f"features need one or two blocks with the same number of rows, got {sorted(sizes)}")

    @property
    def blocks(self) -> list[Any]:
        """The blocks that are there."""
        return [block for block in (self.dense, self.sparse) if block is not None]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of columns of each block."""
        return tuple(block.shape[1] for block in self.blocks)

    def __len__(self) -> int:
        return int(self.blocks[0].shape[0])

    def likeness(self, others: FeatureMatrix) -> Floats:
        """Cosines with other texts, added up over the blocks, (n, m)."""
        total = np.zeros((len(self), len(others)))
        for mine, theirs in zip(self.blocks, others.blocks, strict=True):
            product = row_products(mine, theirs)
            total += product if isinstance(product, np.ndarray) else product.toarray()
        return total

    def rows(self, rows: NDArray[np.intp]) -> FeatureMatrix:
        """These rows of every block."""
        return FeatureMatrix(
            None if self.dense is None else self.dense[rows],
            None if self.sparse is None else self.sparse[rows],
            self.components,
        )


@dataclass(frozen=True)
class Head:
    """A fitted classifier. `weights` has one array a block, (seen, width), and `bias` is (seen,).

    With labels of fewer than two classes there is nothing to tell apart: it has no weights and looks at no feature.
    """

    classes: tuple[str, ...]
    """The schema's classes, in its order: the columns of the probabilities."""
    counts: Mapping[str, int]
    """Labels of each class that was seen, in the schema's order."""
    weights: tuple[Weights, ...]
    bias: Weights
    temperature: float
    widths: tuple[int, ...]
    shift: tuple[float, ...] = ()
    """What is added to the scores of each seen class after the temperature; none: nothing."""

    @property
    def seen(self) -> tuple[str, ...]:
        """Classes that had labels."""
        return tuple(self.counts)

    def logits(self, features: FeatureMatrix) -> Floats:
        """Scores of the seen classes before the temperature, (n, seen)."""
        if not self.weights:
            return np.zeros((len(features), len(self.seen)))
        return _sums(self._products(features), self.bias)

    def _products(self, features: FeatureMatrix) -> list[NDArray[Any]]:
        """What each block adds to the logits, (n, seen)."""
        if features.widths != self.widths:
            raise BadInput(
                f"the model was fitted on features of widths {self.widths}, these have {features.widths}: "
                "they come from another encoder or vocabulary"
            )
        return [row_products(block, part) for block, part in zip(features.blocks, self.weights, strict=True)]

    def predict_proba(self, features: FeatureMatrix) -> Floats:
        """Probabilities (n, C), a column for each class in the schema's order; rows sum to 1.

        A class without labels gets what Laplace's rule of succession gives it.
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
        """The probability of a class without labels."""
        return 1 / (sum(self.counts.values()) + len(self.classes))

    @property
    def _rest(self) -> float:
        """What the seen classes share."""
        return 1 - self._unseen * (len(self.classes) - len(self.seen))

    def columns(self, features: FeatureMatrix) -> Columns | None:
        """What each block adds to the logits, class by class: (seen, n) each. None where the head looks at no feature.

        `approximate_margins` and `exact` take them; those of many parts may stand side by side.
        """
        if not self.weights:
            return None
        return [np.array(product.T, order="C") for product in self._products(features)]

    def exact(self, columns: Columns) -> Floats:
        """Probabilities (n, C), to the bit those that `predict_proba` gives."""
        return self._proba(_sums([np.array(part.T, order="C") for part in columns], self.bias))

    def approximate_margins(self, columns: Columns) -> ApproximateMargins:
        """Margins of n items in single precision, made in steps over all items at once: a class is a row."""
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
            share = np.float32(self._rest) / np.exp(logits, out=logits).sum(axis=0)
            second = np.exp(next_ - first) * share
        if seen < len(self.classes):
            np.maximum(second, np.float32(self._unseen), out=second)
            some, likeliest = likeliest, np.zeros((len(self.classes), count), np.bool_)
            likeliest[self._columns] = some
        return ApproximateMargins(1 - (share - second), self._slack(columns), likeliest)

    def _slack(self, columns: Columns) -> float:
        """How far approximate margins may be from the exact ones: twice the sum of the worst case.

        With unit roundoff u and logits up to m, a difference of two is wrong by at most 12 m u, its exponential by
        5 u more; the sum of C of them and two divisions bring the margin to (24 m + C + 16) u. A floor of f under each
        probability moves it by C f.
        """
        if not columns[0].size:
            return 0.0
        largest = sum(max(float(part.max()), -float(part.min())) for part in (*columns, self.bias))
        classes = len(self.classes)
        largest = largest / self.temperature + float(np.abs(self._shift).max(initial=0.0))
        slack = np.finfo(np.float32).eps * (24 * largest + classes + 16) + classes * _FLOOR
        return float(slack) if slack < _ROUGH else np.inf


def over_all_classes(proba: Floats, classes: Sequence[str], counts: Mapping[str, int]) -> Floats:
    """Probabilities of the classes seen, (n, seen), as those of all classes, (n, C), strictly between 0 and 1.

    `counts`: labels of each class seen. A class without labels gets 1 / (labels + classes); with none at all, all are
    alike.
    """
    seen = [classes.index(name) for name in counts]
    prior = 1 / (sum(counts.values()) + len(classes))
    whole = np.full((len(proba), len(classes)), prior)
    if seen:
        whole[:, seen] = (1 - prior * (len(classes) - len(seen))) * proba
    whole += _FLOOR
    return np.asarray(whole / whole.sum(axis=1, keepdims=True), np.float64)


def fit_head(
    features: FeatureMatrix,
    labels: Sequence[str],
    classes: Sequence[str],
    seed: int,
    calibrate: bool,
    strength: float = STRENGTH,
    full_tfidf: int = FULL_TFIDF,
) -> Head:
    """Fit a classifier from scratch; with no labels it is uniform, with one class it knows only how often.

    Classes weigh the same, however many labels each has. `calibrate` fits a temperature and a shift for each class on
    the logits of held-out stratified folds. Raises BadInput where a label is no class, ValueError where labels and
    features differ in number.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(features)} rows of features")
    counts, targets = count_classes(labels, classes)
    if len(counts) < 2:
        return Head(tuple(classes), counts, (), np.zeros(len(counts), np.float32), 1.0, ())
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        blocks, restore = _compact(features, full_tfidf)
        fitted, bias = _fit_softmax(blocks, targets, len(counts), strength)
        temperature, shift = _calibration(blocks, targets, len(counts), strength, seed) if calibrate else (1.0, ())
        weights = tuple(np.ascontiguousarray(part.T, np.float32) for part in restore(fitted))
    return Head(tuple(classes), counts, weights, bias.astype(np.float32), temperature, features.widths, shift)


def count_classes(labels: Sequence[str], classes: Sequence[str]) -> tuple[dict[str, int], NDArray[np.intp]]:
    """Labels of each class that has some, in the order of `classes`, and the place of each label among these, (n,).

    Raises BadInput where a label is no class.
    """
    if unknown := sorted(set(labels) - set(classes)):
        raise BadInput(f"label {unknown[0]!r} is no class of the schema ({', '.join(classes)})")
    counts = {name: count for name in classes if (count := sum(label == name for label in labels))}
    return counts, np.array([list(counts).index(label) for label in labels], np.intp)


def _compact(features: FeatureMatrix, full_tfidf: int) -> tuple[list[Any], Callable[[list[Floats]], list[Floats]]]:
    """Blocks that give the same fit in fewer columns, and the way back to weights on the features' own columns.

    The best weights are a sum of rows, W = X^T A, so with n < d rows it is enough to fit on a Cholesky factor L of
    the kernel X X^T = L L^T, (n, n): V = L^T A. Twenty classes on 50,000 terms then take seconds, not minutes.
    """
    scales = feature_scales(features, full_tfidf)
    own = [block.astype(np.float64) * scale for block, scale in zip(features.blocks, scales, strict=True)]
    components = (
        None if features.sparse is None or features.components is None else features.components.astype(np.float64)
    )
    if components is not None:
        own += [np.asarray(own[-1] @ components)]

    def scale_back(fitted: list[Floats]) -> list[Floats]:
        """Weights on the features' columns from those on `own`."""
        if components is not None:
            fitted = [*fitted[:-2], fitted[-2] + components @ fitted[-1]]
        return [part * scale for part, scale in zip(fitted, scales, strict=True)]

    count = len(features)
    if count >= min(sum(block.shape[1] for block in own), _MAX_KERNEL):
        return own, scale_back
    from scipy.linalg import cholesky, solve_triangular
    from scipy.sparse import issparse

    kernel = np.zeros((count, count))
    for block in own:
        product = block @ block.T
        kernel += product.toarray() if issparse(product) else product
    kernel[np.diag_indices(count)] += _JITTER
    factor = cholesky(kernel, lower=True)

    def restore(fitted: list[Floats]) -> list[Floats]:
        by_row = solve_triangular(factor, fitted[0], lower=True, trans="T")
        return scale_back([np.asarray(block.T @ by_row) for block in own])

    return [factor], restore


def feature_scales(features: FeatureMatrix, full_tfidf: int = FULL_TFIDF) -> list[float]:
    """What each block is multiplied by for the fit; the weights take it in, so that predicting knows nothing of it.

    Words tell little until most of them have been seen with a label: beside the encoder's vectors, TF-IDF counts in
    full only from `full_tfidf` labels on (measured: benchmarks/results/head.json).
    """
    if features.dense is None or features.sparse is None:
        return [1.0]
    return [1.0, min(1.0, math.sqrt(len(features) / full_tfidf))]


def _fit_softmax(
    blocks: Sequence[Any], targets: NDArray[np.intp], classes: int, strength: float
) -> tuple[list[Floats], Floats]:
    """Minimise  sum_i w_i * -log softmax(x_i W + b)[y_i]  +  |W|^2 / (2 C),  with w_i = n / (classes * n of y_i).

    Returns W for each block, (width, classes), and b.
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
        log_proba = _log_softmax(_logits(blocks, weights, bias))
        value = -(importance * log_proba[rows, targets]).sum() + (flat[: cuts[-1]] ** 2).sum() / (2 * strength)
        error = np.exp(log_proba)
        error[rows, targets] -= 1
        error *= importance[:, None]
        slopes = [(block.T @ error + part / strength).ravel() for block, part in zip(blocks, weights, strict=True)]
        return float(value), np.concatenate([*slopes, error.sum(axis=0)])

    start = np.zeros(int(cuts[-1]) + classes)
    options = {"maxiter": 1000, "maxcor": 20, "gtol": 1e-5, "ftol": 1e-12}
    return unpack(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)


def class_weights(targets: NDArray[np.intp], classes: int) -> Floats:
    """What each label counts in the fit, (n,): every class the same in all, the labels of one class alike."""
    weights: Floats = (len(targets) / (classes * np.bincount(targets, minlength=classes)))[targets]
    return weights


def _logits(blocks: Sequence[Any], weights: Sequence[NDArray[Any]], bias: NDArray[Any]) -> Floats:
    """x W + b over all blocks, (n, classes)."""
    return _sums([block @ part for block, part in zip(blocks, weights, strict=True)], bias)


def _sums(products: Sequence[NDArray[Any]], bias: NDArray[Any]) -> Floats:
    """What all blocks and the bias say together, (n, classes)."""
    logits = np.empty(products[0].shape)
    np.add(products[0], bias.astype(np.float64), out=logits)
    for product in products[1:]:
        logits += product
    return logits


def _calibration(
    blocks: Sequence[Any], targets: NDArray[np.intp], classes: int, strength: float, seed: int
) -> tuple[float, tuple[float, ...]]:
    """Temperature (Guo et al. 2017) and shifts under which held-out labels are likeliest; 1 and none where too few can
    be held out.

    The fit has the labels of a rare class by heart, so that unseen texts of it score lower than those that it learnt
    from; the shift makes up for that, where there is evidence.
    """
    held_out = []
    for train, test, known in calibration_folds(targets, seed):
        weights, bias = _fit_softmax(
            [block[train] for block in blocks], np.searchsorted(known, targets[train]), len(known), strength
        )
        logits = np.full((len(test), classes), -np.inf)
        logits[:, known] = _logits([block[test] for block in blocks], weights, bias)
        held_out.append((test, logits))
    if sum(len(test) for test, _ in held_out) < MIN_CALIBRATION:
        return 1.0, ()
    from scipy.optimize import minimize

    rows = np.concatenate([test for test, _ in held_out])
    logits, found = np.concatenate([part for _, part in held_out]), targets[rows]
    importance = class_weights(targets, classes)[rows] ** _SHIFT_BALANCE
    importance /= importance.mean()
    known_logits = np.where(np.isinf(logits), 0.0, logits)

    def loss(flat: Floats) -> tuple[float, Floats]:
        """Of the negative logarithm of the temperature and the shifts; with its slopes."""
        scale = math.exp(flat[0])
        log_proba = _log_softmax(logits * scale + flat[1:])
        value = -(importance * log_proba[np.arange(len(found)), found]).sum() + _SHIFT_PRIOR * (flat**2).sum() / 2
        error = np.exp(log_proba)
        error[np.arange(len(found)), found] -= 1
        error *= importance[:, None]
        slopes = np.concatenate([[scale * (error * known_logits).sum()], error.sum(axis=0)]) + _SHIFT_PRIOR * flat
        return float(value), slopes

    low, high = (-math.log(value) for value in reversed(_TEMPERATURES))
    bounds = [(low, high), *[(None, None)] * classes]
    best = minimize(loss, np.zeros(classes + 1), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(np.float32(math.exp(-best[0]))), tuple(float(np.float32(value)) for value in best[1:])


def fit_temperature(held_out: Sequence[tuple[Floats, NDArray[np.intp]]]) -> float:
    """The temperature under which held-out labels are likeliest (Guo et al. 2017); 1 where they are too few to say.

    `held_out`: logits (n, classes) with the classes that were found (n,), one pair a fold.
    """
    if sum(len(found) for _, found in held_out) < MIN_CALIBRATION:
        return 1.0
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return sum(
            -float(_log_softmax(logits / math.exp(log_temperature))[np.arange(len(found)), found].sum())
            for logits, found in held_out
        )

    low, high = (math.log(value) for value in _TEMPERATURES)
    return float(np.float32(math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x)))


def calibration_folds(
    targets: NDArray[np.intp], seed: int
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]]:
    """Rows to fit on, rows held out, and the classes that the first ones know; only rows of these are held out.

    Folds that would know a single class, or hold nothing out, are left out.
    """
    for train, test in stratified_folds(targets, FOLDS, seed):
        known = np.unique(targets[train])
        test = test[np.isin(targets[test], known)]
        if len(known) >= 2 and len(test):
            yield train, test, known


def stratified_folds(
    targets: NDArray[np.intp], folds: int, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows to fit on and rows held out, for each fold; each class is spread evenly over the folds."""
    rng = np.random.default_rng([seed, 0xF01D])
    shuffled = rng.permutation(len(targets))
    by_class = shuffled[np.argsort(targets[shuffled], kind="stable")]
    dealt = np.empty(len(targets), np.intp)
    dealt[by_class] = np.arange(len(targets)) % folds
    return [(np.flatnonzero(dealt != fold), np.flatnonzero(dealt == fold)) for fold in range(folds)]


def softmax(logits: Floats) -> Floats:
    """Distributions over the columns, (n, C)."""
    proba: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    proba /= proba.sum(axis=1, keepdims=True)
    return proba


def _two_largest(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The largest and the second largest of each column of (C, n), C >= 2; equal ones are both."""
    first, second = np.maximum(rows[0], rows[1]), np.minimum(rows[0], rows[1])
    for row in rows[2:]:
        np.maximum(second, np.minimum(first, row), out=second)
        np.maximum(first, row, out=first)
    return first, second


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float64)
