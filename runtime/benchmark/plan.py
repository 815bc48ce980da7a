"""What is to be measured: `BenchPlan`, checked before anything runs."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from gemma_deploy.config import CONFIG_FILE
from gemma_deploy.engine import ENGINE_FILE
from gemma_deploy.errors import RequestError
from gemma_deploy.graph_spec import DType
from gemma_deploy.manifest import MANIFEST_FILE
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase
from gemma_deploy.runtime.source import ModelSource

Baseline = Literal["torch-eager", "torch-compile", "transformers"]
BASELINES: Final[tuple[Baseline, ...]] = get_args(Baseline)

# A step's time needs a step: the first token is prefill's.
_MIN_NEW_TOKENS: Final = 2
_DESCRIPTIONS: Final = (MANIFEST_FILE, ENGINE_FILE, CONFIG_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContenderSpec:
    """What one worker loads.

    Attributes:
        name: `OURS` or one of `BASELINES`.
        model: Folder of a bundle, an engine or a checkpoint; of a checkpoint for a baseline.
        backend: As `create_session` takes it; baselines ignore it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Threads of the CPU kernels; None leaves it to the backend.
        dtype: What a baseline computes in; None for the checkpoint's own.
        max_seq_len: The longest KV cache that will be wanted, in tokens.
        prepacked_cache: Folder of ONNX Runtime's packed weights, as `create_session` takes it;
            baselines ignore it.
    """

    name: str
    model: str
    backend: str
    device: str
    threads: int | None
    dtype: DType | None
    max_seq_len: int
    prepacked_cache: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """A whole sweep.

    Attributes:
        model: Folder of a bundle, a packed engine or a checkpoint.
        cases: What to run, in this order.
        rounds: How often each contender runs each case, taking turns; at least 1.
        warmup: Rounds before those that count, for each case.
        backend: As `create_session` takes it.
        device: The same.
        threads: The same; for every contender.
        prepacked_cache: The same.
        against: Baselines to run beside it.
        checkpoint: The checkpoint that baselines run; None without any.
        baseline_dtype: What baselines compute in; None for the checkpoint's own.

    Raises:
        RequestError: On construction, for numbers that cannot be.
    """

    model: Path
    cases: tuple[BenchCase, ...]
    rounds: int = 5
    warmup: int = 1
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    prepacked_cache: Path | None = None
    against: tuple[Baseline, ...] = ()
    checkpoint: Path | None = None
    baseline_dtype: DType | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("rounds", self.rounds, 1), ("warmup", self.warmup, 0)):
            if value < least:
                raise RequestError(f"{name} is {value}; it must be at least {least}")
        if not self.cases:
            raise RequestError(
                "there is no case to run; give prompt and new tokens and batch sizes"
            )
        for case in self.cases:
            _check_case(case)
        if self.against and self.checkpoint is None:
            raise RequestError(
                f"{', '.join(self.against)} cannot run a bundle; give the checkpoint it was made of"
            )

    @property
    def max_seq_len(self) -> int:
        """The longest KV cache that a case needs, in tokens."""
        return max(cached_tokens(case) for case in self.cases)

    def specs(self) -> tuple[ContenderSpec, ...]:
        """Return what the workers load, ours first."""
        ours = ContenderSpec(
            name=OURS,
            model=str(self.model),
            backend=self.backend,
            device=self.device,
            threads=self.threads,
            dtype=None,
            max_seq_len=self.max_seq_len,
            prepacked_cache=None if self.prepacked_cache is None else str(self.prepacked_cache),
        )
        baselines = (
            ContenderSpec(
                name=name,
                model=str(self.checkpoint),
                backend="torch",
                device=self.device,
                threads=self.threads,
                dtype=self.baseline_dtype,
                max_seq_len=self.max_seq_len,
            )
            for name in self.against
        )
        return ours, *baselines

    def check_lengths(self, limit: int) -> None:
        """Refuse cases that the model is not made for.

        Args:
            limit: Longest sequence of the model, in tokens.

        Raises:
            RequestError: With the first case that does not fit.
        """
        for case in self.cases:
            if cached_tokens(case) > limit:
                raise RequestError(
                    f"{case}: {cached_tokens(case):,} tokens must fit the KV cache, and {self.model} "
                    f"is made for {limit:,}: shorten the prompt or ask for fewer new tokens"
                )

    def fingerprint(self) -> dict[str, Any]:
        """Return what another plan must have in common with this one to go on with its rounds."""
        return {
            "model": _identity(self.model),
            "checkpoint": None if self.checkpoint is None else _identity(self.checkpoint),
            "cases": [str(case) for case in self.cases],
            "rounds": self.rounds,
            "warmup": self.warmup,
            "backend": self.backend,
            "device": self.device,
            "threads": self.threads,
            "prepacked_cache": None if self.prepacked_cache is None else str(self.prepacked_cache),
            "against": list(self.against),
            "baseline_dtype": self.baseline_dtype,
        }


def sweep(
    prompt_tokens: Sequence[int], new_tokens: Sequence[int], batch_sizes: Sequence[int]
) -> tuple[BenchCase, ...]:
    """Return every combination, each once; batch sizes change slowest, new tokens fastest."""
    return tuple(
        dict.fromkeys(
            BenchCase(prompt_tokens=prompt, new_tokens=new, batch_size=batch)
            for batch, prompt, new in itertools.product(batch_sizes, prompt_tokens, new_tokens)
        )
    )


def cached_tokens(case: BenchCase) -> int:
    """Return how many tokens a row has in the KV cache at the end: the last one needs no place."""
    return case.prompt_tokens + case.new_tokens - 1


def open_source(plan: BenchPlan) -> ModelSource:
    """Open the plan's model and compare its limit with the plan's lengths.

    Raises:
        RequestError: The folder is no model, or a case is longer than it is made for.
        GemmaDeployError: As `ModelSource.open` says.
    """
    source = ModelSource.open(plan.model)
    plan.check_lengths(source.max_seq_len)
    return source


def _check_case(case: BenchCase) -> None:
    checks = (
        ("prompt_tokens", case.prompt_tokens, 1),
        ("new_tokens", case.new_tokens, _MIN_NEW_TOKENS),
        ("batch_size", case.batch_size, 1),
    )
    for name, value, least in checks:
        if value < least:
            raise RequestError(f"{name} is {value}; it must be at least {least}")


def _identity(folder: Path) -> dict[str, str]:
    """Return where a model is and a digest of the file that describes it."""
    for name in _DESCRIPTIONS:
        path = folder / name
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            return {"folder": str(folder.resolve()), name: digest}
    return {"folder": str(folder.resolve())}
