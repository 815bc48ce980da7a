import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.benchmark.plan import BenchPlan
from gemma_deploy.runtime.benchmark.record import BenchRecord
from gemma_deploy.runtime.benchmark.results import OURS, Contender, Roofline, RoundTimes

ROOFLINE = Roofline(
    read_bytes_per_s=1e9,
    matrix_flop_per_s=1e10,
    weights_bytes_per_step=1000,
    cache_bytes_per_token=10,
    flop_per_token=100,
)
ENVIRONMENT = {"CPU": "some", "threads": "1"}


def times(seconds: float) -> RoundTimes:
    return RoundTimes(ttft_s=seconds, step_s=(seconds / 2, seconds / 3, seconds / 5))


@pytest.fixture
def plan(make_plan: Any) -> BenchPlan:
    plan: BenchPlan = make_plan(
        Path("bundle"), against=("torch-eager",), checkpoint=Path("checkpoint")
    )
    return plan


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rounds.jsonl"


def filled(plan: BenchPlan, file: Path | None) -> BenchRecord:
    record = BenchRecord(plan, ENVIRONMENT, file)
    record.add_contender(Contender(name=OURS, description="ours", load_s=1.0, peak_memory_bytes=9))
    record.add_roofline(ROOFLINE)
    record.add_contender(Contender(name="torch-eager", description="eager"))
    for seconds in (1.0, 2.0):
        record.add_round(plan.cases[0], {OURS: times(seconds), "torch-eager": times(3 * seconds)})
    record.add_round(plan.cases[1], {OURS: times(4.0)})
    record.skip("torch-eager", "it was killed")
    return record


def test_what_the_file_gives_back_is_what_was_measured(plan: BenchPlan, file: Path) -> None:
    expected = filled(plan, file).report()
    assert expected == filled(plan, None).report()
    again = BenchRecord(plan, {"CPU": "another"}, file)
    assert again.report() == expected
    assert [again.num_rounds(case) for case in plan.cases] == [2, 1]
    assert again.roofline == ROOFLINE
    assert again.skipped("torch-eager") == "it was killed"
    assert again.skipped(OURS) is None
    assert [(m.contender, m.case, len(m.rounds)) for m in expected.measurements] == [
        (OURS, plan.cases[0], 2),
        ("torch-eager", plan.cases[0], 2),
        (OURS, plan.cases[1], 1),
    ]


class Interrupting(dict[str, RoundTimes]):
    """Times of a round that Ctrl-C hits while they are written."""

    def items(self) -> Any:
        signal.raise_signal(signal.SIGINT)
        return super().items()


def test_ctrl_c_waits_until_a_round_is_kept(plan: BenchPlan, file: Path) -> None:
    record = filled(plan, file)
    with pytest.raises(KeyboardInterrupt):
        record.add_round(plan.cases[1], Interrupting({OURS: times(5.0)}))
    assert record.num_rounds(plan.cases[1]) == 2
    assert BenchRecord(plan, ENVIRONMENT, file).report() == record.report()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_rounds_of_another_machine_are_shown_but_not_added_to(plan: BenchPlan, file: Path) -> None:
    filled(plan, file)
    for passing in ({}, {"date": "today", "CPU clock": "9 MHz"}):
        BenchRecord(plan, ENVIRONMENT | passing, file).require_same_environment()
    upgraded = BenchRecord(plan, ENVIRONMENT | {"onnxruntime": "2"}, file)
    with pytest.raises(RequestError, match="another onnxruntime: None then, 2 here"):
        upgraded.require_same_environment()


def test_peaks_never_shrink_when_it_goes_on(plan: BenchPlan, file: Path) -> None:
    filled(plan, file)
    again = BenchRecord(plan, ENVIRONMENT, file)
    again.add_contender(Contender(name=OURS, load_s=2.0, peak_memory_bytes=4))
    ours = again.report().contenders[0]
    assert (ours.description, ours.load_s, ours.peak_memory_bytes) == ("ours", 2.0, 9)


def test_half_a_line_of_a_killed_process_is_dropped(plan: BenchPlan, file: Path) -> None:
    filled(plan, file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    again = BenchRecord(plan, ENVIRONMENT, file)
    assert again.num_rounds(plan.cases[0]) == 0
    again.add_round(plan.cases[0], {OURS: times(1.0), "torch-eager": times(2.0)})
    assert BenchRecord(plan, ENVIRONMENT, file).num_rounds(plan.cases[0]) == 1


def test_nothing_measured_leaves_no_file(plan: BenchPlan, file: Path) -> None:
    BenchRecord(plan, ENVIRONMENT, file)
    assert not file.exists()


def test_the_rounds_of_another_command_are_refused(plan: BenchPlan, file: Path) -> None:
    filled(plan, file)
    before = file.read_bytes()
    with pytest.raises(
        RequestError, match=r"another command: its threads is 1, this one's 2\. Name another file"
    ):
        BenchRecord(dataclasses.replace(plan, threads=2), ENVIRONMENT, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["notes of mine\n", "[1, 2]\n", '{"plan": {}}\n', "half a line"]
)
def test_other_files_are_refused_and_left_alone(content: str, plan: BenchPlan, file: Path) -> None:
    file.write_text(content)
    with pytest.raises(
        RequestError,
        match=r"(is not the record of a benchmark: |cannot be read as JSON: .*|holds a list, .*)name another file",
    ):
        BenchRecord(plan, ENVIRONMENT, file)
    assert file.read_text() == content


def test_a_newer_format_is_refused(plan: BenchPlan, file: Path) -> None:
    filled(plan, file)
    head, *rest = file.read_text().splitlines()
    raw = json.loads(head) | {"format_version": 2}
    file.write_text("\n".join([json.dumps(raw), *rest]) + "\n")
    with pytest.raises(RequestError, match="is a record of format 2, expected 1"):
        BenchRecord(plan, ENVIRONMENT, file)


def test_a_damaged_line_is_told(plan: BenchPlan, file: Path) -> None:
    filled(plan, file)
    with file.open("a") as opened:
        opened.write('{"round": {"gemma-deploy": {"step_s": []}}, "case": {}}\n')
    with pytest.raises(RequestError, match=r"is damaged .*: name another file, or remove this one"):
        BenchRecord(plan, ENVIRONMENT, file)
