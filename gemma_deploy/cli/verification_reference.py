"""What the logits of `verify` should be: eager torch in float32, of a checkpoint or of a bundle."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_deploy.bundle import Bundle
from gemma_deploy.cli.console import Progress
from gemma_deploy.errors import BundleError, CheckpointError
from gemma_deploy.graph_spec import Precision
from gemma_deploy.parity import FloatArray, TokenRow

if TYPE_CHECKING:
    from gemma_deploy.model import GemmaForCausalLM
    from gemma_deploy.model.kv_cache import KVCache


def checkpoint_logits(
    checkpoint: Path, rows: Sequence[TokenRow], on_progress: Progress
) -> list[FloatArray]:
    """Return the logits of each row by a checkpoint's model, which is gone afterwards.

    Raises:
        CheckpointError: It cannot be read, or its own logits are not finite.
    """
    import torch

    from gemma_deploy.model import GemmaForCausalLM

    def load() -> GemmaForCausalLM:
        return GemmaForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )

    found = _logits(load, rows, on_progress, "the checkpoint")
    require_finite(found, checkpoint)
    return found


def require_finite(logits: Sequence[FloatArray], checkpoint: Path) -> None:
    """Refuse a checkpoint whose own logits are no numbers.

    Raises:
        CheckpointError: Any is NaN or infinite.
    """
    if not _are_finite(logits):
        raise CheckpointError(
            f"{checkpoint} itself gives logits that are NaN or infinite in float32, so "
            "nothing can be compared with it: its weights are damaged; download it again"
        )


def bundle_logits(
    bundle: Bundle, precision: Precision, rows: Sequence[TokenRow], on_progress: Progress
) -> list[FloatArray]:
    """Return the logits of each row by the model that a bundle's weights stand for.

    Args:
        bundle: The bundle.
        precision: Of the graphs that are judged: with an int8 cache, keys and values are rounded.
        rows: What is read.
        on_progress: Called as the work goes on.

    Raises:
        BundleError: They cannot be read, or the logits are not finite.
    """
    from gemma_deploy.model.bundle_weights import load_bundle_model, load_cache_scales
    from gemma_deploy.model.kv_cache import RoundedCache

    scales = load_cache_scales(bundle) if precision.cache == "int8" else None
    found = _logits(
        lambda: load_bundle_model(bundle),
        rows,
        on_progress,
        "the bundle's weights",
        new_cache=lambda: None if scales is None else RoundedCache(scales),
    )
    if not _are_finite(found):
        raise BundleError(
            f"the weights of {bundle.folder} give logits that are NaN or infinite in float32: they "
            "are damaged; export the bundle again"
        )
    return found


def _logits(
    load: "Callable[[], GemmaForCausalLM]",
    rows: Sequence[TokenRow],
    on_progress: Progress,
    what: str,
    new_cache: "Callable[[], KVCache | None]" = lambda: None,
) -> list[FloatArray]:
    import torch

    on_progress(f"loading {what}", 0, 1)
    model = load()
    found: list[FloatArray] = []
    with torch.inference_mode():
        for row in rows:
            on_progress(f"running {what}", len(found), len(rows))
            wanted = torch.tensor(row.positions)
            output = model(
                torch.tensor([row.token_ids]),
                logits_to_keep=wanted,
                past_key_values=new_cache(),
                use_cache=False,
            )
            found.append(output.logits[0].numpy())
    return found


def _are_finite(found: Sequence[FloatArray]) -> bool:
    return all(bool(np.isfinite(logits).all()) for logits in found)
