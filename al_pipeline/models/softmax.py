"""The fit of the linear classifier: class-weighted softmax regression with an L2 penalty.

The method is Newton's with a trust region (Nocedal & Wright 2006, chapter 7.1, by scipy): the gradient decides where
the fit ends and is computed in float64, products with the Hessian only choose the way and are computed in float32. Of
many labels the Hessian is estimated from a sample of rows (Xu et al. 2016, arXiv 1607.00559): each is drawn with a
probability in proportion to its curvature, which is next to nothing for a text of which the model is sure.

Many rows are multiplied in parts, side by side. The parts depend on the number of rows alone, and their results are
added in order, so that the same labels give the same bytes with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.models.calibration import calibration_folds
from al_pipeline.models.feature_matrix import FULL_TFIDF, FeatureMatrix, Floats, feature_scales
from al_pipeline.models.probabilities import class_weights, log_softmax

_MAX_KERNEL = 3000
"""With more labels the fit uses the features instead of the kernel, whose size grows with the square of the labels."""
_SURE_KERNEL = 500
"""With fewer labels than columns, and at most so many, the fit always uses the kernel."""
_KERNEL_RATE = 400
"""Between the two the kernel is faster for n labels up to n^2.5 = rate * classes * columns: its cost grows with n^2 to
n^3, that of the features with classes * columns (measured by benchmarks/head_speed.py).
"""
_JITTER = 1e-9
"""Added to the kernel's diagonal, to keep it positive definite even if two texts have the same features."""
_SLOPE = 1e-7
"""The fit ends when the gradient's norm, divided by the number of labels, is below this; probabilities are then within
1e-4 of those of the exact minimum (tests/test_models.py)."""
_FOLD_SLOPE = 1e-5
"""The same for the fits of calibration folds."""
_RADIUS = 10.0
"""The first step is at most so long; the largest is a thousand times as long."""
_MAX_STEPS = 200
_PARTS = 4
_MIN_ROWS = 4096
"""Fewer rows are multiplied as a whole."""
_CHUNK = 1024
"""Rows that are converted to double precision at a time."""
_SAMPLED = 8192
"""The Hessian is estimated from at most about so many rows, if there are at least twice as many."""
_DRAW = 0x5A3D
"""The seed of that sample."""
_HELD_OUT = 1000
"""Calibration folds are held out until they have so many labels: all five up to 1000 labels, one from 5000 on."""


def compact(
    features: FeatureMatrix, classes: int, full_tfidf: int = FULL_TFIDF
) -> tuple[list[Any], Callable[[list[Floats]], list[Floats]]]:
    """Blocks that give the same fit in fewer columns, and a function that maps the weights back to the features.

    By the representer theorem W = X^T A, so with n < d rows it suffices to fit V = L^T A on a Cholesky factor L of the
    kernel X X^T = L L^T, (n, n). Twenty classes on 50,000 terms then take seconds, not minutes.
    """
    scales = feature_scales(features, full_tfidf)
    own = [
        block if scale == 1 else block * np.float32(scale) for block, scale in zip(features.blocks, scales, strict=True)
    ]
    components = None if features.sparse is None else features.components
    if components is not None:
        own += [_projected(own[-1], components)]

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
    wide = [block.astype(np.float64) for block in own]
    for block in wide:
        product = block @ block.T
        kernel += product.toarray() if issparse(product) else product
    kernel[np.diag_indices(len(kernel))] += _JITTER
    factor = cholesky(kernel, lower=True)

    def restore(fitted: list[Floats]) -> list[Floats]:
        by_row = solve_triangular(factor, fitted[0], lower=True, trans="T")
        return scale_back([np.asarray(block.T @ by_row) for block in wide])

    return [factor], restore


def _projected(rows: Any, components: NDArray[np.float32]) -> NDArray[np.float32]:
    """`rows @ components`, (n, k), in parts side by side: each row of a sparse product is computed by itself."""
    slices = _divided(rows.shape[0])
    if len(slices) == 1:
        return np.asarray(rows @ components)
    with ThreadPoolExecutor(_PARTS) as executor:
        return np.concatenate(list(executor.map(lambda part: rows[part] @ components, slices)))


def _divided(count: int) -> list[slice]:
    """The parts in which so many rows are multiplied."""
    bounds = np.linspace(0, count, (1 if count < _MIN_ROWS else _PARTS) + 1).astype(int).tolist()
    return [slice(*pair) for pair in pairwise(bounds)]


