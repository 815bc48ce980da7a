from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from gemma_deploy import memory
from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.config import GemmaConfig
from gemma_deploy.cpu_memory import RUNTIME_BYTES, cpu_memory
from gemma_deploy.graph_spec import Precision
from gemma_deploy.quantization.formats import WeightFormat

# Gemma 1 2B, whose sizes are published: 2,506,172,416 parameters (the model card of
# google/gemma-2b on the hub shows them), one key-value head.
GEMMA_2B = GemmaConfig(
    hidden_size=2048,
    intermediate_size=16_384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
)
SMALL = GemmaConfig(
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


class TestParameters:
    def test_gemma_2b(self) -> None:
        assert memory.num_parameters(GEMMA_2B) == 2_506_172_416

    @pytest.mark.parametrize(
        "name", ["gemma1", "gemma1-mha-bias", "gemma1-untied", "gemma2", "gemma3"]
    )
    def test_as_transformers_counts_them(
        self, name: str, tiny_checkpoint: Callable[..., Path], oracle: Callable[..., object]
    ) -> None:
        folder = tiny_checkpoint(name)

        ours = memory.num_parameters(GemmaConfig.from_file(folder))

        assert ours == oracle(folder).num_parameters()  # type: ignore[attr-defined] # transformers' model


class TestWeights:
    # Worked out by hand: matrices 100*8 + 2 layers * (q 16*8 + k 8*8 + v 8*8 + o 8*16
    # + gate, up, down 3 * 16*8) = 800 + 2 * (384 + 384) = 2336; norms 5 * 8 = 40.
    @pytest.mark.parametrize(
        ("precision", "expected"),
        [
            (Precision.of("float32"), 2336 * 4 + 40 * 4),
            (Precision.of("float16"), 2336 * 2 + 40 * 4),
            (Precision.of("bfloat16"), 2336 * 2 + 40 * 4),
        ],
    )
    def test_by_hand(self, precision: Precision, expected: int) -> None:
        assert memory.weights_bytes(SMALL, precision) == expected

    @pytest.mark.parametrize(
        ("name", "group"),
        [
            ("model.embed_tokens.weight", "embedding"),
            ("model.layers.0.self_attn.q_proj.weight", "attention"),
            ("model.layers.0.self_attn.k_proj.bias", "attention"),
            ("model.layers.0.self_attn.q_norm.scale", "norms"),
            ("model.layers.0.mlp.down_proj.weight", "feed-forward"),
            ("model.layers.0.post_attention_layernorm.scale", "norms"),
            ("model.norm.weight", "norms"),
            ("lm_head.weight", "head"),
        ],
    )
    def test_groups(self, name: str, group: str) -> None:
        assert memory.group_of(name) == group

    def test_sums_leave_out_what_is_not_there(self) -> None:
        sums = memory.sums_by_group([("model.norm.weight", 8), ("model.embed_tokens.weight", 5)])

        assert sums == {"embedding": 5, "norms": 8}


class TestActivations:
    # Batch 2, 10 tokens, capacity 20, float16: 20 rows.
    # residual 20*8*2 = 320; attention 20*(8 + 2*16 + 2*8)*2 = 2240 and scores 20*4*20*4 = 6400;
    # feed-forward 20*(8 + 3*16)*2 = 2240; head 2*100*4 = 800.
    def test_long_attention_is_the_peak(self) -> None:
        assert peak(SMALL, tokens=10, max_seq_len=20) == 320 + 2240 + 6400

    def test_wide_feed_forward_is_the_peak(self) -> None:
        # One token: residual 32; attention 224 + scores 2*4*1*4 = 32; feed-forward 2*(8+3*1024)*2.
        wide = GemmaConfig.from_dict(SMALL.to_dict() | {"intermediate_size": 1024})

        assert peak(wide, tokens=1, max_seq_len=1) == 32 + 2 * (8 + 3 * 1024) * 2

    def test_the_head_is_the_peak_of_one_token(self) -> None:
        assert peak(SMALL, tokens=1, max_seq_len=1) == 32 + 800


class TestEstimate:
    def test_gemma_2b_at_8192_tokens(self) -> None:
        # KV cache by hand: 2 (key, value) * 18 layers * 1 head * 256 * 2 bytes * 8192 tokens.
        result = memory.estimate(
            GEMMA_2B,
            Precision.of("float16"),
            stored_bytes=5_012_344_832,
            tokenizer_file_bytes=0,
            batch_size=1,
            max_seq_len=8192,
            prefill_tokens=512,
        )

        assert result.kv_cache_bytes == 150_994_944
        assert result.weights_bytes == 5_012_344_832
        assert result.gpu_total_bytes == 5_012_344_832 + 150_994_944 + result.activation_bytes
        # All but the 37 norms of 2048, 4 bytes each.
        assert result.cpu.weights_bytes == (2_506_172_416 - 37 * 2048) * 4
        assert result.cpu_total_bytes == (
            RUNTIME_BYTES + result.cpu.weights_bytes + 150_994_944 + result.activation_bytes
        )

    def test_an_int8_cache_is_a_quarter_and_is_widened_a_layer_at_a_time(self) -> None:
        wide, narrow = (
            memory.estimate(
                GEMMA_2B,
                Precision.of("float32", cache),
                stored_bytes=1,
                tokenizer_file_bytes=0,
                batch_size=2,
                max_seq_len=8192,
                prefill_tokens=512,
            )
            for cache in (None, "int8")
        )

        assert narrow.kv_cache_bytes * 4 == wide.kv_cache_bytes
        # Keys and values of one layer, and the copy that attention writes to.
        layer = 2 * 2 * 8192 * 256 * 4
        assert narrow.activation_bytes == wide.activation_bytes + 2 * layer

    def test_an_embedding_that_is_no_head_is_not_copied(self) -> None:
        untied = GemmaConfig.from_dict(SMALL.to_dict() | {"tie_word_embeddings": False})

        # As many matrices are multiplied with: the head instead of the embedding.
        assert held(untied) == held(SMALL) == 2336 * 4

    # Of SMALL's matrices the table has 800 elements, the layers 2 * 768: feed-forward matrices of 128,
    # q and o of 128, k and v of 64.
    @pytest.mark.parametrize(
        ("scheme", "expected"),
        [
            # Half a byte per code, and 12 bytes per block.
            ("int4/32", 2336 // 2 + 2336 // 32 * 12),
            ("int8/32", 2336 + 2336 // 32 * 12),
            # Rows are cut into blocks of 32 as well.
            ("int8/channel", 2336 + 2336 // 32 * 12),
            ("fp8/channel", 2336 * 4),
            # The table is the largest matrix that is dequantized at a step.
            ("nf4/32", 2336 // 32 * 4 + 800 * 4),
        ],
    )
    def test_quantized_weights_on_a_cpu(self, scheme: str, expected: int) -> None:
        formats = {
            name: WeightFormat.parse(scheme)
            for name, shape in expected_tensors(SMALL).items()
            if len(shape) == 2
        }

        assert held(SMALL, formats) == expected

    def test_only_what_is_quantized_is_small_on_a_cpu(self) -> None:
        formats = {"model.embed_tokens.weight": WeightFormat("int8", 32)}

        assert held(SMALL, formats) == (2336 - 800) * 4 + 800 + 800 // 32 * 12

    def test_a_short_cache_needs_no_long_chunk(self) -> None:
        result = memory.estimate(
            SMALL,
            Precision.of("float32"),
            stored_bytes=0,
            tokenizer_file_bytes=0,
            batch_size=1,
            max_seq_len=16,
            prefill_tokens=512,
        )

        assert result.prefill_tokens == 16


def held(config: GemmaConfig, formats: Mapping[str, WeightFormat] | None = None) -> int:
    matrices = memory.packed_matrices(config, "float16", formats or {})
    return cpu_memory(matrices, vocab_size=100, tokenizer_file_bytes=0).weights_bytes


def peak(config: GemmaConfig, *, tokens: int, max_seq_len: int) -> int:
    return memory.activation_bytes(
        config, "float16", batch_size=2, tokens=tokens, max_seq_len=max_seq_len
    )
