"""What an export quantizes, and how: `QuantizationOptions`, and the format of every matrix by them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.quantization.formats import DEFAULT_BLOCK_SIZES, SCHEMES, Scheme, WeightFormat

Method = Literal["rtn", "imatrix", "awq", "gptq"]
EmbeddingBits = Literal[4, 8, 16]

METHODS: Final[tuple[Method, ...]] = get_args(Method)
EMBEDDING_BITS: Final[tuple[EmbeddingBits, ...]] = get_args(EmbeddingBits)
EMBEDDINGS: Final = "embeddings"
"""How `keep` calls the embedding table, and the head where it is not tied to it."""
DEFAULT_CALIBRATION_TOKENS: Final[Mapping[Method, int]] = MappingProxyType(
    {"rtn": 0, "imatrix": 4096, "awq": 4096, "gptq": 8192}
)

# Neither ONNX Runtime nor TensorRT looks rows up in an NF4 or FP8 table.
_DEFAULT_EMBEDDING_BITS: Final = MappingProxyType({"int4": 4, "int8": 8, "nf4": 8, "fp8": 8})
# Calibration moves errors between integer codes; the others are rounded to nearest only.
_CALIBRATED_SCHEMES: Final = ("int4", "int8")
_MATRICES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationOptions:
    """How the matrices of a checkpoint are quantized.

    Attributes:
        scheme: What layers' matrices are stored in; with `is_automatic` the smallest that may be
            chosen.
        block_size: Elements of a row that share a scale; None for the scheme's default (int4 and
            int8 32, nf4 64, fp8 one scale per row).
        is_per_channel: One scale per row instead of blocks (int8 and fp8).
        embedding_bits: Of the embedding table and the head: 4 (int4), 8 (int8), or 16 (kept dense);
            None for 4 with int4, else 8.
        keep: What is not quantized: layer numbers (`3`), ranges (`0-2`, both included), matrices
            (`down_proj`, `3.down_proj`), `embeddings`.
        method: `rtn` rounds to nearest; `imatrix`, `awq` and `gptq` look at what the model does with a
            text. None for imatrix with int4, else rtn; for gptq with `is_automatic`.
        calibration_tokens: How much of the calibration text is read; None for the method's default.
        is_automatic: Whether formats are chosen per matrix by measured sensitivity, under a budget.
        max_size_bytes: That budget: size of the weights file.
        max_kl_nats: Or that one: mean KL divergence from the float32 model on calibration text.

    Raises:
        RequestError: On construction, when options contradict each other.
    """

    scheme: Scheme = "int4"
    block_size: int | None = None
    is_per_channel: bool = False
    embedding_bits: EmbeddingBits | None = None
    keep: tuple[str, ...] = ()
    method: Method | None = None
    calibration_tokens: int | None = None
    is_automatic: bool = False
    max_size_bytes: int | None = None
    max_kl_nats: float | None = None

    def __post_init__(self) -> None:
        _check_choice("scheme", self.scheme, SCHEMES)
        _check_choice("method", self.chosen_method, METHODS)
        if self.embedding_bits is not None:
            _check_choice("embedding_bits", self.embedding_bits, EMBEDDING_BITS)
        is_calibrated = self.chosen_method != "rtn" and not self.is_automatic
        if is_calibrated and self.scheme not in _CALIBRATED_SCHEMES:
            raise RequestError(
                f"--method {self.chosen_method} with {self.scheme}: calibration is there for "
                f"{' and '.join(_CALIBRATED_SCHEMES)}; use --method rtn"
            )
        # So that a block size which the scheme does not have is found at once.
        _ = self.layer_format, self.embedding_format
        if self.chosen_method != "rtn" and self.is_per_channel:
            raise RequestError(
                f"--method {self.chosen_method} with one scale per channel: calibration works on "
                "blocks; give a block size, or use --method rtn"
            )
        if self.is_per_channel and self.block_size is not None:
            raise RequestError(
                "a block size and one scale per channel were both asked for: drop one"
            )
        _check_budget(self)
        for entry in self.keep:
            _check_keep(entry)

    @property
    def layer_format(self) -> WeightFormat:
        """The format of the layers' matrices."""
        return self._format(self.scheme)

    @property
    def embedding_format(self) -> WeightFormat | None:
        """The format of the embedding table and the head; None where they are kept dense."""
        bits = self.embedding_bits or _DEFAULT_EMBEDDING_BITS[self.scheme]
        if bits == 16:
            return None
        scheme: Scheme = "int4" if bits == 4 else "int8"
        if scheme == self.scheme:
            return self._format(scheme)
        return WeightFormat(scheme, self.block_size or DEFAULT_BLOCK_SIZES[scheme])

    def _format(self, scheme: Scheme) -> WeightFormat:
        if self.is_per_channel:
            return WeightFormat(scheme)
        return WeightFormat(scheme, self.block_size or DEFAULT_BLOCK_SIZES[scheme])

    @property
    def chosen_method(self) -> Method:
        """How codes are found."""
        default: Method = "imatrix" if self.scheme == "int4" else "rtn"
        return self.method or ("gptq" if self.is_automatic else default)

    @property
    def needs_calibration(self) -> bool:
        """Whether a text has to be run through the model."""
        return self.chosen_method != "rtn" or self.is_automatic

    @property
    def keeps_results(self) -> bool:
        """Whether calibration makes codes, and keeps them on disk until the bundle is written."""
        return self.chosen_method in ("awq", "gptq")


