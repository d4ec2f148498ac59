"""Heads, TF-IDF and the model that bundles them: laws of the probabilities, equal bytes, honest edge cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from al_pipeline.errors import BadInput
from al_pipeline.features import tfidf as tfidf_module
from al_pipeline.features.tfidf import Tfidf, fit, load_tfidf
from al_pipeline.files import sha256_tree
from al_pipeline.models import softmax as softmax_module
from al_pipeline.models.calibration import stratified_folds
from al_pipeline.models.feature_matrix import FeatureMatrix, feature_scales
from al_pipeline.models.linear import fit_head
from al_pipeline.models.probabilities import softmax
from al_pipeline.models.softmax import compact, fit_softmax, held_out_logits
from al_pipeline.models.text_model import TextModel, fit_text_model, load_text_model
from al_pipeline.params import Features

CLASSES = ["ham", "spam", "news"]
Kind = Literal["encoder", "tfidf", "encoder+tfidf"]
KINDS: tuple[Kind, ...] = ("encoder", "tfidf", "encoder+tfidf")
WORDS = {"ham": "meeting lunch project notes", "spam": "cheap pills offer winner", "news": "election storm vote report"}


def features(kind: Kind) -> Features:
    return Features(kind=kind, encoder="none", max_tokens=16, precision="float32")


def corpus(count: int, classes: list[str], seed: int = 0) -> tuple[list[str], NDArray[np.float32], list[str]]:
    """Texts with vectors and labels: each class has its own words and its own direction, with noise on both."""
    rng = np.random.default_rng(seed)
    labels = [classes[number % len(classes)] for number in range(count)]
    words = [rng.choice((WORDS[label] + " and the with from").split(), 6) for label in labels]
    vectors = rng.normal(0, 0.4, (count, 8)) + np.eye(8)[[CLASSES.index(label) for label in labels]]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [" ".join(row) for row in words], vectors.astype(np.float32), labels


def vocabulary(kind: Kind, count: int = 60) -> Tfidf | None:
    return None if kind == "encoder" else fit(corpus(count, CLASSES)[0])


def fitted(kind: Kind, count: int = 30, classes: list[str] = CLASSES, calibrate: bool = True) -> TextModel:
    texts, vectors, labels = corpus(count, classes)
    return fit_text_model(texts, vectors, labels, CLASSES, features(kind), vocabulary(kind), 7, calibrate)


def check_probabilities(proba: NDArray[np.float64], count: int, classes: int) -> None:
    assert proba.shape == (count, classes)
    assert proba.dtype == np.float64
    assert np.isfinite(proba).all()
    assert (proba > 0).all()
    assert (proba < 1).all()
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=0, atol=1e-12)


# Laws ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.integers(0, 3), max_size=25),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4]),
    seed=st.integers(0, 99),
    calibrate=st.booleans(),
)
def test_any_labels_give_probabilities(labels: list[int], scale: float, seed: int, calibrate: bool) -> None:
    names = ["a", "b", "c", "d"]
    rng = np.random.default_rng(seed)
    dense = (scale * rng.normal(size=(len(labels), 5))).astype(np.float32)
    head = fit_head(FeatureMatrix(dense), [names[label] for label in labels], names, seed, calibrate)
    assert head.seen == tuple(name for number, name in enumerate(names) if number in labels)
    proba = head.predict_proba(FeatureMatrix((100 * scale * rng.normal(size=(6, 5))).astype(np.float32)))
    check_probabilities(proba, 6, 4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=30), max_size=8), st.integers(1, 3))
def test_any_texts_have_rows_of_unit_length_or_zero(texts: list[str], min_df: int) -> None:
    tfidf = fit(texts, min_df=min_df)
    rows = tfidf.transform(texts)
    assert rows.shape == (len(texts), len(tfidf.terms))
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1))).ravel()
    assert all(norm == 0 or abs(norm - 1) < 1e-5 for norm in norms)


@pytest.mark.parametrize("components", [False, True])
def test_fitting_by_rows_equals_fitting_by_columns(components: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's factor is a shortcut, not another model: both minimise the same convex function."""
    texts, vectors, labels = corpus(40, CLASSES)
    tfidf = fit(texts)
    matrix = FeatureMatrix(vectors, tfidf.transform(texts), tfidf.components if components else None)
    targets = np.array([CLASSES.index(label) for label in labels])
    blocks, restore = compact(matrix, 3, 80)
    assert [block.shape for block in blocks] == [(40, 40)]
    by_rows, bias_by_rows = fit_softmax(blocks, targets, 3, 10.0)
    monkeypatch.setattr(softmax_module, "_MAX_KERNEL", 0)
    blocks, restore_columns = compact(matrix, 3, 80)
    assert [block.shape[1] for block in blocks[:2]] == list(matrix.widths)
    assert len(blocks) == 3 if components else 2
    by_columns, bias = fit_softmax(blocks, targets, 3, 10.0)
    for got, expected in zip(restore(by_rows), restore_columns(by_columns), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-4)
    np.testing.assert_allclose(bias_by_rows - bias_by_rows.mean(), bias - bias.mean(), atol=2e-4)


