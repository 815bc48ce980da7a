"""The contents of a `config.json`, in today's spelling or an older one, as a `GemmaConfig`.

Older spellings: `hidden_act`, `rope_theta`, `rope_scaling`, `rope_local_base_freq`,
`sliding_window_pattern`, `torch_dtype`.

A multimodal config holds the text model's in `text_config`. One rule says which of the two counts,
the one that transformers 5 follows:

* What the decoder is (sizes, rope, window, norms) is read from `text_config` alone.
* Whether the head is tied is read from the outer config alone: the head belongs to the outer model.
  Where it does not say, the head is tied. A cap on its logits in `text_config` is refused.
* The tokens that end a text are those of both.
* Other token ids and the dtype are `text_config`'s, and the outer config's where it does not say.
* A checkpoint is quantized if either says so.
"""

import dataclasses
from collections.abc import Mapping, Sequence
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
from gemma_deploy.json_values import typed, whole
from gemma_deploy.limits import MAX_LAYERS
from gemma_deploy.quoting import shortened

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
_NULL_IS_DEFAULT = frozenset(
    {"use_bidirectional_attention", "query_pre_attn_scalar", "attention_dropout"}
)
_BOOLEANS = frozenset(
    {"use_cache", "tie_word_embeddings", "attention_bias", "use_bidirectional_attention"}
)
_NO_TOKEN = -1  # what some files write for null
_FLOATS = frozenset(
    {"initializer_range", "rms_norm_eps", "attention_dropout", "query_pre_attn_scalar"}
    | {"attn_logit_softcapping", "final_logit_softcapping"}
)

# Of a multimodal config: what text_config may leave to the outer one, and what either may say.
_INHERITED = ("bos_token_id", "pad_token_id", "dtype", "torch_dtype")
_OF_EITHER = ("quantization_config", "quantization")


def parse_config(raw: object) -> GemmaConfig:
    """Return the config that the parsed JSON describes; see `GemmaConfig.from_dict`."""
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"the model is {shortened(raw)}, expected a JSON object: the file is damaged"
        )
    raw = _text_config(raw)
    _check_not_quantized(raw)
    if raw.get("model_type") not in get_args(ModelType):
        raise ConfigError(
            f"model_type is {shortened(raw.get('model_type'))}; gemma-deploy knows gemma, gemma2, gemma3_text, "
            "and the text part of gemma3. Other families need another tool"
        )
    model_type: ModelType = raw["model_type"]
    values: dict[str, Any] = dict(_GENERATION_DEFAULTS[model_type])
    for field in dataclasses.fields(GemmaConfig):
        name = field.name
        is_unsaid = name not in raw or (raw[name] is None and name in _NULL_IS_DEFAULT)
        if not is_unsaid and name not in _TRANSLATED:
            values[name] = _typed(name, raw[name])
    values["model_type"] = model_type
    values["hidden_activation"] = _activation(raw, model_type)
    values["eos_token_ids"] = _eos(raw)
    values["dtype"] = _dtype(raw)
    num_layers = values.get("num_hidden_layers", GemmaConfig().num_hidden_layers)
    values["layer_types"] = _layer_types(raw, model_type, num_layers)
    values["rope_parameters"] = _rope(raw, model_type, values["layer_types"])
    config = GemmaConfig(**values)
    _check_generation(raw, config)
    return config


def _check_generation(raw: Mapping[str, Any], config: GemmaConfig) -> None:
    """Refuse what this generation has not: transformers ignores it, and it would change the numbers."""
    neutral: dict[str, Any] = {}
    if config.model_type == "gemma":
        neutral = {
            "query_pre_attn_scalar": config.head_dim,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": [FULL_ATTENTION] * config.num_hidden_layers,
            "sliding_window_pattern": 1,
        }
    elif config.model_type == "gemma2" and raw.get("layer_types") is None:
        neutral = {"sliding_window_pattern": _DEFAULT_PATTERN["gemma2"]}
    for name, value in neutral.items():
        if raw.get(name) is not None and raw[name] != value:
            raise ConfigError(
                f"{name} is {shortened(raw[name])}, which {config.model_type} has not: transformers "
                "ignores it. Remove it from config.json, or correct model_type"
            )


