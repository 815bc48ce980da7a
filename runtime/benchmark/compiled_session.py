"""A checkpoint on compiled torch over a static cache, as a baseline: `CompiledTorchSession`."""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from gemma_deploy.errors import SessionError
from gemma_deploy.model.attend import CachedAttention
from gemma_deploy.model.heads import GemmaForCausalLM
from gemma_deploy.model.kv_cache import Step
from gemma_deploy.model.masks import StepMasks
from gemma_deploy.runtime.sessions.session import Int64Array, KVCache, StepLogits, own_cache
from gemma_deploy.runtime.sessions.torch_session import TorchCache, TorchSession

MODE: Final = "reduce-overhead"
"""torch.compile's mode for small steps: CUDA graphs where there is a GPU."""


class CompiledTorchSession(TorchSession):
    """`TorchSession` whose steps are compiled, one graph for prefill and one for decode.

    Shapes are fixed, so that nothing is compiled for sizes that never come: a new cache begins new
    graphs, which the first steps compile. Rows are of one length, and a prompt is one step.

    On CUDA it has not run on hardware yet.
    """

    def new_cache(self, batch_size: int, max_seq_len: int) -> TorchCache:
        """Allocate a cache and forget the graphs of the one before; see `Session.new_cache`."""
        torch.compiler.reset()
        compiled: Callable[..., Tensor] = torch.compile(
            _logits, mode=MODE, fullgraph=True, dynamic=False
        )
        self._compiled = compiled
        cache = super().new_cache(batch_size, max_seq_len)
        for tensor in (*cache.static.keys, *cache.static.values):
            # CUDA graphs would copy what may move, and refuse to write there; as transformers' cache.
            torch._dynamo.mark_static_address(tensor)
        return cache

    @torch.no_grad()
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
            SessionError: Rows of several lengths, a prompt in several steps, or torch failed.
        """
        num_tokens, start = input_ids.shape[1], int(input_pos[0])
        if (input_pos != start).any() or (num_tokens > 1 and start > 0):
            raise SessionError(
                f"a compiled step of {num_tokens} tokens at {input_pos.tolist()}: expected rows of one "
                "length, and each prompt in one step"
            )
        cache = own_cache(cache, TorchCache)
        positions = torch.from_numpy(np.arange(start, start + num_tokens)).to(self._torch_device)
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        try:
            logits = self._compiled(
                self._loaded(),
                torch.from_numpy(input_ids).to(self._torch_device),
                positions,
                torch.from_numpy(logits_index).to(self._torch_device),
                cache.static.keys,
                cache.static.values,
            )
        except RuntimeError as err:  # what the compiler raises is one, too
            raise SessionError(
                f"compiled torch failed on {self._torch_device}: {err}. torch.compile needs a C++ "
                "compiler on a CPU, and Triton on CUDA"
            ) from err
        return StepLogits(logits)


class _Slots:
    """The cache as a compiled graph sees it: every step reads all of it, or only itself at first."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], positions: Tensor) -> None:
        self._keys = keys
        self._values = values
        self._positions = positions

    def get_seq_length(self) -> int:
        """Return 0: steps say where they go."""
        return 0

    def update(
        self,
        layer_idx: int,
        key: Tensor,
        value: Tensor,
        step: Step,  # noqa: ARG002 - the protocol's
    ) -> tuple[Tensor, Tensor]:
        """Write key and value [B, K, S, H]; return what the step attends to, [B, K, T or S, H]."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys.index_copy_(2, self._positions, key)
        values.index_copy_(2, self._positions, value)
        return (key, value) if key.shape[2] > 1 else (keys, values)


def _logits(
    model: GemmaForCausalLM,
    input_ids: Tensor,
    positions: Tensor,
    logits_index: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
) -> Tensor:
    """Return logits [B, L, V] of a step; what is compiled.

    Args:
        model: The model.
        input_ids: int64 [B, S].
        positions: int64 [S], the cache slots of the tokens.
        logits_index: int64 [B, L].
        keys: [B, K, T, H] of each layer, written in place.
        values: The same.
    """
    num_tokens = input_ids.shape[1]
    is_prompt = num_tokens > 1
    step = Step(
        positions=positions[None],
        start=0,
        length=num_tokens if is_prompt else keys[0].shape[2],
        is_run=is_prompt,
    )
    attend = CachedAttention(
        rotary=model.model.rotary_emb,
        position_ids=step.positions,
        step=step,
        masks=StepMasks(step, None, is_bidirectional=model.config.use_bidirectional_attention),
        cache=_Slots(keys, values, positions),
        implementation="sdpa",
    )
    hidden = model.model.decode_layers(model.model.embed(input_ids), attend, index=logits_index)
    return model.logits(hidden)
