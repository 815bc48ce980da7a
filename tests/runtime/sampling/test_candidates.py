import numpy as np
import pytest
import torch

from gemma_deploy.runtime.sampling.candidates import Candidates


@pytest.mark.parametrize("size", [10, 64, 6400, 6401, 9999])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_contenders_include_the_highest(size: int, count: int) -> None:
    logits = np.random.default_rng(size).normal(size=size).astype(np.float32)
    near = Candidates(logits).contenders(count)
    ids = [near.token_id(index) for index in range(len(near))]
    assert set(np.argsort(logits)[-count:].tolist()) <= set(ids)
    np.testing.assert_array_equal(near.logits, logits[ids])


def test_contenders_are_few() -> None:
    logits = np.random.default_rng(0).normal(size=262_144).astype(np.float32)
    assert len(Candidates(logits).contenders(50)) < 200


def test_narrowing_twice_keeps_token_ids() -> None:
    logits = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    once = Candidates(logits).at_least(torch.tensor(2.0))
    twice = once.at_least(torch.tensor(4.0))
    assert [once.token_id(i) for i in range(len(once))] == [0, 2, 3, 4]
    assert [twice.token_id(i) for i in range(len(twice))] == [0, 2]
