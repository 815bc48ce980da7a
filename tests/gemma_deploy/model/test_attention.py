import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.model.attention import GemmaAttention

CONFIG = GemmaConfig.from_dict(
    {
        "model_type": "gemma3_text",
        "hidden_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "attention_bias": True,
    }
)


def test_hands_normalized_unrotated_heads_to_attend() -> None:
    layer = GemmaAttention(CONFIG, 3)
    hidden = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1)

    def attend(
        given: GemmaAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert given is layer
        assert query.shape == (2, 7, 4, 8)
        assert key.shape == value.shape == (2, 7, 2, 8)
        # The norms' weights are fresh (zero): every head has a root mean square of 1.
        for normalized in (query, key):
            torch.testing.assert_close(
                normalized.square().mean(-1), torch.ones(normalized.shape[:-1]), atol=1e-3, rtol=0
            )
        expected = (hidden @ layer.v_proj.weight.T + layer.v_proj.bias).reshape(2, 7, 2, 8)
        torch.testing.assert_close(value, expected)
        return query, weights

    output, returned = layer(hidden, attend)
    assert output.shape == (2, 7, 24)
    assert returned is weights


def test_numbers_come_from_the_config() -> None:
    layers = [GemmaAttention(CONFIG, i) for i in range(6)]
    assert [layer.sliding_window for layer in layers] == [5, 5, 5, 5, 5, None]
    assert [layer.layer_idx for layer in layers] == list(range(6))
    assert {layer.scale for layer in layers} == {1 / 16}
    assert GemmaAttention(GemmaConfig(), 0).q_norm is None
