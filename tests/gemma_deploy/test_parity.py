import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.graph_spec import DType, Precision
from gemma_deploy.parity import (
    FloatArray,
    ParityCounter,
    ParityReport,
    TokenRow,
    compare,
    default_tolerance,
    kl_divergence,
)

ROWS = (
    TokenRow(token_ids=(5, 6, 7), positions=(0, 1, 2)),
    TokenRow(token_ids=(8, 9), positions=(1,)),
)


class TestFigures:
    def test_against_torch(self) -> None:
        reference, candidate = pair(positions=40, vocab=300, noise=0.3)

        report = counted(reference, candidate, tolerance=1.0)

        p, q = torch.tensor(reference).double(), torch.tensor(candidate).double()
        kl = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        assert report.positions == 40
        assert report.max_abs_difference == pytest.approx((p - q).abs().max().item())
        assert report.mean_abs_difference == pytest.approx((p - q).abs().mean().item())
        assert report.max_kl_nats == pytest.approx(kl.max().item())
        assert report.mean_kl_nats == pytest.approx(kl.mean().item())
        assert report.greedy_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()

    def test_do_not_depend_on_how_they_are_added(self) -> None:
        reference, candidate = pair(positions=37, vocab=50, noise=0.2)
        counter = ParityCounter(0.5)
        for part in (slice(0, 5), slice(5, 36), slice(36, None)):
            counter.add(reference[part], candidate[part])

        at_once = counted(reference, candidate, tolerance=0.5)

        assert dataclasses.astuple(counter.report()) == pytest.approx(dataclasses.astuple(at_once))

    def test_the_same_logits(self) -> None:
        reference, _ = pair(positions=3, vocab=20, noise=0)

        report = counted(reference, reference, tolerance=1e-9)

        assert report.max_abs_difference == report.max_kl_nats == 0
        assert report.greedy_agreement == 1
        assert report.is_within

    def test_kl_of_a_tiny_difference_is_not_negative(self) -> None:
        reference, _ = pair(positions=200, vocab=100, noise=0)

        assert kl_divergence(reference, reference + 1e-7).min() >= 0


class TestVerdict:
    def test_a_logit_past_the_tolerance(self) -> None:
        reference = np.array([[0.0, 1.0, 5.0]])

        assert counted(reference, reference + np.array([0.2, 0, 0]), tolerance=0.25).is_within
        assert not counted(reference, reference + np.array([0.3, 0, 0]), tolerance=0.25).is_within

    def test_a_near_tie_may_fall_either_way(self) -> None:
        report = counted(np.array([[0.0, 1.0, 1.1]]), np.array([[0.0, 1.1, 1.0]]), tolerance=0.15)

        assert report.greedy_agreement == 0
        assert report.disagreements == 0
        assert report.is_within

    def test_a_clear_winner_must_stay(self) -> None:
        # Both logits moved by less than the tolerance, together by more than the gap.
        report = counted(np.array([[0.0, 1.0, 1.2]]), np.array([[0.0, 1.14, 1.06]]), tolerance=0.15)

        assert report.max_abs_difference is not None
        assert report.max_abs_difference < 0.15
        assert report.disagreements == 1
        assert not report.is_within

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_fails(self, bad: float) -> None:
        reference, candidate = pair(positions=20, vocab=10, noise=0)
        candidate[3, 4] = bad

        report = counted(reference, candidate, tolerance=1e6)

        assert report.non_finite_positions == 1
        assert report.max_abs_difference is report.mean_abs_difference is None
        assert report.max_kl_nats is report.mean_kl_nats is None
        assert report.greedy_agreement == 19 / 20
        assert not report.is_within

    def test_nothing_finite_fails(self) -> None:
        reference, candidate = pair(positions=20, vocab=10, noise=0)

        report = counted(reference, candidate * np.nan, tolerance=1e6)

        assert report.non_finite_positions == 20
        assert report.greedy_agreement == 0
        assert not report.is_within


