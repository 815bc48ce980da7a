"""Whether a machine can build and run TensorRT engines, and whether those of a folder would load."""

from pathlib import Path
from typing import Final

from gemma_deploy.bundle import Bundle
from gemma_deploy.capability import Capability
from gemma_deploy.engine import ENGINE_FILE, EngineFolder, engines_of
from gemma_deploy.engine_fit import (
    capability_of,
    rebuild_advice,
    why_not_of,
    why_not_on,
    why_not_with,
)
from gemma_deploy.errors import RequestError
from gemma_deploy.install_hint import install_line
from gemma_deploy.machine import Machine
from gemma_deploy.manifest import MANIFEST_FILE
from gemma_deploy.tensorrt import FLAVOURS, Flavour
from gemma_deploy.tensorrt.gpu import why_no_gpu

# The GPUs that TensorRT for RTX 1.5 to 1.7 have a name for; what it does on others is not documented.
_RTX_TARGETS: Final = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")

# What changes the graphs before the library reads them; devices that only run engines do without.
_GRAPH_PACKAGES: Final = ("onnx", "onnx-ir")


def tensorrt_capabilities(machine: Machine) -> list[Capability]:
    """Judge for each flavour whether engines can be built, and whether they run."""
    return [judge(machine, flavour) for flavour in FLAVOURS for judge in (_building, _running)]


def engine_verdicts(folder: Path, machine: Machine) -> list[Capability]:
    """Judge whether the engines of a bundle, or a packed engine, would load on a machine.

    Args:
        folder: The bundle or the engine.
        machine: The machine.

    Raises:
        RequestError: The folder is neither.
        BundleError: The bundle is damaged.
        EngineError: The packed engine is damaged.
    """
    if (folder / ENGINE_FILE).is_file():
        return [_verdict(EngineFolder.open(folder), None, machine)]
    if not (folder / MANIFEST_FILE).is_file():
        raise RequestError(
            f"{folder} has neither {MANIFEST_FILE} nor {ENGINE_FILE}: give a bundle with engines, or "
            "a packed engine"
        )
    bundle = Bundle.open(folder)
    engines, damaged = engines_of(bundle)
    verdicts = [_verdict(engine, bundle, machine) for engine in engines]
    return verdicts + [
        Capability(name=f"engine {name}", is_available=False, detail=str(err))
        for name, err in damaged.items()
    ]


def _building(machine: Machine, flavour: Flavour) -> Capability:
    name = f"building {flavour} engines"
    problem = _library_problem(machine, flavour, name)
    if problem is not None:
        return problem
    if flavour == "tensorrt":  # it builds for the GPU at hand
        reason = _gpu_problem(machine, flavour)
        if reason is not None:
            return Capability(name=name, is_available=False, detail=reason)
    missing = [package for package in _GRAPH_PACKAGES if package not in machine.packages]
    if missing:
        return Capability(
            name=name,
            is_available=False,
            detail=f"{', '.join(missing)} not installed",
            remedy=f"pip install {' '.join(missing)}",
        )
    detail = f"{flavour} {machine.packages[flavour]}"
    if "triton" not in machine.packages:
        return Capability(
            name=name,
            is_available=True,
            detail=f"{detail}, but only with --attention native: triton is not installed",
            remedy=install_line(flavour),
        )
    detail += f", triton {machine.packages['triton']}"
    if not machine.gpus:
        detail += "; needs no GPU"
    return Capability(name=name, is_available=True, detail=detail)


def _running(machine: Machine, flavour: Flavour) -> Capability:
    name = f"running {flavour} engines"
    problem = _library_problem(machine, flavour, name)
    if problem is not None:
        return problem
    problem = _bindings_problem(machine, name)
    if problem is not None:
        return problem
    reason = _gpu_problem(machine, flavour)
    if reason is not None:
        return Capability(name=name, is_available=False, detail=reason)
    gpu, capability = machine.gpus[0], capability_of(machine.gpus[0])
    detail = (
        f"{flavour} {machine.packages[flavour]} on {gpu.name} (compute capability {capability})"
    )
    if flavour == "tensorrt-rtx" and capability not in _RTX_TARGETS:
        return Capability(
            name=name,
            is_available=None,
            detail=f"{detail}, which it has no name for: only an engine built here tells",
        )
    return Capability(name=name, is_available=True, detail=detail)


def _verdict(engine: EngineFolder, bundle: Bundle | None, machine: Machine) -> Capability:
    build = engine.manifest.build
    name = f"engine {engine.folder.name}"
    problem = _library_problem(machine, build.flavour, name)
    if problem is not None:
        return problem
    gpu = machine.gpus[0] if machine.gpus else None
    reasons = (
        None if bundle is None else why_not_of(build, bundle),
        why_not_with(build, machine.packages[build.flavour]),
        None if gpu is None else why_not_on(build, gpu),
    )
    found = [reason for reason in reasons if reason is not None]
    if found:
        remedy = rebuild_advice(engine, gpu)
        return Capability(name=name, is_available=False, detail="; ".join(found), remedy=remedy)
    reason = _gpu_problem(machine, build.flavour)
    if reason is not None:
        detail = (
            f"it fits {build.flavour} {build.library_version} and was built for compute capability "
            f"{', '.join(build.targets)}; nothing more can be told here: {reason}"
        )
        return Capability(name=name, is_available=None, detail=detail)
    problem = _bindings_problem(machine, name)
    if problem is not None:
        return problem
    detail = f"{build.flavour} {build.library_version} on {machine.gpus[0].name}"
    return Capability(name=name, is_available=True, detail=detail)


def _library_problem(machine: Machine, flavour: Flavour, name: str) -> Capability | None:
    """Return what is wrong with a flavour's library, or None."""
    if flavour not in machine.packages:
        detail = f"{flavour} not installed"
    elif flavour in machine.tensorrt_errors:
        detail = machine.tensorrt_errors[flavour]
    else:
        return None
    return Capability(
        name=name,
        is_available=False,
        detail=detail,
        remedy=install_line(flavour),
    )


def _bindings_problem(machine: Machine, name: str) -> Capability | None:
    """Return that what runs engines cannot reach the driver, or None."""
    if "cuda-bindings" in machine.packages:
        return None
    return Capability(
        name=name,
        is_available=False,
        detail="cuda-bindings not installed",
        remedy='pip install "cuda-bindings>=12.8"',
    )


def _gpu_problem(machine: Machine, flavour: Flavour) -> str | None:
    needed = machine.tensorrt_cuda.get(flavour)
    return why_no_gpu(flavour, machine.cuda_driver, machine.gpus, needed)
