"""What an engine is built for, and what that makes of its inputs and outputs: `EngineBuild`."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_deploy.config import GemmaConfig
from gemma_deploy.graph_spec import PHASES, DType, GraphSpec, Phase, TensorSpec, graph_spec
from gemma_deploy.json_values import typed, whole
from gemma_deploy.limits import MAX_POSITIONS
from gemma_deploy.tensorrt.library import Flavour

TOP_LOGITS = "top_logits"
TOP_INDICES = "top_indices"
LOGITS_SUM = "logits_sum"

Layout = Literal["one-engine", "two-engines"]
Attention = Literal["auto", "native", "plugin"]

_KEY_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine was built for; larger requests are refused before anything runs.

    Attributes:
        max_batch_size: Most rows of a step.
        max_seq_len: Tokens of a row's KV cache: exactly these, an engine's cache has a fixed length.
        max_step_tokens: Most tokens of a row in one prefill step.
        max_logits: Most positions of a row whose logits are asked for in one prefill step.
        num_candidates: Largest logits the engine picks out itself, the k of `top_logits`.
    """

    max_batch_size: int
    max_seq_len: int
    max_step_tokens: int
    max_logits: int
    num_candidates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """Everything that decides what plans come out of a bundle's graphs.

    Attributes:
        flavour: The library.
        library_version: Its version; no other version loads the plans.
        targets: Compute capabilities such as `8.9`, ascending: the GPUs the plans run on.
        layout: `one-engine` with a profile for each phase, or `two-engines` with the weights in both.
        attention: As asked for: `native` kernels, the `plugin`, or `auto`.
        plugin_version: Of the attention plugin; None if no layer uses it.
        limits: Sizes of the optimization profiles.
        graphs: SHA-256 of each phase's graph file.
        weights: SHA-256 of the weights file.
    """

    flavour: Flavour
    library_version: str
    targets: tuple[str, ...]
    layout: Layout
    attention: Attention
    plugin_version: str | None
    limits: EngineLimits
    graphs: Mapping[Phase, str]
    weights: str

    @property
    def key(self) -> str:
        """Return the name of the engine's folder: readable, and another for any other build."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]
        targets = "+".join(f"sm{target.replace('.', '')}" for target in self.targets)
        return f"{self.flavour}-{self.library_version}-{targets}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Return the build as JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "EngineBuild":
        """Read what `to_dict` gave.

        Raises:
            ValueError: Something is missing, of another type, or none of the values possible.
        """
        build: EngineBuild = typed(cls, raw, "build")
        for field in dataclasses.fields(EngineLimits):
            whole(getattr(build.limits, field.name), f"limits.{field.name}", 1, MAX_POSITIONS)
        if set(build.graphs) != set(PHASES):
            raise ValueError(
                f"graphs names {', '.join(build.graphs)}, expected {', '.join(PHASES)}"
            )
        return build


def engine_spec(
    config: GemmaConfig, phase: Phase, cache_dtype: DType, limits: EngineLimits
) -> GraphSpec:
    """Return what an engine takes and gives.

    The graph's inputs and outputs with T as a number, and in addition `top_logits` float32 [B, L, k]
    in descending order, their `top_indices` int64 [B, L, k], and `logits_sum` float32 [B, L], which is
    finite only if every logit is.
    """
    spec = graph_spec(config, phase, cache_dtype)
    positions = spec.outputs[0].dims[1]
    k = limits.num_candidates
    picked = (
        TensorSpec(name=TOP_LOGITS, dtype="float32", dims=("B", positions, k)),
        TensorSpec(name=TOP_INDICES, dtype="int64", dims=("B", positions, k)),
        TensorSpec(name=LOGITS_SUM, dtype="float32", dims=("B", positions)),
    )

    def fixed(tensor: TensorSpec) -> TensorSpec:
        dims = tuple(limits.max_seq_len if dim == "T" else dim for dim in tensor.dims)
        return dataclasses.replace(tensor, dims=dims)

    inputs = tuple(map(fixed, spec.inputs))
    outputs = (spec.outputs[0], *picked, *map(fixed, spec.outputs[1:]))
    return dataclasses.replace(spec, inputs=inputs, outputs=outputs)


def describe_build(build: EngineBuild) -> str:
    """Return in a line what tells engines apart that have the library and the targets in common."""
    limits = build.limits
    return (
        f"batches of {limits.max_batch_size}, {limits.max_seq_len:,} tokens, {build.layout}, attention "
        f"{build.attention}"
    )


def build_command(bundle: Path, build: EngineBuild, *, force: bool = False) -> str:
    """Return the command line that makes such an engine again, with the library now installed.

    Args:
        bundle: The bundle's folder.
        build: What the engine is to be like.
        force: Whether to build it although the very same one is there.
    """
    limits = build.limits
    options = [
        f"--backend {build.flavour}",
        f"--max-batch {limits.max_batch_size}",
        f"--max-seq-len {limits.max_seq_len}",
        f"--prefill-chunk {limits.max_step_tokens}",
        f"--max-logits {limits.max_logits}",
        f"--top-logits {limits.num_candidates}",
    ]
    if build.flavour == "tensorrt-rtx":  # the other one builds for the GPU at hand only
        options += [f"--compute-capability {target}" for target in build.targets]
    if build.layout != "one-engine":
        options.append(f"--layout {build.layout}")
    if build.attention != "auto":
        options.append(f"--attention {build.attention}")
    if force:
        options.append("--force")
    return f"gemma-deploy build {shlex.quote(str(bundle))} {' '.join(options)}"
