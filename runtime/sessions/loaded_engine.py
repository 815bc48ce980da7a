"""An engine's plans on a GPU, and what runs their steps: `LoadedEngine`.

Nothing here has run on hardware yet.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.engine import EngineFolder
from gemma_deploy.engine_fit import rebuild_advice
from gemma_deploy.errors import SessionError
from gemma_deploy.graph_spec import PHASES, Phase
from gemma_deploy.runtime.cache_buffers import CacheBuffers
from gemma_deploy.runtime.cuda_device import CudaDevice
from gemma_deploy.runtime.sessions.engine_bindings import check_tensors
from gemma_deploy.runtime.sessions.engine_loading import create_runtime, load_plan, read_tensors
from gemma_deploy.runtime.sessions.engine_step import EngineStep, StepOutputs
from gemma_deploy.runtime.sessions.step_memory import Sizes, StepMemory
from gemma_deploy.tensorrt import TensorRTLibrary

# Batch sizes whose decode steps stay recorded; each has a context of its own.
_MOST_DECODE_STEPS: Final = 8


class LoadedEngine:
    """The deserialized plans, their contexts, and the memory of their steps.

    Steps run one after the other, so all contexts share one block for their activations.

    Attributes:
        specs: What the engine of each phase takes and gives.
        is_closed: Whether everything was given back.
    """

    def __init__(
        self,
        library: TensorRTLibrary,
        engine: EngineFolder,
        device: CudaDevice,
        *,
        use_cuda_graph: bool,
    ) -> None:
        """Load the plans and allocate what their steps need.

        Args:
            library: What built them.
            engine: The engine folder.
            device: The GPU.
            use_cuda_graph: Whether decode steps are recorded.

        Raises:
            EngineError: The library refuses a plan, or it is not what its manifest says.
            SessionError: The device's memory does not suffice, or the library failed.
        """
        self.is_closed = False
        self.specs = {phase: engine.manifest.spec(phase) for phase in PHASES}
        self._library = library
        self._folder = engine
        self._plans = engine.manifest.plans
        self._device = device
        self._use_cuda_graph = use_cuda_graph
        self._runtime: Any = None
        self._engines: dict[str, Any] = {}
        self._memory: StepMemory | None = None
        # One step for prefill, and one for each batch size of decode.
        self._prefill: EngineStep | None = None
        self._decode: dict[int, EngineStep] = {}
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    @property
    def has_cuda_graph(self) -> bool:
        """Whether a decode step is recorded."""
        return any(step.has_graph for step in self._decode.values())

    def run(
        self,
        phase: Phase,
        sizes: Sizes,
        inputs: Mapping[str, npt.NDArray[np.int64]],
        cache: CacheBuffers,
        *,
        wants_logits: bool,
    ) -> StepOutputs:
        """Run a step with the profile of a phase; see `EngineStep.run`."""
        self._device.activate()
        try:
            step = self._decode_step(sizes["B"]) if phase == "decode" else self._prefill_step()
            return step.run(sizes, inputs, cache, wants_logits=wants_logits)
        except MemoryError as err:
            raise _out_of_memory(err) from err

    def describe(self, phase: Phase) -> str:
        """Return what the library's engine inspector says of a phase's plan, as JSON."""
        inspector = self._engines[self._plans[phase].path].create_engine_inspector()
        text: str = inspector.get_engine_information(
            self._library.module.LayerInformationFormat.JSON
        )
        return text

    def drop_decode_steps(self) -> None:
        """Give the recorded steps back: they belong to a cache that may be gone."""
        self._device.activate()
        self._close_decode_steps()

    def close(self) -> None:
        """Give everything back, what depends on something else before it; raises nothing."""
        self.is_closed = True
        # A device that failed says so again at every call; the error that closed the session counts.
        with contextlib.suppress(SessionError):
            self._device.activate()
            if self._memory is not None:  # Ctrl-C may have left a step running
                self._memory.stream.synchronize()
        self._close_decode_steps()
        if self._prefill is not None:
            self._prefill.close()
            self._prefill = None
        self._engines.clear()
        self._runtime = None
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    def _load(self) -> None:
        self._device.activate()
        self._runtime = create_runtime(self._library, self._folder)
        for phase in PHASES:
            path = self._plans[phase].path
            if path in self._engines:
                continue
            file = self._folder.plan_path(phase)
            loaded = load_plan(self._library, self._runtime, self._folder, file)
            tensors = read_tensors(self._library.module, loaded)
            check_tensors(self.specs[phase], tensors, rebuild_advice(self._folder, force=True))
            self._engines[path] = loaded
        activation_bytes = [
            self._engines[plan.path].get_device_memory_size_for_profile_v2(plan.profile)
            for plan in self._plans.values()
        ]
        limits = self._folder.manifest.build.limits
        largest = {"B": limits.max_batch_size, "S": limits.max_step_tokens, "L": limits.max_logits}
        try:
            self._memory = StepMemory(
                self._device, self.specs["prefill"], largest, max(activation_bytes)
            )
        except MemoryError as err:
            raise _out_of_memory(err) from err

    def _close_decode_steps(self) -> None:
        while self._decode:
            self._decode.popitem()[1].close()

    def _prefill_step(self) -> EngineStep:
        if self._prefill is None:
            self._prefill = self._create_step("prefill", use_cuda_graph=False)
        return self._prefill

    def _decode_step(self, batch_size: int) -> EngineStep:
        """Return the decode step of a batch size; what is recorded is of one size."""
        if batch_size not in self._decode:
            if len(self._decode) >= _MOST_DECODE_STEPS:
                self._decode.pop(next(iter(self._decode))).close()
            self._decode[batch_size] = self._create_step(
                "decode", use_cuda_graph=self._use_cuda_graph
            )
        return self._decode[batch_size]

    def _create_step(self, phase: Phase, *, use_cuda_graph: bool) -> EngineStep:
        if self._memory is None:
            raise SessionError("the session is closed: load the model again")
        plan = self._plans[phase]
        return EngineStep(
            self._library,
            self._engines[plan.path],
            plan.profile,
            self.specs[phase],
            self._memory,
            use_cuda_graph=use_cuda_graph,
        )


def _out_of_memory(err: MemoryError) -> SessionError:
    return SessionError(
        f"the GPU has too little free memory for the engine and its steps ({err}): close what else "
        "runs on it, or build an engine with a smaller --max-batch, --prefill-chunk or --max-seq-len"
    )
