"""What a Gemma text model is, as numbers: `GemmaConfig`, read from `config.json`.

Gemma 1, 2 and 3 are one set of fields with different values; the model reads the fields and never
asks for the generation. Field names and defaults follow transformers'
`GemmaConfig`, `Gemma2Config` and `Gemma3TextConfig` (transformers 5.x).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from gemma_deploy.errors import ConfigError
from gemma_deploy.json_files import read_json
from gemma_deploy.limits import MAX_CONFIG_BYTES, MAX_LISTED_IDS, MAX_SIZES, MAX_TOKEN_ID
from gemma_deploy.quoting import shortened

ModelType = Literal["gemma", "gemma2", "gemma3_text"]
LayerType = Literal["full_attention", "sliding_attention"]
RopeType = Literal["default", "linear"]

CONFIG_FILE = "config.json"
TANH_GELU = "gelu_pytorch_tanh"

FULL_ATTENTION: LayerType = "full_attention"
SLIDING_ATTENTION: LayerType = "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """Rotary position embedding of one layer type.

    Attributes:
        rope_type: `default`, or `linear` (positions divided by `factor`).
        rope_theta: Base of the geometric series of wavelengths.
        factor: Position divisor of `linear`; 1.0 otherwise.
    """

    rope_type: RopeType = "default"
    rope_theta: float = 10_000.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in get_args(RopeType):
            raise ConfigError(
                f"rope_type is {shortened(self.rope_type)}; gemma-deploy knows {', '.join(get_args(RopeType))} "
                "(what Gemma 1, 2 and 3 use)"
            )
        if not self.rope_theta > 0 or not self.factor > 0:
            raise ConfigError(
                f"rope_theta ({self.rope_theta}) and factor ({self.factor}) must be positive"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig:
    """A Gemma text model's parameters; the defaults are transformers' `GemmaConfig` (Gemma 1 7B).

    Attributes:
        model_type: Generation: `gemma`, `gemma2` or `gemma3_text`.
        vocab_size: V, rows of the embedding.
        hidden_size: D.
        intermediate_size: F, width of the gated feed-forward.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: N, query heads.
        num_key_value_heads: K, key and value heads; divides N.
        head_dim: H; N*H need not equal D.
        hidden_activation: Only `gelu_pytorch_tanh`; the legacy `gelu` of Gemma 1 means the same.
        max_position_embeddings: Longest sequence the model was trained for, in tokens.
        initializer_range: Standard deviation of freshly initialized matrices.
        rms_norm_eps: Epsilon of every RMSNorm.
        use_cache: Whether `forward` returns a KV cache unless told otherwise.
        pad_token_id: Token that pads batches.
        bos_token_id: Token that begins a text.
        eos_token_ids: Tokens that end a text (`eos_token_id`, an int or a list in config.json).
        tie_word_embeddings: Whether the head reads the embedding table.
        rope_parameters: Rotary parameters for each layer type in use.
        attention_bias: Whether q, k, v and o projections have a bias.
        attention_dropout: Dropout probability on attention weights while training.
        use_bidirectional_attention: Whether tokens also attend to later ones (no generation then).
        query_pre_attn_scalar: Attention scores are scaled by this to the power of -1/2; None on
            construction means head_dim.
        sliding_window: Keys a token of a sliding layer attends to, itself included.
        layer_types: `full_attention` or `sliding_attention`, one per layer.
        attn_logit_softcapping: c in `c * tanh(score / c)` before the mask; None for no cap.
        final_logit_softcapping: The same on the output logits.
        has_qk_norm: Whether q and k are normalized per head before rotary (Gemma 3).
        has_post_norms: Whether attention and feed-forward outputs are normalized (Gemma 2, 3).
        dtype: The dtype the checkpoint says it was saved in, e.g. `bfloat16`.

    Raises:
        ConfigError: On construction, when numbers contradict each other.
    """

    model_type: ModelType = "gemma"
    vocab_size: int = 256_000
    hidden_size: int = 3072
    intermediate_size: int = 24_576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    hidden_activation: str = TANH_GELU
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (1,)
    tie_word_embeddings: bool = True
    rope_parameters: Mapping[LayerType, RopeParameters] = dataclasses.field(
        default_factory=lambda: MappingProxyType({FULL_ATTENTION: RopeParameters()})
    )
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_bidirectional_attention: bool = False
    query_pre_attn_scalar: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] = ()
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    has_qk_norm: bool = False
    has_post_norms: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_bounds(self)
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (FULL_ATTENTION,) * self.num_hidden_layers)
        if self.query_pre_attn_scalar is None:
            object.__setattr__(self, "query_pre_attn_scalar", self.head_dim)
        object.__setattr__(self, "rope_parameters", MappingProxyType(dict(self.rope_parameters)))
        _check_sizes(self)
        _check_layers(self)

    @property
    def attention_scale(self) -> float:
        """Factor on attention scores: query_pre_attn_scalar ** -0.5."""
        return float((self.query_pre_attn_scalar or self.head_dim) ** -0.5)

    def window_of(self, layer: int) -> int | None:
        """Return the sliding window of a layer in tokens, the token itself included, or None."""
        return self.sliding_window if self.layer_types[layer] == SLIDING_ATTENTION else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "GemmaConfig":
        """Build a config from the parsed contents of a `config.json`.

        Args:
            raw: A Gemma 1, Gemma 2 or Gemma 3 config; of a multimodal `gemma3` one the text model
                is taken.

        Raises:
            ConfigError: For another model type, a quantized checkpoint, values of the wrong type,
                or numbers that contradict each other.
        """
        from gemma_deploy.config_json import parse_config

        return parse_config(raw)

    @classmethod
    def from_file(cls, path: Path | str) -> "GemmaConfig":
        """Read `config.json`, given itself or the folder that holds it.

        Raises:
            ConfigError: If the file is missing, not JSON, or not a Gemma config.
        """
        return cls.from_dict(read_config(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the config as `config.json` would hold it; `from_dict` reads it back unchanged."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["eos_token_id"] = list(out.pop("eos_token_ids"))
        out["layer_types"] = list(self.layer_types)
        out["rope_parameters"] = {k: dataclasses.asdict(v) for k, v in self.rope_parameters.items()}
        del out["has_qk_norm"], out["has_post_norms"]
        return out


def read_config(path: Path | str) -> dict[str, Any]:
    """Return the JSON object in a `config.json`, given itself or the folder that holds it.

    Raises:
        ConfigError: If the file is missing, or holds anything else.
    """
    path = Path(path)
    path = path / CONFIG_FILE if path.is_dir() else path
    if not path.exists():
        raise ConfigError(
            f"{path} not found: expected a folder in Hugging Face layout, with {CONFIG_FILE} "
            "beside the *.safetensors files"
        )
    return read_json(
        path, max_bytes=MAX_CONFIG_BYTES, error=ConfigError, remedy="download it again"
    )


def _check_bounds(config: GemmaConfig) -> None:
    """Refuse sizes that no model has before anything is made of them."""
    for name, most in MAX_SIZES.items():
        value = getattr(config, name)
        if isinstance(value, int) and value > most:
            raise ConfigError(
                f"{name} is {shortened(value)}, expected at most {most:,}, which is far beyond any "
                "Gemma's: correct config.json"
            )
    if len(config.eos_token_ids) > MAX_LISTED_IDS:
        raise ConfigError(
            f"eos_token_id lists {len(config.eos_token_ids):,} tokens, expected at most "
            f"{MAX_LISTED_IDS:,}: correct config.json"
        )


def _check_sizes(config: GemmaConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "query_pre_attn_scalar",
        "rms_norm_eps",
    ):
        value = getattr(config, name)
        is_number = name in ("query_pre_attn_scalar", "rms_norm_eps")
        if not isinstance(value, int | float if is_number else int) or isinstance(value, bool):
            expected = "a number" if is_number else "an integer"
            raise ConfigError(f"{name} is {shortened(value)}, expected {expected}")
        if not value > 0:
            raise ConfigError(f"{name} is {value}; it must be positive")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads}): each key-value head serves the "
            "same number of query heads; correct config.json"
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"head_dim is {config.head_dim}; rotary embedding needs an even number: correct config.json"
        )
    if config.hidden_activation != TANH_GELU:
        raise ConfigError(
            f"hidden_activation is {shortened(config.hidden_activation)}; Gemma uses {TANH_GELU!r} and no other "
            "is implemented"
        )
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = getattr(config, name)
        if cap is not None and not cap > 0:
            raise ConfigError(f"{name} is {cap}; it must be positive, or null for no cap")
    if not 0 <= config.attention_dropout < 1:
        raise ConfigError(f"attention_dropout is {config.attention_dropout}; it must be in [0, 1)")


def _check_layers(config: GemmaConfig) -> None:
    if len(config.layer_types) != config.num_hidden_layers:
        raise ConfigError(
            f"layer_types names {len(config.layer_types)} layers, num_hidden_layers is "
            f"{config.num_hidden_layers}: correct config.json"
        )
    for layer_type in set(config.layer_types):
        if layer_type not in get_args(LayerType):
            raise ConfigError(
                f"layer_types holds {shortened(layer_type)}; expected {' or '.join(get_args(LayerType))}"
            )
        if layer_type not in config.rope_parameters:
            raise ConfigError(f"rope_parameters says nothing of {layer_type} layers")
    if SLIDING_ATTENTION in config.layer_types and not (
        config.sliding_window and config.sliding_window > 0
    ):
        raise ConfigError(
            f"sliding_window is {config.sliding_window}, yet layer_types holds {SLIDING_ATTENTION}: "
            "it must be a positive number of tokens"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_ids"):
        value = getattr(config, name)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token <= MAX_TOKEN_ID:
                raise ConfigError(
                    f"{name} holds {shortened(token)}; token ids start at 0 and end at {MAX_TOKEN_ID:,}"
                )
