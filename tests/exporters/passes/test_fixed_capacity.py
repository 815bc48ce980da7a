from collections.abc import Callable

import onnx_ir as ir

from gemma_deploy.exporters.passes.fixed_capacity import fix_capacity


def test_only_the_cache_gets_a_length(attention_model: Callable[..., ir.Model]) -> None:
    model = attention_model([{}])
    fix_capacity(model, 96)
    shapes = {
        str(value.name): [
            size if isinstance(size, int) else str(size) for size in value.shape or ()
        ]
        for value in (*model.graph.inputs, *model.graph.outputs)
    }
    cache = ["B", 2, 96, 16]
    assert shapes == {
        "query": ["B", "S", 4, 16],
        "input_pos": ["B"],
        "past_key": cache,
        "past_value": cache,
        "output_0": ["B", "S", 4, 16],
        "present_key": cache,
        "present_value": cache,
    }
