"""Measure what each way of quantizing costs in quality, end to end on ONNX Runtime.

samples/tiny-gemma is exported in each way, by `gemma-deploy export`, and compared with the checkpoint in
float32 on its held-out text, by `gemma-deploy evaluate`. Calibration reads documents that the model was
trained on, none of which is in that text. The reference is llama.cpp's Q4_0, round to nearest, on all
matrices. Run it in the repository's root; it takes some 10 minutes on 2 cores and needs no network. A
Markdown table goes to stdout.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_deploy.bundle import WEIGHTS_FILE
from gemma_deploy.safetensors_files import SINGLE_FILE
from samples.tiny_gemma_documents import read_documents

CHECKPOINT = Path("samples/tiny-gemma")
_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to export.

    Attributes:
        name: What the table calls it.
        options: Of `gemma-deploy export`.
        max_bits: Budget in bits a parameter, everything included, for `--auto --max-size`.
    """

    name: str
    options: tuple[str, ...]
    max_bits: float | None = None


VARIANTS = (
    Variant(name="int8", options=("--int8",)),
    Variant(name="nf4, blocks of 64", options=("--nf4",)),
    Variant(name="int4 rtn", options=("--int4",)),
    Variant(name="int4 awq", options=("--int4", "--method", "awq")),
    Variant(name="int4 gptq", options=("--int4", "--method", "gptq")),
    Variant(
        name="int4 gptq, blocks of 64", options=("--int4", "--method", "gptq", "--block-size", "64")
    ),
    Variant(
        name="int4 gptq, blocks of 128",
        options=("--int4", "--method", "gptq", "--block-size", "128"),
    ),
    Variant(
        name="int4 gptq, blocks of 256",
        options=("--int4", "--method", "gptq", "--block-size", "256"),
    ),
    Variant(name="auto gptq, 4.5 bits", options=("--auto",), max_bits=4.5),
    Variant(name="auto gptq, 5 bits", options=("--auto",), max_bits=5.0),
)


def main() -> None:
    """Measure the variants asked for and print a table."""
    parser = argparse.ArgumentParser(description="Measure what quantization costs in quality.")
    parser.add_argument(
        "--only", nargs="*", default=[], help="parts of variants' names; default all"
    )
    arguments = parser.parse_args()
    chosen = [x for x in VARIANTS if not arguments.only or any(y in x.name for y in arguments.only)]
    with tempfile.TemporaryDirectory() as scratch:
        for line in measured(chosen, Path(scratch)):
            print(line, flush=True)


def measured(variants: Sequence[Variant], scratch: Path) -> Iterator[str]:
    """Yield the table's lines."""
    text = scratch / "calibration.txt"
    text.write_text(training_text(), encoding="utf-8")
    shapes = {name: weight.shape for name, weight in load_file(CHECKPOINT / SINGLE_FILE).items()}
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    yield "| export | bits | KL mean, nats | of Q4_0's | KL p99 | perplexity | top-1 | export, s |"
    yield "|---|---|---|---|---|---|---|---|"
    write_q4_0(scratch / "q4_0")
    reference = evaluate(scratch / "q4_0")
    matrices = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    q4_0_bits = (4.5 * matrices + 32 * (num_parameters - matrices)) / num_parameters
    yield row("llama.cpp Q4_0 (torch)", q4_0_bits, reference, reference, None)
    for variant in variants:
        budget = []
        if variant.max_bits is not None:
            budget = ["--max-size", str(int(variant.max_bits * num_parameters / 8))]
        bundle = scratch / "bundle"
        start = time.perf_counter()
        calibrated = ["--calibration-text", str(text)]
        run("export", CHECKPOINT, "-o", bundle, "--force", *variant.options, *budget, *calibrated)
        seconds = time.perf_counter() - start
        weights = load_file(bundle / WEIGHTS_FILE)
        bits = 8 * sum(x.nbytes for x in weights.values()) / num_parameters
        yield row(variant.name, bits, evaluate(bundle), reference, seconds)
        shutil.rmtree(bundle)


def training_text() -> str:
    """Return documents that the model was trained on, in random order."""
    documents = [document.text for document in read_documents() if not document.is_held_out]
    random.Random(0).shuffle(documents)  # noqa: S311  # an order, no secret
    return "\n\n\n".join(documents)[:400_000]


def write_q4_0(folder: Path) -> None:
    """Write a checkpoint whose matrices have the values that Q4_0 gives them, in float32."""
    shutil.copytree(CHECKPOINT, folder)
    weights = {name: weight.float() for name, weight in load_file(CHECKPOINT / SINGLE_FILE).items()}
    rounded = {
        name: q4_0(weight) if weight.dim() == 2 else weight for name, weight in weights.items()
    }
    save_file(rounded, folder / SINGLE_FILE, metadata={"format": "pt"})


def q4_0(weight: Tensor) -> Tensor:
    """Round a matrix as quantize_row_q4_0_ref of llama.cpp's ggml-quants.c does, and back."""
    blocks = weight.reshape(-1, _BLOCK)
    extremes = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = extremes / -8
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = (blocks * inverse + 8.5).to(torch.int8).clamp(max=15) - 8
    return (codes * scales.half().float()).reshape(weight.shape)


def evaluate(folder: Path) -> dict[str, Any]:
    """Return the figures of a bundle or checkpoint."""
    held_out = CHECKPOINT / "held_out.txt"
    output = run("evaluate", folder, "--text", held_out, "--reference", CHECKPOINT, "--json")
    figures: dict[str, Any] = json.loads(output)
    return figures


def run(*arguments: object) -> str:
    """Run a command of gemma-deploy; return what it prints."""
    command = [sys.executable, "-m", "gemma_deploy", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603  # our own command


def row(
    name: str, bits: float, found: dict[str, Any], reference: dict[str, Any], seconds: float | None
) -> str:
    """Return a line of the table."""
    share = found["kl_mean_nats"] / reference["kl_mean_nats"]
    cells = (
        name,
        f"{bits:.3f}",
        f"{found['kl_mean_nats']:.5f}",
        f"{share:.3f}",
        f"{found['kl_p99_nats']:.4f}",
        f"{found['perplexity']:.3f}",
        f"{found['top1_agreement']:.4f}",
        "" if seconds is None else f"{seconds:.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
