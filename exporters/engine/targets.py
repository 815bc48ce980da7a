"""Which GPUs an engine is built for: compute capabilities, asked for or found fit."""

import re
from collections.abc import Collection, Sequence
from typing import Any, Final

from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.graph_spec import DType
from gemma_deploy.quantization.formats import Scheme
from gemma_deploy.tensorrt import TensorRTLibrary

DEFAULT_TARGETS: Final = ("8.6", "8.9", "12.0")
"""What RTX engines are portable across by its own default:
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html"""

_FIRST_WITH: Final[dict[DType | Scheme, tuple[int, int]]] = {"bfloat16": (8, 0), "fp8": (8, 9)}
_INSTEAD_OF: Final[dict[DType | Scheme, str]] = {"bfloat16": "--fp16", "fp8": "--int8"}


def choose_targets(
    library: TensorRTLibrary,
    asked: Sequence[str],
    gpus: Sequence[Gpu],
    dtypes: Collection[DType | Scheme],
) -> tuple[str, ...]:
    """Return the compute capabilities to build for, ascending.

    TensorRT builds for the GPU of this machine. TensorRT for RTX builds for any that it knows by
    name, without a GPU too: for those asked for; else for this machine's GPU; else for those of
    `DEFAULT_TARGETS` that have the dtypes.

    Args:
        library: What builds.
        asked: Compute capabilities such as `8.9`; empty for the above.
        gpus: The GPUs of this machine; the library takes the first.
        dtypes: What the engine computes in, and how its weights are quantized.

    Raises:
        BackendUnavailableError: TensorRT without a GPU.
        RequestError: A compute capability that is none, that the library does not know, that it
            cannot be asked for, or that does not have one of `dtypes`.
    """
    here = ".".join(map(str, gpus[0].compute_capability)) if gpus else None
    if not hasattr(library.module, "ComputeCapability"):
        chosen = _only_here(library, asked, here)
    elif asked:
        chosen = tuple(sorted(set(asked), key=_parsed))
    else:
        common = tuple(x for x in DEFAULT_TARGETS if not _missing(x, dtypes))
        chosen = common if here is None else (here,)
    for target in chosen:
        if hasattr(library.module, "ComputeCapability"):
            _check_known(library, target, here)
        _check_dtypes(target, dtypes)
    return chosen


def target_constants(module: Any, targets: Sequence[str]) -> list[Any]:
    """Return the library's own constants for targets that `choose_targets` gave.

    A GPU that the library has no name for is the one of this machine: CURRENT.
    """
    known = module.ComputeCapability.__members__
    return [known.get(_constant_name(target), known["CURRENT"]) for target in targets]


def _only_here(library: TensorRTLibrary, asked: Sequence[str], here: str | None) -> tuple[str, ...]:
    if asked:
        raise RequestError(
            f"{library.flavour} builds for the GPU of the machine it runs on and takes no compute "
            "capability: leave it out, or build with tensorrt-rtx"
        )
    if here is None:
        raise BackendUnavailableError(
            f"{library.flavour} needs a GPU to build, and no CUDA device is on this machine: build "
            "on the machine that is to run the engine, or with --backend tensorrt-rtx, which "
            "needs none"
        )
    return (here,)


def _check_known(library: TensorRTLibrary, target: str, here: str | None) -> None:
    names = library.module.ComputeCapability.__members__
    if _constant_name(target) in names or target == here:
        return
    digits = [match[1] for name in names if (match := re.fullmatch(r"SM(\d+)", name))]
    known = ", ".join(f"{number[:-1]}.{number[-1]}" for number in digits)
    raise RequestError(
        f"{library.flavour} {library.version} cannot build for compute capability {target}; it "
        f"knows {known}. A GPU it has no name for needs the build to run on it"
    )


def _missing(target: str, dtypes: Collection[DType | Scheme]) -> list[DType | Scheme]:
    """Return which of some dtypes GPUs of a compute capability do not have."""
    return [x for x in dtypes if _parsed(target) < _FIRST_WITH.get(x, (0, 0))]


def _check_dtypes(target: str, dtypes: Collection[DType | Scheme]) -> None:
    for dtype in _missing(target, dtypes):
        major, minor = _FIRST_WITH[dtype]
        raise RequestError(
            f"the bundle's engines need {dtype}, which GPUs have from compute capability "
            f"{major}.{minor} on, not {target}: export with {_INSTEAD_OF[dtype]}, or leave {target} "
            "out"
        )


def _constant_name(target: str) -> str:
    return "SM" + target.replace(".", "")


def _parsed(target: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.(\d)", target)
    if match is None:
        raise RequestError(
            f"{target!r} is no compute capability; expected one such as 8.9. NVIDIA lists them at "
            "https://developer.nvidia.com/cuda-gpus"
        )
    return int(match[1]), int(match[2])