def _kernel_is_faster(labels: int, columns: int, classes: int) -> bool:
    """Whether a fit on the kernel's factor, (labels, labels), is faster than one on the features."""
    if labels >= min(columns, _MAX_KERNEL):
        return False
    return labels <= _SURE_KERNEL or labels**2.5 <= _KERNEL_RATE * classes * columns


class Parts:
    """The rows of a fit, divided into parts that are multiplied side by side, in double and in single precision.

    `blocks`: float32 or float64 arrays (n, width), dense or sparse. `weights` (n,): those of the rows, besides the
    weights of their classes; None for equal ones.
    """

    def __init__(self, blocks: Sequence[Any], weights: Floats | None = None) -> None:
        self.blocks = list(blocks)
        self.weights = weights
        self.count = int(self.blocks[0].shape[0])
        self.rows = _divided(self.count)
        own = [[block[rows] for block in self.blocks] for rows in self.rows]
        self.exact = [[_double(block) for block in part] for part in own]
        self.narrow = [[block.astype(np.float32, copy=False) for block in part] for part in own]
        self.cuts = np.cumsum([block.shape[1] for block in self.blocks])


def _double(block: Any) -> Any:
    """The block for products in double precision; a dense one is converted when it is used."""
    if block.dtype == np.float64 or isinstance(block, np.ndarray):
        return block
    return type(block)((block.data.astype(np.float64), block.indices, block.indptr), block.shape, copy=False)


def fit_softmax(
    blocks: Sequence[Any] | Parts,
    targets: NDArray[np.intp],
    classes: int,
    strength: float,
    offset: Floats | None = None,
    start: tuple[Sequence[Floats], Floats] | None = None,
    slope: float = _SLOPE,
    only: NDArray[np.intp] | None = None,
) -> tuple[list[Floats], Floats]:
    """Minimise  sum_i w_i * -log softmax(x_i W + b + o_i)[y_i]  +  |W|^2 / (2 C),  with w_i = n / (classes * n of y_i).

    `blocks`: x, see `Parts`. `offset`: o, (n, classes); None for 0. `start`: W and b from which to search, 0 if None.
    `slope`: the norm of the gradient at which the fit ends, divided by n. `only`: the rows to fit on, None for all;
    the targets of others do not matter. Returns W for each block, (width, classes), and b.
    """
    from scipy.optimize import minimize

    parts = blocks if isinstance(blocks, Parts) else Parts(blocks)
    rows = np.arange(parts.count) if only is None else only
    importance = np.zeros(parts.count)
    importance[rows] = class_weights(targets[rows], classes)
    if parts.weights is not None:
        importance[rows] *= parts.weights[rows] / parts.weights[rows].mean()
    with nullcontext() if len(parts.rows) == 1 else ThreadPoolExecutor(_PARTS) as executor:
        problem = _Objective(parts, targets, importance, classes, strength, offset, executor)
        options = {
            "gtol": slope * len(rows),
            "initial_trust_radius": _RADIUS,
            "max_trust_radius": 1000 * _RADIUS,
            "maxiter": _MAX_STEPS,
        }
        found = minimize(
            problem.loss, problem.flat(start), jac=True, hessp=problem.curved, method="trust-ncg", options=options
        ).x
    *weights, bias = np.split(problem.columns(found), parts.cuts)
    return weights, bias[0]


