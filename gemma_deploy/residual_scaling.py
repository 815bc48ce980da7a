"""What a model is divided by so that float16 holds its activations: `ResidualScaling`.

RMSNorm does not see a factor on its input, so the residual stream can run divided by s, and the inside
of each sub-layer by a number of its own, if the next norm's epsilon is divided by its square. All are
powers of two, so that the division is exact; it is folded into weights, norms and epsilons, and costs
nothing at run time.

With norms after attention and feed-forward (Gemma 2, 3) these norms put s on the sub-layers' outputs,
and take out whatever these were divided by. Without them (Gemma 1) o_proj and down_proj do.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_deploy.config import GemmaConfig
from gemma_deploy.json_values import typed


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScaling:
    """Powers of two that one layer's inside is divided by.

    Attributes:
        value: Values, and with them attention's weighted sum of them.
        attention: The attention's output; with post-norms only, else it is the residual's.
        up: The up projection, and with it the product with the gate.
        feed_forward: The feed-forward's output; with post-norms only, else it is the residual's.
    """

    value: int = 1
    attention: int = 1
    up: int = 1
    feed_forward: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualScaling:
    """Powers of two that a model's activations are divided by.

    Attributes:
        residual: s, of the residual stream.
        layers: Of each layer's inside.
        has_post_norms: Whether norms follow attention and feed-forward (`GemmaConfig`).
        rms_norm_eps: Epsilon of every norm, before scaling.

    Raises:
        ValueError: On construction, where a number is not a power of two.
    """

    residual: int
    layers: tuple[LayerScaling, ...]
    has_post_norms: bool
    rms_norm_eps: float

    def __post_init__(self) -> None:
        for divisor in (self.residual, *(x for y in self.layers for x in dataclasses.astuple(y))):
            if divisor < 1 or divisor & (divisor - 1):
                raise ValueError(f"{divisor} is no power of two from 1 up")

    @classmethod
    def none(cls, config: GemmaConfig) -> "ResidualScaling":
        """Return the scaling that divides by 1."""
        return cls.of(config, 1, (LayerScaling(),) * config.num_hidden_layers)

    @classmethod
    def of(
        cls, config: GemmaConfig, residual: int, layers: tuple[LayerScaling, ...]
    ) -> "ResidualScaling":
        """Return the scaling of a model."""
        return cls(
            residual=residual,
            layers=layers,
            has_post_norms=config.has_post_norms,
            rms_norm_eps=config.rms_norm_eps,
        )

    @property
    def is_none(self) -> bool:
        """Whether nothing is divided."""
        return self.residual == 1 and all(layer == LayerScaling() for layer in self.layers)

    @property
    def embedding_divisor(self) -> float:
        """What the embedding's multiplier sqrt(D) is divided by; the tied table itself never is."""
        return float(self.residual)

    def weight_divisor(self, name: str) -> float:
        """Return what a matrix or a bias is stored divided by, by its canonical name.

        A number below 1 takes back what the projection before it was divided by.
        """
        layer, parts = self._layer(name)
        if layer is None:
            return 1.0
        match parts[-2]:
            case "v_proj":
                return float(layer.value)
            case "o_proj":
                # The bias is added to a sum that was divided by all of it.
                taken = 1 if parts[-1] == "bias" else layer.value
                return self._attention_divisor(layer) / taken
            case "up_proj":
                return float(layer.up)
            case "down_proj":
                return self._feed_forward_divisor(layer) / layer.up
            case _:
                return 1.0

    def cache_divisor(self, name: str) -> float:
        """Return what a cache's scale is stored divided by, by its name (`cache_scale_names`)."""
        layer, parts = self._layer(name)
        is_value = layer is not None and parts[-1].startswith("value")
        return float(layer.value) if layer is not None and is_value else 1.0

    def norm_divisor(self, name: str) -> float:
        """Return what a norm's 1 + w is divided by, by the canonical name of its weight."""
        return float(self.residual) if self._is_post_norm(name) else 1.0

    def norm_eps(self, name: str) -> float:
        """Return the epsilon of a norm, by the canonical name of its weight."""
        layer, parts = self._layer(name)
        match parts[-2]:
            case "q_norm" | "k_norm":
                divisor = 1.0
            case "post_attention_layernorm" if layer is not None and self.has_post_norms:
                divisor = self._attention_divisor(layer)
            case "post_feedforward_layernorm" if layer is not None:
                divisor = self._feed_forward_divisor(layer)
            case _:
                divisor = float(self.residual)
        return self.rms_norm_eps / divisor**2

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ResidualScaling":
        """Return what `to_dict` gave.

        Raises:
            ValueError: It did not.
        """
        scaling: ResidualScaling = typed(cls, raw, "scaling")
        return scaling

    def _attention_divisor(self, layer: LayerScaling) -> float:
        return float(layer.attention if self.has_post_norms else self.residual)

    def _feed_forward_divisor(self, layer: LayerScaling) -> float:
        return float(layer.feed_forward if self.has_post_norms else self.residual)

    def _is_post_norm(self, name: str) -> bool:
        return self.has_post_norms and name.split(".")[-2] in (
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        )

    def _layer(self, name: str) -> tuple[LayerScaling | None, list[str]]:
        """Return the layer that a tensor belongs to, and the parts of its name."""
        parts = name.split(".")
        return (self.layers[int(parts[2])] if parts[1] == "layers" else None), parts
