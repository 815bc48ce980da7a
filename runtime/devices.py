"""Which device to run on: `Device`, parsed from `auto`, `cpu`, `cuda` or `cuda:N`."""

import re
from dataclasses import dataclass
from typing import Literal

from gemma_deploy.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as asked for.

    Attributes:
        kind: `auto` is CUDA where it works, the CPU otherwise.
        index: Number of the CUDA device.
    """

    kind: Literal["auto", "cpu", "cuda"]
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> "Device":
        """Read `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
            RequestError: Anything else.
        """
        match = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", text)
        if match is None or (match[2] is not None and match[1] != "cuda"):
            raise RequestError(f"device is {text!r}; expected auto, cpu, cuda or cuda:N (N from 0)")
        kind: Literal["auto", "cpu", "cuda"] = match[1]  # type: ignore[assignment]  # as the pattern says
        return cls(kind=kind, index=int(match[2] or 0))
