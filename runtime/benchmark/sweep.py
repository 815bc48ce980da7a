"""All contenders through all cases, taking turns round by round: `run_sweep`."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import GemmaDeployError, RequestError, SessionError
from gemma_deploy.runtime.benchmark.baselines import (
    check_installed,
    lack_of_memory,
    needed_bytes,
    own_dtype,
)
from gemma_deploy.runtime.benchmark.demands import demands_of
from gemma_deploy.runtime.benchmark.machine_rates import measure_rates
from gemma_deploy.runtime.benchmark.plan import BenchPlan, ContenderSpec, open_source
from gemma_deploy.runtime.benchmark.record import BenchRecord
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase, Roofline, RoundTimes
from gemma_deploy.runtime.benchmark.worker_process import Worker
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.registry import natural_backend
from gemma_deploy.runtime.source import ModelSource

OnProgress = Callable[[str, int, int], object]


def run_sweep(
    plan: BenchPlan,
    record: BenchRecord,
    *,
    on_progress: OnProgress = lambda *_: None,
    on_notice: Callable[[str], object] = lambda _: None,
) -> None:
    """Run what is missing in a record.

    Every contender lives in a process of its own, loaded once. A baseline that cannot be loaded, or
    fails in the middle, is noted as skipped. Whatever ends this call ends the processes, and the
    record keeps the rounds that were whole.

    Args:
        plan: What to run.
        record: What is there already; it gets every round as it ends.
        on_progress: Called with what is being done, how much is done and how much there is.
        on_notice: Called with what a person should know at once: who was skipped, and why.

    Raises:
        BackendUnavailableError: A baseline is not installed; nothing has run then.
        RequestError: A case is longer than the model is made for, or the record was begun on another
            machine; nothing has run then.
        GemmaDeployError: The model itself cannot be loaded or run.
    """
    check_installed(plan.against)
    source = open_source(plan)
    missing = [case for case in plan.cases if record.num_rounds(case) < plan.rounds]
    if not missing:
        return
    record.require_same_environment()
    with contextlib.ExitStack() as stack:
        sweep = _Sweep(plan, record, on_progress, on_notice, stack)
        sweep.load(source)
        for case in missing:
            sweep.run(case)


class _Sweep:
    """The processes of a sweep that still run."""

    def __init__(
        self,
        plan: BenchPlan,
        record: BenchRecord,
        on_progress: OnProgress,
        on_notice: Callable[[str], object],
        stack: contextlib.ExitStack,
    ) -> None:
        self._plan = plan
        self._record = record
        self._on_progress = on_progress
        self._on_notice = on_notice
        self._stack = stack
        self._workers: list[Worker] = []

    def load(self, source: ModelSource) -> None:
        """Start and load ours, measure the machine, and load every baseline that is possible."""
        ours, *baselines = self._plan.specs()
        worker = self._load(ours)
        _check_limits(self._plan, worker)
        device = Device.parse(f"cuda:{Device.parse(ours.device).index}")
        if worker.device == "cpu":
            device = Device(kind="cpu")
        if self._record.roofline is None:
            self._measure_machine(source, device)
        for spec in baselines:
            if self._record.skipped(spec.name) is None:
                self._load_baseline(spec, device)

    def run(self, case: BenchCase) -> None:
        """Run the rounds of a case that are missing."""
        for turn in range(self._plan.warmup):
            self._on_progress(f"{case}: warm-up", turn, self._plan.warmup)
            self._round(case, turn)
        self._on_progress(f"{case}: warm-up", self._plan.warmup, self._plan.warmup)
        while (done := self._record.num_rounds(case)) < self._plan.rounds:
            self._on_progress(str(case), done, self._plan.rounds)
            self._record.add_round(case, self._round(case, done))
            for worker in self._workers:
                self._record.add_contender(worker.contender)
        self._on_progress(str(case), self._plan.rounds, self._plan.rounds)

    def _measure_machine(self, source: ModelSource, device: Device) -> None:
        stage = "measuring the machine"
        self._on_progress(stage, 0, 1)
        backend = natural_backend(source) if self._plan.backend == "auto" else self._plan.backend
        demands = demands_of(source, backend, device.kind)
        try:
            rates = measure_rates(demands.weight_format, device, self._plan.threads)
        except SessionError as err:
            self._on_notice(str(err))
            return
        self._on_progress(stage, 1, 1)
        self._record.add_roofline(
            Roofline(
                read_bytes_per_s=rates.read_bytes_per_s,
                matrix_flop_per_s=rates.matrix_flop_per_s,
                weights_bytes_per_step=demands.weights_bytes_per_step,
                cache_bytes_per_token=demands.cache_bytes_per_token,
                flop_per_token=demands.flop_per_token,
                window_bytes_per_token=demands.window_bytes_per_token,
                window_tokens=demands.window_tokens,
            )
        )

    def _load_baseline(self, spec: ContenderSpec, device: Device) -> None:
        """Load a baseline on the device that ours runs on, or note why not."""
        try:
            checkpoint = Checkpoint.open(Path(spec.model))
            dtype = spec.dtype or own_dtype(checkpoint)
            needed = needed_bytes(spec.name, checkpoint.config, dtype, self._plan.cases)
            reason = lack_of_memory(needed, device)
            if reason is None:
                place = f"cuda:{device.index}" if device.kind == "cuda" else "cpu"
                self._load(dataclasses.replace(spec, device=place))
                return
        except GemmaDeployError as err:
            reason = str(err)
        self._skip(spec.name, reason)

    def _load(self, spec: ContenderSpec) -> Worker:
        self._on_progress(f"loading {spec.name}", 0, 1)
        worker = self._stack.enter_context(Worker(spec))
        worker.load()
        self._on_progress(f"loading {spec.name}", 1, 1)
        self._workers.append(worker)
        self._record.add_contender(worker.contender)
        return worker

    def _round(self, case: BenchCase, number: int) -> dict[str, RoundTimes]:
        """Let each contender run a case once; who begins changes from round to round."""
        times = {}
        for worker in _rotated(self._workers, number):
            name = worker.contender.name
            try:
                times[name] = worker.run(case)
            except GemmaDeployError as err:
                if name == OURS:
                    raise
                self._skip(name, f"{case}: {err}")
        return times

    def _skip(self, name: str, reason: str) -> None:
        """Go on without a baseline, whose memory the others may need."""
        for worker in [x for x in self._workers if x.contender.name == name]:
            self._record.add_contender(worker.contender)
            self._workers.remove(worker)
            worker.close()
        self._record.skip(name, reason)
        self._on_notice(f"skipped {name}: {reason}")


def _rotated(workers: Sequence[Worker], by: int) -> list[Worker]:
    start = by % len(workers)
    return [*workers[start:], *workers[:start]]


def _check_limits(plan: BenchPlan, ours: Worker) -> None:
    """Compare the cases with what was loaded: an engine has limits of its own.

    Raises:
        RequestError: A case is beyond them.
    """
    if ours.max_seq_len is not None:
        plan.check_lengths(ours.max_seq_len)
    most = ours.max_batch_size
    for case in plan.cases:
        if most is not None and case.batch_size > most:
            raise RequestError(
                f"{case}: the engine of {plan.model} is built for batches of {most}: measure smaller "
                "ones, or build one with a larger --max-batch"
            )
