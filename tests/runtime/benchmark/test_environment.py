import datetime as dt
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.benchmark import environment
from gemma_deploy.runtime.benchmark.environment import (
    clock_text,
    parse_nvidia_smi,
    read_environment,
)

GPU = Gpu(name="NVIDIA L4", compute_capability=(8, 9), memory_bytes=24 << 30)
ANSWER = "550.54.15, 1980 MHz, 2040 MHz, 6251 MHz, 6251 MHz, [N/A]\n"


class TestOnThisMachine:
    def test_everything_is_text(self) -> None:
        found = read_environment(threads=3, device="cpu")

        assert {type(x) for pair in found.items() for x in pair} == {str}
        assert all(found.values())

    def test_versions_are_those_of_the_modules(self) -> None:
        import torch

        found = read_environment(threads=None, device="cpu")

        assert found["torch"] == torch.__version__
        assert found["python"] == sys.version.split()[0]

    def test_threads(self) -> None:
        cores = read_environment(threads=None, device="cpu")["cores"]

        assert read_environment(threads=3, device="cpu")["threads"] == "3"
        assert read_environment(threads=None, device="cpu")["threads"] == f"{cores} (one per core)"

    def test_date_is_now(self) -> None:
        found = read_environment(threads=None, device="cpu")["date"]

        date = dt.datetime.strptime(found, "%Y-%m-%d %H:%M UTC").replace(tzinfo=dt.UTC)
        assert abs(dt.datetime.now(dt.UTC) - date) < dt.timedelta(minutes=2)

    @pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="clocks are read from /proc")
    def test_cpu_is_what_the_system_says(self) -> None:
        found = read_environment(threads=None, device="cpu")

        assert found["CPU"] in Path("/proc/cpuinfo").read_text()

    def test_no_backend_is_imported(self) -> None:
        code = (
            "import sys; from gemma_deploy.runtime.benchmark.environment import read_environment;"
            "read_environment(threads=None, device='auto');"
            "print({'torch', 'onnx', 'onnxruntime'} & set(sys.modules))"
        )
        answer = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )

        assert answer.stdout == "set()\n"

    def test_another_device_is_refused(self) -> None:
        with pytest.raises(RequestError, match="device is 'tpu'; expected auto, cpu, cuda"):
            read_environment(threads=None, device="tpu")


class TestGpu:
    @pytest.fixture(autouse=True)
    def _a_machine_with_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpus = (Gpu(name="other", compute_capability=(7, 5), memory_bytes=1 << 30), GPU)
        monkeypatch.setattr(environment, "read_driver", lambda: ("12.4", gpus))
        monkeypatch.setattr(environment, "pci_bus_id", lambda index: f"0000:0{index}:00.0")
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")

    def test_the_chosen_gpu_is_described(self, monkeypatch: pytest.MonkeyPatch) -> None:
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> Any:
            commands.append(command)
            return subprocess.CompletedProcess(command, 0, stdout=ANSWER)

        monkeypatch.setattr(subprocess, "run", run)

        found = read_environment(threads=None, device="cuda:1")

        assert found["GPU"] == "NVIDIA L4, compute capability 8.9"
        assert found["GPU memory"] == "24.0 GiB"
        assert found["driver"] == "550.54.15"
        assert found["GPU clock"] == "1980 MHz"
        assert "--id=0000:01:00.0" in commands[0]

    def test_a_tool_that_hangs_costs_only_its_facts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def run(command: list[str], **_: Any) -> Any:
            raise subprocess.TimeoutExpired(command, 20)

        monkeypatch.setattr(subprocess, "run", run)

        found = read_environment(threads=None, device="auto")

        assert found["GPU"].startswith("other")
        assert "driver" not in found

    def test_runs_on_the_cpu_name_no_gpu(self) -> None:
        assert "GPU" not in read_environment(threads=None, device="cpu")

    def test_a_gpu_that_is_not_there(self) -> None:
        assert "GPU" not in read_environment(threads=None, device="cuda:2")


def test_what_nvidia_smi_does_not_know_is_left_out() -> None:
    found = parse_nvidia_smi(ANSWER)

    assert found["GPU memory clock, highest"] == "6251 MHz"
    assert "GPU power limit" not in found
    assert parse_nvidia_smi("Unable to determine the device handle") == {}


@pytest.mark.parametrize(
    ("now", "highest", "text"),
    [
        ([], [], ""),
        ([2445.4, 2445.4], [], "2445 MHz"),
        ([1500.0, 3200.0], [3700.0, 3700.0], "1500 to 3200 MHz, at most 3700 MHz"),
        ([], [3700.0], "at most 3700 MHz"),
    ],
)
def test_clocks(now: list[float], highest: list[float], text: str) -> None:
    assert clock_text(now, highest) == text
