"""Backends by name; each is imported only when it is asked for."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.source import ModelSource

Creator = Callable[[ModelSource, Device, int | None], Session]


def create_session(
    source: ModelSource, *, backend: str = "auto", device: str = "auto", threads: int | None = None
) -> Session:
    """Load a model.

    Args:
        source: A bundle or checkpoint.
        backend: A name from `BACKENDS`, or `auto`: onnxruntime for a bundle, torch for a checkpoint.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Threads of the CPU kernels, at least 1; None leaves it to the backend.

    Raises:
        RequestError: An unknown backend or device, or a backend that cannot run this folder.
        BackendUnavailableError: The backend's package or the device is not here.
        SessionError: The backend failed to load the model.
    """
    if backend == "auto":
        backend = "torch" if source.bundle is None else "onnxruntime"
    if backend not in BACKENDS:
        raise RequestError(f"backend is {backend!r}; expected auto, {', '.join(sorted(BACKENDS))}")
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}; it must be at least 1")
    return BACKENDS[backend](source, Device.parse(device), threads)


def _onnxruntime(source: ModelSource, device: Device, threads: int | None) -> Session:
    if source.bundle is None:
        raise RequestError(
            f"{source.folder} is a checkpoint; the onnxruntime backend runs bundles: "
            f"`gemma-deploy export {source.folder} --output BUNDLE` makes one"
        )
    try:
        from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
    except ImportError as err:
        raise BackendUnavailableError(
            f"the onnxruntime backend cannot be imported: {err}. pip install onnxruntime-gpu "
            "(onnxruntime on macOS)"
        ) from err
    return OnnxRuntimeSession(source.bundle, device=device, threads=threads)


def _torch(source: ModelSource, device: Device, threads: int | None) -> Session:
    if source.bundle is not None:
        raise RequestError(
            f"{source.folder} is a bundle; the torch backend runs checkpoints: give the folder the "
            "bundle was exported from, or use the backend onnxruntime"
        )
    try:
        from gemma_deploy.runtime.sessions.torch_session import TorchSession
    except ImportError as err:
        raise BackendUnavailableError(
            f"the torch backend cannot be imported: {err}. pip install torch"
        ) from err
    return TorchSession(source.folder, device=device, threads=threads)


BACKENDS: Mapping[str, Creator] = MappingProxyType({"onnxruntime": _onnxruntime, "torch": _torch})
"""Every backend's name and what creates a session of it."""
