"""Time the attention kernels on a GPU against torch's, as shares of what the card can do.

Decode reads every valid key and value once, so it is measured against the card's copy bandwidth;
prefill does 4 * H multiplications and additions for each query head and visible pair, so it is
measured against the card's matrix rate. Both limits are measured here, on large torch tensors. Rivals
are each backend of torch's scaled_dot_product_attention and the op's eager path; each gets what suits
it best (slices of exactly the valid keys, no mask where it needs none), and what one refuses, or has
no memory for, is said. Methods take turns, a round each; medians and quartiles are shown.

The kernels have not run on hardware yet. The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemma_deploy.ops.attention_kernels import are_supported, attend_on_gpu

HEADS = {"mqa 8:1": (8, 1), "gqa 16:8": (16, 8)}
HEAD_DIM = 256
LENGTHS = (128, 512, 2048, 8192, 32768)
BATCHES = (1, 8, 64)
OURS = "gemma-deploy"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
MAX_DECODE_TOKENS = 1 << 20  # batch * length: 1 GB of keys and values with one KV head
MAX_PREFILL_TOKENS = 1 << 16
MEMORY_SHARE = 0.8
# Goals, on an H200: decode once keys and values exceed 256 MB; prefill against the best backend.
GOAL_BYTES, GOAL_COPY_SHARE, GOAL_PREFILL_RATIO = 256 << 20, 0.8, 0.9


@dataclass(frozen=True)
class Case:
    """One measurement's shapes; `length` is the valid length, this step included."""

    phase: str
    heads: str
    batch: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a row in this step."""
        return 1 if self.phase == "decode" else self.length

    @property
    def cache_bytes(self) -> int:
        """Valid keys and values, in 16 bits."""
        return 2 * 2 * self.batch * HEADS[self.heads][1] * self.length * HEAD_DIM

    @property
    def work(self) -> float:
        """Bytes to read (decode), or floating-point operations to do (prefill)."""
        if self.phase == "decode":
            return self.cache_bytes
        pairs = self.length * (self.length + 1) / 2
        return 4 * HEAD_DIM * HEADS[self.heads][0] * self.batch * pairs

    @property
    def memory_bytes(self) -> int:
        """Caches, and queries and outputs, of the cheapest method."""
        queries = 2 * self.batch * self.num_tokens * HEADS[self.heads][0] * HEAD_DIM
        return self.cache_bytes + 2 * queries

    def __str__(self) -> str:
        return f"{self.phase:8} {self.heads:9} B {self.batch:<3} length {self.length:<6}"


@dataclass(frozen=True)
class Reading:
    """One method on one case: milliseconds, and the share of the card's limit at the median."""

    phase: str
    heads: str
    batch: int
    length: int
    method: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    limit_share: float


