"""Measure what each way of quantizing costs in quality, end to end on ONNX Runtime.

samples/tiny-gemma, or the checkpoint given, is exported in each way, by `gemma-deploy export`, and compared
with itself in float32 on the sample's held-out text, by `gemma-deploy evaluate`. The sample's calibration
reads documents that it was trained on, none of which is in that text; other models read the built-in
text. The reference is llama.cpp's Q4_0, round to nearest, on all matrices. Run it in the repository's root;
for the sample it takes some 10 minutes on 2 cores and needs no network. A Markdown table goes to stdout.
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
from gemma_deploy.checkpoint import Checkpoint
from samples.tiny_gemma_documents import read_documents

SAMPLE = Path("samples/tiny-gemma")
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
    Variant(name="int4 rtn", options=("--int4", "--method", "rtn")),
    Variant(name="int4 imatrix", options=("--int4", "--method", "imatrix")),
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


OF_A_CHECKPOINT = ("int4 rtn", "int4 imatrix", "int4 awq", "int4 gptq")
"""What is measured of a checkpoint of one's own, unless it is said."""


def main() -> None:
    """Measure the variants asked for and print a table."""
    parser = argparse.ArgumentParser(description="Measure what quantization costs in quality.")
    parser.add_argument("--checkpoint", type=Path, default=SAMPLE, help="default: the sample")
    parser.add_argument("--max-tokens", type=int, help="of the text to evaluate on; default: all")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="parts of variants' names; default: all, and of a checkpoint of one's own int4's methods",
    )
    arguments = parser.parse_args()
    chosen = [x for x in VARIANTS if any(part in x.name for part in arguments.only)]
    if not arguments.only:
        is_sample = arguments.checkpoint == SAMPLE
        chosen = [x for x in VARIANTS if is_sample or x.name in OF_A_CHECKPOINT]
    with tempfile.TemporaryDirectory() as scratch:
        measure = Measurement(
            checkpoint=arguments.checkpoint,
            max_tokens=arguments.max_tokens,
            scratch=Path(scratch),
        )
        for line in measure.table(chosen):
            print(line, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What is exported and compared.

    Attributes:
        checkpoint: The model's folder.
        max_tokens: Of the held-out text; None for all of it.
        scratch: Where bundles go.
    """

    checkpoint: Path
    max_tokens: int | None
    scratch: Path

    def table(self, variants: Sequence[Variant]) -> Iterator[str]:
        """Yield the table's lines."""
        calibrated: list[object] = []
        if self.checkpoint == SAMPLE:
            text = self.scratch / "calibration.txt"
            text.write_text(training_text(), encoding="utf-8")
            calibrated = ["--calibration-text", text]
        shapes = [info.shape for info in Checkpoint.open(self.checkpoint).tensors.values()]
        num_parameters = sum(map(math.prod, shapes))
        yield "| export | bits | KL mean, nats | of Q4_0's | KL p99 | perplexity | top-1 | export, s |"
        yield "|---|---|---|---|---|---|---|---|"
        write_q4_0(self.checkpoint, self.scratch / "q4_0")
        reference = self.evaluate(self.scratch / "q4_0")
        matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        q4_0_bits = (4.5 * matrices + 32 * (num_parameters - matrices)) / num_parameters
        yield row("llama.cpp Q4_0 (torch)", q4_0_bits, reference, reference, None)
        for variant in variants:
            budget = []
            if variant.max_bits is not None:
                budget = ["--max-size", str(int(variant.max_bits * num_parameters / 8))]
            bundle = self.scratch / "bundle"
            options = (*variant.options, *budget, *calibrated)
            start = time.perf_counter()
            run("export", self.checkpoint, "-o", bundle, "--force", *options)
            seconds = time.perf_counter() - start
            weights = load_file(bundle / WEIGHTS_FILE)
            bits = 8 * sum(x.nbytes for x in weights.values()) / num_parameters
            del weights
            yield row(variant.name, bits, self.evaluate(bundle), reference, seconds)
            shutil.rmtree(bundle)

    def evaluate(self, folder: Path) -> dict[str, Any]:
        """Return the figures of a bundle or checkpoint."""
        text = ["--text", SAMPLE / "held_out.txt"]
        if self.max_tokens is not None:
            text += ["--max-tokens", str(self.max_tokens)]
        output = run("evaluate", folder, *text, "--reference", self.checkpoint, "--json")
        figures: dict[str, Any] = json.loads(output)
        return figures


def training_text() -> str:
    """Return documents that the model was trained on, in random order."""
    documents = [document.text for document in read_documents() if not document.is_held_out]
    random.Random(0).shuffle(documents)  # noqa: S311  # an order, no secret
    return "\n\n\n".join(documents)[:400_000]


def write_q4_0(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint whose matrices have the values that Q4_0 gives them, in float32."""
    shutil.copytree(checkpoint, folder)
    for path in folder.glob("*.safetensors"):
        weights = {name: weight.float() for name, weight in load_file(path).items()}
        rounded = {
            name: q4_0(weight) if weight.dim() == 2 else weight for name, weight in weights.items()
        }
        save_file(rounded, path, metadata={"format": "pt"})


def q4_0(weight: Tensor) -> Tensor:
    """Round a matrix as quantize_row_q4_0_ref of llama.cpp's ggml-quants.c does, and back."""
    blocks = weight.reshape(-1, _BLOCK)
    extremes = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = extremes / -8
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = (blocks * inverse + 8.5).to(torch.int8).clamp(max=15) - 8
    return (codes * scales.half().float()).reshape(weight.shape)


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
