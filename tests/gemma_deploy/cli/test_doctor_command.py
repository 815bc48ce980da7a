import dataclasses
import json
from collections.abc import Callable

import pytest
from click.testing import Result

from gemma_deploy.machine import Machine, read_machine


class TestDoctor:
    def test_says_what_runs_here(self, invoke: Callable[..., Result]) -> None:
        result = invoke("doctor")

        assert result.exit_code == 0
        assert "yes  ONNX Runtime on the CPU: onnxruntime" in result.stdout
        assert "working: CPUExecutionProvider" in result.stdout

    def test_json_holds_facts_and_verdicts(self, invoke: Callable[..., Result]) -> None:
        result = invoke("doctor", "--json")

        report = json.loads(result.stdout)
        verdicts = {c["name"]: c["is_available"] for c in report["capabilities"]}
        assert verdicts["ONNX Runtime on the CPU"] is True
        assert report["machine"]["cores"] >= 1
        assert report["warnings"] == []

    def test_a_machine_that_runs_nothing(
        self, invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken() -> Machine:
            return dataclasses.replace(
                read_machine(),
                working_providers=(),
                onnxruntime_error="libfoo is missing",
                packages={"onnxruntime": "1.24", "onnxruntime-gpu": "1.24"},
            )

        monkeypatch.setattr("gemma_deploy.machine.read_machine", broken)

        result = invoke("doctor")

        assert result.exit_code == 1
        assert "no   ONNX Runtime on the CPU: libfoo is missing" in result.stdout
        assert "-> pip install --upgrade --force-reinstall onnxruntime-gpu" in result.stdout
        assert "Warning: both onnxruntime and onnxruntime-gpu are installed" in result.stdout
