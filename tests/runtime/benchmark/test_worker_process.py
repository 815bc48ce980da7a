import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import BackendUnavailableError, SessionError
from gemma_deploy.runtime.benchmark import worker_process
from gemma_deploy.runtime.benchmark.plan import BenchPlan
from gemma_deploy.runtime.benchmark.results import BenchCase
from gemma_deploy.runtime.benchmark.worker_process import Worker


def test_a_worker_runs_cases_until_it_is_killed(make_plan: Any, text_bundle: Any) -> None:
    plan: BenchPlan = make_plan(text_bundle("gemma1"))
    (spec,) = plan.specs()
    with Worker(spec) as worker:
        worker.load()
        assert worker.device == "cpu"
        assert worker.contender.description == "onnxruntime on cpu, weights float32, cache float32"
        assert worker.contender.load_s is not None
        for case in plan.cases:
            assert len(worker.run(case).step_s) == 3
        contender = worker.contender
        assert contender.peak_memory_bytes is not None
        assert contender.peak_anonymous_bytes is not None
        assert 1 << 24 < contender.peak_anonymous_bytes < contender.peak_memory_bytes < 1 << 30
        assert contender.peak_gpu_bytes is None
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(SessionError, match=r"gemma-deploy was killed \(SIGKILL\), most often"):
            worker.run(plan.cases[0])


def test_an_error_keeps_its_class_and_words(make_plan: Any, text_bundle: Any) -> None:
    (spec,) = make_plan(text_bundle("gemma1"), device="cuda:7").specs()
    with Worker(spec) as worker, pytest.raises(BackendUnavailableError, match="float16"):
        worker.load()


def test_a_crash_is_told_with_its_last_words(
    make_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_MODULE", "gemma_deploy.no_such_module")
    (spec,) = make_plan(Path("bundle")).specs()
    with (
        Worker(spec) as worker,
        pytest.raises(SessionError, match=r"(?s)ended with code 1\. It said last:.*no_such_module"),
    ):
        worker.load()


def test_closing_ends_the_process(make_plan: Any) -> None:
    (spec,) = make_plan(Path("bundle")).specs()
    with Worker(spec) as worker:
        process = worker._process
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="closed file"):
        worker.run(BenchCase(prompt_tokens=1, new_tokens=2))
