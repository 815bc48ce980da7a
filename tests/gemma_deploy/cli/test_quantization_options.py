from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from gemma_deploy.exporters.quantization.options import QuantizationOptions
from gemma_deploy.quantization.formats import WeightFormat


@pytest.fixture
def asked(
    invoke: Callable[..., Result],
    bundle_checkpoint: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., QuantizationOptions | None]:
    """Return what `export` hands on for some options."""
    from gemma_deploy.bundle import Bundle

    def get(*options: str) -> QuantizationOptions | None:
        seen: list[QuantizationOptions | None] = []

        def export(*_: object, quantization: QuantizationOptions | None, **__: object) -> Bundle:
            seen.append(quantization)
            return Bundle.open(bundle)

        monkeypatch.setattr("gemma_deploy.api.export", export)
        result = invoke("export", bundle_checkpoint, "--output", tmp_path / "out", *options)
        assert result.exit_code == 0, result.stderr
        return seen[0]

    return get


def test_options_become_quantization_options(
    asked: Callable[..., QuantizationOptions | None],
) -> None:
    assert asked("--fp16") is None
    assert asked("--int4") == QuantizationOptions(scheme="int4")
    plain = asked("--int8", "--block-size", "channel", "--embedding-bits", "16")
    assert plain is not None
    assert plain.layer_format == WeightFormat("int8")
    assert plain.embedding_format is None
    kept = asked("--nf4", "--keep-fp16", "0, 2-3", "--keep-fp16", "down_proj")
    assert kept is not None
    assert kept.keep == ("0", "2-3", "down_proj")
    calibrated = asked(
        "--int4", "--method", "gptq", "--calibration-tokens", "99", "--block-size", "64"
    )
    assert calibrated == QuantizationOptions(method="gptq", calibration_tokens=99, block_size=64)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1500", 1500), ("2GB", 2 * 10**9), ("1.5 gib", 3 << 29), ("10MiB", 10 << 20)],
)
def test_sizes_have_units(
    asked: Callable[..., QuantizationOptions | None], text: str, size_bytes: int
) -> None:
    options = asked("--auto", "--max-size", text)
    assert options is not None
    assert options.is_automatic
    assert options.max_size_bytes == size_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int4", "--int8"], "--int4 and --int8 contradict each other: give one"),
        (["--block-size", "64"], "--block-size is for quantized weights: give --int4, --int8"),
        (["--fp16", "--method", "gptq"], "--method is for quantized weights"),
        (["--int4", "--block-size", "channel"], "int4 with a block size of channel; expected 32"),
        (["--auto"], "--auto needs one budget: give either --max-size or --max-kl"),
        (["--auto", "--max-size", "2 pounds"], "'2 pounds' is no size; expected e.g. 900MB"),
        (["--int4", "--keep-fp16", "all"], "layers to keep: 'all' is not understood"),
        (["--nf4", "--method", "awq"], "--method awq with nf4: calibration is there for int4"),
    ],
)
def test_what_cannot_be(
    invoke: Callable[..., Result],
    bundle_checkpoint: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    result = invoke("export", bundle_checkpoint, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
