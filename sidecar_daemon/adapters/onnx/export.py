"""safetensors to ONNX without torch: a BERT encoder with pooling and L2 norm in the graph.

Inputs ``input_ids`` and ``attention_mask``, int64 ``(batch, tokens)``, both axes free; output
``sentence_embedding``, float32 ``(batch, dimensions)``. Token types are always 0, so their row is folded into
the position table. Needs the ``export`` extra (onnx, safetensors), which is imported only when called.
Whoever changes the graph raises ``store.EXPORTER``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from sidecar_daemon.adapters.onnx.manifest import Pooling
from sidecar_daemon.adapters.onnx.seed import tensor_shapes
from sidecar_daemon.domain.errors import Fatal

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from sidecar_daemon.adapters.onnx.manifest import Architecture, Manifest

    Tensors = dict[str, NDArray[np.float32]]

OPSET = 17
"""The first with LayerNormalization; every onnxruntime that we allow runs it."""
MASKED = np.float32(-1e9)
"""Added to the scores of padding. Finite, so that a row of padding alone gives no NaN; exp of it is exactly 0."""


def export(manifest: Manifest, weights: Path, target: Path) -> None:
    """Write the graph of a BERT encoder.

    Args:
        manifest: must have an architecture.
        weights: a safetensors file whose hash was already checked.
        target: the ONNX file to write.

    Raises:
        Fatal: the ``export`` extra is missing, or the weights do not have the manifest's shape.
    """
    if manifest.architecture is None:
        raise Fatal("manifest_bad", f"Model {manifest.name!r} has no architecture: there is nothing to export.")
    onnx = optional("onnx")
    tensors = _read(manifest.name, manifest.architecture, weights)
    onnx.save_model(build(manifest, tensors), str(target))


def optional(module: str) -> Any:
    """Import a part of the ``export`` extra. Raises ``Fatal`` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Fatal(
            "export_extra_missing",
            f"Exporting a model needs the Python package {module!r}: pip install 'sidecar-daemon[export]'.",
        ) from error


def _read(name: str, shape: Architecture, weights: Path) -> Tensors:
    """Read the tensors that the graph needs, widened to float32; pooler heads and buffers are left behind."""
    numpy_files = optional("safetensors.numpy")
    try:
        stored = numpy_files.load_file(str(weights))
    except Exception as error:
        # The library raises its own error type and plain ones alike; the bytes are what the manifest pins.
        raise Fatal("weights_bad", f"Model {name!r}: {weights.name} is not a readable safetensors file.") from error
    stored = {key.removeprefix("bert."): value for key, value in stored.items()}
    wanted = tensor_shapes(shape)
    for key, size in wanted.items():
        found = stored[key].shape if key in stored else "missing"
        if found != size:
            raise Fatal("weights_bad", f"Model {name!r}: tensor {key} is {found}; the manifest says {size}.")
    return {key: np.asarray(stored[key], dtype=np.float32) for key in wanted}


def build(manifest: Manifest, tensors: Tensors) -> Any:
    """The graph as an ``onnx.ModelProto``.

    Args:
        manifest: its architecture, pooling and normalisation shape the graph.
        tensors: every tensor of ``tensor_shapes``, float32, linear weights ``(out, in)``.
    """
    shape = manifest.architecture
    if shape is None:
        raise Fatal("manifest_bad", f"Model {manifest.name!r} has no architecture: there is nothing to export.")
    graph = _Graph()
    states = _embeddings(graph, tensors, shape)
    mask = _attention_mask(graph)
    for layer in range(shape.layers):
        states = _layer(graph, tensors, shape, f"encoder.layer.{layer}", states=states, mask=mask)
    pooled = _pool(graph, manifest.pooling, states)
    if manifest.normalize:
        norm = graph.add("ReduceL2", pooled, axes=[1], keepdims=1)
        pooled = graph.add("Div", pooled, graph.add("Max", norm, graph.constant(np.float32(1e-12))))
    graph.add("Identity", pooled, output="sentence_embedding")
    return graph.model(manifest.dimensions)


def _embeddings(graph: _Graph, tensors: Tensors, shape: Architecture) -> str:
    """Word plus position plus the constant token type, layer-normalised: ``(batch, tokens, hidden)``."""
    words = graph.add("Gather", graph.constant(tensors["embeddings.word_embeddings.weight"]), "input_ids")
    table = tensors["embeddings.position_embeddings.weight"] + tensors["embeddings.token_type_embeddings.weight"][0]
    size = graph.add("Shape", "input_ids", start=1, end=2)
    positions = graph.add("Slice", graph.constant(table), graph.ints(0), size, graph.ints(0))
    added = graph.add("Add", words, positions)
    graph.declare(added, ["batch", "tokens", shape.hidden])
    return _layer_norm(graph, tensors, shape, "embeddings.LayerNorm", added)


def _attention_mask(graph: _Graph) -> str:
    """0 for real tokens, a very negative number for padding: ``(batch, 1, 1, tokens)``."""
    rows = graph.add("Unsqueeze", "attention_mask", graph.ints(1, 2))
    real = graph.add("Cast", rows, to=graph.float_type)
    padding = graph.add("Sub", graph.constant(np.float32(1)), real)
    return graph.add("Mul", padding, graph.constant(MASKED))


