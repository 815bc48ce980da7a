import dataclasses
import itertools

import pytest

from benchmarks.gpu_results import GOALS, Run, best_decode, goal_rows, markdown, overall
from gemma_deploy.runtime.benchmark.results import (
    OURS,
    BenchCase,
    BenchReport,
    Contender,
    Measurement,
    Roofline,
    RoundTimes,
)

CASE = BenchCase(prompt_tokens=8, new_tokens=3)


def _measured(name: str, steps_per_s: float, case: BenchCase = CASE) -> Measurement:
    times = RoundTimes(ttft_s=0.5, step_s=(1 / steps_per_s,) * 2)
    return Measurement(contender=name, case=case, rounds=(times, times))


def _report(ours: float, eager: float = 10, compiled: float = 30) -> BenchReport:
    """Decode rates of three contenders; a step reads 1000 bytes, of 40,000 per second."""
    speeds = {OURS: ours, "torch-eager": eager, "torch-compile": compiled}
    return BenchReport(
        model="model",
        contenders=tuple(Contender(name=name) for name in speeds),
        measurements=tuple(_measured(*x) for x in speeds.items()),
        roofline=Roofline(
            read_bytes_per_s=40_000,
            matrix_flop_per_s=1e6,
            weights_bytes_per_step=1000,
            cache_bytes_per_token=0,
            flop_per_token=1,
        ),
        environment={},
    )


def _verdicts(*runs: Run) -> list[str]:
    return [overall(runs, goal) for goal in GOALS]


def _run(report: BenchReport | None, backend: str = "onnxruntime") -> Run:
    return Run(backend=backend, dtype="float16", report=report, reason="no library")


@pytest.mark.parametrize(
    ("ours", "verdicts"),
    [
        (34.0, ["met", "met", "met"]),
        (32.0, ["met", "missed", "met"]),
        (29.0, ["missed", "missed", "missed"]),
    ],
)
def test_goals_at_their_limits(ours: float, verdicts: list[str]) -> None:
    assert _verdicts(_run(_report(ours))) == verdicts


def test_one_backend_is_enough() -> None:
    assert _verdicts(_run(_report(5.0)), _run(_report(34.0), "tensorrt")) == ["met"] * 3


def test_every_length_of_prompts_counts() -> None:
    report = _report(34.0)
    long = dataclasses.replace(CASE, prompt_tokens=2048)
    slow = (_measured(OURS, 20.0, long), _measured("torch-eager", 10.0, long))
    both = dataclasses.replace(report, measurements=(*report.measurements, *slow))

    assert _verdicts(_run(both))[0] == "missed"


def test_larger_batches_do_not() -> None:
    report = _report(34.0)
    batch = dataclasses.replace(CASE, batch_size=8)
    slow = (_measured(OURS, 1.0, batch), _measured("torch-eager", 10.0, batch))
    both = dataclasses.replace(report, measurements=(*report.measurements, *slow))

    assert _verdicts(_run(both)) == ["met"] * 3


def test_what_was_not_measured_is_not_missed() -> None:
    report = _report(34.0)
    alone = dataclasses.replace(report, measurements=report.measurements[:1], roofline=None)

    assert _verdicts(_run(None)) == ["not measured"] * 3
    assert _verdicts(_run(alone)) == ["not measured"] * 3


def test_rows_name_figures() -> None:
    rows = goal_rows([_run(_report(32.0)), _run(None, "tensorrt")])

    assert ("", "onnxruntime, float16", str(CASE), "1.07x", "missed") in rows
    assert ("", "onnxruntime, float16", str(CASE), "80.0%", "met") in rows
    assert ("", "tensorrt, float16", "", "", "not measured") in rows


def test_the_fastest_decode() -> None:
    slow, fast = _run(_report(5.0)), _run(_report(34.0), "tensorrt")

    assert best_decode([_run(None), slow, fast]) is fast
    assert best_decode([_run(None)]) is None
    empty = dataclasses.replace(_report(5.0), measurements=())
    assert best_decode([_run(empty)]) is None


def test_the_file_that_is_kept() -> None:
    runs = [_run(_report(34.0)), _run(None, "tensorrt")]

    text = markdown("NVIDIA L4: g2b", "python -m benchmarks.gpu", {"GPU": "a | b\nc"}, runs)

    lines = text.splitlines()
    assert lines[:3] == ["# NVIDIA L4: g2b", "", "`python -m benchmarks.gpu`"]
    assert r"| GPU | a \| b c |" in lines
    assert "The fastest decode: onnxruntime, float16." in lines
    assert "Did not run: no library" in lines
    assert "| torch-eager | 16.0 | 1.00x | 10.0 | 3.40x |" in lines
    # Every row of a table has as many cells as the one above it.
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert above.replace(r"\|", "").count("|") == below.replace(r"\|", "").count("|")
