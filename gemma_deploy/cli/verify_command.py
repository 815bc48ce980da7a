"""`gemma-deploy verify`: is a bundle whole, and does it agree with its checkpoint."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.cli.console import Progress, emit_json, progress, say
from gemma_deploy.cli.options import threads_option
from gemma_deploy.text_files import read_text

if TYPE_CHECKING:
    from gemma_deploy.cli.checks import Check
    from gemma_deploy.engine_build import Attention
    from gemma_deploy.graph_spec import Lowering


@click.command(
    "verify",
    short_help="Check a bundle: files, graphs, and agreement with its checkpoint.",
    epilog="""\b
Examples:
  gemma-deploy verify gemma-2b
  gemma-deploy verify gemma-2b --checkpoint ~/models/gemma-2b
  gemma-deploy verify gemma-2b --checkpoint ~/models/gemma-2b --tolerance 0.1 --json
  gemma-deploy verify gemma-2b --checkpoint ~/models/gemma-2b --graph tensorrt

Exits with 1 if a check fails. The tolerance bounds the difference of any logit. Unless given, it is
what rounding explains, as a share of the checkpoint's largest logit: 0.0001 for a bundle that
computes in float32 on the weights as they were (only the order of sums differs), 0.01 for float16
(each activation is rounded to 11 bits), 0.05 for weights that were narrowed to bfloat16 (8 bits) and
for TensorRT graphs in it.

A quantized bundle is compared with two things. Its graphs must agree with its own weights, codes times
scales in float32, to the same tolerances: ONNX Runtime's graphs then run without rounding activations to
8 bits, as they otherwise do (about 0.01 of the largest logit). And the distance of the bundle as it runs
from its checkpoint is measured: a mean KL past 0.1 nats is a warning that says what would be closer, and
--max-kl bounds it. That takes minutes for a model of 270M parameters: ONNX Runtime without its fast 8-bit
path is slow. Fewer --tokens take less.

The checkpoint's logits are those of transformers' AutoModelForCausalLM, which reads the checkpoint by
itself: what the export read wrong shows as a difference. Without transformers that is not shown, which
the check "reference" says; that no tensor of the text model was left out is checked either way.

That a float16 bundle passes on a CPU does not show that nothing overflows on CUDA: ONNX Runtime's
CPU multiplies matrices in float32.
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Also compare logits with this checkpoint, run in float32 by transformers, or where that (5 or "
    "newer) is not installed by gemma-deploy's own torch model. Needs memory for the model in float32.",
)
@click.option(
    "--graph",
    "lowering",
    type=click.Choice(["onnxruntime", "tensorrt", "portable"]),
    default="onnxruntime",
    show_default=True,
    help="Which of the bundle's graphs to run. What the tensorrt graphs mean is computed by ONNX "
    "Runtime, on the CPU in float32: no TensorRT kernel runs, and none is needed.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "native", "plugin"]),
    help="For --graph tensorrt: attention as an engine would be built with it. [default: auto]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="Largest difference of a logit that passes. A different likeliest token counts only where "
    "float32's best two are further apart than X. [default: by dtype, see below]",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0, min_open=True),
    metavar="NATS",
    help="Largest mean KL divergence of a quantized bundle from its checkpoint that passes. "
    "[default: any; it is reported, and past 0.1 warned of]",
)
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="UTF-8 text to read in the comparison. [default: a built-in one]",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=16),
    default=256,
    show_default=True,
    metavar="N",
    help="Tokens of the text to read; the built-in one is repeated until it has them. More than a "
    "model's sliding window shows that the window is right. Logits are compared at every position, "
    "or evenly spaced ones where they would take over 200 MB.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="Where the graphs run: cpu, cuda, cuda:N (N from 0), or auto: CUDA where it works.",
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all figures.")
def command(
    *,
    bundle: Path,
    checkpoint: Path | None,
    lowering: "Lowering",
    attention: "Attention | None",
    tolerance: float | None,
    max_kl: float | None,
    text_file: Path | None,
    tokens: int,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Check the bundle, or the engine, in the folder BUNDLE.

    The manifest and the files it names, the SHA-256 of each, where the graphs' weights lie, the
    tokenizer, and that ONNX Runtime loads the graphs of both phases. With --checkpoint both graphs also read a
    text (whole, in chunks, token by token, and as a batch of different lengths) and their logits
    are compared with the checkpoint's. Of an engine the manifest, the files' SHA-256 and the tokenizer
    are checked.
    """
    if checkpoint is None and any(x is not None for x in (tolerance, max_kl, text_file)):
        raise click.UsageError(
            "--tolerance, --max-kl and --text compare logits: give --checkpoint too"
        )
    if tolerance is not None and not math.isfinite(tolerance):
        raise click.UsageError(f"--tolerance is {tolerance}; expected a finite number above 0")
    if attention is not None and lowering != "tensorrt":
        raise click.UsageError("--attention is for TensorRT graphs: give --graph tensorrt too")
    from gemma_deploy.cli.checks import engine_checks
    from gemma_deploy.engine import ENGINE_FILE

    checks: Callable[[Progress], Iterator[Check]]
    if (bundle / ENGINE_FILE).is_file():
        if checkpoint is not None or lowering != "onnxruntime":
            raise click.UsageError(
                f"{bundle} is an engine and holds no graphs: compare the bundle it was built from"
            )
        checks = partial(engine_checks, bundle)
    else:
        from gemma_deploy.cli.verification import Verification
        from gemma_deploy.cli.verification_graphs import GraphChoice

        checks = Verification(
            bundle=bundle,
            checkpoint=checkpoint,
            graphs=GraphChoice(
                lowering=lowering, attention=attention or "auto", device=device, threads=threads
            ),
            tolerance=tolerance,
            max_kl=max_kl,
            text=None if text_file is None else read_text(text_file),
            tokens=tokens,
        ).checks
    with progress() as on_progress:
        found = list(checks(on_progress))
    _report(found, as_json=as_json)


def _report(checks: "Sequence[Check]", *, as_json: bool) -> None:
    is_ok = all(check.is_ok for check in checks)
    if as_json:
        emit_json({"ok": is_ok, "checks": [check.to_dict() for check in checks]}, indent=1)
    else:
        for check in checks:
            say(f"  {check.name}: {check.detail}", mark=_mark(check))
            if check.warning is not None:
                say(f"      {check.warning}")
    if not is_ok:
        raise click.exceptions.Exit(1)


def _mark(check: "Check") -> str:
    if not check.is_ok:
        return click.style("FAIL", fg="red")
    return (
        click.style("ok  ", fg="green")
        if check.warning is None
        else click.style("warn", fg="yellow")
    )
