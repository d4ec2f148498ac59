"""A converted encoder: tokenizer and ONNX graph in a folder. Running it needs neither torch nor transformers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import BadInput, UsageError
from al_pipeline.features.encoder import encoder_identity, first_tokens, usable_cpus
from al_pipeline.files import (
    make_folder,
    read_object,
    remove_leftovers,
    sha256_bytes,
    sha256_file,
    temporary_folder,
    write_bytes,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from al_pipeline.features.encoder import Encoder

Vectors = NDArray[np.float32]

GRAPH_FILE, TOKENIZER_FILE, CARD_FILE = "encoder.onnx", "tokenizer.json", "card.json"
EXACT, QUANTIZED = "onnx", "onnx-int8"
_VERSION = 2
"""Increment when graphs are written otherwise."""


def missing_extra(name: str) -> UsageError:
    """The error for a package of the extra that is not installed."""
    return UsageError(f"the runtime onnx needs the package {name}: pip install 'al-pipeline[onnx]'")


Parts = tuple[dict[str, Any], Mapping[str, Any], str]
"""An encoder's weights as float32 arrays, its configuration, and its tokenizer as JSON."""


def convert_encoder(folder: Path, max_tokens: int, runtime: str, cache: Path) -> Path:
    """The folder below `cache` with a converted encoder, which is made if it is not there. Only that needs torch.

    `folder` holds the encoder as installed. Raises BadInput if it cannot be converted, UsageError without the extra.
    """
    identity = encoder_identity(folder, max_tokens)
    return converted_at(cache, identity, max_tokens, runtime, lambda: weights_of(folder, max_tokens))


def converted_at(cache: Path, identity: str, max_tokens: int, runtime: str, parts: Callable[[], Parts]) -> Path:
    """The folder below `cache` with the converted encoder `identity`, made of `parts` if it is not there."""
    place = cache / f"{identity}-{runtime}-{_VERSION}"
    if _is_whole(place):
        return place
    try:
        from al_pipeline.serving.onnx_graph import encoder_model
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name)) from None
    weights, config, tokenizer = parts()
    data = encoder_model(weights, config, runtime == QUANTIZED).SerializeToString()
    make_folder(cache)
    remove_leftovers(cache)
    with temporary_folder(cache) as fresh:
        made = make_folder(fresh / place.name)
        write_bytes(made / GRAPH_FILE, data)
        write_text(made / TOKENIZER_FILE, tokenizer)
        card = {
            "identity": identity,
            "max_tokens": max_tokens,
            "runtime": runtime,
            "sha256": {name: sha256_file(made / name) for name in (GRAPH_FILE, TOKENIZER_FILE)},
        }
        write_json(made / CARD_FILE, card)
        if not _is_whole(place):
            if place.exists():
                place.rename(fresh / "old")
            made.rename(place)
    return place


def keep_newest(cache: Path, prefix: str, kept: int) -> None:
    """Delete converted encoders whose name begins with `prefix`, all but the `kept` that were made last."""
    found = sorted(cache.glob(f"{prefix}*"), key=lambda place: place.stat().st_mtime_ns)
    for place in found[: max(0, len(found) - kept)]:
        shutil.rmtree(place, ignore_errors=True)


def weights_of(folder: Path, max_tokens: int) -> Parts:
    """The weights of an installed encoder as float32 arrays, its configuration, and its tokenizer as JSON.

    Raises BadInput if transformers cannot load it, or its tokenizer cannot be used without it.
    """
    try:
        from al_pipeline.features.encoder import Encoder

        encoder = Encoder(folder, max_tokens, "float32", threads=1)
    except ImportError as error:
        raise UsageError(
            f"converting a model needs {error.name}: convert it where al-pipeline is installed whole, by `al serve` "
            "or `al export`"
        ) from None
    return parts_of(encoder)


def parts_of(encoder: Encoder) -> Parts:
    """The weights of a loaded encoder as float32 arrays, its configuration, and its tokenizer as JSON.

    Raises BadInput if its tokenizer cannot be used without transformers.
    """
    tokenizer = encoder.tokenizer_json()
    if tokenizer is None:
        raise BadInput(
            "the encoder's tokenizer exists in Python only, so it cannot be converted; use the runtime torch"
        )
    weights = {name: part.float().cpu().numpy() for name, part in encoder.model.state_dict().items()}
    return weights, encoder.model.config.to_dict(), tokenizer


def _is_whole(place: Path) -> bool:
    """Whether the files of a converted encoder are as they were written."""
    digests = read_object(place / CARD_FILE).get("sha256", {})
    return bool(digests) and all(
        (place / name).is_file() and sha256_file(place / name) == wanted for name, wanted in digests.items()
    )


class OnnxEncoder:
    """Runs a converted encoder, text by text: a text's vector depends on no other text.

    Raises UsageError without the extra, BadInput if ONNX Runtime cannot load the graph.
    """

    def __init__(self, place: Path, threads: int | None = None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise missing_extra(str(error.name)) from None
        card = read_object(place / CARD_FILE)
        self.max_tokens = int(card["max_tokens"])
        self.key = sha256_bytes(f"{card['sha256']} onnxruntime {version('onnxruntime')}".encode())[:24]
        """What the bytes of the vectors depend on, besides the processor."""
        self._tokenizer: Any = Tokenizer.from_file(str(place / TOKENIZER_FILE))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_tokens)
        self._session = open_session(onnxruntime, place / GRAPH_FILE)
        threads = threads or usable_cpus()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="al-onnx") if threads > 1 else None

    def encode_in_turn(self, texts: Sequence[str]) -> Vectors:
        """Like `encode`, in this thread alone, for callers that have threads of their own."""
        return self.encode(texts, side_by_side=False)

    def encode(
        self, texts: Sequence[str], progress: Callable[[int], None] | None = None, *, side_by_side: bool = True
    ) -> Vectors:
        """The texts' vectors, (n, d) float32, of unit length; `progress` gets 1 for each finished text."""
        tokens = first_tokens(texts, self.max_tokens, self._tokenize)
        side_by_side = side_by_side and self._pool is not None and len(tokens) > 1
        found = self._pool.map(self._run, tokens) if side_by_side and self._pool else map(self._run, tokens)
        rows = []
        for row in found:
            rows.append(row)
            if progress:
                progress(1)
        return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0]).ids]
        return [found.ids for found in self._tokenizer.encode_batch(texts)]

    def _run(self, tokens: Sequence[int]) -> Vectors:
        (vector,) = self._session.run(None, {"input_ids": np.array([tokens or [0]], np.int64)})
        return np.asarray(vector, np.float32)


def open_session(onnxruntime: Any, graph: Path) -> Any:
    """A session of ONNX Runtime on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # texts have many lengths
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common class of their own
        raise BadInput(f"ONNX Runtime cannot load {graph}: {error}") from None
