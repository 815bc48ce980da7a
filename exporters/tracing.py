"""The torch model to an ONNX model that every lowering starts from: `trace_model`.

torch.export traces the model on the meta device, so there are no weights; torch's ONNX exporter
translates it, and leaves the ops that lowerings write differently as nodes of their own.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from torch.export import Dim, ExportedProgram

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import ExportError
from gemma_deploy.exporters.graph_modules import DecodeModule, PrefillModule, meta_model
from gemma_deploy.exporters.lowering.traced_ops import translation_table
from gemma_deploy.graph_spec import DType, GraphSpec, Phase, TensorSpec, graph_spec
from gemma_deploy.model import GemmaForCausalLM
from gemma_deploy.residual_scaling import ResidualScaling

# Of the translation; lowerings state the version of what they write. All ops that torch's exporter
# uses here are the same from 23 to 24.
_OPSET_VERSION = 23
# What symbolic dims are while tracing; any sizes above 1 would do.
_TRACED_SIZES = {"B": 2, "S": 3, "L": 2, "T": 8}


def trace_model(
    config: GemmaConfig, phase: Phase, activations: DType, scaling: ResidualScaling | None = None
) -> ir.Model:
    """Return the model of a phase as ONNX, its traced ops not yet lowered.

    Args:
        config: The model.
        phase: `prefill` or `decode`.
        activations: What it computes in and caches.
        scaling: What its weights are divided by; None for nothing.

    Returns:
        Inputs and outputs are named and typed as in `graph_spec`. Initializers have no values, and
        the names of the torch model's parameters.

    Raises:
        ExportError: torch could not export or translate the model.
    """
    spec = graph_spec(config, phase, activations)
    meta = meta_model(config, _torch_dtype(activations), scaling)
    model = _translate(_trace(meta, spec))
    _name_interface(model.graph, spec)
    return model


def ir_dtype(name: str) -> ir.DataType:
    """Return onnx_ir's element type of a dtype by numpy's name."""
    return ir.DataType[{"float32": "FLOAT"}.get(name, name.upper())]


def _trace(meta: GemmaForCausalLM, spec: GraphSpec) -> ExportedProgram:
    """Export the phase's module of a model on the meta device, with the spec's symbolic dims."""
    module_class = PrefillModule if spec.phase == "prefill" else DecodeModule
    module = module_class(meta)
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


def _translate(program: ExportedProgram) -> ir.Model:
    with _quiet_torch():
        translated = torch.onnx.export(
            program,
            opset_version=_OPSET_VERSION,
            dynamo=True,
            # The optimizer reads weights to fold constants, and here there are none.
            optimize=False,
            verbose=False,
            custom_translation_table=translation_table(),
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
            value.dtype = ir_dtype(tensor.dtype)


def _torch_dtype(name: str) -> torch.dtype:
    return {
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "int64": torch.int64,
    }[name]


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
