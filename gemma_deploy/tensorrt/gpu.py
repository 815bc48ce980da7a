"""Whether this machine's GPU and driver can run a flavour of TensorRT."""

from collections.abc import Sequence
from importlib import metadata
from typing import Final

from gemma_deploy.cuda_driver import Gpu, read_driver
from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.tensorrt.library import Flavour

_OLDEST_CAPABILITY: Final = (7, 5)
_CUDA_MAJORS: Final = (13, 12)


def require_gpu(flavour: Flavour, index: int) -> Gpu:
    """Return a GPU that can run a flavour.

    Args:
        flavour: The library.
        index: Number of the CUDA device.

    Raises:
        BackendUnavailableError: No driver, one too old, no such device, or one too old.
    """
    driver, gpus = read_driver()
    reason = why_no_gpu(flavour, driver, gpus, cuda_major(flavour), index)
    if reason is not None:
        raise BackendUnavailableError(f"the {flavour} backend cannot run here: {reason}")
    return gpus[index]


def why_no_gpu(
    flavour: Flavour,
    driver: str | None,
    gpus: Sequence[Gpu],
    needed_cuda_major: int | None,
    index: int = 0,
) -> str | None:
    """Return why a flavour cannot run on a GPU, with the remedy; None if it can.

    Args:
        flavour: The library.
        driver: Newest CUDA version the driver supports, e.g. `13.0`; None without a driver.
        gpus: The CUDA devices this process sees.
        needed_cuda_major: CUDA the library was built for; None if unknown.
        index: Number of the CUDA device.
    """
    if driver is None:
        return (
            "no NVIDIA driver on this machine; it needs an NVIDIA GPU and its driver: "
            "https://www.nvidia.com/drivers"
        )
    if needed_cuda_major is not None and int(driver.partition(".")[0]) < needed_cuda_major:
        package = flavour.replace("-", "_")
        return (
            f"the driver supports CUDA {driver}, the installed {flavour} was built for CUDA "
            f"{needed_cuda_major}: update the driver (https://www.nvidia.com/drivers), or "
            f"`pip uninstall {package}_cu{needed_cuda_major} && pip install {package}_cu12`"
        )
    if index >= len(gpus):
        found = f"{len(gpus)} CUDA device(s)" if gpus else "no GPU"
        return (
            f"cuda:{index} is not there, the driver shows {found} to this process: check "
            "`nvidia-smi` and CUDA_VISIBLE_DEVICES; a container needs `--gpus all`"
        )
    gpu = gpus[index]
    if gpu.compute_capability < _OLDEST_CAPABILITY:
        major, minor = gpu.compute_capability
        return f"{gpu.name} has compute capability {major}.{minor}; 7.5 or newer is needed"
    return None


def cuda_major(flavour: Flavour) -> int | None:
    """Return the CUDA version the installed library was built for; None if its packages do not say.

    A driver runs what was built for its CUDA's major version or an older one
    (https://docs.nvidia.com/deploy/cuda-compatibility/).
    """
    for major in _CUDA_MAJORS:
        try:
            metadata.version(f"{flavour}-cu{major}")
        except metadata.PackageNotFoundError:
            continue
        return major
    return None
