import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from gemma_deploy.errors import BackendUnavailableError, RequestError, SessionError
from gemma_deploy.install_hint import install_line
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.runtime.benchmark import sweep
from gemma_deploy.runtime.benchmark.machine_rates import MachineRates
from gemma_deploy.runtime.benchmark.plan import BenchPlan, ContenderSpec
from gemma_deploy.runtime.benchmark.record import BenchRecord
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase, Contender, RoundTimes
from gemma_deploy.runtime.benchmark.sweep import run_sweep

EAGER = "torch-eager"


class ScriptedWorker:
    """A worker without a process, which notes what it was asked."""

    log: list[tuple[str, str]]
    on_event: Callable[[str, str], None]

    def __init__(self, spec: ContenderSpec) -> None:
        self.contender = Contender(name=spec.name)
        self.spec = spec
        self.device = ""
        self.max_seq_len: int | None = None
        self.max_batch_size: int | None = 8

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, what: str) -> None:
        self.log.append((self.contender.name, what))
        self.on_event(self.contender.name, what)

    def load(self) -> None:
        self._note("load")
        self.device = "cpu"

    def run(self, case: BenchCase) -> RoundTimes:
        self._note(str(case))
        return RoundTimes(ttft_s=1.0, step_s=(1.0,) * (case.new_tokens - 1))

    def close(self) -> None:
        self.log.append((self.contender.name, "close"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What workers were asked, by name."""
    found: list[tuple[str, str]] = []
    monkeypatch.setattr(ScriptedWorker, "log", found, raising=False)
    monkeypatch.setattr(ScriptedWorker, "on_event", staticmethod(lambda *_: None), raising=False)
    monkeypatch.setattr(sweep, "Worker", ScriptedWorker)
    rates = MachineRates(read_bytes_per_s=1e9, matrix_flop_per_s=1e10)
    monkeypatch.setattr(sweep, "measure_rates", lambda *_: rates)
    return found


@pytest.fixture
def plan(make_plan: Any, text_bundle: Any, text_checkpoint: Any) -> BenchPlan:
    plan: BenchPlan = make_plan(
        text_bundle("gemma1"), against=(EAGER,), checkpoint=text_checkpoint("gemma1")
    )
    return plan


def failing(at: str, name: str, error: Exception, times: int = 0) -> Callable[[str, str], None]:
    """Return what raises when a worker is asked something, after so many times."""
    left = times

    def on_event(who: str, what: str) -> None:
        nonlocal left
        if (who, what) == (name, at):
            if left == 0:
                raise error
            left -= 1

    return on_event


def test_contenders_take_turns_and_who_begins_changes(
    log: list[tuple[str, str]], plan: BenchPlan
) -> None:
    record = BenchRecord(plan, {})
    run_sweep(plan, record)
    first, second = map(str, plan.cases)
    assert log == [
        (OURS, "load"),
        (EAGER, "load"),
        *[(OURS, first), (EAGER, first)],  # warm-up
        *[(OURS, first), (EAGER, first)],
        *[(EAGER, first), (OURS, first)],
        *[(OURS, second), (EAGER, second)],
        *[(OURS, second), (EAGER, second)],
        *[(EAGER, second), (OURS, second)],
        (EAGER, "close"),
        (OURS, "close"),
    ]
    assert [record.num_rounds(case) for case in plan.cases] == [2, 2]
    assert record.roofline is not None
    assert record.roofline.read_bytes_per_s == 1e9


def test_it_goes_on_where_it_stopped(
    log: list[tuple[str, str]], plan: BenchPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rounds.jsonl"
    second = str(plan.cases[1])
    # Ours is interrupted in the middle of the second case's last round.
    interrupt = failing(second, OURS, KeyboardInterrupt(), times=2)  # type: ignore[arg-type]  # raised, whatever it is
    monkeypatch.setattr(ScriptedWorker, "on_event", staticmethod(interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan, BenchRecord(plan, {}, file))
    assert log[-2:] == [(EAGER, "close"), (OURS, "close")]
    log.clear()
    monkeypatch.setattr(ScriptedWorker, "on_event", staticmethod(lambda *_: None))
    record = BenchRecord(plan, {}, file)
    assert [record.num_rounds(case) for case in plan.cases] == [2, 1]
    run_sweep(plan, record)
    assert {what for _, what in log} == {"load", second, "close"}
    assert len(log) == 2 * (1 + 1 + 1 + 1)  # load, warm-up, the round that is missing, close
    log.clear()
    run_sweep(plan, BenchRecord(plan, {}, file))
    assert log == []


def test_a_baseline_that_fails_in_the_middle_is_skipped(
    log: list[tuple[str, str]], plan: BenchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = map(str, plan.cases)
    killed = failing(second, EAGER, SessionError("it was killed"), times=1)
    monkeypatch.setattr(ScriptedWorker, "on_event", staticmethod(killed))
    record, notices = BenchRecord(plan, {}), list[str]()
    run_sweep(plan, record, on_notice=notices.append)
    assert notices == [f"skipped {EAGER}: {second}: it was killed"]
    assert record.skipped(EAGER) == f"{second}: it was killed"
    assert [record.num_rounds(case) for case in plan.cases] == [2, 2]
    report = record.report()
    found = {(m.contender, str(m.case)): len(m.rounds) for m in report.measurements}
    assert found == {(OURS, first): 2, (EAGER, first): 2, (OURS, second): 2}
    # Its memory is given back at once.
    assert log.index((EAGER, "close")) < log.index((OURS, "close")) - 1


def test_a_baseline_without_memory_is_not_started(
    log: list[tuple[str, str]], plan: BenchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gemma_deploy.runtime.benchmark.baselines.available_memory_bytes", lambda: 300_000_000
    )
    record = BenchRecord(plan, {})
    run_sweep(plan, record)
    reason = record.skipped(EAGER)
    assert reason is not None
    assert re.fullmatch(
        r"it needs about \d+\.\d\d MiB of memory, and 286.10 MiB are available", reason
    )
    assert {name for name, _ in log} == {OURS}


def test_a_baseline_that_cannot_be_loaded_is_skipped(
    log: list[tuple[str, str]], plan: BenchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = failing("load", EAGER, SessionError("no such weights"))
    monkeypatch.setattr(ScriptedWorker, "on_event", staticmethod(refusal))
    record = BenchRecord(plan, {})
    run_sweep(plan, record)
    assert record.skipped(EAGER) == "no such weights"
    assert (OURS, str(plan.cases[1])) in log


@pytest.mark.parametrize("at", ["load", "prompt 6, new 4, batch 1"])
def test_ours_failing_ends_it(
    at: str, log: list[tuple[str, str]], plan: BenchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = failing(at, OURS, SessionError("broken"))
    monkeypatch.setattr(ScriptedWorker, "on_event", staticmethod(failure))
    with pytest.raises(SessionError, match="broken"):
        run_sweep(plan, BenchRecord(plan, {}))
    assert log[-1] == (OURS, "close")


def test_a_missing_package_is_told_before_anything_runs(
    log: list[tuple[str, str]], plan: BenchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        BackendUnavailableError, match=re.escape(f"not installed: {install_line('bench')}")
    ):
        run_sweep(plan, BenchRecord(plan, {}))
    assert log == []


def test_batches_beyond_an_engine(
    log: list[tuple[str, str]], make_plan: Any, text_bundle: Any
) -> None:
    plan = make_plan(text_bundle("gemma1"), ([6], [4], [8, 9]))
    with pytest.raises(
        RequestError, match=r"prompt 6, new 4, batch 9: the engine of .* for batches of 8: measure"
    ):
        run_sweep(plan, BenchRecord(plan, {}))
    assert log == [(OURS, "load"), (OURS, "close")]


def test_without_rates_of_the_machine_it_goes_on(
    log: list[tuple[str, str]], plan: BenchPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(weight_format: WeightFormat, *_: object) -> MachineRates:
        asked.append(weight_format)
        raise SessionError("not measured: no onnx")

    monkeypatch.setattr(sweep, "measure_rates", fail)
    record, notices = BenchRecord(plan, {}), list[str]()
    run_sweep(plan, record, on_notice=notices.append)
    assert notices == ["not measured: no onnx"]
    assert asked == [WeightFormat("float32")]
    assert record.report().roofline is None
    assert len(record.report().measurements) == 4
    assert log
