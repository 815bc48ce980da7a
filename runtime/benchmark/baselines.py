"""What baselines need before they are started: their packages, and memory."""

import importlib.util
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from gemma_deploy.available_memory import available_memory_bytes
from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.graph_spec import DTYPE_BYTES, DType, cache_bytes
from gemma_deploy.install_hint import install_line
from gemma_deploy.memory import activation_bytes, num_parameters
from gemma_deploy.runtime.benchmark.gpu_memory import free_gpu_bytes
from gemma_deploy.runtime.benchmark.plan import Baseline, BenchPlan, cached_tokens
from gemma_deploy.runtime.benchmark.results import BenchCase
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.registry import natural_backend
from gemma_deploy.runtime.source import ModelSource

_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "torch-eager": ("torch",),
        "torch-compile": ("torch",),
        "transformers": ("torch", "transformers"),
    }
)
# What runs a bundle, an engine or a checkpoint, by backend.
_DISTRIBUTIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
        "torch": ("torch",),
        "tensorrt": ("tensorrt", "cuda-bindings"),
        "tensorrt-rtx": ("tensorrt-rtx", "cuda-bindings"),
    }
)
# Python with torch and what it allocates for its kernels; the compiler's processes on top. Measured
# at the shape of Gemma 3 270M.
_TORCH_BYTES: Final = 600 << 20
_COMPILER_BYTES: Final = 1 << 30


def packages_of(name: str) -> tuple[str, ...]:
    """Return what a baseline imports."""
    return _PACKAGES[name]


def measured_packages(plan: BenchPlan, source: ModelSource) -> frozenset[str]:
    """Return the distributions whose code a plan measures: the versions of others change no figure.

    Args:
        plan: What is measured.
        source: The plan's model.
    """
    backend = natural_backend(source) if plan.backend == "auto" else plan.backend
    baselines = (name for baseline in plan.against for name in packages_of(baseline))
    return frozenset({"gemma-deploy", *_DISTRIBUTIONS.get(backend, ()), *baselines})


def check_installed(baselines: Iterable[Baseline]) -> None:
    """Refuse baselines whose packages are not here.

    Raises:
        BackendUnavailableError: With the command that installs them.
    """
    for name in baselines:
        for package in _PACKAGES[name]:
            if importlib.util.find_spec(package) is None:
                raise BackendUnavailableError(
                    f"{name} needs the Python package {package}, which is not installed: "
                    f"{install_line('bench')}; or leave that baseline out"
                )


def own_dtype(checkpoint: Checkpoint) -> DType:
    """Return the dtype that a checkpoint's embedding is stored in."""
    return DTYPE_NAMES[checkpoint.tensors[EMBEDDING_WEIGHT].dtype]


def needed_bytes(name: str, config: GemmaConfig, dtype: DType, cases: Iterable[BenchCase]) -> int:
    """Estimate the memory that a baseline takes at its largest case.

    Args:
        name: The baseline.
        config: The model.
        dtype: Of weights, activations and cache.
        cases: What it runs.
    """
    largest = max(
        cache_bytes(config, dtype, case.batch_size, cached_tokens(case))
        + activation_bytes(
            config,
            dtype,
            batch_size=case.batch_size,
            tokens=case.prompt_tokens,
            max_seq_len=cached_tokens(case),
        )
        for case in cases
    )
    compiler = _COMPILER_BYTES if name == "torch-compile" else 0
    return num_parameters(config) * DTYPE_BYTES[dtype] + largest + _TORCH_BYTES + compiler


def lack_of_memory(needed: int, device: Device) -> str | None:
    """Compare what is needed with what is there now.

    Args:
        needed: Bytes.
        device: Where it runs: `cpu`, or a GPU whose own memory counts.

    Returns:
        Why it cannot be run, with both numbers; None if it can, or if nobody tells.
    """
    is_gpu = device.kind == "cuda"
    available = free_gpu_bytes(device.index) if is_gpu else available_memory_bytes()
    if available is None or needed <= available:
        return None
    return (
        f"it needs about {format_bytes(needed)} of {'GPU ' if is_gpu else ''}memory, and "
        f"{format_bytes(available)} are available"
    )
