"""Checkpoints whose activations float16 cannot hold."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

INFLATED = ("gemma1", "gemma1-mha-bias", "gemma2", "gemma3")
"""Tiny models that `inflated_checkpoint` is meant for: every generation, and biases."""


@pytest.fixture(scope="session")
def inflated_checkpoint(
    tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return `inflated_checkpoint(name) -> folder`: residual stream and sub-layers pass 65504.

    As in real checkpoints: large weights inside the feed-forward and behind the values, and, where
    they are, large post-norms. Queries and keys, which no scale helps, are left alone.
    """

    @functools.cache
    def get(name: str) -> Path:
        from safetensors.torch import load_file, save_file

        folder = tmp_path_factory.mktemp(f"inflated-{name}")
        shutil.copytree(tiny_checkpoint(name), folder, dirs_exist_ok=True)
        tensors: dict[str, Any] = load_file(folder / "model.safetensors")
        for key, weight in tensors.items():
            tensors[key] = _inflated(key, weight, not name.startswith("gemma1"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return get


def _inflated(name: str, weight: Any, has_post_norms: bool) -> Any:
    part = name.split(".")[-2]
    # Post-norms take a sub-layer's size out of it, so that without them much less is enough.
    factors = {"v_proj": 8.0, "o_proj": 4.0, "up_proj": 300.0, "down_proj": 8.0}
    if has_post_norms:
        factors = {"v_proj": 64.0, "o_proj": 400.0, "up_proj": 3000.0, "down_proj": 40.0}
    factor = factors.get(part, 1.0)
    if name.startswith("model.layers.1.") and part in ("v_proj", "up_proj"):
        factor *= 200.0 if has_post_norms else 6.0  # layers differ, and so should their scales
    if has_post_norms and part.startswith("post_"):
        factor = 2000.0
    return weight * factor


class _ScaledModels(Protocol):
    def __call__(self, folder: Path, scaling: Any, dtype: str) -> Any: ...


@pytest.fixture(scope="session")
def scaled_model() -> _ScaledModels:
    """Return `scaled_model(folder, scaling, dtype)`: the eager model as exported graphs hold it."""

    @functools.cache
    def get(folder: Path, scaling: Any, dtype: str) -> Any:
        import torch
        from safetensors.torch import load_file
        from torch import nn

        from gemma_deploy.config import GemmaConfig
        from gemma_deploy.exporters.graph_modules import meta_model

        model = meta_model(GemmaConfig.from_file(folder), getattr(torch, dtype), scaling)
        tensors = load_file(folder / "model.safetensors")
        for path, module in model.named_modules():
            for part, parameter in list(module.named_parameters(recurse=False)):
                name = f"{path}.{part}"
                if path.endswith("norm"):
                    value = (tensors[name] + 1) / scaling.norm_divisor(name)
                else:
                    source = name if name in tensors else "model.embed_tokens.weight"
                    value = tensors[source] / scaling.weight_divisor(name)
                setattr(module, part, nn.Parameter(value.to(parameter.dtype)))
        return model

    return get
