"""Compiling the attention kernels for GPUs that need not be here: `compile_archive`."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemma_deploy.errors import EngineBuildError
from gemma_deploy.plugins.attention.cubins import (
    KERNEL_NAMES,
    CompiledKernel,
    KernelArchive,
    KernelName,
    dotted,
)
from gemma_deploy.plugins.attention.kernels import attend, combine
from gemma_deploy.plugins.attention.schedule import (
    COMBINE_BLOCK_H,
    COMBINE_BLOCK_PARTS,
    COMBINE_NUM_WARPS,
    SHARED_LIMIT_BYTES,
    KernelShape,
    choose_tile,
)

_POINTERS: Final = {"float16": "*fp16", "bfloat16": "*bf16"}
_WARP_THREADS: Final = 32


@functools.cache
def compile_archive(shape: KernelShape, capabilities: tuple[int, ...]) -> KernelArchive:
    """Compile every kernel of a shape for every target; once per process for equal arguments.

    Args:
        shape: What the kernels are compiled for.
        capabilities: Compute capabilities times 10, e.g. (80, 89).

    Raises:
        EngineBuildError: There is no target, or one that the kernels do not support or do not fit.
    """
    if not capabilities:
        raise EngineBuildError(
            "the attention plugin needs to know the GPUs an engine is for: name them with "
            "--compute-capability, e.g. --compute-capability 8.9"
        )
    return KernelArchive(
        shape=shape,
        kernels=tuple(
            compile_kernel(name, shape, capability)
            for capability in sorted(set(capabilities))
            for name in KERNEL_NAMES
        ),
    )


@functools.cache
def compile_kernel(name: KernelName, shape: KernelShape, capability: int) -> CompiledKernel:
    """Compile one kernel for one target. No GPU is needed.

    Args:
        name: Which kernel.
        shape: What it is compiled for.
        capability: Compute capability times 10.

    Raises:
        EngineBuildError: The kernels do not support the target, or do not fit on it.
    """
    if capability not in SHARED_LIMIT_BYTES:
        raise EngineBuildError(
            f"the attention plugin has no kernels for compute capability {dotted(capability)}; it has "
            f"for {', '.join(map(dotted, SHARED_LIMIT_BYTES))}. Leave it out, or build with "
            "--attention native"
        )
    source, block_m, options = _source(name, shape, capability)
    with _without_line_info():
        kernel = triton.compile(
            source,
            target=GPUTarget("cuda", capability, _WARP_THREADS),
            options={**options, "enable_fp_fusion": True},
        )
    _check(kernel.metadata, name, capability)
    return CompiledKernel(
        name=name,
        capability=capability,
        symbol=kernel.metadata.name,
        num_warps=kernel.metadata.num_warps,
        shared_bytes=kernel.metadata.shared,
        block_m=block_m,
        cubin=kernel.asm["cubin"],
    )


def _source(
    name: KernelName, shape: KernelShape, capability: int
) -> tuple[ASTSource, int, dict[str, int]]:
    """Return what to compile, the rows of its tile, and Triton's options."""
    pointer = _POINTERS[shape.dtype]
    common = {"HEAD_DIM": shape.head_dim, "GROUP": shape.group}
    if name == "combine":
        types = ["*fp32", "*fp32", pointer, "i32", "i32", "i32"]
        blocks = {"BLOCK_PARTS": COMBINE_BLOCK_PARTS, "BLOCK_H": COMBINE_BLOCK_H}
        options = {"num_warps": COMBINE_NUM_WARPS}
        return _ast_source(combine, types, common | blocks), 0, options
    tile = choose_tile(name, shape, capability)
    types = [pointer, pointer, pointer, "*i32", pointer, "*fp32", "*fp32", "fp32", "fp32"]
    types += ["i32"] * 4
    constants = common | {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_H": shape.block_h,
        "HAS_SOFTCAP": shape.has_softcap,
        "SKIPS_MASKS": tile.skips_masks,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return _ast_source(attend, types, constants), tile.block_m, options


def _ast_source(function: Any, types: Sequence[str], constants: dict[str, Any]) -> ASTSource:
    names = function.arg_names
    signature = dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
    # The alignment lets loads and stores be 16 bytes wide; launches check it.
    aligned = [index for index, kind in enumerate(types) if kind.startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    return ASTSource(function, signature, constexprs=constants, attrs=attributes)


def _check(metadata: Any, name: str, capability: int) -> None:
    """Refuse what a launch by hand could not serve."""
    if metadata.shared > SHARED_LIMIT_BYTES[capability]:
        raise EngineBuildError(
            f"the attention kernel {name} needs {metadata.shared} bytes of shared memory; compute "
            f"capability {dotted(capability)} has {SHARED_LIMIT_BYTES[capability]}. Use another "
            "version of Triton, or build with --attention native"
        )
    scratch = metadata.global_scratch_size + getattr(metadata, "profile_scratch_size", 0)
    if scratch:
        raise EngineBuildError(
            f"this version of Triton ({triton.__version__}) gives the attention kernel {name} "
            f"{scratch} bytes of global scratch memory, expected none. Use another version, or "
            "build with --attention native"
        )


@contextmanager
def _without_line_info() -> Iterator[None]:
    """Leave source lines out of cubins: they are four fifths of them."""
    knobs = getattr(triton, "knobs", None)
    if knobs is None:  # Triton 3.3: engines are larger, no less right
        yield
        return
    before = knobs.compilation.disable_line_info
    knobs.compilation.disable_line_info = True
    try:
        yield
    finally:
        knobs.compilation.disable_line_info = before
