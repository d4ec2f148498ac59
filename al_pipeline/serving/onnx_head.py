"""A classifier on frozen features as part of an ONNX graph: TF-IDF, weights, calibration, classes without labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from al_pipeline.errors import BadInput
from al_pipeline.models.estimators import SHARPNESS, Estimate
from al_pipeline.models.linear import Head
from al_pipeline.models.probabilities import FLOOR
from al_pipeline.models.text_model import TextModel
from al_pipeline.serving.onnx_graph import Array, Graph

_LEAST = 1e-12
CENTROID = "centroid"


def check_head(model: TextModel) -> None:
    """Raise BadInput if a classifier cannot be converted, with the reason."""
    head = model.head
    if isinstance(head, Estimate) and head.name != CENTROID:
        raise BadInput(f"the model {head.name!r} is code of its own, which cannot be converted to ONNX")
    if not head.widths:
        raise BadInput("the model has labels of fewer than two classes, so there is nothing to convert yet")


def add_head(graph: Graph, model: TextModel, vectors: str | None) -> str:
    """Add a classifier to a graph; `vectors` (n, d) are the encoder's. Returns probabilities (n, C), float64."""
    head = model.head
    weights: list[Array]
    bias: Array
    if isinstance(head, Head):
        weights, bias, scale = list(head.weights), head.bias, 1.0
        shift = np.array(head.shift) if head.shift else np.zeros(len(head.seen))
    else:
        weights = [head.arrays[f"means.{number}"] for number in range(len(head.widths))]
        bias, scale, shift = np.zeros(len(head.seen)), SHARPNESS, np.zeros(len(head.seen))
    terms = [] if vectors is None else [_dense(graph, vectors, weights.pop(0))]
    if model.tfidf is not None:
        terms.append(_sparse(graph, model.tfidf.idf, weights.pop(0)))
    total = graph.constant(np.asarray(bias, np.float64))
    for term in terms:
        total = graph.add("Add", term, total)
    if isinstance(head, Estimate):  # calibration follows the estimator's own probabilities
        own = graph.add("Softmax", graph.add("Mul", total, graph.constant(np.float64(scale))), axis=-1)
        total = graph.add("Log", graph.add("Max", own, graph.constant(np.float64(_LEAST))))
    warm = graph.add("Div", total, graph.constant(np.float64(head.temperature)))
    shared = graph.add("Softmax", graph.add("Add", warm, graph.constant(shift)), axis=-1)
    return _over_all(graph, shared, head)


def _dense(graph: Graph, vectors: str, weights: Array) -> str:
    wide = graph.add("Cast", vectors, to=TensorProto.DOUBLE)
    return str(graph.add("MatMul", wide, graph.constant(weights.T.astype(np.float64))))


def _sparse(graph: Graph, idf: Array, weights: Array) -> str:
    """TF-IDF from the columns of a text's terms and their counts, (n, terms) each, times the weights.

    A count of 0 is no term, so that texts of different length can be filled up.
    """
    terms = graph.input("terms", TensorProto.INT64, ["texts", "terms"])
    counts = graph.input("counts", TensorProto.FLOAT, ["texts", "terms"])
    one, nothing = graph.constant(np.float64(1)), graph.constant(np.float64(0))
    often = graph.add("Cast", counts, to=TensorProto.DOUBLE)
    frequency = graph.add("Add", graph.add("Log", graph.add("Max", often, one)), one)
    raw = graph.add("Mul", frequency, graph.add("Gather", graph.constant(idf.astype(np.float64)), terms))
    raw = graph.add("Where", graph.add("Greater", often, nothing), raw, nothing)
    axis = graph.constant(np.array([1], np.int64))
    norm = graph.add("Max", graph.add("ReduceL2", raw, axis, keepdims=1), graph.constant(np.float64(_LEAST)))
    own = graph.add("Unsqueeze", graph.add("Div", raw, norm), graph.constant(np.array([2], np.int64)))
    rows = graph.add("Gather", graph.constant(np.ascontiguousarray(weights.T, np.float32)), terms)
    wide = graph.add("Cast", rows, to=TensorProto.DOUBLE)
    return str(graph.add("ReduceSum", graph.add("Mul", wide, own), axis, keepdims=0))


def _over_all(graph: Graph, shared: str, head: Head | Estimate) -> str:
    """What `over_all_classes` computes."""
    count = len(head.classes)
    prior = 1 / (sum(head.counts.values()) + count)
    places = [head.classes.index(name) for name in head.seen]
    spread = np.zeros((len(places), count))
    spread[np.arange(len(places)), places] = 1 - prior * (count - len(places))
    base = np.full(count, prior)
    base[places] = 0
    extended = graph.add("Add", graph.add("MatMul", shared, graph.constant(spread)), graph.constant(base + FLOOR))
    axis = graph.constant(np.array([1], np.int64))
    return str(graph.add("Div", extended, graph.add("ReduceSum", extended, axis, keepdims=1)))


def add_refined(graph: Graph, rough: str, margin: float, classes: int, exact: Callable[[], str]) -> str:
    """Add what `margins.refined` does: `rough` (n, C), in rows within `margin` replaced by what `exact` adds."""
    best, _ = graph.add("TopK", rough, graph.constant(np.array([2], np.int64)), axis=1, outputs=2)
    first, second = graph.add("Split", graph.add("Log", best), axis=1, num_outputs=2, outputs=2)
    close = graph.add("Less", graph.add("Sub", first, second), graph.constant(np.float64(margin)))
    some = graph.add("ReduceMax", graph.add("Cast", close, to=TensorProto.INT32), keepdims=0)
    shape = ("texts", classes)
    again = graph.branch(TensorProto.DOUBLE, shape, lambda: graph.add("Where", close, exact(), rough))
    kept = graph.branch(TensorProto.DOUBLE, shape, lambda: rough)
    return str(graph.add("If", graph.add("Cast", some, to=TensorProto.BOOL), then_branch=again, else_branch=kept))
