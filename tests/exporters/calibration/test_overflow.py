"""Overflow preflight: peaks against transformers' own modules, scaled models against float32."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import ExportError
from gemma_deploy.exporters.calibration.overflow import (
    MEASURED_HEADROOM,
    measured_overflow,
    require_held,
)
from gemma_deploy.exporters.calibration.overflow_bounds import bounded_overflow
from gemma_deploy.overflow_report import FLOAT16_MAX, OverflowReport
from gemma_deploy.residual_scaling import ResidualScaling
from tests.rounding import MODEL_FLOAT16, assert_near

INFLATED = ("gemma1", "gemma1-mha-bias", "gemma2", "gemma3")

_MODULES = {
    "self_attn.q_proj": "query",
    "self_attn.q_norm": "query",
    "self_attn.k_proj": "key",
    "self_attn.k_norm": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "attention",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "feed_forward",
}


@pytest.fixture(scope="session")
def measured(inflated_checkpoint: Callable[[str], Path]) -> Callable[[str], OverflowReport]:
    reports: dict[str, OverflowReport] = {}

    def get(name: str) -> OverflowReport:
        if name not in reports:
            reports[name] = measured_overflow(Checkpoint.open(inflated_checkpoint(name)), _rows())
        return reports[name]

    return get


def _rows() -> torch.Tensor:
    return torch.randint(8, 512, (5, 24), generator=torch.Generator().manual_seed(0))


@contextmanager
def _transformers_peaks(model: Any) -> Iterator[dict[tuple[int, str], float]]:
    """Collect the outputs' peaks of transformers' modules, and what down_proj is given."""
    peaks: dict[tuple[int, str], float] = {}

    def see(key: tuple[int, str], value: torch.Tensor) -> None:
        peaks[key] = max(peaks.get(key, 0.0), float(value.abs().max()))

    handles = []
    for index, layer in enumerate(model.model.layers):
        for path, tensor in _MODULES.items():
            if path in dict(layer.named_modules()):
                handles.append(
                    layer.get_submodule(path).register_forward_hook(
                        lambda _m, _i, out, key=(index, tensor): see(key, out)
                    )
                )
        handles.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _m, args, key=(index, "product"): see(key, args[0])
            )
        )
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", INFLATED)
def test_peaks_are_those_of_transformers_modules(
    name: str,
    inflated_checkpoint: Callable[[str], Path],
    measured: Callable[[str], OverflowReport],
    oracle: Callable[..., Any],
) -> None:
    model = oracle(inflated_checkpoint(name))
    with _transformers_peaks(model) as expected, torch.no_grad():
        output = model(_rows(), output_hidden_states=True)
    ours = {(x.layer, x.tensor): x.peak for x in measured(name).peaks}
    for (layer, tensor), peak in expected.items():
        assert ours[layer, tensor] == pytest.approx(peak, rel=1e-3), (layer, tensor)
    states = output.hidden_states
    assert ours[None, "embedding"] == pytest.approx(float(states[0].abs().max()), rel=1e-4)
    assert ours[None, "final_norm"] == pytest.approx(float(states[-1].abs().max()), rel=1e-3)
    for layer, state in enumerate(states[1:-1]):
        # Inside the layer the stream may be higher than behind it.
        assert ours[layer, "residual"] >= float(state.abs().max()) * (1 - 1e-3)
    if name != "gemma2":  # whose logits transformers caps
        assert ours[None, "logits"] == pytest.approx(float(output.logits.abs().max()), rel=1e-3)


@pytest.mark.parametrize("name", INFLATED)
def test_scaled_models_agree_where_unscaled_float16_overflows(
    name: str,
    inflated_checkpoint: Callable[[str], Path],
    measured: Callable[[str], OverflowReport],
    scaled_model: Callable[..., Any],
) -> None:
    folder, scaling = inflated_checkpoint(name), measured(name).scaling
    none = ResidualScaling.none(Checkpoint.open(folder).config)
    with torch.no_grad():
        reference = scaled_model(folder, none, "float32")(_rows()).logits
        # Powers of two are exact in float32, so nothing at all may change.
        torch.testing.assert_close(
            scaled_model(folder, scaling, "float32")(_rows()).logits, reference, rtol=0, atol=1e-6
        )
        unscaled = scaled_model(folder, none, "float16")(_rows()).logits
        scaled = scaled_model(folder, scaling, "float16")(_rows()).logits
    assert not torch.isfinite(unscaled).any()
    assert_near(scaled, reference, roundings=MODEL_FLOAT16, dtype="float16")


@pytest.mark.parametrize("name", INFLATED)
def test_bounds_are_no_less_than_any_measured_peak_and_their_scaling_holds_the_model(
    name: str,
    inflated_checkpoint: Callable[[str], Path],
    measured: Callable[[str], OverflowReport],
    scaled_model: Callable[..., Any],
) -> None:
    folder = inflated_checkpoint(name)
    bounded = bounded_overflow(Checkpoint.open(folder))
    for peak, bound in zip(measured(name).peaks, bounded.peaks, strict=True):
        assert (peak.layer, peak.tensor) == (bound.layer, bound.tensor)
        assert peak.peak <= bound.peak * (1 + 1e-5), bound.name
    assert bounded.out_of_reach == ()
    with torch.no_grad():
        logits = scaled_model(folder, bounded.scaling, "float16")(_rows()).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", INFLATED)
def test_halving_any_divisor_would_break_the_headroom(
    name: str, measured: Callable[[str], OverflowReport]
) -> None:
    report = measured(name)
    by_divisor: dict[tuple[Any, ...], list[float]] = {}
    scalable = {"value", "attention", "up", "product", "feed_forward", "residual", "embedding"}
    for peak in report.peaks:
        if peak.tensor not in scalable:
            assert peak.divisor == 1
            continue
        assert peak.peak / peak.divisor * MEASURED_HEADROOM <= FLOAT16_MAX
        by_divisor.setdefault(_shared(peak.layer, peak.tensor, report), []).append(
            peak.peak / peak.divisor if peak.divisor > 1 else FLOAT16_MAX
        )
    for peaks in by_divisor.values():
        assert max(peaks) * 2 * MEASURED_HEADROOM > FLOAT16_MAX


def _shared(layer: int | None, tensor: str, report: OverflowReport) -> tuple[Any, ...]:
    """Tensors that are divided by the same number, which the largest of them decides."""
    if tensor in ("residual", "embedding"):
        return ("residual",)
    if tensor in ("attention", "feed_forward") and not report.scaling.has_post_norms:
        return ("residual",)
    return (layer, "up" if tensor == "product" else tensor)


def test_models_that_float16_holds_are_left_alone(tiny_checkpoint: Callable[[str], Path]) -> None:
    report = measured_overflow(Checkpoint.open(tiny_checkpoint("gemma3")), _rows())
    assert report.scaling.is_none
    assert report.overflowing == ()
    assert all(x.divisor == 1 for x in report.weight_losses)


def test_report_survives_json(measured: Callable[[str], OverflowReport]) -> None:
    report = measured("gemma2")
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert OverflowReport.from_dict(json.loads(text)) == report
    with pytest.raises(ValueError, match="expected one of measured, bounded"):
        OverflowReport.from_dict(json.loads(text) | {"source": "guessed"})


def test_what_no_scale_helps_is_refused_by_name(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = _changed(tiny_checkpoint("gemma1"), tmp_path, "layers.1.self_attn.q_proj", 1e5)
    report = measured_overflow(checkpoint, _rows())
    assert [x.name for x in report.out_of_reach] == ["layer 1 query"]
    with pytest.raises(ExportError, match=r"layer 1 query.*--dtype bfloat16 or float32"):
        require_held(report)
    # A bound that is out of reach need not be reached.
    require_held(bounded_overflow(checkpoint))


def test_models_that_overflow_float32_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = _changed(tiny_checkpoint("gemma1"), tmp_path, "layers.0.mlp.up_proj", 1e38)
    with pytest.raises(ExportError, match=r"layer 0 .* in float32: the checkpoint's weights"):
        measured_overflow(checkpoint, _rows())


def _changed(source: Path, folder: Path, part: str, factor: float) -> Checkpoint:
    """Copy a checkpoint with one matrix multiplied."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors[f"model.{part}.weight"] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return Checkpoint.open(folder)
