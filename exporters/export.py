"""Checkpoint folder to bundle folder: `export_checkpoint`."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from gemma_deploy.bundle import Bundle
from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.bundle_files import BundlePlan, OnProgress, write_bundle
from gemma_deploy.exporters.calibration.cache_scales import measured_cache_scales
from gemma_deploy.exporters.calibration.divergence import measured_rows
from gemma_deploy.exporters.export_checks import (
    check_config,
    check_nothing_else_is_replaced,
    choose_lowerings,
    require_space,
)
from gemma_deploy.exporters.preflight import preflight, preflight_rows
from gemma_deploy.exporters.quantization.automatic import candidates_of
from gemma_deploy.exporters.quantization.options import QuantizationOptions, formats_of
from gemma_deploy.exporters.quantization.prepare import (
    PreparedWeights,
    possible_options,
    prepare,
)
from gemma_deploy.exporters.weights import plan_cache_scales, plan_weights
from gemma_deploy.graph_spec import CacheDType, DType, Lowering, Precision
from gemma_deploy.manifest import MANIFEST_FILE
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.staging import check_replaceable, staged_folder
from gemma_deploy.tokenizer import GemmaTokenizer


def export_checkpoint(  # noqa: PLR0913  # a keyword for each decision
    checkpoint: Path,
    output: Path,
    *,
    dtype: DType | None = None,
    cache_dtype: CacheDType | None = None,
    graphs: Iterable[Lowering] | None = None,
    quantization: QuantizationOptions | None = None,
    calibration_text: str | None = None,
    is_calibrated: bool = True,
    force: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> Bundle:
    """Turn a Gemma checkpoint into a bundle: ONNX graphs of each phase over one weights file.

    The bundle appears whole or not at all. Memory stays flat whatever the model's size: the graphs
    are traced without weights, and weights are streamed.

    Args:
        checkpoint: Folder in Hugging Face layout (config.json, *.safetensors, tokenizer files).
        output: The bundle folder to create.
        dtype: What to store the weights in; None keeps the checkpoint's own. float32 and float16
            graphs compute in that dtype, bfloat16 graphs in float32 (those for TensorRT in
            bfloat16); norms and logits are float32. With `quantization` what graphs compute in;
            None then means float32, and float16 on TensorRT.
        cache_dtype: What the KV cache holds, but on TensorRT; None for what graphs compute in.
            Scales of int8 are measured on the text, and portable graphs do without it.
        graphs: Lowerings to write graphs of; those for ONNX Runtime are always written. None adds
            those for TensorRT, unless no engine can have them: in float32, or with nf4 weights.
        quantization: What matrices to quantize, and how; None for none.
        calibration_text: What the model reads where activations are measured, and at its end where
            quantized weights are compared with the original; None for built-in texts.
        is_calibrated: Whether the model is run on text; else what overflows float16 is bounded by the
            weights, int4 is rounded to nearest unless another method is asked for, and how far
            quantized weights are from the original is not known.
        force: Whether an existing bundle at `output` may be replaced.
        on_progress: Called as the work goes on.

    Raises:
        RequestError: Graphs that cannot be of this dtype or of such weights, or matrices that the
            blocks do not divide.
        CheckpointError: Weights missing, truncated, of the wrong shape or dtype, or not finite.
        ConfigError: Another model family, bidirectional attention (an encoder), or a head_dim that
            ONNX Runtime's attention does not take.
        TokenizerError: The tokenizer's files cannot be read.
        OutputExistsError: `output` exists and `force` is False, or holds more than a bundle.
        ExportError: The disk is too small, `output` cannot be written, what was written gives no
            numbers, or torch failed.
    """
    # Before the working directory itself may be replaced by the bundle.
    place = output.resolve()
    check_replaceable(output.absolute(), force=force, replaceable=MANIFEST_FILE)
    check_nothing_else_is_replaced(checkpoint, output)
    source = Checkpoint.open(checkpoint)
    check_config(source)
    # Read first: a bundle whose tokenizer cannot be read would be of no use.
    has_tokenizer = bool(GemmaTokenizer.files(checkpoint))
    tokenizer = GemmaTokenizer.from_pretrained(checkpoint) if has_tokenizer else None
    formats = _formats(source, quantization)
    if quantization is not None:
        quantization = possible_options(
            quantization, checkpoint, tokenizer, is_calibrated=is_calibrated
        )
    if formats or quantization is not None:
        precision = Precision.of_quantized(dtype, cache_dtype)
    else:
        precision = Precision.of(dtype or _own_dtype(source), cache_dtype)
    if precision.cache == "int8" and not is_calibrated:
        raise RequestError(
            "--cache-dtype int8 measures its scales on a text, and --no-calibration forbids it: drop "
            "one of them"
        )
    lowerings = choose_lowerings(graphs, precision, formats)
    judged = None
    if quantization is not None and tokenizer is not None and is_calibrated:
        judged = measured_rows(tokenizer, calibration_text, source.config)
    with (
        contextlib.ExitStack() as held,
        staged_folder(output, force=force, replaceable=MANIFEST_FILE) as folder,
    ):
        overflow = preflight(
            source,
            tokenizer,
            precision,
            lowerings,
            formats.keys(),
            text=calibration_text,
            is_calibrated=is_calibrated,
            on_progress=on_progress,
        )
        scaling = (
            overflow.scaling if overflow is not None and not overflow.scaling.is_none else None
        )
        tensors = plan_weights(source, precision, formats, scaling)
        is_kept = quantization is not None and quantization.keeps_results
        # Calibration keeps its results until the bundle is written; what --auto takes, it decides.
        require_space(folder, sum(x.size_bytes for x in tensors) * (2 if is_kept else 1), output)
        weights = PreparedWeights(formats=formats, method="bitsandbytes" if formats else None)
        if quantization is not None:
            weights = prepare(
                source,
                tokenizer,
                quantization,
                precision,
                text=calibration_text,
                folder=place.with_name(f"{place.name}.calibration"),
                on_progress=on_progress,
            )
        if weights.work is not None:
            held.enter_context(weights.work)  # removed when the bundle is there
        scales = {}
        if precision.cache == "int8":
            rows = preflight_rows(source, tokenizer, calibration_text)
            scales = measured_cache_scales(source, rows, on_progress)
        plan = BundlePlan(
            source=source,
            precision=precision,
            lowerings=lowerings,
            tensors=plan_weights(source, precision, weights.formats, scaling)
            + plan_cache_scales(scales, scaling),
            prepared={**weights.prepared, **scales},
            importance=weights.importance,
            method=weights.method,
            scaling=scaling,
            overflow=overflow,
            choices=weights.choices,
            measured_rows=judged if weights.formats else None,
        )
        write_bundle(plan, folder, on_progress)
        source.check_unchanged("it was being exported")
    return Bundle.open(output if output.name else place)


def _formats(
    source: Checkpoint, quantization: QuantizationOptions | None
) -> dict[str, WeightFormat]:
    """Return how matrices are stored that are quantized, by the checkpoint or by this export."""
    given = {name: WeightFormat("nf4", size) for name, size in source.nf4_block_sizes.items()}
    if given and quantization is not None:
        raise RequestError(
            f"{source.folder} is quantized already ({len(given)} matrices in bitsandbytes' NF4), and "
            f"{quantization.scheme} would be made of what that left over. Export it without "
            "options of quantization, which keeps its codes, or quantize the original checkpoint"
        )
    if quantization is None:
        return given
    if quantization.is_automatic:
        candidates = candidates_of(source.config, quantization)
        return {name: coarsest for name, (coarsest, *_) in candidates.items()}
    return formats_of(source.config, quantization)


def _own_dtype(source: Checkpoint) -> DType:
    """Return what most of the checkpoint's bytes are stored in."""
    sizes: dict[str, int] = {}
    for info in source.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
    return DTYPE_NAMES[max(sizes, key=lambda name: sizes[name])]
