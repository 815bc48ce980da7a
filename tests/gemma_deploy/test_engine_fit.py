import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.capability import Capability
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.doctor_tensorrt import engine_verdicts
from gemma_deploy.engine import (
    ENGINE_FILE,
    EngineFolder,
    EngineManifest,
    Plan,
    engines_of,
    engines_of_flavour,
)
from gemma_deploy.engine_build import EngineBuild, EngineLimits
from gemma_deploy.engine_fit import is_packed, rebuild_advice, why_not_of, why_not_on, why_not_with
from gemma_deploy.errors import EngineError
from gemma_deploy.file_records import FileRecord, sha256_of
from gemma_deploy.graph_spec import PHASES
from gemma_deploy.machine import Machine, read_machine

ADA = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30)
BLACKWELL = Gpu(name="RTX 5090", compute_capability=(12, 0), memory_bytes=32 << 30)
LIMITS = EngineLimits(
    max_batch_size=2, max_seq_len=64, max_step_tokens=16, max_logits=1, num_candidates=8
)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return Bundle.open(tiny_bundle("gemma1", "float16"))


@pytest.fixture(scope="module")
def build(bundle: Bundle) -> EngineBuild:
    """Return a build of the bundle's own graphs."""
    return EngineBuild(
        flavour="tensorrt-rtx",
        library_version="1.7.1.116",
        targets=("8.6", "8.9"),
        layout="one-engine",
        attention="auto",
        plugin_version=None,
        limits=LIMITS,
        graphs={phase: sha256_of(bundle.graph_path(phase, "tensorrt")) for phase in PHASES},
        weights=sha256_of(bundle.weights_path),
    )


def write_engine(folder: Path, bundle: Bundle, build: EngineBuild, **fields: Any) -> EngineFolder:
    """Write an engine folder whose plan is no plan: nothing here loads it."""
    folder.mkdir(parents=True)
    (folder / "engine.plan").write_bytes(b"plan")
    record = FileRecord(size_bytes=4, sha256=sha256_of(folder / "engine.plan"))
    manifest = EngineManifest(
        model=bundle.config,
        cache_dtype="float16",
        build=build,
        plans={phase: Plan(path="engine.plan", profile=n) for n, phase in enumerate(PHASES)},
        **{"tokenizer": (), "files": {"engine.plan": record}, **fields},
        generation=None,
        model_max_seq_len=512,
        versions={},
    )
    (folder / ENGINE_FILE).write_text(manifest.to_json())
    return EngineFolder.open(folder)


def test_an_engine_fits_what_it_was_built_for(bundle: Bundle, build: EngineBuild) -> None:
    assert why_not_with(build, "1.7.1.116") is None
    assert why_not_on(build, ADA) is None
    assert why_not_of(build, bundle) is None


def test_what_does_not_fit_is_said(
    bundle: Bundle, build: EngineBuild, tiny_bundle: Callable[..., Path]
) -> None:
    assert why_not_with(build, "1.8") == (
        "it was built with tensorrt-rtx 1.7.1.116, 1.8 is installed, and only the version that built "
        "an engine loads it"
    )
    assert why_not_on(build, BLACKWELL) == (
        "it was built for compute capability 8.6, 8.9, RTX 5090 has 12.0"
    )
    decode = dataclasses.replace(build, graphs={**build.graphs, "decode": "0"})
    assert why_not_of(decode, bundle) == "the bundle's decode graph changed after it was built"
    weights = dataclasses.replace(build, weights="0")
    assert why_not_of(weights, bundle) == "the bundle's weights changed after it was built"
    other = Bundle.open(tiny_bundle("gemma1"))  # float32 has no graphs for engines
    assert why_not_of(build, other) == "the bundle has no tensorrt graphs"


def test_the_advice_is_a_command(tmp_path: Path, bundle: Bundle, build: EngineBuild) -> None:
    engine = write_engine(tmp_path / "bundle" / "engines" / "key", bundle, build)
    assert not is_packed(engine)
    command = f"gemma-deploy build {tmp_path / 'bundle'} --backend tensorrt-rtx --max-batch 2"
    assert rebuild_advice(engine).startswith(f"build it again: `{command} --max-seq-len 64 ")
    assert "--compute-capability 8.6 --compute-capability 8.9`" in rebuild_advice(engine)
    adapted = rebuild_advice(engine, BLACKWELL, 100)
    assert "--max-seq-len 100" in adapted
    assert adapted.endswith("--compute-capability 12.0`")
    # The key of a damaged engine stays: without --force it would count as built.
    assert rebuild_advice(engine, force=True).endswith("--compute-capability 8.9 --force`")


