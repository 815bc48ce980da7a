"""Where the data of an ONNX graph's tensors lies, and whether it is all there: `check_tensor`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from gemma_deploy.errors import BundleError
from gemma_deploy.file_records import file_size_bytes
from gemma_deploy.limits import MAX_DIM, MAX_DIMS
from gemma_deploy.quoting import shortened
from gemma_deploy.safe_paths import safe_path

_EXTERNAL_KEYS: Final = frozenset({"location", "offset", "length", "checksum"})
# Bits of an element, by ONNX's number of the dtype; others are in no graph of ours.
_BITS: Final = MappingProxyType(
    {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 16: 16, 17: 8, 21: 4, 22: 4}
)


def check_tensor(folder: Path, graph: Path, weights: str, tensor: Any) -> None:
    """Refuse a TensorProto whose data is not all there, or not in the weights file.

    Raises:
        UnsafePathError: An external-data location that leaves the folder.
        BundleError: Any other place, other bytes than dtype and shape need, or a dtype or shape
            that no graph of gemma-deploy's has.
    """
    name = f"{graph.name}: tensor {shortened(tensor.name)}"
    bits = _BITS.get(tensor.data_type)
    if bits is None or not is_possible(tensor.dims):
        raise foreign(
            graph,
            f"tensor {shortened(tensor.name)} is of dtype {tensor.data_type} and shape "
            f"{shortened(list(tensor.dims[: MAX_DIMS + 1]))}",
        )
    need_bytes = -(-math.prod(tensor.dims) * bits // 8)
    if not tensor.external_data and not tensor.data_location:
        fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)
        raw_bytes = len(tensor.raw_data)
        most_bytes = raw_bytes or 8 * sum(map(len, fields))  # packed: less, by the dtype
        if need_bytes > most_bytes or (raw_bytes and need_bytes != raw_bytes):
            raise BundleError(
                f"{name} of shape {list(tensor.dims)} needs {need_bytes:,} bytes and holds "
                f"{'fewer' if need_bytes > most_bytes else 'more'}: the bundle is damaged; export it "
                "again"
            )
        return
    entry = {item.key: item.value for item in tensor.external_data}
    others = sorted(entry.keys() - _EXTERNAL_KEYS, key=repr)
    if others or len(entry) != len(tensor.external_data):
        raise foreign(
            graph,
            f"the external data of tensor {shortened(tensor.name)} says "
            + (shortened(others[0]) if others else "one thing twice"),
        )
    location = entry.get("location", "")
    path = safe_path(folder, location, f"{graph.name} (tensor {tensor.name})")
    offset = _byte_count(name, entry, "offset", 0)
    end = offset + max(need_bytes, _byte_count(name, entry, "length", need_bytes))
    size = file_size_bytes(path) or 0
    if end > size:
        raise BundleError(
            f"{name} ends at byte {end:,} of {shortened(path.name)}, which has {size:,} bytes: the "
            "bundle is damaged; export it again"
        )
    if "length" in entry and int(entry["length"]) != need_bytes:
        raise BundleError(
            f"{name} of shape {list(tensor.dims)} has {int(entry['length']):,} bytes; expected "
            f"{need_bytes:,}: the bundle is damaged; export it again"
        )
    # Some names mean something else to ONNX Runtime: one is that of the process's own memory.
    if location != weights or offset % (bits // 8 or 1):
        raise foreign(
            graph,
            f"tensor {shortened(tensor.name)} lies at byte {offset:,} of {shortened(location)}, "
            f"expected in {weights} at a whole element",
        )


def _byte_count(name: str, entry: Mapping[str, str | bytes], key: str, default: int) -> int:
    text = entry.get(key, str(default))
    # What is not UTF-8 in a graph is bytes.
    is_text = isinstance(text, str) and text.isascii() and text.isdecimal()
    if not is_text or len(text) > len(str(1 << 63)):
        raise BundleError(
            f"{name} has {key} {shortened(text)}, expected a number of bytes: the bundle is damaged; "
            "export it again"
        )
    return int(text)


def foreign(graph: Path, what: str) -> BundleError:
    """Return the error for a graph with something that no export writes."""
    return BundleError(
        f"{graph}: {what}: gemma-deploy has not written this graph, and it is not run; export the "
        "checkpoint again"
    )


def is_possible(dims: Sequence[int]) -> bool:
    """Tell whether a tensor can be of these sizes, so that multiplying them is quick."""
    return len(dims) <= MAX_DIMS and all(0 <= size <= MAX_DIM for size in dims)
