"""Shared fixtures: tiny random checkpoints of every generation, written by transformers itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

pytest_plugins = ["tests.hang_watch"]


@dataclass(frozen=True)
class TinyModel:
    """What a tiny checkpoint is: a transformers config class and what it is given."""

    config_class: str
    model_class: str
    values: dict[str, Any]


_COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
_GEMMA_1 = ("GemmaConfig", "GemmaForCausalLM")
_GEMMA_2 = ("Gemma2Config", "Gemma2ForCausalLM")
_GEMMA_3 = ("Gemma3TextConfig", "Gemma3ForCausalLM")
_GEMMA_3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _heads(query: int, key_value: int, size: int) -> dict[str, int]:
    return {
        "num_attention_heads": query,
        "num_key_value_heads": key_value,
        "head_dim": size,
    }


TINY_MODELS = {
    # Multi-query; q width 4 * 64 unlike hidden.
    "gemma1": TinyModel(*_GEMMA_1, _COMMON | _heads(4, 1, 64)),
    # Multi-head with biases; q width equal to hidden.
    "gemma1-mha-bias": TinyModel(*_GEMMA_1, _COMMON | _heads(4, 4, 16) | {"attention_bias": True}),
    "gemma1-h256": TinyModel(*_GEMMA_1, _COMMON | _heads(2, 1, 256)),
    "gemma1-untied": TinyModel(
        *_GEMMA_1, _COMMON | _heads(4, 2, 64) | {"tie_word_embeddings": False}
    ),
    # Caps low enough to bite; scale unlike head_dim.
    "gemma2": TinyModel(
        *_GEMMA_2,
        _COMMON
        | _heads(4, 2, 64)
        | {"sliding_window": 8, "query_pre_attn_scalar": 32}
        | {"attn_logit_softcapping": 10.0, "final_logit_softcapping": 4.0},
    ),
    "gemma2-h256": TinyModel(
        *_GEMMA_2,
        _COMMON
        | _heads(2, 2, 256)
        | {"sliding_window": 16, "attn_logit_softcapping": 10.0, "final_logit_softcapping": 4.0},
    ),
    # Two local layers to one global; both rotary bases, linear scaling on the global one.
    "gemma3": TinyModel(
        *_GEMMA_3,
        _COMMON
        | _heads(4, 1, 64)
        | {"sliding_window": 8, "rope_parameters": _GEMMA_3_ROPE}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3-h16": TinyModel(
        *_GEMMA_3,
        _COMMON | _heads(4, 4, 16) | {"layer_types": ["full_attention"] * 3},
    ),
    "gemma3-h256": TinyModel(
        *_GEMMA_3,
        _COMMON
        | _heads(2, 1, 256)
        | {"sliding_window": 16}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
}


class TinyCheckpoints(Protocol):
    """Writes a tiny checkpoint on first use; later calls return the same folder: do not change it."""

    def __call__(self, name: str, dtype: str = "float32") -> Path: ...


class TinyBundles(Protocol):
    """Exports a tiny checkpoint on first use; later calls return the same folder: do not change it.

    Bundles have the graphs of every lowering that their dtype allows.
    """

    def __call__(self, name: str, dtype: str = "float32") -> Path: ...


class Oracle(Protocol):
    """Loads a folder with transformers, in evaluation mode."""

    def __call__(
        self, folder: Path, *, dtype: str = "float32", attn_implementation: str = "eager"
    ) -> Any: ...


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    """Return `tiny_checkpoint(name, dtype="float32") -> folder`; names are keys of `TINY_MODELS`.

    The models are inflated: their greedy text is diverse, so that parity means something.
    """
    folders: dict[tuple[str, str], Path] = {}

    def get(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in folders:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
            _write_tiny_checkpoint(TINY_MODELS[name], folder, dtype)
            folders[name, dtype] = folder
        return folders[name, dtype]

    return get


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_checkpoint: TinyCheckpoints, tmp_path_factory: pytest.TempPathFactory
) -> TinyBundles:
    """Return `tiny_bundle(name, dtype="float32") -> folder`: tiny checkpoints, exported."""
    folders: dict[tuple[str, str], Path] = {}

    def get(name: str, dtype: str = "float32") -> Path:
        from gemma_deploy.exporters.export import export_checkpoint

        if (name, dtype) not in folders:
            folder = tmp_path_factory.mktemp("bundles") / f"{name}-{dtype}"
            graphs = ["portable"] if dtype == "float32" else ["portable", "tensorrt"]
            export_checkpoint(tiny_checkpoint(name), folder, dtype=dtype, graphs=graphs)  # type: ignore[arg-type]  # tests name dtypes and graphs that exist
            folders[name, dtype] = folder
        return folders[name, dtype]

    return get


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """Return `oracle(folder, dtype=..., attn_implementation="eager") -> transformers model`.

    Models are loaded once for each set of arguments and shared: do not change them.
    """
    models: dict[tuple[Path, str, str], Any] = {}

    def get(folder: Path, *, dtype: str = "float32", attn_implementation: str = "eager") -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        key = (folder, dtype, attn_implementation)
        if key not in models:
            # from_pretrained leaves the model in evaluation mode.
            models[key] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
            )
        return models[key]

    return get


@pytest.fixture
def random_tokens() -> Callable[..., Any]:
    """Return `random_tokens(batch, length, seed=0)`: int64 ids that skip special tokens."""

    def draw(batch: int, length: int, seed: int = 0) -> Any:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(8, _COMMON["vocab_size"], (batch, length), generator=generator)

    return draw


def _write_tiny_checkpoint(tiny: TinyModel, folder: Path, dtype: str) -> None:
    import torch
    import transformers

    config = getattr(transformers, tiny.config_class)(**tiny.values)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, tiny.model_class)(config)
        _inflate(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def _inflate(model: Any) -> None:
    """Make every part matter: a freshly initialized tied model only repeats its last token.

    The gains are found by trial: greedy text is diverse, softcaps bite, attention is sharp.
    """
    import torch

    has_post_norms = any("post_feedforward" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.5)
                if "q_norm" in name or "k_norm" in name:
                    parameter.add_(1)
                elif has_post_norms and "post_" in name:
                    # Post-norms set how much a layer adds, against the embedding of the last token.
                    parameter.add_(10)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.mul_(5 if "embed" in name or "lm_head" in name else 15)