def _layer(graph: _Graph, tensors: Tensors, shape: Architecture, name: str, *, states: str, mask: str) -> str:
    """One encoder layer: attention and feed-forward, each with its residual and layer norm."""
    mixed = _attention(graph, tensors, shape, name, states=states, mask=mask)
    dense = graph.linear(tensors, f"{name}.attention.output.dense", mixed)
    added = graph.add("Add", dense, states)
    states = _layer_norm(graph, tensors, shape, f"{name}.attention.output.LayerNorm", added)
    inner = _gelu(graph, graph.linear(tensors, f"{name}.intermediate.dense", states))
    added = graph.add("Add", graph.linear(tensors, f"{name}.output.dense", inner), states)
    return _layer_norm(graph, tensors, shape, f"{name}.output.LayerNorm", added)


def _attention(graph: _Graph, tensors: Tensors, shape: Architecture, name: str, *, states: str, mask: str) -> str:
    """Multi-head self-attention: softmax(q k^T / sqrt(d) + mask) v, heads joined again."""
    width = shape.hidden // shape.heads

    def heads(part: str, order: list[int]) -> str:
        flat = graph.linear(tensors, f"{name}.attention.self.{part}", states)
        split = graph.add("Reshape", flat, graph.ints(0, 0, shape.heads, width))
        return graph.add("Transpose", split, perm=order)

    query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
    scores = graph.add("Div", graph.add("MatMul", query, key), graph.constant(np.sqrt(np.float32(width))))
    weights = graph.add("Softmax", graph.add("Add", scores, mask), axis=3)
    joined = graph.add("Transpose", graph.add("MatMul", weights, value), perm=[0, 2, 1, 3])
    return graph.add("Reshape", joined, graph.ints(0, 0, shape.hidden))


def _gelu(graph: _Graph, states: str) -> str:
    """Half of x times (1 + erf(x / sqrt 2)), the exact form."""
    erf = graph.add("Erf", graph.add("Div", states, graph.constant(np.sqrt(np.float32(2)))))
    scaled = graph.add("Mul", states, graph.add("Add", erf, graph.constant(np.float32(1))))
    return graph.add("Mul", scaled, graph.constant(np.float32(0.5)))


def _layer_norm(graph: _Graph, tensors: Tensors, shape: Architecture, name: str, states: str) -> str:
    weight, bias = graph.constant(tensors[f"{name}.weight"]), graph.constant(tensors[f"{name}.bias"])
    return graph.add("LayerNormalization", states, weight, bias, axis=-1, epsilon=shape.layer_norm_epsilon)


def _pool(graph: _Graph, pooling: Pooling, states: str) -> str:
    """``(batch, tokens, hidden)`` to ``(batch, hidden)``; padding counts for nothing."""
    if pooling is Pooling.CLS:
        return graph.add("Gather", states, graph.constant(np.int64(0)), axis=1)
    real = graph.add("Cast", graph.add("Unsqueeze", "attention_mask", graph.ints(2)), to=graph.float_type)
    total = graph.add("ReduceSum", graph.add("Mul", states, real), graph.ints(1), keepdims=0)
    count = graph.add("ReduceSum", real, graph.ints(1), keepdims=0)
    return graph.add("Div", total, graph.add("Max", count, graph.constant(np.float32(1))))


class _Graph:
    """Collects nodes and constants; every call of ``add`` returns the name of the new node's output."""

    def __init__(self) -> None:
        self._onnx = optional("onnx")
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._shapes: list[Any] = []
        self._ints: dict[tuple[int, ...], str] = {}
        self.float_type: int = self._onnx.TensorProto.FLOAT

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        name = output or f"{operator}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(
            self._onnx.numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name)
        )
        return name

    def ints(self, *values: int) -> str:
        """A vector of int64, one constant for equal values."""
        if values not in self._ints:
            self._ints[values] = self.constant(np.array(values, dtype=np.int64))
        return self._ints[values]

    def declare(self, name: str, shape: list[str | int]) -> None:
        """State a shape that inference cannot see through a Slice: fusions need to know it."""
        self._shapes.append(self._onnx.helper.make_tensor_value_info(name, self.float_type, shape))

    def linear(self, tensors: Tensors, name: str, states: str) -> str:
        product = self.add("MatMul", states, self.constant(tensors[f"{name}.weight"].T))
        return self.add("Add", product, self.constant(tensors[f"{name}.bias"]))

    def model(self, dimensions: int) -> Any:
        helper, kinds = self._onnx.helper, self._onnx.TensorProto
        graph = helper.make_graph(
            self._nodes,
            "encoder",
            [
                helper.make_tensor_value_info(n, kinds.INT64, ["batch", "tokens"])
                for n in ("input_ids", "attention_mask")
            ],
            [helper.make_tensor_value_info("sentence_embedding", kinds.FLOAT, ["batch", dimensions])],
            initializer=self._constants,
            value_info=self._shapes,
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model_gen_version(graph, opset_imports=[opset], producer_name="sidecar_daemon")
