import json
import re
from pathlib import Path

import pytest

from gemma_deploy.checkpoint_files import explain_folder, is_licence


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "LICENCE",
        "license.txt",
        "NOTICE",
        "notice.txt",
        "COPYING",
        "Gemma_Terms_of_Use.md",
        "PROHIBITED_USE_POLICY.md",
    ],
)
def test_licences(name: str) -> None:
    assert is_licence(name)


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.model", "my_license_key"])
def test_other_files(name: str) -> None:
    assert not is_licence(name)


class TestExplainFolder:
    @pytest.mark.parametrize(
        "names",
        [
            ["config.json", "model.safetensors"],
            ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"],
            # Other formats beside the one that is read, as repositories of the hub have them.
            ["config.json", "model.safetensors", "model.gguf", "flax_model.msgpack", "x.bin"],
            # Incomplete: for `Checkpoint.open` to tell.
            ["config.json", "tokenizer.json"],
        ],
    )
    def test_what_may_be_a_checkpoint(self, tmp_path: Path, names: list[str]) -> None:
        _write(tmp_path, names)

        assert explain_folder(tmp_path) is None

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (
                ["gemma.Q4_K_M.gguf"],
                "holds weights only as GGUF .*Give a checkpoint .*the original",
            ),
            (["config.json", "gemma.GGUF"], "holds weights only as GGUF"),
            (["config.json", "flax_model.msgpack"], "holds weights only as Flax's msgpack"),
            (["config.json", "weights.npz"], "NumPy archives, as MLX writes them"),
            (["config.json", "tf_model.h5"], "HDF5, as TensorFlow and Keras write it"),
            (["config.json", "pytorch_model.bin"], "pickle, which runs .*save_pretrained converts"),
            (["gemma-2b.ckpt", "tokenizer.model"], "pickle, which runs"),
            (["manifest.ocdbt"], "Orbax"),
            (["gemma3.task"], "LiteRT"),
            (["model.onnx"], "ONNX graphs"),
            (["decode.onnx", "config.json"], "a bundle's graphs, and no manifest.json: copy"),
            (["manifest.json", "weights.safetensors"], "it is a bundle: give the checkpoint"),
            (["engine.json", "engine.plan"], "it is an engine: give the checkpoint"),
            (["model_index.json", "config.json"], "it is a pipeline of diffusers"),
            (["adapter_config.json", "adapter_model.safetensors"], "is an adapter .*merge it into"),
            (["model.safetensors"], "has no config.json; it has weights only"),
            (["a.txt", "b.txt", "c.txt", "d.txt"], "it holds a.txt, b.txt, c.txt, ...\\. Expected"),
            ([], "has no config.json; it holds nothing. Expected a checkpoint"),
            (["sub/config.json"], r"the one in .*sub was probably meant"),
            (["snapshots/1a2b/config.json", "refs/main"], r"the one in .*1a2b was probably meant"),
        ],
    )
    def test_what_is_none(self, tmp_path: Path, names: list[str], expected: str) -> None:
        _write(tmp_path, names)

        assert _matches(expected, explain_folder(tmp_path))

    def test_an_adapter_names_its_base(self, tmp_path: Path) -> None:
        adapter = {"base_model_name_or_path": "google/gemma-2b"}
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))

        assert _matches("is an adapter of google/gemma-2b", explain_folder(tmp_path))

    def test_weights_quantized_by_mlx(self, tmp_path: Path) -> None:
        _write(tmp_path, ["model.safetensors"])
        config = {"model_type": "gemma2", "quantization": {"group_size": 64, "bits": 4}}
        (tmp_path / "config.json").write_text(json.dumps(config))

        assert _matches("is quantized by MLX .*--int8 or --int4", explain_folder(tmp_path))

    @pytest.mark.parametrize("content", ["not JSON", "[1]", "\udcff", "[" * 200_000])
    def test_a_broken_config_is_for_others_to_report(self, tmp_path: Path, content: str) -> None:
        _write(tmp_path, ["model.safetensors"])
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))

        assert explain_folder(tmp_path) is None

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "manifest.json"])
    def test_a_file_of_a_model(self, tmp_path: Path, name: str) -> None:
        _write(tmp_path, [name, "config.json"])

        expected = f"is a file; give the folder that it lies in: {tmp_path}"
        assert _matches(expected, explain_folder(tmp_path / name))

    def test_other_files(self, tmp_path: Path) -> None:
        _write(tmp_path, ["a.gguf", "notes.txt"])

        assert _matches("a.gguf holds weights as GGUF", explain_folder(tmp_path / "a.gguf"))
        assert _matches("is a file; expected a check", explain_folder(tmp_path / "notes.txt"))

    def test_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("nowhere")

        assert _matches("does not exist; expected a checkpoint", explain_folder(tmp_path / "x"))
        assert _matches("does not exist; expected a checkpoint", explain_folder(tmp_path / "link"))

    def test_a_name_that_cannot_be(self, tmp_path: Path) -> None:
        assert _matches(
            "cannot be read: File name too long", explain_folder(tmp_path / ("x" * 999))
        )


def _write(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if path.suffix == ".json" else "")


def _matches(pattern: str, text: str | None) -> bool:
    assert text is not None
    assert re.search(pattern, text), text
    return True
