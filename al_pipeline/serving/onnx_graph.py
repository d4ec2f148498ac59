"""Encoders and whole models as ONNX graphs, written node by node from the weights: nothing is traced.

An encoder's graph computes what `features.encoder` does: BERT, RoBERTa, XLM-R or DistilBERT, mean pooling, unit length.
With `quantized`, the weights of its products are 8-bit integers with a scale for each block of a column, and ONNX
Runtime rounds the other factors likewise: half the time. Vectors then have a cosine of .9995 to the exact ones, so that
texts near the boundary of two classes have to be computed again (`margins.py`), 2 to 8 % on four corpora. (Exact
queries, keys and values, and blocks of 16, take a third longer for .9998. One scale for each column and text,
`DynamicQuantizeMatMul`, halves the time once more; but with .99 a quarter of the texts has to be computed again, and
probabilities are wrong by up to .17 in place of .03.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from al_pipeline.errors import BadInput

Array = NDArray[Any]

OPSET = 20
_IR = 10
_MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
_ACTIVATIONS = {"gelu": ("Gelu", "none"), "gelu_new": ("Gelu", "tanh"), "gelu_pytorch_tanh": ("Gelu", "tanh")}
_BLOCK = 32
"""Weights that share a scale. The smaller, the more exact and the slower."""
_LARGEST, _ZERO = 127, 128
_LEAST = np.float32(1e-12)
_FAR = np.float32(-1e9)


class _Names(NamedTuple):
    """The parts of a layer in a family's weights."""

    layer: str
    query: str
    key: str
    value: str
    joined: str
    first_norm: str
    widened: str
    narrowed: str
    last_norm: str


_BERT = _Names(
    "encoder.layer.{}.", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
_DISTIL = _Names(
    "transformer.layer.{}.", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
    "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip
FAMILIES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "distilbert": _DISTIL}
"""The kinds of transformers (`model_type`) that can be converted."""


class Graph:
    """A graph that is being written. Methods return the names of what they add."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._known: dict[bytes, str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._count = 0

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """An input of the whole graph; the same name is the same input."""
        if all(known.name != name for known in self._inputs):
            self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: Array | np.float64) -> str:
        """A constant; equal ones are stored once."""
        array = np.ascontiguousarray(value)
        key = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        if key not in self._known:
            self._known[key] = name = f"c{len(self._known)}"
            self._constants.append(numpy_helper.from_array(array, name))
        return self._known[key]

    def add(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """A node; the name of its output, or a list of names."""
        names = [f"n{self._count}_{place}" for place in range(outputs)]
        self._count += 1
        self._nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **attributes))
        return names if outputs > 1 else names[0]

    def branch(self, kind: int, shape: Sequence[int | str], add: Callable[[], str]) -> onnx.GraphProto:
        """A branch of an `If`, with what `add` adds; `kind` and `shape` of what it returns the name of."""
        outer, self._nodes = self._nodes, []
        output = self.add("Identity", add())
        inner, self._nodes = self._nodes, outer
        return helper.make_graph(inner, output, [], [helper.make_tensor_value_info(output, kind, shape)])

    def model(self, outputs: Mapping[str, tuple[str, int, Sequence[int | str]]]) -> onnx.ModelProto:
        """The finished model; `outputs` gives each output's node, type and shape."""
        infos = []
        for name, (node, kind, shape) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [node], [name]))
            infos.append(helper.make_tensor_value_info(name, kind, shape))
        graph = helper.make_graph(self._nodes, "al-pipeline", self._inputs, infos, self._constants)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR, producer_name="al-pipeline")


