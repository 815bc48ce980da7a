"""The small trained model, exported in each dtype, against eager torch in float32 on held-out text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.graph_spec import DType
from gemma_deploy.tokenizer import GemmaTokenizer

TINY_GEMMA = Path(__file__).parents[2] / "samples" / "tiny-gemma"
ROWS, TOKENS = 4, 200

# Largest KL divergence at any position, nats. The checkpoint is bfloat16, so float32 and bfloat16
# bundles hold the same weights and differ from torch by the order of sums. float16 rounds every
# activation to 11 bits: logits off by about 1e-3 of their spread, and KL grows with the square.
KL_TOLERANCE = {"float32": 1e-8, "bfloat16": 1e-8, "float16": 1e-4}


@pytest.mark.parametrize("dtype", KL_TOLERANCE)
def test_kl_divergence_to_eager_torch(
    dtype: DType, open_graph: Callable[..., Any], oracle: Callable[..., Any], tmp_path: Path
) -> None:
    text = (TINY_GEMMA / "held_out.txt").read_text(encoding="utf-8")
    ids = GemmaTokenizer.from_pretrained(TINY_GEMMA).encode(text)[: ROWS * TOKENS]
    tokens = np.array(ids).reshape(ROWS, TOKENS)
    with torch.no_grad():
        reference = oracle(TINY_GEMMA)(torch.from_numpy(tokens)).logits.double().log_softmax(-1)

    bundle = export_checkpoint(TINY_GEMMA, tmp_path / "bundle", dtype=dtype)
    graph = open_graph(bundle.folder, "prefill")
    index = np.tile(np.arange(TOKENS), (ROWS, 1))
    logits, _ = graph.run(tokens, [0] * ROWS, graph.new_cache(ROWS, TOKENS), index)
    found = torch.from_numpy(logits).double().log_softmax(-1)

    divergence = (reference.exp() * (reference - found)).sum(-1)
    assert float(divergence.max()) < KL_TOLERANCE[dtype]