def formats_of(config: GemmaConfig, options: QuantizationOptions) -> dict[str, WeightFormat]:
    """Return the format of every matrix that is quantized, by the checkpoint's names.

    Raises:
        RequestError: `keep` names a layer that the model does not have, or a matrix has rows that
            the blocks do not divide.
    """
    formats: dict[str, WeightFormat] = {}
    for name, shape in matrices_of(config):
        is_table = name in (EMBEDDING_WEIGHT, HEAD_WEIGHT)
        chosen = options.embedding_format if is_table else options.layer_format
        if chosen is None or is_kept(name, config, options):
            continue
        chosen.parts(name, shape)  # raises where blocks do not divide the rows
        formats[name] = chosen
    return formats


def matrices_of(config: GemmaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape [out, in] of every matrix of a checkpoint, the table first."""
    for name, shape in expected_tensors(config).items():
        if len(shape) == 2:
            yield name, shape


def is_kept(name: str, config: GemmaConfig, options: QuantizationOptions) -> bool:
    """Tell whether `keep` exempts a matrix, by the checkpoint's name.

    Raises:
        RequestError: `keep` names a layer that the model does not have.
    """
    return any(_exempts(entry, name, config) for entry in options.keep)


def _exempts(entry: str, name: str, config: GemmaConfig) -> bool:
    if entry == EMBEDDINGS:
        return name in (EMBEDDING_WEIGHT, HEAD_WEIGHT)
    layers, _, matrix = entry.rpartition(".") if "." in entry else _either(entry)
    if layers and not set(_layer_numbers(layers)) <= set(range(config.num_hidden_layers)):
        raise RequestError(
            f"layers to keep: {entry!r}, but the model has layers 0 to "
            f"{config.num_hidden_layers - 1}"
        )
    if not name.startswith("model.layers."):
        return False
    _, _, number, *_, own_matrix, _ = name.split(".")
    return (not layers or int(number) in _layer_numbers(layers)) and matrix in ("", own_matrix)


def _either(entry: str) -> tuple[str, str, str]:
    """Part an entry without a dot into (layers, "", matrix), one of which is empty."""
    return ("", "", entry) if entry in _MATRICES else (entry, "", "")


def _layer_numbers(layers: str) -> range:
    """Return the layers of `3` or `0-2`; ValueError for anything else."""
    first, dash, last = layers.partition("-")
    return range(int(first), int(last if dash else first) + 1)


def _check_keep(entry: str) -> None:
    layers, _, matrix = entry.rpartition(".") if "." in entry else _either(entry)
    try:
        is_understood = entry == EMBEDDINGS or (
            (not layers or len(_layer_numbers(layers)) > 0) and matrix in ("", *_MATRICES)
        )
    except ValueError:
        is_understood = False
    if not is_understood or ("." in entry and not matrix):
        raise RequestError(
            f"layers to keep: {entry!r} is not understood; expected a layer (3), a range (0-2), a "
            f"matrix (down_proj, 3.down_proj; one of {', '.join(_MATRICES)}), or {EMBEDDINGS}"
        )


def _check_budget(options: QuantizationOptions) -> None:
    budgets = (options.max_size_bytes, options.max_kl_nats)
    if options.is_automatic and sum(budget is not None for budget in budgets) != 1:
        raise RequestError("--auto needs one budget: give either --max-size or --max-kl")
    if options.is_automatic and (options.block_size is not None or options.is_per_channel):
        raise RequestError("--auto chooses block sizes itself: drop --block-size")
    if not options.is_automatic and any(budget is not None for budget in budgets):
        raise RequestError("--max-size and --max-kl are budgets of --auto: give it too")
    for budget in budgets:
        if budget is not None and not budget > 0:
            raise RequestError(f"a budget of {budget} was given; it must be positive")
    if options.calibration_tokens is not None and options.calibration_tokens < 1:
        raise RequestError(
            f"calibration_tokens is {options.calibration_tokens}; it must be positive"
        )
    if options.calibration_tokens is not None and options.chosen_method == "rtn":
        raise RequestError(
            "--calibration-tokens with --method rtn, which reads no text: drop it, or ask for --method "
            "imatrix, awq or gptq"
        )


def _check_choice(what: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise RequestError(f"{what} is {value!r}; expected {', '.join(map(str, choices))}")
