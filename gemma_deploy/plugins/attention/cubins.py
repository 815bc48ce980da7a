"""Compiled attention kernels as they travel in an engine: bytes, and the choice for a device."""

import functools
import hashlib
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

from gemma_deploy.errors import EngineError
from gemma_deploy.json_files import parse_json
from gemma_deploy.json_values import typed
from gemma_deploy.limits import MAX_KERNELS_BYTES
from gemma_deploy.plugins.attention.schedule import SHARED_LIMIT_BYTES, KernelShape

KernelName = Literal["narrow", "wide", "combine"]
KERNEL_NAMES: Final[tuple[KernelName, ...]] = ("narrow", "wide", "combine")

_MAGIC: Final = b"GDAK"
_FORMAT_VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sI32s")  # magic, format version, SHA-256 of what follows
_LENGTH: Final = struct.Struct("<I")
_TEGRA: Final = 87


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """One kernel for one target.

    Attributes:
        name: `narrow` and `wide` are `attend` in two tile sizes.
        capability: Compute capability times 10, e.g. 89.
        symbol: The function's name in the cubin.
        num_warps: A block has 32 times as many threads.
        shared_bytes: Dynamic shared memory of a block.
        block_m: Rows of a tile of `attend`; 0 for `combine`.
        cubin: The ELF image that the CUDA driver loads.
    """

    name: KernelName
    capability: int
    symbol: str
    num_warps: int
    shared_bytes: int
    block_m: int
    cubin: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    """A kernel as the archive lists it: a `CompiledKernel` with the length of its cubin."""

    name: KernelName
    capability: int
    symbol: str
    num_warps: int
    shared_bytes: int
    block_m: int
    cubin: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelArchive:
    """The kernels of one attention shape, for all targets of an engine.

    Attributes:
        shape: What they are compiled for.
        kernels: Every name for every target.
    """

    shape: KernelShape
    kernels: tuple[CompiledKernel, ...]

    @property
    def capabilities(self) -> tuple[int, ...]:
        """The targets, ascending."""
        return tuple(sorted({kernel.capability for kernel in self.kernels}))

    def for_device(self, capability: int) -> Mapping[KernelName, CompiledKernel]:
        """Return the kernels that run on a device, by name.

        Before 9.0 a cubin runs on its own minor version and later ones of the same major version, if
        they have the shared memory it takes, but never from or to Tegra (8.7); from 9.0 on Triton uses
        instructions that only the very architecture has (sm_90a).
        https://docs.nvidia.com/cuda/cuda-c-programming-guide/#binary-compatibility

        Args:
            capability: Of the device, times 10.

        Raises:
            EngineError: The engine holds none for this device.
        """
        fitting = [
            target
            for target in self.capabilities
            if _runs_on(target, capability)
            and self._shared_bytes(target) <= SHARED_LIMIT_BYTES.get(capability, 0)
        ]
        if not fitting:
            targets = ", ".join(map(dotted, self.capabilities))
            raise EngineError(
                f"the engine holds attention kernels for compute capability {targets}; this GPU is "
                f"{dotted(capability)}. Build the engine for it: "
                f"gemma-deploy build BUNDLE --compute-capability {dotted(capability)}"
            )
        best = max(fitting)
        return {kernel.name: kernel for kernel in self.kernels if kernel.capability == best}

    def _shared_bytes(self, target: int) -> int:
        return max(kernel.shared_bytes for kernel in self.kernels if kernel.capability == target)

    def to_bytes(self) -> bytes:
        """Return the archive as one compressed, checksummed string of bytes."""
        records = []
        for kernel in self.kernels:
            record = asdict(kernel)
            record["cubin"] = len(kernel.cubin)
            records.append(record)
        index = json.dumps({"shape": asdict(self.shape), "kernels": records}).encode()
        images = b"".join(kernel.cubin for kernel in self.kernels)
        payload = zlib.compress(_LENGTH.pack(len(index)) + index + images, 9)
        return _HEADER.pack(_MAGIC, _FORMAT_VERSION, hashlib.sha256(payload).digest()) + payload

    @classmethod
    def from_bytes(cls, data: bytes) -> "KernelArchive":
        """Read what `to_bytes` gave.

        Raises:
            EngineError: The bytes are damaged, or of another format version.
        """
        if len(data) < _HEADER.size or not data.startswith(_MAGIC):
            raise EngineError(
                "the engine's attention kernels are not in a format of gemma-deploy: the plan is "
                "damaged or was built by another program. Build the engine again"
            )
        _, version, digest = _HEADER.unpack_from(data)
        if version != _FORMAT_VERSION:
            raise EngineError(
                f"the engine's attention kernels are in format {version}; this gemma-deploy reads "
                f"format {_FORMAT_VERSION}. Build the engine again, or install the version of "
                "gemma-deploy that built it"
            )
        payload = data[_HEADER.size :]
        if hashlib.sha256(payload).digest() != digest:
            raise EngineError(
                "the engine's attention kernels are damaged: their checksum is wrong. Build the "
                "engine again"
            )
        try:
            return _unpack(_decompressed(payload))
        except (LookupError, TypeError, ValueError, struct.error, zlib.error) as err:
            raise EngineError(
                f"the engine's attention kernels are damaged ({err}). Build the engine again"
            ) from err


def dotted(capability: int) -> str:
    """Return a compute capability as people write it: 89 -> 8.9."""
    return f"{capability // 10}.{capability % 10}"


@functools.lru_cache(maxsize=8)
def read_archive(data: bytes) -> KernelArchive:
    """Read an archive once for all layers of an engine, which hold equal bytes.

    Raises:
        EngineError: See `KernelArchive.from_bytes`.
    """
    return KernelArchive.from_bytes(data)


def _runs_on(target: int, capability: int) -> bool:
    if target >= 90 or _TEGRA in {target, capability}:
        return target == capability
    return target // 10 == capability // 10 and target <= capability


def _decompressed(payload: bytes) -> bytes:
    unpacked = zlib.decompressobj()
    contents = unpacked.decompress(payload, MAX_KERNELS_BYTES)
    if not unpacked.eof:
        raise ValueError(
            f"unpacked they are cut off, or take more than {MAX_KERNELS_BYTES:,} bytes"
        )
    return contents


def _unpack(contents: bytes) -> KernelArchive:
    (index_bytes,) = _LENGTH.unpack_from(contents)
    index = parse_json(
        contents[_LENGTH.size : _LENGTH.size + index_bytes],
        "the list of the engine's attention kernels",
        error=EngineError,
        remedy="build the engine again",
    )
    return KernelArchive(
        shape=typed(KernelShape, index["shape"], "shape"),
        kernels=_kernels(index["kernels"], contents[_LENGTH.size + index_bytes :]),
    )


def _kernels(records: Sequence[dict[str, object]], images: bytes) -> tuple[CompiledKernel, ...]:
    kernels, offset = [], 0
    for record in records:
        listed: _Listed = typed(_Listed, record, "a kernel")
        cubin = images[offset : offset + listed.cubin]
        kernels.append(CompiledKernel(**{**asdict(listed), "cubin": cubin}))
        offset += listed.cubin
    return tuple(kernels)
