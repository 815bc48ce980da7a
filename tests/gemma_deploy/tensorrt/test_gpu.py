import re
from importlib import metadata
from typing import Any

import pytest

from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.tensorrt import gpu as judged
from gemma_deploy.tensorrt.gpu import cuda_major, require_gpu, why_no_gpu

ADA = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30)
PASCAL = Gpu(name="GTX 1080", compute_capability=(6, 1), memory_bytes=8 << 30)


def test_a_gpu_and_a_driver_suffice() -> None:
    for driver, needed in (("13.0", 13), ("13.2", 12), ("12.4", None)):
        assert why_no_gpu("tensorrt-rtx", driver, [PASCAL, ADA], needed, index=1) is None


@pytest.mark.parametrize(
    ("driver", "gpus", "index", "reason"),
    [
        (None, [], 0, "no NVIDIA driver on this machine; .*nvidia.com/drivers"),
        ("12.4", [ADA], 0, "CUDA 12.4, the installed tensorrt-rtx was built for CUDA 13: update"),
        ("12.4", [ADA], 0, "pip uninstall tensorrt_rtx_cu13 && pip install tensorrt_rtx_cu12"),
        ("13.0", [], 0, "cuda:0 is not there, the driver shows no GPU to this process"),
        ("13.0", [ADA], 1, r"cuda:1 is not there, the driver shows 1 CUDA device\(s\)"),
        ("13.0", [PASCAL], 0, "GTX 1080 has compute capability 6.1; 7.5 or newer is needed"),
    ],
)
def test_what_is_missing_is_said(driver: Any, gpus: Any, index: int, reason: str) -> None:
    said = why_no_gpu("tensorrt-rtx", driver, gpus, 13, index)
    assert said is not None
    assert re.search(reason, said)


def test_a_gpu_that_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judged, "read_driver", lambda: ("13.0", (ADA,)))
    assert require_gpu("tensorrt-rtx", 0) == ADA
    with pytest.raises(
        BackendUnavailableError, match="tensorrt-rtx backend cannot run here: cuda:2"
    ):
        require_gpu("tensorrt-rtx", 2)


def test_the_cuda_version_is_in_the_packages_names() -> None:
    assert metadata.version("tensorrt-rtx-cu13")
    assert cuda_major("tensorrt-rtx") == 13
