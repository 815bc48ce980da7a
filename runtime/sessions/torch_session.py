"""A checkpoint on the eager torch model: the oracle of every other backend, and the baseline."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import array_api_compat.torch as array_api_torch
import torch

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import BackendUnavailableError, SessionError
from gemma_deploy.graph_spec import DType
from gemma_deploy.model.heads import GemmaForCausalLM
from gemma_deploy.model.kv_cache import StaticCache
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.session import (
    Int64Array,
    KVCache,
    SessionLimits,
    StepLogits,
    own_cache,
)
from gemma_deploy.runtime.threads import check_threads


@dataclass(frozen=True, slots=True, eq=False)
class TorchCache:
    """A `StaticCache`, and rows of one.

    Attributes:
        static: The model's own cache.
    """

    static: StaticCache

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.static.keys[0].shape[0]

    @property
    def max_seq_len(self) -> int:
        """Tokens that fit a row."""
        return self.static.max_seq_len

    def rows(self, start: int, stop: int) -> "TorchCache":
        """Return rows start, ..., stop - 1, in the same memory; the cache itself if these are all.

        CUDA graphs hold on to the cache's own tensors: through others, even of the same memory, a
        compiled step would run without them.
        """
        if (start, stop) == (0, self.batch_size):
            return self
        part = copy.copy(self.static)
        part.keys = [key[start:stop] for key in self.static.keys]
        part.values = [value[start:stop] for value in self.static.values]
        return TorchCache(part)


class TorchSession:
    """Runs `GemmaForCausalLM` over a `StaticCache`.

    On CUDA it has not run on hardware yet.

    Attributes:
        config: The model.
        xp: torch; logits are on the model's device.
        limits: None.
        device: What the model runs on, `cpu` or `cuda`.
        dtype: Of weights, activations and cache.
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
            threads: Threads of torch's CPU kernels, for the whole process, as `check_threads` allows;
                None leaves them.
            dtype: Of weights, activations and cache; None for the checkpoint's own.

        Raises:
            BackendUnavailableError: CUDA was asked for and does not work here.
            CheckpointError: The weights cannot be read.
            ConfigError: The config cannot be read.
            RequestError: Too many threads.
        """
        check_threads(threads)
        self.device = resolve_device(device or Device(kind="auto"))
        self._torch_device = torch.device(self.device.kind, self.device.index)
        self._threads = threads
        self._set_threads()
        self._model: GemmaForCausalLM | None = GemmaForCausalLM.from_pretrained(
            checkpoint,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=self._torch_device,
        )
        self.config: GemmaConfig = self._model.config
        weight = self._model.model.embed_tokens.weight
        self.dtype = cast(DType, str(weight.dtype).removeprefix("torch."))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_cache(self, batch_size: int, max_seq_len: int) -> TorchCache:
        """Allocate a cache on the session's device; see `Session.new_cache`."""
        try:
            static = StaticCache(
                self.config,
                batch_size,
                max_seq_len,
                dtype=getattr(torch, self.dtype),
                device=self._torch_device,
            )
        except RuntimeError as err:  # what torch raises for want of memory, on every device
            raise SessionError(
                f"torch cannot allocate a KV cache of {batch_size} rows of {max_seq_len:,} tokens "
                f"on {self._torch_device}: {err}. Use a smaller max_seq_len or batch size"
            ) from err
        return TorchCache(static)

    @torch.inference_mode()
    def step(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: KVCache,
        *,
        num_candidates: int | None = None,  # noqa: ARG002 - the protocol's; all are on the device already
    ) -> StepLogits:
        """Run S tokens of each row; see `Session.step`. All logits are given."""
        cache = own_cache(cache, TorchCache)
        model = self._loaded()
        self._set_threads()
        positions = self._positions(input_pos, input_ids.shape[1], cache.static)
        try:
            hidden = model.model(
                torch.from_numpy(input_ids).to(self._torch_device),
                past_key_values=cache.static,
                cache_position=positions,
            ).last_hidden_state
            index = torch.from_numpy(logits_index).to(self._torch_device)[..., None]
            picked = hidden.gather(1, index.expand(-1, -1, hidden.shape[-1]))
            return StepLogits(model.logits(picked))
        except (IndexError, RuntimeError) as err:
            raise SessionError(
                f"torch failed on {self._torch_device} with {input_ids.shape[0]} rows of "
                f"{input_ids.shape[1]} tokens: {err}"
            ) from err

    def _set_threads(self) -> None:
        """Set what the process has in common, and each thread keeps a copy of."""
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _positions(
        self, input_pos: Int64Array, num_tokens: int, cache: StaticCache
    ) -> torch.Tensor | None:
        """Return the slots of a step's tokens, int64 [B, S]; None for those behind the cached ones.

        Rows that go on together write one run of slots: only then does torch choose its flash kernels,
        and nothing is copied from the device to find the step's end.
        """
        if not input_pos.any():
            cache.reset()
        if (input_pos == cache.get_seq_length()).all():
            return None
        positions = torch.from_numpy(input_pos[:, None] + range(num_tokens))
        return positions.to(self._torch_device)

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        self._model = None

    def _loaded(self) -> GemmaForCausalLM:
        if self._model is None:
            raise SessionError("the session is closed: load the model again")
        return self._model


def resolve_device(device: Device) -> Device:
    """Return the device that torch can use for `device`.

    Raises:
        BackendUnavailableError: It is not here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.kind == "cpu" or (device.kind == "auto" and not count):
        return Device(kind="cpu")
    if device.index >= count:
        raise BackendUnavailableError(
            f"cuda:{device.index} is not available to torch {torch.__version__}: {count} CUDA "
            "device(s) found. Install a torch build for your driver's CUDA "
            "(https://pytorch.org/get-started), or use the device cpu"
        )
    return Device(kind="cuda", index=device.index)
