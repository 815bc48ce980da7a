"""Whether memory and disk suffice for a build, asked before it starts."""

import shutil
from pathlib import Path
from typing import Final

from gemma_deploy.available_memory import available_memory_bytes
from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.engine_build import EngineBuild
from gemma_deploy.errors import EngineBuildError

# Beyond the plan, of which the library holds one copy: its own graphs and kernels, joined weights of
# attention, Python, and two blocks of 64 MiB in which the plan is handed over. 0.55 GB were measured
# at the shape of Gemma 2B (benchmarks/build_memory.py).
_BUILDER_BYTES: Final = 768 << 20
# Manifest, kernels and the plan's description of its layers.
_SMALL_FILES_BYTES: Final = 64 << 20


def check_resources(folder: Path, build: EngineBuild, weights_bytes: int) -> None:
    """Refuse a build that memory or disk cannot hold.

    Args:
        folder: An existing folder on the disk that the engine goes to.
        build: The engine.
        weights_bytes: Size of the bundle's weights: what a plan is about as large as.

    Raises:
        EngineBuildError: What is there, what is needed, and what to do.
    """
    needed, available = weights_bytes + _BUILDER_BYTES, available_memory_bytes()
    if available is not None and needed > available:
        raise EngineBuildError(
            f"building needs about {format_bytes(needed)} of memory, and {format_bytes(available)} are "
            "available: close other programs, or build on another machine and copy the engine "
            "here. Nothing was written"
        )
    num_plans = 1 if build.layout == "one-engine" else 2
    needed, free = num_plans * weights_bytes + _SMALL_FILES_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        hint = "" if num_plans == 1 else ", or build with --layout one-engine, of half the size"
        raise EngineBuildError(
            f"{folder} has {format_bytes(free)} free, the engine needs {format_bytes(needed)}: free "
            f"space{hint}. Nothing was written"
        )
