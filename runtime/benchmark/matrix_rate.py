"""The rate of a large product on ONNX Runtime's CPU kernels: `matrix_rate`."""

import time
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from gemma_deploy.quantization.formats import WeightFormat

# As many tokens as a prefill step has at most, by a square matrix that outgrows the caches.
_TOKENS: Final = 512
_SIZE: Final = 4096
_REPEATS: Final = 8
# What blocks one scale per row is cut into, and int8 products of rounded activations: as exported.
_ROW_BLOCK: Final = 32
_ACCURACY_LEVEL: Final = 4
_NF4: Final = 1
_CONTRIB: Final = "com.microsoft"


def matrix_rate(weight_format: WeightFormat, threads: int | None) -> float:
    """Return operations per second, of the fastest of several products.

    Activations are float32; weights are multiplied as codes where ONNX Runtime has kernels for them,
    and as float32, into which its CPU provider makes all dense dtypes, otherwise.

    Args:
        weight_format: Of the weights.
        threads: Threads of the kernels; None for one per core.
    """
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    model = product(weight_format, _SIZE)
    session: Any = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((_TOKENS, _SIZE), np.float32)
    fastest_s = float("inf")
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        session.run(None, {"x": x})
        fastest_s = min(fastest_s, time.perf_counter() - started_s)
    return 2 * _TOKENS * _SIZE * _SIZE / fastest_s


def product(weight_format: WeightFormat, size: int) -> bytes:
    """Return a serialized model of one product with a constant matrix.

    Args:
        weight_format: Of the matrix.
        size: Its rows and columns, a multiple of the block size.
    """
    random = np.random.default_rng(0)
    block = weight_format.block_size or _ROW_BLOCK
    sizes = {"K": size, "N": size, "block_size": block}
    match weight_format.scheme:
        case "int4" | "int8":
            codes_shape = (size, size // block, block * weight_format.bits // 8)
            codes = random.integers(0, 256, codes_shape, np.uint8)
            scales = random.random((size, size // block), np.float32)
            name = "MatMulNBits"
            attributes = {"bits": weight_format.bits, "accuracy_level": _ACCURACY_LEVEL, **sizes}
            constants = {"codes": codes, "scales": scales}
        case "nf4":
            codes = random.integers(0, 256, size * size // 2, np.uint8)
            scales = random.random(size * size // block, np.float32)
            name, attributes = "MatMulBnb4", {"quant_type": _NF4, **sizes}
            constants = {"codes": codes, "scales": scales}
        case _:
            name, attributes = "FusedMatMul", {"transB": 1}
            constants = {"weights": random.random((size, size), np.float32)}
    node = helper.make_node(name, ["x", *constants], ["y"], domain=_CONTRIB)
    node.attribute.extend(helper.make_attribute(key, x) for key, x in attributes.items())
    return _model(node, constants, size)


def _model(node: onnx.NodeProto, constants: dict[str, Any], size: int) -> bytes:
    initializers = [onnx.numpy_helper.from_array(x, name) for name, x in constants.items()]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S", size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["S", size])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_CONTRIB, 1)]
    serialized: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return serialized
