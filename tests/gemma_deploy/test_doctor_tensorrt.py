import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.capability import Capability
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.doctor_tensorrt import engine_verdicts, tensorrt_capabilities
from gemma_deploy.errors import RequestError
from gemma_deploy.install_hint import install_line
from gemma_deploy.machine import Machine, read_machine

GPU = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30)
OLD_GPU = Gpu(name="GTX 1080", compute_capability=(6, 1), memory_bytes=8 << 30)
UNNAMED_GPU = Gpu(name="H100", compute_capability=(9, 0), memory_bytes=80 << 30)
FLAVOURS = ["tensorrt", "tensorrt-rtx"]
PACKAGES = {
    "tensorrt": "11.4.0.106",
    "tensorrt-rtx": "1.7.1.116",
    "cuda-bindings": "13.5.0",
    "onnx": "1.23.0",
    "onnx-ir": "1.1.0",
    "triton": "3.9.0",
}


@pytest.fixture(scope="module")
def bare() -> Machine:
    """Return this machine with both flavours and without a GPU."""
    return dataclasses.replace(
        read_machine(),
        packages=PACKAGES,
        cuda_driver=None,
        gpus=(),
        tensorrt_errors={},
        tensorrt_cuda={"tensorrt": 13, "tensorrt-rtx": 13},
    )


@pytest.fixture
def with_gpu(bare: Machine) -> Machine:
    return dataclasses.replace(bare, cuda_driver="13.0", gpus=(GPU,))


def judged(machine: Machine, name: str) -> Capability:
    found = {capability.name: capability for capability in tensorrt_capabilities(machine)}
    return found[name]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("doing", ["building", "running"])
def test_a_gpu_is_enough(doing: str, flavour: str, with_gpu: Machine) -> None:
    found = judged(with_gpu, f"{doing} {flavour} engines")
    assert found.is_available is True
    assert found.remedy is None


def test_without_a_gpu_rtx_builds_and_nothing_runs(bare: Machine) -> None:
    building = judged(bare, "building tensorrt-rtx engines")
    assert building.is_available is True
    assert building.detail == "tensorrt-rtx 1.7.1.116, triton 3.9.0; needs no GPU"
    for name in (
        "building tensorrt engines",
        "running tensorrt engines",
        "running tensorrt-rtx engines",
    ):
        found = judged(bare, name)
        assert found.is_available is False
        assert found.detail.startswith("no NVIDIA driver on this machine")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_library_that_is_not_there(flavour: str, with_gpu: Machine) -> None:
    packages = {name: version for name, version in PACKAGES.items() if name != flavour}
    missing = dataclasses.replace(with_gpu, packages=packages)
    broken = dataclasses.replace(with_gpu, tensorrt_errors={flavour: "libfoo.so is missing"})
    for doing in ("building", "running"):
        for machine, detail in (
            (missing, f"{flavour} not installed"),
            (broken, "libfoo.so is missing"),
        ):
            found = judged(machine, f"{doing} {flavour} engines")
            assert found.is_available is False
            assert found.detail == detail
            assert found.remedy == install_line(flavour)


def test_each_helper_is_missed_where_it_is_needed(with_gpu: Machine) -> None:
    packages = {"tensorrt-rtx": "1.7.1.116", "onnx": "1.23.0", "onnx-ir": "1.1.0"}
    machine = dataclasses.replace(with_gpu, packages=packages)
    building = judged(machine, "building tensorrt-rtx engines")
    assert building.is_available is True
    assert "--attention native" in building.detail
    running = judged(machine, "running tensorrt-rtx engines")
    assert running.is_available is False
    assert running.remedy == 'pip install "cuda-bindings>=12.8"'


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("missing", [["onnx"], ["onnx-ir"], ["onnx", "onnx-ir"]])
def test_building_needs_what_changes_graphs(
    missing: list[str], flavour: str, with_gpu: Machine
) -> None:
    packages = {name: version for name, version in PACKAGES.items() if name not in missing}
    machine = dataclasses.replace(with_gpu, packages=packages)
    building = judged(machine, f"building {flavour} engines")
    assert building.is_available is False
    assert building.detail == f"{', '.join(missing)} not installed"
    assert building.remedy == f"pip install {' '.join(missing)}"
    assert judged(machine, f"running {flavour} engines").is_available is True


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"gpus": ()}, "cuda:0 is not there, the driver shows no GPU"),
        ({"gpus": (OLD_GPU,)}, "GTX 1080 has compute capability 6.1; 7.5 or newer is needed"),
        (
            {"cuda_driver": "12.4"},
            "the driver supports CUDA 12.4, .* built for CUDA 13: .* pip install tensorrt_rtx_cu12",
        ),
    ],
)
def test_a_gpu_or_driver_that_does_not_suffice(
    change: dict[str, Any], detail: str, with_gpu: Machine
) -> None:
    found = judged(dataclasses.replace(with_gpu, **change), "running tensorrt-rtx engines")
    assert found.is_available is False
    assert re.search(detail, found.detail)


def test_a_gpu_that_rtx_does_not_name_is_unknown(with_gpu: Machine) -> None:
    machine = dataclasses.replace(with_gpu, gpus=(UNNAMED_GPU,))
    assert judged(machine, "running tensorrt-rtx engines").is_available is None
    assert judged(machine, "running tensorrt engines").is_available is True


def test_the_names_of_gpus_are_the_librarys() -> None:
    from gemma_deploy.doctor_tensorrt import _RTX_TARGETS
    from gemma_deploy.tensorrt import load_library

    names = load_library("tensorrt-rtx").module.ComputeCapability.__members__
    stated = {f"SM{target.replace('.', '')}" for target in _RTX_TARGETS}
    assert stated == {name for name in names if name.startswith("SM")}


def test_a_folder_without_engines(tmp_path: Path, bare: Machine, tiny_bundle: Any) -> None:
    with pytest.raises(RequestError, match=r"has neither manifest\.json nor engine"):
        engine_verdicts(tmp_path, bare)
    assert engine_verdicts(tiny_bundle("gemma1"), bare) == []
