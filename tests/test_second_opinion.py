"""What another library says: scikit-activeml's formulas and picks beside ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from al_pipeline.active_learning.acquisition import (
    bald,
    consensus_entropy,
    entropy,
    kl_disagreement,
    least_confidence,
    margin,
    vote_entropy,
)
from al_pipeline.active_learning.clustering import k_center, product_distances, product_lengths, seeds_of_products

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool() -> Any:
    """Their strategies. Imported here, since it takes seconds that the collection of tests should not pay."""
    reason = "!! NOT TESTED: scikit-activeml is not installed; `make setup` installs it"
    return pytest.importorskip("skactiveml.pool", reason=reason)


def samples(items: int = 80, models: int = 6, classes: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), (items, models))


@pytest.mark.parametrize(
    ("ours", "method"),
    [(margin, "margin_sampling"), (entropy, "entropy"), (least_confidence, "least_confident")],
)
def test_uncertainty(pool: Any, ours, method: str) -> None:
    proba = samples(models=1)[:, 0]
    np.testing.assert_allclose(ours(proba), pool.uncertainty_scores(proba, method=method), atol=1e-9)


def test_a_committees_disagreement(pool: Any) -> None:
    given = samples()
    theirs = np.swapaxes(given, 0, 1)
    np.testing.assert_allclose(kl_disagreement(given), pool.average_kl_divergence(theirs.copy()), atol=1e-5)
    votes = given.argmax(axis=2)
    np.testing.assert_allclose(vote_entropy(given), pool.vote_entropy(votes, np.arange(4)), atol=1e-9)
    mean = pool.uncertainty_scores(given.mean(axis=1), method="entropy")
    np.testing.assert_allclose(consensus_entropy(given), mean, atol=1e-9)


def test_bald_is_batch_bald_of_one(pool: Any) -> None:
    given = samples()
    theirs = pool.batch_bald(np.swapaxes(given, 0, 1).copy(), batch_size=1)[0]
    np.testing.assert_allclose(bald(given), theirs, atol=1e-5)


def test_core_set_picks_the_same_items(pool: Any) -> None:
    from skactiveml.utils import MISSING_LABEL

    vectors = np.random.default_rng(0).normal(size=(120, 5))
    labels = np.full(120, MISSING_LABEL)
    labels[:10] = 0
    theirs = pool.CoreSet(random_state=0).query(vectors, labels, batch_size=15)
    assert (k_center(vectors[10:], vectors[:10], 15, 0) + 10).tolist() == np.asarray(theirs).tolist()


def test_badge_begins_with_the_same_item_and_draws_the_second_with_the_same_chances(pool: Any) -> None:
    from skactiveml.classifier import SklearnClassifier
    from skactiveml.utils import MISSING_LABEL
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    vectors = np.column_stack([rng.normal(size=(100, 5)), np.ones(100)])
    labels = np.full(100, MISSING_LABEL)
    labels[:20] = np.arange(20) % 3
    model = SklearnClassifier(LogisticRegression(), classes=[0, 1, 2]).fit(vectors, labels)
    theirs, chances = pool.Badge(random_state=0).query(
        vectors, labels, model, fit_clf=False, batch_size=2, return_utilities=True
    )
    errors = model.predict_proba(vectors[20:])
    errors[np.arange(80), errors.argmax(axis=1)] -= 1
    assert seeds_of_products(errors, vectors[20:], 1, rng)[0] + 20 == theirs[0]
    lengths = product_lengths(errors, vectors[20:])
    distance = product_distances(errors, vectors[20:], theirs[0] - 20, lengths)
    distance = np.minimum(distance, lengths)  # they take the origin for a centre too, the paper's authors and we do not
    others = np.arange(80) != theirs[0] - 20
    np.testing.assert_allclose((distance / distance.sum())[others], chances[1, 20:][others], atol=1e-9)
