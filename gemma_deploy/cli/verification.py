"""The checks of `gemma-deploy verify`, one after the other until one fails."""

import math
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gemma_deploy.bundle import Bundle
from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_files import require_checkpoint
from gemma_deploy.cli.checks import Check, Distance, check_hashes, passed, require_same_model
from gemma_deploy.cli.console import Progress
from gemma_deploy.cli.graph_walks import BATCH_WALKS, TEXT_WALKS, Walk, whole
from gemma_deploy.cli.lazy_group import explain_os_error
from gemma_deploy.cli.verification_graphs import GraphChoice, check_weights
from gemma_deploy.cli.verification_oracle import NoOracleError, oracle_logits
from gemma_deploy.cli.verification_reference import (
    bundle_logits,
    checkpoint_logits,
    require_finite,
)
from gemma_deploy.cli.verification_rows import describe_rows, token_rows
from gemma_deploy.errors import GemmaDeployError, RequestError
from gemma_deploy.graph_spec import DType, Precision
from gemma_deploy.manifest import FORMAT_VERSION
from gemma_deploy.parity import FloatArray, ParityReport, TokenRow, compare, default_tolerance
from gemma_deploy.quantization.advice import distance_warning
from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.vocabulary_fit import tokens_without_embedding

if TYPE_CHECKING:
    from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession

