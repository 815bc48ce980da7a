"""One ONNX graph on ONNX Runtime, its KV cache bound in place: `OnnxRuntimeGraph`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import BundleError, SessionError
from gemma_deploy.file_identity import HeldFile, Snapshot
from gemma_deploy.file_records import FileRecord
from gemma_deploy.graph_checks import check_graph
from gemma_deploy.graph_spec import (
    INPUT_IDS,
    INPUT_POS,
    LOGITS,
    LOGITS_INDEX,
    GraphSpec,
    Lowering,
    Phase,
    TensorSpec,
)
from gemma_deploy.runtime.cache_buffers import CacheBuffers
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.onnxruntime_providers import (
    ORT_ERRORS,
    create_inference_session,
    is_on_cpu,
)
from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache
from gemma_deploy.runtime.sessions.prepacked_graph import load_prepacked
from gemma_deploy.runtime.sessions.session import Int64Array

_ORT_TYPES = {
    "int64": "tensor(int64)",
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSource:
    """Where a graph comes from.

    Attributes:
        path: The graph's file; its external data lies in the same folder.
        spec: What it takes and gives.
        model: The serialized model to run in the file's place, a rewrite of it; None for the file.
        continues_rows_in_turn: Whether it takes several tokens behind a cache for one row only, as
            GroupQueryAttention does.
        weights: What the bundle says of the file of its external data; None if nothing is known,
            and then its packed weights are not kept.
        data: The file of its external data; None if nothing is known.
        snapshot: What the bundle's files were when it was opened.
    """

    path: Path
    spec: GraphSpec
    model: bytes | None = None
    continues_rows_in_turn: bool = False
    weights: FileRecord | None = None
    data: Path | None = None
    snapshot: Snapshot = field(default_factory=Snapshot, repr=False)

    @classmethod
    def of(cls, bundle: Bundle, phase: Phase, lowering: Lowering) -> "GraphSource":
        """Return a bundle's graph, after a look at where its external data lies.

        Raises:
            BundleError: The bundle has no such graph, or it points outside its files.
        """
        path = bundle.graph_path(phase, lowering)
        check_graph(bundle.folder, path, bundle.manifest.weights)
        return cls(
            path=path,
            spec=bundle.manifest.spec(phase, lowering),
            continues_rows_in_turn=lowering == "onnxruntime",
            weights=bundle.manifest.files[bundle.manifest.weights],
            data=bundle.weights_path,
            snapshot=bundle.snapshot,
        )


class OnnxRuntimeGraph:
    """One loaded graph and the memory that is bound to its inputs and outputs.

    Attributes:
        device: What it runs on, `cpu` or `cuda`.
    """

    def __init__(
        self,
        source: GraphSource,
        device: Device,
        threads: int | None,
        *,
        prepacked_cache: PrepackedCache | None = None,
    ) -> None:
        """Load a graph.

        Args:
            source: The graph; where its external data lies has been checked.
            device: See `create_inference_session`.
            threads: Threads of the CPU kernels; None for one per core.
            prepacked_cache: Where packed weights of the CPU's kernels are kept; None for nowhere.

        Raises:
            BackendUnavailableError: CUDA was asked for and does not work here.
            BundleError: Its inputs and outputs are not those of its spec.
            SessionError: ONNX Runtime cannot load it.
        """
        self._name = source.path.name
        self._spec = source.spec
        self._session: Any
        self._session, self.device, self._mapped = _load(source, device, threads, prepacked_cache)
        _check_ports(self._name, "inputs", self._session.get_inputs(), self._spec.inputs)
        _check_ports(self._name, "outputs", self._session.get_outputs(), self._spec.outputs)
        self._binding: Any = self._session.io_binding()
        self._bound_cache: CacheBuffers | None = None
        names = [spec.name for spec in self._spec.inputs]
        self._token_inputs = [x for x in (INPUT_IDS, INPUT_POS, LOGITS_INDEX) if x in names]
        self._bound_inputs: dict[str, Int64Array] = {}
        self._logits: npt.NDArray[np.float32] = np.empty((0, 0, 0), np.float32)

    def run(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: CacheBuffers,
    ) -> npt.NDArray[np.float32]:
        """Run one step; the logits are overwritten by the next one.

        Args:
            input_ids: int64 [B, S].
            input_pos: int64 [B].
            logits_index: int64 [B, L]; only its shape matters to a decode graph.
            cache: Of B rows; updated in place.

        Returns:
            float32 [B, L, V].

        Raises:
            SessionError: ONNX Runtime failed, the graph is closed, or its weights were changed in
                place.
        """
        if self._session is None:
            raise SessionError("the session is closed: load the model again")
        if self._mapped is not None:
            self._mapped.check()
        given = {INPUT_IDS: input_ids, INPUT_POS: input_pos, LOGITS_INDEX: logits_index}
        try:
            for name in self._token_inputs:
                self._write_input(name, given[name])
            self._bind_cache(cache)
            self._bind_logits((*logits_index.shape, self._spec.outputs[0].dims[-1]))
            self._session.run_with_iobinding(self._binding)
        except KeyboardInterrupt:
            # What is bound may be memory that nobody holds any more.
            self._clear()
            raise
        except ORT_ERRORS as err:
            raise SessionError(
                f"ONNX Runtime failed in {self._name} with {input_ids.shape[0]} rows of "
                f"{input_ids.shape[1]} tokens: {err}"
            ) from err
        return self._logits

    def unbind(self) -> None:
        """Let go of the cache of the last step."""
        if self._bound_cache is not None:
            self._clear()

    def _clear(self) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._bound_cache = None
        # They were bound as well.
        self._bound_inputs.clear()
        self._logits = np.empty((0, 0, 0), np.float32)

    def close(self) -> None:
        """Let go of the session and of everything bound to it."""
        self._session = self._binding = self._bound_cache = None
        if self._mapped is not None:
            self._mapped.close()

    def _write_input(self, name: str, array: Int64Array) -> None:
        """Put a token input where ONNX Runtime reads it, bound anew only where it has to be."""
        bound = self._bound_inputs.get(name)
        # What another device reads is copied there when it is bound, and not again when it changes.
        if bound is not None and bound.shape == array.shape and self.device.kind == "cpu":
            bound[...] = array
            return
        bound = array.astype(np.int64, order="C")
        self._binding.bind_input(name, "cpu", 0, np.int64, bound.shape, bound.ctypes.data)
        self._bound_inputs[name] = bound

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


def _load(
    source: GraphSource, device: Device, threads: int | None, cache: PrepackedCache | None
) -> tuple[Any, Device, HeldFile | None]:
    """Return the inference session, what it runs on, and the file that it maps.

    See `create_inference_session`. On CUDA the weights are copied to the device.
    """
    is_file = source.model is None
    if cache is not None and is_file and source.weights is not None and is_on_cpu(device):
        prepacked = load_prepacked(
            source.path, source.spec, source.weights, source.snapshot, cache, threads
        )
        if prepacked is not None:
            session, mapped = prepacked
            return session, Device(kind="cpu"), mapped
    data = None if source.data is None else _held(source.data)
    session, device = create_inference_session(source.path, device, threads, model=source.model)
    return session, device, data if device.kind == "cpu" else None


def _held(path: Path) -> HeldFile:
    try:
        return HeldFile(path)
    except OSError as err:
        raise BundleError(
            f"{path} cannot be opened: {err.strerror}. Load the bundle again"
        ) from err


def _check_ports(graph: str, side: str, ports: list[Any], specs: tuple[TensorSpec, ...]) -> None:
    """Compare a loaded graph's inputs or outputs with the graph spec: names, dtypes, fixed dims.

    Raises:
        BundleError: They differ.
    """
    try:
        found = {port.name: port for port in ports}
    except UnicodeDecodeError as err:
        raise BundleError(f"{graph} has {side} whose names are no text: export it again") from err
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
