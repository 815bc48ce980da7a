"""A bundle on ONNX Runtime, on a CPU or a CUDA device: `OnnxRuntimeSession`."""

from typing import Any, Self

import array_api_compat.numpy as array_api_numpy
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from gemma_deploy.bundle import Bundle, check_external_data
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import BackendUnavailableError, BundleError, SessionError
from gemma_deploy.graph_spec import (
    INPUT_IDS,
    INPUT_POS,
    LOGITS,
    LOGITS_INDEX,
    DType,
    Phase,
    Precision,
    TensorSpec,
)
from gemma_deploy.runtime.cache_buffers import CacheBuffers, Shape
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.onnxruntime_providers import (
    ORT_ERRORS,
    create_inference_session,
)
from gemma_deploy.runtime.sessions.session import (
    Int64Array,
    KVCache,
    SessionLimits,
    StepLogits,
)

_ORT_TYPES = {
    "int64": "tensor(int64)",
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
}


class OnnxRuntimeSession:
    """Runs a bundle's graphs over KV buffers that are inputs and outputs at once.

    The prefill graph serves both phases: its S and L are dynamic, and a second session would hold a
    second packed copy of the weights for no gain in speed. With `use_decode_graph` steps of one token
    run the decode graph, which is how it is verified.

    Steps on CUDA (caches on the device, tokens and logits on the host) have not run on hardware yet.
    ONNX Runtime's CUDA provider has GroupQueryAttention in 16 bits only; a bundle that computes in
    float32 would carry its whole cache to the CPU and back at every step, so it runs on the CPU.

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
    ) -> None:
        """Load the bundle.

        Args:
            bundle: An opened bundle.
            device: Where to run; None is `auto`.
            threads: Threads of the CPU kernels; None for one per core.
            use_decode_graph: Whether to load the decode graph too and use it for single tokens.

        Raises:
            BackendUnavailableError: CUDA was asked for and does not work here, or not in float32.
            BundleError: The graphs do not have the inputs and outputs the manifest says.
            SessionError: ONNX Runtime cannot load the graphs.
        """
        self.config: GemmaConfig = bundle.config
        self._spec = bundle.manifest.spec("prefill")
        device = _with_attention(device or Device(kind="auto"), bundle.manifest.precision)
        self._prefill = _Graph(bundle, "prefill", device, threads)
        self.device = self._prefill.device
        self._decode = _Graph(bundle, "decode", self.device, threads) if use_decode_graph else None

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
        so such a step runs its rows in turn.
        """
        if not isinstance(cache, CacheBuffers):
            raise SessionError(
                f"cache is a {type(cache).__name__}; expected one from this session's new_cache"
            )
        batch_size, num_tokens = input_ids.shape
        if input_pos.size and int(input_pos.max()) + num_tokens > cache.max_seq_len:
            raise SessionError(
                f"{num_tokens} tokens at position {int(input_pos.max())} do not fit a KV cache of "
                f"{cache.max_seq_len} tokens: allocate a longer one"
            )
        if batch_size > 1 and num_tokens > 1 and input_pos.any():
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

    def _allocate(self, shape: Shape, dtype: DType) -> tuple[int, object]:
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
    if device.kind == "cpu" or precision.cache != "float32":
        return device
    if device.kind == "cuda":
        raise BackendUnavailableError(
            "ONNX Runtime has no CUDA attention for this bundle, which computes in "
            f"{precision.activations} (weights in {precision.weights}): export it with --dtype "
            "float16, or use the device cpu"
        )
    return Device(kind="cpu")


class _Graph:
    """One loaded graph and the memory that is bound to its inputs and outputs."""

    def __init__(self, bundle: Bundle, phase: Phase, device: Device, threads: int | None) -> None:
        path = bundle.graph_path(phase)
        check_external_data(bundle.folder, path)
        self._name = path.name
        self._spec = bundle.manifest.spec(phase)
        self._session: Any
        self._session, self.device = create_inference_session(path, device, threads)
        _check_ports(self._name, "inputs", self._session.get_inputs(), self._spec.inputs)
        _check_ports(self._name, "outputs", self._session.get_outputs(), self._spec.outputs)
        self._binding: Any = self._session.io_binding()
        self._bound_cache: CacheBuffers | None = None
        self._logits: npt.NDArray[np.float32] = np.empty((0, 0, 0), np.float32)

    def run(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: CacheBuffers,
    ) -> npt.NDArray[np.float32]:
        """Run one step; the logits are overwritten by the next one."""
        if self._session is None:
            raise SessionError("the session is closed: load the model again")
        given = {INPUT_IDS: input_ids, INPUT_POS: input_pos, LOGITS_INDEX: logits_index}
        inputs = {
            spec.name: np.ascontiguousarray(given[spec.name], dtype=np.int64)
            for spec in self._spec.inputs
            if spec.name in given
        }
        for name, array in inputs.items():
            self._binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        self._bind_cache(cache)
        self._bind_logits((*logits_index.shape, self._spec.outputs[0].dims[-1]))
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as err:
            raise SessionError(
                f"ONNX Runtime failed in {self._name} with {input_ids.shape[0]} rows of "
                f"{input_ids.shape[1]} tokens: {err}"
            ) from err
        return self._logits

    def unbind(self) -> None:
        """Let go of the cache of the last step."""
        if self._bound_cache is None:
            return
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._bound_cache = None
        # The logits were bound as well.
        self._logits = np.empty((0, 0, 0), np.float32)

    def close(self) -> None:
        """Let go of the session and of everything bound to it."""
        self._session = self._binding = self._bound_cache = None

    def _bind_cache(self, cache: CacheBuffers) -> None:
        if cache is self._bound_cache:
            return
        kind, index = self.device.kind, self.device.index
        presents = [spec for spec in self._spec.outputs if spec.name != LOGITS]
        for tensor, present in zip(cache.tensors, presents, strict=True):
            place = (kind, index, np.dtype(tensor.dtype), tensor.shape, tensor.address)
            self._binding.bind_input(tensor.name, *place)
            self._binding.bind_output(present.name, *place)
        self._bound_cache = cache

    def _bind_logits(self, shape: tuple[Any, ...]) -> None:
        if self._logits.shape == shape:
            return
        self._logits = np.empty(shape, np.float32)
        self._binding.bind_output(
            LOGITS, "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data
        )


def _check_ports(graph: str, side: str, ports: list[Any], specs: tuple[TensorSpec, ...]) -> None:
    """Compare a loaded graph's inputs or outputs with the graph spec: names, dtypes, fixed dims.

    Raises:
        BundleError: They differ.
    """
    found = {port.name: port for port in ports}
    expected = {spec.name: spec for spec in specs}
    if found.keys() != expected.keys():
        raise BundleError(
            f"{graph} has the {side} {', '.join(sorted(found))}; expected "
            f"{', '.join(sorted(expected))}: export the bundle again"
        )
    for name, spec in expected.items():
        port = found[name]
        is_same_rank = len(port.shape) == len(spec.dims)
        if port.type != _ORT_TYPES[spec.dtype] or not (
            is_same_rank
            and all(
                actual == dim or isinstance(dim, str)
                for actual, dim in zip(port.shape, spec.dims, strict=True)
            )
        ):
            raise BundleError(
                f"{graph}: {name} is {port.type} {list(port.shape)}; expected "
                f"{_ORT_TYPES[spec.dtype]} {list(spec.dims)}: export the bundle again"
            )
