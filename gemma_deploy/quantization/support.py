"""Which graphs take which weight formats: `why_not`."""

from gemma_deploy.graph_spec import Lowering
from gemma_deploy.quantization.formats import WeightFormat


def why_not(lowering: Lowering, weight_format: WeightFormat) -> str | None:
    """Return why graphs of a lowering cannot be written over a weight format, None if they can.

    The reason is a sentence without a full stop that says which formats and graphs do.
    """
    if lowering == "tensorrt" and weight_format.scheme == "nf4":
        return (
            "TensorRT has no nf4: use int4, int8 or fp8 for it, or write graphs of nf4 weights for "
            "onnxruntime and portable only"
        )
    return None