_MOST_NAMED_TOKENS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What to verify.

    Attributes:
        bundle: The bundle's folder.
        checkpoint: The checkpoint it should agree with; None for no comparison.
        graphs: Which graphs are run, and where.
        tolerance: Largest difference of a logit that passes; None for what rounding explains.
        max_kl: Largest mean KL of a quantized bundle from the checkpoint that passes, in nats; None
            for any.
        text: What is read; None for a text of our own.
        tokens: Most tokens of the text that are read.
    """

    bundle: Path
    checkpoint: Path | None
    graphs: GraphChoice
    tolerance: float | None
    max_kl: float | None
    text: str | None
    tokens: int

    def checks(self, on_progress: Progress) -> Iterator[Check]:
        """Run the checks, yield each as it ends, and stop after the first that fails.

        Raises:
            RequestError: A path that is not there, or the text, the device or the like cannot be;
                nothing is wrong with the bundle then.
        """
        if not self.bundle.exists():
            raise RequestError(f"{self.bundle} does not exist; expected the folder of a bundle")
        if self.checkpoint is not None:
            require_checkpoint(self.checkpoint)
        stage = _Stage("manifest")
        try:
            yield from self._run(stage, on_progress)
        except RequestError:
            raise
        except GemmaDeployError as err:
            yield Check(name=stage.name, is_ok=False, detail=str(err))
        except OSError as err:
            if err.filename is None:  # not of the bundle or the checkpoint: stderr went away
                raise
            yield Check(name=stage.name, is_ok=False, detail=explain_os_error(err))

    def _run(self, stage: "_Stage", on_progress: Progress) -> Iterator[Check]:
        bundle = Bundle.open(self.bundle)
        yield passed(stage.name, _describe(bundle))
        stage.name = "hashes"
        yield passed(stage.name, check_hashes(bundle, on_progress, "export the bundle again"))
        stage.name = "weights"
        yield passed(stage.name, check_weights(bundle))
        stage.name = "tokenizer"
        yield passed(stage.name, _check_tokenizer(bundle))
        comparison = None
        if self.checkpoint is not None:
            stage.name = "checkpoint"
            source = Checkpoint.open(self.checkpoint)
            comparison = yield from self._prepare(bundle, source, stage, on_progress)
        stage.name = "graphs"
        on_progress("loading the graphs", 0, 1)
        with self.graphs.load(bundle, is_exact=comparison is not None) as session:
            yield passed(stage.name, self.graphs.describe(bundle.config, session))
            stage.name = "parity"
            if comparison is not None:
                yield from self._compare(bundle, session, comparison, on_progress)
        if comparison is not None and self._is_approximate(bundle):
            stage.name = "distance"
            on_progress("measuring the distance from the checkpoint", 0, 1)
            with self.graphs.load(bundle) as session:
                yield self._distance(bundle, session, comparison)

    def _prepare(
        self, bundle: Bundle, source: Checkpoint, stage: "_Stage", on_progress: Progress
    ) -> Generator[Check, None, "_Comparison"]:
        """Check what a bundle is compared with, and return what its logits should be.

        Raises:
            CheckpointError: It is another model's, or its own logits are not finite.
            BundleError: The bundle's weights cannot be read, or their logits are not finite.
        """
        rows = token_rows(bundle, self.text, self.tokens)
        require_same_model(bundle.folder, bundle.config, source)
        yield passed(stage.name, describe_rows(bundle.config, rows, self.tokens))
        yield passed("tensors", _describe_tensors(source))
        stage.name = "reference"
        said, original, is_oracle = _original(source, rows, on_progress)
        yield passed(stage.name, said)
        reference = original
        precision = bundle.manifest.precision_of(self.graphs.lowering)
        is_approximate = self._is_approximate(bundle)
        if is_approximate:
            if is_oracle:
                stage.name = "reading"
                yield _check_reading(source, rows, original, on_progress)
            stage.name = "weights"
            reference = bundle_logits(bundle, precision, rows, on_progress)
        tolerance = self.tolerance or default_tolerance(
            precision,
            None if is_approximate else source,
            reference,
            is_widened=self.graphs.is_widened,
        )
        return _Comparison(rows=rows, original=original, reference=reference, tolerance=tolerance)

    def _is_approximate(self, bundle: Bundle) -> bool:
        """Tell whether weights or cache are quantized, so that logits are not the checkpoint's."""
        cache = bundle.manifest.precision_of(self.graphs.lowering).cache
        return bool(bundle.manifest.formats) or cache == "int8"

    def _compare(
        self,
        bundle: Bundle,
        session: "OnnxRuntimeSession",
        comparison: "_Comparison",
        on_progress: Progress,
    ) -> Iterator[Check]:
        rows, reference = comparison.rows, comparison.reference
        activations = bundle.manifest.precision_of(self.graphs.lowering).activations
        walks: list[tuple[str, Walk, slice]] = [
            *((name, walk, slice(0, 1)) for name, walk in TEXT_WALKS.items()),
            *((name, walk, slice(1, None)) for name, walk in BATCH_WALKS.items()),
        ]
        for done, (name, walk, part) in enumerate(walks):
            on_progress("running the graphs", done, len(walks))
            report = compare(
                rows[part],
                reference[part],
                lambda rows, walk=walk: walk(session, rows),  # type: ignore[misc]  # bound at once
                tolerance=comparison.tolerance,
            )
            detail = describe_parity(report, activations)
            yield Check(
                name=f"parity, {name}", is_ok=report.is_within, detail=detail, parity=report
            )

    def _distance(
        self, bundle: Bundle, session: "OnnxRuntimeSession", comparison: "_Comparison"
    ) -> Check:
        """Measure how far a quantized bundle, as it runs, is from what it was made of."""
        report = compare(
            comparison.rows[:1],
            comparison.original[:1],
            lambda rows: whole(session, rows),
            tolerance=math.inf,
        )
        kl, warning = report.mean_kl_nats, None
        if kl is None:
            activations = bundle.manifest.precision_of(self.graphs.lowering).activations
            detail = describe_parity(report, activations)
        else:
            limit = "" if self.max_kl is None else f" (at most {self.max_kl:.2g} allowed)"
            detail = (
                f"KL {kl:.2g} nats on average{limit}, {report.max_kl_nats:.2g} at most; same greedy "
                f"token at {report.greedy_agreement:.1%} of {report.positions} positions"
            )
            warning = distance_warning(bundle.manifest, kl, is_weights_only=False)
        return Check(
            name="distance, from the checkpoint",
            is_ok=kl is not None and (self.max_kl is None or kl <= self.max_kl),
            detail=detail,
            distance=Distance.of(report),
            warning=warning,
        )


