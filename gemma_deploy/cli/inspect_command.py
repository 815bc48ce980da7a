"""`gemma-deploy inspect`: what a bundle, checkpoint or engine holds, and the memory it needs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import emit_json, emit_table
from gemma_deploy.cli.engine_tables import emit_engine, emit_engines

if TYPE_CHECKING:
    from gemma_deploy.config import GemmaConfig
    from gemma_deploy.graph_spec import TensorSpec
    from gemma_deploy.inspection import Inspection
    from gemma_deploy.manifest import Manifest
    from gemma_deploy.memory import MemoryEstimate

_GENERATIONS = {"gemma": "Gemma 1", "gemma2": "Gemma 2", "gemma3_text": "Gemma 3"}
_SHORT_SEQ_LEN = 1024


@click.command(
    "inspect",
    short_help="Show what a bundle, checkpoint or engine holds and the memory it needs.",
    epilog="""\b
Examples:
  gemma-deploy inspect gemma-2b
  gemma-deploy inspect gemma-2b --max-seq-len 2048 --max-seq-len 8192 --batch-size 4
  gemma-deploy inspect gemma-2b --json | jq .weights
  gemma-deploy inspect packed-engine
""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--max-seq-len",
    "lengths",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="TOKENS",
    help=f"Estimate memory for this many tokens of prompt and answer together; may be repeated. "
    f"[default: {_SHORT_SEQ_LEN} and the model's limit]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="ROWS",
    help="Estimate memory for this many prompts at a time.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object, sizes in bytes, with the whole manifest.",
)
def command(*, path: Path, lengths: tuple[int, ...], batch_size: int, as_json: bool) -> None:
    """Show what the bundle or checkpoint at PATH holds and the memory it needs.

    Of a bundle also what its manifest says: format, graphs, tokenizer, what made it, and with --json
    the SHA-256 of each file; and which engines were built of it. PATH may also be an engine: then it
    shows what it was built with and for, and the sizes it is limited to.

    Only headers and sizes are read, so it answers at once for a model of any size; `verify` checks
    the contents.

    Memory is what a process has to itself, once it has loaded the model and read such a prompt, and
    the most that it has while it loads. KV cache is exact; the rest are estimates for ONNX Runtime on Linux, within
    15 % of what was measured. A CPU computes with copies of the weights: int4 and int8 codes as they are,
    everything else in float32. The mapped weights file comes on top: its pages are shared, and given
    up when memory is short, as are copies that a prepacked cache holds. A GPU holds the weights as
    stored; its backend's own code comes on top.
    """
    from gemma_deploy.engine import ENGINE_FILE
    from gemma_deploy.errors import RequestError
    from gemma_deploy.inspection import inspect_folder
    from gemma_deploy.runtime.generator import PREFILL_CHUNK_TOKENS

    if (path / ENGINE_FILE).is_file():
        if lengths or batch_size > 1:
            raise RequestError(
                f"{path} is an engine, whose sizes are fixed: --max-seq-len and --batch-size are for "
                "bundles and checkpoints"
            )
        _show_engine(path, as_json=as_json)
        return
    inspection = inspect_folder(path)
    limit = inspection.max_seq_len
    estimates = [
        inspection.estimate(
            batch_size=batch_size, max_seq_len=length, prefill_tokens=PREFILL_CHUNK_TOKENS
        )
        for length in lengths or sorted({min(_SHORT_SEQ_LEN, limit), limit})
    ]
    if as_json:
        rows = [estimate.to_dict() for estimate in estimates]
        emit_json(inspection.to_dict() | {"memory": rows}, indent=1)
        return
    _print(inspection, estimates)


def _show_engine(folder: Path, *, as_json: bool) -> None:
    from gemma_deploy.engine import EngineFolder
    from gemma_deploy.inspection import engine_report
    from gemma_deploy.memory import num_parameters

    engine = EngineFolder.open(folder)
    if as_json:
        emit_json(engine_report(engine), indent=1)
        return
    model = engine.manifest.model
    emit_engine(engine, _model_facts(model, num_parameters(model)))


def _print(inspection: "Inspection", estimates: list["MemoryEstimate"]) -> None:
    emit_table(_facts(inspection), title=f"{inspection.kind.capitalize()} {inspection.folder}")
    emit_table(_weights(inspection), title="Weights")
    emit_table(
        [(name, format_bytes(size)) for name, size in inspection.files.items()], title="Files"
    )
    if inspection.manifest is not None:
        emit_table(_graphs(inspection.manifest), title="Graphs")
    emit_engines(inspection.engines, inspection.damaged_engines)
    first = estimates[0]
    rows = [row for e in estimates for row in _memory(e)]
    emit_table(rows, title=f"Memory for {_plural(first.batch_size, 'prompt')} at a time of")


