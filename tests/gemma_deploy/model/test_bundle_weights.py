from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import BundleError
from gemma_deploy.exporters.weights import plan_cache_scales, plan_weights, write_weights
from gemma_deploy.graph_spec import Precision, cache_scale_names
from gemma_deploy.model import GemmaForCausalLM
from gemma_deploy.model.bundle_weights import load_bundle_model, load_cache_scales
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.residual_scaling import LayerScaling, ResidualScaling
from tests.rounding import MODEL_FLOAT32, assert_near

MATRIX = "model.layers.1.mlp.down_proj.weight"
SCALED = LayerScaling(value=2, attention=4, up=8, feed_forward=16)

Write = Callable[..., Any]


@pytest.fixture
def write(tmp_path: Path, tiny_checkpoint: Any) -> Write:
    """Return `write(name, formats={}, layer=LayerScaling(), residual=1)`: weights of a bundle."""

    def get(
        name: str,
        formats: dict[str, str] | None = None,
        layer: LayerScaling | None = None,
        residual: int = 1,
    ) -> Any:
        checkpoint = Checkpoint.open(tiny_checkpoint(name))
        config = checkpoint.config
        scaling = (
            None
            if layer is None
            else ResidualScaling.of(config, residual, (layer,) * config.num_hidden_layers)
        )
        parsed = {key: WeightFormat.parse(text) for key, text in (formats or {}).items()}
        plan = plan_weights(checkpoint, Precision.of("float32"), parsed, scaling)
        path = tmp_path / "weights.safetensors"
        write_weights(checkpoint, plan, path)
        manifest = SimpleNamespace(formats=parsed, scaling=scaling)
        return SimpleNamespace(
            config=config, weights_path=path, manifest=manifest, folder=checkpoint.folder
        )

    return get


@pytest.mark.parametrize("name", ["gemma1-mha-bias", "gemma1-untied", "gemma2", "gemma3"])
@pytest.mark.parametrize("layer", [None, SCALED])
def test_scaling_is_undone_exactly(name: str, layer: LayerScaling | None, write: Write) -> None:
    bundle = write(name, layer=layer, residual=32)

    model = load_bundle_model(bundle)

    expected = GemmaForCausalLM.from_pretrained(bundle.folder, dtype=torch.float32).state_dict()
    found = model.state_dict()
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        is_norm = key.endswith("norm.weight")
        assert torch.equal(found[key], tensor + 1.0 if is_norm else tensor), key
    assert not model.training


def test_the_model_computes_what_the_checkpoints_does(
    write: Write, oracle: Any, random_tokens: Any
) -> None:
    bundle = write("gemma3", layer=SCALED, residual=32)
    tokens = random_tokens(1, 24)

    with torch.inference_mode():
        found = load_bundle_model(bundle)(tokens, use_cache=False).logits
        expected = oracle(bundle.folder)(tokens).logits

    assert_near(found, expected, roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("scheme", ["int4/32", "int8/64", "int8/channel", "fp8/channel"])
def test_codes_are_multiplied_with_scales(scheme: str, write: Write) -> None:
    bundle = write("gemma1", {MATRIX: scheme}, SCALED, residual=32)

    found = dict(load_bundle_model(bundle).named_parameters())[MATRIX].detach().numpy()

    stored = {} if scheme.startswith("fp8") else load_file(bundle.weights_path)
    if scheme.startswith("fp8"):  # numpy has none
        from safetensors.torch import load_file as load_torch_file

        tensors = load_torch_file(bundle.weights_path)
        codes = tensors[MATRIX].float().numpy()
        scales = tensors[f"{MATRIX}.scales"].float().numpy()
    else:
        codes, scales = stored[MATRIX], stored[f"{MATRIX}.scales"].astype(np.float32)
    if scheme.startswith("int4"):
        nibbles = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), -1)
        codes = nibbles.astype(np.int8) - 16 * (nibbles > 7)
    divisor = (
        32 / SCALED.up
    )  # without post-norms: the residual's s, and the up projection's is back
    expected = codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1) * divisor
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_a_tied_head_stays_the_embedding(write: Write) -> None:
    model = load_bundle_model(write("gemma3", {"model.embed_tokens.weight": "int4/32"}))

    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_scales_of_a_cache_are_of_what_was_not_divided(write: Write) -> None:
    bundle = write("gemma3", layer=SCALED)
    shape = (bundle.config.num_key_value_heads, bundle.config.head_dim)
    scales = {
        name: torch.full(shape, 2.0 * layer + side)
        for layer in range(bundle.config.num_hidden_layers)
        for side, name in enumerate(cache_scale_names(layer), 1)
    }
    plan = plan_cache_scales(scales, bundle.manifest.scaling)
    write_weights(Checkpoint.open(bundle.folder), plan, bundle.weights_path, prepared=scales)

    stored = load_file(bundle.weights_path)
    assert float(stored[cache_scale_names(1)[0]][0, 0]) == 3
    assert float(stored[cache_scale_names(1)[1]][0, 0]) == 4 / SCALED.value
    for (key, value), layer in zip(load_cache_scales(bundle), range(100), strict=False):
        assert torch.equal(key, scales[cache_scale_names(layer)[0]])
        assert torch.equal(value, scales[cache_scale_names(layer)[1]])


def test_a_tensor_that_is_missing_is_told_of(write: Write) -> None:
    bundle = write("gemma3")
    bundle.manifest.formats = {MATRIX: WeightFormat.parse("int8/32")}

    with pytest.raises(BundleError, match=r"down_proj.weight cannot be read .* Export the bundle"):
        load_bundle_model(bundle)