@dataclass(slots=True)
class _Stage:
    """Which check is under way: what fails is that one."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Comparison:
    """What a bundle's logits are compared with.

    Attributes:
        rows: What is read.
        original: Logits of each row by the checkpoint.
        reference: Those that the graphs should give. Of a quantized bundle, or with an int8 cache, they
            are its own weights' logits: the checkpoint's are others.
        tolerance: Largest difference of a logit from the reference that passes.
    """

    rows: Sequence[TokenRow]
    original: Sequence[FloatArray]
    reference: Sequence[FloatArray]
    tolerance: float


def describe_parity(report: ParityReport, activations: DType) -> str:
    """Return the figures of a comparison as one line.

    Args:
        report: The figures.
        activations: What the graphs compute in: the likeliest cause of logits that are no numbers.
    """
    if report.max_abs_difference is None:
        remedy = (
            "numbers beyond float16's 65,504 overflowed; export with --bf16 or --fp32"
            if activations == "float16"
            else "the weights or a graph are damaged; export again"
        )
        return (
            f"logits are NaN or infinite at {report.non_finite_positions} of {report.positions} "
            f"positions: {remedy}"
        )
    clear = f", {report.disagreements} of the rest no near tie" if report.disagreements else ""
    return (
        f"logits differ by {report.max_abs_difference:.2g} at most (tolerance "
        f"{report.tolerance:.2g}), {report.mean_abs_difference:.2g} on average; KL at most "
        f"{report.max_kl_nats:.2g} nats; same greedy token at {report.greedy_agreement:.1%} of "
        f"{report.positions} positions{clear}"
    )


def _original(
    checkpoint: Checkpoint, rows: Sequence[TokenRow], on_progress: Progress
) -> tuple[str, list[FloatArray], bool]:
    """Return whose logits of the checkpoint these are, in words, the logits, and if an oracle's.

    Raises:
        CheckpointError: It cannot be read, or its own logits are not finite.
    """
    try:
        name, found = oracle_logits(checkpoint, rows, on_progress)
    except NoOracleError as why:
        said = (
            f"gemma-deploy's own model, eager in float32, for {why}: it reads the checkpoint as the "
            "export did, so a fault in that reading does not show here"
        )
        return said, checkpoint_logits(checkpoint.folder, rows, on_progress), False
    require_finite(found, checkpoint.folder)
    return f"{name}, which reads the checkpoint by itself, eager in float32", found, True


def _check_reading(
    checkpoint: Checkpoint,
    rows: Sequence[TokenRow],
    original: Sequence[FloatArray],
    on_progress: Progress,
) -> Check:
    """Hold our own reading of a checkpoint against the oracle's.

    A quantized bundle's logits are other ones than its checkpoint's, so what was read wrong would not
    show in them.
    """
    own = checkpoint_logits(checkpoint.folder, rows, on_progress)
    exact = Precision.of("float32")
    tolerance = default_tolerance(exact, None, original)
    report = compare(rows, original, lambda _: own, tolerance=tolerance)
    detail = describe_parity(report, exact.activations)
    return Check(name="reading, of the checkpoint", is_ok=report.is_within, detail=detail)


def _describe_tensors(checkpoint: Checkpoint) -> str:
    """Return how many tensors the checkpoint has, and which of them are left out."""
    left_out = [f"{len(names)} {kind}" for kind, names in checkpoint.unused.items()]
    said = f"{len(checkpoint.tensors)} are the text model's, which uses each"
    return f"{said}; left out: {', '.join(left_out)}" if left_out else f"{said}; no other is stored"


def _describe(bundle: Bundle) -> str:
    files = bundle.manifest.files
    size = format_bytes(sum(record.size_bytes for record in files.values()))
    said = f"format {FORMAT_VERSION}, {len(files)} files of {size}, all there"
    formats = Counter(map(str, bundle.manifest.formats.values())).most_common()
    if not formats:
        return said
    counted = ", ".join(f"{count} in {name}" for name, count in formats)
    return f"{said}; matrices quantized by {bundle.manifest.method}: {counted}"


def _check_tokenizer(bundle: Bundle) -> str:
    if not bundle.manifest.tokenizer:
        return "none: only token ids can be given"
    tokenizer = GemmaTokenizer.from_pretrained(bundle.folder)
    said = f"{tokenizer.vocab_size} tokens, {bundle.config.vocab_size} in the model"
    beyond = tokens_without_embedding(tokenizer, bundle.config.vocab_size)
    if not beyond:
        return said
    named = ", ".join(beyond[:_MOST_NAMED_TOKENS])
    more = ", ..." if len(beyond) > _MOST_NAMED_TOKENS else ""
    return f"{said}; the model has no embedding of {named}{more}, so prompts cannot hold them"
