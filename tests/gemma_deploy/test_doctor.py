import dataclasses

import pytest

from gemma_deploy.capability import Capability
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.doctor import capabilities, is_useful, warnings
from gemma_deploy.install_hint import install_line
from gemma_deploy.machine import Machine

BARE = Machine(
    system="Linux x86_64",
    python="3.12.1",
    cpu="A processor",
    cpu_features=("avx2",),
    cores=4,
    memory_bytes=16 << 30,
    free_disk_bytes=100 << 30,
    packages={
        "torch": "2.9.0",
        "onnx": "1.19.0",
        "onnx-ir": "1.1",
        "onnxscript": "0.5",
        "onnxruntime-gpu": "1.24.0",
    },
    torch_cuda="13.0",
    cuda_driver=None,
    gpus=(),
    compiled_providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    working_providers=("CPUExecutionProvider",),
    onnxruntime_error=None,
    tensorrt_errors={},
    tensorrt_cuda={},
)
GPU = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30)
UNNAMED_GPU = Gpu(name="H100", compute_capability=(9, 0), memory_bytes=80 << 30)
WITH_GPU = dataclasses.replace(BARE, cuda_driver="13.0", gpus=(GPU,))


NOTHING = dataclasses.replace(BARE, packages={}, working_providers=())
RTX_DEVICE = dataclasses.replace(
    WITH_GPU, working_providers=(), packages={"tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5"}
)


class TestIsUseful:
    @pytest.mark.parametrize(
        ("machine", "expected"),
        [
            (BARE, True),
            (NOTHING, False),
            (dataclasses.replace(WITH_GPU, packages={}, working_providers=()), False),
            (RTX_DEVICE, True),
            (dataclasses.replace(RTX_DEVICE, gpus=(UNNAMED_GPU,)), True),
            (dataclasses.replace(RTX_DEVICE, gpus=()), False),
        ],
        ids=["ONNX Runtime", "nothing", "a GPU alone", "engines", "maybe engines", "no GPU"],
    )
    def test_something_must_run(self, machine: Machine, expected: bool) -> None:
        assert is_useful(machine) is expected

    def test_building_engines_is_enough(self) -> None:
        packages = {"tensorrt-rtx": "1.7.1", "onnx": "1.23", "onnx-ir": "1.1"}

        assert is_useful(dataclasses.replace(NOTHING, packages=packages))


class TestCapabilities:
    @pytest.mark.parametrize("name", ["export", "ONNX Runtime on the CPU", "torch on the CPU"])
    def test_a_cpu_is_enough(self, name: str) -> None:
        found = judged(BARE, name)

        assert found.is_available
        assert found.remedy is None

    @pytest.mark.parametrize("name", ["ONNX Runtime on CUDA", "torch on CUDA"])
    def test_no_driver(self, name: str) -> None:
        found = judged(BARE, name)

        assert not found.is_available
        assert found.detail == "no NVIDIA driver on this machine"

    @pytest.mark.parametrize("name", ["ONNX Runtime on CUDA", "torch on CUDA"])
    def test_driver_without_device(self, name: str) -> None:
        found = judged(dataclasses.replace(BARE, cuda_driver="13.0"), name)

        assert not found.is_available
        assert found.remedy is not None
        assert "--gpus all" in found.remedy

    def test_compiled_in_is_not_working(self) -> None:
        found = judged(WITH_GPU, "ONNX Runtime on CUDA")

        assert not found.is_available
        assert found.remedy == 'pip install "onnxruntime-gpu[cuda,cudnn]"'

    def test_the_cpu_package_on_a_gpu_machine(self) -> None:
        machine = dataclasses.replace(WITH_GPU, compiled_providers=("CPUExecutionProvider",))

        assert judged(machine, "ONNX Runtime on CUDA").remedy == (
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )

    def test_cuda_that_works(self) -> None:
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
        machine = dataclasses.replace(WITH_GPU, working_providers=providers)

        assert judged(machine, "ONNX Runtime on CUDA") == Capability(
            name="ONNX Runtime on CUDA",
            is_available=True,
            detail="onnxruntime-gpu 1.24.0 on RTX 4090",
        )
        assert judged(machine, "torch on CUDA").is_available

    def test_torch_without_cuda_on_a_gpu_machine(self) -> None:
        machine = dataclasses.replace(WITH_GPU, torch_cuda=None)

        assert "built without CUDA" in judged(machine, "torch on CUDA").detail
        assert any("torch was built without CUDA" in text for text in warnings(machine))

    def test_install_line_of_the_hub(self) -> None:
        found = judged(WITH_GPU, "hub downloads")

        assert not found.is_available
        assert found.remedy == install_line("hub")

    @pytest.mark.parametrize(
        ("system", "package"),
        [
            ("Linux x86_64", "onnxruntime-gpu"),
            ("Linux aarch64", "onnxruntime-gpu"),
            ("Windows AMD64", "onnxruntime-gpu"),
            ("Windows ARM64", "onnxruntime"),
            ("Darwin arm64", "onnxruntime"),
        ],
    )
    def test_the_package_is_that_of_the_platform(self, system: str, package: str) -> None:
        broken = dataclasses.replace(BARE, system=system, working_providers=())
        mixed = {**BARE.packages, "onnxruntime": "1.24.0"}

        found = judged(broken, "ONNX Runtime on the CPU")
        said = warnings(dataclasses.replace(broken, packages=mixed))[0]

        assert found.remedy == f"pip install --upgrade --force-reinstall {package}"
        assert said.endswith(f"&& pip install {package}`")

    def test_a_platform_without_a_cuda_build(self) -> None:
        machine = dataclasses.replace(WITH_GPU, system="Windows ARM64")

        found = judged(machine, "ONNX Runtime on CUDA")

        assert found.detail == "onnxruntime-gpu is not made for Windows ARM64"
        assert found.remedy is None

    @pytest.mark.parametrize(
        ("name", "remedy"),
        [
            ("export", install_line()),
            ("torch on the CPU", "pip install torch"),
            (
                "ONNX Runtime on the CPU",
                "pip install --upgrade --force-reinstall onnxruntime-gpu",
            ),
        ],
    )
    def test_broken_installation(self, name: str, remedy: str) -> None:
        machine = dataclasses.replace(
            BARE, packages={}, working_providers=(), onnxruntime_error="no module"
        )

        found = judged(machine, name)

        assert not found.is_available
        assert found.remedy == remedy


class TestWarnings:
    def test_none_on_a_sound_machine(self) -> None:
        assert warnings(BARE) == []

    def test_both_onnxruntime_packages(self) -> None:
        machine = dataclasses.replace(BARE, packages={**BARE.packages, "onnxruntime": "1.24.0"})

        assert "both onnxruntime and onnxruntime-gpu are installed" in warnings(machine)[0]
        assert "pip uninstall -y onnxruntime onnxruntime-gpu" in warnings(machine)[0]

    def test_a_processor_without_avx2(self) -> None:
        machine = dataclasses.replace(BARE, cpu_features=("f16c",))

        assert warnings(machine) == [
            "the processor has no AVX2: generation on it will be very slow"
        ]


def judged(machine: Machine, name: str) -> Capability:
    return next(capability for capability in capabilities(machine) if capability.name == name)
