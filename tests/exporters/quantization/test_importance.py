"""What matrices read, measured; transformers is the oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.exporters.quantization.importance import measure_importance
from gemma_deploy.exporters.quantization.options import QuantizationOptions, formats_of
from gemma_deploy.exporters.quantization.work_folder import WorkFolder

TinyFolders = Callable[..., Path]


class StoppedError(Exception):
    pass


def measured(
    folder: Path, rows: Tensor, work: Path, on_progress: Callable[..., object] = lambda *_: None
) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    matrices = formats_of(checkpoint.config, QuantizationOptions())
    return measure_importance(checkpoint, rows, matrices, WorkFolder(work, {}), on_progress)


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_it_is_the_mean_square_of_what_a_matrix_reads(
    tiny_checkpoint: TinyFolders,
    oracle: Callable[..., Any],
    random_tokens: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    folder, rows = tiny_checkpoint(name), torch.as_tensor(random_tokens(6, 16))
    found = measured(folder, rows, tmp_path / "work")
    read: dict[str, Tensor] = {}

    def keep(matrix: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: read.__setitem__(matrix, inputs[0].detach().double())

    model = oracle(folder)
    handles = [
        part.register_forward_pre_hook(keep(f"{matrix}.weight"))
        for matrix, part in model.named_modules()
        if isinstance(part, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(rows)
    for handle in handles:
        handle.remove()
    energies = {matrix: inputs.flatten(0, 1).square().mean(0) for matrix, inputs in read.items()}
    head = energies.pop("lm_head.weight")
    energies["model.embed_tokens.weight"] = head + 0.1 * head.mean()
    for matrix, energy in energies.items():
        # A hundredth of the mean is added, so that no channel counts for nothing.
        expected = (energy + 0.01 * energy.mean()).float()
        torch.testing.assert_close(found[matrix], expected, rtol=1e-3, atol=1e-5)
    assert energies.keys() == found.keys()


def test_a_quick_run_writes_no_files(
    tiny_checkpoint: TinyFolders, random_tokens: Callable[..., Any], tmp_path: Path
) -> None:
    measured(tiny_checkpoint("gemma1"), torch.as_tensor(random_tokens(4, 16)), tmp_path / "work")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_long_run_continues_where_it_stopped(
    tiny_checkpoint: TinyFolders,
    random_tokens: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, rows = tiny_checkpoint("gemma1"), torch.as_tensor(random_tokens(4, 16))
    whole = measured(folder, rows, tmp_path / "whole")
    module = "gemma_deploy.exporters.quantization.importance"
    monkeypatch.setattr(f"{module}._SECONDS_BETWEEN_SAVES", 0.0)

    def stop_at_layer_1(_what: str, done: int, _total: int) -> None:
        if done == 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        measured(folder, rows, tmp_path / "work", stop_at_layer_1)
    seen: list[int] = []
    found = measured(folder, rows, tmp_path / "work", lambda _what, done, _total: seen.append(done))
    assert seen[0] == 1
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
