"""Traced models to the ONNX graphs of a bundle: `write_graph`.

A graph holds no weights: every initializer becomes a byte range of the bundle's weights file. Then
the traced ops are written as a lowering has them.
"""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from gemma_deploy.bundle import WEIGHTS_FILE
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT
from gemma_deploy.config import GemmaConfig
from gemma_deploy.exporters.lowering.lower import lower
from gemma_deploy.exporters.lowering.quantized_weight import QuantizedWeight
from gemma_deploy.exporters.lowering.traced_ops import ATTENTION, DOMAIN, inputs_of
from gemma_deploy.exporters.passes.inverse_reshapes import drop_inverse_reshapes
from gemma_deploy.exporters.tracing import ir_dtype
from gemma_deploy.exporters.weights import StoredTensor, stored_name
from gemma_deploy.graph_spec import Lowering, Precision, cache_names, cache_scale_names
from gemma_deploy.model.rotary import inverse_frequencies
from gemma_deploy.ops.static_cache_attention import INPUTS

_FREQUENCIES = "frequencies."


def write_graph(
    traced: ir.Model,
    lowering: Lowering,
    precision: Precision,
    config: GemmaConfig,
    weights: Mapping[str, tuple[StoredTensor, int]],
    path: Path,
) -> None:
    """Write the ONNX graph of a traced model, its weights as external data in the weights file.

    Args:
        traced: From `trace_model`; not changed.
        lowering: What the graph is written for.
        precision: What the graphs of the lowering compute in, as they were traced, and cache.
        config: The model.
        weights: Every tensor of the weights file with its offset, by name.
        path: The file to create, in the folder of the weights file.
    """
    model = traced.clone()
    _retype_caches(model.graph, config, ir_dtype(precision.cache))
    quantized = _externalize(model.graph, config, weights)
    if precision.cache == "int8":
        _give_cache_scales(model.graph, config, weights)
    lower(model, lowering, ir_dtype(precision.activations), quantized)
    drop_inverse_reshapes(model)
    _tidy(model)
    model.producer_name, model.producer_version = "gemma-deploy", None
    ir.save(model, path)


def _retype_caches(graph: ir.Graph, config: GemmaConfig, dtype: ir.DataType) -> None:
    """Give the caches their dtype: they were traced in that of the activations."""
    layers = range(config.num_hidden_layers)
    names = {name for layer in layers for pair in cache_names(layer) for name in pair}
    for value in (*graph.inputs, *graph.outputs):
        if value.name in names:
            value.dtype = dtype


def _give_cache_scales(
    graph: ir.Graph, config: GemmaConfig, weights: Mapping[str, tuple[StoredTensor, int]]
) -> None:
    """Make the scales of int8 caches inputs of the traced attention, behind those it was traced with."""
    of_cache = {cache_names(x)[0][0]: cache_scale_names(x) for x in range(config.num_hidden_layers)}
    for node in graph:
        if (node.domain, node.op_type) != (DOMAIN, ATTENTION):
            continue
        key_cache = inputs_of(node)[INPUTS.index("key_cache")]
        num_inputs = len(node.inputs)
        scales = [_initializer(*weights[name]) for name in of_cache[str(key_cache.name)]]
        node.resize_inputs(num_inputs + len(scales))
        for index, scale in enumerate(scales, num_inputs):
            graph.register_initializer(scale)
            node.replace_input_with(index, scale)


def _initializer(stored: StoredTensor, offset: int) -> ir.Value:
    constant = _external(stored, offset)
    return ir.Value(
        name=constant.name,
        const_value=constant,
        type=ir.TensorType(constant.dtype),
        shape=ir.Shape(constant.shape.numpy()),
    )


def _externalize(
    graph: ir.Graph, config: GemmaConfig, weights: Mapping[str, tuple[StoredTensor, int]]
) -> dict[ir.Value, QuantizedWeight]:
    """Point every initializer at its bytes in the weights file; frequencies go into the graph.

    Returns:
        The values of quantized weights, which have no one form: they are initializers no more.
    """
    quantized = {}
    for traced_name, value in list(graph.initializers.items()):
        name = traced_name.removeprefix("causal_lm.")
        del graph.initializers[traced_name]
        if name.startswith(_FREQUENCIES):
            rope = config.rope_parameters[name.removeprefix(_FREQUENCIES)]  # type: ignore[index]  # the key is a layer type
            table = inverse_frequencies(rope, config.head_dim, torch.device("cpu"))
            constant: ir.TensorProtocol = ir.tensor(table.numpy(), name=name)
        else:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                name = EMBEDDING_WEIGHT
            stored, offset = weights[stored_name(name)]
            if stored.format.is_quantized:
                quantized[value] = QuantizedWeight(
                    stored.format, stored.parts, WEIGHTS_FILE, offset
                )
                continue
            constant = _external(stored, offset)
        value.name = constant.name
        value.const_value = constant
        value.dtype, value.shape = constant.dtype, ir.Shape(constant.shape.numpy())
        graph.initializers.add(value)
    return quantized


def _external(stored: StoredTensor, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location=WEIGHTS_FILE,
        offset=offset,
        length=stored.size_bytes,
        dtype=ir_dtype(stored.format.scheme),
        shape=ir.Shape(stored.shape),
        name=stored.name,
    )


def _tidy(model: ir.Model) -> None:
    """Drop what tracing left behind: unused and repeated nodes, inner shapes, notes on its origin.

    Only constants of the tracing are compared by their bytes: those of weights are elsewhere.
    """
    interface = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for node in model.graph:
        for value in node.outputs:
            if id(value) not in interface:
                # They speak of the tracer's own symbols, and ONNX Runtime infers them anew.
                value.shape = None
    weights = dict(model.graph.initializers)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for name in weights:
        del model.graph.initializers[name]
    passes.DeduplicateInitializersPass()(model)
    model.graph.initializers.update(weights)
    for tidy in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.NameFixPass(),
    ):
        tidy(model)
