import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.errors import CheckpointError, NonFiniteLogitsError, RequestError
from gemma_deploy.evaluation import Evaluator, token_log_likelihoods, windows

VOCAB = 40


def random_logits(seed: int, positions: int = 53) -> np.ndarray:
    # 53 positions: more than a block of rows, and no multiple of one.
    return 6 * np.random.default_rng(seed).standard_normal((positions, VOCAB)).astype(np.float32)


class TestWindows:
    @given(num_tokens=st.integers(1, 200), context=st.integers(1, 40), share=st.floats(0.01, 1.0))
    def test_each_token_is_predicted_once_by_what_is_promised(
        self, num_tokens: int, context: int, share: float
    ) -> None:
        stride = max(1, math.floor(context * share))

        seen: dict[int, int] = {}
        for window in windows(num_tokens, context, stride):
            assert window.stop - window.start <= context
            for token in range(window.first, window.stop):
                assert token not in seen
                seen[token] = token - window.start

        assert list(seen) == list(range(num_tokens))
        for token, before in seen.items():
            assert before >= min(token, context - stride)

    def test_inputs_begin_with_bos_and_leave_the_last_token_out(self) -> None:
        token_ids = np.arange(10, 20)

        found = [(w.inputs(token_ids, 2).tolist(), w.first) for w in windows(10, 4, 3)]

        assert found == [
            ([2, 10, 11, 12], 0),
            ([2, 13, 14, 15], 4),
            ([2, 16, 17, 18], 7),
        ]

    @pytest.mark.parametrize("stride", [0, 5])
    def test_a_stride_that_would_leave_tokens_out_is_refused(self, stride: int) -> None:
        with pytest.raises(RequestError, match=f"stride is {stride}; expected 1 to .* 4 tokens"):
            windows(10, 4, stride)


class TestEvaluator:
    def test_agrees_with_torch_in_float64(self) -> None:
        model, reference = random_logits(0), random_logits(1)
        model[:20] = reference[:20] + 0.01
        targets = np.random.default_rng(2).integers(VOCAB, size=len(model))
        evaluator = Evaluator()
        for start, stop in ((0, 30), (30, 53)):
            part = slice(start, stop)
            evaluator.add(model[part], targets[part], reference[part])

        found = evaluator.result()

        q, p = (torch.log_softmax(torch.tensor(x).double(), -1) for x in (model, reference))
        kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        loss = [torch.nn.functional.nll_loss(x, torch.tensor(targets)).item() for x in (q, p)]
        assert found.tokens == 53
        assert found.perplexity == pytest.approx(math.exp(loss[0]), rel=1e-12)
        assert found.reference_perplexity == pytest.approx(math.exp(loss[1]), rel=1e-12)
        assert found.kl_mean_nats == pytest.approx(kl.mean().item(), rel=1e-12)
        assert found.kl_p99_nats == pytest.approx(np.percentile(kl.numpy(), 99), rel=1e-12)
        assert found.kl_max_nats == pytest.approx(kl.max().item(), rel=1e-12)
        assert found.top1_agreement == (q.argmax(-1) == p.argmax(-1)).double().mean().item()

    def test_without_a_reference_there_are_no_distances(self) -> None:
        evaluator = Evaluator()
        evaluator.add(random_logits(0), np.zeros(53, np.int64))

        found = evaluator.result()

        assert found.perplexity > 1
        assert (found.reference_perplexity, found.kl_mean_nats, found.top1_agreement) == (None,) * 3

    def test_nothing_is_no_result(self) -> None:
        with pytest.raises(ValueError, match="no token was predicted"):
            Evaluator().result()

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_logits_that_are_no_numbers_are_told_of(self, bad: float) -> None:
        good, damaged = random_logits(0), random_logits(0)
        damaged[40, 3] = bad
        targets = np.zeros(53, np.int64)

        with pytest.raises(NonFiniteLogitsError, match="within 16 tokens of token 32 of the text"):
            Evaluator().add(damaged, targets)
        with pytest.raises(CheckpointError, match="the reference itself gives logits"):
            Evaluator().add(good, targets, damaged)

    def test_a_perplexity_beyond_any_number_is_an_error(self) -> None:
        evaluator = Evaluator()
        logits = np.zeros((4, VOCAB), np.float32)
        logits[:, 1] = 1e6
        evaluator.add(logits, np.zeros(4, np.int64))

        with pytest.raises(NonFiniteLogitsError, match="1e\\+06 nats each"):
            evaluator.result()


def test_token_log_likelihoods_are_those_of_torch() -> None:
    logits = random_logits(3)
    targets = np.random.default_rng(4).integers(VOCAB, size=len(logits))

    found = token_log_likelihoods(logits, targets)

    expected = torch.log_softmax(torch.tensor(logits).double(), -1)
    np.testing.assert_allclose(found, expected[torch.arange(53), targets], rtol=1e-12)
