from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import gemma_deploy
from gemma_deploy.bundle import Bundle
from gemma_deploy.engine import engines_of
from gemma_deploy.errors import (
    BackendUnavailableError,
    BundleError,
    EngineBuildError,
    RequestError,
)
from gemma_deploy.exporters.engine import BuildOptions, build, build_engine
from gemma_deploy.file_records import FileRecord, sha256_of
from gemma_deploy.tensorrt import load_library

if TYPE_CHECKING:
    from tests.exporters.engine.conftest import EngineBundles, Engines, Options

RTX = load_library("tensorrt-rtx")


def _says_rtx(plan: Path) -> int:
    """Return what RTX finds wrong with a plan, as bits; that no GPU is here is none of them."""
    _, diagnostics = RTX.module.Runtime(RTX.log.logger).get_engine_validity(plan.read_bytes())
    RTX.log.take_errors()
    return int(diagnostics)


def test_rtx_tells_a_plan_from_other_bytes(tmp_path: Path) -> None:
    (tmp_path / "no.plan").write_bytes(bytes(4096))
    assert _says_rtx(tmp_path / "no.plan") != 0


@pytest.mark.parametrize(
    ("name", "dtype", "options", "plans"),
    [
        ("gemma1", "float16", {"attention": "native"}, ["engine.plan"]),
        ("gemma2", "bfloat16", {"layout": "two-engines"}, ["decode.plan", "prefill.plan"]),
        ("gemma3", "float16", {"max_batch_size": 3, "max_logits": 4}, ["engine.plan"]),
        ("gemma3", "float16", {"attention": "native"}, ["engine.plan"]),
        (
            "gemma3",
            "float16",
            {"attention": "plugin", "compute_capabilities": ("12.0",)},
            ["engine.plan"],
        ),
    ],
)
def test_an_engine_is_built_of_every_generation(
    name: str, dtype: str, options: dict[str, Any], plans: list[str], engine: Engines
) -> None:
    built = engine(name, dtype, **options)
    manifest = built.manifest
    assert sorted(manifest.files) == plans
    assert sorted(path.name for path in built.folder.iterdir()) == sorted([*plans, "engine.json"])
    for plan in plans:
        assert _says_rtx(built.folder / plan) == 0
    assert built.changed_files() == []
    assert built.folder.name == manifest.build.key
    assert manifest.cache_dtype == dtype
    assert manifest.plans["decode"].profile == (1 if plans == ["engine.plan"] else 0)
    assert built.plan_path("prefill").name == plans[-1]
    has_plugin = name == "gemma2" or (name == "gemma3" and manifest.build.attention != "native")
    assert (manifest.build.plugin_version is not None) == has_plugin


def test_progress_reaches_the_caller(engine_bundle: EngineBundles, rtx_options: Options) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engine(
        engine_bundle("gemma1"),
        rtx_options(attention="native", compute_capabilities=()),
        force=True,
        on_progress=lambda *x: seen.append(x),
    )
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["preparing the graph", "building the engine", "writing the plan"]
    for stage in stages[1:]:
        done = [done for name, done, _ in seen if name == stage]
        assert done == sorted(done)
        assert done[-1] == next(total for name, _, total in seen if name == stage)


def test_several_targets_share_the_weights(engine: Engines) -> None:
    one = engine("gemma1", "float16", attention="native")
    three = engine("gemma1", "float16", attention="native", compute_capabilities=())
    assert three.manifest.build.targets == ("8.6", "8.9", "12.0")
    assert three.folder.name.startswith(f"tensorrt-rtx-{RTX.version}-sm86+sm89+sm120-")
    sizes = [x.manifest.files["engine.plan"].size_bytes for x in (one, three)]
    assert sizes[1] > sizes[0]


def test_an_engine_is_found_by_its_bundle_and_not_built_twice(
    engine_bundle: EngineBundles, engine: Engines, rtx_options: Options
) -> None:
    first = engine("gemma1", "float16", attention="native")
    bundle = Bundle.open(engine_bundle("gemma1").folder)
    again = build_engine(bundle, rtx_options(attention="native"))
    assert not again.is_new
    assert again.engine.folder == first.folder
    assert first.folder in [x.folder for x in engines_of(bundle)[0]]
    by_name = gemma_deploy.build(str(bundle.folder), rtx_options(attention="native"))
    assert by_name.folder == first.folder


