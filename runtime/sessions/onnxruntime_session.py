"""A bundle on ONNX Runtime, on a CPU or a CUDA device: `OnnxRuntimeSession`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Self

import array_api_compat.numpy as array_api_numpy
import numpy as np
import onnxruntime as ort

from gemma_deploy.bundle import Bundle
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import BackendUnavailableError, SessionError
from gemma_deploy.graph_spec import CacheDType, Phase, Precision
from gemma_deploy.runtime.cache_buffers import CacheBuffers, Shape
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource, OnnxRuntimeGraph
from gemma_deploy.runtime.sessions.onnxruntime_providers import ORT_ERRORS
from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache
from gemma_deploy.runtime.sessions.session import (
    Int64Array,
    KVCache,
    SessionLimits,
    StepLogits,
    own_cache,
)
from gemma_deploy.runtime.threads import check_threads

# Earlier ones load such a graph, but for 1.24, and fail in the first step.
_FIRST_WITH_INT8_CACHE = (1, 27)


class OnnxRuntimeSession:
    """Runs a bundle's graphs over KV buffers that are inputs and outputs at once.

    The prefill graph serves both phases: its S and L are dynamic, and a second session would hold a
    second packed copy of the weights for no gain in speed. With `use_decode_graph` steps of one token
    run the decode graph, which is how it is verified.

    Steps on CUDA (caches on the device, tokens and logits on the host) have not run on hardware yet.
    ONNX Runtime's CUDA provider has GroupQueryAttention in 16 bits only; a bundle that computes in
    float32 would carry its whole cache to the CPU and back at every step, so it runs on the CPU. So
    does one with an int8 cache, whose graph has been tried nowhere else.

    Attributes:
        config: The model.
        xp: numpy; logits are in host memory on every device.
        limits: None.
        device: What the model runs on, `cpu` or `cuda`.
    """

    xp = array_api_numpy
    limits = SessionLimits()

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Device | None = None,
        threads: int | None = None,
        use_decode_graph: bool = False,
        graphs: Mapping[Phase, GraphSource] | None = None,
        prepacked_cache: PrepackedCache | None = None,
        before_load: Callable[[], object] = lambda: None,
    ) -> None:
        """Load the bundle.

        Args:
            bundle: An opened bundle.
            device: Where to run; None is `auto`.
            threads: Threads of the CPU kernels, as `check_threads` allows; None for one per core.
            use_decode_graph: Whether to load the decode graph too and use it for single tokens.
            graphs: Other graphs to run: of another lowering, or rewritten. None for those that the
                bundle has for ONNX Runtime.
            prepacked_cache: Where packed weights of the CPU's kernels are kept; None for nowhere.
            before_load: Called when nothing is left but to load the graphs.

        Raises:
            BackendUnavailableError: CUDA was asked for and does not work here, or not in float32.
            BundleError: The graphs do not have the inputs and outputs the manifest says, or the bundle
                was replaced while it was loaded.
            RequestError: Too many threads.
            SessionError: ONNX Runtime cannot load the graphs. In steps also: the weights, which are
                mapped, were changed in place (see `HeldFile` for what cannot be noticed).
        """
        check_threads(threads)
        self.config: GemmaConfig = bundle.config
        device = _with_attention(device or Device(kind="auto"), bundle.manifest.precision)
        phases: list[Phase] = ["prefill", "decode"] if use_decode_graph else ["prefill"]
        sources = graphs or {x: GraphSource.of(bundle, x, "onnxruntime") for x in phases}
        self._continues_rows_in_turn = any(x.continues_rows_in_turn for x in sources.values())
        self._spec = sources["prefill"].spec
        load = partial(OnnxRuntimeGraph, threads=threads, prepacked_cache=prepacked_cache)
        before_load()
        self._prefill = load(sources["prefill"], device)
        self.device = self._prefill.device
        self._decode = load(sources["decode"], self.device) if use_decode_graph else None
        bundle.check_unchanged()  # ONNX Runtime opened the weights by their path, tensor by tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_cache(self, batch_size: int, max_seq_len: int) -> CacheBuffers:
        """Allocate a cache on the session's device; see `Session.new_cache`.

        The session lets go of the cache of its last step, so that one nobody else holds is freed.
        """
        for graph in (self._prefill, self._decode):
            if graph is not None:
                graph.unbind()
        return CacheBuffers.allocate(
            self._spec.cache_inputs, batch_size, max_seq_len, self._allocate
        )

    def step(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: KVCache,
        *,
        num_candidates: int | None = None,  # noqa: ARG002 - the protocol's; all are on the host already
    ) -> StepLogits:
        """Run S tokens of each row; see `Session.step`. All logits are given.

        ONNX Runtime's GroupQueryAttention continues rows by several tokens only one row at a time,
        so such a step runs its rows in turn; graphs of standard operators continue all of them.
        """
        cache = own_cache(cache, CacheBuffers)
        batch_size, num_tokens = input_ids.shape
        if max(input_pos.tolist(), default=0) + num_tokens > cache.max_seq_len:
            raise SessionError(
                f"{num_tokens} tokens at position {int(input_pos.max())} do not fit a KV cache of "
                f"{cache.max_seq_len} tokens: allocate a longer one"
            )
        if self._continues_rows_in_turn and min(batch_size, num_tokens) > 1 and input_pos.any():
            rows = [
                self._prefill.run(
                    input_ids[b : b + 1],
                    input_pos[b : b + 1],
                    logits_index[b : b + 1],
                    cache.rows(b, b + 1),
                ).copy()
                for b in range(batch_size)
            ]
            return StepLogits(np.concatenate(rows))
        is_decode = self._decode is not None and num_tokens == 1 == logits_index.shape[1]
        graph = self._decode if self._decode is not None and is_decode else self._prefill
        return StepLogits(graph.run(input_ids, input_pos, logits_index, cache))

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        self._prefill.close()
        if self._decode is not None:
            self._decode.close()

    def _allocate(self, shape: Shape, dtype: CacheDType) -> tuple[int, object]:
        # On a CPU the value shares the array's memory, which the system hands out page by page: room
        # for tokens that never come costs nothing. Elsewhere it is a copy on the device.
        zeros = np.zeros(shape, dtype)
        try:
            value = ort.OrtValue.ortvalue_from_numpy(zeros, self.device.kind, self.device.index)
        except ORT_ERRORS as err:
            raise SessionError(
                f"ONNX Runtime cannot allocate {zeros.nbytes:,} bytes for the KV cache on "
                f"{self.device.kind}: {err}. Use a smaller max_seq_len or batch size"
            ) from err
        return value.data_ptr(), (value, zeros)


def _with_attention(device: Device, precision: Precision) -> Device:
    """Return the device, or the CPU for `auto`, where attention runs in the cache's dtype."""
    if precision.cache == "int8":
        return _with_int8_attention(device)
    if device.kind == "cpu" or precision.cache != "float32":
        return device
    if device.kind == "cuda":
        raise BackendUnavailableError(
            "ONNX Runtime has no CUDA attention for this bundle, which computes in "
            f"{precision.activations} (weights in {precision.weights}): export it with --dtype "
            "float16, or use the device cpu"
        )
    return Device(kind="cpu")


def _with_int8_attention(device: Device) -> Device:
    """Return the CPU, if this ONNX Runtime attends to int8 caches on it.

    Raises:
        BackendUnavailableError: CUDA was asked for, or a newer ONNX Runtime is needed.
    """
    if device.kind == "cuda":
        raise BackendUnavailableError(
            "bundles with an int8 cache run on the CPU only: use the device cpu, or export the bundle "
            "with --cache-dtype float16"
        )
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < _FIRST_WITH_INT8_CACHE:
        first = ".".join(map(str, _FIRST_WITH_INT8_CACHE))
        raise BackendUnavailableError(
            f"ONNX Runtime {ort.__version__} has no attention to an int8 cache on the CPU; the first "
            f"that has is {first}: pip install --upgrade onnxruntime-gpu (or onnxruntime, as "
            "installed), or export the bundle without --cache-dtype int8"
        )
    return Device(kind="cpu")
