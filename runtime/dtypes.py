"""The dtype that a model is loaded in, or has already."""

from gemma_deploy.errors import RequestError
from gemma_deploy.graph_spec import DTYPE_BYTES, DType
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.source import ModelSource


def dtype_name(dtype: object) -> DType | None:
    """Return the name of a dtype; None for None and `auto`, a model's own.

    Args:
        dtype: `float32`, `float16` or `bfloat16`, perhaps with `torch.` before it, or torch's object of
            that name.

    Raises:
        RequestError: Anything else.
    """
    is_torch = type(dtype).__module__ == "torch"  # not imported here
    name = str(dtype).removeprefix("torch.") if is_torch or isinstance(dtype, str) else None
    if dtype is None or name == "auto":
        return None
    if name not in DTYPE_BYTES:
        raise RequestError(
            f"dtype is {shortened(dtype)}; expected {', '.join(DTYPE_BYTES)}, or auto"
        )
    return name


def check_dtype(source: ModelSource, dtype: DType | None) -> None:
    """Refuse a dtype that a bundle or an engine neither stores its weights nor computes in.

    Raises:
        RequestError: Saying what the folder has, and how to make one that has the dtype.
    """
    if source.bundle is not None:
        precision = source.bundle.manifest.precision
        stored, computed = precision.weights, precision.activations
    elif source.engine is not None:
        stored = computed = source.engine.manifest.cache_dtype
    else:
        return
    if dtype not in (None, stored, computed):
        raise RequestError(
            f"dtype is {dtype}, but {source.folder} stores its weights in {stored} and computes in "
            f"{computed}: leave dtype out, or export the checkpoint again with dtype {dtype}"
        )