def _check_not_quantized(raw: Mapping[str, Any]) -> None:
    """Refuse weights that are codes, but for NF4, which `Checkpoint` reads from the tensors."""
    quantization = raw.get("quantization_config")
    if quantization and not _is_nf4(quantization):
        raise ConfigError(
            f"the checkpoint is already quantized (quantization_config is {shortened(quantization)}), "
            "and of such only bitsandbytes' NF4 is read; export the original float checkpoint"
        )
    if raw.get("quantization"):
        raise ConfigError(
            f"the checkpoint was quantized by MLX (quantization is {shortened(raw['quantization'])}), "
            "whose codes are not read; export the original float checkpoint"
        )


def _is_nf4(quantization: Any) -> bool:
    """Tell whether bitsandbytes quantized to NF4."""
    return (
        isinstance(quantization, Mapping)
        and quantization.get("quant_method") == "bitsandbytes"
        and bool(quantization.get("load_in_4bit"))
        and quantization.get("bnb_4bit_quant_type") == "nf4"
    )


def _text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text model's part of a config; see the module for what counts where."""
    if raw.get("model_type") != "gemma3":
        return raw
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        found = "missing" if text is None else shortened(text)
        raise ConfigError(
            f"model_type is 'gemma3' (multimodal) and text_config is {found}: expected the text "
            "model's config; correct config.json"
        )
    if text.get("final_logit_softcapping") is not None:
        raise ConfigError(
            f"text_config has final_logit_softcapping {shortened(text['final_logit_softcapping'])}: the "
            "head is the multimodal model's, which has no cap, and transformers ignores it. Set it to "
            "null, or export the text model alone"
        )
    inherited = {name: raw[name] for name in _INHERITED if raw.get(name) is not None}
    both = {name: raw.get(name) or text.get(name) for name in _OF_EITHER}
    return {
        **inherited,
        **text,
        **both,
        "model_type": "gemma3_text",
        "tie_word_embeddings": raw.get("tie_word_embeddings", True),
        "eos_token_id": [*_ids(raw.get("eos_token_id")), *_ids(text.get("eos_token_id", 1))],
    }


def _typed(name: str, value: object) -> object:
    """Return `value` if its JSON type is the field's."""
    if name in _NULLABLE and (value is None or (value == _NO_TOKEN and name.endswith("_id"))):
        return None
    return _of_kind(bool if name in _BOOLEANS else float if name in _FLOATS else int, value, name)


def _of_kind(kind: type, value: object, name: str) -> Any:
    try:
        return typed(kind, value, name)
    except ValueError as err:
        raise ConfigError(f"{err}: correct config.json") from err


def _activation(raw: Mapping[str, Any], model_type: ModelType) -> str:
    """Return the activation; of two that are given, the one that is not Gemma's, to be refused."""
    names = [raw.get(name) for name in ("hidden_activation", "hidden_act")]
    if model_type != "gemma":  # these read the first only
        names = [names[0] if names[0] is not None else names[1]]
    # Gemma 1's first release wrote "gelu" and meant the tanh approximation.
    known = (None, TANH_GELU, "gelu") if model_type == "gemma" else (None, TANH_GELU)
    return next((str(name) for name in names if name not in known), TANH_GELU)


def _dtype(raw: Mapping[str, Any]) -> str | None:
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if not isinstance(dtype, str | None):
        raise ConfigError(f"dtype is {shortened(dtype)}, expected a name such as bfloat16")
    return dtype


def _eos(raw: Mapping[str, Any]) -> tuple[int, ...]:
    ids = (_typed("eos_token_id", token) for token in _ids(raw.get("eos_token_id", 1)))
    return tuple(cast(int, token) for token in dict.fromkeys(ids) if token != _NO_TOKEN)


def _ids(value: object) -> Sequence[object]:
    """Return what `eos_token_id` lists: one id, several, or none."""
    return value if isinstance(value, list | tuple) else () if value is None else (value,)


