"""What a machine can run, judged from its facts, with the remedy for what it cannot."""

from collections.abc import Callable
from typing import Final

from gemma_deploy.capability import Capability
from gemma_deploy.doctor_tensorrt import tensorrt_capabilities
from gemma_deploy.install_hint import install_line
from gemma_deploy.machine import Machine

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
CPU_PROVIDER: Final = "CPUExecutionProvider"

_ORT_PACKAGES: Final = ("onnxruntime", "onnxruntime-gpu")
# Where onnxruntime-gpu has wheels; pyproject.toml requires it there and onnxruntime elsewhere.
_ORT_GPU_SYSTEMS: Final = ("Linux x86_64", "Linux aarch64", "Windows AMD64")
_NO_DRIVER: Final = "no NVIDIA driver on this machine"
_DRIVER_REMEDY: Final = "needs an NVIDIA GPU and its driver: https://www.nvidia.com/drivers"


def capabilities(machine: Machine) -> list[Capability]:
    """Judge everything that gemma-deploy or its extras can do on a machine."""
    judges: tuple[Callable[[Machine], Capability], ...] = (
        _export,
        _onnxruntime_cpu,
        _onnxruntime_cuda,
        _torch_cpu,
        _torch_cuda,
        _hub,
    )
    return [judge(machine) for judge in judges] + tensorrt_capabilities(machine)


def is_useful(machine: Machine) -> bool:
    """Return whether models run on a machine, or engines can be built there; what is unknown counts."""
    found = [_onnxruntime_cpu(machine), *tensorrt_capabilities(machine)]
    return any(capability.is_available is not False for capability in found)


def warnings(machine: Machine) -> list[str]:
    """Return what works by luck, or will not work as it seems to."""
    found = []
    if all(name in machine.packages for name in _ORT_PACKAGES):
        found.append(
            "both onnxruntime and onnxruntime-gpu are installed; they overwrite each other's files "
            "and which one runs is chance. Keep one: `pip uninstall -y onnxruntime onnxruntime-gpu "
            f"&& pip install {_ort_package(machine)}`"
        )
    if machine.gpus and machine.torch_cuda is None and "torch" in machine.packages:
        found.append(
            "there is a GPU, but torch was built without CUDA: `--backend torch` runs on the CPU. "
            "https://pytorch.org/get-started/locally has the install line of a CUDA build"
        )
    if machine.cpu_features and not {"avx2", "asimd"} & set(machine.cpu_features):
        found.append("the processor has no AVX2: generation on it will be very slow")
    return found


def _export(machine: Machine) -> Capability:
    needed = ("torch", "onnx", "onnx-ir", "onnxscript")
    missing = [name for name in needed if name not in machine.packages]
    if missing:
        return Capability(
            name="export",
            is_available=False,
            detail=f"{', '.join(missing)} not installed",
            remedy=install_line(),
        )
    detail = f"torch {machine.packages['torch']}, onnx {machine.packages['onnx']}"
    return Capability(name="export", is_available=True, detail=detail)


def _onnxruntime_cpu(machine: Machine) -> Capability:
    name = "ONNX Runtime on the CPU"
    if CPU_PROVIDER in machine.working_providers:
        return Capability(name=name, is_available=True, detail=_ort_version(machine))
    return Capability(
        name=name,
        is_available=False,
        detail=machine.onnxruntime_error or "its CPU provider does not load",
        remedy=f"pip install --upgrade --force-reinstall {_ort_package(machine)}",
    )


def _onnxruntime_cuda(machine: Machine) -> Capability:
    name = "ONNX Runtime on CUDA"
    if CUDA_PROVIDER in machine.working_providers:
        detail = f"{_ort_version(machine)} on {machine.gpus[0].name if machine.gpus else 'CUDA'}"
        return Capability(name=name, is_available=True, detail=detail)
    if not machine.gpus:
        return _without_gpu(name, machine)
    if machine.system not in _ORT_GPU_SYSTEMS:
        return Capability(
            name=name,
            is_available=False,
            detail=f"onnxruntime-gpu is not made for {machine.system}",
        )
    if CUDA_PROVIDER not in machine.compiled_providers:
        return Capability(
            name=name,
            is_available=False,
            detail="the installed onnxruntime was built without CUDA",
            remedy="pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
        )
    return Capability(
        name=name,
        is_available=False,
        detail=f"the CUDA or cuDNN libraries that {_ort_version(machine)} needs do not load",
        remedy='pip install "onnxruntime-gpu[cuda,cudnn]"',
    )


def _torch_cpu(machine: Machine) -> Capability:
    version = machine.packages.get("torch")
    return Capability(
        name="torch on the CPU",
        is_available=version is not None,
        detail=f"torch {version}" if version else "torch not installed",
        remedy=None if version else "pip install torch",
    )


def _torch_cuda(machine: Machine) -> Capability:
    name = "torch on CUDA"
    if not machine.gpus:
        return _without_gpu(name, machine)
    if machine.torch_cuda is None:
        return Capability(
            name=name,
            is_available=False,
            detail="the installed torch was built without CUDA",
            remedy="see https://pytorch.org/get-started/locally",
        )
    return Capability(name=name, is_available=True, detail=f"built for CUDA {machine.torch_cuda}")


def _hub(machine: Machine) -> Capability:
    version = machine.packages.get("huggingface_hub")
    return Capability(
        name="hub downloads",
        is_available=version is not None,
        detail=f"huggingface_hub {version}" if version else "huggingface_hub not installed",
        remedy=None if version else install_line("hub"),
    )


def _without_gpu(name: str, machine: Machine) -> Capability:
    if machine.cuda_driver is None:
        return Capability(name=name, is_available=False, detail=_NO_DRIVER, remedy=_DRIVER_REMEDY)
    return Capability(
        name=name,
        is_available=False,
        detail=f"the driver (CUDA {machine.cuda_driver}) shows no GPU to this process",
        remedy="check `nvidia-smi` and CUDA_VISIBLE_DEVICES; a container needs `--gpus all`",
    )


def _ort_package(machine: Machine) -> str:
    return "onnxruntime-gpu" if machine.system in _ORT_GPU_SYSTEMS else "onnxruntime"


def _ort_version(machine: Machine) -> str:
    installed = [
        f"{name} {machine.packages[name]}" for name in _ORT_PACKAGES if name in machine.packages
    ]
    return ", ".join(installed)
