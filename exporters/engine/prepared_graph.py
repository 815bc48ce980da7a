"""A bundle's graph made ready for the parser: rewritten, its weights as places in a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gemma_deploy.bundle import Bundle
from gemma_deploy.engine_build import EngineBuild, engine_spec
from gemma_deploy.errors import EngineBuildError
from gemma_deploy.exporters.engine.attention import has_native_attention
from gemma_deploy.exporters.passes.apart_projections import keep_projections_apart
from gemma_deploy.exporters.passes.attention import use_attention
from gemma_deploy.exporters.passes.fixed_capacity import fix_capacity
from gemma_deploy.exporters.passes.top_logits import add_top_logits
from gemma_deploy.graph_checks import check_graph
from gemma_deploy.graph_spec import GraphSpec, Phase
from gemma_deploy.plugins.attention import register_plugin
from gemma_deploy.tensorrt import TensorRTLibrary


@dataclass(frozen=True, slots=True, kw_only=True)
class Initializer:
    """A weight: where its bytes are in the weights file."""

    name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGraph:
    """What the parser is given.

    Attributes:
        proto: The ONNX model, serialized, without weights.
        initializers: Its weights.
        weights_path: The file they are in.
    """

    proto: bytes
    initializers: Sequence[Initializer]
    weights_path: Path

    @property
    def weights_bytes(self) -> int:
        """Size of all weights together."""
        return sum(item.size_bytes for item in self.initializers)


def prepare_graph(
    bundle: Bundle, phase: Phase, build: EngineBuild, library: TensorRTLibrary
) -> tuple[PreparedGraph, GraphSpec]:
    """Rewrite a phase's graph for an engine; return it with what it takes and gives.

    The cache gets its fixed length, attention its kernels, and the logits their largest ones. Where
    the plugin is needed, it is registered for the parser to find.

    Raises:
        BundleError: The graph points outside its files.
        EngineBuildError: A weight is not in the weights file.
    """
    path = bundle.graph_path(phase, "tensorrt")
    check_graph(bundle.folder, path, bundle.manifest.weights)
    model = ir.load(path)
    fix_capacity(model, build.limits.max_seq_len)
    needs_plugin = use_attention(model, build.attention, has_native=has_native_attention(library))
    if needs_plugin:
        register_plugin(library, build.targets)
    keep_projections_apart(model)
    add_top_logits(model, build.limits.num_candidates)
    spec = engine_spec(
        bundle.config, phase, bundle.manifest.precision_of("tensorrt").activations, build.limits
    )
    graph = PreparedGraph(
        proto=ir.to_proto(model).SerializeToString(),
        initializers=_external_initializers(model.graph, bundle),
        weights_path=bundle.weights_path,
    )
    return graph, spec


def _external_initializers(graph: ir.Graph, bundle: Bundle) -> list[Initializer]:
    found = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.location != bundle.manifest.weights:
            raise EngineBuildError(
                f"the weight {name} is in {tensor.location}, expected in "
                f"{bundle.manifest.weights}: export the bundle again"
            )
        found.append(
            Initializer(name=name, offset=tensor.offset or 0, size_bytes=tensor.length or 0)
        )
    return found
