"""Float16 bundles of models that float16 cannot hold, run on ONNX Runtime."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.overflow_report import OVERFLOW_FILE, OverflowReport
from tests.rounding import MODEL_FLOAT16, assert_near


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_float16_bundles_compute_what_float32_does(
    name: str,
    inflated_checkpoint: Callable[[str], Path],
    oracle: Callable[..., Any],
    open_graph: Callable[..., Any],
    tmp_path: Path,
) -> None:
    source, folder = inflated_checkpoint(name), tmp_path / "bundle"
    bundle = export_checkpoint(source, folder, dtype="float16", graphs=["onnxruntime"])
    report = OverflowReport.from_dict(json.loads((folder / OVERFLOW_FILE).read_text()))
    assert report.overflowing
    assert bundle.manifest.scaling == report.scaling
    ids = torch.randint(8, 512, (2, 24), generator=torch.Generator().manual_seed(1))
    prefill = open_graph(folder, "prefill")
    index = np.tile(np.arange(24), (2, 1))
    logits, _ = prefill.run(ids, [0, 0], prefill.new_cache(2, 24), index)
    with torch.no_grad():
        expected = oracle(source)(ids).logits.numpy()
    assert_near(logits, expected, roundings=MODEL_FLOAT16, dtype="float16")
