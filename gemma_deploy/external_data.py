"""Where an ONNX graph's external data lies: `check_external_data`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from gemma_deploy.errors import BundleError
from gemma_deploy.file_records import file_size_bytes
from gemma_deploy.limits import MAX_GRAPH_BYTES
from gemma_deploy.quoting import shortened
from gemma_deploy.safe_paths import safe_path

_MAX_DIGITS: Final = 19  # of 64 bits


def check_external_data(folder: Path, graph: Path) -> None:
    """Refuse an ONNX graph that points at data outside the bundle or beyond a file's end.

    Raises:
        UnsafePathError: An external-data location that leaves the folder.
        BundleError: The graph is not ONNX, or a tensor lies outside its file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if (file_size_bytes(graph) or 0) > MAX_GRAPH_BYTES:
        raise BundleError(
            f"{graph} is larger than {MAX_GRAPH_BYTES:,} bytes, which no graph without its weights "
            "needs: the bundle is damaged; export it again"
        )
    try:
        model = onnx.load(graph, load_external_data=False)
    except (DecodeError, OSError) as err:
        raise BundleError(f"{graph} cannot be read as an ONNX model: {err}") from err
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        path = safe_path(folder, entry.get("location", ""), f"{graph.name} (tensor {tensor.name})")
        offset, length = entry.get("offset", "0"), entry.get("length", "0")
        if not _is_number(offset) or not _is_number(length):
            raise BundleError(
                f"{graph.name}: tensor {tensor.name} has offset {shortened(offset)} and length "
                f"{shortened(length)}, expected numbers of bytes: the bundle is damaged; export it again"
            )
        end = int(offset) + int(length)
        size = file_size_bytes(path) or 0
        if end > size:
            raise BundleError(
                f"{graph.name}: tensor {tensor.name} ends at byte {end:,} of {path.name}, which has "
                f"{size:,} bytes: the bundle is damaged; export it again"
            )


def _is_number(value: str | bytes) -> bool:
    """Tell whether a text is a number of 64 bits; it is bytes where it is not UTF-8."""
    return isinstance(value, str) and value.isdecimal() and len(value) <= _MAX_DIGITS


def _tensors(message: Any) -> Iterator[Any]:
    """Yield every TensorProto of an ONNX message: of graphs, subgraphs, attributes and functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(child)
