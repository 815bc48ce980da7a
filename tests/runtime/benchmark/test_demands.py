import dataclasses
from typing import Any

import pytest

from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.runtime.benchmark.demands import demands_of
from gemma_deploy.runtime.source import ModelSource

# Of the tiny Gemma 1, by hand: D 64, F 128, N*H 256, K*H 64, V 512, 3 layers.
LAYER = 64 * 256 + 2 * 64 * 64 + 256 * 64 + 3 * 64 * 128
HEAD = 512 * 64
CACHE = 3 * 2 * 64 * 4


def test_a_dense_bundle(text_bundle: Any) -> None:
    source = ModelSource.open(text_bundle("gemma1"))
    found = demands_of(source, "onnxruntime", "cpu")
    assert found.weights_bytes_per_step == 4 * (3 * LAYER + HEAD)
    assert found.flop_per_token == 2 * 3 * LAYER  # the head is needed once
    assert (found.cache_bytes_per_token, found.window_tokens) == (CACHE, 0)
    assert found.weight_format == WeightFormat("float32")


@pytest.mark.parametrize(
    ("text", "packed_bits", "stored_bits"),
    [
        ("int4/32", 6, 4.5),
        ("int4/64", 5, 4.25),
        ("int4/128", 4.5, 4.125),
        ("int4/256", 4.25, 4.0625),
        ("int8/64", 9, 8.25),
        ("fp8/64", 32, 8.25),
        ("nf4/64", 4.25, 4.25),
    ],
)
def test_what_onnx_runtime_packs(
    text: str, packed_bits: float, stored_bits: float, text_bundle: Any
) -> None:
    source = ModelSource.open(text_bundle("gemma1"))
    assert source.bundle is not None
    matrices = [name for name, shape in expected_tensors(source.config).items() if len(shape) == 2]
    # Rows of 64 are not divided by 128 or 256, but only the export minds.
    weight_format = WeightFormat.parse(text)
    manifest = dataclasses.replace(
        source.bundle.manifest, formats=dict.fromkeys(matrices, weight_format)
    )
    quantized = dataclasses.replace(
        source, bundle=dataclasses.replace(source.bundle, manifest=manifest)
    )
    packed = demands_of(quantized, "onnxruntime", "cpu")
    assert packed.weight_format == weight_format
    assert packed.weights_bytes_per_step == (3 * LAYER + HEAD) * packed_bits / 8
    if weight_format.block_size not in (128, 256):
        # On a GPU scales are float16 as stored, and there are no sums.
        stored = demands_of(quantized, "onnxruntime", "cuda")
        assert stored.weights_bytes_per_step == (3 * LAYER + HEAD) * stored_bits / 8


def test_an_untied_embedding_is_not_read(text_checkpoint: Any) -> None:
    tied, untied = (
        demands_of(ModelSource.open(text_checkpoint(name)), "torch", "cpu")
        for name in ("gemma1", "gemma1-untied")
    )
    kv_heads = 3 * 2 * 64 * 64  # the untied one has a key and value head more
    assert untied.weights_bytes_per_step - tied.weights_bytes_per_step == 4 * kv_heads


def test_sliding_layers_are_counted_apart(text_checkpoint: Any) -> None:
    source = ModelSource.open(text_checkpoint("gemma3"))
    found = demands_of(source, "torch", "cpu")
    config = source.config
    sliding = sum(config.window_of(i) is not None for i in range(config.num_hidden_layers))
    per_layer = 2 * config.num_key_value_heads * config.head_dim * 4
    assert 0 < sliding < config.num_hidden_layers
    assert found.window_tokens == config.sliding_window
    assert found.window_bytes_per_token == sliding * per_layer
    assert found.cache_bytes_per_token == (config.num_hidden_layers - sliding) * per_layer
