"""How the attention kernels are cut for a device: block sizes, parts of the keys, grids, scratch.

Everything follows from shapes and the device's compute capability and number of multiprocessors;
nothing from lengths, which only the device knows. The numbers are chosen by arithmetic (shared memory,
registers, bytes in flight); no measurement on hardware has confirmed them yet.
"""

from dataclasses import dataclass
from typing import Final, Literal

from gemma_deploy.errors import RequestError

KernelDType = Literal["float16", "bfloat16"]
TileName = Literal["narrow", "wide"]

HEAD_DIMS: Final = range(16, 257, 8)
MAX_GROUP: Final = 64
COMBINE_BLOCK_H: Final = 64
COMBINE_BLOCK_PARTS: Final = 64
COMBINE_NUM_WARPS: Final = 4

# Dynamic shared memory that a block may use on each target (CUDA C++ programming guide, compute
# capabilities). Before 8.0 Triton has no tensor core instructions, and bfloat16 does not exist.
SHARED_LIMIT_BYTES: Final = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}

# No device has more today; bounds the scratch of an engine built without knowing its device.
_MAX_MULTIPROCESSORS: Final = 192
_MAX_PARTS: Final = 256
# Parts shorter than these cost more in scratch traffic than they gain: a wide tile's partial output
# is as large as hundreds of keys and values.
_MIN_PART_KEYS: Final[dict[TileName, int]] = {"narrow": 64, "wide": 512}
_WIDE_BLOCK_M: Final = 128
_GOOD_SHARE: Final = 0.9
_FLOAT32_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """What a kernel is compiled for; capacity, lengths and the op's attributes are run-time values.

    Attributes:
        head_dim: H.
        group: Query heads per KV head, N / K.
        dtype: Of query, caches and output.
        has_softcap: Whether scores are capped. One model caps all its layers or none.
    """

    head_dim: int
    group: int
    dtype: KernelDType
    has_softcap: bool

    def __post_init__(self) -> None:
        """Refuse shapes that the kernels do not cover.

        Raises:
            RequestError: head_dim or group is out of range.
        """
        if self.head_dim not in HEAD_DIMS:
            raise RequestError(
                f"the attention plugin takes a head_dim of {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} in "
                f"steps of {HEAD_DIMS.step}, not {self.head_dim}. Build with --attention native"
            )
        if not 1 <= self.group <= MAX_GROUP:
            raise RequestError(
                f"the attention plugin takes 1 to {MAX_GROUP} query heads per KV head, not "
                f"{self.group}. Build with --attention native"
            )

    @property
    def block_h(self) -> int:
        """H padded to a power of two, as Triton's tiles are."""
        return _power_of_two(self.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallShape:
    """The shapes of one call.

    Attributes:
        batch: B.
        num_tokens: S.
        num_kv_heads: K.
        capacity: T.
    """

    batch: int
    num_tokens: int
    num_kv_heads: int
    capacity: int

    @property
    def num_heads(self) -> int:
        """KV heads of all rows of the batch, B * K."""
        return self.batch * self.num_kv_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How `attend` is cut.

    Attributes:
        block_m: Rows (token * group + head in group) of a tile.
        block_n: Keys taken at a time.
        num_warps: Warps of a program.
        num_stages: Blocks of keys and values under way at a time.
        skips_masks: See the kernel.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    skips_masks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One call of attention, cut.

    Attributes:
        tile_name: The `attend` to launch.
        grid: Its grid: tiles, parts, B * K.
        combine_grid: Grid of `combine`; None where there is one part.
        lse_offset_bytes: Where partial_lse begins in the scratch; partial_output begins at 0.
        scratch_bytes: Scratch memory; 0 with one part.
    """

    tile_name: TileName
    grid: tuple[int, int, int]
    combine_grid: tuple[int, int, int] | None
    lse_offset_bytes: int
    scratch_bytes: int

    @property
    def num_parts(self) -> int:
        """Parts into which each tile's keys are cut."""
        return self.grid[1]


def choose_tile(name: TileName, shape: KernelShape, capability: int) -> Tile:
    """Return how to cut `attend` for a target.

    The narrow tile is for few rows (decode): as many as one token's group, padded to the 16 of a
    tensor core instruction. The wide one is for prefill.

    Args:
        name: Which of the two.
        shape: What it is compiled for.
        capability: Compute capability times 10, e.g. 89; a key of `SHARED_LIMIT_BYTES`.
    """
    is_large = SHARED_LIMIT_BYTES[capability] > 128 * 1024
    if name == "narrow":
        return Tile(
            block_m=narrow_block_m(shape.group),
            block_n=32 if shape.block_h > 128 else 64,
            num_warps=4,
            num_stages=3 if is_large else 2,
            skips_masks=False,
        )
    block_m, block_n, num_warps = _WIDE_BLOCK_M, 64, 8
    if shape.block_h > 128 and capability < 90:
        # The query stays in registers beside the accumulator, which 128 rows would not fit; two
        # programs of 4 warps share a multiprocessor where its memory holds them.
        block_m, block_n, num_warps = 64, 32, 4 if is_large else 8
    elif shape.block_h > 128 and not is_large:
        block_m, block_n = 64, 32
    return Tile(
        block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=2, skips_masks=True
    )


def narrow_block_m(group: int) -> int:
    """Return the rows of the narrow tile."""
    return max(16, _power_of_two(group))


def plan_launch(
    shape: KernelShape,
    call: CallShape,
    *,
    sliding_window: int,
    wide_block_m: int,
    num_multiprocessors: int,
) -> Launch:
    """Cut one call of attention: choose the tile, and into how many parts the keys are split.

    Args:
        shape: What the kernels are compiled for.
        call: The tensors' shapes.
        sliding_window: The op's attribute; 0 for none.
        wide_block_m: Rows of the wide tile of the kernels at hand.
        num_multiprocessors: Of the device.
    """
    num_rows = call.num_tokens * shape.group
    is_narrow = num_rows <= narrow_block_m(shape.group)
    num_tiles = 1 if is_narrow else _ceil_div(num_rows, wide_block_m)
    tile_name: TileName = "narrow" if is_narrow else "wide"
    max_keys = call.capacity
    if sliding_window:
        max_keys = min(max_keys, sliding_window + call.num_tokens)
    num_parts = _choose_parts(tile_name, num_tiles * call.num_heads, max_keys, num_multiprocessors)
    lse_bytes = call.num_heads * num_parts * num_rows * _FLOAT32_BYTES if num_parts > 1 else 0
    combine_grid = (num_rows, _ceil_div(shape.head_dim, COMBINE_BLOCK_H), call.num_heads)
    return Launch(
        tile_name=tile_name,
        grid=(num_tiles, num_parts, call.num_heads),
        combine_grid=combine_grid if num_parts > 1 else None,
        lse_offset_bytes=lse_bytes * shape.head_dim,
        scratch_bytes=lse_bytes * (shape.head_dim + 1),
    )


def max_scratch_bytes(shape: KernelShape, largest: CallShape) -> int:
    """Return what no call of up to these sizes, on any device, needs more scratch than.

    Args:
        shape: What the kernels are compiled for.
        largest: The largest B and S; K and T as they are.
    """
    max_parts = min(_MAX_PARTS, _ceil_div(largest.capacity, _MIN_PART_KEYS["narrow"]))
    num_rows = largest.num_tokens * shape.group
    narrow_m = narrow_block_m(shape.group)
    rows = min(_slots("narrow", _MAX_MULTIPROCESSORS), largest.num_heads * max_parts)
    rows *= min(num_rows, narrow_m)
    if num_rows > narrow_m:
        num_tiles = largest.num_heads * _ceil_div(num_rows, _WIDE_BLOCK_M // 2)
        programs = min(_slots("wide", _MAX_MULTIPROCESSORS), num_tiles * max_parts)
        rows = max(rows, programs * min(num_rows, _WIDE_BLOCK_M))
    return rows * (shape.head_dim + 1) * _FLOAT32_BYTES


def _slots(name: TileName, num_multiprocessors: int) -> int:
    """Return how many programs a call may be cut into to keep a device busy."""
    # Narrow tiles: two programs on a multiprocessor, where one computes while the other waits for
    # memory, and up to four waves of them. Wide ones fill a multiprocessor, and their scratch is
    # larger than what it would buy after the first wave.
    return num_multiprocessors * (8 if name == "narrow" else 1)


def _choose_parts(
    name: TileName, num_programs: int, max_keys: int, num_multiprocessors: int
) -> int:
    """Return the fewest parts that keep the device nearly as busy as any number of them.

    Programs run in waves of as many as fit; what counts is how full the waves are, the last one
    included. More parts than that would only add scratch traffic.
    """
    num_multiprocessors = min(num_multiprocessors, _MAX_MULTIPROCESSORS)
    wave = num_multiprocessors * (2 if name == "narrow" else 1)
    limit = min(
        _MAX_PARTS,
        _ceil_div(max_keys, _MIN_PART_KEYS[name]),
        max(1, _slots(name, num_multiprocessors) // num_programs),
    )
    fullness = []
    for num_parts in range(1, limit + 1):
        programs = num_programs * num_parts
        fullness.append(programs / (wave * _ceil_div(programs, wave)))
    goal = _GOOD_SHARE * max(fullness)
    return next(num_parts for num_parts, share in enumerate(fullness, 1) if share >= goal)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
