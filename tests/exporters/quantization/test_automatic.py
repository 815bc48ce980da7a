import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.quantization.automatic import candidates_of, choose_formats
from gemma_deploy.exporters.quantization.options import QuantizationOptions, matrices_of
from gemma_deploy.quantization.formats import WeightFormat

CONFIG = GemmaConfig(
    vocab_size=256,
    hidden_size=192,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=32,
)
SHAPES = dict(matrices_of(CONFIG))
NAMES = list(SHAPES)[:4]
FORMATS = [WeightFormat("int4", 64), WeightFormat("int4", 32), WeightFormat("int8", 32)]
DENSE = WeightFormat("float16")

costs = st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=3).map(sorted).map(reversed)
sensitivities = st.lists(costs, min_size=4, max_size=4).map(
    lambda rows: {
        name: dict(zip(FORMATS, row, strict=True)) for name, row in zip(NAMES, rows, strict=True)
    }
)


def every_choice(
    sensitivities: dict[str, dict[WeightFormat, float]],
) -> list[tuple[int, float]]:
    """Return size and divergence of every combination."""
    ladders = [
        [(x.size_bytes(SHAPES[name]), cost) for x, cost in (*by_format.items(), (DENSE, 0.0))]
        for name, by_format in sensitivities.items()
    ]
    return [
        (sum(size for size, _ in picked), sum(cost for _, cost in picked))
        for picked in itertools.product(*ladders)
    ]


@given(sensitivities=sensitivities, share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_size_is_kept_and_spent(
    sensitivities: dict[str, dict[WeightFormat, float]], share: float
) -> None:
    every = every_choice(sensitivities)
    smallest, largest = min(every)[0], max(every)[0]
    budget = smallest + int(share * (largest - smallest))
    chosen = choose_formats(
        CONFIG, sensitivities, dense="float16", other_bytes=1000, max_size_bytes=budget + 1000
    )
    size, cost = sum(x.size_bytes for x in chosen), sum(x.kl_nats for x in chosen)
    assert size <= budget
    # The greedy choice is off by what one step of one matrix could have saved, at most.
    best = min(cost for size, cost in every if size <= budget)
    step = max(max(by_format.values()) for by_format in sensitivities.values())
    assert best <= cost + 1e-9
    assert cost <= best + step + 1e-9


@given(sensitivities=sensitivities, share=st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_the_divergence_is_kept(
    sensitivities: dict[str, dict[WeightFormat, float]], share: float
) -> None:
    worst = sum(max(by_format.values()) for by_format in sensitivities.values())
    chosen = choose_formats(
        CONFIG, sensitivities, dense="float16", other_bytes=0, max_kl_nats=worst * share
    )
    assert sum(x.kl_nats for x in chosen) <= worst * share * (1 + 1e-9)
    if share == 1:
        assert all(x.format == FORMATS[0] for x in chosen)


def test_a_size_that_cannot_be() -> None:
    even = {name: dict.fromkeys(FORMATS, 0.1) for name in NAMES}
    smallest = 10 + sum(FORMATS[0].size_bytes(SHAPES[name]) for name in NAMES)
    message = rf"--max-size is 99 bytes, and the smallest formats take {smallest}: allow at least"
    with pytest.raises(RequestError, match=message):
        choose_formats(CONFIG, even, dense="float16", other_bytes=10, max_size_bytes=99)


def test_only_what_fits_a_matrix_is_tried() -> None:
    """Rows of 192 have no blocks of 128."""
    options = QuantizationOptions(is_automatic=True, max_kl_nats=1, keep=("v_proj",))
    found = candidates_of(CONFIG, options)
    assert "model.layers.0.self_attn.v_proj.weight" not in found
    assert [str(x) for x in found[EMBEDDING_WEIGHT]] == ["int4/64", "int4/32", "int8/32"]
    down = found["model.layers.0.mlp.down_proj.weight"]
    assert [str(x) for x in down] == ["int4/128", "int4/64", "int4/32", "int8/32"]
    wide = QuantizationOptions(is_automatic=True, max_kl_nats=1, embedding_bits=8)
    assert [str(x) for x in candidates_of(CONFIG, wide)[EMBEDDING_WEIGHT]] == ["int8/32"]


def test_schemes_without_a_ladder() -> None:
    options = QuantizationOptions(scheme="nf4", is_automatic=True, max_kl_nats=1)
    with pytest.raises(RequestError, match="--auto with nf4: formats are chosen between int4"):
        candidates_of(CONFIG, options)
