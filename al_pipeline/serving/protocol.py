"""Requests and answers: the Open Inference Protocol, version 2, and the plain one of `POST /predict`.

What a client sends is checked here, field by field; `Refused` says what is wrong, as a status and a sentence.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType
from numpy.typing import NDArray

from al_pipeline.data.catalog import text_from
from al_pipeline.sanitize import one_line, shortened
from al_pipeline.serving.versions import Served

T = TypeVar("T")

INPUT = "text"
OUTPUTS = ("label", "probability", "probabilities", "abstained")
_LONGEST_EXCERPT = 80
_LONGEST_ID = 200


class Refused(Exception):
    """A request that is not answered: the HTTP status, one sentence for the client, and headers."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, dict(headers or {})


# POST /predict ------------------------------------------------------------------------------------------------------
class PredictRequest(Struct, forbid_unknown_fields=True):
    """One text, or several."""

    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET
    round: int | str | None = None
    """The round whose model answers, such as 7 or `round-0007`; without it the promoted model."""


class Prediction(Struct):
    """What the model says of a text."""

    label: str | None
    """The most probable class; null if the model abstains."""
    probability: float
    """The calibrated probability of the most probable class."""
    abstained: bool
    """Whether that probability is below `serve.min_confidence`."""
    probabilities: dict[str, float]


class PredictAnswer(Struct):
    """The predictions in the order of the texts, all of one model."""

    round: str
    digest: str
    """The SHA-256 of the model's files, as the round's record has it."""
    runtime: str
    predictions: list[Prediction]


# The Open Inference Protocol ----------------------------------------------------------------------------------------
class InferTensor(Struct):
    """A request's input: `name` is `text`, `datatype` is `BYTES`, `shape` is [n] or [n, 1], `data` are n strings."""

    name: str
    shape: list[Annotated[int, Meta(ge=0)]]
    datatype: str
    data: list[Any]
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class InferOutput(Struct):
    """An output that is asked for; without any, all are given."""

    name: str
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)


class InferRequest(Struct):
    """A request of the Open Inference Protocol."""

    inputs: list[InferTensor]
    id: Annotated[str, Meta(max_length=_LONGEST_ID)] | None = None
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)
    outputs: list[InferOutput] | None = None


class AnswerTensor(Struct):
    """An output: one value, or one row of values, for each text."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferAnswer(Struct):
    """An answer of the Open Inference Protocol."""

    model_name: str
    model_version: str
    outputs: list[AnswerTensor]
    parameters: dict[str, Any]
    id: str | None = None


class Failure(Struct):
    """Why a request was not answered."""

    error: str


class TensorMetadata(Struct):
    """A tensor as the model's metadata name it; -1 is any number of texts."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct):
    """A model's metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any]


def decode_predict(body: bytes, most_texts: int) -> tuple[list[str], int | str | None]:
    """The texts of a plain request, and the round that it asks for. Raises Refused."""
    asked = _decode(body, PredictRequest, 'expected {"text": "…"} or {"texts": ["…", "…"]}')
    if (asked.text is UNSET) == (asked.texts is UNSET):
        raise Refused(400, 'give either "text", a string, or "texts", a list of strings')
    texts = [asked.text] if isinstance(asked.text, str) else asked.texts
    assert isinstance(texts, list)
    check_texts(texts, most_texts, "texts" if asked.text is UNSET else None)
    return texts, asked.round


def decode_infer(body: bytes, most_texts: int) -> tuple[InferRequest, list[str]]:
    """A request of the Open Inference Protocol, and its texts. Raises Refused."""
    asked = _decode(body, InferRequest, 'expected {"inputs": [{"name": "text", "datatype": "BYTES", …}]}')
    if len(asked.inputs) != 1:
        raise Refused(400, f"expected one input, {INPUT!r}, got {len(asked.inputs)}")
    (tensor,) = asked.inputs
    if tensor.name != INPUT:
        raise Refused(400, f"the input's name must be {INPUT!r}, got {_shown(tensor.name)}")
    if tensor.datatype != "BYTES":
        raise Refused(400, f"the input's datatype must be 'BYTES', got {_shown(tensor.datatype)}")
    if "binary_data_size" in tensor.parameters:
        raise Refused(400, "binary tensor data are not supported; send the texts in `data`")
    shape = tensor.shape
    if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
        raise Refused(400, f"the input's shape must be [n] or [n, 1], got {shortened(str(shape), _LONGEST_EXCERPT)}")
    data = tensor.data
    if len(shape) == 2 and all(isinstance(row, list) and len(row) == 1 for row in data):
        data = [row[0] for row in data]
    if len(data) != shape[0]:
        raise Refused(400, f"the input's shape says {shape[0]:,} texts, but data has {len(data):,}")
    check_texts(data, most_texts, "data")
    if unknown := [one.name for one in asked.outputs or () if one.name not in OUTPUTS]:
        raise Refused(400, f"there is no output {_shown(unknown[0])}; there are {', '.join(OUTPUTS)}")
    return asked, data


def check_texts(texts: Sequence[Any], most: int, field: str | None) -> None:
    """Raise Refused unless these are texts that can be predicted, neither none nor too many."""
    if not texts:
        raise Refused(400, f"{field} is empty; give at least one text")
    if len(texts) > most:
        raise Refused(
            413, f"{len(texts):,} texts are too many for one request; send at most {most:,} (serve.max_texts)"
        )
    for place, text in enumerate(texts):
        try:
            text_from(text, 1 << 40)
        except ValueError as error:
            where = "text" if field is None else f"{field}[{place}]"
            raise Refused(400, f"{where}: {' '.join(map(str, error.args)).strip()}") from None


def _decode(body: bytes, kind: type[T], expected: str) -> T:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 (byte {error.start}); JSON is sent as UTF-8") from None
    try:
        return msgspec.json.decode(body.removeprefix(codecs.BOM_UTF8), type=kind)
    except msgspec.ValidationError as error:
        raise Refused(400, f"{_safe(str(error))}; {expected}") from None
    except msgspec.DecodeError as error:
        raise Refused(400, f"the body is not JSON: {_safe(str(error))}") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None


def _shown(text: str) -> str:
    return repr(_safe(text))


def _safe(text: str) -> str:
    return shortened(one_line(text), _LONGEST_EXCERPT * 2)


# Answers ------------------------------------------------------------------------------------------------------------
def predictions(model: Served, proba: NDArray[np.float64], min_confidence: float) -> Iterator[dict[str, Any]]:
    """What the model says of each text, as `Prediction` has it."""
    for row in proba:
        best = int(row.argmax())
        abstained = bool(row[best] < min_confidence)
        yield {
            "label": None if abstained else model.classes[best],
            "probability": float(row[best]),
            "abstained": abstained,
            "probabilities": dict(zip(model.classes, row.tolist(), strict=True)),
        }


def predict_answer(model: Served, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer to a plain request."""
    return {"round": model.name, "digest": model.digest, "runtime": model.runtime, "predictions": list(rows)}


