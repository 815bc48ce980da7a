"""One execution context of an engine, and the steps it runs over fixed memory: `EngineStep`.

Nothing here has run on hardware yet.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.errors import SessionError
from gemma_deploy.graph_spec import LOGITS, GraphSpec
from gemma_deploy.runtime.cache_buffers import CacheBuffers
from gemma_deploy.runtime.cuda_device import CapturedGraph
from gemma_deploy.runtime.sessions.engine_bindings import (
    Binding,
    Region,
    block_bindings,
    cache_bindings,
    logits_output,
    pack,
    picked_outputs,
    token_inputs,
)
from gemma_deploy.runtime.sessions.step_memory import Sizes, StepMemory
from gemma_deploy.tensorrt import TensorRTLibrary

_LOGGER: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutputs:
    """Where a step's outputs are.

    Attributes:
        picked: The small outputs, by name.
        logits: All logits [B, L, V] float32, or None if they stayed on the device.
    """

    picked: Mapping[str, npt.NDArray[Any]]
    logits: npt.NDArray[np.float32] | None


class EngineStep:
    """An execution context with one optimization profile.

    With `use_cuda_graph`, steps that repeat the sizes and cache of the one before are recorded, and then
    queued as one graph instead of call by call. A context that a graph was recorded from may not be changed as long as
    the graph is used, so such a context serves one set of sizes.
    """

    def __init__(
        self,
        library: TensorRTLibrary,
        engine: Any,
        profile: int,
        spec: GraphSpec,
        memory: StepMemory,
        *,
        use_cuda_graph: bool,
    ) -> None:
        """Create the context.

        Args:
            library: The library.
            engine: A deserialized engine.
            profile: Index of the optimization profile.
            spec: What the engine takes and gives.
            memory: What steps read and write.
            use_cuda_graph: Whether steps are recorded.

        Raises:
            SessionError: The library refuses.
        """
        self._library = library
        self._spec = spec
        self._memory = memory
        self._use_cuda_graph = use_cuda_graph
        self._graph: CapturedGraph | None = None
        self._bound: object = None
        self._is_repeated = False
        self._inputs: dict[str, Region] = {}
        self._outputs: dict[str, Region] = {}
        self._input_bytes = self._output_bytes = 0
        # The context only borrows its config.
        self._config = _runtime_config(library.module, engine, is_static=use_cuda_graph)
        self._context: Any = engine.create_execution_context(self._config)
        self._check(self._context is not None, "cannot create an execution context")
        activations = memory.activations
        if activations.size_bytes:
            self._context.set_device_memory(activations.address, activations.size_bytes)
        stream = int(memory.stream.handle)
        self._check(
            self._context.set_optimization_profile_async(profile, stream),
            f"cannot switch to optimization profile {profile}",
        )
        memory.stream.synchronize()

    @property
    def has_graph(self) -> bool:
        """Whether the last step was recorded, or queued from a record."""
        return self._graph is not None

    def run(
        self,
        sizes: Sizes,
        inputs: Mapping[str, npt.NDArray[np.int64]],
        cache: CacheBuffers,
        *,
        wants_logits: bool,
    ) -> StepOutputs:
        """Run a step and wait for it.

        Args:
            sizes: B, S and L.
            inputs: The token inputs by name; more than the engine takes do no harm.
            cache: Of B rows.
            wants_logits: Whether all logits are to cross to the host.

        Raises:
            SessionError: The library or the device failed.
        """
        self._bind(sizes, cache)
        for name, region in self._inputs.items():
            self._memory.write(region, inputs[name])
        if self._graph is not None:
            self._graph.launch(self._memory.stream)
        else:
            self._queue()
        logits = None
        if wants_logits:
            regions, _ = pack([logits_output(self._spec)], sizes)
            logits = self._memory.queue_logits(regions[LOGITS])
        self._memory.stream.synchronize()
        if self._use_cuda_graph and self._is_repeated and self._graph is None:
            self._record()
        picked = {name: self._memory.read(region) for name, region in self._outputs.items()}
        return StepOutputs(picked=picked, logits=logits)

    def close(self) -> None:
        """Give the record and the context back."""
        self._drop_graph()
        self._context = self._config = None

    def _bind(self, sizes: Sizes, cache: CacheBuffers) -> None:
        """Tell the context shapes and addresses, unless they are those of the last step."""
        wanted = (tuple(sizes.items()), tuple(tensor.address for tensor in cache.tensors))
        # The last token of a prompt may come alone: its step is not worth recording.
        self._is_repeated = wanted == self._bound
        if self._is_repeated:
            return
        self._drop_graph()
        self._bound = None  # until everything is bound
        self._inputs, self._input_bytes = pack(token_inputs(self._spec), sizes)
        self._outputs, self._output_bytes = pack(picked_outputs(self._spec), sizes)
        memory = self._memory
        for binding in (
            *block_bindings(self._inputs, memory.inputs.address, are_inputs=True),
            *cache_bindings(self._spec, cache),
            *block_bindings(self._outputs, memory.outputs.address, are_inputs=False),
            Binding(name=LOGITS, address=memory.logits.address, shape=None),
        ):
            if binding.shape is not None:
                self._check(
                    self._context.set_input_shape(binding.name, binding.shape),
                    f"refuses the shape {list(binding.shape)} of {binding.name}",
                )
            self._check(
                self._context.set_tensor_address(binding.name, binding.address),
                f"refuses the address {binding.address:#x} of {binding.name}",
            )
        self._bound = wanted

    def _queue(self) -> None:
        """Queue the inputs' copy, the engine, and the outputs' copy."""
        self._memory.queue_inputs(self._input_bytes)
        is_queued = self._context.execute_async_v3(int(self._memory.stream.handle))
        self._check(is_queued, "failed to run a step")
        self._memory.queue_outputs(self._output_bytes)

    def _record(self) -> None:
        """Record the step that just ran; where that is not possible steps go on being queued."""
        stream = self._memory.stream
        # TensorRT for RTX knows beforehand; TensorRT says so by failing.
        can_tell = hasattr(self._context, "is_stream_capturable")
        if can_tell and not self._context.is_stream_capturable(int(stream.handle)):
            reason = "the library cannot capture this engine"
        else:
            try:
                self._graph = self._memory.device.capture(stream, self._queue)
            except SessionError as err:
                reason = str(err)
            else:
                return
        self._use_cuda_graph = False
        _LOGGER.warning("decode steps run without a CUDA graph: %s", reason)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.free()
            self._graph = None

    def _check(self, is_done: bool, what: str) -> None:
        """Raise what the library said if a call failed."""
        if not is_done:
            said = self._library.log.take_errors() or "it gave no reason"
            raise SessionError(
                f"{self._library.flavour} {self._library.version} {what}: {said}. See "
                "`gemma-deploy doctor`; a smaller batch or prompt tells whether memory is short"
            )


def _runtime_config(module: Any, engine: Any, *, is_static: bool) -> Any:
    """Return how a context is to run: on memory that is given to it.

    TensorRT for RTX makes kernels for a shape in the background while general ones do the work. A
    recording would keep the general ones for good, so a context of one shape waits for its own.
    """
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(
        module.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    if is_static and hasattr(module, "DynamicShapesKernelSpecializationStrategy"):
        strategies = module.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    return config
