import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from gemma_deploy.config import GemmaConfig, LayerType, RopeParameters
from gemma_deploy.errors import ConfigError
from gemma_deploy.limits import MAX_SIZES

FULL: LayerType = "full_attention"
SLIDING: LayerType = "sliding_attention"
TRANSFORMERS_CLASSES = {
    "gemma": "GemmaConfig",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
}
SHARED_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
]
LATER_FIELDS = [
    "query_pre_attn_scalar",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
]

# config.json as the hub has them, less what concerns no model (architectures, versions).
GEMMA_2B: dict[str, Any] = {
    "model_type": "gemma",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA_2_2B: dict[str, Any] = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 256000,
}
GEMMA_3_1B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262144,
}
GEMMA_3_4B: dict[str, Any] = {
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def eos_ids(value: int | list[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def assert_equals_transformers(config: GemmaConfig, theirs: Any) -> None:
    for name in SHARED_FIELDS:
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.eos_token_ids == eos_ids(theirs.eos_token_id)
    if config.model_type == "gemma":
        assert config.layer_types == (FULL,) * theirs.num_hidden_layers
        assert config.query_pre_attn_scalar == theirs.head_dim
    else:
        for name in LATER_FIELDS:
            assert getattr(config, name) == getattr(theirs, name), name
        assert list(config.layer_types) == theirs.layer_types
    for layer_type, ours in config.rope_parameters.items():
        rope = theirs.rope_parameters
        rope = rope[layer_type] if config.model_type == "gemma3_text" else rope
        assert ours.rope_type == rope["rope_type"]
        assert ours.rope_theta == rope["rope_theta"]
        assert ours.factor == rope.get("factor", 1.0)


@pytest.mark.parametrize("model_type", TRANSFORMERS_CLASSES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    theirs = getattr(transformers, TRANSFORMERS_CLASSES[model_type])()
    assert_equals_transformers(GemmaConfig.from_dict({"model_type": model_type}), theirs)


@pytest.mark.parametrize("model_type", TRANSFORMERS_CLASSES)
def test_reads_what_transformers_writes(model_type: str, tmp_path: Path) -> None:
    theirs = getattr(transformers, TRANSFORMERS_CLASSES[model_type])(num_hidden_layers=7)
    theirs.save_pretrained(tmp_path)
    assert_equals_transformers(GemmaConfig.from_file(tmp_path), theirs)


@pytest.mark.parametrize(
    "raw", [GEMMA_2B, GEMMA_2_2B, GEMMA_3_1B], ids=["gemma-2b", "gemma-2-2b", "gemma-3-1b"]
)
def test_reads_real_configs_as_transformers_does(raw: dict[str, Any]) -> None:
    config_class = getattr(transformers, TRANSFORMERS_CLASSES[raw["model_type"]])
    config = GemmaConfig.from_dict(raw)
    assert_equals_transformers(config, config_class(**raw))
    assert config.hidden_activation == "gelu_pytorch_tanh"
    assert config.dtype == raw["torch_dtype"]


def test_takes_the_text_model_of_a_multimodal_config() -> None:
    config = GemmaConfig.from_dict(GEMMA_3_4B)
    assert_equals_transformers(
        config, transformers.Gemma3TextConfig(**GEMMA_3_4B["text_config"], eos_token_id=[1, 106])
    )
    assert config.model_type == "gemma3_text"
    assert config.eos_token_ids == (1, 106)
    assert config.dtype == "bfloat16"
    assert config.rope_parameters == {
        FULL: RopeParameters(rope_type="linear", rope_theta=1e6, factor=8.0),
        SLIDING: RopeParameters(rope_theta=1e4),
    }


@pytest.mark.parametrize(
    ("outer", "text"),
    [
        ({}, {}),
        ({"tie_word_embeddings": False}, {}),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ({"eos_token_id": [1, 106]}, {"eos_token_id": 1}),
        ({"eos_token_id": 106}, {"eos_token_id": [1, 107]}),
        ({"sliding_window": 7, "rope_theta": 5e4}, {"sliding_window": 9}),
        ({"layer_types": [FULL], "sliding_window_pattern": 1}, {"sliding_window_pattern": 2}),
        ({"rope_local_base_freq": 5e4, "rope_theta": 1e5}, {"rope_theta": 2e5}),
        ({"bos_token_id": 7, "pad_token_id": 8}, {"bos_token_id": 5}),
    ],
)
def test_the_outer_and_the_text_config_count_as_in_transformers(
    outer: dict[str, Any], text: dict[str, Any], tmp_path: Path
) -> None:
    transformers.Gemma3Config(text_config={"num_hidden_layers": 4, "head_dim": 64}).save_pretrained(
        tmp_path
    )
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    for name in ("layer_types", "rope_parameters", "_sliding_window_pattern"):
        del raw["text_config"][name]  # files of earlier versions have none
    raw |= outer
    raw["text_config"] |= text
    path.write_text(json.dumps(raw))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    stops = transformers.GenerationConfig.from_model_config(theirs).eos_token_id
    ours = GemmaConfig.from_file(tmp_path)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert set(ours.eos_token_ids) == {
        *eos_ids(stops),
        *eos_ids(theirs.text_config.eos_token_id),
    }
    theirs.text_config.tie_word_embeddings = theirs.tie_word_embeddings
    theirs.text_config.eos_token_id = list(ours.eos_token_ids)
    assert_equals_transformers(ours, theirs.text_config)


LINEAR = {"rope_type": "linear", "factor": 8.0}
NESTED = {
    FULL: {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5},
    SLIDING: {"rope_type": "default", "rope_theta": 2e4},
}


@pytest.mark.parametrize("model_type", TRANSFORMERS_CLASSES)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e4},
        {"rope_scaling": LINEAR, "rope_theta": 5e4},
        {"rope_scaling": {**LINEAR, "rope_theta": 7e4}, "rope_theta": 5e4},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_local_base_freq": 3e4},
    ],
)
def test_reads_old_rotary_parameters_as_transformers_does(
    model_type: str, rope: dict[str, Any]
) -> None:
    theirs = getattr(transformers, TRANSFORMERS_CLASSES[model_type])(**copy.deepcopy(rope))
    assert_equals_transformers(GemmaConfig.from_dict({"model_type": model_type} | rope), theirs)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 8e4},
        {"rope_parameters": {"rope_theta": 3e4}, "rope_scaling": LINEAR},
        {"rope_parameters": {"rope_theta": 3e4}, "rope_scaling": LINEAR, "rope_theta": 8e4},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
)
def test_one_base_is_read_as_transformers_does(model_type: str, rope: dict[str, Any]) -> None:
    theirs = getattr(transformers, TRANSFORMERS_CLASSES[model_type])(**copy.deepcopy(rope))
    assert_equals_transformers(GemmaConfig.from_dict({"model_type": model_type} | rope), theirs)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": NESTED},
        {"rope_parameters": NESTED, "rope_scaling": LINEAR},
        {"rope_parameters": {**NESTED, FULL: {"rope_type": "default"}}, "rope_scaling": LINEAR},
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 2.0}}, "rope_theta": 7e5},
        {"rope_parameters": {FULL: None, SLIDING: None}, "rope_theta": 7e5},
        {"rope_parameters": {"rope_theta": 9.0, "rope_type": "default", **NESTED}},
    ],
)
def test_two_bases_are_read_as_transformers_does(rope: dict[str, Any]) -> None:
    theirs = transformers.Gemma3TextConfig(**copy.deepcopy(rope))
    assert_equals_transformers(GemmaConfig.from_dict({"model_type": "gemma3_text"} | rope), theirs)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
            "rope_parameters is .*'linear'.*: Gemma 3 has one set for each of full_attention",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LINEAR},
            "Write it under the layer type that it is for",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling is .*: transformers 5 ignores 'type' here",
        ),
    ],
)
def test_refuses_rotary_parameters_that_versions_read_differently(
    rope: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        GemmaConfig.from_dict({"model_type": "gemma3_text"} | rope)


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [
        ("gemma", "query_pre_attn_scalar", 100),
        ("gemma", "attn_logit_softcapping", 50.0),
        ("gemma", "final_logit_softcapping", 30.0),
        ("gemma", "sliding_window_pattern", 2),
        ("gemma2", "sliding_window_pattern", 3),
        ("gemma", "partial_rotary_factor", 0.5),
        ("gemma3_text", "partial_rotary_factor", 0.5),
    ],
)
def test_refuses_what_a_generation_has_not(model_type: str, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is {value}[,;] .*transformers ignores it"):
        GemmaConfig.from_dict({"model_type": model_type, "sliding_window": 9, name: value})


def test_refuses_a_cap_that_the_multimodal_head_has_not() -> None:
    raw = copy.deepcopy(GEMMA_3_4B)
    raw["text_config"]["final_logit_softcapping"] = 30.0
    with pytest.raises(ConfigError, match=r"final_logit_softcapping 30\.0: the head is the"):
        GemmaConfig.from_dict(raw)


@pytest.mark.parametrize("part", ["outer", "text"])
def test_a_quantized_multimodal_checkpoint_is_refused_wherever_it_says_so(part: str) -> None:
    raw = copy.deepcopy(GEMMA_3_4B)
    (raw if part == "outer" else raw["text_config"])["quantization_config"] = {"bits": 4}
    with pytest.raises(ConfigError, match=r"already quantized \(quantization_config is .'bits': 4"):
        GemmaConfig.from_dict(raw)


def test_minus_one_stands_for_no_token() -> None:
    config = GemmaConfig.from_dict(
        GEMMA_2B | {"pad_token_id": -1, "bos_token_id": -1, "eos_token_id": [1, -1]}
    )
    assert config.pad_token_id is None
    assert config.bos_token_id is None
    assert config.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_key_value_heads", None), ("hidden_size", "64"), ("head_dim", 2.5), ("rms_norm_eps", [])],
)
def test_the_constructor_names_a_value_of_another_type(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is {re.escape(repr(value))}, expected"):
        GemmaConfig(**{name: value})


def test_reads_a_path_given_as_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_2B))
    assert GemmaConfig.from_file(str(tmp_path)) == GemmaConfig.from_dict(GEMMA_2B)