def _weights(inspection: "Inspection") -> list[tuple[str, str]]:
    """Return the size of each group, and where matrices are quantized what a weight takes."""
    bits = {**inspection.bits_by_group, "total": inspection.bits_per_weight}
    sizes = {**inspection.bytes_by_group, "total": inspection.weights_bytes}
    if not inspection.matrices_by_format:
        return [(name, format_bytes(size)) for name, size in sizes.items()]
    return [
        (name, f"{format_bytes(size)}, {bits[name]:.2f} bits per weight")
        for name, size in sizes.items()
    ]


def _facts(inspection: "Inspection") -> list[tuple[str, str]]:
    precision = inspection.precision
    dtypes = ", ".join(f"{k} {format_bytes(v)}" for k, v in inspection.bytes_by_dtype.items())
    facts = _model_facts(inspection.config, inspection.parameters)
    facts.append(("stored as", dtypes))
    if inspection.matrices_by_format:
        counts = inspection.matrices_by_format.items()
        formats = ", ".join(
            f"{name}: {count} {'matrix' if count == 1 else 'matrices'}" for name, count in counts
        )
        facts.append(("quantized", formats))
        if inspection.manifest is not None:
            facts.append(
                ("from the original", str(inspection.manifest.divergence or "not measured"))
            )
    if inspection.manifest is not None:
        facts.append(("computes in", f"{precision.activations}, KV cache {precision.cache}"))
        facts += _manifest_facts(inspection.manifest)
    return facts


def _model_facts(config: "GemmaConfig", parameters: int) -> list[tuple[str, str]]:
    sliding = sum(config.window_of(layer) is not None for layer in range(config.num_hidden_layers))
    window = f", {sliding} with a window of {config.sliding_window} tokens" if sliding else ""
    heads = (
        f"{config.num_attention_heads} query and {config.num_key_value_heads} key-value heads "
        f"of {config.head_dim}"
    )
    return [
        ("model", f"{_GENERATIONS[config.model_type]}, {parameters:,} parameters"),
        ("layers", f"{config.num_hidden_layers}{window}"),
        ("hidden size", f"{config.hidden_size}, feed-forward {config.intermediate_size}"),
        ("attention", heads),
        ("vocabulary", f"{config.vocab_size}{', tied' if config.tie_word_embeddings else ''}"),
        ("longest text", f"{config.max_position_embeddings} tokens"),
    ]


def _manifest_facts(manifest: "Manifest") -> list[tuple[str, str]]:
    from gemma_deploy.manifest import FORMAT_VERSION

    versions = manifest.versions.items()
    return [
        ("format", f"bundle format {FORMAT_VERSION}"),
        ("limits", f"{manifest.max_seq_len} tokens of prompt and answer together"),
        ("tokenizer", ", ".join(manifest.tokenizer) or "none"),
        ("generation", manifest.generation or "none"),
        ("made of", str(manifest.source or "unknown")),
        ("made by", ", ".join(f"{name} {version}" for name, version in versions)),
    ]


def _graphs(manifest: "Manifest") -> list[tuple[str, str]]:
    """Return what each graph takes and gives, the caches of all layers as one line."""
    rows = []
    for lowering, paths in manifest.graphs.items():
        for phase, path in paths.items():
            spec = manifest.spec(phase, lowering)
            lines = [*_lines("takes", spec.inputs), *_lines("gives", spec.outputs)]
            rows += list(zip([path, *[""] * (len(lines) - 1)], lines, strict=True))
    return rows


def _lines(verb: str, tensors: "Sequence[TensorSpec]") -> list[str]:
    texts = list(dict.fromkeys(map(_tensor, tensors)))
    return [f"{verb if i == 0 else '':<{len(verb)}}  {text}" for i, text in enumerate(texts)]


def _tensor(spec: "TensorSpec") -> str:
    name = re.sub(r"\.\d+\.(?:key|value)$", ".{layer}.key|value", spec.name)
    return f"{name} {spec.dtype} [{', '.join(map(str, spec.dims))}]"


def _memory(estimate: "MemoryEstimate") -> list[tuple[str, str]]:
    """Return the lines of an estimate, under its number of tokens."""
    cpu = estimate.cpu
    parts = {
        "Python and ONNX Runtime": cpu.runtime_bytes,
        "tokenizer": cpu.tokenizer_bytes,
        "weights": cpu.weights_bytes,
        "KV cache": estimate.kv_cache_bytes,
        "activations": estimate.activation_bytes,
    }
    prepacked = _kept(estimate.prepacked_total_bytes, estimate.prepacked_peak_bytes)
    written = format_bytes(estimate.prepacked_writing_bytes)
    lines = [
        f"CPU {_kept(estimate.cpu_total_bytes, estimate.cpu_peak_bytes)}",
        "  of it " + ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items()),
        f"  with a prepacked cache {prepacked} ({written} to write it)",
        f"GPU {format_bytes(estimate.gpu_total_bytes)}",
    ]
    names = [f"{estimate.max_seq_len} tokens", *[""] * (len(lines) - 1)]
    return list(zip(names, lines, strict=True))


def _kept(total_bytes: int, peak_bytes: int) -> str:
    total = format_bytes(total_bytes)
    return (
        total if peak_bytes <= total_bytes else f"{total}, {format_bytes(peak_bytes)} while loading"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
