"""What to do about weights that quantization moved far from the original: `distance_warning`."""

import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.quantization.choices import CHOICES_FILE
from gemma_deploy.quantization.formats import DEFAULT_BLOCK_SIZES, WeightFormat

if TYPE_CHECKING:
    from gemma_deploy.manifest import Manifest

EXPORT_LIMIT_NATS: Final = 0.05
"""Mean KL of the weights alone from which an export says what would be closer."""
COMPARISON_LIMIT_NATS: Final = 0.1
"""Mean KL of a bundle as it runs from which a comparison does: rounding of activations is in it."""

# Mean KL of Gemma 3 270M in nats (docs/quantization.md), of which only ratios are told, by scheme of
# the layers and method, in default blocks.
_NATS: Final = MappingProxyType(
    {
        ("int4", "rtn"): 0.463,
        ("int4", "imatrix"): 0.173,
        ("int4", "gptq"): 0.111,
        ("nf4", "rtn"): 0.24,
        ("int8", "rtn"): 0.004,
    }
)
_INT4_RTN_WITH_8_BIT_TABLE_NATS: Final = 0.373
# A checkpoint that another tool quantized is none of these, and takes no options.
_METHODS: Final = ("rtn", "imatrix", "awq", "gptq")
_SHARES: Final = MappingProxyType(
    {
        1 / 100: "a hundredth",
        1 / 50: "a fiftieth",
        1 / 20: "a twentieth",
        1 / 10: "a tenth",
        1 / 5: "a fifth",
        1 / 4: "a quarter",
        1 / 3: "a third",
        2 / 5: "two fifths",
        1 / 2: "half",
        3 / 5: "three fifths",
        2 / 3: "two thirds",
        3 / 4: "three quarters",
        4 / 5: "four fifths",
    }
)


def distance_warning(
    manifest: "Manifest", mean_kl_nats: float, *, is_weights_only: bool
) -> str | None:
    """Say that a quantized bundle is far from its original, and which options would be closer.

    Args:
        manifest: The bundle's.
        mean_kl_nats: What was measured, in nats.
        is_weights_only: Whether it is an export's figure; else it is that of the bundle as it runs.

    Returns:
        One sentence or two, without a full stop; None up to the limit of such figures.
    """
    if mean_kl_nats <= (EXPORT_LIMIT_NATS if is_weights_only else COMPARISON_LIMIT_NATS):
        return None
    said = f"a mean KL of {mean_kl_nats:.2g} nats is far from the original: expect worse text"
    options = list(closer_options(manifest))
    if manifest.precision.cache == "int8" and not is_weights_only:
        options.append("a cache that is not int8")
    if not options:
        return said
    figures = "; shares are Gemma 3 270M's" if any("leaves" in x for x in options) else ""
    *others, last = options
    listed = f"{', '.join(others)} or {last}" if others else last
    return f"{said}. Closer are exports with {listed}{figures} (docs/quantization.md)"


def closer_options(manifest: "Manifest") -> Iterator[str]:
    """Yield the options of an export that would be closer, those that keep the size first.

    Each with the share of the divergence that it leaves, where that was measured.
    """
    tables, layers = _formats(manifest)
    schemes = {x.scheme for x in layers}
    method = manifest.method
    if method in _METHODS:
        now = _nats(layers, method) if tables <= layers or "nf4" in schemes else None
        if "int4" in schemes and method != "gptq":
            yield _option("--method gptq", _NATS["int4", "gptq"], now)
        if "nf4" in schemes:
            yield _option("--int4 --method gptq", _NATS["int4", "gptq"], now)
        # --auto, whose choices are kept, takes no block size.
        are_given = CHOICES_FILE not in manifest.files
        if are_given and any(x.scheme in ("int4", "int8") and x.block_size != 32 for x in layers):
            yield "--block-size 32"
        if any(x.bits == 4 for x in tables):
            is_known = now == _NATS["int4", "rtn"]
            yield _option(
                "--embedding-bits 8", _INT4_RTN_WITH_8_BIT_TABLE_NATS, now if is_known else None
            )
        if schemes - {"int8"}:
            yield _option("--int8", _NATS["int8", "rtn"], now)
            yield f"--auto --max-kl {EXPORT_LIMIT_NATS:g}"
        else:
            yield "--bf16 without quantization"


def _formats(manifest: "Manifest") -> tuple[set[WeightFormat], set[WeightFormat]]:
    """Return the formats of the tables, and those of the layers' matrices."""
    of_tables, of_layers = set[WeightFormat](), set[WeightFormat]()
    for name, weight_format in manifest.formats.items():
        (of_tables if name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) else of_layers).add(weight_format)
    return of_tables, of_layers


def _nats(layers: set[WeightFormat], method: str | None) -> float | None:
    """Return what such layers were measured to diverge by; None if they were not."""
    if len(layers) != 1:
        return None
    (weight_format,) = layers
    if weight_format.block_size != DEFAULT_BLOCK_SIZES.get(weight_format.scheme):
        return None
    return _NATS.get((weight_format.scheme, method or ""))


def _option(option: str, nats: float, now: float | None) -> str:
    """Return an option, and what part of today's divergence it leaves, if that is known."""
    if now is None:
        return option
    nearest = min(_SHARES, key=lambda x: abs(math.log(x * now / nats)))
    return f"{option} (leaves about {_SHARES[nearest]} of it)"
