"""Which tensor is divided by what, followed through the residual stream by hand."""

import json
from typing import Any

import pytest

from gemma_deploy.config import GemmaConfig
from gemma_deploy.residual_scaling import LayerScaling, ResidualScaling

LAYER = LayerScaling(value=2, attention=16, up=4, feed_forward=64)


def _scaling(**config: Any) -> ResidualScaling:
    return ResidualScaling.of(
        GemmaConfig(num_hidden_layers=2, **config), 8, (LayerScaling(), LAYER)
    )


def test_post_norms_take_out_what_sublayers_were_divided_by() -> None:
    scaling = _scaling(has_post_norms=True)
    layer = "model.layers.1."
    expected = {
        "self_attn.q_proj.weight": 1,
        "self_attn.k_proj.bias": 1,
        "self_attn.v_proj.weight": 2,
        "self_attn.v_proj.bias": 2,
        "self_attn.o_proj.weight": 16 / 2,
        "self_attn.o_proj.bias": 16,
        "mlp.gate_proj.weight": 1,
        "mlp.up_proj.weight": 4,
        "mlp.down_proj.weight": 64 / 4,
    }
    assert {x: scaling.weight_divisor(layer + x) for x in expected} == expected
    assert scaling.norm_divisor(layer + "input_layernorm.weight") == 1
    assert scaling.norm_divisor(layer + "pre_feedforward_layernorm.weight") == 1
    assert scaling.norm_divisor(layer + "post_attention_layernorm.weight") == 8
    assert scaling.norm_divisor(layer + "post_feedforward_layernorm.weight") == 8
    eps = {
        "input_layernorm": 8,
        "pre_feedforward_layernorm": 8,
        "post_attention_layernorm": 16,
        "post_feedforward_layernorm": 64,
        "self_attn.q_norm": 1,
        "self_attn.k_norm": 1,
    }
    for name, divisor in eps.items():
        assert scaling.norm_eps(f"{layer}{name}.weight") == pytest.approx(1e-6 / divisor**2)


def test_without_post_norms_projections_carry_the_residuals_divisor() -> None:
    scaling = _scaling()
    layer = "model.layers.1."
    assert scaling.weight_divisor(layer + "self_attn.o_proj.weight") == 8 / 2
    assert scaling.weight_divisor(layer + "self_attn.o_proj.bias") == 8
    assert scaling.weight_divisor(layer + "mlp.down_proj.weight") == 8 / 4
    assert scaling.norm_divisor(layer + "post_attention_layernorm.weight") == 1
    assert scaling.norm_eps(layer + "post_attention_layernorm.weight") == pytest.approx(1e-6 / 64)


def test_what_lies_outside_of_layers() -> None:
    scaling = _scaling()
    assert scaling.embedding_divisor == 8
    # The table is also the head, whose logits must not change.
    assert scaling.weight_divisor("model.embed_tokens.weight") == 1
    assert scaling.weight_divisor("lm_head.weight") == 1
    assert scaling.norm_divisor("model.norm.weight") == 1
    assert scaling.norm_eps("model.norm.weight") == pytest.approx(1e-6 / 64)


def test_none_divides_nothing() -> None:
    none = ResidualScaling.none(GemmaConfig(num_hidden_layers=2, has_post_norms=True))
    assert none.is_none
    assert none.weight_divisor("model.layers.1.self_attn.o_proj.weight") == 1
    assert none.norm_eps("model.norm.weight") == 1e-6
    assert not _scaling().is_none


def test_survives_json() -> None:
    scaling = _scaling(has_post_norms=True)
    assert ResidualScaling.from_dict(json.loads(json.dumps(scaling.to_dict()))) == scaling


@pytest.mark.parametrize("divisor", [0, 3, -2])
def test_only_powers_of_two_divide(divisor: int) -> None:
    with pytest.raises(ValueError, match=f"{divisor} is no power of two"):
        ResidualScaling.of(GemmaConfig(num_hidden_layers=1), divisor, (LayerScaling(),))
    with pytest.raises(ValueError, match=f"{divisor} is no power of two"):
        ResidualScaling.of(GemmaConfig(num_hidden_layers=1), 1, (LayerScaling(up=divisor),))