def check_convertible(config: Mapping[str, Any]) -> None:
    """Raise BadInput if an encoder of this configuration cannot be converted, with the reason."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise BadInput(
            f"an encoder of the kind {kind!r} cannot be converted to ONNX, only {', '.join(FAMILIES)}; use the runtime "
            "torch"
        )
    activation = config.get("hidden_act", config.get("activation", "gelu"))
    if activation not in (*_ACTIVATIONS, "relu"):
        raise BadInput(f"an encoder with the activation {activation!r} cannot be converted to ONNX")
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise BadInput("an encoder with relative positions, or a decoder, cannot be converted to ONNX")


def encoder_model(weights: Mapping[str, Array], config: Mapping[str, Any], quantized: bool) -> onnx.ModelProto:
    """The graph of an encoder for one text: `input_ids` (1, tokens) int64 to `vector` (1, d) float32."""
    graph = Graph()
    ids = graph.input("input_ids", TensorProto.INT64, [1, "tokens"])
    vector = add_encoder(graph, ids, None, weights, config, quantized)
    return graph.model({"vector": (vector, TensorProto.FLOAT, [1, "width"])})


def add_encoder(
    graph: Graph, ids: str, mask: str | None, weights: Mapping[str, Array], config: Mapping[str, Any], quantized: bool
) -> str:
    """Add an encoder to a graph: token ids (n, tokens), and a mask of them unless n is 1, to vectors (n, d).

    Raises BadInput if it cannot be converted.
    """
    check_convertible(config)
    names = FAMILIES[config["model_type"]]
    layers = int(config.get("num_hidden_layers", config.get("n_layers", 0)))
    heads = int(config.get("num_attention_heads", config.get("n_heads", 0)))
    epsilon = float(config.get("layer_norm_eps", 1e-12))
    activation = config.get("hidden_act", config.get("activation", "gelu"))
    try:
        states = _embed(graph, ids, weights, config, epsilon)
        for number in range(layers):
            states = _layer(
                graph, states, mask, weights, names, names.layer.format(number), heads, epsilon, activation, quantized
            )
    except KeyError as error:
        raise BadInput(f"the encoder has no weights {error}, so it cannot be converted to ONNX") from None
    return _pool(graph, states, mask)


def _embed(graph: Graph, ids: str, weights: Mapping[str, Array], config: Mapping[str, Any], epsilon: float) -> str:
    table = weights["embeddings.word_embeddings.weight"]
    places = weights["embeddings.position_embeddings.weight"]
    if config["model_type"] in ("roberta", "xlm-roberta"):
        places = places[int(config.get("pad_token_id", 1)) + 1 :]
    kinds = weights.get("embeddings.token_type_embeddings.weight")
    if kinds is not None:
        places = places + kinds[0]
    length = graph.add("Shape", ids, start=1, end=2)
    zero = graph.constant(np.zeros(1, np.int64))
    own = graph.add("Slice", graph.constant(places), zero, length, zero)
    summed = graph.add("Add", graph.add("Gather", graph.constant(table), ids), own)
    return _norm(graph, summed, weights, "embeddings.LayerNorm", epsilon)


def _layer(
    graph: Graph,
    states: str,
    mask: str | None,
    weights: Mapping[str, Array],
    names: _Names,
    at: str,
    heads: int,
    epsilon: float,
    activation: str,
    quantized: bool,
) -> str:
    def product(found: str, *parts: str) -> str:
        weight = np.concatenate([weights[f"{at}{part}.weight"] for part in parts]).T
        bias = np.concatenate([weights[f"{at}{part}.bias"] for part in parts])
        return _product(graph, found, weight, bias, quantized)

    together = product(states, names.query, names.key, names.value)
    parts = graph.add("Split", together, axis=-1, num_outputs=3, outputs=3)
    padding = [] if mask is None else ["", graph.add("Cast", mask, to=TensorProto.INT32)]
    attended = graph.add(
        "MultiHeadAttention", *parts, *padding, domain=_MICROSOFT, num_heads=heads, mask_filter_value=float(_FAR)
    )
    states = _norm(
        graph, graph.add("Add", product(attended, names.joined), states), weights, f"{at}{names.first_norm}", epsilon
    )
    wide = product(states, names.widened)
    if activation == "relu":
        wide = graph.add("Relu", wide)
    else:
        kind, approximate = _ACTIVATIONS[activation]
        wide = graph.add(kind, wide, approximate=approximate)
    narrow = graph.add("Add", product(wide, names.narrowed), states)
    return _norm(graph, narrow, weights, f"{at}{names.last_norm}", epsilon)


def _product(graph: Graph, states: str, weight: Array, bias: Array, quantized: bool) -> str:
    """`states @ weight + bias`; weight is (inputs, outputs)."""
    if not quantized or weight.shape[0] % _BLOCK:
        return str(graph.add("Add", graph.add("MatMul", states, graph.constant(weight)), graph.constant(bias)))
    inputs, outputs = weight.shape
    blocks = weight.T.reshape(outputs, inputs // _BLOCK, _BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=-1), _LEAST) / np.float32(_LARGEST)
    whole = (np.clip(np.rint(blocks / scales[..., None]), -_LARGEST, _LARGEST) + _ZERO).astype(np.uint8)
    return str(
        graph.add(
            "MatMulNBits", states, graph.constant(whole), graph.constant(scales.astype(np.float32)), "", "",
            graph.constant(bias), domain=_MICROSOFT, K=inputs, N=outputs, bits=8, block_size=_BLOCK, accuracy_level=4,
        )
    )  # fmt: skip


def _norm(graph: Graph, states: str, weights: Mapping[str, Array], at: str, epsilon: float) -> str:
    scale, bias = (graph.constant(weights[f"{at}.{name}"]) for name in ("weight", "bias"))
    return str(graph.add("LayerNormalization", states, scale, bias, axis=-1, epsilon=epsilon))


def _pool(graph: Graph, states: str, mask: str | None) -> str:
    """The mean over the tokens, of unit length."""
    axis = graph.constant(np.array([1], np.int64))
    if mask is not None:
        own = graph.add(
            "Unsqueeze", graph.add("Cast", mask, to=TensorProto.FLOAT), graph.constant(np.array([2], np.int64))
        )
        states = graph.add("Mul", states, own)
    total = graph.add("ReduceSum", states, axis, keepdims=0)  # the length cancels out below
    norm = graph.add("ReduceL2", total, axis, keepdims=1)
    return str(graph.add("Div", total, graph.add("Max", norm, graph.constant(np.array([_LEAST], np.float32)))))
