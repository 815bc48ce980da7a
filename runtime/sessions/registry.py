"""Backends by name; each is imported only when it is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.graph_spec import DType
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.dtypes import check_dtype, dtype_name
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.threads import usable_threads
from gemma_deploy.tensorrt import FLAVOURS, Flavour


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRequest:
    """What a backend is to load.

    Attributes:
        source: The model's folder.
        device: Where to run.
        threads: Threads of the CPU kernels; None leaves it to the backend.
        max_seq_len: The KV cache that will be wanted, in tokens; None for any.
        prepacked_cache: Folder where ONNX Runtime's packed weights are kept; None for nowhere.
        dtype: What a checkpoint is loaded in; None for its own.
        before_load: Called by ONNX Runtime's backend when nothing is left but to load the graphs.
    """

    source: ModelSource
    device: Device
    threads: int | None
    max_seq_len: int | None
    prepacked_cache: Path | None = None
    dtype: DType | None = None
    before_load: Callable[[], object] = lambda: None


Creator = Callable[[SessionRequest], Session]


def create_session(  # noqa: PLR0913  # all but the model by name
    source: ModelSource,
    *,
    backend: str = "auto",
    device: object = "auto",
    threads: int | None = None,
    max_seq_len: int | None = None,
    prepacked_cache: Path | None = None,
    dtype: object = None,
    before_load: Callable[[], object] = lambda: None,
) -> Session:
    """Load a model.

    Args:
        source: A bundle, checkpoint or packed engine.
        backend: A name from `BACKENDS`, or `auto`: onnxruntime for a bundle, torch for a checkpoint,
            and an engine's own.
        device: `auto`, `cpu`, `cuda` or `cuda:N`, or what else `Device.parse` reads.
        threads: Threads of the CPU kernels, at least 1 and at most 4 for each core that this process
            may use; None leaves it to the backend.
        max_seq_len: The KV cache that will be wanted, in tokens: only engines of at least that are
            considered. None for any.
        prepacked_cache: Folder where ONNX Runtime's packed weights are kept (see `PrepackedCache`);
            None for nowhere. Other backends have no use for it.
        dtype: What a checkpoint is loaded in, as `dtype_name` reads it; None for its own. A bundle or
            an engine has its own: another one is refused.
        before_load: Called by ONNX Runtime's backend when nothing is left but to load the graphs: Python
            can then do something else meanwhile, in another thread.

    Raises:
        RequestError: An unknown backend or device, a backend that cannot run this folder, too many
            threads, or a dtype that a bundle or engine does not have.
        BackendUnavailableError: The backend's package or the device is not here.
        EngineError: No engine of the bundle fits.
        SessionError: The backend failed to load the model.
        BundleError, CheckpointError: The model's files are damaged, or were replaced since `source` was
            opened.
    """
    if backend == "auto":
        backend = natural_backend(source)
    if backend not in BACKENDS:
        raise RequestError(
            f"backend is {shortened(backend)}; expected auto, {', '.join(sorted(BACKENDS))}"
        )
    threads = usable_threads(threads)
    name = dtype_name(dtype)
    check_dtype(source, name)
    request = SessionRequest(
        source=source,
        device=Device.parse(device),
        threads=threads,
        max_seq_len=max_seq_len,
        prepacked_cache=prepacked_cache,
        dtype=name,
        before_load=before_load,
    )
    session = BACKENDS[backend](request)
    try:
        source.check_unchanged()
    except BaseException:
        session.close()
        raise
    return session


def natural_backend(source: ModelSource) -> str:
    """Return the backend that `auto` means for a model."""
    if source.engine is not None:
        return source.engine.manifest.build.flavour
    return "torch" if source.bundle is None else "onnxruntime"


def _onnxruntime(request: SessionRequest) -> Session:
    source = request.source
    if source.bundle is None:
        raise RequestError(f"{_described(source)}; the onnxruntime backend runs bundles")
    try:
        from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
        from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache
    except ImportError as err:
        raise BackendUnavailableError(
            f"the onnxruntime backend cannot be imported: {err}. pip install onnxruntime-gpu "
            "(onnxruntime on macOS)"
        ) from err
    cache = request.prepacked_cache
    return OnnxRuntimeSession(
        source.bundle,
        device=request.device,
        threads=request.threads,
        prepacked_cache=None if cache is None else PrepackedCache(folder=cache),
        before_load=request.before_load,
    )


def _torch(request: SessionRequest) -> Session:
    source = request.source
    if source.bundle is not None or source.engine is not None:
        raise RequestError(
            f"{_described(source)}; the torch backend runs checkpoints: give the folder it was "
            f"exported from, or use the backend {natural_backend(source)}"
        )
    try:
        from gemma_deploy.runtime.sessions.torch_session import TorchSession
    except ImportError as err:
        raise BackendUnavailableError(
            f"the torch backend cannot be imported: {err}. pip install torch"
        ) from err
    return TorchSession(
        source.folder, device=request.device, threads=request.threads, dtype=request.dtype
    )


def _tensorrt(flavour: Flavour, request: SessionRequest) -> Session:
    from gemma_deploy.engine import engines_of_flavour
    from gemma_deploy.runtime.sessions.engine_choice import choose_engine
    from gemma_deploy.runtime.sessions.tensorrt_session import TensorRTSession
    from gemma_deploy.tensorrt import load_library
    from gemma_deploy.tensorrt.gpu import require_gpu

    source, device = request.source, request.device
    if device.kind == "cpu":
        raise RequestError(f"the {flavour} backend runs on NVIDIA GPUs; device is cpu: use cuda")
    engine = source.engine
    if engine is not None and engine.manifest.build.flavour != flavour:
        raise RequestError(
            f"{_described(source)}; it cannot be run by the {flavour} backend: leave the backend out"
        )
    if engine is None:
        if source.bundle is None:
            raise RequestError(
                f"{_described(source)}, and then `gemma-deploy build BUNDLE --backend {flavour}` the "
                f"engine that the {flavour} backend runs"
            )
        engines = engines_of_flavour(source.bundle, flavour)
        library_version = load_library(flavour).version
        engine = choose_engine(
            engines,
            source.bundle,
            library_version=library_version,
            gpu=require_gpu(flavour, device.index),
            max_seq_len=request.max_seq_len,
        )
    return TensorRTSession(engine, device=device)


def _described(source: ModelSource) -> str:
    """Return what a folder is, for an error that tells what it is not."""
    if source.engine is not None:
        return f"{source.folder} is an engine for {source.engine.manifest.build.flavour}"
    if source.bundle is not None:
        return f"{source.folder} is a bundle"
    return (
        f"{source.folder} is a checkpoint: `gemma-deploy export {source.folder} --output BUNDLE` "
        "makes a bundle of it"
    )


BACKENDS: Mapping[str, Creator] = MappingProxyType(
    {
        "onnxruntime": _onnxruntime,
        "torch": _torch,
        **{flavour: partial(_tensorrt, flavour) for flavour in FLAVOURS},
    }
)
"""Every backend's name and what creates a session of it."""
