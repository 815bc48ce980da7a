"""Where an ONNX graph's external data lies: `check_external_data`."""

from pathlib import Path
from typing import Final

from gemma_deploy.errors import BundleError
from gemma_deploy.onnx_tensors import ExternalTensor, external_tensors
from gemma_deploy.safe_paths import safe_path

_MOST_DIGITS: Final = 19  # of 64 bits
_MOST_SHOWN: Final = 80


def check_external_data(folder: Path, graph: Path) -> None:
    """Refuse an ONNX graph that points at data outside the bundle or beyond a file's end.

    Raises:
        UnsafePathError: An external-data location that leaves the folder.
        BundleError: The graph is not ONNX, or a tensor lies outside its file.
    """
    try:
        tensors = list(external_tensors(graph.read_bytes()))
    except (ValueError, OSError) as err:
        raise BundleError(f"{graph} cannot be read as an ONNX model: {err}") from err
    for tensor in tensors:
        _check(tensor, folder, graph)


def _check(tensor: ExternalTensor, folder: Path, graph: Path) -> None:
    entries, name = tensor.entries, tensor.name[:_MOST_SHOWN]
    path = safe_path(folder, entries.get("location", ""), f"{graph.name} (tensor {name})")
    offset, length = entries.get("offset", "0"), entries.get("length", "0")
    if not _is_count(offset) or not _is_count(length):
        raise BundleError(
            f"{graph.name}: tensor {name} has offset {offset[:_MOST_SHOWN]!r} and length "
            f"{length[:_MOST_SHOWN]!r}, expected numbers of bytes: the bundle is damaged; export it "
            "again"
        )
    end, size = int(offset) + int(length), _size_bytes(path)
    if end > size:
        raise BundleError(
            f"{graph.name}: tensor {name} ends at byte {end:,} of {path.name}, which has {size:,} "
            "bytes: the bundle is damaged; export it again"
        )


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def _size_bytes(path: Path) -> int:
    """Return a file's size; 0 of what is none."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # a name that no file can have
        return 0
