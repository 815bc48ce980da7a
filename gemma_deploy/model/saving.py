"""A model, written as a checkpoint folder in Hugging Face layout."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from gemma_deploy.config import CONFIG_FILE, GemmaConfig
from gemma_deploy.errors import CheckpointError
from gemma_deploy.safetensors_files import SINGLE_FILE

_ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def save_checkpoint(model: nn.Module, config: GemmaConfig, folder: Path) -> None:
    """Write `model.safetensors` (shared parameters once) and `config.json`.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    parameters = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    dtype = next(iter(parameters.values())).dtype
    weights, raw_config = folder / SINGLE_FILE, folder / CONFIG_FILE
    text = json.dumps(hugging_face_config(config, dtype), indent=2, sort_keys=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(parameters, _beside(weights), metadata={"format": "pt"})
        _beside(raw_config).write_text(text + "\n", encoding="utf-8")
        _beside(weights).replace(weights)
        _beside(raw_config).replace(raw_config)
    except (OSError, SafetensorError) as err:
        _beside(weights).unlink(missing_ok=True)
        _beside(raw_config).unlink(missing_ok=True)
        raise CheckpointError(
            f"{folder} cannot be written: {err}. Choose a folder that is writable and has room"
        ) from err


def hugging_face_config(config: GemmaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the contents of a `config.json` that transformers' config classes read.

    Gemma 1 and 2 take one set of rotary parameters there, Gemma 3 one for each layer type.
    """
    raw = config.to_dict()
    raw["architectures"] = [_ARCHITECTURES[config.model_type]]
    raw["dtype"] = str(dtype).removeprefix("torch.")
    for rope in raw["rope_parameters"].values():
        if rope["rope_type"] == "default":
            # transformers warns of parameters that a rope type does not take.
            del rope["factor"]
    if config.model_type != "gemma3_text":
        raw["rope_parameters"] = next(iter(raw["rope_parameters"].values()))
    if config.model_type == "gemma":
        raw["hidden_act"] = raw.pop("hidden_activation")
    return raw


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
