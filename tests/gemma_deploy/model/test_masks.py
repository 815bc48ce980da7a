import pytest
import torch
from torch import Tensor

from gemma_deploy.errors import RequestError
from gemma_deploy.model.kv_cache import Step
from gemma_deploy.model.masks import StepMasks

CPU = torch.device("cpu")


def step_masks(
    num_cached: int,
    num_tokens: int,
    *,
    padding: Tensor | None = None,
    position: Tensor | None = None,
    is_bidirectional: bool = False,
) -> StepMasks:
    step = Step.after(num_cached, num_tokens, CPU, position)
    return StepMasks(step, padding, is_bidirectional=is_bidirectional)


def drawn(mask: Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.flatten(0, -2).tolist()]


@pytest.mark.parametrize(
    ("num_cached", "window", "expected"),
    [
        (0, None, ["x..", "xx.", "xxx"]),
        (2, None, ["xxx..", "xxxx.", "xxxxx"]),
        (0, 2, ["x..", "xx.", ".xx"]),
        (2, 2, [".xx..", "..xx.", "...xx"]),
        (1, 1, [".x..", "..x.", "...x"]),
    ],
)
def test_causal_and_windowed(num_cached: int, window: int | None, expected: list[str]) -> None:
    assert drawn(step_masks(num_cached, 3).dense(window)) == expected


@pytest.mark.parametrize(
    ("window", "expected"), [(None, ["xxxx"] * 4), (2, ["xx..", "xxx.", ".xxx", "..xx"])]
)
def test_bidirectional(window: int | None, expected: list[str]) -> None:
    assert drawn(step_masks(0, 4, is_bidirectional=True).dense(window)) == expected


def test_padding_on_either_side() -> None:
    padding = torch.tensor([[0, 1, 1], [1, 1, 0]])
    expected = ["...", ".x.", ".xx", "x..", "xx.", "xx."]
    assert drawn(step_masks(0, 3, padding=padding).dense(None)) == expected


def test_rows_at_their_own_slots() -> None:
    position = torch.tensor([[3], [1]])
    assert drawn(step_masks(0, 1, position=position).dense(2)) == ["..xx", "xx.."]
    padding = torch.tensor([[1, 0, 1], [1, 1, 1]])  # slots it does not reach are masked
    masks = step_masks(0, 1, position=position, padding=padding)
    assert drawn(masks.dense(None)) == ["x.x.", "xx.."]


@pytest.mark.parametrize("window", [None, 1, 3, 4, 9])
@pytest.mark.parametrize("is_bidirectional", [False, True])
@pytest.mark.parametrize(("num_cached", "num_tokens"), [(0, 1), (0, 4), (3, 1), (2, 2)])
def test_shortcuts_say_what_the_mask_says(
    num_cached: int, num_tokens: int, window: int | None, *, is_bidirectional: bool
) -> None:
    masks = step_masks(num_cached, num_tokens, is_bidirectional=is_bidirectional)
    mask = masks.dense(window)[0, 0]
    assert masks.is_all_visible(window) == bool(mask.all())
    triangle = torch.ones_like(mask).tril()
    # A single token is all-visible, which also covers it.
    if num_tokens > 1:
        is_square = mask.shape[0] == mask.shape[1]
        is_triangle = is_square and torch.equal(mask, triangle) and not is_bidirectional
        assert masks.is_plain_causal(window) == is_triangle


def test_a_mask_without_padding_is_no_mask() -> None:
    masks = step_masks(0, 3, padding=torch.ones(2, 3))
    assert masks.is_plain_causal(None)
    assert masks.dense(None).shape == (1, 1, 3, 3)
    assert not step_masks(0, 3, padding=torch.tensor([[0, 1, 1]])).is_plain_causal(None)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 6), (2, 1, 5, 5)])
def test_refuses_a_mask_of_another_length(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"attention_mask has shape .*, expected \[batch, 5\]"):
        step_masks(3, 2, padding=torch.ones(shape))
