import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from gemma_deploy.install_hint import install_line
from gemma_deploy.runtime.benchmark import sweep
from gemma_deploy.runtime.benchmark.machine_rates import MachineRates
from gemma_deploy.runtime.benchmark.results import BenchReport

SHORT = ("--prompt-tokens", "6", "--new-tokens", "4", "--rounds", "2", "--device", "cpu")
Invoke = Callable[..., Result]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine be as fast as a figure says."""
    found = MachineRates(read_bytes_per_s=1e10, matrix_flop_per_s=1e11)
    monkeypatch.setattr(sweep, "measure_rates", lambda *_: found)


@pytest.mark.usefixtures("rates")
class TestRuns:
    def test_json_is_the_last_line(self, invoke: Invoke, bundle: Path) -> None:
        options = ("--prompt-tokens", "6,9", "--batch-size", "2", *SHORT[2:], "--threads", "1")
        result = invoke("bench", bundle, *options, "--json")
        assert result.exit_code == 0, result.stderr
        raw = json.loads(result.stdout.splitlines()[-1])
        report = BenchReport.from_dict(raw)
        assert [str(case) for case in report.cases()] == [
            "prompt 6, new 4, batch 2",
            "prompt 9, new 4, batch 2",
        ]
        first = report.measurements[0]
        assert [len(x.step_s) for x in first.rounds] == [3, 3]
        decode = sorted(2 * 3 / sum(x.step_s) for x in first.rounds)
        assert raw["decode_tokens_per_s"] == pytest.approx(sum(decode) / 2)
        prefill = sorted(12 / x.ttft_s for x in first.rounds)
        assert raw["prefill_tokens_per_s"] == pytest.approx(sum(prefill) / 2)
        assert raw["ttft_s"] == pytest.approx(first.ttft_s().median)
        assert raw["peak_memory_bytes"] > 1 << 24
        assert raw["environment"]["threads"] == "1"
        assert report.roofline is not None

    def test_baselines_files_and_going_on(
        self, invoke: Invoke, bundle: Path, bundle_checkpoint: Path, tmp_path: Path
    ) -> None:
        save, plot, page = (tmp_path / name for name in ("r.jsonl", "r.svg", "r.html"))
        files = ("--save", save, "--plot", plot, "--report", page)
        baselines = ("--against", "torch-eager,transformers", "--checkpoint", bundle_checkpoint)
        command = ("bench", bundle, *SHORT, *baselines, *files)
        result = invoke(*command)
        assert result.exit_code == 0, result.stderr
        assert result.stderr.count("loading ") == 3
        for name in ("gemma-deploy", "torch-eager", "transformers"):
            assert name in result.stdout
        assert plot.read_text().startswith("<svg")
        assert "<svg" in page.read_text()
        lines = save.read_text()
        again = invoke(*command)
        assert again.exit_code == 0, again.stderr
        assert "loading" not in again.stderr
        assert again.stdout == result.stdout
        assert save.read_text() == lines
        other = invoke(*command, "--warmup", "2")
        assert other.exit_code == 2
        assert "the rounds of another command: its warmup is 1, this one's 2" in other.stderr


def test_ctrl_c_keeps_what_was_measured(
    start: Callable[..., "subprocess.Popen[bytes]"], bundle: Path, tmp_path: Path
) -> None:
    save = tmp_path / "rounds.jsonl"
    options = ("--rounds", "100000", "--save", save, "--json", *SHORT[:4], "--device", "cpu")
    with start("bench", bundle, *options, "--threads", "1") as process:
        while not (save.exists() and '"round"' in save.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        # A terminal sends it to every process: the workers leave it to the program.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in map(int, children):
            os.kill(pid, signal.SIGINT)
        time.sleep(0.2)  # in which one that did not would end, and take the command along
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert b"Interrupted: what was measured" in stderr
    assert b"Traceback" not in stderr
    measured = json.loads(stdout.splitlines()[-1])["measurements"][0]["rounds"]
    assert len(measured) == save.read_text().count('"round"')


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_before_the_first_round(
    invoke: Invoke, bundle: Path, monkeypatch: pytest.MonkeyPatch, *, as_json: bool
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_sweep", interrupted)
    result = invoke("bench", bundle, *SHORT, *(["--json"] if as_json else []))
    assert result.exit_code == 130
    assert result.stdout == ""
    assert (
        "Interrupted: no round had been run to its end, so nothing was measured." in result.stderr
    )
    assert "follows" not in result.stderr


@pytest.mark.usefixtures("rates")
def test_only_packages_that_matter_are_listed(invoke: Invoke, bundle: Path) -> None:
    result = invoke("bench", bundle, *SHORT, "--threads", "1", "--json")
    environment = json.loads(result.stdout.splitlines()[-1])["environment"]
    assert {"onnxruntime", "onnxruntime-gpu"} & environment.keys()
    assert "gemma-deploy" in environment
    others = {"torch", "onnx", "onnx-ir", "onnxscript", "huggingface_hub", "transformers", "triton"}
    assert not others & environment.keys()


@pytest.mark.usefixtures("rates")
def test_a_busy_machine_is_warned_of_before_and_in_the_page(
    invoke: Invoke, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 1.0, 1.0))
    page = tmp_path / "page.html"
    result = invoke("bench", bundle, *SHORT, "--threads", "1", "--report", page)
    assert result.exit_code == 0, result.stderr
    warning = result.stderr.index("Warning: the machine was busy before the benchmark began")
    assert warning < result.stderr.index("loading ")
    assert "Warning: the machine was busy" in page.read_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt-tokens", "8,x"], 2, "'8,x'; expected whole numbers from 1 on, separated by"),
        (["--new-tokens", "1"], 2, "'1'; expected whole numbers from 2 on"),
        (["--against", "llama.cpp"], 2, "'llama.cpp'; expected any of torch-eager, torch-compile"),
        (["--against", "torch-eager"], 2, "give --checkpoint FOLDER, the one that"),
        (["--checkpoint", "x"], 2, "--checkpoint is what baselines run: name some with --against"),
        (["--plot", "a.png"], 2, "--plot is a.png; expected a file that ends in .svg"),
        (["--report", "no/a.html"], 2, "--report is no/a.html; the folder no does not exist"),
        (["--prompt-tokens", "100000"], 2, "prompt 100000, new 64, batch 1: 100,063 tokens must"),
        (["--device", "gpu"], 2, "device is 'gpu'; expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(
    options: list[str], code: int, message: str, invoke: Invoke, bundle: Path
) -> None:
    result = invoke("bench", bundle, *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert "loading" not in result.stderr


def test_a_checkpoint_of_another_model(invoke: Invoke, bundle: Path, tiny_checkpoint: Any) -> None:
    other = tiny_checkpoint("gemma2")
    result = invoke("bench", bundle, "--against", "torch-eager", "--checkpoint", other)
    assert result.exit_code == 1
    assert f"{other} is not what {bundle} was made of: its" in result.stderr


def test_a_baseline_that_is_not_installed(
    invoke: Invoke, bundle: Path, bundle_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "transformers" else find_spec(name, *rest),
    )
    options = ("--against", "transformers", "--checkpoint", bundle_checkpoint)
    result = invoke("bench", bundle, *SHORT, *options)
    assert result.exit_code == 1
    assert install_line("bench") in result.stderr


def test_help_teaches(invoke: Invoke) -> None:
    text = invoke("bench", "--help").stdout
    assert "gemma-deploy bench gemma-2b --against torch-eager,transformers" in text
    assert "--save keeps each round" in text