def test_an_engine_is_built_again_if_forced_or_damaged(
    engine_bundle: EngineBundles,
    rtx_options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = Bundle.open(
        shutil.copytree(engine_bundle("gemma1").folder, tmp_path / "bundle", dirs_exist_ok=True)
    )
    calls = []

    def build_in_child(request: Any, _on_progress: Any) -> FileRecord:
        calls.append(request["phase"])
        Path(request["plan"]).write_bytes(b"plan")
        return FileRecord(size_bytes=4, sha256=hashlib.sha256(b"plan").hexdigest())

    monkeypatch.setattr(build, "build_in_child", build_in_child)
    options = rtx_options(max_seq_len=32)
    assert build_engine(bundle, options).is_new
    assert not build_engine(bundle, options).is_new
    assert build_engine(bundle, options, force=True).is_new
    engine_folder = build_engine(bundle, options).engine.folder
    (engine_folder / "engine.plan").write_bytes(b"pl")
    assert build_engine(bundle, options).is_new
    assert calls == ["prefill"] * 3
    monkeypatch.setattr(build, "_versions", lambda: {"gemma-deploy": "another"})
    assert build_engine(bundle, options).is_new
    assert not build_engine(bundle, options).is_new


@pytest.fixture
def bundle_copy(engine_bundle: EngineBundles, tmp_path: Path) -> Bundle:
    """A bundle without engines, to be changed."""
    folder = engine_bundle("gemma1").folder
    ignore = shutil.ignore_patterns("engines")
    return Bundle.open(shutil.copytree(folder, tmp_path / "my bundle", ignore=ignore))


def _partial_folders(bundle: Bundle) -> list[Path]:
    return list((bundle.folder / "engines").glob(".*"))


class TestNothingIsLeft:
    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, bundle_copy: Bundle) -> Iterator[None]:
        yield
        assert not (bundle_copy.folder / "engines").exists()

    def test_when_the_build_is_killed(self, bundle_copy: Bundle, rtx_options: Options) -> None:
        others = _children()

        def kill_child(stage: str, *_: int) -> None:
            if stage == "building the engine":
                (child,) = _children() - others
                os.kill(child, signal.SIGKILL)

        with pytest.raises(EngineBuildError, match=r"was killed \(SIGKILL\), .* memory runs out"):
            build_engine(bundle_copy, rtx_options(), on_progress=kill_child)

    def test_when_it_is_interrupted(self, bundle_copy: Bundle, rtx_options: Options) -> None:
        others = _children()

        def interrupt(stage: str, *_: int) -> None:
            if stage == "building the engine":
                assert len(_partial_folders(bundle_copy)) == 1
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build_engine(bundle_copy, rtx_options(), on_progress=interrupt)
        assert _children() <= others

    def test_when_the_disk_is_full(self, bundle_copy: Bundle, rtx_options: Options) -> None:
        old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old_limits[1]))
        try:
            with pytest.raises(EngineBuildError, match=r"cannot write .* Nothing was left behind"):
                build_engine(bundle_copy, rtx_options())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)

    def test_when_memory_does_not_suffice(
        self, bundle_copy: Bundle, monkeypatch: pytest.MonkeyPatch, rtx_options: Options
    ) -> None:
        where = "gemma_deploy.exporters.engine.resources.available_memory_bytes"
        monkeypatch.setattr(where, lambda: 1 << 20)
        with pytest.raises(EngineBuildError, match="MiB of memory"):
            build_engine(bundle_copy, rtx_options())


def _children() -> set[int]:
    """Return the processes this one started, as Linux tells; torch's compiler keeps some for later."""
    return {
        int(pid)
        for path in Path("/proc/self/task").glob("*/children")
        for pid in path.read_text().split()
    }


