"""Everything an export knows of quantized weights before it writes them: `prepare`."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import RequestError, warn
from gemma_deploy.exporters.calibration.text import token_rows
from gemma_deploy.exporters.quantization.automatic import candidates_of, choose_formats
from gemma_deploy.exporters.quantization.awq import run_awq
from gemma_deploy.exporters.quantization.gptq_run import run_gptq
from gemma_deploy.exporters.quantization.importance import measure_importance
from gemma_deploy.exporters.quantization.options import (
    DEFAULT_CALIBRATION_TOKENS,
    Method,
    QuantizationOptions,
    formats_of,
)
from gemma_deploy.exporters.quantization.sensitivity import measure_sensitivities
from gemma_deploy.exporters.quantization.work_folder import OnProgress, WorkFolder
from gemma_deploy.exporters.weights import header_bytes, plan_weights
from gemma_deploy.graph_spec import Precision
from gemma_deploy.quantization.choices import Choice
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.tokenizer import GemmaTokenizer

ROW_TOKENS: Final = 512
# Fewer say too little of how strong inputs are, and of which go together.
_MIN_TOKENS: Final[Mapping[Method, int]] = MappingProxyType(
    {"imatrix": 64, "awq": 2048, "gptq": 2048}
)
_RECIPE: Final = 2
"""To be raised when calibration finds something else of the same inputs."""
SENSITIVITY_TOKENS: Final = 512
"""Read by --auto. Time grows with the square of the number of layers, so there are few of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedWeights:
    """What is stored how.

    Attributes:
        formats: Of every quantized matrix, by the checkpoint's names.
        method: What finds their codes; None where nothing is quantized.
        prepared: Files of the tensors that are made already (`write_weights`).
        choices: What `--auto` chose; empty without it.
        importance: What scales of matrices are searched by (`write_weights`).
        work: Where calibration keeps its results until the export succeeds, or None.
    """

    formats: Mapping[str, WeightFormat] = field(default_factory=dict)
    method: str | None = None
    prepared: Mapping[str, Path] = field(default_factory=dict)
    choices: tuple[Choice, ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    work: WorkFolder | None = None


def possible_options(
    options: QuantizationOptions,
    folder: Path,
    tokenizer: GemmaTokenizer | None,
    *,
    is_calibrated: bool,
) -> QuantizationOptions:
    """Return the options, with rounding for a default method that cannot read text here.

    Args:
        options: What is asked for.
        folder: The checkpoint's.
        tokenizer: Its tokenizer, if it has one.
        is_calibrated: Whether the model may be run on text.

    Raises:
        RequestError: A method that reads text was asked for, and cannot.

    Warns:
        GemmaDeployWarning: Rounding takes the default method's place.
    """
    if not options.needs_calibration or (is_calibrated and tokenizer is not None):
        return options
    obstacle, remedy = "--no-calibration forbids it", "drop one of them"
    if is_calibrated:
        obstacle = f"{folder} has no tokenizer.json"
        remedy = "add the tokenizer's files, or use --method rtn without --auto"
    if options.method is not None or options.is_automatic:
        asked = "--auto" if options.is_automatic else f"--method {options.method}"
        raise RequestError(f"{asked} calibrates on text, and {obstacle}: {remedy}")
    warn(
        f"{options.scheme} weights are rounded to nearest (--method rtn), further from the original "
        f"than by --method {options.chosen_method}, which calibrates on text: {obstacle}"
    )
    return dataclasses.replace(options, method="rtn", calibration_tokens=None)


def prepare(
    checkpoint: Checkpoint,
    tokenizer: GemmaTokenizer | None,
    options: QuantizationOptions,
    precision: Precision,
    *,
    text: str | None,
    folder: Path,
    on_progress: OnProgress,
) -> PreparedWeights:
    """Choose formats and calibrate, where the options ask for it.

    Args:
        checkpoint: The model.
        tokenizer: Its tokenizer; None only where the options need no calibration.
        options: From `possible_options`.
        precision: Of the bundle: what is not quantized.
        text: What the model reads; None for the built-in text.
        folder: Where an interrupted calibration finds what it had done.
        on_progress: Called as the work goes on.

    Raises:
        RequestError: The text is too short, or a budget cannot be met.
        CheckpointError: The weights cannot be read, or one is not finite.
        ExportError: The work folder cannot be written.
    """
    if not options.needs_calibration:
        return PreparedWeights(formats=formats_of(checkpoint.config, options), method="rtn")
    assert tokenizer is not None  # noqa: S101  # `possible_options` saw to it
    choices: tuple[Choice, ...] = ()
    if options.is_automatic:
        choices = _chosen(checkpoint, tokenizer, options, precision, text, on_progress)
        formats = {x.name: x.format for x in choices if x.format.is_quantized}
    else:
        formats = formats_of(checkpoint.config, options)
    method = options.chosen_method
    if method == "rtn":
        return PreparedWeights(formats=formats, method=method, choices=choices)
    num_tokens = options.calibration_tokens or DEFAULT_CALIBRATION_TOKENS[method]
    rows = token_rows(
        tokenizer,
        text,
        row_tokens=min(ROW_TOKENS, num_tokens, checkpoint.config.max_position_embeddings),
        min_tokens=min(_MIN_TOKENS[method], num_tokens),
        max_tokens=num_tokens,
        vocab_size=checkpoint.config.vocab_size,
    )
    work = WorkFolder(folder, _key(checkpoint, formats, method, rows))
    weights = PreparedWeights(formats=formats, method=method, choices=choices, work=work)
    try:
        if method == "imatrix":
            importance = measure_importance(checkpoint, rows, formats, work, on_progress)
            return dataclasses.replace(weights, importance=importance)
        run = run_gptq if method == "gptq" else run_awq
        prepared = run(checkpoint, rows, formats, work, on_progress)
        return dataclasses.replace(weights, prepared=prepared)
    except BaseException:
        work.close()  # a traceback may keep it alive
        raise


def _key(
    checkpoint: Checkpoint, formats: Mapping[str, WeightFormat], method: str, rows: Tensor
) -> dict[str, Any]:
    """Return what the calibrated tensors depend on; of the checkpoint, its files' sizes and dates."""
    files = {info.file for info in checkpoint.tensors.values()}
    return {
        "recipe": _RECIPE,
        "method": method,
        "formats": {name: str(weight_format) for name, weight_format in formats.items()},
        "config": checkpoint.config.to_dict(),
        "files": sorted((x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in files),
        "text": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
    }


def _chosen(
    checkpoint: Checkpoint,
    tokenizer: GemmaTokenizer,
    options: QuantizationOptions,
    precision: Precision,
    text: str | None,
    on_progress: OnProgress,
) -> tuple[Choice, ...]:
    candidates = candidates_of(checkpoint.config, options)
    rows = token_rows(
        tokenizer,
        text,
        row_tokens=SENSITIVITY_TOKENS // 4,
        min_tokens=SENSITIVITY_TOKENS // 4,
        max_tokens=SENSITIVITY_TOKENS,
        vocab_size=checkpoint.config.vocab_size,
    )
    sensitivities = measure_sensitivities(checkpoint, rows, candidates, on_progress)
    coarsest = {name: formats[0] for name, formats in candidates.items()}
    plan = plan_weights(checkpoint, precision, coarsest)
    others = sum(x.size_bytes for x in plan if x.source not in candidates)
    return tuple(
        choose_formats(
            checkpoint.config,
            sensitivities,
            dense=precision.weights,
            other_bytes=others + header_bytes(plan),
            max_size_bytes=options.max_size_bytes,
            max_kl_nats=options.max_kl_nats,
        )
    )