@pytest.mark.parametrize(
    ("labels", "columns", "classes", "kernel"),
    [
        (300, 400, 2, True), (400, 400, 2, False), (700, 30_000, 2, True), (1000, 5000, 2, False),
        (1500, 50_000, 2, False), (900, 5000, 20, True), (1500, 5000, 20, False), (2500, 50_000, 20, True),
        (3000, 50_000, 20, False),
    ],
)  # fmt: skip
def test_the_kernel_is_fitted_where_it_is_faster(labels: int, columns: int, classes: int, kernel: bool) -> None:
    assert softmax_module._kernel_is_faster(labels, columns, classes) is kernel


def test_a_label_tells_of_words_that_come_with_the_labelled_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """No labelled text has a word of the others, but texts without labels have both together."""
    monkeypatch.setattr(tfidf_module, "_COMPONENTS", 2)
    pool = ["apple banana", "banana cherry", "apple cherry", "hammer pliers", "pliers wrench", "hammer wrench"] * 9
    tfidf = fit(pool)
    heads = {}
    for name, components in (("with", tfidf.components), ("without", None)):
        seen = FeatureMatrix(None, tfidf.transform(["apple", "hammer"]), components)
        heads[name] = fit_head(seen, ["ham", "spam"], CLASSES, 1, False)
    unseen = FeatureMatrix(None, tfidf.transform(["cherry", "wrench"]))
    np.testing.assert_allclose(*heads["without"].predict_proba(unseen), rtol=1e-5)
    assert heads["with"].predict_proba(unseen)[:, :2].argmax(axis=1).tolist() == [0, 1]
    assert np.abs(np.diff(heads["with"].predict_proba(unseen)[:, 0])) > 0.1


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from(["one", "two", "three", "four", "five", "six"]), max_size=6), max_size=12))
def test_components_are_the_strongest_directions_of_the_texts(words: list[list[str]]) -> None:
    texts = [" ".join(row) for row in words]
    tfidf = fit(texts, min_df=1)
    rows = tfidf.transform(list(dict.fromkeys(texts))).toarray().astype(np.float64)
    if tfidf.components is None:
        assert not rows.any()
        return
    _, size, terms = np.linalg.svd(rows, full_matrices=False)
    terms = terms[size**2 > 1e-6 * size[0] ** 2]
    scale = len(rows) / (size**2).sum()
    np.testing.assert_allclose(tfidf.components @ tfidf.components.T, scale * terms.T @ terms, atol=1e-3)
    assert ((rows @ tfidf.components) ** 2).sum() == pytest.approx(len(rows), rel=1e-4)


