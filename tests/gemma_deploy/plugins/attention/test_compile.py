"""The kernels compiled for GPUs that are not here, read with NVIDIA's own tools."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_deploy.errors import EngineBuildError
from gemma_deploy.plugins.attention.cubins import KERNEL_NAMES, KernelName
from gemma_deploy.plugins.attention.schedule import (
    SHARED_LIMIT_BYTES,
    KernelDType,
    KernelShape,
)

triton = pytest.importorskip("triton")

# Bytes of stack per thread. At head_dim 256 the accumulator of a wide tile takes half of the
# registers; what spills is used between its loops, and in those with masks, not in the one that
# does the bulk of the work.
MAX_SPILL_BYTES = {"narrow": 0, "wide": 256, "combine": 0}
TARGETS = (80, 86, 89, 90, 100, 120)
# Parameters in bytes: tensors, then scalars, then two pointers that Triton adds.
PARAMETER_BYTES = {
    "narrow": [8] * 7 + [4] * 6 + [8] * 2,
    "wide": [8] * 7 + [4] * 6 + [8] * 2,
    "combine": [8] * 3 + [4] * 3 + [8] * 2,
}


def cuobjdump(cubin: bytes, option: str, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def shape(
    dtype: KernelDType = "bfloat16", *, head_dim: int = 256, has_softcap: bool = False
) -> KernelShape:
    return KernelShape(head_dim=head_dim, group=8, dtype=dtype, has_softcap=has_softcap)


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("capability", TARGETS)
def test_fits_its_target(
    name: KernelName,
    capability: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    from gemma_deploy.plugins.attention.compile import compile_kernel

    kernel = compile_kernel(name, shape(), capability)
    usage = cuobjdump(kernel.cubin, "-res-usage", tmp_path)
    registers, stack_bytes = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    for key, value in {
        "registers": registers,
        "stack_bytes": stack_bytes,
        "shared_bytes": kernel.shared_bytes,
        "cubin_bytes": len(kernel.cubin),
    }.items():
        record_property(f"{name}-sm{capability}-{key}", value)
    assert kernel.symbol in usage
    # Source lines would be four fifths of the cubin, in every layer of an engine.
    assert b".debug_line" not in kernel.cubin
    assert stack_bytes <= MAX_SPILL_BYTES[name]
    assert kernel.shared_bytes <= SHARED_LIMIT_BYTES[capability]
    # All registers of a block fit a multiprocessor.
    assert registers * kernel.num_warps * 32 <= 65_536


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_takes_the_parameters_that_a_launch_gives(name: KernelName, tmp_path: Path) -> None:
    from gemma_deploy.plugins.attention.compile import compile_kernel

    elf = cuobjdump(compile_kernel(name, shape(), 89).cubin, "-elf", tmp_path)
    found = re.findall(r"Ordinal\s*:\s*0x([0-9a-f]+).*?Size\s*:\s*0x([0-9a-f]+)", elf, re.DOTALL)
    sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    assert [sizes[ordinal] for ordinal in sorted(sizes)] == PARAMETER_BYTES[name]


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_reads_memory_in_16_bytes(name: KernelName, tmp_path: Path) -> None:
    from gemma_deploy.plugins.attention.compile import compile_kernel

    sass = cuobjdump(compile_kernel(name, shape(), 89).cubin, "-sass", tmp_path)
    loads = re.findall(r"\b(LDGSTS|LDG)(\.E\S*)", sass)
    assert any(suffix.endswith(".128") for _, suffix in loads)
    if name != "combine":
        # Keys and values go to shared memory as they come, past the registers.
        copies = [suffix for kind, suffix in loads if kind == "LDGSTS"]
        assert copies
        assert all(suffix.endswith(".128") for suffix in copies)
        assert "HMMA" in sass


def test_compiles_for_other_shapes() -> None:
    from gemma_deploy.plugins.attention.compile import compile_archive

    archive = compile_archive(shape("float16", head_dim=72, has_softcap=True), (89,))
    assert [kernel.name for kernel in archive.kernels] == list(KERNEL_NAMES)
    assert archive.capabilities == (89,)


def test_refuses_other_targets() -> None:
    from gemma_deploy.plugins.attention.compile import compile_archive

    with pytest.raises(EngineBuildError, match=r"no kernels for compute capability 7\.5; .*8\.0"):
        compile_archive(shape(), (75,))
    with pytest.raises(EngineBuildError, match="name them with --compute-capability"):
        compile_archive(shape(), ())
