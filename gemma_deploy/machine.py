"""The facts about this machine that decide what it can run: `Machine`, read by `read_machine`.

Packages are looked up by their metadata, not imported (onnxruntime excepted: only a session tells
which execution providers work), and the GPU is asked through the driver library itself.
"""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from gemma_deploy.cuda_driver import Gpu, read_driver

PACKAGES: Final = (
    "gemma-deploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "tokenizers",
    "transformers",
    "huggingface_hub",
    "tensorrt",
    "tensorrt-rtx",
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
        onnxruntime_error: Why onnxruntime cannot be imported, or None.
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


def read_machine() -> Machine:
    """Look at this machine; takes about a second and changes nothing."""
    cpu, features = _read_cpu()
    driver, gpus = read_driver()
    compiled, working, error = _read_providers()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu=cpu,
        cpu_features=features,
        cores=_cores(),
        memory_bytes=_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
        packages=_versions(),
        torch_cuda=_torch_cuda(),
        cuda_driver=driver,
        gpus=gpus,
        compiled_providers=compiled,
        working_providers=working,
        onnxruntime_error=error,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _torch_cuda() -> str | None:
    """Read the CUDA version out of torch's own version file: importing torch takes a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


def _read_cpu() -> tuple[str, tuple[str, ...]]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    features = tuple(feature for feature in _CPU_FEATURES if feature in present)
    return name[1] if name else platform.processor() or platform.machine(), features


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """Return the machine's memory, or what its container may use if that is less."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text(encoding="utf-8").strip() if limit_file.is_file() else ""
    return min(physical, int(limit)) if limit.isdigit() else physical


def _read_providers() -> tuple[tuple[str, ...], tuple[str, ...], str | None]:
    """Return the providers compiled in, those that work, and why there are none.

    `get_available_providers` only says what was compiled in; the truth is what a session gets.
    """
    try:
        import onnxruntime as ort
    except ImportError as err:
        return (), (), str(err)
    compiled = tuple(ort.get_available_providers())
    # TensorRT's provider is not used here, and its probe prints to stdout when it fails.
    candidates = [name for name in compiled if name != "TensorrtExecutionProvider"]
    options = ort.SessionOptions()
    options.log_severity_level = 4  # a provider that fails is an answer, not an error
    previous_severity = 2
    ort.set_default_logger_severity(4)
    try:
        model = _identity_model()
        working = [
            name
            for name in candidates
            if name in ort.InferenceSession(model, options, providers=[name]).get_providers()
        ]
    finally:
        ort.set_default_logger_severity(previous_severity)
    return compiled, tuple(working), None


def _identity_model() -> bytes:
    """Return the smallest model there is: y = Identity(x)."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    opset = helper.make_opsetid("", 18)
    return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString())
