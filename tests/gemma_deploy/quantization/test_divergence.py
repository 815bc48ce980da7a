import json
from typing import Any

import pytest

from gemma_deploy.quantization.divergence import Divergence

FOUND = Divergence(mean_kl_nats=0.4732, same_top1=0.7197, num_tokens=1024)


def test_json_brings_it_back() -> None:
    assert Divergence.from_dict(json.loads(json.dumps(FOUND.to_dict()))) == FOUND
    assert Divergence.from_dict(FOUND.to_dict() | {"later": 1}) == FOUND


def test_in_words() -> None:
    assert str(FOUND) == (
        "KL 0.47 nats on average, same likeliest token at 72.0% of 1,024 positions (weights only)"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean_kl_nats", -1e-9),
        ("mean_kl_nats", float("nan")),
        ("mean_kl_nats", float("inf")),
        ("mean_kl_nats", "0.1"),
        ("mean_kl_nats", True),
        ("same_top1", 1.01),
        ("same_top1", -0.01),
        ("same_top1", None),
        ("num_tokens", 0),
        ("num_tokens", 512.0),
        ("num_tokens", False),
    ],
)
def test_figures_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is "):
        Divergence.from_dict(FOUND.to_dict() | {field: value})
