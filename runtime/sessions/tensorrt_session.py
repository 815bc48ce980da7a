"""An engine on TensorRT or TensorRT for RTX: `TensorRTSession`."""

import math
import weakref
from typing import Self

import array_api_compat.numpy as array_api_numpy
import numpy as np

from gemma_deploy.config import GemmaConfig
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.engine import EngineFolder
from gemma_deploy.engine_build import LOGITS_SUM, TOP_INDICES, TOP_LOGITS, EngineBuild
from gemma_deploy.engine_fit import rebuild_advice, why_not_on, why_not_with
from gemma_deploy.errors import BackendUnavailableError, EngineError, RequestError, SessionError
from gemma_deploy.graph_spec import (
    CACHE_DTYPE_BYTES,
    INPUT_IDS,
    INPUT_POS,
    LOGITS_INDEX,
    CacheDType,
    Phase,
)
from gemma_deploy.runtime.cache_buffers import CacheBuffers, Shape
from gemma_deploy.runtime.cuda_device import CudaDevice
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.engine_step import StepOutputs
from gemma_deploy.runtime.sessions.loaded_engine import LoadedEngine
from gemma_deploy.runtime.sessions.session import (
    Int64Array,
    KVCache,
    SessionLimits,
    StepLogits,
    own_cache,
)
from gemma_deploy.tensorrt import TensorRTLibrary, load_library
from gemma_deploy.tensorrt.gpu import require_gpu


class TensorRTSession:
    """Runs an engine's plans over KV buffers that are inputs and outputs at once.

    One stream, one host synchronization per step. Tokens, positions and the largest logits travel
    through fixed pinned memory; all logits cross only where a request needs them. Steps of one token
    per row are recorded once per batch size and cache as a CUDA graph and then queued by one call.
    Caches may be used in turn; while two are, their steps are bound anew each time and not recorded.

    Needs no torch, no Triton and no ONNX. It has not run on hardware yet.

    Attributes:
        config: The model.
        xp: numpy; logits are in host memory.
        limits: Of the engine.
        device: The GPU.
    """

    xp = array_api_numpy

    def __init__(
        self, engine: EngineFolder, *, device: Device | None = None, use_cuda_graph: bool = True
    ) -> None:
        """Check that the engine fits this machine, and load it.

        Args:
            engine: An opened engine folder.
            device: `auto` (the first GPU) or `cuda`; None is `auto`.
            use_cuda_graph: Whether decode steps are recorded as a CUDA graph.

        Raises:
            BackendUnavailableError: No library, driver or GPU, or one too old.
            EngineError: The engine is of another version or GPU, or damaged; with the command that
                builds it again.
            RequestError: The device is the CPU.
            SessionError: The device's memory does not suffice, or the library failed.
        """
        device = device or Device(kind="auto")
        if device.kind == "cpu":
            raise RequestError(
                "TensorRT engines run on NVIDIA GPUs; device is cpu: use cuda or auto"
            )
        manifest = engine.manifest
        library = _library_of(manifest.build)
        _refuse(engine, why_not_with(manifest.build, library.version))
        gpu = require_gpu(manifest.build.flavour, device.index)
        _refuse(engine, why_not_on(manifest.build, gpu), gpu)
        self.config: GemmaConfig = manifest.model
        self.device = Device(kind="cuda", index=device.index)
        self._manifest = manifest
        limits = manifest.build.limits
        self.limits = SessionLimits(
            max_batch_size=limits.max_batch_size,
            max_seq_len=limits.max_seq_len,
            max_step_tokens=limits.max_step_tokens,
            max_step_logits=limits.max_logits,
        )
        self._cuda = CudaDevice(device.index)
        self._engine = LoadedEngine(library, engine, self._cuda, use_cuda_graph=use_cuda_graph)
        # A session that nobody closed frees what it holds before the interpreter is taken apart.
        self._finalizer = weakref.finalize(self, self._engine.close)
        engine.check_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_cache(self, batch_size: int, max_seq_len: int) -> CacheBuffers:
        """Allocate a cache on the GPU; see `Session.new_cache`.

        The engine's cache has a fixed length, so that is what is allocated; rows end at
        `max_seq_len` nevertheless. Recorded steps are dropped: they belong to caches that may be gone.
        """
        limits = self._manifest.build.limits
        _refuse_above("a KV cache", "rows", batch_size, limits.max_batch_size, "--max-batch")
        _refuse_above("a KV cache", "tokens", max_seq_len, limits.max_seq_len, "--max-seq-len")
        engine = self._loaded()
        engine.drop_decode_steps()
        whole = CacheBuffers.allocate(
            engine.specs["prefill"].cache_inputs,
            batch_size,
            limits.max_seq_len,
            self._allocate,
            remedy="use a smaller batch size, or an engine built with a smaller --max-seq-len",
        )
        return CacheBuffers(batch_size, max_seq_len, whole.tensors)

    def step(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: KVCache,
        *,
        num_candidates: int | None = None,
    ) -> StepLogits:
        """Run S tokens of each row; see `Session.step`."""
        cache = own_cache(cache, CacheBuffers)
        self._check_step(input_ids, input_pos, logits_index, cache)
        is_decode = input_ids.shape[1] == 1 == logits_index.shape[1]
        limits = self._manifest.build.limits
        wants_logits = num_candidates is None or num_candidates > limits.num_candidates
        sizes = {"B": input_ids.shape[0], "S": input_ids.shape[1], "L": logits_index.shape[1]}
        inputs = {INPUT_IDS: input_ids, INPUT_POS: input_pos, LOGITS_INDEX: logits_index}
        outputs = self._loaded().run(
            "decode" if is_decode else "prefill", sizes, inputs, cache, wants_logits=wants_logits
        )
        if outputs.logits is not None:
            return StepLogits(outputs.logits)
        return _largest(outputs)

    def close(self) -> None:
        """Free the engine and everything it ran on; the session cannot be used afterwards."""
        self._finalizer()

    def describe_engine(self, phase: Phase) -> str:
        """Return what the library's engine inspector says of a phase's plan, as JSON."""
        return self._loaded().describe(phase)

    @property
    def has_cuda_graph(self) -> bool:
        """Whether a decode step is recorded."""
        return self._loaded().has_cuda_graph

    def _allocate(self, shape: Shape, dtype: CacheDType) -> tuple[int, object]:
        memory = self._cuda.allocate(math.prod(shape) * CACHE_DTYPE_BYTES[dtype])
        return memory.address, memory

    def _check_step(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: CacheBuffers,
    ) -> None:
        limits = self._manifest.build.limits
        rows, tokens = input_ids.shape
        _refuse_above("a step", "rows", rows, limits.max_batch_size, "--max-batch")
        _refuse_above(
            "a step", "tokens of a row", tokens, limits.max_step_tokens, "--prefill-chunk"
        )
        _refuse_above(
            "a step", "logits of a row", logits_index.shape[1], limits.max_logits, "--max-logits"
        )
        if rows != cache.batch_size:
            raise SessionError(f"a step of {rows} rows with a KV cache of {cache.batch_size}")
        end = int(input_pos.max(initial=0)) + tokens
        if end > cache.max_seq_len:
            raise SessionError(
                f"{tokens} tokens at position {end - tokens} do not fit a KV cache of "
                f"{cache.max_seq_len} tokens: allocate a longer one"
            )

    def _loaded(self) -> LoadedEngine:
        if self._engine.is_closed:
            raise SessionError("the session is closed: load the model again")
        return self._engine


