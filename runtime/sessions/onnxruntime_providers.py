"""ONNX Runtime inference sessions on the device asked for, and honest about what they run on."""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from gemma_deploy.cuda_driver import cuda_device_count
from gemma_deploy.errors import BackendUnavailableError, SessionError
from gemma_deploy.runtime.devices import Device

ORT_ERRORS: tuple[type[Exception], ...] = (
    UnicodeDecodeError,  # its messages hold a graph's names, which may be no text
    RuntimeError,
    *(x for x in vars(ort_errors).values() if isinstance(x, type) and issubclass(x, Exception)),
)
"""What ONNX Runtime raises: its exceptions have no common base, and some are plain RuntimeErrors."""

_EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
# Weights of portable graphs are then dequantized once, when they are loaded, not at every step.
_FOLD_DEQUANTIZATION = ("session.disable_quant_qdq", "1")
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# ONNX Runtime's log severities; warnings (2) are its default.
_WARNINGS, _ERRORS, _FATAL = 2, 3, 4


def create_inference_session(
    graph: Path, device: Device, threads: int | None, *, model: bytes | None = None
) -> tuple[Any, Device]:
    """Load a graph.

    Which providers were compiled in says nothing of this machine, and ONNX Runtime falls back to the
    CPU without an exception: the session itself is asked what it runs on.

    Loading on CUDA has not run on hardware yet.

    Args:
        graph: An ONNX file whose external data has been checked.
        device: `auto` never fails for want of CUDA; `cuda` does.
        threads: Threads of the CPU kernels; None for one per core.
        model: A serialized model to load in the file's place; its external data is looked for in the
            file's folder.

    Returns:
        The `onnxruntime.InferenceSession`, and the device it runs on (`cpu` or `cuda`).

    Raises:
        BackendUnavailableError: `cuda` was asked for and does not work here.
        SessionError: ONNX Runtime cannot load the graph.
    """
    options = session_options(threads)
    if model is not None:
        options.add_session_config_entry(_EXTERNAL_DATA_FOLDER, str(graph.parent))
    load = functools.partial(_load, graph, model, options)
    missing = None if device.kind == "cpu" else _missing_for_cuda(device)
    if device.kind == "cuda" and missing is not None:
        raise BackendUnavailableError(missing)
    if device.kind == "cpu" or missing is not None:
        return load([_CPU]), Device(kind="cpu")
    with _quiet(options) as said:
        # TF32 would round what a float32 graph still multiplies (the logits) to 10 bits of mantissa.
        cuda_options = {"device_id": device.index, "use_tf32": 0}
        providers: list[Any] = [(_CUDA, cuda_options), _CPU]
        session = load(providers)
    if _CUDA in session.get_providers():
        return session, Device(kind="cuda", index=device.index)
    if device.kind == "auto":
        return session, Device(kind="cpu")
    reason = " ".join(said.getvalue().split()) or "it gave no reason"
    raise BackendUnavailableError(
        f"ONNX Runtime {ort.__version__} could not start its CUDA provider and would run on "
        f"{', '.join(session.get_providers())}: {reason}. It needs CUDA 13 and cuDNN 9: "
        "pip install 'onnxruntime-gpu[cuda,cudnn]', or use the device cpu"
    )


def session_options(threads: int | None) -> Any:
    """Return the `onnxruntime.SessionOptions` that every graph is loaded with.

    Args:
        threads: Threads of the CPU kernels; None for one per core.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS
    options.add_session_config_entry(*_FOLD_DEQUANTIZATION)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def load_on_cpu(graph: Path, options: Any) -> Any:
    """Load a graph to run on the CPU.

    Args:
        graph: An ONNX file whose external data has been checked.
        options: From `session_options`.

    Raises:
        SessionError: ONNX Runtime cannot load the graph.
    """
    return _load(graph, None, options, [_CPU])


def is_on_cpu(device: Device) -> bool:
    """Tell whether it is clear before loading that a graph will run on the CPU."""
    return device.kind == "cpu" or (device.kind == "auto" and _missing_for_cuda(device) is not None)


def _missing_for_cuda(device: Device) -> str | None:
    """Return what stands against CUDA before it is even tried, or None."""
    if _CUDA not in ort.get_available_providers():
        return (
            f"ONNX Runtime {ort.__version__} was built without CUDA "
            f"(it has {', '.join(ort.get_available_providers())}): "
            "pip install onnxruntime-gpu, or use the device cpu"
        )
    count = cuda_device_count()
    if device.index >= count:
        found = f"{count} CUDA device(s)" if count else "no NVIDIA driver or CUDA device"
        return (
            f"cuda:{device.index} is not on this machine: {found} found. ONNX Runtime "
            f"{ort.__version__} needs an NVIDIA driver, CUDA 13 and cuDNN 9; use the device cpu, or "
            "see `gemma-deploy doctor`"
        )
    return None


@contextlib.contextmanager
def _quiet(options: Any) -> Iterator[io.StringIO]:
    """Load CUDA's libraries from pip's nvidia-* packages; keep what ONNX Runtime would print."""
    said = io.StringIO()
    options.log_severity_level = _FATAL
    ort.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
            yield said
    finally:
        ort.set_default_logger_severity(_WARNINGS)


def _load(graph: Path, model: bytes | None, options: Any, providers: list[Any]) -> Any:
    try:
        return ort.InferenceSession(model or str(graph), options, providers=providers)
    except ORT_ERRORS as err:
        raise SessionError(
            f"ONNX Runtime {ort.__version__} cannot load {graph}: {err}. Check the bundle with "
            "`gemma-deploy verify`; a graph made by a newer version may need a newer onnxruntime"
        ) from err
