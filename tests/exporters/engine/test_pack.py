from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.engine import ENGINE_FILE, EngineFolder, EngineManifest, Plan
from gemma_deploy.engine_build import EngineBuild
from gemma_deploy.errors import EngineError, ExportError, OutputExistsError, RequestError
from gemma_deploy.exporters.engine.build import plan_build
from gemma_deploy.exporters.engine.pack import pack_engine
from gemma_deploy.file_records import FileRecord, record_file
from gemma_deploy.tensorrt import load_library
from gemma_deploy.tokenizer import GemmaTokenizer

if TYPE_CHECKING:
    from tests.exporters.engine.conftest import EngineBundles, Options

PLAN = b"a plan" * 1000


@pytest.fixture
def bundle(engine_bundle: EngineBundles, tmp_path: Path) -> Bundle:
    """A bundle with tokenizer and licence and without engines, to be changed."""
    ignore = shutil.ignore_patterns("engines")
    folder = shutil.copytree(engine_bundle("gemma1").folder, tmp_path / "bundle", ignore=ignore)
    GemmaTokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("The terms of this model.")
    tokenizer = [path.name for path in GemmaTokenizer.files(folder)]
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"] = tokenizer
    for name in (*tokenizer, "LICENSE"):
        manifest["files"][name] = dataclasses.asdict(record_file(folder / name))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


@pytest.fixture
def build(bundle: Bundle, rtx_options: Options) -> EngineBuild:
    options = rtx_options(attention="native")
    return plan_build(bundle, options, load_library("tensorrt-rtx"), gpus=[])


def _add_engine(bundle: Bundle, build: EngineBuild) -> EngineFolder:
    """Write an engine whose plan is no plan: packing does not look into it."""
    folder = bundle.folder / "engines" / build.key
    folder.mkdir(parents=True)
    (folder / "engine.plan").write_bytes(PLAN)
    record = FileRecord(size_bytes=len(PLAN), sha256=hashlib.sha256(PLAN).hexdigest())
    manifest = EngineManifest(
        model=bundle.config,
        cache_dtype="float16",
        build=build,
        plans={
            "prefill": Plan(path="engine.plan", profile=0),
            "decode": Plan(path="engine.plan", profile=1),
        },
        tokenizer=(),
        generation=None,
        model_max_seq_len=512,
        files={"engine.plan": record},
        versions={},
    )
    (folder / ENGINE_FILE).write_text(manifest.to_json())
    return EngineFolder.open(folder)


def test_a_packed_engine_has_what_generating_needs(
    bundle: Bundle, build: EngineBuild, tmp_path: Path
) -> None:
    engine = _add_engine(bundle, build)
    seen: list[tuple[str, int, int]] = []
    packed = pack_engine(
        bundle, "tensorrt-rtx", tmp_path / "out", on_progress=lambda *x: seen.append(x)
    )
    names = {path.name for path in packed.folder.iterdir()}
    tokenizer = set(bundle.manifest.tokenizer)
    assert tokenizer
    assert names == tokenizer | {
        ENGINE_FILE,
        "engine.plan",
        "generation_config.json",
        "LICENSE",
    }
    assert packed.changed_files() == []
    assert packed.manifest.build == engine.manifest.build
    assert packed.manifest.model == bundle.config
    assert packed.manifest.source == bundle.manifest.source is not None
    assert packed.generation_config() == bundle.generation_config()
    assert set(packed.manifest.tokenizer) == tokenizer
    assert seen[-1][1] == seen[-1][2] == sum(x.size_bytes for x in packed.manifest.files.values())


def test_a_bundle_without_engines(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no tensorrt-rtx engine: .*`gemma-deploy build "):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "out")


def test_an_engine_of_the_other_flavour_is_none(
    bundle: Bundle, build: EngineBuild, tmp_path: Path
) -> None:
    _add_engine(bundle, build)
    with pytest.raises(EngineError, match="no tensorrt engine"):
        pack_engine(bundle, "tensorrt", tmp_path / "out")


def test_of_several_engines_one_is_named(
    bundle: Bundle, build: EngineBuild, tmp_path: Path
) -> None:
    first = _add_engine(bundle, build)
    second = _add_engine(bundle, dataclasses.replace(build, targets=("12.0",)))
    with pytest.raises(RequestError) as caught:
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "out")
    for engine in (first, second):
        assert f"{engine.folder.name}: batches of " in str(caught.value)
    key = second.folder.name
    packed = pack_engine(bundle, "tensorrt-rtx", tmp_path / "out", key=key)
    assert packed.manifest.build.targets == ("12.0",)
    with pytest.raises(RequestError, match=r"no tensorrt-rtx engine 'x'; it has\s+tensorrt-rtx-"):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "other", key="x")


def test_a_damaged_engine_is_not_passed_over(
    bundle: Bundle, build: EngineBuild, tmp_path: Path
) -> None:
    _add_engine(bundle, build)
    damaged = _add_engine(bundle, dataclasses.replace(build, targets=("12.0",))).folder
    (damaged / ENGINE_FILE).write_text("{}")
    with pytest.raises(
        RequestError, match=rf"choose one with --engine:(.|\n)*  {damaged.name}: damaged"
    ):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "out")
    with pytest.raises(EngineError, match=r"engine\.json is damaged"):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "out", key=damaged.name)
    assert not (tmp_path / "out").exists()


def test_an_engine_of_an_earlier_export_is_refused(
    bundle: Bundle, build: EngineBuild, tmp_path: Path
) -> None:
    _add_engine(bundle, dataclasses.replace(build, weights="0" * 64))
    with pytest.raises(EngineError, match=r"weights changed(.|\n)*gemma-deploy build"):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "out")


def test_a_damaged_plan_is_not_shipped(bundle: Bundle, build: EngineBuild, tmp_path: Path) -> None:
    engine = _add_engine(bundle, build)
    (engine.folder / "engine.plan").write_bytes(PLAN[::-1])
    with pytest.raises(EngineError, match=r"engine\.plan was changed"):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_engine_is_replaced_and_only_if_asked(
    bundle: Bundle, build: EngineBuild, tmp_path: Path
) -> None:
    _add_engine(bundle, build)
    output = tmp_path / "out"
    pack_engine(bundle, "tensorrt-rtx", output)
    with pytest.raises(OutputExistsError, match="--force"):
        pack_engine(bundle, "tensorrt-rtx", output)
    (output / "engine.plan").unlink()
    pack_engine(bundle, "tensorrt-rtx", output, force=True)
    assert (output / "engine.plan").read_bytes() == PLAN
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(OutputExistsError, match=r"no engine\.json"):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "mine", force=True)


def test_the_bundle_itself_is_no_place(bundle: Bundle, build: EngineBuild) -> None:
    _add_engine(bundle, build)
    with pytest.raises(RequestError, match="lies in the bundle"):
        pack_engine(bundle, "tensorrt-rtx", bundle.folder / "packed")


def test_too_little_disk(
    bundle: Bundle, build: EngineBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_engine(bundle, build)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ExportError, match="free, the engine needs"):
        pack_engine(bundle, "tensorrt-rtx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_engine_json_states_the_whole_model(bundle: Bundle, build: EngineBuild) -> None:
    engine = _add_engine(bundle, build)
    raw = json.loads((engine.folder / ENGINE_FILE).read_text())
    assert raw["model"] == bundle.config.to_dict()
