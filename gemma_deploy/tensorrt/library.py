"""Importing TensorRT or TensorRT for RTX, ready to parse, build and load: `load_library`."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.install_hint import install_line
from gemma_deploy.tensorrt.library_name import give_unversioned_name
from gemma_deploy.tensorrt.log import TensorRTLog

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTLibrary:
    """An imported library.

    Both flavours have the same Python API; where they or their versions differ, callers ask the
    module for the feature (`hasattr`), not for its version.

    Attributes:
        flavour: Which of the two.
        module: The Python module, `tensorrt` or `tensorrt_rtx`.
        version: Its version, e.g. `1.7.1.116`. An engine loads only in the version that built it.
        log: What the library says. The first logger a process gives to TensorRT serves all of it,
            so there is one.
    """

    flavour: Flavour
    module: Any
    version: str
    log: TensorRTLog


@functools.cache
def load_library(flavour: Flavour) -> TensorRTLibrary:
    """Import a flavour's library.

    Raises:
        BackendUnavailableError: It is not installed, or cannot be loaded; with the install line.
    """
    name = _MODULES[flavour]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as err:  # OSError: the package opens its libraries itself
        raise BackendUnavailableError(
            f"the {flavour} backend needs the Python package {name}, which cannot be imported: "
            f"{err}. {install_line(flavour)}"
        ) from err
    if not hasattr(module, "Builder"):
        # What `pip uninstall` leaves of a package whose parts are packages of their own.
        raise BackendUnavailableError(
            f"the Python package {name} is installed incompletely: "
            f"{install_line(flavour, '--force-reinstall')}"
        )
    if flavour == "tensorrt-rtx":
        give_unversioned_name("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")
    return TensorRTLibrary(
        flavour=flavour, module=module, version=module.__version__, log=TensorRTLog(module)
    )
