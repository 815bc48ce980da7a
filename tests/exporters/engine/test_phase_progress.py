import pytest

from gemma_deploy.exporters.engine.phase_progress import PhaseProgress


def test_nested_phases_are_parts_of_a_step() -> None:
    progress = PhaseProgress()
    assert progress.start("build", None, 4) == 0
    assert progress.step("build", 0) == 0.25
    assert progress.start("optimize", "build", 2) == 0.25
    assert progress.step("optimize", 0) == pytest.approx(0.25 + 0.5 / 4)
    progress.start("time", "optimize", 10)
    assert progress.step("time", 4) == pytest.approx(0.25 + 0.75 / 4)
    progress.finish("time")
    progress.finish("optimize")
    assert progress.step("build", 3) == 1


def test_it_never_goes_back() -> None:
    progress = PhaseProgress()
    progress.start("build", None, 2)
    progress.start("part", "build", 2)
    shown = progress.step("part", 1)
    assert progress.finish("part") == shown == 0.5
    assert progress.step("build", 0) == shown


def test_it_bears_what_it_does_not_expect() -> None:
    progress = PhaseProgress()
    progress.start("a", None, 0)
    progress.start("a", "a", 1)
    progress.start("b", "a", 1)
    progress.start("a", "b", 1)
    assert progress.step("b", 7) == 1
    assert progress.step("unknown", 0) == 1
    assert progress.finish("unknown") == 1
