"""Which device to run on: `Device`, parsed from `auto`, `cpu`, `cuda` or `cuda:N`, or a number."""

import re
from dataclasses import dataclass
from typing import Literal

from gemma_deploy.errors import RequestError
from gemma_deploy.quoting import shortened


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
    def parse(cls, given: object) -> "Device":
        """Read `auto`, `cpu`, `cuda` or `cuda:N`.

        Args:
            given: The text; or a number as transformers has it, N for `cuda:N` and -1 for the CPU; or
                a `torch.device`.

        Raises:
            RequestError: Anything else.
        """
        text = given
        if isinstance(given, int) and not isinstance(given, bool):
            text = "cpu" if given == -1 else f"cuda:{given}"
        elif type(given).__module__ == "torch":  # not imported here
            text = str(given)
        match = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", text) if isinstance(text, str) else None
        if match is None or (match[2] is not None and match[1] != "cuda"):
            raise RequestError(
                f"device is {shortened(given)}; expected auto, cpu, cuda or cuda:N (N from 0), or a number: N, "
                "or -1 for the CPU"
            )
        kind: Literal["auto", "cpu", "cuda"] = match[1]  # type: ignore[assignment]  # as the pattern says
        return cls(kind=kind, index=int(match[2] or 0))

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind == "cuda" else self.kind