def test_tfidf_counts_in_full_only_from_enough_labels() -> None:
    """Beside vectors; alone it has nothing to be weighed against."""
    texts, vectors, _ = corpus(300, CLASSES)
    sparse = fit(texts).transform(texts)
    for count, expected in ((2, 0.1), (50, 0.5), (200, 1.0), (300, 1.0)):
        joined = FeatureMatrix(vectors[:count], sparse[:count])
        assert feature_scales(joined, 200) == pytest.approx([1.0, expected])
    assert feature_scales(FeatureMatrix(None, sparse), 200) == feature_scales(FeatureMatrix(vectors), 200) == [1.0]


def test_the_fit_is_the_minimum_of_its_formula() -> None:
    """No step away from the fitted weights makes the documented loss smaller."""
    _, vectors, labels = corpus(31, CLASSES, seed=3)
    targets = np.array([CLASSES.index(label) for label in labels])
    importance = (len(labels) / (3 * np.bincount(targets)))[targets]

    def loss(weights: NDArray[np.float64], bias: NDArray[np.float64]) -> float:
        logits = vectors.astype(np.float64) @ weights + bias
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(-(importance * logits[np.arange(len(targets)), targets]).sum() + (weights**2).sum() / 20)

    (weights,), bias = fit_softmax([vectors.astype(np.float64)], targets, 3, 10.0)
    best = loss(weights, bias)
    rng = np.random.default_rng(0)
    for size in (1e-2, 1e-1, 1.0):
        for _ in range(20):
            step = size * rng.normal(size=weights.shape), size * rng.normal(size=bias.shape)
            assert loss(weights + step[0], bias + step[1]) > best


