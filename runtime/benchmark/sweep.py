"""All contenders through all cases, taking turns round by round: `run_sweep`."""

import contextlib
from collections.abc import Callable, Sequence

from gemma_deploy.errors import GemmaDeployError, RequestError
from gemma_deploy.runtime.benchmark.plan import BenchPlan, ContenderSpec, open_source
from gemma_deploy.runtime.benchmark.record import BenchRecord
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase, RoundTimes
from gemma_deploy.runtime.benchmark.worker_process import Worker

OnProgress = Callable[[str, int, int], object]


def run_sweep(plan: BenchPlan, record: BenchRecord, on_progress: OnProgress) -> None:
    """Run what is missing in a record.

    Every contender lives in a process of its own, loaded once. A baseline that cannot be loaded, or
    fails in the middle, is noted as skipped. Whatever ends this call ends the processes, and the
    record keeps the rounds that were whole.

    Args:
        plan: What to run.
        record: What is there already; it gets every round as it ends.
        on_progress: Called with what is being done, how much is done and how much there is.

    Raises:
        RequestError: A case is longer than the model is made for; nothing has run then.
        GemmaDeployError: The model itself cannot be loaded or run.
    """
    open_source(plan)
    missing = [case for case in plan.cases if record.num_rounds(case) < plan.rounds]
    if not missing:
        return
    with contextlib.ExitStack() as stack:
        sweep = _Sweep(plan, record, on_progress, stack)
        sweep.load()
        for case in missing:
            sweep.run(case)


class _Sweep:
    """The processes of a sweep that still run."""

    def __init__(
        self,
        plan: BenchPlan,
        record: BenchRecord,
        on_progress: OnProgress,
        stack: contextlib.ExitStack,
    ) -> None:
        self._plan = plan
        self._record = record
        self._on_progress = on_progress
        self._stack = stack
        self._workers: list[Worker] = []

    def load(self) -> None:
        """Start and load ours, and then every baseline that is possible."""
        ours, *baselines = self._plan.specs()
        worker = self._load(ours)
        _check_limits(self._plan, worker)
        for spec in baselines:
            if self._record.skipped(spec.name) is not None:
                continue
            try:
                self._load(spec)
            except GemmaDeployError as err:
                self._skip(spec.name, str(err))

    def run(self, case: BenchCase) -> None:
        """Run the rounds of a case that are missing."""
        for turn in range(self._plan.warmup):
            self._on_progress(f"{case}: warm-up", turn, self._plan.warmup)
            self._round(case, turn)
        self._on_progress(f"{case}: warm-up", self._plan.warmup, self._plan.warmup)
        while (done := self._record.num_rounds(case)) < self._plan.rounds:
            self._on_progress(str(case), done, self._plan.rounds)
            self._record.add_round(case, self._round(case, done))
        self._on_progress(str(case), self._plan.rounds, self._plan.rounds)
        for worker in self._workers:
            self._record.add_contender(worker.contender)

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
