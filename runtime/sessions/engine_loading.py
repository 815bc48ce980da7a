"""A plan on disk to a deserialized engine, checked as far as the library can before it is loaded."""

import mmap
from pathlib import Path
from typing import Any

from gemma_deploy.engine import EngineFolder
from gemma_deploy.engine_fit import rebuild_advice
from gemma_deploy.errors import EngineError, SessionError
from gemma_deploy.runtime.sessions.engine_bindings import EngineTensor
from gemma_deploy.tensorrt import TensorRTLibrary


def create_runtime(library: TensorRTLibrary, engine: EngineFolder) -> Any:
    """Return the library's `Runtime`, with the plugin registered that the engine's plans need.

    Raises:
        EngineError: The plans need another version of the plugin.
        SessionError: The library made none.
    """
    if engine.manifest.build.plugin_version is not None:
        from gemma_deploy.plugins.attention import PLUGIN_VERSION, register_plugin

        needed = engine.manifest.build.plugin_version
        if needed != PLUGIN_VERSION:
            raise EngineError(
                f"{engine.folder} was built with version {needed} of the attention plugin, this "
                f"gemma-deploy has {PLUGIN_VERSION}: {rebuild_advice(engine)}"
            )
        register_plugin(library)
    library.log.take_errors()
    try:
        return library.module.Runtime(library.log.logger)
    except TypeError as err:  # the bindings' way to say that the library gave none
        raise SessionError(
            f"{library.flavour} {library.version} made no runtime: "
            f"{library.log.take_errors() or err}. See `gemma-deploy doctor`"
        ) from err


def load_plan(library: TensorRTLibrary, runtime: Any, engine: EngineFolder, path: Path) -> Any:
    """Deserialize a plan; return the library's `ICudaEngine`.

    The plan is mapped, not read: its pages are the system's file cache, which gives them up when
    memory is short, and not a copy of the process.

    Args:
        library: What built it.
        runtime: From `create_runtime`.
        engine: The engine it belongs to.
        path: The plan's file.

    Raises:
        EngineError: The library refuses it, in its own words.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        reason = _why_invalid(library, runtime, plan)
        if reason is None:
            loaded = runtime.deserialize_cuda_engine(plan)
            if loaded is not None:
                return loaded
            reason = "it could not be deserialized"
    said = library.log.take_errors()
    # Worth the time now that it failed: a damaged file is not a matter of versions and GPUs.
    changed = engine.changed_files()
    if changed:
        reason = f"{', '.join(changed)} changed since the build, its SHA-256 is another one"
    raise EngineError(
        f"{library.flavour} {library.version} refuses {path}: {reason}"
        f"{': ' + said if said else ''}; {rebuild_advice(engine, force=True)}"
    )


def read_tensors(module: Any, engine: Any) -> tuple[EngineTensor, ...]:
    """Return the inputs and outputs of a deserialized engine."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return tuple(
        EngineTensor(
            name=name,
            is_input=engine.get_tensor_mode(name) == module.TensorIOMode.INPUT,
            dtype=engine.get_tensor_dtype(name).name,
            shape=tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    )


def _why_invalid(library: TensorRTLibrary, runtime: Any, plan: mmap.mmap) -> str | None:
    """Return what TensorRT for RTX finds wrong with a plan on this GPU; TensorRT has no such check."""
    if not hasattr(runtime, "get_engine_validity"):
        return None
    validity, bits = runtime.get_engine_validity(plan)
    if validity != library.module.EngineValidity.INVALID:
        return None
    return describe_invalidity(library.module, bits)


def describe_invalidity(module: Any, bits: int) -> str:
    """Return the names of the diagnostics that `get_engine_validity` gives as bits."""
    members = module.EngineInvalidityDiagnostics.__members__
    found = [name for name, member in members.items() if bits & int(member)]
    return f"invalid ({', '.join(found) or 'it does not say why'})"
