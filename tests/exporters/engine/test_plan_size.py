from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.config import CONFIG_FILE, GemmaConfig
from gemma_deploy.exporters.engine import build_engine
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.safetensors_files import SINGLE_FILE

if TYPE_CHECKING:
    from tests.exporters.engine.conftest import Options

# The shape of Gemma 3 270M, with fewer layers.
SHAPE = GemmaConfig(
    vocab_size=256_000,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
)
# Kernels, the plan's description of its layers, norms.
REST_BYTES = 10_000_000


@pytest.mark.slow
def test_a_plan_of_two_profiles_holds_the_weights_once(
    tmp_path: Path, rtx_options: Options
) -> None:

    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape, np.float32).astype(np.float16)
        for name, shape in expected_tensors(SHAPE).items()
    }
    (tmp_path / "checkpoint").mkdir()
    save_file(weights, tmp_path / "checkpoint" / SINGLE_FILE)
    (tmp_path / "checkpoint" / CONFIG_FILE).write_text(json.dumps(SHAPE.to_dict()))
    bundle = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", dtype="float16")
    options = dataclasses.replace(rtx_options(), max_seq_len=2048)
    engine = build_engine(bundle, options).engine
    weights_bytes = sum(weight.nbytes for weight in weights.values())
    plan_bytes = engine.manifest.files["engine.plan"].size_bytes
    assert weights_bytes <= plan_bytes < weights_bytes + REST_BYTES