@pytest.mark.parametrize("classes", [2, 3])
def test_a_fit_ends_within_1e_4_of_the_minimum_wherever_it_starts(classes: int) -> None:
    _, vectors, labels = corpus(700, CLASSES[:classes], seed=4)
    targets = np.array([CLASSES.index(label) for label in labels])
    blocks = [vectors, csr_matrix(np.maximum(vectors, 0))]

    def proba(**options: Any) -> NDArray[np.float64]:
        weights, bias = fit_softmax(blocks, targets, classes, 3.0, **options)
        return softmax(sum((block @ part for block, part in zip(blocks, weights, strict=True)), bias))

    exact = proba(slope=1e-11)
    np.testing.assert_allclose(proba(), exact, rtol=0, atol=1e-4)
    rng = np.random.default_rng(0)
    start = [rng.normal(size=(block.shape[1], classes)) for block in blocks], rng.normal(size=classes)
    np.testing.assert_allclose(proba(start=start), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
def test_many_labels_give_the_same_bytes_with_any_number_of_threads(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are divided into parts; the parts of a fit are those of a whole."""
    _, vectors, labels = corpus(6000, CLASSES[:classes], seed=5)
    targets = np.array([CLASSES.index(label) for label in labels])
    found = []
    for threads in (1, 2, 4):
        monkeypatch.setattr(softmax_module, "ThreadPoolExecutor", lambda _, n=threads: ThreadPoolExecutor(n))
        (weights,), bias = fit_softmax([vectors], targets, classes, 3.0)
        found.append((weights.tobytes(), bias.tobytes()))
    assert len(set(found)) == 1
    monkeypatch.setattr(softmax_module, "_MIN_ROWS", 10_000)
    (whole,), _ = fit_softmax([vectors], targets, classes, 3.0)
    np.testing.assert_allclose(weights, whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize("classes", [2, 3])
def test_of_many_labels_the_hessian_of_a_sample_leads_to_the_same_minimum(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes each time, whatever number of threads computes it."""
    _, vectors, labels = corpus(6000, CLASSES[:classes], seed=9)
    targets = np.array([CLASSES.index(label) for label in labels])
    blocks = [vectors, csr_matrix(np.maximum(vectors, 0))]

    def fit(**options: Any) -> tuple[bytes, NDArray[np.float64]]:
        weights, bias = fit_softmax(blocks, targets, classes, 3.0, **options)
        logits = sum((block @ part for block, part in zip(blocks, weights, strict=True)), bias)
        return b"".join(part.tobytes() for part in (*weights, bias)), softmax(logits)

    _, exact = fit(slope=1e-10)
    drawn: list[int] = []
    draw = softmax_module._Objective._drawn

    def counted(self: Any) -> Any:
        found = draw(self)
        drawn.append(sum(blocks[0].shape[0] for blocks, _ in found))
        return found

    monkeypatch.setattr(softmax_module._Objective, "_drawn", counted)
    monkeypatch.setattr(softmax_module, "_SAMPLED", 1000)
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(softmax_module, "ThreadPoolExecutor", lambda _, n=threads: ThreadPoolExecutor(n))
        data, proba = fit()
        found.append(data)
        np.testing.assert_allclose(proba, exact, rtol=0, atol=1e-4)
    assert found[0] == found[1]
    assert 0 < max(drawn) < 1200


def test_texts_are_projected_in_parts_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    rows = csr_matrix((rng.random((5000, 40)) * (rng.random((5000, 40)) < 0.2)).astype(np.float32))
    components = rng.normal(size=(40, 7)).astype(np.float32)
    found = softmax_module._projected(rows, components)
    monkeypatch.setattr(softmax_module, "_MIN_ROWS", 10_000)
    np.testing.assert_array_equal(found, softmax_module._projected(rows, components))


def test_no_more_folds_are_held_out_than_a_thousand_labels_need() -> None:
    _, vectors, labels = corpus(5000, CLASSES, seed=6)
    targets = np.array([CLASSES.index(label) for label in labels])
    for count, folds in ((900, 5), (1500, 4), (5000, 1)):
        fitted = fit_softmax([vectors[:count]], targets[:count], 3, 3.0)
        held_out = held_out_logits([vectors[:count]], targets[:count], 3, 3.0, 0, fitted)
        assert [len(test) for test, _ in held_out] == [-(-(count - fold) // 5) for fold in range(folds)]


def test_a_fit_on_some_rows_is_the_fit_without_the_others() -> None:
    """A class that none of them has is not among its classes."""
    _, vectors, labels = corpus(60, CLASSES, seed=7)
    targets = np.array([CLASSES.index(label) for label in labels])
    only = np.flatnonzero(targets != 1)[5:]
    own = np.searchsorted([0, 2], targets)
    (alone,), bias = fit_softmax([vectors[only]], own[only], 2, 3.0, slope=1e-10)
    (among,), bias_among = fit_softmax([vectors], own, 2, 3.0, slope=1e-10, only=only)
    np.testing.assert_allclose(among, alone, atol=1e-6)
    np.testing.assert_allclose(bias_among, bias, atol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 99))
def test_folds_hold_out_each_row_once_and_spread_each_class(labels: list[int], seed: int) -> None:
    targets = np.array(labels)
    folds = stratified_folds(targets, 5, seed)
    assert sorted(row for _, test in folds for row in test) == list(range(len(labels)))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(len(labels)))
        for name in set(labels):
            assert abs((targets[test] == name).sum() - (targets == name).sum() / 5) < 1


# Learning and calibration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: Kind) -> None:
    texts, vectors, labels = corpus(90, CLASSES, seed=5)
    proba = fitted(kind, 60).predict_proba(texts, vectors)
    accuracy = np.mean([CLASSES[row.argmax()] == label for row, label in zip(proba, labels, strict=True)])
    assert accuracy > 0.85


def test_calibration_lowers_the_loss_of_an_overconfident_head() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(300, 20)).astype(np.float32)
    truth = (dense[:, 0] + 3 * rng.normal(size=300) > 0).astype(int)
    labels = [CLASSES[label] for label in truth]
    train, test = np.arange(100), np.arange(100, 300)
    losses = []
    for calibrate in (False, True):
        head = fit_head(FeatureMatrix(dense[train]), labels[:100], CLASSES[:2], 1, calibrate, strength=1e4)
        proba = head.predict_proba(FeatureMatrix(dense[test]))
        losses.append(-np.log(proba[np.arange(200), truth[test]]).mean())
    assert head.temperature > 1.2
    assert losses[1] < losses[0] - 0.02


def test_calibration_makes_up_for_a_rare_class_learnt_by_heart() -> None:
    """With more columns than labels the few of a class are told apart by what is theirs alone; others of it are not."""
    rng = np.random.default_rng(0)
    truth = (np.arange(1500) % 10 == 0).astype(int)
    dense = rng.normal(size=(1500, 400))
    dense[:, 0] += 4 * truth
    dense = (dense / np.linalg.norm(dense, axis=1, keepdims=True)).astype(np.float32)
    train, test = np.arange(200), np.arange(200, 1500)
    found, losses = [], []
    for calibrate in (False, True):
        names = [CLASSES[label] for label in truth[train]]
        head = fit_head(FeatureMatrix(dense[train]), names, CLASSES[:2], 1, calibrate)
        proba = head.predict_proba(FeatureMatrix(dense[test]))
        found.append((proba.argmax(axis=1) & truth[test]).sum() / truth[test].sum())
        losses.append(-np.log(proba[np.arange(len(test)), truth[test]]).mean())
    assert head.shift[1] > head.shift[0]
    assert found[1] > found[0] + 0.1
    assert losses[1] < losses[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2), min_size=20, max_size=40), st.integers(0, 99))
