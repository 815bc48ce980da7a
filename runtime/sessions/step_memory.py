"""The memory that an engine's steps read and write: `StepMemory`.

It has not run on hardware yet.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_deploy.graph_spec import GraphSpec
from gemma_deploy.runtime.cuda_device import CudaDevice, PinnedMemory
from gemma_deploy.runtime.sessions.engine_bindings import (
    Region,
    logits_output,
    pack,
    picked_outputs,
    token_inputs,
)

Sizes = Mapping[str, int]
"""What B, S and L stand for in a step."""


class StepMemory:
    """What every step of an engine reads and writes but the KV cache, allocated once.

    Token inputs and the small outputs are a block each, on the device and pinned on the host, so that
    one copy moves each. All logits stay on the device until they are asked for.

    Attributes:
        device: The GPU.
        stream: Where everything is queued.
        inputs: Block of the token inputs, on the device.
        outputs: Block of the picked outputs, on the device.
        logits: All logits, on the device.
        activations: What contexts that never run at the same time share.
    """

    def __init__(
        self, device: CudaDevice, spec: GraphSpec, largest: Sizes, activation_bytes: int
    ) -> None:
        """Allocate for the largest step.

        Args:
            device: The GPU.
            spec: Of the prefill phase, whose steps are the largest.
            largest: The sizes of the largest step.
            activation_bytes: What the contexts need.

        Raises:
            MemoryError: There is not enough on the device.
        """
        _, input_bytes = pack(token_inputs(spec), largest)
        _, output_bytes = pack(picked_outputs(spec), largest)
        _, self._logits_bytes = pack([logits_output(spec)], largest)
        self.device = device
        self.stream = device.create_stream()
        self.inputs = device.allocate(input_bytes)
        self.outputs = device.allocate(output_bytes)
        self.logits = device.allocate(self._logits_bytes)
        self.activations = device.allocate(activation_bytes)
        self._pinned_inputs = device.allocate_pinned(input_bytes)
        self._pinned_outputs = device.allocate_pinned(output_bytes)
        self._pinned_logits: PinnedMemory | None = None

    def write(self, region: Region, array: npt.NDArray[Any]) -> None:
        """Put an input where the next step's copy takes it from."""
        _view(self._pinned_inputs, region)[...] = array

    def read(self, region: Region) -> npt.NDArray[Any]:
        """Return an output of the last step; the next one writes into the same memory."""
        return _view(self._pinned_outputs, region)

    def queue_inputs(self, size_bytes: int) -> None:
        """Queue the copy of the inputs to the device."""
        self.stream.copy_to_device(self.inputs.address, self._pinned_inputs.address, size_bytes)

    def queue_outputs(self, size_bytes: int) -> None:
        """Queue the copy of the picked outputs to the host."""
        self.stream.copy_to_host(self._pinned_outputs.address, self.outputs.address, size_bytes)

    def queue_logits(self, region: Region) -> npt.NDArray[Any]:
        """Queue the copy of all logits; return where they will be."""
        if self._pinned_logits is None:
            self._pinned_logits = self.device.allocate_pinned(self._logits_bytes)
        self.stream.copy_to_host(
            self._pinned_logits.address, self.logits.address, region.size_bytes
        )
        return _view(self._pinned_logits, region)

    def free(self) -> None:
        """Give everything back; pinned memory goes with the last array made of it."""
        for memory in (self.inputs, self.outputs, self.logits, self.activations, self.stream):
            memory.free()


def _view(memory: PinnedMemory, region: Region) -> npt.NDArray[Any]:
    end = region.offset + region.size_bytes
    block: npt.NDArray[Any] = np.asarray(memory)[region.offset : end]
    return block.view(region.dtype).reshape(region.shape)
