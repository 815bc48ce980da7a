"""What float16 could overflow on any text, bounded from the weights: `bounded_overflow`.

Everything starts from RMSNorm: without its scale its output is at most sqrt(D) long, whatever came in.
A matrix row r then gives at most sqrt(D) * |r * (1 + w)| by Cauchy-Schwarz; attention is a weighted
mean of values, GELU moves numbers towards 0, and sums are at most sums of magnitudes. All bounds hold
in exact arithmetic. They are far above what a model does, so scales found by measuring are better.
"""

import math
from collections.abc import Callable, Collection
from typing import Final

import torch
from torch import Tensor

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.config import GemmaConfig
from gemma_deploy.exporters.calibration.layer_walk import check_finite
from gemma_deploy.exporters.calibration.overflow_scaling import overflow_report
from gemma_deploy.overflow_report import OverflowReport

BOUND_HEADROOM: Final = 1.0625
"""Bounds hold for every text; what is left over is for rounding: float16's inside a layer, float32's
in the sums here."""

# Several passes are made over a block, which should stay in a core's cache.
_BLOCK_BYTES = 512 << 10

OnProgress = Callable[[str, int, int], object]


def bounded_overflow(
    checkpoint: Checkpoint,
    on_progress: OnProgress = lambda *_: None,
    quantized: Collection[str] = (),
) -> OverflowReport:
    """Bound every peak that any text can reach, and report it with a scaling that suffices.

    Weights are streamed in blocks of rows; no text is needed.

    Args:
        checkpoint: The model.
        on_progress: Called with a stage, how much of it is done, and of how much.
        quantized: Names of matrices that are not stored in float16; what it loses of them is not
            counted.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
    """
    stage, num_layers = "bounding activations", checkpoint.config.num_hidden_layers
    bounds = _Bounds(checkpoint)
    stream = bounds.embedding()  # of each channel of the residual stream, float64 [D]
    outer = {"embedding": float(stream.max())}
    layers = []
    for index in range(num_layers):
        on_progress(stage, index, num_layers + 1)
        peaks, added = bounds.layer(index)
        # `residual` also holds what is added, which is never more than the stream's own bound.
        stream += added
        layers.append(peaks | {"residual": float(stream.max())})
    on_progress(stage, num_layers, num_layers + 1)
    final = bounds.folded_norm("model.norm.weight")
    head = HEAD_WEIGHT if HEAD_WEIGHT in checkpoint.tensors else EMBEDDING_WEIGHT
    outer["final_norm"] = float((bounds.length * final.abs()).max())
    outer["logits"] = float(bounds.projected(head, final).max())
    on_progress(stage, num_layers + 1, num_layers + 1)
    return overflow_report(
        checkpoint,
        layers,
        outer,
        source="bounded",
        num_tokens=0,
        headroom=BOUND_HEADROOM,
        quantized=quantized,
    )