def _layer_types(
    raw: Mapping[str, Any], model_type: ModelType, num_layers: int
) -> tuple[LayerType, ...]:
    given = raw.get("layer_types")
    if given is not None:
        if not isinstance(given, list | tuple) or not all(isinstance(t, str) for t in given):
            raise ConfigError(f"layer_types is {shortened(given)}, expected a list of layer types")
        return tuple(given)
    pattern = raw.get("sliding_window_pattern")
    pattern = _DEFAULT_PATTERN[model_type] if pattern is None else pattern
    pattern = cast(int, _typed("sliding_window_pattern", pattern))
    if pattern < 1:
        raise ConfigError(f"sliding_window_pattern is {pattern}; it must be positive")
    try:
        num_layers = whole(num_layers, "num_hidden_layers", 1, MAX_LAYERS)
    except ValueError as err:
        raise ConfigError(f"{err}: correct config.json") from err
    return tuple(
        SLIDING_ATTENTION if (i + 1) % pattern else FULL_ATTENTION for i in range(num_layers)
    )


def _rope(
    raw: Mapping[str, Any], model_type: ModelType, layer_types: tuple[LayerType, ...]
) -> dict[LayerType, RopeParameters]:
    """Return the rotary parameters of each layer type, as transformers 5 reads them.

    In Gemma 1 and 2 `rope_scaling` replaces `rope_parameters`. In Gemma 3 it is added to those of
    full attention, and wins.
    """
    given, scaling = _mapping(raw, "rope_parameters"), _mapping(raw, "rope_scaling")
    if model_type == "gemma3_text":
        return _rope_of_two_bases(raw, given, scaling, layer_types)
    base = {"rope_theta": raw.get("rope_theta", 10_000.0), **_partial(raw)}
    given = scaling or given
    return {
        layer_type: _rope_parameters(
            {**base, **(_mapping(given, layer_type) if _is_nested(given) else given)}
        )
        for layer_type in sorted(set(layer_types))
    }


def _rope_of_two_bases(
    raw: Mapping[str, Any],
    given: Mapping[str, Any],
    scaling: Mapping[str, Any],
    layer_types: tuple[LayerType, ...],
) -> dict[LayerType, RopeParameters]:
    """Return Gemma 3's: one base for full attention, which may be scaled, and one for windows."""
    if given and not _is_nested(given):
        raise ConfigError(
            f"rope_parameters is {shortened(given)}: Gemma 3 has one set for each of "
            f"{FULL_ATTENTION} and {SLIDING_ATTENTION}, and transformers ignores what stands outside "
            "them. Write it under the layer type that it is for"
        )
    if scaling.get("type", "default") != "default" and "rope_type" not in scaling:
        raise ConfigError(
            f"rope_scaling is {shortened(scaling)}: transformers 5 ignores 'type' here, earlier versions "
            "apply it. Write it as 'rope_type'"
        )
    thetas: dict[LayerType, Any] = {
        FULL_ATTENTION: raw.get("rope_theta", 1e6),
        SLIDING_ATTENTION: raw.get("rope_local_base_freq", 10_000.0),
    }
    return {
        layer_type: _rope_parameters(
            {"rope_theta": thetas[layer_type], **_partial(raw)}
            | dict(_mapping(given, layer_type))
            | (dict(scaling) if layer_type == FULL_ATTENTION else {})
        )
        for layer_type in sorted(set(layer_types) & thetas.keys())
    }


def _partial(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: raw[name] for name in ("partial_rotary_factor",) if name in raw}


def _mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the JSON object under a name; empty if it is missing or null."""
    value = raw.get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name} is {shortened(value)}, expected a JSON object: correct config.json"
        )
    return value


def _is_nested(rope_parameters: Mapping[str, Any]) -> bool:
    return any(name in get_args(LayerType) for name in rope_parameters)


def _rope_parameters(raw: Mapping[str, Any]) -> RopeParameters:
    rope_type: RopeType = raw.get("rope_type") or raw.get("type") or "default"
    theta, factor = raw["rope_theta"], raw.get("factor", 1.0)
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"partial_rotary_factor is {shortened(raw['partial_rotary_factor'])}; Gemma rotates whole "
            "heads, and transformers ignores it. Remove it from config.json"
        )
    theta, factor = _of_kind(float, theta, "rope_theta"), _of_kind(float, factor, "factor")
    is_linear = rope_type == "linear"
    return RopeParameters(
        rope_type=rope_type, rope_theta=float(theta), factor=float(factor) if is_linear else 1.0
    )