def test_calibration_keeps_each_class_in_its_place(labels: list[int], seed: int) -> None:
    """Scores of a class keep their order, and classes that look alike are not parted by it: it has no features."""
    rng = np.random.default_rng(seed)
    names = [CLASSES[label] for label in labels]
    dense = rng.normal(size=(len(labels), 5)).astype(np.float32)
    plain, calibrated = (fit_head(FeatureMatrix(dense), names, CLASSES, seed, calibrate) for calibrate in (False, True))
    for one, other in zip(plain.weights, calibrated.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(plain.bias, calibrated.bias)
    assert plain.shift == ()
    assert len(calibrated.shift) in (0, len(plain.seen))
    assert 0.199 < calibrated.temperature < 5.001
    if calibrated.shift:
        assert sum(calibrated.shift) == pytest.approx(0, abs=1e-3)


def test_each_class_weighs_the_same_however_rare() -> None:
    """Twenty to one, overlapping: an unweighted fit would never answer with the rare class."""
    rng = np.random.default_rng(0)
    dense = np.concatenate([rng.normal(0, 1, (400, 1)), rng.normal(1.5, 1, (20, 1))]).astype(np.float32)
    head = fit_head(FeatureMatrix(dense), ["ham"] * 400 + ["spam"] * 20, ["ham", "spam"], 0, False)
    border = dense[np.abs(head.predict_proba(FeatureMatrix(dense))[:, 0] - 0.5).argmin(), 0]
    assert border == pytest.approx(0.75, abs=0.3)


# Few labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_labels_give_the_uniform_prior(kind: Kind, tmp_path: Path) -> None:
    model = fit_text_model([], np.zeros((0, 0), np.float32), [], CLASSES, features(kind), vocabulary(kind, 9), 1, True)
    model.save(tmp_path)
    texts, vectors, _ = corpus(4, CLASSES)
    for found in (model, load_text_model(tmp_path)):
        assert found.kind == kind
        np.testing.assert_allclose(found.predict_proba(texts, vectors), 1 / 3)
        assert found.predict_proba([], vectors[:0]).shape == (0, 3)


def test_one_class_gives_what_the_rule_of_succession_says() -> None:
    texts, vectors, _ = corpus(4, ["spam"])
    model = fit_text_model(texts, vectors, ["spam"] * 4, CLASSES, features("encoder"), None, 1, True)
    np.testing.assert_allclose(model.predict_proba(texts, vectors), np.tile([1 / 7, 5 / 7, 1 / 7], (4, 1)), rtol=1e-6)


def test_two_items_of_two_classes() -> None:
    texts, vectors, labels = corpus(2, ["ham", "spam"])
    model = fit_text_model(texts, vectors, labels, CLASSES, features("encoder+tfidf"), fit(texts), 1, True)
    proba = model.predict_proba(texts, vectors)
    check_probabilities(proba, 2, 3)
    assert proba[:, :2].argmax(axis=1).tolist() == [0, 1]
    np.testing.assert_allclose(proba[:, 2], 1 / 5, rtol=1e-6)
    assert model.head.temperature == 1


def test_labels_outside_the_schema_are_refused() -> None:
    texts, vectors, _ = corpus(2, ["ham"])
    with pytest.raises(BadInput, match=r"label 'eggs' is not a class in the schema \(ham, spam, news\)"):
        fit_text_model(texts, vectors, ["ham", "eggs"], CLASSES, features("encoder"), None, 1, True)
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        fit_head(FeatureMatrix(vectors), ["ham"], CLASSES, 1, True)


# Saved models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [CLASSES, ["spam", "news"], ["news"]])
def test_a_saved_model_predicts_the_same(kind: Kind, classes: list[str], tmp_path: Path) -> None:
    model = fitted(kind, classes=classes)
    model.save(tmp_path)
    texts, vectors, _ = corpus(11, CLASSES, seed=9)
    loaded = load_text_model(tmp_path)
    np.testing.assert_array_equal(loaded.predict_proba(texts, vectors), model.predict_proba(texts, vectors))
    check_probabilities(loaded.predict_proba(texts, vectors), 11, 3)
    loaded.save(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()
    }


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes_in_another_process_too(tmp_path: Path) -> None:
    code = "from test_models import save_each; save_each()"
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"}  # OPENBLAS_CORETYPE is the engine's
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, timeout=120)
    for kind in KINDS:
        fitted(kind).save(tmp_path / "one" / kind)
        fitted(kind).save(tmp_path / "two" / kind)
        assert len({sha256_tree(tmp_path / name / kind) for name in ("one", "two", "elsewhere")}) == 1


