"""A checkpoint's logits by transformers, which reads the checkpoint by itself: `oracle_logits`.

The exporter and gemma-deploy's own torch model share a reader. What that reader got wrong would be
wrong on both sides of a comparison, and would not show.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma_deploy.cli.console import Progress
from gemma_deploy.parity import FloatArray, TokenRow

_LEAST_MAJOR_VERSION = 5


class NoOracleError(Exception):
    """transformers is not here, or cannot load the checkpoint; the text says why."""


def oracle_logits(
    checkpoint: Path, rows: Sequence[TokenRow], on_progress: Progress
) -> tuple[str, list[FloatArray]]:
    """Return the name of the oracle, and its logits of each row, float32 [positions, V].

    It is transformers' `AutoModelForCausalLM`, eager and in float32, on the CPU.

    Raises:
        NoOracleError: If there is no transformers 5, or it finds no such model in the folder.
    """
    import torch

    on_progress("loading the checkpoint with transformers", 0, 1)
    name, model = _loaded(checkpoint)
    found: list[FloatArray] = []
    with torch.inference_mode():
        for row in rows:
            on_progress("running transformers", len(found), len(rows))
            output = model(
                input_ids=torch.tensor([row.token_ids]),
                logits_to_keep=torch.tensor(row.positions),
                use_cache=False,
            )
            found.append(output.logits[0].float().numpy())
    return name, found


def _loaded(checkpoint: Path) -> tuple[str, Any]:
    try:
        import transformers
    except ImportError as err:
        raise NoOracleError("transformers is not installed") from err
    name = f"transformers {transformers.__version__}"
    if int(transformers.__version__.split(".")[0]) < _LEAST_MAJOR_VERSION:
        raise NoOracleError(f"{name} is installed, {_LEAST_MAJOR_VERSION} or newer is needed")
    import torch

    try:
        with _silent(transformers):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
            )
    # What it raises for files that it does not know, and for packages that it lacks.
    except (
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as err:
        reason = str(err).strip().split("\n")[0]
        raise NoOracleError(f"{name} cannot load it ({reason or type(err).__name__})") from err
    model, report = loaded
    missing = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if missing:
        raise NoOracleError(
            f"{name} does not find {missing[0]}{' and others' if len(missing) > 1 else ''} in it"
        )
    return name, model.eval()


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
