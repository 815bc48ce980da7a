"""Torch modules to ONNX graphs that hold no weights: `write_graph`.

torch.export traces the model on the meta device, torch's ONNX exporter translates it with the ops of
a lowering, and every initializer becomes a byte range of the bundle's weights file.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch.export import Dim, ExportedProgram

from gemma_deploy.bundle import WEIGHTS_FILE
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import ExportError
from gemma_deploy.exporters.graph_modules import DecodeModule, PrefillModule, meta_model
from gemma_deploy.exporters.lowering.onnxruntime_ops import OPSET_VERSION, translation_table
from gemma_deploy.exporters.weights import StoredTensor, stored_name
from gemma_deploy.graph_spec import GraphSpec, Phase, Precision, TensorSpec, graph_spec
from gemma_deploy.model.rotary import inverse_frequencies

# What symbolic dims are while tracing; any distinct sizes above 1 would do.
_TRACED_SIZES = {"B": 2, "S": 3, "L": 2, "T": 8}
_FREQUENCIES = "frequencies."


def write_graph(
    config: GemmaConfig,
    phase: Phase,
    precision: Precision,
    weights: Mapping[str, tuple[StoredTensor, int]],
    path: Path,
) -> None:
    """Write the ONNX graph of a phase, its weights as external data in the weights file.

    Args:
        config: The model.
        phase: `prefill` or `decode`.
        precision: Dtypes of weights, activations and cache.
        weights: Every tensor of the weights file with its offset, by name.
        path: The file to create, in the folder of the weights file.

    Raises:
        ExportError: torch could not export or translate the model.
    """
    spec = graph_spec(config, phase, precision.cache)
    model = _translate(_trace(config, spec, precision), precision)
    _name_interface(model.graph, spec)
    _externalize(model.graph, config, weights)
    _tidy(model)
    model.producer_name, model.producer_version = "gemma-deploy", None
    ir.save(model, path)


def _trace(config: GemmaConfig, spec: GraphSpec, precision: Precision) -> ExportedProgram:
    """Export the phase's module on the meta device, with the spec's symbolic dims."""
    module_class = PrefillModule if spec.phase == "prefill" else DecodeModule
    module = module_class(meta_model(config, _torch_dtype(precision.activations)))
    dims = {letter: Dim(letter) for letter in ("B", "S", "L", "T")}
    arguments = tuple(_example(tensor) for tensor in spec.inputs)
    dynamic = [
        {axis: dims[size] for axis, size in enumerate(tensor.dims) if isinstance(size, str)}
        for tensor in spec.inputs
    ]
    num_named = len(spec.inputs) - len(spec.cache_inputs)
    dynamic_shapes = (*dynamic[:num_named], tuple(dynamic[num_named:]))
    with _quiet_torch(), torch.no_grad():
        return torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes)


def _example(tensor: TensorSpec) -> torch.Tensor:
    sizes = [_TRACED_SIZES[size] if isinstance(size, str) else size for size in tensor.dims]
    return torch.zeros(sizes, dtype=_torch_dtype(tensor.dtype), device="meta")


def _translate(program: ExportedProgram, precision: Precision) -> ir.Model:
    with _quiet_torch():
        translated = torch.onnx.export(
            program,
            opset_version=OPSET_VERSION,
            dynamo=True,
            # The optimizer reads weights to fold constants, and here there are none.
            optimize=False,
            verbose=False,
            custom_translation_table=translation_table(precision.weights),
        )
    if translated is None:
        raise ExportError("torch.onnx.export returned no program")
    return translated.model


def _name_interface(graph: ir.Graph, spec: GraphSpec) -> None:
    """Give inputs and outputs the names and symbolic dims of the spec."""
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        if len(values) != len(tensors):
            raise ExportError(
                f"the traced {spec.phase} graph has {len(values)} inputs or outputs where "
                f"{len(tensors)} were expected: this torch version is not supported"
            )
        for value, tensor in zip(values, tensors, strict=True):
            value.name = tensor.name
            value.shape = ir.Shape(tensor.dims)
            value.dtype = ir.DataType[_ir_name(tensor.dtype)]


def _externalize(
    graph: ir.Graph, config: GemmaConfig, weights: Mapping[str, tuple[StoredTensor, int]]
) -> None:
    """Point every initializer at its bytes in the weights file; frequencies go into the graph."""
    for traced_name, value in list(graph.initializers.items()):
        name = traced_name.removeprefix("causal_lm.")
        if name.startswith(_FREQUENCIES):
            rope = config.rope_parameters[name.removeprefix(_FREQUENCIES)]  # type: ignore[index]  # the key is a layer type
            table = inverse_frequencies(rope, config.head_dim, torch.device("cpu"))
            constant = ir.tensor(table.numpy(), name=name)
        else:
            constant = _external(weights, name, config)
        del graph.initializers[traced_name]
        value.name = constant.name
        value.const_value = constant
        value.dtype, value.shape = constant.dtype, ir.Shape(constant.shape.numpy())
        graph.initializers.add(value)


def _external(
    weights: Mapping[str, tuple[StoredTensor, int]], name: str, config: GemmaConfig
) -> ir.ExternalTensor:
    if name == "lm_head.weight" and config.tie_word_embeddings:
        name = "model.embed_tokens.weight"
    stored, offset = weights[stored_name(name)]
    return ir.ExternalTensor(
        location=WEIGHTS_FILE,
        offset=offset,
        length=stored.size_bytes,
        dtype=ir.DataType[_ir_name(stored.dtype)],
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


def _torch_dtype(name: str) -> torch.dtype:
    return {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "int64": torch.int64,
    }[name]


def _ir_name(dtype: str) -> str:
    return {"float32": "FLOAT"}.get(dtype, dtype.upper())


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Turn torch's export failures into ours, and keep its chatter off the terminal."""
    loggers: Sequence[logging.Logger] = [
        logging.getLogger(n) for n in ("torch.onnx", "torch.export")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as err:
        raise ExportError(
            f"torch {torch.__version__} could not export the model: {err}. The version is probably "
            "not supported yet: gemma-deploy is tested with torch 2.13"
        ) from err
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