def save_each() -> None:
    """What the other process does: a model of each kind."""
    for kind in KINDS:
        fitted(kind).save(Path("elsewhere") / kind)


def test_an_older_model_in_the_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    fitted("encoder+tfidf").save(tmp_path / "reused")
    fitted("encoder").save(tmp_path / "reused")
    fitted("encoder").save(tmp_path / "new")
    assert sha256_tree(tmp_path / "reused") == sha256_tree(tmp_path / "new")


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    texts, vectors, labels = corpus(30, ["spam", "ham"])
    model = fit_text_model(texts, vectors, labels, CLASSES, features("encoder"), None, 7, True, encoder="abc")
    model.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["classes"] == CLASSES
    assert card["seen"] == ["ham", "spam"]
    assert card["labels"] == {"ham": 15, "spam": 15}
    assert (card["features"], card["encoder"], card["total_labels"]) == ("encoder", "abc", 30)
    assert load_text_model(tmp_path).encoder == "abc"


def test_a_card_without_a_shift_is_read_and_one_of_other_classes_refused(tmp_path: Path) -> None:
    model = fitted("encoder")
    assert len(model.head.shift) == 3
    model.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(card | {"shift": [0.5]}))
    with pytest.raises(BadInput, match="3 classes, but shifts for 1"):
        load_text_model(tmp_path)
    del card["shift"]  # as models were saved before there was one
    (tmp_path / "card.json").write_text(json.dumps(card))
    assert load_text_model(tmp_path).head.shift == ()


