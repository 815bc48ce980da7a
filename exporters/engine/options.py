"""What an engine is to be: `BuildOptions`, checked against the model it is built from."""

import math
from dataclasses import dataclass
from typing import Final, get_args

from gemma_deploy.engine_build import Attention, EngineLimits, Layout
from gemma_deploy.errors import RequestError
from gemma_deploy.graph_spec import DTYPE_BYTES
from gemma_deploy.manifest import Manifest
from gemma_deploy.tensorrt import FLAVOURS, Flavour
from gemma_deploy.tensorrt.tensors import ALIGNMENT_BYTES

DEFAULT_MAX_SEQ_LEN: Final = 4096
DEFAULT_MAX_STEP_TOKENS: Final = 512
DEFAULT_NUM_CANDIDATES: Final = 64
# TensorRT's TopK: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/TopK.html
_MOST_CANDIDATES: Final = 3840
# Attention launches a block per row and KV head along an axis of CUDA's grids that ends here.
_MOST_GRID_ROWS: Final = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """The choices of whoever builds an engine.

    Attributes:
        flavour: The library to build with.
        compute_capabilities: GPUs to build for, such as `8.9`; empty for what
            `gemma_deploy.exporters.engine.targets.choose_targets` finds fit.
        max_batch_size: Most rows of a step.
        max_seq_len: Tokens of a row's KV cache; None for the model's, at most 4096.
        max_step_tokens: Most tokens of a row in a prefill step; None for 512, or `max_seq_len` if
            that is less.
        max_logits: Most positions of a row whose logits a prefill step gives.
        num_candidates: Largest logits that the engine picks out; None for 64, or all if less.
        layout: One engine with two profiles, or two engines.
        attention: Which kernels compute attention.
    """

    flavour: Flavour
    compute_capabilities: tuple[str, ...] = ()
    max_batch_size: int = 1
    max_seq_len: int | None = None
    max_step_tokens: int | None = None
    max_logits: int = 1
    num_candidates: int | None = None
    layout: Layout = "one-engine"
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        """Refuse words that mean nothing.

        Raises:
            RequestError: Another flavour, layout or kind of attention.
        """
        for name, value, known in (
            ("backend", self.flavour, FLAVOURS),
            ("layout", self.layout, get_args(Layout)),
            ("attention", self.attention, get_args(Attention)),
        ):
            if value not in known:
                raise RequestError(f"{name} is {value!r}; expected {', '.join(known)}")

    def limits(self, manifest: Manifest) -> EngineLimits:
        """Return the sizes of the engine, what was left open filled in for a model.

        Raises:
            RequestError: A size that is not positive, or beyond what the model or TensorRT can do.
        """
        most = manifest.max_seq_len
        max_seq_len = min(most, DEFAULT_MAX_SEQ_LEN)
        if self.max_seq_len is not None:
            max_seq_len = _within("max_seq_len", self.max_seq_len, most, "tokens the model reads")
        _check_rows(manifest, self.max_batch_size, max_seq_len)
        step_tokens = min(max_seq_len, DEFAULT_MAX_STEP_TOKENS)
        if self.max_step_tokens is not None:
            step_tokens = _within(
                "prefill_chunk", self.max_step_tokens, max_seq_len, "tokens of max_seq_len"
            )
        vocabulary = min(manifest.config.vocab_size, _MOST_CANDIDATES)
        candidates = min(vocabulary, DEFAULT_NUM_CANDIDATES)
        if self.num_candidates is not None:
            candidates = _within(
                "top_logits",
                self.num_candidates,
                vocabulary,
                "tokens of the vocabulary that TensorRT sorts",
            )
        return EngineLimits(
            max_batch_size=_within(
                "max_batch",
                self.max_batch_size,
                _MOST_GRID_ROWS // manifest.config.num_key_value_heads,
                "rows that a kernel's grid takes",
            ),
            max_seq_len=max_seq_len,
            max_step_tokens=step_tokens,
            max_logits=_within(
                "max_logits", self.max_logits, step_tokens, "tokens of prefill_chunk"
            ),
            num_candidates=candidates,
        )


def _within(name: str, value: int, most: int, what: str) -> int:
    """Return the value of an option if it is from 1 to `most`; `what` tells what `most` counts."""
    if not 1 <= value <= most:
        raise RequestError(
            f"{name} is {value}; expected a whole number from 1 to {most}, the {what}"
        )
    return value


def _check_rows(manifest: Manifest, max_batch_size: int, max_seq_len: int) -> None:
    """Refuse caches whose rows begin where TensorRT cannot read one by itself, as prefill does.

    Raises:
        RequestError: With the lengths that can be.
    """
    config, cache = manifest.config, manifest.precision.of_lowering("tensorrt").activations
    token_bytes = config.num_key_value_heads * config.head_dim * DTYPE_BYTES[cache]
    multiple = ALIGNMENT_BYTES // math.gcd(ALIGNMENT_BYTES, token_bytes)
    if max_batch_size > 1 and max_seq_len % multiple:
        raise RequestError(
            f"max_seq_len is {max_seq_len}; with max_batch {max_batch_size} it must be a multiple of "
            f"{multiple}, so that every row of the KV cache begins at a multiple of {ALIGNMENT_BYTES} "
            "bytes"
        )
