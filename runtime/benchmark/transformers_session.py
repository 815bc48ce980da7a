"""A checkpoint on transformers' own model over a static cache, as a baseline: `TransformersSession`."""

from pathlib import Path
from typing import Any, Self

import array_api_compat.torch as array_api_torch
import torch
import transformers

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import SessionError
from gemma_deploy.graph_spec import DType
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.session import (
    Int64Array,
    KVCache,
    SessionLimits,
    StepLogits,
    own_cache,
)
from gemma_deploy.runtime.sessions.torch_session import resolve_device


class TransformersCache:
    """A `StaticCache` of transformers, which counts the tokens that it holds itself."""

    def __init__(self, static: Any, batch_size: int, max_seq_len: int) -> None:
        """Wrap a cache."""
        self.static = static
        self.num_cached = 0
        self._batch_size = batch_size
        self._max_seq_len = max_seq_len

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self._batch_size

    @property
    def max_seq_len(self) -> int:
        """Tokens that fit a row."""
        return self._max_seq_len

    def rows(self, start: int, stop: int) -> Self:
        """Return the cache itself: transformers has no part of one.

        Raises:
            SessionError: Not all rows are asked for.
        """
        if (start, stop) != (0, self._batch_size):
            raise SessionError(
                f"rows {start} to {stop - 1} of a cache of {self._batch_size}: transformers' cache "
                "cannot be divided"
            )
        return self


class TransformersSession:
    """Runs transformers' model as its own generation does, but for the loop.

    Attention is what transformers chooses for the model (scaled_dot_product_attention, but for Gemma
    2), logits are computed at the last position only, and nothing records gradients. Rows are of one length and go on together.

    On CUDA it has not run on hardware yet.

    Attributes:
        config: The model.
        xp: torch; logits are on the model's device.
        limits: None.
        device: What the model runs on, `cpu` or `cuda`.
    """

    xp = array_api_torch
    limits = SessionLimits()

    def __init__(
        self,
        checkpoint: Path,
        *,
        device: Device | None = None,
        threads: int | None = None,
        dtype: DType | None = None,
    ) -> None:
        """Load the checkpoint.

        Args:
            checkpoint: Folder in Hugging Face layout.
            device: Where to run; None is `auto`.
            threads: Threads of torch's CPU kernels, for the whole process; None leaves them.
            dtype: Of weights, activations and cache; None for what the checkpoint's config says.

        Raises:
            BackendUnavailableError: CUDA was asked for and does not work here.
            ConfigError: The config cannot be read.
            SessionError: transformers cannot load the checkpoint.
        """
        self.device = resolve_device(device or Device(kind="auto"))
        self._torch_device = torch.device(self.device.kind, self.device.index)
        if threads is not None:
            torch.set_num_threads(threads)
        self.config = GemmaConfig.from_file(checkpoint)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype="auto" if dtype is None else getattr(torch, dtype),
            )
            self._model = model.to(self._torch_device).eval()
        except (OSError, RuntimeError, ValueError) as err:
            raise SessionError(
                f"transformers {transformers.__version__} cannot load {checkpoint}: {err}"
            ) from err

    def new_cache(self, batch_size: int, max_seq_len: int) -> TransformersCache:
        """Prepare a cache, allocated by its first step; see `Session.new_cache`."""
        static = transformers.StaticCache(config=self._model.config, max_cache_len=max_seq_len)
        return TransformersCache(static, batch_size, max_seq_len)

    @torch.inference_mode()
    def step(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: KVCache,
        *,
        num_candidates: int | None = None,  # noqa: ARG002 - the protocol's
    ) -> StepLogits:
        """Run S tokens of each row; see `Session.step`. All logits are given.

        Raises:
            SessionError: Rows of several lengths, a step that is not the next one, logits of another
                position than the last, or torch failed.
        """
        cache = own_cache(cache, TransformersCache)
        num_tokens = input_ids.shape[1]
        if not input_pos.any():
            cache.static.reset()
            cache.num_cached = 0
        if (input_pos != cache.num_cached).any() or (logits_index != num_tokens - 1).any():
            raise SessionError(
                f"a step at {input_pos.tolist()} with {cache.num_cached} tokens cached, for the logits "
                f"at {logits_index.tolist()}: expected rows of one length that go on together"
            )
        try:
            logits = self._model(
                input_ids=torch.from_numpy(input_ids).to(self._torch_device),
                past_key_values=cache.static,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        except RuntimeError as err:
            raise SessionError(
                f"transformers failed on {self._torch_device} with {input_ids.shape[0]} rows of "
                f"{num_tokens} tokens: {err}"
            ) from err
        cache.num_cached += num_tokens
        return StepLogits(logits.float())

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        self._model = None
