"""What the plugin is told: a node's attributes, and what a plan keeps of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from gemma_deploy.errors import EngineBuildError
from gemma_deploy.plugins.attention.launch import Scalars

T = TypeVar("T")

PLUGIN_NAME: Final = "GemmaAttention"
KERNELS_FIELD: Final = "kernels"


@dataclass(frozen=True, slots=True)
class Settings:
    """What one layer is.

    Attributes:
        scalars: The node's attributes.
        capabilities: Targets to compile kernels for; known while an engine is built.
        kernels: The compiled kernels, as `KernelArchive` writes them; empty until compiled.
    """

    scalars: Scalars
    capabilities: tuple[int, ...] = ()
    kernels: bytes = b""


def read_fields(fields: Any) -> Settings:
    """Read a node's attributes, or what a plan holds of them.

    Args:
        fields: A library's PluginFieldCollection.

    Raises:
        EngineBuildError: An attribute is missing or out of range.
    """
    values: dict[str, Any] = {field.name: field.data for field in fields}
    missing = [name for name in ("scale", "softcap", "sliding_window") if name not in values]
    if missing:
        raise EngineBuildError(
            f"a node {PLUGIN_NAME} lacks the attributes {', '.join(missing)}: all three of scale, "
            "softcap and sliding_window are written on the node"
        )
    scalars = Scalars(
        scale=_scalar(values["scale"], float),
        softcap=_scalar(values["softcap"], float),
        sliding_window=_scalar(values["sliding_window"], int),
    )
    if scalars.scale <= 0 or scalars.softcap < 0 or scalars.sliding_window < 0:
        raise EngineBuildError(
            f"a node {PLUGIN_NAME} has scale {scalars.scale:g}, softcap {scalars.softcap:g} and "
            f"sliding_window {scalars.sliding_window}; expected a positive scale, and 0 or more"
        )
    kernels = values.get(KERNELS_FIELD)
    return Settings(scalars, kernels=b"" if kernels is None else np.asarray(kernels).tobytes())


def _scalar(value: Any, kind: Callable[[Any], T]) -> T:
    return kind(np.asarray(value).reshape(-1)[0])
