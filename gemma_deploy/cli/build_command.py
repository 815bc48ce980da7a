"""`gemma-deploy build`: a bundle gets a TensorRT engine."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import emit_json, notice, progress, say
from gemma_deploy.cuda_driver import cuda_device_count

if TYPE_CHECKING:
    from gemma_deploy.engine import EngineFolder
    from gemma_deploy.engine_build import Attention, Layout
    from gemma_deploy.tensorrt import Flavour


@click.command(
    "build",
    short_help="Build a TensorRT engine of a bundle.",
    epilog="""\b
Examples:
  gemma-deploy build gemma-2b --backend tensorrt-rtx
  gemma-deploy build gemma-2b --backend tensorrt-rtx --compute-capability 8.9 --max-seq-len 8192
  gemma-deploy build gemma-2b --backend tensorrt --max-batch 8

The engine is kept in the bundle, under engines/, and belongs to the very version of the library that
built it. Its sizes are fixed: a longer text or a larger batch needs another build. `gemma-deploy
pack` makes it a folder of its own to copy to a device.

tensorrt-rtx builds without a GPU. For which GPUs: those named with --compute-capability; else the
one of this machine; else 8.6, 8.9 and 12.0. tensorrt builds for the GPU of this machine only.
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    required=True,
    help="TensorRT, for servers, or TensorRT for RTX, for GeForce and RTX GPUs.",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    multiple=True,
    metavar="X.Y",
    help="A kind of GPU to build for, such as 8.9; may be repeated; tensorrt-rtx only. "
    "[default: see below]",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="ROWS",
    help="Most prompts at a time.",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Capacity of the KV cache: tokens of prompt and answer together. "
    "[default: the model's limit, at most 4096]",
)
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Most tokens of a prompt that are read in one step. [default: 512]",
)
@click.option(
    "--max-logits",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Most positions per row that one prefill step gives logits for; generating needs one.",
)
@click.option(
    "--top-logits",
    type=click.IntRange(min=1),
    metavar="K",
    help="The K largest logits are picked out on the GPU; only they are copied to the host where "
    "they suffice. [default: 64]",
)
@click.option(
    "--layout",
    type=click.Choice(["one-engine", "two-engines"]),
    default="one-engine",
    show_default=True,
    help="One engine for prompts and for single tokens, or one for each: twice the size, and "
    "decode with nothing left open.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "native", "plugin"]),
    default="auto",
    show_default=True,
    help="What computes attention: TensorRT's own kernels, or gemma-deploy's plugin. auto takes the "
    "plugin for layers with a softcap or a window, which TensorRT has no kernels for.",
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with path and sizes.")
def command(
    *,
    bundle: Path,
    backend: "Flavour",
    compute_capabilities: tuple[str, ...],
    max_batch: int,
    max_seq_len: int | None,
    prefill_chunk: int | None,
    max_logits: int,
    top_logits: int | None,
    layout: "Layout",
    attention: "Attention",
    force: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine of the bundle BUNDLE.

    BUNDLE must be exported with --fp16 or --bf16; the engine computes in that dtype. The library runs
    in a process of its own, which needs about as much memory as the weights have; Ctrl-C ends it and
    leaves nothing behind. An engine that is there already is not built again.
    """
    from gemma_deploy.bundle import Bundle
    from gemma_deploy.exporters.engine import BuildOptions, build_engine

    options = BuildOptions(
        flavour=backend,
        compute_capabilities=compute_capabilities,
        max_batch_size=max_batch,
        max_seq_len=max_seq_len,
        max_step_tokens=prefill_chunk,
        max_logits=max_logits,
        num_candidates=top_logits,
        layout=layout,
        attention=attention,
    )
    started = time.perf_counter()
    with progress() as on_progress:
        built = build_engine(Bundle.open(bundle), options, force=force, on_progress=on_progress)
    if built.is_new:
        notice(f"Built in {time.perf_counter() - started:.1f} s.")
    else:
        notice("It was built before and is as asked for; --force builds it again.")
    _report(bundle, built.engine, is_new=built.is_new, as_json=as_json)


def _report(bundle: Path, engine: "EngineFolder", *, is_new: bool, as_json: bool) -> None:
    build = engine.manifest.build
    files = {name: record.size_bytes for name, record in engine.manifest.files.items()}
    size_bytes = sum(files.values())
    if as_json:
        body = {"path": str(engine.folder), "is_new": is_new, "size_bytes": size_bytes}
        emit_json(body | {"files": files, "build": build.to_dict()})
        return
    targets = ", ".join(build.targets)
    say(f"{engine.folder}  {format_bytes(size_bytes)}, for compute capability {targets}")
    path = shlex.quote(str(bundle))
    if cuda_device_count():
        then = f'generate {path} --backend {build.flavour} "Once upon a time"'
    else:
        then = f"pack {path} --backend {build.flavour} --output ENGINE, for a machine with a GPU"
    say(f"Next: gemma-deploy {then}")