class _Bounds:
    """Bounds of one checkpoint's activations, float64.

    Attributes:
        length: sqrt(D), what a normalized vector's length is at most before the norm's scale.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._config: GemmaConfig = checkpoint.config
        self.length = math.sqrt(checkpoint.config.hidden_size)

    def embedding(self) -> Tensor:
        """Return the largest magnitude of each channel of scaled embeddings, [D]."""
        largest = torch.zeros(self._config.hidden_size)
        for block in self._checkpoint.row_blocks(EMBEDDING_WEIGHT, _BLOCK_BYTES):
            rows = self._read(EMBEDDING_WEIGHT, *block)
            torch.maximum(largest, rows.abs_().amax(0), out=largest)
        return largest.double() * self.length

    def layer(self, index: int) -> tuple[dict[str, float], Tensor]:
        """Return the peaks of a layer but `residual`, and what it adds to each channel at most, [D]."""
        prefix = f"model.layers.{index}"
        attention_peaks, attended = self._attention(prefix)
        feed_peaks, fed = self._feed_forward(prefix)
        normalized = max(attention_peaks.pop("normalized"), feed_peaks.pop("normalized"))
        if self._config.has_post_norms:
            attended = self.length * self.folded_norm(f"{prefix}.post_attention_layernorm.weight")
            fed = self.length * self.folded_norm(f"{prefix}.post_feedforward_layernorm.weight")
        peaks = attention_peaks | feed_peaks | {"normalized": normalized}
        return peaks, attended.abs() + fed.abs()

    def folded_norm(self, name: str) -> Tensor:
        """Return a norm's 1 + w, [D]."""
        return self._read(name).double() + 1

    def projected(self, name: str, norm: Tensor) -> Tensor:
        """Return what each row of a matrix gives of a normalized vector at most, [N]."""
        lengths = self._reduced(name, lambda rows: (rows * norm.float()).norm(dim=1))
        bias = name.removesuffix("weight") + "bias"
        extra = self._read(bias).double().abs() if bias in self._checkpoint.tensors else 0.0
        return self.length * lengths + extra

    def _attention(self, prefix: str) -> tuple[dict[str, float], Tensor]:
        config, norm = self._config, self.folded_norm(f"{prefix}.input_layernorm.weight")
        query, key, value = (
            self.projected(f"{prefix}.self_attn.{name}_proj.weight", norm) for name in "qkv"
        )
        groups = config.num_attention_heads // config.num_key_value_heads
        attended = value.view(config.num_key_value_heads, -1).repeat_interleave(groups, 0).flatten()
        output = self._absorbed(f"{prefix}.self_attn.o_proj.weight", attended)
        peaks = {
            "normalized": float(self.length * norm.abs().max()),
            "query": self._rotated(query, f"{prefix}.self_attn.q_norm.weight"),
            "key": self._rotated(key, f"{prefix}.self_attn.k_norm.weight"),
            "value": float(value.max()),
            "attention": float(output.max()),
        }
        return peaks, output

    def _rotated(self, projected: Tensor, norm: str) -> float:
        """Return the peak of queries or keys: projected, normalized if they are, rotated."""
        peak = float(projected.max())
        rotated = peak
        if norm in self._checkpoint.tensors:
            folded = self.folded_norm(norm)
            rotated = float(math.sqrt(len(folded)) * folded.abs().max())
        # A plane's two coordinates may be turned into one.
        return max(peak, math.sqrt(2) * rotated)

    def _feed_forward(self, prefix: str) -> tuple[dict[str, float], Tensor]:
        before = "pre_feedforward" if self._config.has_post_norms else "post_attention"
        norm = self.folded_norm(f"{prefix}.{before}_layernorm.weight")
        gate = self.projected(f"{prefix}.mlp.gate_proj.weight", norm)
        up = self.projected(f"{prefix}.mlp.up_proj.weight", norm)
        output = self._absorbed(f"{prefix}.mlp.down_proj.weight", gate * up)
        peaks = {
            "normalized": float(self.length * norm.abs().max()),
            "gate": float(gate.max()),
            "up": float(up.max()),
            "product": float((gate * up).max()),
            "feed_forward": float(output.max()),
        }
        return peaks, output

    def _absorbed(self, name: str, inputs: Tensor) -> Tensor:
        """Return what each row of a matrix gives of bounded inputs [K] at most, [N]."""
        sums = self._reduced(name, lambda rows: rows.abs() @ inputs.float())
        bias = name.removesuffix("weight") + "bias"
        return sums + self._read(bias).double().abs() if bias in self._checkpoint.tensors else sums

    def _reduced(self, name: str, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what `reduce` makes of a matrix's rows, float64 [N]; it is given blocks, float32."""
        # One allocation: small results that outlive large blocks leave holes in the heap.
        reduced = torch.empty(self._checkpoint.tensors[name].num_rows, dtype=torch.float64)
        for start, stop in self._checkpoint.row_blocks(name, _BLOCK_BYTES):
            reduced[start:stop] = reduce(self._read(name, start, stop))
        return reduced

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a tensor, float32."""
        info = self._checkpoint.tensors[name]
        stop = info.num_rows if stop is None else stop
        raw = bytearray((stop - start) * info.row_bytes)
        self._checkpoint.read_rows(name, start, stop, memoryview(raw))
        rows = torch.frombuffer(raw, dtype=getattr(torch, DTYPE_NAMES[info.dtype]))
        check_finite(rows, name)
        return rows.view(stop - start, *info.shape[1:]).float()
