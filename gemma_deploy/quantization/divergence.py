"""How far quantized weights are from what they were made of: `Divergence`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """What an export measured on a text, weights alone: everything else was computed in float32.

    Attributes:
        mean_kl_nats: Mean of KL(original || quantized) of the next-token distributions, in nats.
        same_top1: Share of positions where both find the same token likeliest, 0 to 1.
        num_tokens: Positions that were compared.

    Raises:
        ValueError: On construction: a figure that cannot be.
    """

    mean_kl_nats: float
    same_top1: float
    num_tokens: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = int if field.name == "num_tokens" else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"{field.name} is {value!r}, expected a number")
        if self.mean_kl_nats < 0:
            raise ValueError(f"mean_kl_nats is {self.mean_kl_nats}, expected 0 or more")
        if not 0 <= self.same_top1 <= 1:
            raise ValueError(f"same_top1 is {self.same_top1}, expected a share from 0 to 1")
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}, expected 1 or more")

    def __str__(self) -> str:
        """Return the figures in words."""
        return (
            f"KL {self.mean_kl_nats:.2g} nats on average, same likeliest token at "
            f"{self.same_top1:.1%} of {self.num_tokens:,} positions (weights only)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Divergence":
        """Return what `to_dict` gave; keys of later versions are passed over.

        Raises:
            KeyError, TypeError, ValueError: It did not.
        """
        return cls(**{field.name: raw[field.name] for field in dataclasses.fields(cls)})
