from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.benchmark.plan import BenchPlan, open_source, sweep
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase


def test_a_sweep_is_the_product_without_doubles() -> None:
    cases = sweep([8, 16, 8], [4], [1, 2])
    assert [(x.prompt_tokens, x.new_tokens, x.batch_size) for x in cases] == [
        (8, 4, 1),
        (16, 4, 1),
        (8, 4, 2),
        (16, 4, 2),
    ]


@pytest.mark.parametrize(
    ("cases", "fields", "message"),
    [
        (([0], [4], [1]), {}, "prompt_tokens is 0; it must be at least 1"),
        (([8], [1], [1]), {}, "new_tokens is 1; it must be at least 2"),
        (([8], [4], [0]), {}, "batch_size is 0; it must be at least 1"),
        (([8], [4], [1]), {"rounds": 0}, "rounds is 0; it must be at least 1"),
        (([8], [4], [1]), {"warmup": -1}, "warmup is -1; it must be at least 0"),
        (([], [4], [1]), {}, "there is no case to run"),
        (
            ([8], [4], [1]),
            {"against": ("torch-eager",)},
            "torch-eager cannot run a bundle; give the",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    cases: Any, fields: dict[str, Any], message: str, make_plan: Any
) -> None:
    with pytest.raises(RequestError, match=message):
        make_plan(Path("bundle"), cases, **fields)


def test_lengths_beyond_the_model(make_plan: Any, text_bundle: Any) -> None:
    folder = text_bundle("gemma1")  # made for 512 tokens
    # The last token needs no place in the cache.
    assert open_source(make_plan(folder, ([500], [13], [1]))).max_seq_len == 512
    with pytest.raises(
        RequestError,
        match=r"prompt 500, new 14, batch 1: 513 tokens must fit .* is made for 512: sho",
    ):
        open_source(make_plan(folder, ([6, 500], [14], [1])))


def test_baselines_run_the_checkpoint(make_plan: Any) -> None:
    plan: BenchPlan = make_plan(
        Path("bundle"),
        backend="tensorrt",
        against=("torch-eager",),
        checkpoint=Path("checkpoint"),
        baseline_dtype="float16",
    )
    ours, eager = plan.specs()
    assert (ours.name, ours.model, ours.backend, ours.dtype) == (OURS, "bundle", "tensorrt", None)
    assert (eager.name, eager.model, eager.dtype) == ("torch-eager", "checkpoint", "float16")
    assert ours.max_seq_len == eager.max_seq_len == 12
    assert BenchCase(prompt_tokens=9, new_tokens=4) in plan.cases


def test_another_model_in_the_same_folder_has_another_fingerprint(
    make_plan: Any, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    before = make_plan(tmp_path).fingerprint()
    assert make_plan(tmp_path).fingerprint() == before
    assert make_plan(tmp_path, rounds=3).fingerprint() != before
    (tmp_path / "manifest.json").write_text('{"model": {}}')
    assert make_plan(tmp_path).fingerprint()["model"] != before["model"]
