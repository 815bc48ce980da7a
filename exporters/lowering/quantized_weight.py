"""A quantized matrix as graphs see it, views of one place in the weights file: `QuantizedWeight`."""

from collections.abc import Iterable
from typing import Final

import onnx_ir as ir

from gemma_deploy.quantization.formats import Scheme, StoredPart, WeightFormat

_CODES: Final[dict[Scheme, ir.DataType]] = {
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}


class QuantizedWeight:
    """A quantized matrix [N, K], whose codes kernels want in different types and shapes.

    Each form is an initializer of its own over the same bytes, made when it is first asked for, so
    that no form costs room in the weights file.

    Attributes:
        format: How it is stored.
        num_rows: N.
        num_columns: K.
        num_blocks: Scales per row.
    """

    def __init__(
        self, weight_format: WeightFormat, parts: Iterable[StoredPart], location: str, offset: int
    ) -> None:
        """Describe a matrix.

        Args:
            weight_format: A quantized format.
            parts: Of the weights file: codes, then scales, one after the other.
            location: The weights file, as graphs name it.
            offset: Where the codes start in it, in bytes.
        """
        codes, scales = parts
        self.format = weight_format
        self.num_rows, self.num_blocks = scales.shape
        self.num_columns = codes.shape[1] * (1 if weight_format.bits == 8 else 2)
        self._codes, self._scales = codes, scales
        self._location, self._offset = location, offset
        self._views: dict[str, ir.Value] = {}

    @property
    def views(self) -> tuple[ir.Value, ...]:
        """The initializers that were asked for."""
        return tuple(self._views.values())

    @property
    def block_size(self) -> int:
        """Elements of a row that share a scale; K where a row has one."""
        return self.num_columns // self.num_blocks

    def codes(self) -> ir.Value:
        """Return the codes of a linear scheme, [N, K] of ONNX's own type for them."""
        dtype = _CODES[self.format.scheme]  # type: ignore[index]  # a quantized format's scheme
        return self._code_view(dtype.name.lower(), dtype, self.num_rows, self.num_columns)

    def packed(self) -> ir.Value:
        """Return the codes as bytes, uint8 [N, K * bits / 8]."""
        return self._code_view("packed", ir.DataType.UINT8, self.num_rows, self._row_bytes)

    def blocks(self, block_size: int) -> ir.Value:
        """Return the codes as blocks of bytes, uint8 [N, K / block_size, block_size * bits / 8]."""
        count = self.num_columns // block_size
        return self._code_view(
            f"blocks_{block_size}",
            ir.DataType.UINT8,
            *(self.num_rows, count, self._row_bytes // count),
        )

    def flat(self) -> ir.Value:
        """Return the codes as bytes, uint8 [N * K * bits / 8]."""
        return self._code_view("flat", ir.DataType.UINT8, self.num_rows * self._row_bytes)

    def scales(self) -> ir.Value:
        """Return the scales, float16 [N, K / block_size]."""
        return self._scale_view(self._scales.name, self.num_rows, self.num_blocks)

    def flat_scales(self) -> ir.Value:
        """Return the scales, float16 [N * K / block_size]."""
        return self._scale_view(f"{self._scales.name}.flat", self.num_rows * self.num_blocks)

    @property
    def _row_bytes(self) -> int:
        return self._codes.shape[1]

    def _code_view(self, form: str, dtype: ir.DataType, *dims: int) -> ir.Value:
        return self._view(
            f"{self._codes.name}.{form}", dtype, dims, self._offset, self._codes.size_bytes
        )

    def _scale_view(self, name: str, *dims: int) -> ir.Value:
        start = self._offset + self._codes.size_bytes
        return self._view(name, ir.DataType.FLOAT16, dims, start, self._scales.size_bytes)

    def _view(
        self, name: str, dtype: ir.DataType, dims: tuple[int, ...], offset: int, length: int
    ) -> ir.Value:
        if name not in self._views:
            tensor = ir.ExternalTensor(
                location=self._location,
                offset=offset,
                length=length,
                dtype=dtype,
                shape=ir.Shape(dims),
                name=name,
            )
            self._views[name] = ir.Value(
                name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims), const_value=tensor
            )
        return self._views[name]