def infer_answer(
    name: str, model: Served, rows: Sequence[Mapping[str, Any]], proba: NDArray[np.float64], asked: InferRequest
) -> dict[str, Any]:
    """The answer to a request of the Open Inference Protocol; the label of a text without one is empty."""
    count = len(rows)
    made: dict[str, dict[str, Any]] = {
        "label": {"datatype": "BYTES", "shape": [count], "data": [row["label"] or "" for row in rows]},
        "probability": {"datatype": "FP64", "shape": [count], "data": [row["probability"] for row in rows]},
        "probabilities": {
            "datatype": "FP64", "shape": [count, len(model.classes)], "data": proba.ravel().tolist(),
        },
        "abstained": {"datatype": "BOOL", "shape": [count], "data": [row["abstained"] for row in rows]},
    }  # fmt: skip
    wanted = [one.name for one in asked.outputs or ()] or OUTPUTS
    found: dict[str, Any] = {
        "model_name": name,
        "model_version": str(model.round),
        "parameters": about(model),
        "outputs": [{"name": output, **made[output]} for output in dict.fromkeys(wanted)],
    }
    return found if asked.id is None else {**found, "id": asked.id}


def about(model: Served) -> dict[str, Any]:
    """What tells a model from others."""
    return {
        "round": model.name, "digest": model.digest, "runtime": model.runtime, "classes": list(model.classes),
    }  # fmt: skip


def metadata(name: str, model: Served, rounds: Sequence[int]) -> dict[str, Any]:
    """A model's metadata, as `ModelMetadata` has them."""
    wide = {"probabilities": [-1, len(model.classes)]}
    kinds: dict[str, Literal["BYTES", "FP64", "BOOL"]] = {
        "label": "BYTES", "probability": "FP64", "probabilities": "FP64", "abstained": "BOOL",
    }  # fmt: skip
    return {
        "name": name,
        "versions": [str(number) for number in rounds],
        "platform": f"al-pipeline_{model.runtime}",
        "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": one, "datatype": kinds[one], "shape": wide.get(one, [-1])} for one in OUTPUTS],
        "parameters": about(model),
    }


def encode(answer: Any) -> bytes:
    """An answer as JSON; numbers as `al predict` writes them."""
    return json.dumps(answer, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to try again."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