def test_the_control_is_the_classifier_on_its_rows_alone(tmp_path: Path) -> None:
    texts, vectors, labels = corpus(30, CLASSES)
    rows = list(range(0, 30, 3))

    def model_of(some: list[int], control: list[int] | None) -> TextModel:
        own = [labels[row] for row in some]
        pool = fit(corpus(60, CLASSES)[0])
        few = [texts[row] for row in some]
        return fit_text_model(
            few, vectors[some], own, CLASSES, features("encoder+tfidf"), pool, 7, True, "abc", control
        )

    model, alone = model_of(list(range(30)), rows), model_of(rows, None)
    assert alone.as_control() is None
    model.save(tmp_path)
    loaded = load_text_model(tmp_path)
    control = loaded.as_control()
    assert control is not None and sum(control.head.counts.values()) == len(rows)
    np.testing.assert_array_equal(control.predict_proba(texts, vectors), alone.predict_proba(texts, vectors))
    np.testing.assert_array_equal(
        loaded.predict_proba(texts, vectors), model_of(list(range(30)), None).predict_proba(texts, vectors)
    )
    model_of(list(range(30)), None).save(tmp_path)
    assert not (tmp_path / "control.safetensors").exists()
    model.save(tmp_path)
    (tmp_path / "control.safetensors").write_bytes((tmp_path / "head.safetensors").read_bytes())
    with pytest.raises(BadInput, match=r"control\.safetensors does not match its card"):
        load_text_model(tmp_path)


@pytest.mark.parametrize("name", ["head.safetensors", "tfidf.json", "tfidf.safetensors"])
def test_a_damaged_model_is_refused(name: str, tmp_path: Path) -> None:
    fitted("encoder+tfidf").save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-9] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match="does not match its card"):
        load_text_model(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BadInput, match="no such file"):
        load_text_model(tmp_path)


@pytest.mark.parametrize("card", [None, "[]", '{"format": "al-head/99"}', "{torn"])
def test_other_formats_are_refused(card: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "card.json").write_text(card)
    with pytest.raises(BadInput, match=r"this engine cannot read the model|does not contain valid JSON"):
        load_text_model(tmp_path)


def test_vectors_that_do_not_fit_are_refused() -> None:
    model = fitted("encoder")
    with pytest.raises(BadInput, match=r"widths \(8,\), but got widths \(9,\)"):
        model.predict_proba(["a"], np.zeros((1, 9), np.float32))
    with pytest.raises(BadInput, match="no vectors were given"):
        model.predict_proba(["a"], None)


# TF-IDF --------------------------------------------------------------------------------------------------------------


def test_it_agrees_with_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [*corpus(50, CLASSES)[0], "Ünïcode wörds, wörds; don't x 42 42 a_b", "", "the"]
    ours = fit(texts)
    unique = list(dict.fromkeys(texts))
    theirs = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit(unique)
    assert list(ours.terms) == sorted(theirs.vocabulary_)
    np.testing.assert_allclose(ours.transform(texts).toarray(), theirs.transform(texts).toarray(), atol=1e-6)


def test_neither_order_nor_copies_change_the_vocabulary() -> None:
    texts = corpus(40, CLASSES)[0]
    for size in (7, 100):
        assert_equal(fit(texts, sample=size), fit([*texts[::-1], *texts[:5]], sample=size))


def test_the_vocabulary_is_capped_at_the_most_frequent_terms() -> None:
    texts = ["aa bb", "aa bb cc", "aa dd", "dd bb aa cc"]
    assert fit(texts, max_terms=2).terms == ("aa", "bb")
    assert fit([], max_terms=2).terms == ()
    assert fit(texts, max_terms=2).transform(["zz"]).nnz == 0


def test_a_vocabulary_survives_its_file(tmp_path: Path) -> None:
    tfidf = fit(corpus(40, CLASSES)[0])
    tfidf.save(tmp_path)
    assert_equal(load_tfidf(tmp_path), tfidf)
    (tmp_path / "tfidf.json").write_text('{"format": "al-tfidf/1", "terms": ["one"]}')
    with pytest.raises(BadInput, match="1 terms"):
        load_tfidf(tmp_path)


def assert_equal(one: Tfidf, two: Tfidf) -> None:
    assert one.terms == two.terms
    np.testing.assert_array_equal(one.idf, two.idf)
