"""One prepared graph to one plan, in this process: `write_plan`.

The library may abort the process, so this runs in a child: see `gemma_deploy.exporters.engine.child`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from gemma_deploy.engine_build import EngineBuild
from gemma_deploy.errors import BackendUnavailableError, EngineBuildError
from gemma_deploy.exporters.engine.phase_progress import PhaseProgress
from gemma_deploy.exporters.engine.profiles import Profile
from gemma_deploy.exporters.engine.targets import target_constants
from gemma_deploy.file_records import FileRecord
from gemma_deploy.graph_spec import GraphSpec, TensorSpec
from gemma_deploy.install_hint import install_line
from gemma_deploy.tensorrt import TensorRTLibrary
from gemma_deploy.tensorrt.tensors import DTYPE_NAMES

if TYPE_CHECKING:
    from gemma_deploy.exporters.engine.prepared_graph import PreparedGraph

OnProgress = Callable[[str, int, int], object]
"""(what is being done, done, total)."""

_PROGRESS_STEPS: Final = 1000
# What the library must have, and where: the newest of them came with TensorRT 10.15.
_FEATURES: Final = (
    ("OnnxParser", "load_initializer"),
    ("Builder", "build_serialized_network_to_stream"),
    ("INetworkDefinition", "add_kv_cache_update"),
)


def check_features(library: TensorRTLibrary) -> None:
    """Refuse a library that lacks what engines are built with.

    Raises:
        BackendUnavailableError: It is too old; with what is missing.
    """
    for owner, name in _FEATURES:
        if not hasattr(getattr(library.module, owner), name):
            raise BackendUnavailableError(
                f"{library.flavour} {library.version} has no {owner}.{name}; expected TensorRT "
                "10.15 or TensorRT for RTX 1.5, or newer: "
                f"{install_line(library.flavour, '--upgrade')}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """One plan to be built.

    Attributes:
        build: The engine it belongs to.
        graph: What it is built from.
        spec: What it takes and gives.
        profiles: Its optimization profiles.
    """

    build: EngineBuild
    graph: "PreparedGraph"
    spec: GraphSpec
    profiles: Sequence[Profile]


def write_plan(
    library: TensorRTLibrary, job: PlanJob, path: Path, on_progress: OnProgress = lambda *_: None
) -> FileRecord:
    """Build a plan and write it to a file as it comes.

    Weights reach the library as addresses in the mapped weights file: the plan it puts together is
    the only copy in anonymous memory.

    Args:
        library: What builds.
        job: What to build.
        path: The file to create.
        on_progress: Called from threads of the library.

    Returns:
        Size and SHA-256 of the file, taken while it was written.

    Raises:
        EngineBuildError: The library refused the graph or could not build it; in its own words.
        OSError: The file cannot be written.
    """
    module, log = library.module, library.log
    log.take_errors()
    builder = _create_builder(library)
    network = builder.create_network(_network_flags(module))
    parser = module.OnnxParser(network, log.logger)
    # Both outlive the parser, which only borrows them.
    weights = np.memmap(job.graph.weights_path, np.uint8, "r")
    _parse(library, parser, job.graph, weights.ctypes.data)
    _check_interface(module, network, job.spec)
    config = _builder_config(library, builder, job)
    monitor = _progress_monitor(module, on_progress)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor
    with path.open("wb") as file:
        writer = _plan_writer(module, file, job.graph.weights_bytes, on_progress)
        is_built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        if not is_built:
            raise _failure(library, "could not build the engine")
    return FileRecord(size_bytes=writer.size_bytes, sha256=writer.digest.hexdigest())


def _create_builder(library: TensorRTLibrary) -> Any:
    try:
        return library.module.Builder(library.log.logger)
    except TypeError as err:  # the bindings' way to say that the library gave none
        raise _failure(library, "made no builder; see `gemma-deploy doctor`") from err


def _network_flags(module: Any) -> int:
    # TensorRT 10 would choose precisions itself; later versions and RTX never do.
    return 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(library: TensorRTLibrary, parser: Any, graph: "PreparedGraph", weights: int) -> None:
    """Fill the network from the graph; `weights` is the address of the mapped weights file."""
    if not parser.load_model_proto(graph.proto):
        raise _failure(library, "could not read the graph", parser)
    for item in graph.initializers:
        if not parser.load_initializer(item.name, weights + item.offset, item.size_bytes):
            raise _failure(library, f"refused the weight {item.name}", parser)
    if not parser.parse_model_proto():
        raise _failure(library, "could not parse the graph", parser)


def _check_interface(module: Any, network: Any, spec: GraphSpec) -> None:
    """Refuse a network whose inputs and outputs are not those the runtime will bind."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for what, tensors, expected in (
        ("inputs", inputs, spec.inputs),
        ("outputs", outputs, spec.outputs),
    ):
        found = {tensor.name: tensor for tensor in tensors}
        if found.keys() != {tensor.name for tensor in expected}:
            raise EngineBuildError(
                f"the graph's {what} are {', '.join(sorted(found))}, expected "
                f"{', '.join(tensor.name for tensor in expected)}: it does not belong to this "
                "bundle's model; export the bundle again"
            )
        for tensor in expected:
            _check_tensor(module, found[tensor.name], tensor)