def test_quotes_no_more_than_can_be_read() -> None:
    with pytest.raises(ConfigError) as caught:
        GemmaConfig.from_dict(GEMMA_2B | {"layer_types": [7] * 10_000})
    assert len(str(caught.value)) < 300


def test_knows_what_sets_generations_apart() -> None:
    one, two, three = (GemmaConfig.from_dict(raw) for raw in (GEMMA_2B, GEMMA_2_2B, GEMMA_3_1B))
    assert [c.has_post_norms for c in (one, two, three)] == [False, True, True]
    assert [c.has_qk_norm for c in (one, two, three)] == [False, False, True]
    assert [c.window_of(0) for c in (one, two, three)] == [None, 4096, 512]
    assert [two.window_of(i) for i in (1, 2, 3)] == [None, 4096, None]
    assert [i for i in range(26) if three.window_of(i) is None] == [5, 11, 17, 23]
    assert one.attention_scale == 1 / 16


def test_scale_comes_from_query_pre_attn_scalar() -> None:
    config = GemmaConfig.from_dict(GEMMA_2_2B | {"query_pre_attn_scalar": 144})
    assert config.attention_scale == 1 / 12


def test_local_layers_take_their_own_base() -> None:
    config = GemmaConfig.from_dict(GEMMA_3_1B | {"rope_local_base_freq": 5000.0})
    assert config.rope_parameters[SLIDING].rope_theta == 5000.0
    assert config.rope_parameters[FULL].rope_theta == 1e6


