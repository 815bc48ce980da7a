"""The facts about this machine that decide what it can run: `Machine`, read by `read_machine`.

Packages are looked up by their metadata, not imported (onnxruntime excepted: only a session tells
which execution providers work; and TensorRT, which takes a tenth of a second), and the GPU is asked through the driver library itself.
"""

import contextlib
import importlib.util
import io
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Final

from gemma_deploy.cuda_driver import Gpu, read_driver
from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.tensorrt import FLAVOURS, Flavour, load_library
from gemma_deploy.tensorrt.gpu import cuda_major

PACKAGES: Final = (
    "gemma-deploy",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "tokenizers",
    "transformers",
    "huggingface_hub",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "triton",
)
# The instructions that ONNX Runtime's kernels choose by.
_CPU_FEATURES: Final = (
    "avx2",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
# TensorRT's provider is not used here, and its probe prints to stdout when it fails.
_UNUSED: Final = ("TensorrtExecutionProvider",)
# ONNX Runtime's log severities; warnings are its default.
_WARNINGS: Final = 2
_FATAL: Final = 4
# The smallest ONNX model there is, y = Identity(x) of opset 18: asking ONNX Runtime for its providers
# must not need the package that writes models.
_IDENTITY_MODEL: Final = (
    b'\x08\t:>\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x08identity'
    b"Z\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01"
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x12"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found.

    Attributes:
        system: Operating system and processor architecture.
        python: Python's version.
        cpu: The processor's name.
        cpu_features: Instruction sets that matter here; empty where they cannot be read.
        cores: Logical cores this process may use.
        memory_bytes: Main memory; None where it cannot be read.
        free_disk_bytes: Free space where the program runs.
        packages: Version of each of `PACKAGES` that is installed.
        torch_cuda: CUDA version torch was built for; None without CUDA or torch.
        cuda_driver: Newest CUDA version the driver supports, e.g. `13.0`; None without a driver.
        gpus: CUDA devices.
        compiled_providers: Execution providers that onnxruntime was built with.
        working_providers: Those that a session on this machine really gets.
        onnxruntime_error: Why onnxruntime cannot be used, or None.
        tensorrt_errors: Why a flavour of TensorRT that is installed cannot be imported.
        tensorrt_cuda: Major version of CUDA that an installed flavour was built for, where its packages
            say so.
    """

    system: str
    python: str
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    free_disk_bytes: int
    packages: Mapping[str, str]
    torch_cuda: str | None
    cuda_driver: str | None
    gpus: tuple[Gpu, ...]
    compiled_providers: tuple[str, ...]
    working_providers: tuple[str, ...]
    onnxruntime_error: str | None
    tensorrt_errors: Mapping[str, str]
    tensorrt_cuda: Mapping[str, int]


def read_machine() -> Machine:
    """Look at this machine; takes about a second and changes nothing."""
    cpu, features = read_cpu()
    driver, gpus = read_driver()
    compiled, working, error = _read_providers()
    packages = package_versions()
    flavours = [flavour for flavour in FLAVOURS if flavour in packages]
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu=cpu,
        cpu_features=features,
        cores=usable_cores(),
        memory_bytes=read_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
        packages=packages,
        torch_cuda=_torch_cuda(),
        cuda_driver=driver,
        gpus=gpus,
        compiled_providers=compiled,
        working_providers=working,
        onnxruntime_error=error,
        tensorrt_errors={x: why for x in flavours if (why := _tensorrt_error(x)) is not None},
        tensorrt_cuda={x: major for x in flavours if (major := cuda_major(x)) is not None},
    )


def package_versions() -> dict[str, str]:
    """Return the version of each of `PACKAGES` that is installed, none of them imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_cpu() -> tuple[str, tuple[str, ...]]:
    """Return the processor's name, and which of the instruction sets that matter here it has."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    features = tuple(feature for feature in _CPU_FEATURES if feature in present)
    return name[1] if name else platform.processor() or platform.machine(), features


def usable_cores() -> int:
    """Return how many logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_memory_bytes() -> int | None:
    """Return the machine's memory, or what its container may use if that is less; None if unknown."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text(encoding="utf-8").strip() if limit_file.is_file() else ""
    return min(physical, int(limit)) if limit.isdigit() else physical


def _tensorrt_error(flavour: Flavour) -> str | None:
    """Return why a flavour cannot be imported; its metadata may outlive half of its files."""
    try:
        load_library(flavour)
    except BackendUnavailableError as err:
        return str(err)
    return None


def _torch_cuda() -> str | None:
    """Read the CUDA version out of torch's own version file: importing torch takes a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def _read_providers() -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Return the providers compiled in, those that work, and why there are none.

    `get_available_providers` only says what was compiled in; the truth is what a session gets.
    """
    try:
        import onnxruntime as ort
    except ImportError as err:
        return (), (), str(err)
    if not hasattr(ort, "InferenceSession"):
        # What is left when one of two packages with the same files was uninstalled.
        return (), (), "onnxruntime's files are incomplete"
    compiled = tuple(ort.get_available_providers())
    ort.set_default_logger_severity(_FATAL)  # a provider that fails is an answer, not an error
    try:
        # Loads CUDA from pip's nvidia-* packages, as the runtime does; it prints what it misses.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()
        working = tuple(name for name in compiled if name not in _UNUSED and _works(ort, name))
    finally:
        ort.set_default_logger_severity(_WARNINGS)
    return compiled, working, None


def _works(ort: ModuleType, provider: str) -> bool:
    """Tell whether a session gets a provider."""
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    # ONNX Runtime's exceptions have no common base but Exception, and some are RuntimeErrors.
    named = vars(ort.capi.onnxruntime_pybind11_state).values()
    failures: tuple[type[Exception], ...] = (
        RuntimeError,
        *(x for x in named if isinstance(x, type) and issubclass(x, Exception)),
    )
    try:
        session = ort.InferenceSession(_IDENTITY_MODEL, options, providers=[provider])
    except failures:
        return False
    return provider in session.get_providers()
