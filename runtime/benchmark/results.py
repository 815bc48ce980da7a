"""What a benchmark measured, and what follows from it: `BenchReport`.

Nothing is measured here, and nothing is imported that would be: reports are read back to be continued,
printed and drawn.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gemma_deploy.json_values import typed

OURS = "gemma-deploy"
"""Name of the contender that all others are compared with."""
LOAD = "load before"
"""Name of the environment's fact that says how busy the machine was."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class BenchCase:
    """One point of a sweep.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens generated per row, the first one (which prefill pays for) included; at
            least 2.
        batch_size: Rows that run at the same time.
    """

    prompt_tokens: int
    new_tokens: int
    batch_size: int = 1

    def __str__(self) -> str:
        return f"prompt {self.prompt_tokens}, new {self.new_tokens}, batch {self.batch_size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTimes:
    """What one contender took for one case in one round.

    Attributes:
        ttft_s: Seconds from token ids to the first new token of every row.
        step_s: Seconds of each step after it, `new_tokens` - 1 of them.
    """

    ttft_s: float
    step_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over the rounds.

    Attributes:
        median: The middle one.
        lowest: The smallest.
        highest: The largest.
    """

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of at least one value."""
        return cls(median=statistics.median(values), lowest=min(values), highest=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """All rounds of one contender in one case.

    Attributes:
        contender: Its name.
        case: What was run.
        rounds: In the order they ran; the n-th of every contender ran side by side.
    """

    contender: str
    case: BenchCase
    rounds: tuple[RoundTimes, ...]

    def ttft_s(self) -> Spread:
        """Return the time to the first token, in seconds."""
        return Spread.of([r.ttft_s for r in self.rounds])

    def prefill_rates(self) -> list[float]:
        """Return prompt tokens per second, of all rows together, for each round."""
        tokens = self.case.prompt_tokens * self.case.batch_size
        return [tokens / r.ttft_s for r in self.rounds]

    def decode_rates(self) -> list[float]:
        """Return new tokens per second after the first, of all rows together, for each round."""
        return [len(r.step_s) * self.case.batch_size / sum(r.step_s) for r in self.rounds]

    def step_percentile_s(self, percent: float) -> float:
        """Return how long a step took, in seconds: the percentile (0 to 100) of all rounds' steps."""
        steps = sorted(step for r in self.rounds for step in r.step_s)
        position = percent / 100 * (len(steps) - 1)
        below = int(position)
        above = min(below + 1, len(steps) - 1)
        return steps[below] + (steps[above] - steps[below]) * (position - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Who took part.

    Attributes:
        name: `OURS` or a baseline's name.
        description: What ran: backend, device, dtypes.
        load_s: Seconds until it could run its first step: its libraries' imports and the weights,
            start of Python not included.
        peak_memory_bytes: Largest resident memory of its process.
        peak_anonymous_bytes: Largest memory of its process that no file backs, seen between rounds;
            None where it cannot be read.
        peak_gpu_bytes: Largest memory its process held on GPUs, seen between rounds; None on a CPU or where it cannot
            be read.
        skipped: Why it did not run, or stopped; None if it ran to the end.
    """

    name: str
    description: str = ""
    load_s: float | None = None
    peak_memory_bytes: int | None = None
    peak_anonymous_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    skipped: str | None = None


def larger(first: int | None, second: int | None) -> int | None:
    """Return the larger of two peaks, of which either may be unknown."""
    return max((x for x in (first, second) if x is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """What the machine could do at most, measured on it, and what the bundle asks of it.

    Attributes:
        read_bytes_per_s: Memory read bandwidth of all threads; copy bandwidth on a GPU.
        matrix_flop_per_s: Rate of a large product in the bundle's weight format.
        weights_bytes_per_step: Bytes of weights that a decode step reads.
        cache_bytes_per_token: Bytes of KV cache per row and cached token, of layers that see all.
        flop_per_token: Operations of a prompt's token: two per weight it is multiplied with.
        window_bytes_per_token: Bytes of KV cache per row and cached token of sliding layers.
        window_tokens: Cached tokens that sliding layers see at most; 0 without such layers.
    """

    read_bytes_per_s: float
    matrix_flop_per_s: float
    weights_bytes_per_step: int
    cache_bytes_per_token: int
    flop_per_token: int
    window_bytes_per_token: int = 0
    window_tokens: int = 0

    def decode_share(self, measurement: Measurement) -> float:
        """Return the share of the read bandwidth that decode reached, 0 to 1 (median round)."""
        case = measurement.case
        cached = case.prompt_tokens + case.new_tokens / 2
        row_bytes = (
            cached * self.cache_bytes_per_token
            + min(cached, self.window_tokens) * self.window_bytes_per_token
        )
        step_bytes = self.weights_bytes_per_step + case.batch_size * row_bytes
        steps_per_s = statistics.median(measurement.decode_rates()) / case.batch_size
        return step_bytes * steps_per_s / self.read_bytes_per_s

    def prefill_share(self, measurement: Measurement) -> float:
        """Return the share of the matrix rate that prefill reached, 0 to 1 (median round)."""
        rate = statistics.median(measurement.prefill_rates())
        return rate * self.flop_per_token / self.matrix_flop_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """A whole benchmark.

    Attributes:
        model: The folder that was measured, as it was given.
        contenders: Ours first.
        measurements: Of every contender and case that was run at least once.
        roofline: None where it could not be measured.
        environment: CPU, GPU, driver, versions, threads, clocks, date: text by name.
    """

    model: str
    contenders: tuple[Contender, ...]
    measurements: tuple[Measurement, ...]
    roofline: Roofline | None
    environment: Mapping[str, str]

    def cases(self) -> list[BenchCase]:
        """Return the cases that were run, in their order."""
        return list(dict.fromkeys(m.case for m in self.measurements))

    def of(self, contender: str, case: BenchCase) -> Measurement | None:
        """Return a contender's measurement of a case, None if it has none."""
        return next(
            (m for m in self.measurements if (m.contender, m.case) == (contender, case)), None
        )

    def ratios(self, baseline: str, case: BenchCase) -> tuple[Spread, Spread] | None:
        """Return ours over the baseline's prefill rate and decode rate, round by round.

        None if there is no round that both ran.
        """
        ours, theirs = self.of(OURS, case), self.of(baseline, case)
        if ours is None or theirs is None:
            return None
        prefill = [
            a / b for a, b in zip(ours.prefill_rates(), theirs.prefill_rates(), strict=False)
        ]
        decode = [a / b for a, b in zip(ours.decode_rates(), theirs.decode_rates(), strict=False)]
        return Spread.of(prefill), Spread.of(decode)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in JSON's own types; `from_dict` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Return the report that `to_dict` gave, JSON in between allowed; other keys are passed over.

        Raises:
            ValueError: A part is missing, or not what it was.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        report: Self = typed(cls, {key: raw[key] for key in names & raw.keys()}, "the report")
        return report
