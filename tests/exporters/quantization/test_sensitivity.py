from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.exporters.quantization.sensitivity import measure_sensitivities
from gemma_deploy.quantization.codes import dequantize, quantize
from gemma_deploy.quantization.formats import WeightFormat

TinyFolders = Callable[..., Path]

COARSE, FINE = WeightFormat("int4", 64), WeightFormat("int8", 32)
MATRIX = "model.layers.1.mlp.down_proj.weight"


def divergence(
    model: Any, rows: torch.Tensor, names: list[str], weight_format: WeightFormat
) -> float:
    """Return mean KL(model || model with matrices rounded), by transformers and torch."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    originals = {name: parameters[name].data.clone() for name in names}
    with torch.no_grad():
        own = model(rows).logits.double().log_softmax(-1)
        for name in names:
            rounded = dequantize(quantize(originals[name], weight_format), weight_format)
            parameters[name].data.copy_(rounded)
        other = model(rows).logits.double().log_softmax(-1)
    for name in names:
        parameters[name].data.copy_(originals[name])
    return float(F.kl_div(other, own, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("name", ["gemma2", "gemma1-untied"])
def test_costs_are_what_rounding_does_to_the_logits(
    tiny_checkpoint: TinyFolders,
    oracle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Exact for tables; a matrix gets its share of its layer's cost."""
    head_blocks = "gemma_deploy.exporters.quantization.sensitivity._HEAD_BLOCK_BYTES"
    monkeypatch.setattr(head_blocks, 100 * 64 * 4)
    rows = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    checkpoint = Checkpoint.open(tiny_checkpoint(name))
    in_layer = [x for x in checkpoint.tensors if ".layers.1." in x and x.endswith("proj.weight")]
    tables = [x for x in (EMBEDDING_WEIGHT, HEAD_WEIGHT) if x in checkpoint.tensors]
    found = measure_sensitivities(
        checkpoint, rows, dict.fromkeys((*in_layer, *tables), (COARSE, FINE))
    )
    assert found.keys() == {*in_layer, *tables}
    model = oracle(tiny_checkpoint(name))
    for table in tables:
        for weight_format in (COARSE, FINE):
            wanted = divergence(model, rows, [table], weight_format)
            assert found[table][weight_format] == pytest.approx(wanted, rel=0.02, abs=1e-7)
    layer_cost = sum(found[matrix][COARSE] for matrix in in_layer)
    assert layer_cost == pytest.approx(divergence(model, rows, in_layer, COARSE), rel=0.02)
    assert found[MATRIX][FINE] < found[MATRIX][COARSE] / 50
    alone = divergence(model, rows, [MATRIX], COARSE)
    assert alone / 3 < found[MATRIX][COARSE] < alone * 3
