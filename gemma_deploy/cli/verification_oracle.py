"""A checkpoint's logits by transformers, which reads the checkpoint by itself: `oracle_logits`.

The exporter and gemma-deploy's own torch model share a reader. What that reader got wrong would be
wrong on both sides of a comparison, and would not show.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.cli.console import Progress
from gemma_deploy.parity import FloatArray, TokenRow
from gemma_deploy.quoting import shortened_text

_LEAST_MAJOR_VERSION = 5


class NoOracleError(Exception):
    """transformers is not here, or cannot load the checkpoint; the text says why."""


def oracle_logits(
    checkpoint: Checkpoint, rows: Sequence[TokenRow], on_progress: Progress
) -> tuple[str, list[FloatArray]]:
    """Return the name of the oracle, and its logits of each row, float32 [positions, V].

    It is transformers' `AutoModelForCausalLM`, eager and in float32, on the CPU.

    Raises:
        NoOracleError: If there is no transformers 5, or it finds another model in the folder, or none.
    """
    name, transformers = _transformers()
    if checkpoint.nf4:
        raise NoOracleError(f"{name} computes with bitsandbytes' codes in another dtype")
    on_progress("loading the checkpoint with transformers", 0, 1)
    with _running(name):
        model, report = _loaded(transformers, checkpoint.folder)
    unread = _unread(report, checkpoint)
    if unread:
        raise NoOracleError(f"{name} {unread}")
    found: list[FloatArray] = []
    for row in rows:
        on_progress("running transformers", len(found), len(rows))
        with _running(name):
            found.append(_logits(model, row))
    return name, found


@contextlib.contextmanager
def _running(name: str) -> Iterator[None]:
    """Take what transformers raises, and nothing else, for a reason not to compare with it."""
    try:
        yield
    except Exception as err:  # whatever its config classes, its models and torch raise
        reason = str(err).strip().split("\n")[0] or type(err).__name__
        raise NoOracleError(f"{name} cannot run it ({shortened_text(reason, 200)})") from err


def _transformers() -> tuple[str, Any]:
    try:
        import transformers
    except ImportError as err:
        raise NoOracleError("transformers is not installed (pip install transformers)") from err
    name = f"transformers {transformers.__version__}"
    if int(transformers.__version__.split(".")[0]) < _LEAST_MAJOR_VERSION:
        raise NoOracleError(f"{name} is installed, {_LEAST_MAJOR_VERSION} or newer is needed")
    return name, transformers


def _loaded(transformers: Any, folder: Path) -> tuple[Any, Any]:
    """Return the model, and what was found in the folder."""
    import torch

    with _silent(transformers):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    return model.eval(), report


def _unread(report: Any, checkpoint: Checkpoint) -> str | None:
    """Return which tensors transformers misses, or leaves out although they are the text model's."""
    missing = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if missing:
        return f"does not find {missing[0]}{' and others' if len(missing) > 1 else ''} in it"
    left_out = {name for names in checkpoint.unused.values() for name in names}
    unread = sorted(set(report["unexpected_keys"]) - left_out)
    return f"leaves out {unread[0]}{' and others' if len(unread) > 1 else ''}" if unread else None


def _logits(model: Any, row: TokenRow) -> FloatArray:
    import torch

    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([row.token_ids]),
            logits_to_keep=torch.tensor(row.positions),
            use_cache=False,
        )
    logits: FloatArray = output.logits[0].float().numpy()
    return logits


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Let transformers print neither bars nor its report of what it loaded."""
    log = transformers.utils.logging
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()
