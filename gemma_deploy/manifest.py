"""The manifest of a bundle: what `manifest.json` says, and how it is read and written."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.checkpoint_source import CheckpointSource
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import BundleError, BundleVersionError, ConfigError, RequestError
from gemma_deploy.file_records import FileRecord
from gemma_deploy.graph_spec import (
    LOWERINGS,
    PHASES,
    GraphSpec,
    Lowering,
    Phase,
    Precision,
    graph_name,
    graph_spec,
)
from gemma_deploy.install_hint import install_line
from gemma_deploy.json_values import typed, whole
from gemma_deploy.quantization.divergence import Divergence
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.quoting import shortened
from gemma_deploy.residual_scaling import ResidualScaling

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`; docs/bundle.md describes the file.

    Attributes:
        config: The model.
        precision: Dtypes of weights, activations and cache.
        graphs: Path of each phase's graph, for each lowering the bundle has; `onnxruntime` always.
        weights: Path of the weights file all graphs point into.
        formats: How quantized matrices are stored, by name; empty in a dense bundle.
        method: What found the codes: `rtn`, `imatrix`, `awq` or `gptq`, or the name of the tool that a
            checkpoint was quantized with; None in a dense bundle.
        divergence: How far the quantized weights are from the checkpoint's; None where the export
            did not measure it.
        scaling: What the weights are divided by so that float16 does not overflow; None for
            nothing.
        tokenizer: Paths of the tokenizer's files.
        generation: Path of generation_config.json, or None.
        max_seq_len: Longest sequence the model was made for, in tokens.
        files: Size and hash of every file but the manifest itself.
        versions: Versions of everything that made the bundle.
        source: The checkpoint it was made of; None in bundles that do not say.
    """

    config: GemmaConfig
    precision: Precision
    graphs: Mapping[Lowering, Mapping[Phase, str]]
    weights: str
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)
    method: str | None = None
    divergence: Divergence | None = None
    scaling: ResidualScaling | None = None
    tokenizer: tuple[str, ...]
    generation: str | None
    max_seq_len: int
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    source: CheckpointSource | None = None

    @property
    def lowerings(self) -> tuple[Lowering, ...]:
        """The lowerings the bundle has graphs of, in the order of `LOWERINGS`."""
        return tuple(lowering for lowering in LOWERINGS if lowering in self.graphs)

    def precision_of(self, lowering: Lowering) -> Precision:
        """Return the dtypes of a lowering's graphs.

        Raises:
            BundleError: The bundle has no such graphs.
        """
        self._require(lowering)
        return self.precision.of_lowering(lowering)

    def spec(self, phase: Phase, lowering: Lowering = "onnxruntime") -> GraphSpec:
        """Return what the graph of a phase takes and gives.

        Raises:
            BundleError: The bundle has no graphs of that lowering.
        """
        return graph_spec(self.config, phase, self.precision_of(lowering).cache)

    def graph_file(self, phase: Phase, lowering: Lowering = "onnxruntime") -> str:
        """Return the path of a phase's graph, within the bundle.

        Raises:
            BundleError: The bundle has no graphs of that lowering.
        """
        self._require(lowering)
        return self.graphs[lowering][phase]

    def _require(self, lowering: Lowering) -> None:
        if lowering in self.graphs:
            return
        if lowering == "tensorrt" and self.precision.weights == "float32":
            raise BundleError(
                "the bundle is in float32 and has no tensorrt graphs: TensorRT engines compute in "
                "float16 or bfloat16. Export it again: `gemma-deploy export CHECKPOINT --output BUNDLE "
                "--force --fp16` (or --bf16)"
            )
        # A bundle is replaced as a whole: what it has besides is asked for again.
        wanted = [x for x in LOWERINGS if x == lowering or x in self.graphs]
        options = " ".join(f"--graphs {x}" for x in wanted if x != "onnxruntime")
        dtype = "" if self.formats else f"--dtype {self.precision.weights} "
        others = " with the options it was made with" if self.formats else ""
        raise BundleError(
            f"the bundle has no {lowering} graphs, only {', '.join(self.lowerings)}. Export it again: "
            f"`gemma-deploy export CHECKPOINT --output BUNDLE --force {dtype}{options}`{others}"
        )

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        body = {
            "format_version": FORMAT_VERSION,
            "model": self.config.to_dict(),
            "precision": dataclasses.asdict(self.precision),
            "graphs": {
                graph_name(phase, lowering): {
                    "path": self.graphs[lowering][phase],
                    **_spec_json(self.spec(phase, lowering)),
                }
                for lowering in self.lowerings
                for phase in PHASES
            },
            "weights": self.weights,
            "quantization": {
                "method": self.method,
                "formats": {name: str(text) for name, text in self.formats.items()},
                "divergence": None if self.divergence is None else self.divergence.to_dict(),
            }
            if self.formats
            else None,
            "scaling": None if self.scaling is None else self.scaling.to_dict(),
            "tokenizer": list(self.tokenizer),
            "generation": self.generation,
            "limits": {"max_seq_len": self.max_seq_len},
            "files": {path: dataclasses.asdict(record) for path, record in self.files.items()},
            "versions": dict(self.versions),
            "source": None if self.source is None else self.source.to_dict(),
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def parse_manifest(raw: Mapping[str, Any], folder: Path) -> Manifest:
    """Read the contents of a `manifest.json`.

    Args:
        raw: The parsed JSON.
        folder: Where it was, for messages.

    Raises:
        BundleError: It is not one, or contradicts itself.
        BundleVersionError: A format this version does not know.
    """
    _check_version(raw.get("format_version"), folder)
    try:
        manifest = _parsed(raw)
    except (
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
        ConfigError,
        RequestError,
    ) as err:
        raise BundleError(
            f"manifest.json is damaged ({type(err).__name__}: {err}): export the bundle again"
        ) from err
    for lowering in manifest.lowerings:
        for phase in PHASES:
            name = graph_name(phase, lowering)
            stated = {key: raw["graphs"][name].get(key) for key in ("inputs", "outputs")}
            if stated != _spec_json(manifest.spec(phase, lowering)):
                raise BundleError(
                    f"manifest.json: the inputs and outputs of the {name} graph are not those of the "
                    "model it describes: export the bundle again"
                )
    return manifest


def _parsed(raw: Mapping[str, Any]) -> Manifest:
    precision: Precision = typed(Precision, raw["precision"], "precision")
    config = GemmaConfig.from_dict(raw["model"])
    formats, method = _quantization(raw.get("quantization"), config)
    return Manifest(
        config=config,
        precision=precision,
        graphs=_parse_graphs(raw["graphs"]),
        weights=typed(str, raw["weights"], "weights"),
        formats=formats,
        method=method,
        divergence=_divergence(raw.get("quantization")),
        scaling=_scaling(raw, config),
        tokenizer=typed(tuple[str, ...], raw["tokenizer"], "tokenizer"),
        generation=typed(str | None, raw["generation"], "generation"),
        max_seq_len=whole(
            raw["limits"]["max_seq_len"], "max_seq_len", 1, config.max_position_embeddings
        ),
        files=typed(Mapping[str, FileRecord], raw["files"], "files"),
        versions=typed(Mapping[str, str], raw["versions"], "versions"),
        source=CheckpointSource.from_dict(raw.get("source")),
    )


def _quantization(
    raw: Mapping[str, Any] | None, config: GemmaConfig
) -> tuple[dict[str, WeightFormat], str | None]:
    """Return formats and method; bundles made before there were any say nothing."""
    if raw is None:
        return {}, None
    stated = typed(Mapping[str, str], raw["formats"], "formats")
    formats = {name: WeightFormat.parse(text) for name, text in stated.items()}
    shapes = expected_tensors(config)
    for name, weight_format in formats.items():
        if not weight_format.is_quantized or len(shapes[name]) != 2:
            raise ValueError(f"{name} in {weight_format}, expected a matrix in a quantized format")
    return formats, typed(str, raw["method"], "method")


def _divergence(raw: Mapping[str, Any] | None) -> Divergence | None:
    """Return what was measured; bundles made before it was say nothing."""
    if raw is None or raw.get("divergence") is None:
        return None
    return Divergence.from_dict(raw["divergence"])


def _scaling(raw: Mapping[str, Any], config: GemmaConfig) -> ResidualScaling | None:
    if raw.get("scaling") is None:
        return None
    scaling = ResidualScaling.from_dict(raw["scaling"])
    if len(scaling.layers) != config.num_hidden_layers:
        raise ValueError(
            f"scaling has {len(scaling.layers)} layers, the model {config.num_hidden_layers}"
        )
    if scaling != ResidualScaling.of(config, scaling.residual, scaling.layers):
        raise ValueError("scaling has another epsilon or other norms than the model")
    return scaling


def _check_version(version: object, folder: Path) -> None:
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(
            f"{folder / MANIFEST_FILE} has format_version {shortened(version)}, expected a whole "
            "number from 1: not a gemma-deploy manifest; export the bundle again"
        )
    if version > FORMAT_VERSION:
        raise BundleVersionError(
            f"{folder} has bundle format {version}, this gemma-deploy reads up to "
            f"{FORMAT_VERSION}: upgrade it: get the newer source, and {install_line()}"
        )


def _parse_graphs(raw: Mapping[str, Any]) -> dict[Lowering, dict[Phase, str]]:
    """Return the paths of the graphs; a lowering is there with all its phases or not at all."""
    return {
        lowering: {
            phase: typed(str, raw[graph_name(phase, lowering)]["path"], "path") for phase in PHASES
        }
        for lowering in LOWERINGS
        if lowering == "onnxruntime" or any(graph_name(phase, lowering) in raw for phase in PHASES)
    }


def _spec_json(spec: GraphSpec) -> dict[str, Any]:
    body = dataclasses.asdict(spec)
    del body["phase"]
    return cast(dict[str, Any], json.loads(json.dumps(body)))
