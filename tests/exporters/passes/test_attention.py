from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest

from gemma_deploy.engine_build import Attention
from gemma_deploy.exporters.passes.attention import use_attention

PLAIN: dict[str, Any] = {}
WINDOW = {"sliding_window": 3}
SOFTCAP = {"softcap": 50.0}


@pytest.mark.parametrize(
    ("layers", "attention", "has_native", "chosen"),
    [
        ([PLAIN, WINDOW, SOFTCAP], "auto", True, "npp"),
        ([PLAIN, PLAIN], "auto", True, "nn"),
        ([PLAIN, WINDOW], "auto", False, "pp"),
        ([PLAIN, WINDOW], "native", True, "nn"),
        ([PLAIN, WINDOW, SOFTCAP], "plugin", True, "ppp"),
    ],
)
def test_each_layer_gets_what_can_compute_it(
    layers: list[dict[str, Any]],
    attention: Attention,
    has_native: bool,
    chosen: str,
    attention_model: Callable[..., ir.Model],
) -> None:
    model = attention_model(layers)
    needs_plugin = use_attention(model, attention, has_native=has_native)
    letters = {"TRT_Attention": "n", "GemmaAttention": "p"}
    assert "".join(letters.get(node.op_type, "") for node in model.graph) == chosen
    assert needs_plugin is ("p" in chosen)
    assert not model.functions
