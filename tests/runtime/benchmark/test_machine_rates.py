"""What the machine can do: parts of the measurement, and the process it is made in."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from gemma_deploy.errors import SessionError
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.runtime.benchmark import bandwidth, machine_rates, matrix_rate
from gemma_deploy.runtime.benchmark.machine_rates import measure_rates
from gemma_deploy.runtime.devices import Device

CPU = Device(kind="cpu")


def test_read_bandwidth_is_that_of_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_LEAST_BYTES", 1 << 22)
    monkeypatch.setattr(bandwidth, "_CACHES", 0)
    assert 1e8 < bandwidth.read_bandwidth(2) < 1e14


def test_caches_of_the_third_level_are_summed(tmp_path: Path) -> None:
    for cpu, (size, shared) in enumerate(
        [("32768K", "0-1"), ("32768K", "0-1"), ("16384K", "2"), ("", "3")]
    ):
        folder = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
        (folder / "shared_cpu_list").write_text(f"{shared}\n")
    assert bandwidth.last_level_cache_bytes(tmp_path) == 48 << 20
    assert bandwidth.last_level_cache_bytes(tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    "text", ["int4/32", "int4/128", "int8/64", "int8/channel", "nf4/64", "fp8/channel", "float16"]
)
def test_there_is_a_product_for_every_format(text: str) -> None:
    model = matrix_rate.product(WeightFormat.parse(text), 128)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.ones((3, 128), np.float32)})
    assert found.shape == (3, 128)
    assert np.abs(found).max() > 0


def test_matrix_rate_counts_two_operations_per_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_rate, "_SIZE", 128)
    monkeypatch.setattr(matrix_rate, "_TOKENS", 16)
    clock = iter(np.arange(0, 8, 0.25))
    time = type("time", (), {"perf_counter": staticmethod(lambda: float(next(clock)))})
    monkeypatch.setattr(matrix_rate, "time", time)
    assert matrix_rate.matrix_rate(WeightFormat("float32"), 1) == 2 * 16 * 128 * 128 / 0.25


def test_it_is_measured_in_a_process_of_its_own() -> None:
    found = measure_rates(WeightFormat("int4", 32), CPU, 1)
    assert 1e8 < found.read_bytes_per_s < 1e13
    assert 1e8 < found.matrix_flop_per_s < 1e15


def test_a_process_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "_MODULE", "gemma_deploy.no_such_module")
    with pytest.raises(SessionError, match=r"rates were not measured: .* code 1: .*no_such_module"):
        measure_rates(WeightFormat("int4", 32), CPU, 1)
