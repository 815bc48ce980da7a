"""A checkpoint's weights, read straight into a model's parameters."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT
from gemma_deploy.config import GemmaConfig

ModelT = TypeVar("ModelT", bound=nn.Module)

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that the checkpoint's embedding is stored in."""
    return _TORCH_DTYPES[checkpoint.tensors[EMBEDDING_WEIGHT].dtype]


def load_model(
    build: Callable[[GemmaConfig], ModelT],
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    prefix: str = "",
) -> ModelT:
    """Build a model of a checkpoint without weights, then read them into its parameters.

    Args:
        build: Makes the model of a config; called with `meta` as the default device.
        checkpoint: Opened checkpoint.
        dtype: Of the parameters; None for the dtype the embedding is stored in.
        device: Of the parameters.
        prefix: What the checkpoint's names have in front of the model's parameter names.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: If weights cannot be read, or the checkpoint changed meanwhile.
    """
    with torch.device("meta"):
        model = build(checkpoint.config)
    dtype = dtype or stored_dtype(checkpoint)
    load_parameters(model, checkpoint, dtype=dtype, device=torch.device(device), prefix=prefix)
    return model.eval()


def load_parameters(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    prefix: str = "",
) -> None:
    """Give a model that was built on `meta` memory, and fill it.

    Peak memory is the model's plus one block of rows where dtype or device differ.

    Args:
        model: Its parameter names, behind `prefix`, are the checkpoint's canonical names;
            parameters that are one object stay one.
        checkpoint: Opened checkpoint.
        dtype: Of the parameters.
        device: Of the parameters.
        prefix: See `load_model`.

    Raises:
        CheckpointError: If weights cannot be read, or the checkpoint changed meanwhile.
    """
    materialized: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in materialized:
                data = torch.empty(parameter.shape, dtype=dtype, device=device)
                _fill(
                    data,
                    checkpoint,
                    f"{prefix}{module_name}.{name}" if module_name else prefix + name,
                )
                materialized[id(parameter)] = nn.Parameter(data)
            setattr(module, name, materialized[id(parameter)])
    checkpoint.check_unchanged("its weights were being read")


def _fill(data: Tensor, checkpoint: Checkpoint, name: str) -> None:
    source_dtype = _TORCH_DTYPES[checkpoint.tensors[name].dtype]
    is_direct = data.dtype == source_dtype and data.device.type == "cpu"
    for start, stop in checkpoint.row_blocks(name):
        rows = data[start:stop]
        block = rows if is_direct else torch.empty(rows.shape, dtype=source_dtype)
        checkpoint.read_rows(name, start, stop, _bytes_of(block))
        if not is_direct:
            rows.copy_(block)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    # Through integers: numpy has no bfloat16.
    flat = tensor.reshape(math.prod(tensor.shape)).view(torch.uint8)
    return flat.numpy().data
