"""A domain classifier: can texts of the window be told from those of the reference by their vectors?

A classifier two-sample test (Lopez-Paz and Oquab 2017): ridge regression of which text is of the window, which is
Fisher's discriminant with a shrunken covariance. Predictions are linear in the labels, so that all permutations share
one factorisation a fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from al_pipeline.drift.permutations import Floats, Permutations, p_value
from al_pipeline.features.tfidf import lsa_components
from al_pipeline.threads import one_thread

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

RIDGE = 5.0
"""The penalty, relative to the mean eigenvalue of the texts' scatter matrix."""
TOPS = (0.025, 0.05, 0.1, 0.2)
"""The shares of the texts with the highest scores, among which texts of the window are counted."""


@dataclass(frozen=True)
class DomainTest:
    """What the domain classifier found.

    Where a tenth of the window is new, the AUC is hardly above 0.5 (0.55 at most), but the texts with the highest
    scores are nearly all of the window. So the test compares the AUC and the window's share of the highest scores with
    those under permutations, each in standard deviations, and takes the largest.
    """

    auc: float
    """Probability that a text of the window gets a higher score than one of the reference, cross-validated; 0.5 is
    chance."""
    auc_p: float
    """The p-value of the AUC alone."""
    p: float
    """The p-value of the test of both."""
    scores: Floats
    """The cross-validated score of each text (n,); the higher, the less it is like the reference."""


def domain_test(vectors: NDArray[np.floating], permutations: Permutations, ridge: float = RIDGE) -> DomainTest:
    """Test whether vectors (n, d) of reference and window have the same distribution."""
    with one_thread():
        scores = _scores(np.asarray(vectors, np.float64), permutations, ridge)
    aucs, tops = _statistics(scores, permutations)
    largest = np.max([_standardised(one) for one in (aucs, *tops)], axis=0)
    return DomainTest(float(aucs[0]), p_value(aucs), p_value(largest), scores[:, 0])


def term_vectors(rows: csr_matrix) -> NDArray[np.float32]:
    """TF-IDF rows (n, v) as dense vectors (n, k), for features without an encoder: their LSA components."""
    components = lsa_components(rows[:: max(1, -(-rows.shape[0] // 2000))])
    return np.zeros((rows.shape[0], 1), np.float32) if components is None else np.asarray(rows @ components)


def _scores(rows: Floats, permutations: Permutations, ridge: float) -> Floats:
    """The cross-validated score of each text under each permutation, (n, 1 + B)."""
    from scipy.linalg import cho_factor, cho_solve

    rows = rows - rows.mean(axis=0)
    labels = permutations.member - permutations.member[:, 0].mean()
    scatter, moments = rows.T @ rows, rows.T @ labels
    penalty = ridge * max(float(np.trace(scatter)), 1e-12) / rows.shape[1] * np.eye(rows.shape[1])
    scores = np.empty(labels.shape)
    for own in permutations.folds:
        held = rows[own]
        factor = cho_factor(scatter - held.T @ held + penalty, overwrite_a=True, check_finite=False)
        scores[own] = held @ cho_solve(factor, moments - held.T @ labels[own], check_finite=False)
    return scores


def _statistics(scores: Floats, permutations: Permutations) -> tuple[Floats, list[Floats]]:
    """Under each permutation: the AUC (1 + B,), and the window's number of texts among the highest scores."""
    mixed = np.concatenate(permutations.folds)  # a random order within each fold, so that ties are broken at random
    order = scores[mixed].argsort(axis=0, kind="stable")
    member = np.take_along_axis(permutations.member[mixed], order, axis=0)
    size, ahead = len(mixed), permutations.window
    ranks = np.arange(1, size + 1) @ member.astype(np.float64)
    aucs = (ranks - ahead * (ahead + 1) / 2) / max(1, ahead * (size - ahead))
    above = member[::-1].cumsum(axis=0, dtype=np.int32)
    return aucs, [above[max(1, round(share * size)) - 1].astype(np.float64) for share in TOPS]


def _standardised(statistics: Floats) -> Floats:
    spread = float(statistics.std())
    return (statistics - statistics.mean()) / spread if spread > 0 else np.zeros(len(statistics))
