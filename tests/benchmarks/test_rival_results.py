"""Turns become reports, tables and a file whose ratios are those of the rounds."""

import itertools
import statistics
from typing import Any

import pytest

from benchmarks.rival_processes import Memory, Turn
from benchmarks.rival_results import build_report, memory_rows, middle_round, to_markdown
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase, BenchReport

CASE = BenchCase(prompt_tokens=100, new_tokens=3)
LLAMA, GENAI = "llama.cpp", "onnxruntime-genai"
ROOFLINE = {
    "read_bytes_per_s": 1e9,
    "matrix_flop_per_s": 1e12,
    "weights_bytes_per_step": 1_000_000_000,
    "cache_bytes_per_token": 1000,
    "flop_per_token": 4_000_000_000,
}


def one_round(ttft_s: float, step_s: float) -> dict[str, Any]:
    return {"ttft_s": ttft_s, "step_s": [step_s, step_s]}


def our_turn(ttft_s: float, step_s: float) -> Turn:
    contender = {"description": "onnxruntime on cpu", "load_s": 0.5}
    figures = {
        "contenders": [contender],
        "measurements": [{"rounds": [one_round(ttft_s, step_s)]}],
        "roofline": ROOFLINE,
        "environment": {"date": "2026-11-23 04:00 UTC", "CPU": "a CPU", "onnxruntime": "1.31.0"},
    }
    return Turn(figures, Memory(3_000_000, 2_000_000))


def rival_turn(ttft_s: float, step_s: float) -> Turn:
    figures = {
        "load_s": 1.0,
        "rounds": [one_round(ttft_s, step_s)],
        "versions": {"llama-cpp-python": "0.3.36"},
    }
    return Turn(figures, Memory(4_000_000, 1_000_000))


@pytest.fixture
def report() -> BenchReport:
    turns = {
        OURS: [our_turn(1.0, 0.10), our_turn(2.0, 0.20), our_turn(1.0, 0.40)],
        LLAMA: [rival_turn(2.0, 0.15), rival_turn(2.0, 0.40), rival_turn(3.0, 0.40)],
        GENAI: [rival_turn(4.0, 0.30)],
    }
    return build_report("g270m", CASE, turns, {GENAI: "failed in round 2"}, [20e9, 10e9, 30e9])


def test_ratios_are_taken_within_a_round(report: BenchReport) -> None:
    ratios = report.ratios(LLAMA, CASE)
    assert ratios is not None
    prefill, decode = ratios
    assert (prefill.lowest, prefill.median, prefill.highest) == pytest.approx((1, 2, 3))
    assert (decode.lowest, decode.median, decode.highest) == pytest.approx((1, 1.5, 2))


def test_a_rival_that_failed_keeps_its_rounds(report: BenchReport) -> None:
    ratios = report.ratios(GENAI, CASE)
    assert ratios is not None
    assert ratios[0].median == pytest.approx(4)
    assert report.contenders[2].skipped == "failed in round 2"


def test_costs_and_bandwidth_are_of_the_whole_run(report: BenchReport) -> None:
    assert report.roofline is not None
    assert report.roofline.read_bytes_per_s == 20e9
    assert report.environment["read bandwidth"] == "20.0 GB/s (10.0 to 30.0)"
    assert report.environment["llama-cpp-python (rival)"] == "0.3.36"
    assert memory_rows(report)[1] == (LLAMA, "0.75", "2.00", "0.50")


def test_the_middle_round_is_neither_luck_nor_accident() -> None:
    rounds = [one_round(1.0, 0.3), one_round(5.0, 0.1), one_round(2.0, 0.2)]
    middle = middle_round(rounds)
    assert middle.ttft_s == statistics.median([1.0, 5.0, 2.0])
    assert middle.step_s == (0.2, 0.2)


def test_the_file_says_what_was_run_and_found(report: BenchReport) -> None:
    text = to_markdown("g270m", [report], "python -m benchmarks.rivals --shape g270m")
    lines = text.splitlines()
    assert lines[0] == "# Beside the rivals, g270m, 2026-11-23"
    assert "`python -m benchmarks.rivals --shape g270m`" in text
    assert "- onnxruntime-genai: " in text
    assert "; skipped: failed in round 2" in text
    (row,) = [line for line in lines if line.startswith("| llama.cpp | 50")]
    assert "2.00x (1.00 to 3.00)" in row
    assert "1.50x (1.00 to 2.00)" in row
    # Each table has as many cells in every row as in its heading.
    for heading, rule in itertools.pairwise(lines):
        if rule.startswith("|---"):
            assert heading.count("|") == rule.count("|")
    assert "- read bandwidth: 20.0 GB/s (10.0 to 30.0)" in text
    assert "- CPU: a CPU" in text