def test_a_packed_engine_is_built_where_its_bundle_is(
    tmp_path: Path, bundle: Bundle, build: EngineBuild
) -> None:
    record = FileRecord(size_bytes=4, sha256="0")
    engine = write_engine(
        tmp_path / "packed",
        bundle,
        build,
        tokenizer=("engine.plan",),
        files={"engine.plan": record},
    )
    assert is_packed(engine)
    advice = rebuild_advice(engine)
    assert "`gemma-deploy build BUNDLE --backend tensorrt-rtx" in advice
    assert f"`gemma-deploy pack BUNDLE --backend tensorrt-rtx --output {engine.folder}`" in advice


@pytest.fixture(scope="module")
def machine() -> Machine:
    """Return this machine with a GPU that the engine is for."""
    return dataclasses.replace(
        read_machine(),
        packages={"tensorrt-rtx": "1.7.1.116", "cuda-bindings": "13.5"},
        cuda_driver="13.0",
        gpus=(ADA,),
        tensorrt_errors={},
        tensorrt_cuda={"tensorrt-rtx": 13},
    )


@pytest.mark.parametrize(
    ("change", "is_available", "detail"),
    [
        ({}, True, "tensorrt-rtx 1.7.1.116 on RTX 4090"),
        ({"gpus": (BLACKWELL,)}, False, "it was built for compute capability 8.6, 8.9"),
        ({"packages": {"tensorrt-rtx": "2.0"}}, False, "it was built with tensorrt-rtx 1.7.1.116"),
        ({"packages": {}}, False, "tensorrt-rtx not installed"),
        ({"packages": {"tensorrt-rtx": "1.7.1.116"}}, False, "cuda-bindings not installed"),
        ({"gpus": (), "cuda_driver": None}, None, "it fits tensorrt-rtx 1.7.1.116 and was built"),
    ],
)
def test_doctor_judges_an_engine(
    change: Any,
    is_available: bool | None,
    detail: str,
    tmp_path: Path,
    bundle: Bundle,
    build: EngineBuild,
    machine: Machine,
) -> None:
    engine = write_engine(tmp_path / "key", bundle, build)
    (found,) = engine_verdicts(engine.folder, dataclasses.replace(machine, **change))
    assert isinstance(found, Capability)
    assert found.name == "engine key"
    assert found.is_available is is_available
    assert found.detail.startswith(detail)
    assert (found.remedy is not None) == (is_available is False)


@pytest.fixture
def two_engines(tmp_path: Path, bundle: Bundle, build: EngineBuild) -> Bundle:
    """Return a bundle with the engines `older` and `newer`, and what a killed build left."""
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    for number, name in enumerate(("older", "newer", ".newer.partial-7-ab")):
        engine = write_engine(folder / "engines" / name, bundle, build)
        os.utime(engine.folder / ENGINE_FILE, (number, number))
    return Bundle.open(folder)


def test_engines_are_those_that_were_finished_the_latest_first(two_engines: Bundle) -> None:
    engines, damaged = engines_of(two_engines)
    assert [engine.folder.name for engine in engines] == ["newer", "older"]
    assert damaged == {}


def test_a_damaged_engine_does_not_stand_in_the_way(two_engines: Bundle, machine: Machine) -> None:
    (two_engines.folder / "engines" / "newer" / "engine.plan").write_bytes(b"")
    (older,) = engines_of_flavour(two_engines, "tensorrt-rtx")
    assert older.folder.name == "older"
    good, bad = engine_verdicts(two_engines.folder, machine)
    assert (good.name, good.is_available) == ("engine older", True)
    assert (bad.name, bad.is_available) == ("engine newer", False)
    assert "has 0 bytes, engine.json says 4 bytes" in bad.detail
    (older.folder / ENGINE_FILE).write_text("{}")
    with pytest.raises(EngineError, match=r"gemma-deploy build .* older cannot .* newer cannot"):
        engines_of_flavour(two_engines, "tensorrt-rtx")
