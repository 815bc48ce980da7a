import dataclasses
from typing import Any

import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.engine import EngineFolder, engines_of_flavour
from gemma_deploy.errors import EngineError
from gemma_deploy.runtime.sessions.engine_choice import choose_engine

ADA = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30)
HOPPER = Gpu(name="H100", compute_capability=(9, 0), memory_bytes=80 << 30)


def changed(engine: EngineFolder, **fields: Any) -> EngineFolder:
    build = dataclasses.replace(engine.manifest.build, **fields)
    return dataclasses.replace(engine, manifest=dataclasses.replace(engine.manifest, build=build))


def choose(engines: list[EngineFolder], bundle: Bundle, **request: Any) -> EngineFolder:
    version = engines[-1].manifest.build.library_version
    given = {"library_version": version, "gpu": ADA, "max_seq_len": None, **request}
    return choose_engine(engines, bundle, **given)


def test_a_bundles_engine_fits_its_gpu(engine_bundle: Bundle) -> None:
    engines = engines_of_flavour(engine_bundle, "tensorrt-rtx")
    assert choose(engines, engine_bundle) is engines[0]
    assert choose(engines, engine_bundle, max_seq_len=96) is engines[0]


def test_the_first_that_fits_is_taken(engine_bundle: Bundle) -> None:
    (engine,) = engines_of_flavour(engine_bundle, "tensorrt-rtx")
    other = changed(engine, targets=("12.0",))
    assert choose([other, engine, engine], engine_bundle) is engine


@pytest.mark.parametrize(
    ("fields", "request_", "message"),
    [
        ({"library_version": "1.2.3"}, {"library_version": "9.9"}, "built with .* 1.2.3, 9.9 is"),
        ({}, {"gpu": HOPPER}, "built for compute capability 8.9, H100 has 9.0.*-capability 9.0"),
        ({"graphs": {}}, {}, "the bundle's prefill and decode graph changed after it was built"),
        ({"weights": "0" * 64}, {}, "the bundle's weights changed after it was built"),
        ({}, {"max_seq_len": 200}, "holds 96 tokens, 200 are asked for.*--max-seq-len 200"),
    ],
)
def test_what_stands_against_an_engine_is_said(
    fields: Any, request_: Any, message: str, engine_bundle: Bundle
) -> None:
    (engine,) = engines_of_flavour(engine_bundle, "tensorrt-rtx")
    with pytest.raises(EngineError, match=message) as caught:
        choose([changed(engine, **fields)], engine_bundle, **request_)
    assert f"none of the 1 tensorrt-rtx engine(s) of {engine_bundle.folder}" in str(caught.value)
    assert f"`gemma-deploy build {engine_bundle.folder} --backend tensorrt-rtx" in str(caught.value)


def test_a_bundle_without_an_engine_names_the_command(engine_bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match=r"has no tensorrt engine: `gemma-deploy build .* --backend tensorrt`"
    ):
        engines_of_flavour(engine_bundle, "tensorrt")