class TestCompare:
    def test_takes_the_candidate_row_by_row(self) -> None:
        reference = [np.eye(3), np.ones((1, 3))]

        def candidate(rows: Sequence[TokenRow]) -> Iterator[FloatArray]:
            assert rows == ROWS
            yield np.eye(3)
            yield np.array([[1, 1, 1.5]])

        report = compare(ROWS, reference, candidate, tolerance=1.0)

        assert report.positions == 4
        assert report.max_abs_difference == 0.5

    def test_a_candidate_that_skips_a_row(self) -> None:
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
            compare(ROWS, [np.eye(3), np.ones((1, 3))], lambda _: [np.eye(3)], tolerance=1.0)

    def test_other_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"logits \(1, 3\) compared with logits \(3, 3\)"):
            ParityCounter(1.0).add(np.eye(3), np.ones((1, 3)))

    def test_nothing_compared(self) -> None:
        with pytest.raises(ValueError, match="no logits were compared"):
            ParityCounter(1.0).report()


class TestDefaultTolerance:
    @pytest.mark.parametrize(
        ("stored", "bundle", "share"),
        [
            ("float32", "float32", 1e-4),
            ("bfloat16", "float32", 1e-4),
            ("bfloat16", "bfloat16", 1e-4),
            ("float32", "bfloat16", 5e-2),
            ("float16", "bfloat16", 5e-2),
            ("float32", "float16", 1e-2),
            ("float16", "float16", 1e-2),
        ],
    )
    def test_is_a_share_of_the_largest_logit(
        self, stored: str, bundle: DType, share: float, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        checkpoint = Checkpoint.open(tiny_checkpoint("gemma1", stored))
        reference = [np.array([[1.0, -30.0]]), np.array([[20.0, 2.0]])]

        assert default_tolerance(Precision.of(bundle), checkpoint, reference) == share * 30

    def test_attention_in_the_dtype_of_the_cache(
        self, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        checkpoint = Checkpoint.open(tiny_checkpoint("gemma1"))
        precision = Precision.of("float32", cache="float16")

        assert default_tolerance(precision, checkpoint, [np.array([[1.0, -30.0]])]) == 0.3

    def test_a_graph_that_computes_in_bfloat16(self, tiny_checkpoint: Callable[..., Path]) -> None:
        checkpoint = Checkpoint.open(tiny_checkpoint("gemma1", "bfloat16"))
        precision = Precision.of("bfloat16").of_lowering("tensorrt")

        assert default_tolerance(precision, checkpoint, [np.array([[1.0, -30.0]])]) == 1.5

    @pytest.mark.parametrize(
        ("stored", "bundle", "share"),
        [
            ("float16", "float16", 1e-3),
            ("bfloat16", "bfloat16", 5e-3),
            ("float32", "float16", 1e-2),
            ("float32", "bfloat16", 5e-2),
        ],
    )
    def test_a_widened_graph(
        self, tiny_checkpoint: Callable[..., Path], stored: str, bundle: Any, share: float
    ) -> None:
        checkpoint = Checkpoint.open(tiny_checkpoint("gemma1", stored))
        precision = Precision.of(bundle).of_lowering("tensorrt")
        reference = [np.array([[1.0, -30.0]])]

        found = default_tolerance(precision, checkpoint, reference, is_widened=True)
        assert found == share * 30


def pair(*, positions: int, vocab: int, noise: float) -> tuple[FloatArray, FloatArray]:
    random = np.random.default_rng(0)
    reference = random.normal(size=(positions, vocab)).astype(np.float32) * 3
    added = random.normal(size=reference.shape).astype(np.float32) * noise
    return reference, reference + added


def counted(reference: FloatArray, candidate: FloatArray, *, tolerance: float) -> ParityReport:
    counter = ParityCounter(tolerance)
    counter.add(reference, candidate)
    return counter.report()
