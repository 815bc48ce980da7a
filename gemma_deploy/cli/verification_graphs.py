"""The graphs that `verify` runs, of whichever lowering, on ONNX Runtime: `GraphChoice`."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma_deploy.bundle import Bundle
from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine_build import Attention
from gemma_deploy.errors import BundleError, RequestError
from gemma_deploy.graph_checks import check_graph
from gemma_deploy.graph_spec import PHASES, GraphSpec, Lowering, Phase, graph_spec

if TYPE_CHECKING:
    import onnx_ir as ir

    from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource
    from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession

_ASSUMED = (
    "; that TRT_Attention counts each row's own length (kv_lengths with lower_right) is taken from its "
    "documentation"
)
# MatMulNBits' accuracy_level: activations in float32.
_FLOAT32_LEVEL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphChoice:
    """Which graphs of a bundle to run, and where.

    Attributes:
        lowering: Whose graphs.
        attention: Of TensorRT graphs: as an engine would be built.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: Threads of the CPU kernels; None for one per core.
    """

    lowering: Lowering
    attention: Attention
    device: str
    threads: int | None

    @property
    def is_widened(self) -> bool:
        """Whether graphs made for 16 bits are computed in float32."""
        return self.lowering == "tensorrt"

    def load(self, bundle: Bundle, *, is_exact: bool = False) -> "OnnxRuntimeSession":
        """Load both graphs.

        Args:
            bundle: The bundle.
            is_exact: Whether ONNX Runtime's graphs multiply quantized weights with float activations
                as they are. In bundles they round each block of activations to 8 bits, as fast
                kernels do, so that a wrong scale of a few weights would not show.

        Raises:
            RequestError: A device that these graphs do not run on, or native attention for a model
                that it cannot compute.
            BundleError: The bundle has no such graphs, or damaged ones.
            SessionError: ONNX Runtime cannot load them.
        """
        from gemma_deploy.runtime.devices import Device
        from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource
        from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession

        device = Device.parse(self.device)
        graphs: dict[Phase, GraphSource] | None = None
        if self.lowering == "onnxruntime" and is_exact and bundle.manifest.formats:
            graphs = {phase: _exact_source(bundle, phase) for phase in PHASES}
        if self.lowering != "onnxruntime":
            if device.kind == "cuda":
                raise RequestError(
                    f"--device is {self.device}; {self.lowering} graphs are checked on the CPU: leave "
                    "it out"
                )
            device = Device(kind="cpu")
            graphs = {phase: self._source(bundle, phase) for phase in PHASES}
        return OnnxRuntimeSession(
            bundle, device=device, threads=self.threads, use_decode_graph=True, graphs=graphs
        )

    def describe(self, config: GemmaConfig, session: "OnnxRuntimeSession") -> str:
        """Return what ran, in words: above all, what did not."""
        loaded = f"both load and are as the manifest says, on {session.device.kind}"
        if self.lowering != "tensorrt":
            return loaded
        assumed = _ASSUMED if self._counts_kv_lengths(config) else ""
        return (
            f"{loaded}. NO TensorRT kernel ran: ONNX Runtime computes in float32 what the TensorRT "
            f"graphs mean, with attention {self.attention}{assumed}"
        )

    def _counts_kv_lengths(self, config: GemmaConfig) -> bool:
        """Tell whether any layer is TRT_Attention by lengths: one without softcap and window."""
        if self.attention == "plugin" or config.attn_logit_softcapping is not None:
            return False
        return any(config.window_of(layer) is None for layer in range(config.num_hidden_layers))

    def _source(self, bundle: Bundle, phase: Phase) -> "GraphSource":
        from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource

        source = GraphSource.of(bundle, phase, self.lowering)
        if self.lowering != "tensorrt":
            return source
        return GraphSource(
            path=source.path,
            spec=graph_spec(bundle.config, phase, "float32"),
            model=_reference_model(source, self.attention),
            data=source.data,
        )


def check_weights(bundle: Bundle) -> str:
    """Look where the external data of every graph lies.

    Raises:
        BundleError: Outside the weights file.
    """
    for lowering in bundle.manifest.lowerings:
        for phase in PHASES:
            check_graph(bundle.folder, bundle.graph_path(phase, lowering), bundle.manifest.weights)
    return f"every tensor of the graphs lies inside {bundle.manifest.weights}"


def _exact_source(bundle: Bundle, phase: Phase) -> "GraphSource":
    """Return a graph of ONNX Runtime's whose products round no activations."""
    import onnx_ir as ir

    from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource

    source = GraphSource.of(bundle, phase, "onnxruntime")
    model = ir.load(source.path)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FLOAT32_LEVEL)
    return dataclasses.replace(source, model=ir.to_proto(model).SerializeToString())


def _reference_model(source: "GraphSource", attention: Attention) -> bytes:
    """Return the graph that an engine is built from, rewritten to run on ONNX Runtime's CPU."""
    import onnx_ir as ir

    from gemma_deploy.exporters.passes.apart_projections import keep_projections_apart
    from gemma_deploy.exporters.passes.attention import use_attention
    from gemma_deploy.exporters.passes.cpu_reference import use_cpu_reference

    model = ir.load(source.path)
    _check_dtypes(source.path.name, model, source.spec)
    use_attention(model, attention)
    keep_projections_apart(model)
    use_cpu_reference(model)
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


def _check_dtypes(name: str, model: "ir.Model", spec: GraphSpec) -> None:
    """Compare dtypes before they are rewritten; the session checks names and sizes.

    Raises:
        BundleError: An input or output is of another dtype than the manifest says.
    """
    expected = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        dtype = "none" if value.dtype is None else str(value.dtype.numpy())
        if dtype != expected.get(str(value.name), dtype):
            raise BundleError(
                f"{name}: {value.name} is {dtype}; expected {expected[str(value.name)]}: export the "
                "bundle again"
            )
