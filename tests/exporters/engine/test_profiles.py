from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine_build import EngineLimits, engine_spec
from gemma_deploy.exporters.engine.profiles import Profile, ShapeRange, optimization_profiles

CONFIG = GemmaConfig(num_hidden_layers=2, num_key_value_heads=3, num_attention_heads=6, head_dim=8)


def _limits(max_batch_size: int = 1) -> EngineLimits:
    return EngineLimits(
        max_batch_size=max_batch_size,
        max_seq_len=100,
        max_step_tokens=30,
        max_logits=4,
        num_candidates=5,
    )


def _profiles(layout: str, phase: str, limits: EngineLimits) -> list[Profile]:
    spec = engine_spec(CONFIG, phase, "float16", limits)  # type: ignore[arg-type]  # a phase
    return optimization_profiles(spec, phase, layout, limits)  # type: ignore[arg-type]  # a layout


def _range(smallest: tuple[int, ...], *rest: tuple[int, ...]) -> ShapeRange:
    usual, largest = rest
    return ShapeRange(smallest=smallest, usual=usual, largest=largest)


def test_one_engine_has_a_profile_for_each_phase() -> None:
    prefill, decode = _profiles("one-engine", "prefill", _limits(4))
    assert prefill["input_ids"] == _range((1, 1), (1, 30), (4, 30))
    assert prefill["input_pos"] == _range((1,), (1,), (4,))
    assert prefill["logits_index"] == _range((1, 1), (1, 1), (4, 4))
    assert prefill["past_key_values.1.key"] == _range(
        (1, 3, 100, 8), (1, 3, 100, 8), (4, 3, 100, 8)
    )
    assert decode["input_ids"] == _range((1, 1), (4, 1), (4, 2))
    assert decode["logits_index"] == _range((1, 1), (4, 1), (4, 2))
    assert decode["past_key_values.0.value"] == _range(
        (1, 3, 100, 8), (4, 3, 100, 8), (4, 3, 100, 8)
    )


def test_both_profiles_have_the_same_dynamic_dimensions() -> None:
    prefill, decode = _profiles("one-engine", "prefill", _limits(1))
    assert decode["input_ids"] == _range((1, 1), (1, 1), (1, 2))
    assert decode["input_pos"] == _range((1,), (1,), (1,))
    for name, shape in prefill.items():
        pairs = zip(shape.smallest, shape.largest, strict=True)
        others = zip(decode[name].smallest, decode[name].largest, strict=True)
        assert [low < high for low, high in pairs] == [low < high for low, high in others]


def test_two_engines_have_one_profile_each() -> None:
    (prefill,) = _profiles("two-engines", "prefill", _limits(1))
    (decode,) = _profiles("two-engines", "decode", _limits(1))
    assert prefill["input_ids"] == _range((1, 1), (1, 30), (1, 30))
    assert decode["input_ids"] == _range((1, 1), (1, 1), (1, 1))
    assert "logits_index" not in decode


@given(
    batch=st.integers(1, 64),
    layout=st.sampled_from(["one-engine", "two-engines"]),
    phase=st.sampled_from(["prefill", "decode"]),
)
def test_every_input_has_an_ordered_range(batch: int, layout: str, phase: str) -> None:
    limits = _limits(batch)
    graph = "prefill" if layout == "one-engine" else phase
    spec = engine_spec(CONFIG, graph, "float16", limits)  # type: ignore[arg-type]  # a phase
    for profile in _profiles(layout, graph, limits):
        assert list(profile) == [tensor.name for tensor in spec.inputs]
        for shape in profile.values():
            for low, usual, high in zip(shape.smallest, shape.usual, shape.largest, strict=True):
                assert 1 <= low <= usual <= high