def test_pattern_decides_layers_unless_they_are_named() -> None:
    patterned = GemmaConfig.from_dict(
        GEMMA_3_1B | {"num_hidden_layers": 4, "sliding_window_pattern": 2}
    )
    assert patterned.layer_types == (SLIDING, FULL, SLIDING, FULL)
    named = GemmaConfig.from_dict(
        GEMMA_3_1B | {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}
    )
    assert named.layer_types == (FULL, SLIDING)


def test_an_explicit_null_overrides_a_default() -> None:
    config = GemmaConfig.from_dict(
        GEMMA_2_2B | {"attn_logit_softcapping": None, "pad_token_id": None, "eos_token_id": None}
    )
    assert config.attn_logit_softcapping is None
    assert config.pad_token_id is None
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    "raw",
    [
        GEMMA_2B,
        GEMMA_2_2B,
        GEMMA_3_1B,
        GEMMA_3_4B,
        GEMMA_2B | {"attention_bias": True, "rope_theta": 5e4, "pad_token_id": None},
        GEMMA_3_1B | {"use_bidirectional_attention": True, "attention_dropout": 0.1},
        GEMMA_2_2B | {"final_logit_softcapping": None, "tie_word_embeddings": False},
    ],
)
def test_to_dict_is_read_back_unchanged(raw: dict[str, Any]) -> None:
    config = GemmaConfig.from_dict(raw)
    assert GemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama'; gemma-deploy knows gemma, gemma2"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": "gemma3"}, "text_config is missing"),
        ({"quantization_config": {"bits": 4}}, "already quantized"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized by MLX"),
        ({"num_key_value_heads": None}, "num_key_value_heads is None, expected an integer"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be positive"),
        ({"hidden_size": "2048"}, "hidden_size is '2048', expected an integer"),
        ({"head_dim": True}, "head_dim is True, expected an integer"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a finite number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not a multiple"),
        ({"head_dim": 255}, "head_dim is 255; rotary embedding needs an even number"),
        ({"hidden_act": "silu"}, "hidden_activation is 'silu'"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0; it must be positive"),
        ({"dtype": ["bfloat16"]}, r"dtype is \['bfloat16'\], expected a name"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1.0; it must be in \[0, 1\)"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        ({"layer_types": [FULL]}, "layer_types names 1 layers, num_hidden_layers is 18"),
        ({"layer_types": ["other"] * 18}, "layer_types holds 'other'"),
        ({"layer_types": FULL}, "expected a list of layer types"),
        ({"layer_types": [SLIDING] * 18}, "sliding_window is None, yet layer_types"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": [1]}, "rope_parameters is .1., expected a JSON object"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected a JSON object"),
        ({"layer_types": [{}] * 18}, "expected a list of layer types"),
        ({"rope_theta": "big"}, "rope_theta is 'big', expected a finite number"),
        ({"rope_theta": 0}, "must be positive"),
        ({"rope_theta": 10**400}, r"rope_theta is 10{79}… .401 characters., expected a finite"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a finite number"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is '2', expected an integer"),
        ({"bos_token_id": -2}, "bos_token_id holds -2; token ids start at 0"),
    ],
)
def test_refuses_what_it_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GemmaConfig.from_dict(GEMMA_2B | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json not found: expected a folder in Hugging Face layout"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds a list, expected a JSON object"),
    ],
)
def test_refuses_files_that_are_no_config(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        GemmaConfig.from_file(tmp_path)


@pytest.mark.parametrize("name", MAX_SIZES)
def test_sizes_that_no_model_has(name: str) -> None:
    """Nothing is made of them: a tuple of 10**12 layer types would take the machine."""
    for value in (MAX_SIZES[name] + 1, 10**12, 10**400):
        raw = {"model_type": "gemma2", "head_dim": 8, name: value}
        with pytest.raises(ConfigError, match=rf"{name} is \d"):
            GemmaConfig.from_dict(raw)
    with pytest.raises(ConfigError, match=f"{name} is 1000000000000, expected at most"):
        GemmaConfig(**{name: 10**12})  # type: ignore[arg-type]  # mypy cannot know which


def test_the_layers_of_a_text_config_are_bounded() -> None:
    text = {"model_type": "gemma3_text", "num_hidden_layers": 10**12}
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000000, expected"):
        GemmaConfig.from_dict({"model_type": "gemma3", "text_config": text})


def test_lists_and_ids_are_bounded() -> None:
    with pytest.raises(ConfigError, match="lists 1,001 tokens, expected at most 1,000"):
        GemmaConfig.from_dict(GEMMA_2B | {"eos_token_id": list(range(1001))})
    with pytest.raises(ConfigError, match="bos_token_id holds 2147483648; token ids"):
        GemmaConfig.from_dict(GEMMA_2B | {"bos_token_id": 2**31})


def test_what_is_no_object() -> None:
    with pytest.raises(ConfigError, match=r"the model is \[1\], expected a JSON object"):
        GemmaConfig.from_dict([1])  # type: ignore[arg-type]
