from types import SimpleNamespace
from typing import Any

import pytest

from gemma_deploy.quantization.advice import closer_options, distance_warning
from gemma_deploy.quantization.formats import WeightFormat

TABLE = "model.embed_tokens.weight"
LAYER = "model.layers.0.mlp.up_proj.weight"
OTHER_LAYER = "model.layers.1.mlp.up_proj.weight"


def manifest(method: str | None, cache: str = "float32", **formats: str) -> Any:
    names = {"table": TABLE, "layer": LAYER, "other": OTHER_LAYER}
    return SimpleNamespace(
        method=method,
        formats={names[key]: WeightFormat.parse(text) for key, text in formats.items()},
        precision=SimpleNamespace(cache=cache),
        files={},
    )


AUTO = "--auto --max-kl 0.05"


@pytest.mark.parametrize(
    ("found", "options"),
    [
        (
            manifest("rtn", table="int4/32", layer="int4/32"),
            [
                "--method gptq (leaves about a quarter of it)",
                "--embedding-bits 8 (leaves about four fifths of it)",
                "--int8 (leaves about a hundredth of it)",
                AUTO,
            ],
        ),
        (
            # Shares are those of tables that are rounded like the layers.
            manifest("rtn", table="int8/32", layer="int4/32"),
            ["--method gptq", "--int8", AUTO],
        ),
        (
            manifest("imatrix", table="int4/32", layer="int4/32"),
            [
                "--method gptq (leaves about two thirds of it)",
                "--embedding-bits 8",
                "--int8 (leaves about a fiftieth of it)",
                AUTO,
            ],
        ),
        # Nothing was measured of awq.
        (manifest("awq", layer="int4/32"), ["--method gptq", "--int8", AUTO]),
        (
            manifest("gptq", table="int4/32", layer="int4/32"),
            ["--embedding-bits 8", "--int8 (leaves about a twentieth of it)", AUTO],
        ),
        # What was measured is blocks of 32.
        (
            manifest("gptq", layer="int4/128"),
            ["--block-size 32", "--int8", AUTO],
        ),
        (
            manifest("rtn", table="int8/32", layer="nf4/64"),
            [
                "--int4 --method gptq (leaves about half of it)",
                "--int8 (leaves about a fiftieth of it)",
                AUTO,
            ],
        ),
        (manifest("rtn", layer="fp8/channel"), ["--int8", AUTO]),
        (manifest("gptq", layer="int4/64", other="int8/32"), ["--block-size 32", "--int8", AUTO]),
        (manifest("rtn", layer="int8/channel"), ["--block-size 32", "--bf16 without quantization"]),
        (manifest("rtn", table="int8/32", layer="int8/32"), ["--bf16 without quantization"]),
        # Its codes were made by another tool.
        (manifest("bitsandbytes", layer="nf4/64"), []),
    ],
)
def test_what_is_still_to_gain(found: Any, options: list[str]) -> None:
    assert list(closer_options(found)) == options


def test_what_auto_chose_is_not_to_be_given_blocks() -> None:
    found = manifest("gptq", layer="int4/128")
    found.files = {"sensitivities.json": None}

    assert list(closer_options(found)) == ["--int8", AUTO]


def test_nothing_is_said_up_to_the_limit() -> None:
    found = manifest("rtn", layer="int4/32")

    for limit, is_weights_only in ((0.05, True), (0.1, False)):
        assert distance_warning(found, limit, is_weights_only=is_weights_only) is None
        assert distance_warning(found, limit * 1.01, is_weights_only=is_weights_only) is not None


def test_the_sentence() -> None:
    found = manifest("gptq", table="int4/32", layer="int4/32")

    assert distance_warning(found, 0.114, is_weights_only=True) == (
        "a mean KL of 0.11 nats is far from the original: expect worse text. Closer are exports with "
        "--embedding-bits 8, --int8 (leaves about a twentieth of it) or --auto --max-kl 0.05; shares "
        "are Gemma 3 270M's (docs/quantization.md)"
    )


def test_without_options_only_the_distance_is_said() -> None:
    found = manifest("bitsandbytes", layer="nf4/64")

    assert distance_warning(found, 0.5, is_weights_only=False) == (
        "a mean KL of 0.5 nats is far from the original: expect worse text"
    )


def test_a_cache_counts_where_the_bundle_ran() -> None:
    found = manifest(None, cache="int8")

    ran = distance_warning(found, 0.5, is_weights_only=False)

    assert ran is not None
    assert "Closer are exports with a cache that is not int8 (docs" in ran
    assert "cache" not in (distance_warning(found, 0.5, is_weights_only=True) or "")
