"""The device: which one is chosen, what is recorded of it, and that nothing is computed beside it.

What a GPU computes is tested where there is one, by the tests with the fixture `device`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import Played, change_params, go_on, small_workspace
from msgspec.structs import replace
from numpy.random import SeedSequence
from test_encoder import fake_source, make_tiny, needs_torch, texts

from al_pipeline.errors import BadParams, EngineChanged, ExternalServiceError, NothingToDo
from al_pipeline.features import device as module
from al_pipeline.features import encoder
from al_pipeline.features.cache import FeatureCache
from al_pipeline.features.device import device_like, device_of, find_device, use_device
from al_pipeline.features.encoder import Encoder, encoder_fingerprint, install_encoder, resolve_precision
from al_pipeline.features.shards import digest_rows
from al_pipeline.features.vectors import Vectors
from al_pipeline.files import read_json, sha256_bytes, write_json
from al_pipeline.integrations.git import Git
from al_pipeline.integrations.simulated_oracle import SimulatedOracle
from al_pipeline.models.finetuned import fit_finetuned
from al_pipeline.operations import doctor
from al_pipeline.operations.history import read_history
from al_pipeline.operations.reproduce import _engine
from al_pipeline.operations.reproduction.clone import Clone
from al_pipeline.operations.tick import tick
from al_pipeline.params import DeviceName, Features, Finetune
from al_pipeline.records import CPU
from al_pipeline.rounds.manifests import Engine
from al_pipeline.workspace.fingerprint import check_engine, current_engine, difference, recorded_device, write_engine
from al_pipeline.workspace.workspace import open_workspace

H200 = "cuda: NVIDIA H200, CUDA 13.0, bfloat16"
T4 = "cuda: Tesla T4, CUDA 13.0"
APPLE = "mps: Apple silicon, macOS 26.1"


def has(patch: pytest.MonkeyPatch, *gpus: str) -> None:
    """Stands for a machine with these GPUs, and no others."""
    there = {gpu.partition(":")[0]: gpu for gpu in gpus}
    patch.setattr(module, "_gpu", there.get)


def features(device: DeviceName, kind: Any = "encoder") -> Features:
    return Features(kind=kind, encoder="none", max_tokens=16, precision="auto", device=device)


# Which one is chosen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "expected"), [([], CPU), ([H200], H200), ([APPLE], APPLE), ([APPLE, H200], H200)], ids=str
)
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, gpus: list[str], expected: str) -> None:
    has(monkeypatch, *gpus)
    assert find_device("auto") == expected
    assert find_device("cpu") == CPU
    for gpu in gpus:
        name: Any = gpu.partition(":")[0]
        assert find_device(name) == gpu
    assert device_of(features("auto")) == expected
    assert device_of(features("auto", "tfidf")) == CPU, "no encoder, no device"
    assert device_like(CPU) == CPU, "what the CPU made comes out again on the CPU alone"
    assert device_like(T4) == expected


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    monkeypatch.setattr(module, "_is_possible", lambda kind: False)
    module._gpu.cache_clear()
    with pytest.raises(BadParams, match=f"features.device is {name}, .*(driver|Apple).*auto or cpu in params.yaml"):
        find_device(name)
    assert device_of(features(name, "tfidf")) == CPU
    module._gpu.cache_clear()


@needs_torch
def test_a_gpu_is_what_torch_says_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(module, "_is_possible", lambda kind: kind == "cuda")
    module._gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, said in ((None, "is built without CUDA"), ("13.0", "`nvidia-smi`")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(BadParams, match=said):
            find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, supported, expected in (("NVIDIA H200", True, H200), ("Tesla T4", False, T4)):
        module._gpu.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert find_device("auto") == expected
    module._gpu.cache_clear()


def test_automatic_precision_follows_the_device() -> None:
    assert {gpu: resolve_precision("auto", gpu) for gpu in (H200, T4, APPLE)} == {
        H200: "bfloat16", T4: "float32", APPLE: "float32"
    }  # fmt: skip
    assert resolve_precision("float32", H200) == "float32"


# What is recorded ----------------------------------------------------------------------------------------------------


def test_vectors_of_two_devices_never_mix_and_those_of_the_cpu_stay_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {
        "cpu": encoder._cpu(),
        "encoding": encoder._ENCODING_VERSION,
        "identity": "identity",
        "precision": "float32",
        "versions": encoder.library_versions(),
    }
    as_before = sha256_bytes(json.dumps(before, sort_keys=True).encode())[:24]
    assert encoder_fingerprint("identity", "float32") == encoder_fingerprint("identity", "float32", CPU) == as_before
    found = {encoder_fingerprint("identity", "float32", device) for device in (CPU, H200, T4, APPLE)}
    assert len(found) == 4

    install_encoder(str(fake_source(tmp_path / "source")), tmp_path / "encoder")
    has(monkeypatch, T4)
    here = Vectors(tmp_path / "encoder", tmp_path / "cache", features("auto"))
    assert here.device == T4
    FeatureCache(tmp_path / "cache" / encoder_fingerprint(here.identity, "auto", T4)).add(["a" * 64], np.eye(1, 8))
    for device, missing in ((None, 0), (T4, 0), (H200, 1), (CPU, 1)):
        vectors = Vectors(tmp_path / "encoder", tmp_path / "cache", features("auto"), device)
        assert vectors.missing([digest_rows(["a" * 64])]) == missing, device
    assert Vectors(tmp_path / "encoder", tmp_path / "cache", features("cpu")).missing([digest_rows(["a" * 64])]) == 1


def test_the_engine_names_the_device_unless_it_is_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    write_engine(path)
    assert "device" not in read_json(path) and check_engine(path) == CPU
    before = path.stat().st_mtime_ns
    write_engine(path, CPU)
    assert path.stat().st_mtime_ns == before
    write_engine(path, H200)
    recorded = read_json(path)
    assert recorded == {**current_engine(), "device": H200}
    assert check_engine(path) == recorded_device(recorded) == H200, "stages compute on what is recorded"
    assert difference(recorded, current_engine(H200)) == ""
    assert difference(recorded) == f"device: was {H200}, is cpu"
    assert difference(recorded, current_engine(T4)) == f"device: was {H200}, is {T4}"
    assert difference({key: value for key, value in recorded.items() if key != "device"}) == "", "older records"
    write_json(path, {**recorded, "threads": 64})
    with pytest.raises(EngineChanged, match="threads: was 64"):
        check_engine(path)


def test_a_round_does_not_close_for_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, _ = small_workspace(tmp_path, 20)
    change_params(workspace, {"kind: tfidf": "kind: encoder+tfidf", "device: cpu": "device: cuda"})
    has(monkeypatch)
    before = Git(workspace.layout.root).head()
    with pytest.raises(BadParams, match="features.device is cuda") as caught:
        tick(open_workspace(workspace.layout.root), SimulatedOracle)
    assert Git(workspace.layout.root).head() == before
    assert not workspace.layout.closing.exists() and not workspace.layout.engine.exists()
    found = doctor.examine(open_workspace(workspace.layout.root))
    assert [(one.check, one.level) for one in found if one.message == str(caught.value)] == [("engine", "error")]


def test_a_round_of_another_device_is_compared_by_its_metrics(
    once: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _, _ = go_on(once, tmp_path)
    record = read_history(workspace.layout, Git(workspace.layout.root)).rounds[-1]
    on_gpu = replace(record, engine=Engine.from_row({**record.engine.to_row(), "device": H200}))
    said: list[str] = []

    def clone() -> Clone:
        return Clone(workspace, on_gpu, tmp_path / "clones", None, said.append)

    root = workspace.layout.root
    for gpus, changes in (((), "is cpu"), ((T4,), f"is {T4}")):
        has(monkeypatch, *gpus)
        assert clone().engine_changes == f"device: was {H200}, {changes}"
        with pytest.raises(NothingToDo, match=f"computed on {H200}.*leave `--engine` out: then metrics"):
            _engine(on_gpu.engine.to_row(), "recorded", root, said.append)
    has(monkeypatch, H200)
    assert (clone().engine_changes, clone().device) == ("", H200)
    assert _engine(on_gpu.engine.to_row(), "recorded", root, said.append) is None, "it is the running engine"
    made_on_cpu = Clone(workspace, record, tmp_path / "clones", None, said.append)
    assert (made_on_cpu.engine_changes, made_on_cpu.device) == ("", CPU)


# What computes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), layers=2)


@pytest.mark.parametrize("recorded", [H200, APPLE, "tpu: x", ""])
@needs_torch
def test_nothing_is_computed_on_another_device_than_the_recorded_one(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    has(monkeypatch, T4)
    with pytest.raises(EngineChanged, match=f"records the device {recorded}, and this machine has"):
        Encoder(tiny, 64, device=recorded)


@needs_torch
def test_a_gpu_computes_with_deterministic_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    has(monkeypatch, T4)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        assert use_device(T4).type == "cuda"
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert module.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = before


@needs_torch
def test_all_that_meets_lies_on_the_device(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's device without values stands for a GPU: it refuses tensors that were left on the CPU."""
    import torch

    monkeypatch.setattr(encoder, "use_device", lambda device: torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.ones(self.shape, dtype=self.dtype, device=CPU))
    with pytest.raises(RuntimeError, match="not on the expected device"):
        torch.ones(2, device="meta") * torch.ones(2)
    found = Encoder(tiny, 64, "bfloat16", device=H200)
    shapes = set[tuple[int, ...]]()
    found.model.register_forward_hook(lambda *of: shapes.add(tuple(of[-1].last_hidden_state.shape)))
    assert found.encode(texts(300)).shape == (300, 32)
    assert shapes == {(found.batch_rows(length), length, 32) for _, length, _ in shapes}
    assert all(8000 < rows * length <= 8192 for rows, length, _ in shapes)

    some, labels = texts(40), ["even" if row % 2 else "odd" for row in range(40)]
    model = fit_finetuned(some, labels, ["even", "odd"], tiny, 64, Finetune(epochs=1, passes=2), 0, True, device=H200)
    assert model.predict_proba(some).shape == (40, 2)
    judges = model.draw("committee", some, None, labels, SeedSequence(1))
    assert model.sample_proba(judges, some).shape == (40, 2, 2)


@needs_torch
def test_a_lack_of_memory_is_one_sentence(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    some, labels = texts(20), ["even" if row % 2 else "odd" for row in range(20)]
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_forward", full)
        with pytest.raises(ExternalServiceError, match=r"Tried to allocate 2.00 GiB\.\).*features.device: cpu"):
            Encoder(tiny, 64).encode(some)
    with monkeypatch.context() as patch:
        patch.setattr("al_pipeline.models.transformer.Network.loss", full)
        with pytest.raises(ExternalServiceError, match="memory does not suffice"):
            fit_finetuned(some, labels, ["even", "odd"], tiny, 64, Finetune(epochs=1), 0, False)
    monkeypatch.setattr(encoder, "use_device", lambda device: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("transformers.BertModel.to", full)
    with pytest.raises(ExternalServiceError, match="memory does not suffice"):
        Encoder(tiny, 64)
