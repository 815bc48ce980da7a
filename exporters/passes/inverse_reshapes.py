"""Dropping reshapes that undo each other: `drop_inverse_reshapes`."""

import onnx_ir as ir


def drop_inverse_reshapes(model: ir.Model) -> None:
    """Take the input of a Reshape where another Reshape gives it its own shape back.

    The model splits projections into heads, and kernels want them flat: without this, a decode step
    spends as long on reshapes as on its norms, rotations and additions. Only shapes that are known,
    symbolic sizes included, are compared. Reshapes that nothing reads any more stay for
    others to remove.

    Args:
        model: Changed.
    """
    for node in model.graph:
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        first = node.inputs[0].producer()
        if first is None or first.op_type != "Reshape" or first.inputs[0] is None:
            continue
        source, output = first.inputs[0], node.outputs[0]
        is_same = source.shape is not None and source.shape == output.shape
        if is_same and not any(_is_anonymous(dim) for dim in source.shape or ()):
            output.replace_all_uses_with(source)


def _is_anonymous(dim: int | ir.SymbolicDim) -> bool:
    """Tell whether a size has no name: two of them need not be equal."""
    return isinstance(dim, ir.SymbolicDim) and dim.value is None
