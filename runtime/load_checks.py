"""What a model can be loaded with: threads, and the dtype that a bundle or an engine has already."""

import os
from typing import Final

from gemma_deploy.errors import RequestError
from gemma_deploy.graph_spec import DTYPE_BYTES, DType
from gemma_deploy.runtime.request import whole_number
from gemma_deploy.runtime.source import ModelSource

# More only get into each other's way: a thousand on two cores never come to an end.
_MOST_THREADS_PER_CORE: Final = 4


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads below 1 or far beyond the cores that this process may use.

    Raises:
        RequestError: Stating the cores found.
    """
    if threads is None:
        return
    threads = whole_number("threads", threads, 1)
    cores = available_cores()
    if threads > _MOST_THREADS_PER_CORE * cores:
        raise RequestError(
            f"threads is {threads:,}; this process may use {cores} core(s), where more than "
            f"{_MOST_THREADS_PER_CORE * cores} threads would hardly advance: use {cores}, or leave it out"
        )


def dtype_name(dtype: object) -> DType | None:
    """Return the name of a dtype; None for None and `auto`, a model's own.

    Args:
        dtype: `float32`, `float16` or `bfloat16`, perhaps with `torch.` before it, or torch's object of
            that name.

    Raises:
        RequestError: Anything else.
    """
    is_torch = type(dtype).__module__ == "torch"  # not imported here
    name = str(dtype).removeprefix("torch.") if is_torch or isinstance(dtype, str) else None
    if dtype is None or name == "auto":
        return None
    if name not in DTYPE_BYTES:
        raise RequestError(f"dtype is {dtype!r}; expected {', '.join(DTYPE_BYTES)}, or auto")
    return name


def check_dtype(source: ModelSource, dtype: DType | None) -> None:
    """Refuse a dtype that a bundle or an engine neither stores its weights nor computes in.

    Raises:
        RequestError: Saying what the folder has, and how to make one that has the dtype.
    """
    if source.bundle is not None:
        precision = source.bundle.manifest.precision
        stored, computed = precision.weights, precision.activations
    elif source.engine is not None:
        stored = computed = source.engine.manifest.cache_dtype
    else:
        return
    if dtype not in (None, stored, computed):
        raise RequestError(
            f"dtype is {dtype}, but {source.folder} stores its weights in {stored} and computes in "
            f"{computed}: leave dtype out, or export the checkpoint again with dtype {dtype}"
        )
