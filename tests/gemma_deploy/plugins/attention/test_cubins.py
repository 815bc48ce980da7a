import pytest

from gemma_deploy.errors import EngineError
from gemma_deploy.plugins.attention.cubins import (
    KERNEL_NAMES,
    CompiledKernel,
    KernelArchive,
    read_archive,
)
from gemma_deploy.plugins.attention.schedule import KernelShape

SHAPE = KernelShape(head_dim=64, group=2, dtype="bfloat16", has_softcap=True)


def archive(*capabilities: int, shared_bytes: int = 100_000) -> KernelArchive:
    return KernelArchive(
        shape=SHAPE,
        kernels=tuple(
            CompiledKernel(
                name=name,
                capability=capability,
                symbol="attend",
                num_warps=4,
                shared_bytes=shared_bytes,
                block_m=16,
                cubin=f"{name} for {capability}".encode() * 50,
            )
            for capability in capabilities
            for name in KERNEL_NAMES
        ),
    )


def test_comes_back_as_it_was() -> None:
    before = archive(89, 80)
    data = before.to_bytes()
    assert KernelArchive.from_bytes(data) == before
    assert read_archive(data) is read_archive(bytes(bytearray(data)))
    assert before.capabilities == (80, 89)


@pytest.mark.parametrize(
    ("device", "expected"), [(80, 80), (86, 86), (87, 87), (89, 89), (90, 90), (120, 120)]
)
def test_a_device_gets_the_best_kernels_that_run_on_it(device: int, expected: int) -> None:
    chosen = archive(80, 86, 87, 89, 90, 120).for_device(device)
    assert set(chosen) == set(KERNEL_NAMES)
    assert {kernel.capability for kernel in chosen.values()} == {expected}


@pytest.mark.parametrize(
    ("targets", "device"),
    # Newer minor version, another major version, Tegra, and architecture-specific code.
    [
        *[((89,), 80), ((80, 90), 75), ((80,), 90)],
        *[((80, 86), 87), ((87,), 89), ((86,), 88)],
        *[((100,), 103), ((120,), 121)],
    ],
)
def test_other_devices_are_told_how_to_build(targets: tuple[int, ...], device: int) -> None:
    dotted = f"{device // 10}.{device % 10}"
    first = f"{targets[0] // 10}.{targets[0] % 10}"
    message = (
        rf"for compute capability {first}.*this GPU is {dotted}.*gemma-deploy build .*"
        rf"--compute-capability {dotted}"
    )
    with pytest.raises(EngineError, match=message):
        archive(*targets).for_device(device)


def test_kernels_that_take_more_shared_memory_than_a_device_has_do_not_run_on_it() -> None:
    large = archive(80, shared_bytes=150_000)
    assert large.for_device(80)
    with pytest.raises(EngineError, match=r"for compute capability 8\.0; this GPU is 8\.6"):
        large.for_device(86)


@pytest.mark.parametrize(
    "data", [b"", b"GDAK", b"ELF and more, and still more than a header has" * 3]
)
def test_refuses_what_is_no_archive(data: bytes) -> None:
    with pytest.raises(EngineError, match="not in a format of gemma-deploy"):
        KernelArchive.from_bytes(data)


def test_refuses_another_format_version() -> None:
    data = bytearray(archive(80).to_bytes())
    data[4] = 9
    with pytest.raises(EngineError, match="are in format 9; this gemma-deploy reads format 1"):
        KernelArchive.from_bytes(bytes(data))


@pytest.mark.parametrize("position", [8, 40, -1])
def test_refuses_damage(position: int) -> None:
    data = bytearray(archive(80).to_bytes())
    data[position] ^= 1
    with pytest.raises(EngineError, match="checksum is wrong"):
        KernelArchive.from_bytes(bytes(data))
    with pytest.raises(EngineError, match="checksum is wrong"):
        KernelArchive.from_bytes(bytes(data[:-1]))
