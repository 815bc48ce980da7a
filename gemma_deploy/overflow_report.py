"""What float16 would overflow in a model, and what keeps it from that: `OverflowReport`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from gemma_deploy.json_values import typed
from gemma_deploy.residual_scaling import ResidualScaling

OVERFLOW_FILE: Final = "overflow.json"
"""Name of the report in a bundle."""

FLOAT16_MAX: Final = 65504.0

Source = Literal["measured", "bounded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The largest magnitude of one kind of tensor, before scaling.

    Attributes:
        layer: Index of the decoder layer; None for what lies outside of them.
        tensor: `normalized` (what norms hand to matrices), `query`, `key`, `value`, `attention`
            (o_proj's output), `gate` and `up` (their projections' outputs), `product` (of both),
            `feed_forward` (down_proj's output), `residual` (the stream, and what is added to it);
            outside of layers `embedding`, `final_norm`, `logits` (before any cap).
        peak: The magnitude.
        divisor: What the exported model divides this tensor by.
    """

    layer: int | None
    tensor: str
    peak: float
    divisor: float

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.tensor if self.layer is None else f"layer {self.layer} {self.tensor}"

    @property
    def overflows(self) -> bool:
        """Whether float16 could not hold it unscaled."""
        return not self.peak <= FLOAT16_MAX

    @property
    def headroom(self) -> float:
        """How many times the scaled peak fits float16; infinite where the peak is 0."""
        return FLOAT16_MAX * self.divisor / self.peak if self.peak else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLoss:
    """What float16 loses of one tensor's weights, after division.

    Attributes:
        name: The checkpoint's name.
        divisor: What it is stored divided by.
        num_weights: Its number of elements.
        num_too_large: Elements that become infinite.
        num_subnormal: Elements that keep fewer than 11 significant bits.
        num_zeroed: Elements that are not zero and become it.
    """

    name: str
    divisor: float
    num_weights: int
    num_too_large: int
    num_subnormal: int
    num_zeroed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OverflowReport:
    """Peaks of a model's activations, and the scaling chosen for them.

    Attributes:
        source: `measured` on a text, or `bounded` from the weights.
        num_tokens: Length of the text; 0 where bounded.
        wanted_headroom: The factor that scaled peaks were to stay below float16's largest number.
        scaling: The smallest powers of two that do it.
        peaks: Layer by layer, then those outside of layers.
        weight_losses: Tensors whose weights lose something; the others have no entry.
    """

    source: Source
    num_tokens: int
    wanted_headroom: float
    scaling: ResidualScaling
    peaks: tuple[Peak, ...]
    weight_losses: tuple[WeightLoss, ...] = ()

    @property
    def overflowing(self) -> tuple[Peak, ...]:
        """What float16 could not have held unscaled."""
        return tuple(peak for peak in self.peaks if peak.overflows)

    @property
    def out_of_reach(self) -> tuple[Peak, ...]:
        """What float16 cannot hold even so: tensors that no factor can be folded around."""
        return tuple(peak for peak in self.peaks if not peak.headroom >= 1)

    def of_layer(self, layer: int | None) -> Iterator[Peak]:
        """Yield the peaks of a layer, or those outside of layers."""
        return (peak for peak in self.peaks if peak.layer == layer)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it; derived numbers are in it for readers."""
        return {
            "source": self.source,
            "num_tokens": self.num_tokens,
            "wanted_headroom": self.wanted_headroom,
            "scaling": self.scaling.to_dict(),
            "peaks": [
                {"layer": x.layer, "tensor": x.tensor, "peak": x.peak, "divisor": x.divisor}
                | {"overflows_unscaled": x.overflows}
                for x in self.peaks
            ],
            "weight_losses": [
                {name: getattr(x, name) for name in WeightLoss.__slots__}
                for x in self.weight_losses
            ],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "OverflowReport":
        """Return what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: It did not.
        """
        peaks = [{k: x[k] for k in x if k in Peak.__slots__} for x in raw["peaks"]]
        report: OverflowReport = typed(cls, {**raw, "peaks": peaks}, "the report")
        return report
