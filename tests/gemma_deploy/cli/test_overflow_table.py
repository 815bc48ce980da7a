"""The overflow preflight's lines."""

import pytest

from gemma_deploy.cli.overflow_table import emit_overflow
from gemma_deploy.config import GemmaConfig
from gemma_deploy.overflow_report import OverflowReport, Peak, Source, WeightLoss
from gemma_deploy.residual_scaling import LayerScaling, ResidualScaling

_TENSORS = ("normalized", "value", "attention", "gate", "product", "feed_forward", "residual")


def _report(source: Source = "measured", **changed: float) -> OverflowReport:
    config = GemmaConfig(num_hidden_layers=1, has_post_norms=True)
    peaks = dict.fromkeys(_TENSORS, 100.0) | {"gate": 300.0, "residual": 131_008.0} | changed
    return OverflowReport(
        source=source,
        num_tokens=64,
        wanted_headroom=4,
        scaling=ResidualScaling.of(config, 8, (LayerScaling(),)),
        peaks=(
            *(
                Peak(layer=0, tensor=k, peak=v, divisor=8 if k == "residual" else 1)
                for k, v in peaks.items()
            ),
            Peak(layer=None, tensor="logits", peak=20, divisor=1),
        ),
        weight_losses=(
            WeightLoss(
                name="x.weight",
                divisor=8,
                num_weights=200,
                num_too_large=0,
                num_subnormal=5,
                num_zeroed=0,
            ),
        ),
    )


def test_table_tells_peaks_scales_headroom_and_what_would_have_overflowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    emit_overflow(_report())
    lines = capsys.readouterr().out.splitlines()
    assert "measured on 64 tokens" in lines[1]
    assert lines[4].split() == [
        *("0", "!1.31e+05", "/8", "100", "100", "100", "100", "gate", "300", "4.0x")
    ]
    assert "  unscaled, would have overflowed: layer 0 residual" in lines
    assert lines[-1] == (
        "  weights subnormal in float16 (fewer than 11 bits): 5; most in x.weight (2.50% of it)"
    )


def test_table_warns_of_what_no_scale_helps(capsys: pytest.CaptureFixture[str]) -> None:
    emit_overflow(_report("bounded", gate=1e6), to_stderr=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bounded from the weights" in captured.err
    assert "no scale can be folded around layer 0 gate: it may overflow" in captured.err
