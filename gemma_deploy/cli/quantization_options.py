"""The options of `gemma-deploy export` that quantize weights."""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

if TYPE_CHECKING:
    from gemma_deploy.exporters.quantization.options import (
        EmbeddingBits,
        Method,
        QuantizationOptions,
    )
    from gemma_deploy.quantization.formats import Scheme

Function = TypeVar("Function", bound=Callable[..., Any])

_SCHEME_HELP: Final = {
    "int4": "Store matrices in 4 bits: a quarter of float16.",
    "int8": "Store matrices in 8 bits: half of float16, and next to no loss.",
    "nf4": "Store matrices in 4-bit NormalFloat, as bitsandbytes does. For ONNX Runtime only.",
    "fp8": "Store matrices in 8-bit floats (E4M3). For TensorRT on compute capability 8.9 or above; "
    "ONNX Runtime widens them when it loads.",
}
_BLOCK_SIZES: Final = ("32", "64", "128", "256", "channel")
_OPTION_NAMES: Final = (
    *_SCHEME_HELP,
    "block_size",
    "embedding_bits",
    "keep_fp16",
    "method",
    "calibration_tokens",
    "auto",
    "max_size",
    "max_kl",
)
_UNIT_BYTES: Final = {
    "": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """Return the bytes that a text means: `3GB`, `1.5 GiB`, `250000000`."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMG]i?B)?", value, re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size; expected e.g. 900MB, 1.5GB or 2GiB")
    return int(float(found[1]) * _UNIT_BYTES[(found[2] or "").upper()])


def quantization_options(function: Function) -> Function:
    """Add what decides which weights are quantized, to what, and how."""
    decorators = (
        *(
            click.option(f"--{name}", is_flag=True, help=text)
            for name, text in _SCHEME_HELP.items()
        ),
        click.option(
            "--block-size",
            type=click.Choice(_BLOCK_SIZES),
            help="Weights of a row that share a scale; channel: all of them (int8, fp8). Smaller is "
            "closer to the original and larger on disk: 16 bits per block. [default: 32 for int4 and "
            "int8, 64 for nf4, channel for fp8]",
        ),
        click.option(
            "--embedding-bits",
            type=click.Choice(["4", "8", "16"]),
            help="Bits of the embedding table, and of the head; 16 keeps it in 16 bits. [default: 4 "
            "with --int4, else 8]",
        ),
        click.option(
            "--keep-fp16",
            multiple=True,
            metavar="LAYERS",
            help="Do not quantize these: layers (0, 3-5), matrices (down_proj, 3.down_proj) or "
            "embeddings; several with commas or repeated.",
        ),
        click.option(
            "--method",
            type=click.Choice(["rtn", "imatrix", "awq", "gptq"]),
            help="How codes are found. rtn: rounding to nearest, without a text. imatrix: scales "
            "searched by how strong inputs are on a text, as llama.cpp does; about as quick. awq, gptq: "
            "by what the model does on more text; slower; gptq is the closest to the original. "
            "[default: imatrix with --int4, else rtn; gptq with --auto]",
        ),
        click.option(
            "--calibration-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help="Most tokens of the calibration text that imatrix, awq and gptq read. [default: 4096 "
            "for imatrix and awq, 8192 for gptq]",
        ),
        click.option(
            "--auto",
            is_flag=True,
            help="Choose bits and block size for each matrix by how much the model minds, under "
            "--max-size or --max-kl.",
        ),
        click.option(
            "--max-size",
            callback=_size,
            metavar="SIZE",
            help="Largest weights file, e.g. 1.5GB; with --auto.",
        ),
        click.option(
            "--max-kl",
            type=click.FloatRange(min=0, min_open=True),
            metavar="NATS",
            help="Largest mean KL divergence from the original on the calibration text; with --auto.",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def parse_quantization(given: Mapping[str, Any]) -> "QuantizationOptions | None":
    """Return what the options ask for; None where nothing is to be quantized.

    Args:
        given: The values of `quantization_options`, by name.

    Raises:
        click.UsageError: Two schemes, or options that only quantization has without a scheme.
        RequestError: Options that contradict each other.
    """
    schemes = [name for name in _SCHEME_HELP if given[name]]
    if len(schemes) > 1:
        raise click.UsageError(f"--{' and --'.join(schemes)} contradict each other: give one")
    if not schemes and not given["auto"]:
        others = [name for name in _OPTION_NAMES if given[name] not in (None, False, ())]
        if others:
            raise click.UsageError(
                f"--{others[0].replace('_', '-')} is for quantized weights: give --int4, --int8, "
                "--nf4, --fp8 or --auto too"
            )
        return None
    from gemma_deploy.exporters.quantization.options import QuantizationOptions

    block_size, bits = given["block_size"], given["embedding_bits"]
    wanted: dict[str, Any] = {
        "scheme": cast("Scheme", schemes[0]) if schemes else None,
        "block_size": int(block_size) if block_size not in (None, "channel") else None,
        "is_per_channel": block_size == "channel",
        "embedding_bits": cast("EmbeddingBits", int(bits)) if bits else None,
        "keep": tuple(part.strip() for text in given["keep_fp16"] for part in text.split(",")),
        "method": cast("Method | None", given["method"]),
        "calibration_tokens": given["calibration_tokens"],
        "is_automatic": given["auto"],
        "max_size_bytes": given["max_size"],
        "max_kl_nats": given["max_kl"],
    }
    return QuantizationOptions(**{name: x for name, x in wanted.items() if x is not None})
