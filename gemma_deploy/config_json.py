"""The contents of a `config.json`, in today's spelling or an older one, as a `GemmaConfig`.

Older spellings: `hidden_act`, `rope_theta`, `rope_scaling`, `rope_local_base_freq`,
`sliding_window_pattern`, `torch_dtype`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_args

from gemma_deploy.config import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    TANH_GELU,
    GemmaConfig,
    LayerType,
    ModelType,
    RopeParameters,
    RopeType,
)
from gemma_deploy.errors import ConfigError

# What transformers' config class of each generation has by default, where it is not Gemma 1's.
_GENERATION_DEFAULTS: Mapping[ModelType, Mapping[str, Any]] = {
    "gemma": {},
    "gemma2": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "has_post_norms": True,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "has_post_norms": True,
        "has_qk_norm": True,
    },
}
# A layer is full attention when (index + 1) is a multiple of this, unless layer_types says otherwise.
_DEFAULT_PATTERN: Mapping[ModelType, int] = {"gemma": 1, "gemma2": 2, "gemma3_text": 6}


_TRANSLATED = frozenset(
    {"model_type", "hidden_activation", "eos_token_ids", "layer_types", "rope_parameters", "dtype"}
    | {"has_qk_norm", "has_post_norms"}
)
_NULLABLE = frozenset(
    {"pad_token_id", "bos_token_id", "sliding_window"}
    | {"attn_logit_softcapping", "final_logit_softcapping"}
)
_BOOLEANS = frozenset(
    {"use_cache", "tie_word_embeddings", "attention_bias", "use_bidirectional_attention"}
)
_FLOATS = frozenset(
    {"initializer_range", "rms_norm_eps", "attention_dropout", "query_pre_attn_scalar"}
    | {"attn_logit_softcapping", "final_logit_softcapping"}
)


def parse_config(raw: Mapping[str, Any]) -> GemmaConfig:
    """Return the config that the parsed JSON describes; see `GemmaConfig.from_dict`."""
    raw = _text_config(raw)
    if raw.get("model_type") not in get_args(ModelType):
        raise ConfigError(
            f"model_type is {raw.get('model_type')!r}; gemma-deploy knows gemma, gemma2, gemma3_text, "
            "and the text part of gemma3. Other families need another tool"
        )
    if raw.get("quantization_config") and not _is_nf4(raw["quantization_config"]):
        raise ConfigError(
            "the checkpoint is already quantized (config.json has quantization_config), and of such "
            "only bitsandbytes' NF4 is read; export the original float checkpoint"
        )
    model_type: ModelType = raw["model_type"]
    values: dict[str, Any] = dict(_GENERATION_DEFAULTS[model_type])
    for field in dataclasses.fields(GemmaConfig):
        if raw.get(field.name) is not None and field.name not in _TRANSLATED:
            values[field.name] = _typed(field.name, raw[field.name])
        elif field.name in raw and field.name in _NULLABLE:
            values[field.name] = None
    values["model_type"] = model_type
    values["hidden_activation"] = _activation(raw, model_type)
    values["eos_token_ids"] = _eos(raw)
    values["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    num_layers = values.get("num_hidden_layers", GemmaConfig().num_hidden_layers)
    values["layer_types"] = _layer_types(raw, model_type, num_layers)
    values["rope_parameters"] = _rope(raw, model_type, values["layer_types"])
    return GemmaConfig(**values)


def _is_nf4(quantization: Any) -> bool:
    """Tell whether bitsandbytes quantized to NF4; `Checkpoint` reads that from the tensors."""
    return (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method") == "bitsandbytes"
        and bool(quantization.get("load_in_4bit"))
        and quantization.get("bnb_4bit_quant_type") == "nf4"
    )


def _text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text model's part of a config, ids and dtype inherited from a multimodal parent."""
    model_type = raw.get("model_type")
    if model_type != "gemma3":
        return raw
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError("model_type is 'gemma3' (multimodal) and text_config is missing")
    inherited = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype")
    outer = {k: raw[k] for k in (*inherited, "tie_word_embeddings") if raw.get(k) is not None}
    return {**outer, **text, "model_type": "gemma3_text"}


def _typed(name: str, value: object) -> object:
    """Return `value` if its JSON type is the field's."""
    if name in _BOOLEANS:
        is_right, expected = isinstance(value, bool), "true or false"
    elif name in _FLOATS:
        is_right = isinstance(value, int | float) and not isinstance(value, bool)
        expected = "a number"
    else:
        is_right = isinstance(value, int) and not isinstance(value, bool)
        expected = "an integer"
    if not is_right:
        raise ConfigError(f"{name} is {value!r}, expected {expected}: correct config.json")
    return value


def _activation(raw: Mapping[str, Any], model_type: ModelType) -> str:
    name = raw.get("hidden_activation") or raw.get("hidden_act") or TANH_GELU
    # Gemma 1's first release wrote "gelu" and meant the tanh approximation.
    return TANH_GELU if model_type == "gemma" and name == "gelu" else str(name)


def _eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id", 1)
    ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
    return tuple(cast(int, _typed("eos_token_id", token)) for token in ids)


def _layer_types(
    raw: Mapping[str, Any], model_type: ModelType, num_layers: int
) -> tuple[LayerType, ...]:
    given = raw.get("layer_types")
    if given is not None:
        if not isinstance(given, list | tuple) or not all(isinstance(t, str) for t in given):
            raise ConfigError(f"layer_types is {given!r}, expected a list of layer types")
        return tuple(given)
    pattern = raw.get("sliding_window_pattern") or _DEFAULT_PATTERN[model_type]
    pattern = cast(int, _typed("sliding_window_pattern", pattern))
    return tuple(
        SLIDING_ATTENTION if (i + 1) % pattern else FULL_ATTENTION for i in range(num_layers)
    )


def _rope(
    raw: Mapping[str, Any], model_type: ModelType, layer_types: tuple[LayerType, ...]
) -> dict[LayerType, RopeParameters]:
    given, scaling = _mapping(raw, "rope_parameters"), _mapping(raw, "rope_scaling")
    is_per_layer_type = any(isinstance(v, Mapping) for v in given.values())
    has_two_bases = model_type == "gemma3_text"
    out: dict[LayerType, RopeParameters] = {}
    for layer_type in sorted(set(layer_types)):
        nested = _mapping(given, layer_type) if is_per_layer_type else given
        if has_two_bases and layer_type == SLIDING_ATTENTION:
            # Local layers are never scaled; their base has a key of its own.
            inherited = {"rope_theta": raw.get("rope_local_base_freq", 10_000.0)}
        else:
            theta = raw.get("rope_theta", 1e6 if has_two_bases else 10_000.0)
            inherited = {"rope_theta": theta, **scaling}
        out[layer_type] = _rope_parameters({**inherited, **nested})
    return out


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the JSON object under a name; empty if it is missing or null."""
    value = raw.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}, expected a JSON object: correct config.json")
    return value


def _rope_parameters(raw: Mapping[str, Any]) -> RopeParameters:
    rope_type: RopeType = raw.get("rope_type") or raw.get("type") or "default"
    theta, factor = raw["rope_theta"], raw.get("factor", 1.0)
    for name, value in (("rope_theta", theta), ("factor", factor)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, expected a number: correct config.json")
    is_linear = rope_type == "linear"
    return RopeParameters(
        rope_type=rope_type, rope_theta=float(theta), factor=float(factor) if is_linear else 1.0
    )