def _library_of(build: EngineBuild) -> TensorRTLibrary:
    """Load an engine's library; where it is missing, name the version the engine needs."""
    try:
        return load_library(build.flavour)
    except BackendUnavailableError as err:
        raise BackendUnavailableError(
            f"{err}. To run this engine and no more: "
            f"pip install {build.flavour}=={build.library_version} cuda-bindings"
        ) from err


def _refuse(engine: EngineFolder, reason: str | None, gpu: Gpu | None = None) -> None:
    """Raise an EngineError with the command that builds a fitting engine, if there is a reason."""
    if reason is not None:
        raise EngineError(
            f"{engine.folder} cannot be loaded: {reason}; {rebuild_advice(engine, gpu)}"
        )


def _largest(outputs: StepOutputs) -> StepLogits:
    """Return the largest logits, not finite where any of all the logits is not."""
    logits = outputs.picked[TOP_LOGITS]
    # A comparison with NaN is false, so the largest may leave it out; the sum does not.
    logits[~np.isfinite(outputs.picked[LOGITS_SUM])] = np.nan
    return StepLogits(logits, outputs.picked[TOP_INDICES])


def _refuse_above(what: str, counted: str, wanted: int, most: int, option: str) -> None:
    """Raise a RequestError that names the limit, the request, and the option of a larger build."""
    if wanted > most:
        raise RequestError(
            f"{what} of {wanted:,} {counted} was asked for; this engine was built for at most "
            f"{most:,}: ask for less, or build an engine with a larger {option}"
        )
