"""A classifier on frozen features as part of an ONNX graph: TF-IDF, weights, calibration, classes without labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from al_pipeline.serving.head_arrays import HeadArrays
from al_pipeline.serving.onnx_graph import Array, Graph

_LEAST = 1e-12


def add_head(graph: Graph, head: HeadArrays, vectors: str | None) -> str:
    """Add a classifier to a graph; `vectors` (n, d) are the encoder's. Returns probabilities (n, C), float64."""
    terms = [] if vectors is None or head.dense is None else [_dense(graph, vectors, head.dense)]
    if head.sparse is not None and head.idf is not None:
        terms.append(_sparse(graph, head.idf, head.sparse))
    total = graph.constant(np.asarray(head.bias, np.float64))
    for term in terms:
        total = graph.add("Add", term, total)
    if head.is_estimate:  # calibration follows the estimator's own probabilities
        own = graph.add("Softmax", graph.add("Mul", total, graph.constant(np.float64(head.scale))), axis=-1)
        total = graph.add("Log", graph.add("Max", own, graph.constant(np.float64(_LEAST))))
    warm = graph.add("Div", total, graph.constant(np.float64(head.temperature)))
    shared = graph.add("Softmax", graph.add("Add", warm, graph.constant(head.shift)), axis=-1)
    extended = graph.add("Add", graph.add("MatMul", shared, graph.constant(head.spread)), graph.constant(head.base))
    axis = graph.constant(np.array([1], np.int64))
    return str(graph.add("Div", extended, graph.add("ReduceSum", extended, axis, keepdims=1)))


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
