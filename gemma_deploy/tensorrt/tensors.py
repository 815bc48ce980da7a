"""What TensorRT calls element types, and where it wants tensors to begin."""

from collections.abc import Mapping
from typing import Final

ALIGNMENT_BYTES: Final = 256
"""What TensorRT expects of a tensor's address, and what the CUDA driver aligns memory to."""

DTYPE_NAMES: Final[Mapping[str, str]] = {
    "int64": "INT64",
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
}
"""Names in TensorRT's `DataType` of the element types of `TensorSpec`."""
