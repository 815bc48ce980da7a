import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import BundleError, RequestError
from gemma_deploy.inspection import inspect_folder


class TestCheckpoint:
    def test_sizes_are_those_of_the_file(self, tiny_checkpoint: Callable[..., Path]) -> None:
        folder = tiny_checkpoint("gemma1", "bfloat16")

        found = inspect_folder(folder)

        header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") + 8
        assert found.kind == "checkpoint"
        assert found.weights_bytes == (folder / "model.safetensors").stat().st_size - header
        assert found.bytes_by_dtype == {"bfloat16": found.weights_bytes}
        assert sum(found.bytes_by_group.values()) == found.weights_bytes
        assert found.bytes_by_group["embedding"] == 512 * 64 * 2
        assert found.files == {p.name: p.stat().st_size for p in folder.iterdir()}

    def test_estimates_the_bundle_that_export_would_make(
        self, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        found = inspect_folder(tiny_checkpoint("gemma1", "float16"))

        estimate = found.estimate(batch_size=3, max_seq_len=100, prefill_tokens=512)

        # 3 layers of one key-value head of 64; norms (7 of 64) grow to float32.
        assert estimate.kv_cache_bytes == 2 * 3 * 64 * 2 * 3 * 100
        assert estimate.weights_bytes == found.weights_bytes + 7 * 64 * 2

    def test_json_can_hold_it(self, tiny_checkpoint: Callable[..., Path]) -> None:
        report = json.loads(json.dumps(inspect_folder(tiny_checkpoint("gemma3")).to_dict()))

        assert report["model"]["model_type"] == "gemma3_text"

    def test_more_tokens_than_the_model_was_made_for(
        self, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        found = inspect_folder(tiny_checkpoint("gemma1"))

        with pytest.raises(RequestError, match=r"max_seq_len is 513; .* at most 512 tokens"):
            found.estimate(batch_size=1, max_seq_len=513, prefill_tokens=512)


class TestNeither:
    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            RequestError, match=r"has no config.json; .* A bundle \(manifest.json\) or an engine"
        ):
            inspect_folder(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="does not exist; expected a checkpoint"):
            inspect_folder(tmp_path / "nowhere")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()

        with pytest.raises(RequestError, match="is a file; expected a checkpoint"):
            inspect_folder(tmp_path / "file")


class TestBundle:
    def test_sizes_are_those_of_the_files(self, bundle: Path) -> None:
        found = inspect_folder(bundle)

        weights = bundle / "weights.safetensors"
        header = int.from_bytes(weights.read_bytes()[:8], "little") + 8
        assert found.kind == "bundle"
        assert found.weights_bytes == weights.stat().st_size - header
        assert found.files == {p.name: p.stat().st_size for p in bundle.iterdir()}
        assert sum(found.bytes_by_group.values()) == found.weights_bytes

    def test_is_what_was_estimated_from_its_checkpoint(
        self, bundle: Path, bundle_checkpoint: Path
    ) -> None:
        made = inspect_folder(bundle).estimate(batch_size=2, max_seq_len=64, prefill_tokens=512)
        expected = inspect_folder(bundle_checkpoint).estimate(
            batch_size=2, max_seq_len=64, prefill_tokens=512
        )

        assert dataclasses.replace(made, cpu=expected.cpu) == expected
        # Its tokenizer.json takes less to read than the checkpoint's.
        assert made.cpu.weights_bytes == expected.cpu.weights_bytes
        assert made.cpu.loading_bytes == pytest.approx(expected.cpu.loading_bytes, rel=0.02)

    def test_weights_that_are_not_safetensors(self, bundle: Path, tmp_path: Path) -> None:
        broken = shutil.copytree(bundle, tmp_path / "broken")
        size = (broken / "weights.safetensors").stat().st_size
        (broken / "weights.safetensors").write_bytes(b"\xff" * size)

        with pytest.raises(BundleError, match=r"cannot be read as safetensors .*export it again"):
            inspect_folder(broken)

    def test_weights_that_may_not_be_read(
        self, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = Path.open

        def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name == "weights.safetensors":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refuse)

        with pytest.raises(PermissionError, match=r"Permission denied: .*weights\.safetensors"):
            inspect_folder(bundle)
