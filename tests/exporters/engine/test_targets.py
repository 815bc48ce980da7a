import types
from typing import Any

import pytest

from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.exporters.engine.targets import DEFAULT_TARGETS, choose_targets, target_constants
from gemma_deploy.tensorrt import TensorRTLibrary, load_library


def _gpu(major: int, minor: int) -> Gpu:
    return Gpu(name="GPU", compute_capability=(major, minor), memory_bytes=1 << 34)


def _tensorrt() -> TensorRTLibrary:
    log: Any = None
    module = types.SimpleNamespace()
    return TensorRTLibrary(flavour="tensorrt", module=module, version="11.4", log=log)


RTX = load_library("tensorrt-rtx")


@pytest.mark.parametrize(
    ("asked", "gpus", "targets"),
    [
        ([], [], DEFAULT_TARGETS),
        ([], [_gpu(8, 9), _gpu(8, 6)], ("8.9",)),
        (["12.0", "8.6", "12.0"], [], ("8.6", "12.0")),
        (["8.0"], [_gpu(8, 9)], ("8.0",)),
        # The library has no name for it, but it is here.
        ([], [_gpu(9, 0)], ("9.0",)),
        (["9.0"], [_gpu(9, 0)], ("9.0",)),
    ],
)
def test_rtx_builds_for_what_is_asked_or_here_or_common(
    asked: list[str], gpus: list[Gpu], targets: tuple[str, ...]
) -> None:
    assert choose_targets(RTX, asked, gpus, ["bfloat16"]) == targets


def test_rtx_names_its_targets() -> None:
    known = RTX.module.ComputeCapability
    assert target_constants(RTX.module, ["8.0", "12.0"]) == [known.SM80, known.SM120]
    assert target_constants(RTX.module, ["9.0"]) == [known.CURRENT]


def test_the_defaults_are_known() -> None:
    assert RTX.module.ComputeCapability.CURRENT not in target_constants(RTX.module, DEFAULT_TARGETS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("9.0", r"cannot build for compute capability 9.0; it knows 7.5, 8.0, 8.6, 8.9, 12.0"),
        ("sm_89", "'sm_89' is no compute capability; expected one such as 8.9"),
        ("8", "'8' is no compute capability"),
        ("7.5", "bfloat16, which GPUs have from compute capability 8.0 on, not 7.5: export with"),
    ],
)
def test_targets_that_cannot_be_are_refused(asked: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        choose_targets(RTX, ["8.9", asked], [], ["bfloat16"])


def test_fp8_weights_are_for_gpus_that_have_it() -> None:
    assert choose_targets(RTX, [], [], ["float16", "fp8"]) == ("8.9", "12.0")
    assert choose_targets(RTX, ["8.9"], [], ["float16", "fp8"]) == ("8.9",)
    message = r"need fp8, which GPUs have from .* 8.9 on, not 8.6: export with --int8, or leave 8.6"
    for asked, gpus in ((["12.0", "8.6"], []), ([], [_gpu(8, 6)])):
        with pytest.raises(RequestError, match=message):
            choose_targets(RTX, asked, gpus, ["float16", "fp8"])


def test_float16_runs_on_older_gpus() -> None:
    assert choose_targets(RTX, ["7.5"], [], ["float16"]) == ("7.5",)


def test_tensorrt_builds_for_the_gpu_here() -> None:
    assert choose_targets(_tensorrt(), [], [_gpu(9, 0)], ["float16"]) == ("9.0",)
    with pytest.raises(
        RequestError, match=r"tensorrt builds for the GPU of the machine it runs on"
    ):
        choose_targets(_tensorrt(), ["8.9"], [_gpu(8, 9)], ["float16"])
    with pytest.raises(RequestError, match=r"bfloat16"):
        choose_targets(_tensorrt(), [], [_gpu(7, 5)], ["bfloat16"])


def test_tensorrt_needs_a_gpu() -> None:
    with pytest.raises(
        BackendUnavailableError, match=r"needs a GPU to build.*--backend tensorrt-rtx"
    ):
        choose_targets(_tensorrt(), [], [], ["float16"])
