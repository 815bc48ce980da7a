import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.machine import Machine

SOUND = Machine(
    system="Linux x86_64",
    python="3.12.1",
    cpu="A processor",
    cpu_features=("avx2",),
    cores=4,
    memory_bytes=16 << 30,
    free_disk_bytes=100 << 30,
    packages={
        "torch": "2.9.0",
        "onnx": "1.19.0",
        "onnx-ir": "1.1",
        "onnxscript": "0.5",
        "onnxruntime-gpu": "1.24.0",
    },
    torch_cuda=None,
    cuda_driver=None,
    gpus=(),
    compiled_providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    working_providers=("CPUExecutionProvider",),
    onnxruntime_error=None,
    tensorrt_errors={},
    tensorrt_cuda={},
)

GPU = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30)
DEVICE = dataclasses.replace(
    SOUND,
    working_providers=(),
    gpus=(GPU,),
    cuda_driver="13.0",
    packages={"tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5"},
)


class TestDoctor:
    def test_says_what_runs(
        self, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretend(monkeypatch, SOUND)

        result = invoke("doctor")

        assert result.exit_code == 0
        assert "yes  ONNX Runtime on the CPU: onnxruntime-gpu 1.24.0" in result.stdout
        assert "working: CPUExecutionProvider" in result.stdout
        assert "Warning" not in result.stdout

    def test_json_holds_facts_and_verdicts(
        self, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretend(monkeypatch, SOUND)

        result = invoke("doctor", "--json")

        report = json.loads(result.stdout)
        verdicts = {c["name"]: c["is_available"] for c in report["capabilities"]}
        assert verdicts["ONNX Runtime on the CPU"] is True
        assert report["machine"]["cores"] == 4
        assert report["warnings"] == []

    def test_a_machine_that_runs_nothing(
        self, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = dataclasses.replace(
            SOUND,
            working_providers=(),
            onnxruntime_error="libfoo is missing",
            packages={"onnxruntime": "1.24", "onnxruntime-gpu": "1.24"},
        )
        pretend(monkeypatch, broken)

        result = invoke("doctor")

        assert result.exit_code == 1
        assert "no   ONNX Runtime on the CPU: libfoo is missing" in result.stdout
        assert "-> pip install --upgrade --force-reinstall onnxruntime-gpu" in result.stdout
        assert "Warning: both onnxruntime and onnxruntime-gpu are installed" in result.stdout

    def test_what_cannot_be_told_is_neither_yes_nor_no(
        self, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gpu = Gpu(name="H100", compute_capability=(9, 0), memory_bytes=80 << 30)
        packages = {**SOUND.packages, "tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5"}
        machine = dataclasses.replace(SOUND, gpus=(gpu,), cuda_driver="13.0", packages=packages)
        pretend(monkeypatch, machine)

        result = invoke("doctor")

        assert "???  running tensorrt-rtx engines: tensorrt-rtx 1.7.1 on H100" in result.stdout

    def test_a_bundle_without_engines(
        self,
        invoke: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        tiny_bundle: Callable[[str], Path],
    ) -> None:
        pretend(monkeypatch, SOUND)
        folder = str(tiny_bundle("gemma1"))

        assert f"the engines of {folder} would load\n  none" in invoke("doctor", folder).stdout
        assert json.loads(invoke("doctor", folder, "--json").stdout)["engines"] == []

    def test_without_onnxruntime_engines_are_enough(
        self, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretend(monkeypatch, DEVICE)

        assert invoke("doctor").exit_code == 0

    @pytest.mark.parametrize(
        ("change", "mark", "expected"),
        [
            ({}, "yes", 0),
            ({"gpus": (), "cuda_driver": None}, "???", 0),
            ({"packages": {**SOUND.packages, "tensorrt-rtx": "1.6"}}, "no ", 1),
            ({"gpus": (dataclasses.replace(GPU, compute_capability=(12, 0)),)}, "no ", 1),
        ],
        ids=["it loads", "no GPU to ask", "another version", "another GPU"],
    )
    def test_an_engine_decides_over_what_else_runs(
        self,
        change: dict[str, Any],
        mark: str,
        expected: int,
        invoke: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        write_engine: Callable[[Path], Path],
        tmp_path: Path,
    ) -> None:
        runs_bundles = dataclasses.replace(DEVICE, working_providers=("CPUExecutionProvider",))
        pretend(monkeypatch, dataclasses.replace(runs_bundles, **change))

        result = invoke("doctor", write_engine(tmp_path / "packed"))

        assert f"{mark}  engine packed: " in result.stdout
        assert result.exit_code == expected

    def test_one_engine_of_a_bundle_is_enough(
        self,
        invoke: Callable[..., Result],
        monkeypatch: pytest.MonkeyPatch,
        tiny_bundle: Callable[..., Path],
        write_engine: Callable[[Path], Path],
        tmp_path: Path,
    ) -> None:
        pretend(monkeypatch, DEVICE)
        bundle = tmp_path / "bundle"
        shutil.copytree(tiny_bundle("gemma1", "float16"), bundle)
        write_engine(bundle / "engines" / "of-other-graphs")

        assert invoke("doctor", bundle).exit_code == 1

        fitting = write_engine(bundle / "engines" / "fitting") / "engine.json"
        manifest = json.loads((bundle / "manifest.json").read_text())
        hashes = {name: record["sha256"] for name, record in manifest["files"].items()}
        engine = json.loads(fitting.read_text())
        engine["build"]["weights"] = hashes["weights.safetensors"]
        for phase in ("prefill", "decode"):
            engine["build"]["graphs"][phase] = hashes[f"{phase}.tensorrt.onnx"]
        fitting.write_text(json.dumps(engine))
        result = invoke("doctor", bundle)

        assert "yes  engine fitting" in result.stdout
        assert "no   engine of-other-graphs" in result.stdout
        assert result.exit_code == 0

    def test_this_machine(self, invoke: Callable[..., Result]) -> None:
        result = invoke("doctor", "--json")

        assert json.loads(result.stdout)["machine"]["cores"] >= 1


def pretend(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr("gemma_deploy.machine.read_machine", lambda: machine)