class _Objective:
    """The loss of `fit_softmax` as a function of a flat vector.

    Two classes have a single column of weights, w = W_1 - W_0: the minimum has W_0 = -W_1.
    """

    def __init__(
        self,
        parts: Parts,
        targets: NDArray[np.intp],
        importance: Floats,
        classes: int,
        strength: float,
        offset: Floats | None,
        executor: Executor | None,
    ) -> None:
        self._parts = parts
        self._importance = importance
        self._targets = targets
        self._binary = classes == 2
        self._shape = (int(parts.cuts[-1]) + 1, classes)
        self._penalty = 1 / (2 * strength if self._binary else strength)
        if offset is not None and self._binary:
            offset = offset[:, 1] - offset[:, 0]
        self._offset = offset
        self._map = map if executor is None else executor.map
        self._at: Floats | None = None
        self._curvature: list[Any] = []
        self._sample: list[tuple[list[Any], Any]] | None = None
        self._random = np.random.default_rng(_DRAW)

    def flat(self, start: tuple[Sequence[Floats], Floats] | None) -> Floats:
        """The vector of these weights and this bias; zeros if None."""
        if start is None:
            return np.zeros(self._shape[0] * (1 if self._binary else self._shape[1]))
        both = np.concatenate([*start[0], start[1][None]])
        return both[:, 1] - both[:, 0] if self._binary else both.ravel()

    def columns(self, flat: Floats) -> Floats:
        """Weights and, in the last row, bias, (width + 1, classes)."""
        return np.stack([-flat / 2, flat / 2], axis=1) if self._binary else flat.reshape(self._shape)

    def loss(self, flat: Floats) -> tuple[float, Floats]:
        """The loss and its gradient."""
        weights = self._weights(flat)
        *own, bias = np.split(weights, self._parts.cuts)
        found = list(self._map(lambda number: self._add(number, own, bias), range(len(self._parts.rows))))
        self._at, self._curvature, self._sample = flat.copy(), [curvature for _, _, curvature in found], None
        value = sum(value for value, _, _ in found) + self._penalty * float((weights[:-1] ** 2).sum()) / 2
        slope = np.asarray(sum(slope for _, slope, _ in found))
        slope[:-1] += self._penalty * weights[:-1]
        return value, slope.ravel()

    def _add(self, number: int, own: Sequence[Floats], bias: Floats) -> tuple[float, Floats, Any]:
        """Loss, its slope by the weights, and what the Hessian needs, of one part.

        Dense rows are converted to double precision once for both products.
        """
        blocks, part = self._parts.exact[number], self._parts.rows[number]
        count = part.stop - part.start
        narrow = [place for place, block in enumerate(blocks) if block.dtype == np.float32]
        step = _CHUNK if narrow else max(1, count)
        room = {place: np.empty((min(step, count), blocks[place].shape[1])) for place in narrow}
        known = {place: blocks[place] @ own[place] for place in range(len(blocks)) if place not in room}
        slopes: list[Any] = [0.0] * len(blocks)
        steps: list[tuple[Floats, Floats, Any]] = []
        for start in range(0, max(1, count), step):
            rows = slice(start, min(start + step, count))
            wide = {place: free[: rows.stop - start] for place, free in room.items()}
            logits: Any = bias
            for place, weights in enumerate(own):
                if place in wide:
                    wide[place][:] = blocks[place][rows]
                logits = logits + (wide[place] @ weights if place in wide else known[place][rows])
            among = slice(part.start + rows.start, part.start + rows.stop)
            if self._offset is not None:
                logits = logits + self._offset[among]
            steps.append((self._two if self._binary else self._many)(logits, among))
            for place in narrow:
                slopes[place] = slopes[place] + wide[place].T @ steps[-1][1]
        losses, errors = (np.concatenate(found) for found in list(zip(*steps, strict=True))[:2])
        for place in known:
            slopes[place] = blocks[place].T @ errors
        slope = np.concatenate([*slopes, errors.sum(axis=0, keepdims=True)])
        return float(losses.sum()), slope, _joined([curvature for *_, curvature in steps])

    def curved(self, flat: Floats, direction: Floats) -> Floats:
        """The product of the Hessian at `flat` with `direction`, in single precision."""
        if self._at is None or not np.array_equal(flat, self._at):
            self.loss(flat)
        if self._sample is None:
            self._sample = self._drawn()
        *own, bias = np.split(self._weights(direction.astype(np.float32)), self._parts.cuts)

        def add(part: tuple[list[Any], Any]) -> Any:
            blocks, curvature = part
            moved = logits_of(blocks, own, bias)
            if self._binary:
                change = curvature * moved
            else:
                proba, importance = curvature
                change = proba * moved
                change -= proba * change.sum(axis=1, keepdims=True)
                change *= importance
            return np.concatenate([*(block.T @ change for block in blocks), change.sum(axis=0, keepdims=True)])

        product = np.asarray(sum(self._map(add, self._sample)), np.float64)
        product[:-1] += self._penalty * self._weights(direction)[:-1]
        return product.ravel()

    def _drawn(self) -> list[tuple[list[Any], Any]]:
        """Rows and curvatures from which the Hessian is estimated, for each part; all of them if they are few."""
        whole = list(zip(self._parts.narrow, self._curvature, strict=True))
        if self._parts.count < 2 * _SAMPLED:
            return whole
        sizes = [self._size(curvature) for curvature in self._curvature]
        luck = self._random.random(self._parts.count, np.float32)  # anew each time: errors of one sample would add up
        limit = np.float32(sum(float(size.sum(dtype=np.float64)) for size in sizes) / _SAMPLED)

        def draw(number: int) -> tuple[list[Any], Any]:
            (blocks, curvature), size = whole[number], sizes[number]
            rows = np.flatnonzero(luck[self._parts.rows[number]] * limit < size)
            more = np.maximum(size[rows], limit) / size[rows]  # a row stands for those like it that were not drawn
            if self._binary:
                return [block[rows] for block in blocks], curvature[rows] * more
            proba, importance = curvature
            return [block[rows] for block in blocks], (proba[rows], importance[rows] * more[:, None])

        return list(self._map(draw, range(len(whole))))

    def _size(self, curvature: Any) -> NDArray[np.float32]:
        """The trace of the Hessian of each row by its logits, (n,)."""
        if self._binary:
            return np.asarray(curvature)
        proba, importance = curvature
        return np.asarray(importance[:, 0] * (1 - (proba**2).sum(axis=1)))

    def _weights(self, flat: Any) -> Any:
        """A row for each column of the blocks, and one for the bias."""
        return flat if self._binary else flat.reshape(self._shape)

    def _two(self, logits: Floats, rows: slice) -> tuple[Floats, Floats, Any]:
        """Losses, their slopes by the logits, and what the Hessian needs; `logits` (n,) are of the second class."""
        importance, sign = self._importance[rows], 2.0 * self._targets[rows] - 1
        doubt = np.exp(-np.logaddexp(0, sign * logits))
        losses = importance * np.logaddexp(0, -sign * logits)
        return losses, -importance * sign * doubt, (importance * doubt * (1 - doubt)).astype(np.float32)

    def _many(self, logits: Floats, rows: slice) -> tuple[Floats, Floats, Any]:
        """The same with logits (n, classes)."""
        importance, own = self._importance[rows], (np.arange(len(logits)), self._targets[rows])
        log_proba = log_softmax(logits)
        losses = -(importance * log_proba[own])
        error = np.exp(log_proba)
        curvature = error.astype(np.float32), importance[:, None].astype(np.float32)
        error[own] -= 1
        error *= importance[:, None]
        return losses, error, curvature