class Timer:
    """Times functions by CUDA events, with the last-level cache emptied in between."""

    def __init__(self) -> None:
        """Set aside what is written to empty the cache."""
        cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(2 * cache_bytes, 1 << 28), dtype=torch.int8, device="cuda")

    def time_ms(self, function: Callable[[], object]) -> float:
        """Return the time of one call, in milliseconds."""
        new_event: Any = torch.cuda.Event  # torch gives these two no types
        sleep_cycles: Any = torch.cuda._sleep
        start, end = (new_event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        # Launches queue up behind this, so that the time of launching does not count.
        sleep_cycles(2_000_000)
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def median_ms(self, function: Callable[[], object], rounds: int) -> float:
        """Return the median of several calls, after one to warm up."""
        function()
        return statistics.median(self.time_ms(function) for _ in range(rounds))


@dataclass(frozen=True)
class Limits:
    """What the card does at best: bytes moved, and operations done, per millisecond."""

    copied_bytes: float
    matrix_flops: float

    @classmethod
    def measure(cls, timer: Timer, dtype: torch.dtype, rounds: int) -> "Limits":
        """Copy 1 GB, and multiply square matrices of 8192."""
        source = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        copy_ms = timer.median_ms(lambda: target.copy_(source), rounds)
        size = 8192
        left, right = torch.randn(2, size, size, device="cuda").to(dtype)
        matrix_ms = timer.median_ms(lambda: left @ right, rounds)
        return cls(2 * source.numel() / copy_ms, 2 * size**3 / matrix_ms)

    def of(self, case: Case) -> float:
        """Return the limit that counts for a case."""
        return self.copied_bytes if case.phase == "decode" else self.matrix_flops


def cases(phases: Sequence[str], lengths: Sequence[int], batches: Sequence[int]) -> Iterator[Case]:
    """Yield every case that is neither endless nor too large for the card; say which are not."""
    free_bytes, _ = torch.cuda.mem_get_info()
    for phase in phases:
        most = MAX_DECODE_TOKENS if phase == "decode" else MAX_PREFILL_TOKENS
        for heads in HEADS:
            for batch in batches:
                for length in lengths:
                    case = Case(phase, heads, batch, length)
                    if batch * length > most:
                        print(f"{case} left out: over {most} tokens", file=sys.stderr)
                    elif case.memory_bytes > MEMORY_SHARE * free_bytes:
                        print(
                            f"{case} left out: takes {case.memory_bytes / 1e9:.1f} GB, "
                            f"{free_bytes / 1e9:.1f} GB are free",
                            file=sys.stderr,
                        )
                    else:
                        yield case


def methods(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Return every method on one case's tensors; the first is ours."""
    num_heads, num_kv_heads = HEADS[case.heads]
    query = torch.randn(case.batch, case.num_tokens, num_heads, HEAD_DIM, device="cuda").to(dtype)
    shape = (case.batch, num_kv_heads, case.length, HEAD_DIM)
    keys, values = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    input_pos = torch.full((case.batch,), case.length - case.num_tokens, device="cuda")
    scale = HEAD_DIM**-0.5
    if not are_supported(query, keys):
        raise SystemExit(f"the kernels do not support {torch.cuda.get_device_name()} in {dtype}")

    def sdpa(backend: SDPBackend, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            if case.phase == "decode":
                # The heads of a group become tokens: keys are read once, and no backend has to
                # know about groups.
                packed = query.view(case.batch, num_kv_heads, -1, HEAD_DIM)
                output = F.scaled_dot_product_attention(packed, keys, values, scale=scale)
                return output.reshape(query.shape)
            tokens_last = query.transpose(1, 2)
            output = F.scaled_dot_product_attention(
                tokens_last, keys, values, is_causal=True, scale=scale, enable_gqa=True
            )
            return output.transpose(1, 2)

    def eager() -> Tensor:
        grouped = query.transpose(1, 2).reshape(
            case.batch, num_kv_heads, -1, case.num_tokens, HEAD_DIM
        )
        scores = (grouped @ keys[:, :, None].transpose(-1, -2)).float() * scale
        if case.num_tokens > 1:
            ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda")
            scores = scores.masked_fill(~ones.tril(), -torch.inf)
        output = torch.softmax(scores, -1).to(dtype) @ values[:, :, None]
        return output.flatten(1, 2).transpose(1, 2)

    found: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: attend_on_gpu(query, keys, values, input_pos, scale, 0.0, 0)
    }
    for name, backend in BACKENDS.items():
        caches = [keys, values]
        if case.phase == "prefill" and backend == SDPBackend.EFFICIENT_ATTENTION:
            # It knows no groups; the copies are made beforehand.
            caches = [x.repeat_interleave(num_heads // num_kv_heads, 1) for x in caches]
        found[name] = functools.partial(sdpa, backend, *caches)
    return found | {"eager": eager}


def usable(case: Case, found: dict[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Return the methods that run on this case, warmed up; say of others why not."""
    running = {}
    expected: Tensor | None = None
    for name, method in found.items():
        try:
            output = method()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            print(f"{case} {name}: not enough memory", file=sys.stderr)
            continue
        except RuntimeError as err:  # how torch says that a backend does not take these shapes
            if name == OURS:
                raise
            print(f"{case} {name}: {str(err).splitlines()[0]}", file=sys.stderr)
            continue
        expected = output if expected is None else expected
        difference = (output.float() - expected.float()).abs().max().item()
        if not difference < 0.05:  # NaN included; bfloat16 differs by 0.02
            raise SystemExit(f"{case} {name} and {OURS} differ by {difference:.3g}")
        running[name] = method
    return running


def measure(
    case: Case, timer: Timer, limits: Limits, dtype: torch.dtype, rounds: int
) -> list[Reading]:
    """Time every method on one case, in turns."""
    running = usable(case, methods(case, dtype))
    times_ms: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, method in running.items():
            times_ms[name].append(timer.time_ms(method))
    readings = []
    for name, values_ms in times_ms.items():
        low, median, high = statistics.quantiles(values_ms, n=4)
        share = case.work / median / limits.of(case)
        reading = Reading(**vars(case), method=name, median_ms=median, quartiles_ms=(low, high), limit_share=share)  # fmt: skip
        print(f"{case} {name:12} {median:9.3f} ms  [{low:.3f}, {high:.3f}]  {share:6.1%}")
        readings.append(reading)
    return readings


def missed_goals(case: Case, readings: list[Reading]) -> list[str]:
    """Return which goals our kernels miss on one case."""
    times_ms = {reading.method: reading.median_ms for reading in readings}
    best_ms = min((times_ms[name] for name in BACKENDS if name in times_ms), default=float("inf"))
    missed = []
    if case.phase == "decode":
        if case.cache_bytes > GOAL_BYTES and readings[0].limit_share < GOAL_COPY_SHARE:
            missed.append(f"{case}: {readings[0].limit_share:.0%} of copy bandwidth")
        if times_ms[OURS] > best_ms:
            missed.append(f"{case}: {times_ms[OURS] / best_ms:.2f}x the time of the best backend")
    elif best_ms / times_ms[OURS] < GOAL_PREFILL_RATIO:
        missed.append(f"{case}: {best_ms / times_ms[OURS]:.2f}x the speed of the best backend")
    return missed


def main() -> None:
    """Measure the card, then every case, and print a line each, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phase", choices=("decode", "prefill"), action="append")
    parser.add_argument("--length", type=int, action="append", help=f"valid lengths {LENGTHS}")
    parser.add_argument("--batch-size", type=int, action="append", help=f"rows {BATCHES}")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=21, help="rounds; medians are shown (21)")
    parser.add_argument("--json", action="store_true", help="print the table on stderr")
    args = parser.parse_args()
    if args.rounds < 2:  # quartiles are of two or more
        parser.error(f"--rounds is {args.rounds}; expected 2 or more")
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU and a torch built for CUDA")
    dtype = getattr(torch, args.dtype)
    timer = Timer()
    limits = Limits.measure(timer, dtype, args.rounds)
    readings: list[Reading] = []
    missed: list[str] = []
    phases = args.phase or ["decode", "prefill"]
    chosen = cases(phases, args.length or LENGTHS, args.batch_size or BATCHES)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        for case in chosen:
            of_case = measure(case, timer, limits, dtype, args.rounds)
            missed += missed_goals(case, of_case)
            readings += of_case
            torch.cuda.empty_cache()
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "copy_gb_per_s": round(limits.copied_bytes / 1e6, 1),
        "matrix_tflops": round(limits.matrix_flops / 1e9, 1),
        "missed_goals": missed,
        "readings": [asdict(reading) for reading in readings],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
