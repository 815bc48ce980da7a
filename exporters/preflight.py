"""What an export does about float16's range: `preflight`."""

from collections.abc import Collection

import torch
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.exporters.bundle_files import OnProgress
from gemma_deploy.exporters.calibration.overflow import (
    MIN_PREFLIGHT_TOKENS,
    PREFLIGHT_ROW_TOKENS,
    PREFLIGHT_TOKENS,
    measured_overflow,
    require_held,
)
from gemma_deploy.exporters.calibration.overflow_bounds import bounded_overflow
from gemma_deploy.exporters.calibration.text import token_rows
from gemma_deploy.graph_spec import Lowering, Precision
from gemma_deploy.overflow_report import OverflowReport
from gemma_deploy.tokenizer import GemmaTokenizer


def preflight(  # noqa: PLR0913  # all that it depends on
    checkpoint: Checkpoint,
    tokenizer: GemmaTokenizer | None,
    precision: Precision,
    lowerings: Collection[Lowering],
    formats: Collection[str],
    *,
    text: str | None,
    is_calibrated: bool,
    on_progress: OnProgress,
) -> OverflowReport | None:
    """Find what would overflow float16, and what to divide by; None where nothing computes in it.

    Args:
        checkpoint: The model.
        tokenizer: Its tokenizer; without one the model reads random tokens.
        precision: Of the bundle.
        lowerings: What graphs are written for.
        formats: Names of the matrices that are quantized.
        text: What the model reads; None for the built-in text.
        is_calibrated: Whether it reads anything; else peaks are bounded by the weights.
        on_progress: Called as the work goes on.

    Raises:
        RequestError: The text is too short.
        CheckpointError: The weights cannot be read, or one is not finite.
        ExportError: A tensor overflows that nothing can be folded around.
    """
    used = [precision.of_lowering(x) for x in lowerings]
    # A cache in float16 has attention computed in it.
    if all("float16" not in (x.activations, x.cache) for x in used):
        return None
    if is_calibrated:
        rows = preflight_rows(checkpoint, tokenizer, text)
        report = measured_overflow(checkpoint, rows, on_progress, formats)
    else:
        report = bounded_overflow(checkpoint, on_progress, formats)
    require_held(report)
    return report


def preflight_rows(
    checkpoint: Checkpoint, tokenizer: GemmaTokenizer | None, text: str | None
) -> Tensor:
    """Return what a model reads to find its peaks, int64 [R, S]; random tokens without a tokenizer.

    Raises:
        RequestError: The text is too short.
    """
    if tokenizer is not None:
        return token_rows(
            tokenizer,
            text,
            row_tokens=PREFLIGHT_ROW_TOKENS,
            min_tokens=MIN_PREFLIGHT_TOKENS,
            max_tokens=PREFLIGHT_TOKENS,
            vocab_size=checkpoint.config.vocab_size,
        )
    shape = (PREFLIGHT_TOKENS // PREFLIGHT_ROW_TOKENS, PREFLIGHT_ROW_TOKENS)
    seeded = torch.Generator().manual_seed(0)
    return torch.randint(checkpoint.config.vocab_size, shape, generator=seeded)
