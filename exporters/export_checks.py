"""What an export refuses before it does any work."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from gemma_deploy.bundle import Bundle
from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.engine import ENGINES_FOLDER
from gemma_deploy.errors import (
    BundleError,
    ConfigError,
    ExportError,
    OutputExistsError,
    RequestError,
)
from gemma_deploy.graph_spec import LOWERINGS, Lowering, Precision
from gemma_deploy.manifest import MANIFEST_FILE
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.quantization.support import why_not

_HEAD_DIM_MULTIPLE = 8
# Graphs, tokenizer and manifest together; a 262k-entry tokenizer.json has 33 MB.
_SMALL_FILES_BYTES = 64 << 20


def choose_lowerings(
    graphs: Iterable[Lowering] | None,
    precision: Precision,
    formats: Mapping[str, WeightFormat],
) -> tuple[Lowering, ...]:
    """Return the lowerings to write, in the order of `LOWERINGS`.

    Args:
        graphs: What was asked for; None for all that engines and ONNX Runtime can use.
        precision: Of the bundle.
        formats: Of its quantized matrices.

    Raises:
        RequestError: A lowering was asked for that cannot have this precision or these formats.
    """
    is_float32 = precision.weights == "float32"
    if graphs is None:
        fits = not is_float32 and not any(why_not("tensorrt", x) for x in formats.values())
        wanted: set[Lowering] = {"tensorrt"} if fits else set()
    else:
        wanted = set(graphs)
        if is_float32 and "tensorrt" in wanted:
            raise RequestError(
                "TensorRT graphs of a float32 bundle were asked for; engines compute in float16 or "
                "bfloat16: export with --fp16 or --bf16, or without --graphs tensorrt"
            )
        for lowering in wanted:
            for weight_format in formats.values():
                reason = why_not(lowering, weight_format)
                if reason is not None:
                    raise RequestError(reason)
    return tuple(lowering for lowering in LOWERINGS if lowering in wanted | {"onnxruntime"})


def check_nothing_else_is_replaced(checkpoint: Path, output: Path) -> None:
    """Refuse to replace a bundle together with what else lies in its folder."""
    if not output.is_dir():
        return
    if checkpoint.resolve().is_relative_to(output.resolve()):
        raise OutputExistsError(
            f"{output} holds the checkpoint {checkpoint}, which would be replaced with it: choose "
            "another output"
        )
    if not any(output.iterdir()):
        return
    try:
        # Engines are made from a bundle's graphs, and go with it.
        known = {MANIFEST_FILE, ENGINES_FOLDER, *Bundle.open(output).manifest.files}
    except BundleError:
        return  # damaged, and to be replaced: what belongs to it cannot be told
    others = sorted(path.name for path in output.iterdir() if path.name not in known)
    if others:
        raise OutputExistsError(
            f"{output} holds {others[0]}, which is not of the bundle that would be replaced: move "
            "it away, or choose another output"
        )


def check_config(source: Checkpoint) -> None:
    """Refuse models that cannot generate text, or that ONNX Runtime cannot attend in."""
    source.require_text_generator()
    config = source.config
    if config.use_bidirectional_attention:
        raise ConfigError(
            f"{source.folder} attends in both directions (use_bidirectional_attention): an encoder, "
            "which cannot generate text. Only causal models are exported"
        )
    if config.head_dim % _HEAD_DIM_MULTIPLE:
        raise ConfigError(
            f"head_dim is {config.head_dim}; ONNX Runtime's attention operator takes multiples of "
            f"{_HEAD_DIM_MULTIPLE}: run this model with --backend torch"
        )


def require_space(folder: Path, weights_bytes: int, output: Path) -> None:
    """Refuse a disk that is too small.

    Raises:
        ExportError: With what is needed and what is free.
    """
    needed, free = weights_bytes + _SMALL_FILES_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{output.parent} has {format_bytes(free)} free, the bundle needs {format_bytes(needed)} "
            f"({format_bytes(_SMALL_FILES_BYTES)} of it kept for graphs and tokenizer): "
            "free space, choose another output, or a narrower --dtype. Nothing was written"
        )
