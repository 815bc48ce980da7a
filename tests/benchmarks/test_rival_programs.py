"""What runs in the rivals' environment, as far as it needs no rival.

Untested here: the programs that import llama_cpp, onnxruntime_genai or gguf, which are not installed;
`python -m benchmarks.rivals` runs them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.rival_programs.timing import Job, run
from benchmarks.rival_programs.write_gguf import (
    gguf_name,
    gguf_tokens,
    gguf_values,
    read_bfloat16,
)
from benchmarks.shapes import shape_config
from gemma_deploy.checkpoint import expected_tensors

# The tensors of LLM_ARCH_GEMMA in llama.cpp (src/llama-arch.cpp).
LAYER_PARTS = {
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
    "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
}  # fmt: skip


def test_every_tensor_has_its_name_in_gguf() -> None:
    config = shape_config("g270m")
    names = [gguf_name(name) for name in expected_tensors(config)]
    layers = {
        f"blk.{layer}.{part}.weight"
        for layer in range(config.num_hidden_layers)
        for part in LAYER_PARTS
    }
    assert len(names) == len(set(names))
    assert set(names) == layers | {"token_embd.weight", "output_norm.weight"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.17.self_attn.o_proj.weight", "blk.17.attn_output.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
    ],
)
def test_names_in_gguf(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


def test_only_norms_are_stored_with_their_one() -> None:
    weight = np.array([-0.25, 0.5], np.float32)
    for name in ("model.norm.weight", "model.layers.2.input_layernorm.weight"):
        np.testing.assert_array_equal(gguf_values(name, weight), [0.75, 1.5])
    np.testing.assert_array_equal(gguf_values("model.embed_tokens.weight", weight), weight)


def test_there_are_as_many_tokens_as_the_vocabulary() -> None:
    tokens, types = gguf_tokens(1000)
    assert len(tokens) == len(set(tokens)) == len(types) == 1000
    assert tokens[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert (types[2], types[3], types[4], types[999]) == (3, 2, 6, 1)


def test_bfloat16_is_read_as_torch_wrote_it(tmp_path: Path) -> None:
    written = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.tensor([0.0, -1.5, 3e38, 1e-40]).to(torch.bfloat16),
    }
    save_file(written, tmp_path / "model.safetensors")
    read = dict(read_bfloat16(tmp_path / "model.safetensors"))
    assert read.keys() == written.keys()
    for name, values in read.items():
        np.testing.assert_array_equal(values, written[name].float().numpy())


class Recorder:
    """A rival that only notes what it is asked to do."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.calls: list[str] = []
        RECORDERS.append(self)

    def begin(self) -> None:
        self.calls.append("begin")

    def prefill(self) -> None:
        self.calls.append("prefill")

    def step(self) -> None:
        self.calls.append("step")


RECORDERS: list[Recorder] = []


def test_a_program_warms_up_and_prints_its_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["--prompt-tokens", "7", "--new-tokens", "4", "--threads", "2", "--repeats", "2"]
    words = ["program", "model", "--vocab-size", "5000", *counts, "--set", "mmap=on"]
    monkeypatch.setattr(sys, "argv", words)
    # It would outlive the test: this process would be the first to be killed.
    monkeypatch.setattr("benchmarks.rival_programs.timing.offer_to_out_of_memory_killer", int)
    run(Recorder, ("numpy",))
    (recorder,) = RECORDERS
    job = recorder.job
    assert (job.model, job.new_tokens, job.threads) == (Path("model"), 4, 2)
    assert job.settings == {"mmap": "on"}
    assert len(job.prompt) == 7
    assert all(300 <= token < 5000 for token in job.prompt)
    assert recorder.calls == 3 * ["begin", "prefill", "step", "step", "step"]
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["versions"] == {"numpy": np.__version__}
    assert [len(found["step_s"]) for found in printed["rounds"]] == [3, 3]
    assert all(found["ttft_s"] > 0 for found in printed["rounds"])
    assert printed["load_s"] >= 0