def _joined(curvatures: Sequence[Any]) -> Any:
    """What the Hessian needs of the rows of a part, in one."""
    if len(curvatures) == 1:
        return curvatures[0]
    if isinstance(curvatures[0], tuple):
        return tuple(np.concatenate(found) for found in zip(*curvatures, strict=True))
    return np.concatenate(curvatures)


def logits_of(blocks: Sequence[Any], weights: Sequence[Any], bias: Any) -> Any:
    """x W + b over all blocks, (n, classes); of a single column, (n,)."""
    return sum((block @ part for block, part in zip(blocks, weights, strict=True)), bias)


def held_out_logits(
    blocks: Sequence[Any] | Parts,
    targets: NDArray[np.intp],
    classes: int,
    strength: float,
    seed: int,
    fitted: tuple[Sequence[Floats], Floats],
    offset: Floats | None = None,
) -> list[tuple[NDArray[np.intp], Floats]]:
    """For each calibration fold the held-out rows and their logits (rows, classes), -inf for unknown classes.

    `fitted`: weights and bias of the fit on all rows, from which the fits of the folds start. `offset`: as in
    `fit_softmax`, for all rows. No more folds than hold out a thousand rows together.
    """
    parts = blocks if isinstance(blocks, Parts) else Parts(blocks)
    held_out: list[tuple[NDArray[np.intp], Floats]] = []
    for train, test, known in calibration_folds(targets, seed):
        if sum(len(rows) for rows, _ in held_out) >= _HELD_OUT:
            break
        own = np.minimum(np.searchsorted(known, targets), len(known) - 1)
        start = [part[:, known] for part in fitted[0]], fitted[1][known]
        prior = None if offset is None else offset[:, known]
        weights, bias = fit_softmax(parts, own, len(known), strength, prior, start, _FOLD_SLOPE, train)
        logits = np.full((len(test), classes), -np.inf)
        logits[:, known] = logits_of([block[test] for block in parts.blocks], weights, bias)
        if offset is not None:
            logits += offset[test]
        held_out.append((test, logits))
    return held_out
