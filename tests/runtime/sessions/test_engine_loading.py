import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma_deploy.engine import EngineFolder
from gemma_deploy.errors import EngineError, SessionError
from gemma_deploy.runtime.sessions.engine_loading import (
    create_runtime,
    describe_invalidity,
    load_plan,
)
from gemma_deploy.tensorrt import load_library

LIBRARY = load_library("tensorrt-rtx")


def test_a_refused_plan_is_an_error_with_the_librarys_words_and_the_command(
    text_engine: Any,
) -> None:
    # Without a GPU the library refuses every plan: what becomes of that is the same everywhere.
    engine = text_engine()
    runtime = create_runtime(LIBRARY, engine)
    with pytest.raises(EngineError) as caught:
        load_plan(LIBRARY, runtime, engine, engine.plan_path("decode"))
    text = str(caught.value)
    assert text.startswith(f"tensorrt-rtx {LIBRARY.version} refuses {engine.plan_path('decode')}")
    assert "Error reading CUDA GPU properties" in text
    assert f"`gemma-deploy build {engine.folder.parent.parent} --backend tensorrt-rtx" in text
    assert "--compute-capability 8.9 --force`" in text
    assert not LIBRARY.log.take_errors()


def test_a_plan_that_was_changed_is_told_from_one_that_does_not_fit(
    text_engine: Any, tmp_path: Path
) -> None:
    engine = text_engine()
    for path in engine.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    plan = tmp_path / engine.manifest.plans["prefill"].path
    content = bytearray(plan.read_bytes())
    content[:32] = bytes(32)
    plan.write_bytes(content)
    damaged = EngineFolder.open(tmp_path)
    with pytest.raises(
        EngineError, match=r"engine.plan changed since the build, its SHA-256 is another one.*build"
    ):
        load_plan(LIBRARY, create_runtime(LIBRARY, damaged), damaged, plan)


def test_diagnostics_have_their_names(text_engine: Any) -> None:
    module, diagnostics = LIBRARY.module, LIBRARY.module.EngineInvalidityDiagnostics
    bits = int(diagnostics.VERSION_MISMATCH) | int(diagnostics.UNSUPPORTED_CC)
    said = describe_invalidity(module, bits)
    assert "VERSION_MISMATCH" in said
    assert "UNSUPPORTED_CC" in said
    assert "MALFORMED" not in said
    assert describe_invalidity(module, 0) == "invalid (it does not say why)"
    runtime = create_runtime(LIBRARY, text_engine())
    _, bits = runtime.get_engine_validity(bytes(range(200)))
    LIBRARY.log.take_errors()
    assert describe_invalidity(module, bits) == "invalid (MALFORMED_ENGINE)"


def test_a_library_that_gives_no_runtime(text_engine: Any) -> None:
    def runtime(_logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    engine = text_engine()
    build = dataclasses.replace(engine.manifest.build, plugin_version=None)
    manifest = dataclasses.replace(engine.manifest, build=build)
    library = dataclasses.replace(LIBRARY, module=SimpleNamespace(Runtime=runtime))
    with pytest.raises(
        SessionError, match=r"made no runtime: .* nullptr. See `gemma-deploy doctor`"
    ):
        create_runtime(library, dataclasses.replace(engine, manifest=manifest))


def test_another_version_of_the_plugin_is_refused(text_engine: Any) -> None:
    engine = text_engine()
    build = dataclasses.replace(engine.manifest.build, plugin_version="0")
    manifest = dataclasses.replace(engine.manifest, build=build)
    with pytest.raises(EngineError, match=r"version 0 of the attention plugin.*gemma-deploy build"):
        create_runtime(LIBRARY, dataclasses.replace(engine, manifest=manifest))
