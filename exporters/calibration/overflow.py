"""What float16 would overflow, measured on a text: `measured_overflow`."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.errors import ExportError
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk
from gemma_deploy.exporters.calibration.overflow_scaling import LAYER_TENSORS, overflow_report
from gemma_deploy.model.transformer import GemmaDecoderLayer
from gemma_deploy.overflow_report import FLOAT16_MAX, OverflowReport

PREFLIGHT_TOKENS: Final = 512
"""Default length of the text. Gemma's largest activations are those of `<bos>` and of punctuation,
which any text has, and float32 costs a 2B model 4 GFLOP a token."""
PREFLIGHT_ROW_TOKENS: Final = 256
MIN_PREFLIGHT_TOKENS: Final = 64

MEASURED_HEADROOM: Final = 4.0
"""Another text may reach higher than the measured one, so two bits are kept free. Float16 has 40
binades: what is lost at the other end is two bits of numbers below 2^-14."""

_BLOCK_BYTES = 32 << 20
# A head of 256,000 tokens costs as much as several layers: its logits are those of every so-many-th
# position.
_MOST_LOGITS_TOKENS = 128

OnProgress = Callable[[str, int, int], object]


def measured_overflow(
    checkpoint: Checkpoint,
    token_rows: Tensor,
    on_progress: OnProgress = lambda *_: None,
    quantized: Collection[str] = (),
) -> OverflowReport:
    """Run a checkpoint on a text in float32, layer by layer, and report every peak.

    Args:
        checkpoint: The model.
        token_rows: int64 [R, S], as from `text.token_rows`.
        on_progress: Called with a stage, how much of it is done, and of how much.
        quantized: Names of matrices that are not stored in float16; what it loses of them is not
            counted.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
        ExportError: The model overflows float32 as well.
    """
    stage, num_layers = "looking for overflows", checkpoint.config.num_hidden_layers
    walk = LayerWalk(checkpoint, token_rows)
    outer = {"embedding": _magnitude(walk.hidden)}
    layers = []
    for index in range(num_layers):
        on_progress(stage, index, num_layers + 1)
        layer = walk.layer(index)
        with _peaks(layer) as peaks:
            walk.advance(layer)
        layers.append(peaks)
        # Before the next one is read: two at a time would be the peak of memory.
        del layer
    on_progress(stage, num_layers, num_layers + 1)
    with torch.no_grad():
        final = walk.last_norm()(walk.hidden)
        outer["final_norm"] = _magnitude(final)
        outer["logits"] = _logits_peak(checkpoint, final.flatten(0, 1))
    on_progress(stage, num_layers + 1, num_layers + 1)
    _require_finite(layers, outer)
    return overflow_report(
        checkpoint,
        layers,
        outer,
        source="measured",
        num_tokens=token_rows.numel(),
        headroom=MEASURED_HEADROOM,
        quantized=quantized,
    )


def require_held(report: OverflowReport) -> None:
    """Refuse a model of which a measured tensor overflows float16 whatever is folded.

    Bounds are far above what a model does, so a report of bounds is never refused.

    Raises:
        ExportError: With the tensors' names.
    """
    if report.source == "measured" and report.out_of_reach:
        names = ", ".join(f"{x.name} ({x.peak:.3g})" for x in report.out_of_reach[:5])
        raise ExportError(
            f"float16 holds at most {FLOAT16_MAX:.0f}, and these reach more, where no scale can be "
            f"folded into weights: {names}. Export with --dtype bfloat16 or float32, and "
            "without --cache-dtype float16"
        )


@contextmanager
def _peaks(layer: GemmaDecoderLayer) -> Iterator[dict[str, float]]:
    """Collect the peaks of everything that a layer computes inside the block."""
    peaks = dict.fromkeys(LAYER_TENSORS, 0.0)

    def see(tensor: str, value: Tensor) -> None:
        peaks[tensor] = _larger(peaks[tensor], _magnitude(value))

    def output_of(tensor: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: see(
            tensor, output[0] if isinstance(output, tuple) else output
        )

    def input_of(tensor: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, inputs: see(tensor, inputs[0])

    attention, feed_forward = layer.self_attn, layer.mlp
    second_norm = (
        layer.pre_feedforward_layernorm if layer.has_post_norms else layer.post_attention_layernorm
    )
    outputs: list[tuple[nn.Module | None, str]] = [
        (layer.input_layernorm, "normalized"),
        (second_norm, "normalized"),
        (attention.q_proj, "query"),
        (attention.q_norm, "query"),
        (attention.k_proj, "key"),
        (attention.k_norm, "key"),
        (attention.v_proj, "value"),
        (attention.o_proj, "attention"),
        (feed_forward.gate_proj, "gate"),
        (feed_forward.up_proj, "up"),
        (feed_forward.down_proj, "feed_forward"),
        (layer, "residual"),
    ]
    if layer.has_post_norms:
        outputs += [
            (layer.post_attention_layernorm, "residual"),
            (layer.post_feedforward_layernorm, "residual"),
        ]
    handles = [x.register_forward_hook(output_of(name)) for x, name in outputs if x is not None]
    handles += [
        second_norm.register_forward_pre_hook(input_of("residual")),
        feed_forward.down_proj.register_forward_pre_hook(input_of("product")),
    ]
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


def _logits_peak(checkpoint: Checkpoint, final: Tensor) -> float:
    """Return the largest magnitude of logits before any cap; `final` is [tokens, D]."""
    name = HEAD_WEIGHT if HEAD_WEIGHT in checkpoint.tensors else EMBEDDING_WEIGHT
    info = checkpoint.tensors[name]
    dtype = getattr(torch, DTYPE_NAMES[info.dtype])
    final = final[:: -(-len(final) // _MOST_LOGITS_TOKENS)]
    # The block of logits is as large as the block of weights, or smaller.
    block_bytes = _BLOCK_BYTES * info.shape[1] // max(info.shape[1], len(final))
    peak = 0.0
    for start, stop in checkpoint.row_blocks(name, block_bytes):
        raw = bytearray((stop - start) * info.row_bytes)
        checkpoint.read_rows(name, start, stop, memoryview(raw))
        rows = torch.frombuffer(raw, dtype=dtype).view(stop - start, -1).float()
        peak = _larger(peak, _magnitude(final @ rows.T))
    return peak


def _magnitude(value: Tensor) -> float:
    low, high = torch.aminmax(value)
    return _larger(-float(low), float(high))


def _larger(a: float, b: float) -> float:
    """Return the larger of two numbers; NaN counts as the largest, unlike with `max`."""
    return b if b != b or b > a else a  # noqa: PLR0124  # only NaN is unlike itself


def _require_finite(layers: list[dict[str, float]], outer: dict[str, float]) -> None:
    groups = [(f"layer {i} ", layer) for i, layer in enumerate(layers)] + [("", outer)]
    for prefix, peaks in groups:
        for tensor, peak in peaks.items():
            if not peak < float("inf"):
                raise ExportError(
                    f"{prefix}{tensor} reaches {peak} in float32: the checkpoint's weights are "
                    "damaged or not those of a trained model; no dtype can run it"
                )
