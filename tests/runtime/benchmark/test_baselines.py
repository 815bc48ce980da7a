import re
from typing import Any

import pytest

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.install_hint import install_line
from gemma_deploy.runtime.benchmark import baselines
from gemma_deploy.runtime.benchmark.baselines import (
    check_installed,
    lack_of_memory,
    needed_bytes,
    own_dtype,
)
from gemma_deploy.runtime.benchmark.plan import BASELINES
from gemma_deploy.runtime.benchmark.results import BenchCase
from gemma_deploy.runtime.devices import Device

CPU = Device(kind="cpu")


def test_all_baselines_are_installed_where_tests_run() -> None:
    check_installed(BASELINES)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name in installed else None
    )
    check_installed(["torch-eager", "torch-compile"])
    with pytest.raises(
        BackendUnavailableError,
        match=re.escape(f"which is not installed: {install_line('bench')}; or leave that"),
    ):
        check_installed(["torch-eager", "transformers"])


def test_the_estimate_grows_with_what_is_asked_for(text_checkpoint: Any) -> None:
    config = Checkpoint.open(text_checkpoint("gemma1")).config
    small = BenchCase(prompt_tokens=8, new_tokens=4)
    large = BenchCase(prompt_tokens=256, new_tokens=4, batch_size=64)
    one = needed_bytes("torch-eager", config, "float32", [small])
    assert needed_bytes("torch-eager", config, "float32", [small, large]) > one
    assert needed_bytes("torch-eager", config, "bfloat16", [small]) < one
    assert needed_bytes("torch-compile", config, "float32", [small]) > one


def test_own_dtype_is_the_embedding_s(text_checkpoint: Any) -> None:
    assert own_dtype(Checkpoint.open(text_checkpoint("gemma1"))) == "float32"


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (2_000_000_000, "it needs about 2.79 GiB of memory, and 1.86 GiB are available"),
        (3_000_000_000, None),
        (None, None),
    ],
)
def test_lack_of_memory(
    available: int | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "available_memory_bytes", lambda: available)
    assert lack_of_memory(3_000_000_000, CPU) == expected


def test_on_a_gpu_its_own_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "free_gpu_bytes", lambda index: (index + 1) * 1_000_000_000)
    assert lack_of_memory(1_500_000_000, Device(kind="cuda", index=1)) is None
    assert lack_of_memory(1_500_000_000, Device(kind="cuda")) == (
        "it needs about 1.40 GiB of GPU memory, and 953.67 MiB are available"
    )
