import dataclasses
from typing import Any

import pytest

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.engine.options import BuildOptions
from gemma_deploy.graph_spec import Precision
from gemma_deploy.manifest import Manifest


def _manifest(max_seq_len: int, **model: Any) -> Manifest:
    return Manifest(
        config=GemmaConfig(**{"vocab_size": 5000, "max_position_embeddings": max_seq_len} | model),
        precision=Precision.of("float16"),
        graphs={},
        weights="weights.safetensors",
        tokenizer=(),
        generation=None,
        max_seq_len=max_seq_len,
        files={},
        versions={},
    )


def _limits(model_max_seq_len: int, /, **options: Any) -> tuple[int, ...]:
    chosen = BuildOptions(flavour="tensorrt-rtx", **options)
    return dataclasses.astuple(chosen.limits(_manifest(model_max_seq_len)))


def test_what_is_left_open_follows_the_model() -> None:
    assert _limits(8192) == (1, 4096, 512, 1, 64)
    assert _limits(300) == (1, 300, 300, 1, 64)


def test_a_small_vocabulary_has_fewer_candidates() -> None:
    options = BuildOptions(flavour="tensorrt")
    assert options.limits(_manifest(300, vocab_size=40)).num_candidates == 40


def test_what_is_asked_for_is_taken() -> None:
    given = {"max_batch_size": 3, "max_seq_len": 8192, "max_step_tokens": 100}
    assert _limits(8192, **given, max_logits=5, num_candidates=7) == (3, 8192, 100, 5, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 8193}, "max_seq_len is 8193; expected a whole number from 1 to 8192"),
        ({"max_seq_len": 0}, "max_seq_len is 0; expected"),
        ({"max_seq_len": 64, "max_step_tokens": 65}, "prefill_chunk is 65; .* 1 to 64"),
        ({"max_step_tokens": 8, "max_logits": 9}, "max_logits is 9; .* 1 to 8"),
        ({"max_batch_size": 0}, "max_batch is 0; expected a whole number from 1 to 4095, the rows"),
        ({"max_batch_size": 4096}, "max_batch is 4096; expected a whole number from 1 to 4095"),
        ({"num_candidates": 3841}, "top_logits is 3841; .* 1 to 3840"),
        ({"num_candidates": 0}, "top_logits is 0"),
        (
            {"layout": "three-engines"},
            "layout is 'three-engines'; expected one-engine, two-engines",
        ),
        ({"attention": "flash"}, "attention is 'flash'; expected auto, native, plugin"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _limits(8192, **options)


def test_another_library_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"backend is 'onnxruntime'; expected tensorrt, tensorrt"
    ):
        BuildOptions(flavour="onnxruntime")  # type: ignore[arg-type]  # on purpose


def test_rows_of_a_batch_begin_where_tensorrt_reads_them() -> None:
    narrow = _manifest(8192, num_key_value_heads=1, head_dim=16)  # 32 bytes per token in float16
    rows: dict[str, Any] = {"flavour": "tensorrt-rtx", "max_batch_size": 2}
    with pytest.raises(RequestError, match=r"max_seq_len is 100; .* must be a multiple of 8"):
        BuildOptions(**rows, max_seq_len=100).limits(narrow)
    assert BuildOptions(**rows, max_seq_len=104).limits(narrow).max_seq_len == 104
    assert BuildOptions(flavour="tensorrt-rtx", max_seq_len=100).limits(narrow).max_seq_len == 100
