import dataclasses
import datetime as dt
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from benchmarks import gpu
from benchmarks.gpu import (
    Sweep,
    bench_arguments,
    build_arguments,
    export_arguments,
    gemma_deploy,
    measure,
    refusal,
    result_file,
)
from gemma_deploy.cli.main import cli
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.doctor import capabilities
from gemma_deploy.install_hint import install_line
from gemma_deploy.machine import Machine
from gemma_deploy.runtime.benchmark.results import BenchReport

SWEEP = Sweep(
    prompt_tokens=(256, 2048), new_tokens=64, batch_sizes=(1, 8), rounds=3, device="cuda:1"
)
MACHINE = Machine(
    system="Linux x86_64",
    python="3.12.1",
    cpu="",
    cpu_features=(),
    cores=8,
    memory_bytes=None,
    free_disk_bytes=0,
    packages={"torch": "2.9", "onnxruntime-gpu": "1.24", "cuda-bindings": "13.0"},
    torch_cuda="13.0",
    cuda_driver="13.0",
    gpus=(Gpu(name="NVIDIA L4", compute_capability=(8, 9), memory_bytes=24 << 30),),
    compiled_providers=("CUDAExecutionProvider",),
    working_providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    onnxruntime_error=None,
    tensorrt_errors={},
    tensorrt_cuda={},
)


def _parsed(arguments: Sequence[str]) -> dict[str, object]:
    """Let the program read its arguments without running them."""
    with click.Context(cli) as context:
        command = cli.get_command(context, arguments[0])
        assert command is not None
        return command.make_context(arguments[0], list(arguments[1:]), parent=context).params


class TestArguments:
    def test_the_program_takes_those_of_an_export(self, tmp_path: Path) -> None:
        found = _parsed(export_arguments(tmp_path, tmp_path / "bundle", "bfloat16"))

        assert found["dtype"] == "bfloat16"
        assert found["output"] == tmp_path / "bundle"

    def test_an_engine_is_large_enough(self, tmp_path: Path) -> None:
        found = _parsed(build_arguments(tmp_path, "tensorrt", SWEEP))

        assert found["backend"] == "tensorrt"
        assert found["max_seq_len"] == 2048 + 64
        assert found["max_batch"] == 8

    def test_the_program_takes_those_of_a_bench(self, tmp_path: Path) -> None:
        found = _parsed(bench_arguments(tmp_path, tmp_path, "tensorrt", "float16", SWEEP))

        assert found["prompt_tokens"] == (256, 2048)
        assert found["batch_size"] == (1, 8)
        assert found["against"] == ("torch-eager", "torch-compile")
        assert found["baseline_dtype"] == "float16"
        assert found["device"] == "cuda:1"
        assert found["as_json"] is True


class TestRefusal:
    def test_what_works_is_not_refused(self) -> None:
        assert refusal(MACHINE, "onnxruntime", "float16") is None

    def test_what_is_missing_is_named_with_its_remedy(self) -> None:
        reason = refusal(MACHINE, "tensorrt", "float16")

        assert reason is not None
        assert "tensorrt not installed" in reason
        assert install_line("tensorrt") in reason

    def test_every_capability_exists(self) -> None:
        names = {x.name for x in capabilities(MACHINE)}

        assert {x for needed in gpu.BACKENDS.values() for x in needed} <= names

    def test_onnxruntime_has_no_bfloat16(self) -> None:
        assert refusal(MACHINE, "onnxruntime", "bfloat16") is not None


class TestMeasure:
    @pytest.fixture
    def called(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """The program's calls; each prints a warning and an empty report."""
        calls: list[list[str]] = []
        report = BenchReport(
            model="m", contenders=(), measurements=(), roofline=None, environment={}
        )

        def call(arguments: Sequence[str]) -> tuple[str, str | None]:
            calls.append(list(arguments))
            failure = "out of memory" if "broken" in arguments[1] else None
            return "a line\n" + json.dumps({"ttft_s": 1.0} | report.to_dict()) + "\n", failure

        monkeypatch.setattr(gpu, "gemma_deploy", call)
        return calls

    def test_steps_that_are_left(self, called: list[list[str]], tmp_path: Path) -> None:
        run = measure(tmp_path, tmp_path, "tensorrt", "float16", SWEEP)

        assert [x[0] for x in called] == ["export", "build", "bench"]
        assert run.report is not None
        assert run.report.model == "m"

    def test_a_bundle_that_is_there_is_not_exported(
        self, called: list[list[str]], tmp_path: Path
    ) -> None:
        (tmp_path / "manifest.json").touch()

        measure(tmp_path, tmp_path, "onnxruntime", "float16", SWEEP)

        assert [x[0] for x in called] == ["bench"]

    def test_a_failure_is_a_result(self, called: list[list[str]], tmp_path: Path) -> None:
        run = measure(tmp_path, tmp_path / "broken", "tensorrt", "float16", SWEEP)

        assert [x[0] for x in called] == ["export"]
        assert run.report is None
        assert run.reason == "out of memory"


def test_the_programs_failure_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, failure = gemma_deploy(["bench", str(tmp_path / "missing")])

    assert failure is not None
    assert failure.startswith("`bench` ended with 2: ")
    assert "missing" in failure
    assert "gemma-deploy bench" in capsys.readouterr().err


def test_results_are_named_by_date_and_gpu(tmp_path: Path) -> None:
    found = result_file(tmp_path, "NVIDIA H100 80GB HBM3", dt.date(2026, 11, 3))

    assert found == tmp_path / "2026-11-03-gpu-nvidia-h100-80gb-hbm3.md"


class TestMain:
    def test_without_a_gpu_nothing_is_measured(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        none = dataclasses.replace(MACHINE, gpus=(), cuda_driver=None)
        monkeypatch.setattr(gpu, "read_machine", lambda: none)
        monkeypatch.setattr(sys, "argv", ["gpu"])

        with pytest.raises(SystemExit) as end:
            gpu.main()

        assert end.value.code == 2
        assert "no NVIDIA driver on this machine" in capsys.readouterr().err

    def test_results_are_written_and_goals_judged(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.setattr(gpu, "read_machine", lambda: MACHINE)
        monkeypatch.setattr(gpu, "read_environment", lambda **_: {"GPU": "NVIDIA L4, 8.9"})
        monkeypatch.setattr(gpu, "gemma_deploy", lambda _: ("", "it crashed"))
        options = ["--checkpoint", str(tmp_path), "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gpu", *options])

        with pytest.raises(SystemExit) as end:
            gpu.main()

        assert end.value.code == 2
        (file,) = tmp_path.glob("*-gpu-nvidia-l4.md")
        assert "Did not run: it crashed" in file.read_text()
        assert "not measured" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            gpu.main()
        assert "is there already" in capsys.readouterr().err
