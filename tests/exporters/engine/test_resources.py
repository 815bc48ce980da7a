import types
from pathlib import Path

import pytest

from gemma_deploy.engine_build import EngineBuild, EngineLimits, Layout
from gemma_deploy.errors import EngineBuildError
from gemma_deploy.exporters.engine import resources
from gemma_deploy.exporters.engine.resources import check_resources


def _build(layout: Layout = "one-engine") -> EngineBuild:
    limits = EngineLimits(
        max_batch_size=1, max_seq_len=8, max_step_tokens=8, max_logits=1, num_candidates=1
    )
    return EngineBuild(
        flavour="tensorrt-rtx",
        library_version="1.7",
        targets=("8.9",),
        layout=layout,
        attention="auto",
        plugin_version=None,
        limits=limits,
        graphs={},
        weights="",
    )


def test_a_build_that_fits_is_let_through(tmp_path: Path) -> None:
    check_resources(tmp_path, _build(), 1000)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 3_000_000_000)
    with pytest.raises(
        EngineBuildError,
        match=r"about 5\.41 GiB of memory, and 2\.79 GiB are available: close other",
    ):
        check_resources(tmp_path, _build(), 5_000_000_000)


def test_where_nobody_tells_it_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: None)
    check_resources(tmp_path, _build(), 1000)


@pytest.mark.parametrize(
    ("layout", "needed", "hint"), [("one-engine", "4.72", "space"), ("two-engines", "9.38", "half")]
)
def test_too_little_disk(
    layout: Layout, needed: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=4_000_000_000))
    with pytest.raises(
        EngineBuildError, match=rf"has 3\.73 GiB free, the engine needs {needed} GiB.*{hint}"
    ):
        check_resources(tmp_path, _build(layout), 5_000_000_000)
