"""Prepacked weights moved to where ONNX Runtime reads them as they were written: `align_blobs`."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from gemma_deploy.errors import SessionError

# A page: every alignment that a kernel may ask for divides it, and it is what files are mapped by.
ALIGNMENT_BYTES: Final = 4096
_BLOCK_BYTES: Final = 64 << 20
_PREPACKED: Final = "prepacked_"


def align_blobs(model_file: Path, data: Path) -> None:
    """Move each tensor and blob in the external data of a saved model to a multiple of a page, in place.

    ONNX Runtime 1.31 writes one behind the other. The kernels' packed buffers begin at the first
    multiple of 64 bytes inside the memory they are given: mapped at another alignment than they were
    packed at, a blob is read shifted, and the logits are wrong without an error.

    The `prepacked_N` entries of a tensor's external data read
    `OPERATOR+HASH|offset;length;FLAG[|offset;length;FLAG...]`.

    Args:
        model_file: A model that ONNX Runtime saved, its tensors' data in one file.
        data: That file; it grows by at most a page for each tensor and blob.

    Raises:
        SessionError: The file is not as described: another version of ONNX Runtime may write others.
        OSError: The files cannot be read or written.
    """
    import onnx

    model = onnx.load(model_file, load_external_data=False)
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    try:
        places = sorted({place for tensor in tensors for place in _places(tensor)})
    except (LookupError, ValueError) as err:
        raise SessionError(f"{model_file} has external data of an unknown form: {err}") from err
    moved = _new_offsets(places, data)
    with data.open("r+b") as file:
        for offset, length in reversed(places):
            _move(file, offset, moved[offset], length)
    for tensor in tensors:
        _point_at(tensor, moved)
    model_file.write_bytes(model.SerializeToString())


def _places(tensor: Any) -> Iterator[tuple[int, int]]:
    """Yield offset and length of a tensor's bytes and of its blobs."""
    entries = {item.key: item.value for item in tensor.external_data}
    yield int(entries["offset"]), int(entries["length"])
    for key, value in entries.items():
        if key.startswith(_PREPACKED):
            for blob in value.split("|")[1:]:
                offset, length, _flag = blob.split(";")
                yield int(offset), int(length)


def _new_offsets(places: Iterable[tuple[int, int]], data: Path) -> dict[int, int]:
    """Return where each place goes: in the same order, never towards the beginning.

    Raises:
        SessionError: Places overlap or leave the file.
    """
    size = data.stat().st_size
    moved: dict[int, int] = {}
    end = new_end = 0
    for offset, length in places:
        if offset < end or offset + length > size:
            raise SessionError(
                f"{data} has {length:,} bytes at {offset:,}; expected them behind {end:,} and within "
                f"{size:,}"
            )
        end = offset + length
        moved[offset] = -(-max(offset, new_end) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        new_end = moved[offset] + length
    return moved


def _move(file: IO[bytes], offset: int, new_offset: int, length: int) -> None:
    """Move bytes towards the end of the file, block by block from their end: places may overlap."""
    if new_offset == offset:
        return
    for start in reversed(range(0, length, _BLOCK_BYTES)):
        file.seek(offset + start)
        block = file.read(min(_BLOCK_BYTES, length - start))
        file.seek(new_offset + start)
        file.write(block)


def _point_at(tensor: Any, moved: Mapping[int, int]) -> None:
    for item in tensor.external_data:
        if item.key == "offset":
            item.value = str(moved[int(item.value)])
        elif item.key.startswith(_PREPACKED):
            operator, *blobs = item.value.split("|")
            parts = [blob.split(";", 1) for blob in blobs]
            new = [f"{moved[int(offset)]};{rest}" for offset, rest in parts]
            item.value = "|".join([operator, *new])
