"""Writing ONNX nodes one after the other: `NodeWriter`."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir


class NodeWriter:
    """Collects nodes in the order they are written; nothing is part of a graph yet."""

    def __init__(self) -> None:
        self._tape = ir.tape.Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """What was written so far."""
        return self._tape.nodes

    def op(
        self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Write a node with one output and return it."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        num_outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Write a node with several outputs and return them."""
        return self._tape.op_multi_out(
            op_type, inputs, attributes, domain=domain, num_outputs=num_outputs
        )

    def int64(self, *numbers: int) -> ir.Value:
        """Write a constant int64 [len(numbers)]."""
        return self.op("Constant", value_ints=list(numbers))

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """Write a constant scalar."""
        return self.op("Constant", value=ir.tensor(value, dtype=dtype))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return a value in a dtype: itself where it is known to have it."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, to=dtype.value)