def _replace_graph(bundle: Bundle, old: bytes, new: bytes) -> Bundle:
    """Change the prefill graph, and the manifest with it."""
    path = bundle.graph_path("prefill", "tensorrt")
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    manifest = bundle.folder / "manifest.json"
    stated = bundle.manifest.files[path.name].sha256
    manifest.write_text(manifest.read_text().replace(stated, sha256_of(path)))
    return Bundle.open(bundle.folder)


def test_the_library_s_own_words_are_passed_on(bundle_copy: Bundle, rtx_options: Options) -> None:
    bundle = _replace_graph(bundle_copy, b"Add", b"And")
    with pytest.raises(EngineBuildError, match=r"could not parse the graph:\n(.|\n)+"):
        build_engine(bundle, rtx_options(attention="native"))


def test_a_graph_of_another_bundle_is_refused(bundle_copy: Bundle, rtx_options: Options) -> None:
    path = bundle_copy.graph_path("prefill", "tensorrt")
    path.write_bytes(path.read_bytes().replace(b"RotaryEmbedding", b"RotaryImbedding"))
    with pytest.raises(BundleError, match=r"prefill.tensorrt.onnx was changed"):
        build_engine(bundle_copy, rtx_options())


def test_a_graph_of_another_model_is_refused(bundle_copy: Bundle, rtx_options: Options) -> None:
    bundle = _replace_graph(bundle_copy, b"logits_index", b"logits_andex")
    with pytest.raises(
        EngineBuildError, match=r"inputs are .*logits_andex.*, expected .*logits_index"
    ):
        build_engine(bundle, rtx_options(attention="native"))


def test_a_float32_bundle_has_no_engines(tiny_bundle: Any, rtx_options: Options) -> None:
    bundle = Bundle.open(tiny_bundle("gemma1", "float32"))
    with pytest.raises(BundleError, match=r"float16 or bfloat16.*--fp16"):
        build_engine(bundle, rtx_options())


def test_options_that_cannot_be_are_refused_before_anything_is_built(
    engine_bundle: EngineBundles, rtx_options: Options
) -> None:
    with pytest.raises(RequestError, match=r"max_seq_len is 513; .* 1 to 512"):
        build_engine(engine_bundle("gemma1"), rtx_options(max_seq_len=513))
    with pytest.raises(RequestError, match=r"cannot build for compute capability 9.0"):
        build_engine(engine_bundle("gemma1"), rtx_options(compute_capabilities=("9.0",)))
    with pytest.raises(RequestError, match=r"bfloat16, which GPUs have from"):
        build_engine(
            engine_bundle("gemma2", "bfloat16"), rtx_options(compute_capabilities=("7.5",))
        )
    with pytest.raises(RequestError, match=r"caps attention scores at 10 in all 3 layers"):
        build_engine(engine_bundle("gemma2", "bfloat16"), rtx_options(attention="native"))


def test_tensorrt_that_is_not_installed(engine_bundle: EngineBundles) -> None:
    with pytest.raises(BackendUnavailableError, match=r'pip install .*\[tensorrt\]"'):
        build_engine(engine_bundle("gemma1"), BuildOptions(flavour="tensorrt"))


def test_a_library_that_lacks_a_feature(
    engine_bundle: EngineBundles, monkeypatch: pytest.MonkeyPatch, rtx_options: Options
) -> None:
    class OnnxParser:
        pass

    module = type("Module", (), {"OnnxParser": OnnxParser, "Builder": RTX.module.Builder})
    old = dataclasses.replace(RTX, module=module, version="1.4")
    monkeypatch.setattr(build, "load_library", lambda _: old)
    with pytest.raises(BackendUnavailableError, match=r"1.4 has no OnnxParser.load_initializer"):
        build_engine(engine_bundle("gemma1"), rtx_options())


def test_a_missing_package_is_named_before_a_process_is_started(
    engine_bundle: EngineBundles, rtx_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(engine_bundle("gemma1").folder)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnx_ir" else found(name)
    )
    with pytest.raises(BackendUnavailableError, match=r"needs onnx_ir.*pip install onnx onnx-ir"):
        build_engine(bundle, rtx_options())