def _check_tensor(module: Any, tensor: Any, expected: TensorSpec) -> None:
    dtype = getattr(module.DataType, DTYPE_NAMES[expected.dtype])
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected.dims) and all(
        size in (-1, dim) if isinstance(dim, int) else size == -1
        for size, dim in zip(shape, expected.dims, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        raise EngineBuildError(
            f"the graph's {expected.name} is {tensor.dtype.name} {list(shape)}, expected "
            f"{dtype.name} {list(expected.dims)}: it does not belong to this bundle's model; export "
            "the bundle again"
        )


def _builder_config(library: TensorRTLibrary, builder: Any, job: PlanJob) -> Any:
    config = builder.create_builder_config()
    for ranges in job.profiles:
        profile = builder.create_optimization_profile()
        for name, shape in ranges.items():
            profile.set_shape(name, shape.smallest, shape.usual, shape.largest)
        if config.add_optimization_profile(profile) < 0:
            raise _failure(library, "refused an optimization profile")
    # The runtime gives the memory itself and records steps: TensorRT for RTX allocates while a step
    # runs, which cannot be recorded, unless it is told not to.
    if hasattr(library.module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(library.module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(config, "num_compute_capabilities"):
        constants = target_constants(library.module, job.build.targets)
        config.num_compute_capabilities = len(constants)
        for index, constant in enumerate(constants):
            config.set_compute_capability(constant, index)
    return config


def _failure(library: TensorRTLibrary, what: str, parser: Any = None) -> EngineBuildError:
    """Return an error with what the library has to say."""
    said = library.log.take_errors()
    if not said and parser is not None:
        said = "\n".join(parser.get_error(i).desc() for i in range(parser.num_errors))
    return EngineBuildError(
        f"{library.flavour} {library.version} {what}:\n{said or '(it gave no reason)'}"
    )


def _plan_writer(module: Any, file: BinaryIO, total: int, on_progress: OnProgress) -> Any:
    """Derive from the module's own IStreamWriter: bindings accept no other."""

    class Writer(module.IStreamWriter):  # type: ignore[misc]  # the base is only known at run time
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)
            self.digest = hashlib.sha256()
            self.size_bytes = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            # An exception must not pass through the library: a short write makes it stop.
            if self.error is not None:
                return 0
            try:
                file.write(data)
            except OSError as err:
                err.filename = file.name
                self.error = err
                return 0
            self.digest.update(data)
            self.size_bytes += len(data)
            on_progress("writing the plan", min(self.size_bytes, total), total)
            return len(data)

    return Writer()


def _progress_monitor(module: Any, on_progress: OnProgress) -> Any:
    """Derive from the module's own IProgressMonitor."""
    phases = PhaseProgress()

    def tell(share: float) -> None:
        on_progress("building the engine", int(share * _PROGRESS_STEPS), _PROGRESS_STEPS)

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the base is only known at run time
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(phases.step(phase_name, step))
            return True  # do not cancel: whoever wants that ends the process

        def phase_finish(self, phase_name: str) -> None:
            tell(phases.finish(phase_name))

    return Monitor()
