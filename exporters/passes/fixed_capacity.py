"""Giving the KV cache a fixed length: `fix_capacity`."""

import onnx_ir as ir

_CAPACITY = "T"


def fix_capacity(model: ir.Model, max_seq_len: int) -> None:
    """Make the symbolic cache length T a number, which TensorRT's cache update asks for.

    Args:
        model: A graph of a bundle; changed.
        max_seq_len: Tokens that a row of the cache holds.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [max_seq_len if str(dim) == _CAPACITY else dim for dim in value.shape]
            )
