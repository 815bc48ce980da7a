import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.checkpoint_source import CheckpointSource
from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine import ENGINE_FILE, EngineFolder, EngineManifest, Plan
from gemma_deploy.engine_build import EngineBuild, build_command, engine_spec
from gemma_deploy.errors import BundleVersionError, EngineError, UnsafePathError
from gemma_deploy.file_records import FileRecord, record_file
from gemma_deploy.limits import MAX_CONFIG_BYTES
from tests.engine_build import BUILD, LIMITS

CONFIG = GemmaConfig(num_hidden_layers=2, vocab_size=50, num_key_value_heads=4, head_dim=8)


def _manifest(files: dict[str, FileRecord], **changes: Any) -> EngineManifest:
    manifest = EngineManifest(
        model=CONFIG,
        cache_dtype="bfloat16",
        build=BUILD,
        plans={
            "prefill": Plan(path="engine.plan", profile=0),
            "decode": Plan(path="engine.plan", profile=1),
        },
        tokenizer=("tokenizer.json",),
        generation="generation_config.json",
        model_max_seq_len=8192,
        files=files,
        versions={"python": "3.11"},
        source=CheckpointSource(config_sha256="a" * 64, headers_sha256="b" * 64),
    )
    return dataclasses.replace(manifest, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An engine folder whose plan is no plan."""
    for name in ("engine.plan", "tokenizer.json"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "generation_config.json").write_text('{"top_k": 3}')
    files = {path.name: record_file(path) for path in sorted(tmp_path.iterdir())}
    (tmp_path / ENGINE_FILE).write_text(_manifest(files).to_json())
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "generation_config.json"],
)
def test_what_decides_the_text_is_listed(folder: Path, name: str) -> None:
    """No size, hash or path check covers what the manifest does not know."""
    raw = json.loads((folder / ENGINE_FILE).read_text())
    raw["files"].pop(name, None)
    raw["tokenizer"] = []
    raw["generation"] = None
    (folder / ENGINE_FILE).write_text(json.dumps(raw))
    (folder / name).touch()
    message = f"{name} is a (tokenizer|generation) file that engine.json does not list"
    with pytest.raises(EngineError, match=message):
        EngineFolder.open(folder)


def _change(folder: Path, *keys: str, value: object) -> None:
    raw = json.loads((folder / ENGINE_FILE).read_text())
    place = raw
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / ENGINE_FILE).write_text(json.dumps(raw))


def test_what_is_written_is_read(folder: Path) -> None:
    engine = EngineFolder.open(folder)
    assert engine.manifest == _manifest(dict(engine.manifest.files))
    assert engine.plan_path("decode") == folder / "engine.plan"
    assert engine.generation_config() == {"top_k": 3}
    assert engine.changed_files() == []


def test_an_engine_without_generation_settings(folder: Path) -> None:
    _change(folder, "generation", value=None)
    assert EngineFolder.open(folder).generation_config() == {}


def test_generation_settings_that_are_too_large(folder: Path) -> None:
    engine = EngineFolder.open(folder)
    (folder / "generation_config.json").write_bytes(b" " * MAX_CONFIG_BYTES + b"{}")
    with pytest.raises(EngineError, match=r"generation_config.json is larger than 1,048,576 bytes"):
        engine.generation_config()


def test_changed_contents_are_found(folder: Path) -> None:
    (folder / "engine.plan").write_bytes(b"ENGINE.PLAN")
    hashed: list[int] = []
    assert EngineFolder.open(folder).changed_files(hashed.append) == ["engine.plan"]
    assert sum(hashed) == sum(
        x.size_bytes for x in EngineFolder.open(folder).manifest.files.values()
    )


def test_a_folder_without_a_manifest_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"is not an engine: it has no engine\.json"):
        EngineFolder.open(tmp_path)


def test_a_missing_or_truncated_plan(folder: Path) -> None:
    (folder / "engine.plan").write_bytes(b"eng")
    with pytest.raises(EngineError, match=r"has 3 bytes, engine\.json says 11 bytes: .* build it"):
        EngineFolder.open(folder)
    (folder / "engine.plan").unlink()
    with pytest.raises(EngineError, match=r"engine\.plan is missing"):
        EngineFolder.open(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["build"], {}),
        (["build", "flavour"], "tensorrt-lite"),
        (["build", "layout"], "three-engines"),
        (["build", "attention"], None),
        (["build", "limits"], {"max_batch_size": 1}),
        (["build", "graphs"], {"prefill": "a"}),
        (["build", "extra"], 1),
        (["build"], None),
        (["cache_dtype"], "float8"),
        (["model"], {"model_type": "llama"}),
        (["plans"], {"prefill": {"path": "engine.plan", "profile": 0}}),
        (["files"], ["engine.plan"]),
        (["versions"], 3),
    ],
)
def test_a_damaged_manifest_is_told(keys: list[str], value: object, folder: Path) -> None:
    _change(folder, *keys, value=value)
    with pytest.raises(EngineError, match=r"engine\.json is damaged .*: build the engine again"):
        EngineFolder.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_manifest_that_is_no_json_object(text: str, folder: Path) -> None:
    (folder / ENGINE_FILE).write_text(text)
    with pytest.raises(EngineError, match=r"cannot be read as JSON|expected a JSON object"):
        EngineFolder.open(folder)


def test_a_file_that_is_not_listed(folder: Path) -> None:
    _change(folder, "tokenizer", value=["other.json"])
    with pytest.raises(EngineError, match=r"'other\.json', which is not among its files"):
        EngineFolder.open(folder)


def test_a_path_that_leaves_the_folder(folder: Path) -> None:
    _change(folder, "files", "../x", value={"size_bytes": 1, "sha256": ""})
    with pytest.raises(UnsafePathError, match=r"'\.\./x'"):
        EngineFolder.open(folder)


def test_a_newer_format(folder: Path) -> None:
    _change(folder, "format_version", value=99)
    with pytest.raises(BundleVersionError, match=r"format 99, .* upgrade"):
        EngineFolder.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"flavour": "tensorrt"},
        {"library_version": "1.7.2"},
        {"targets": ("8.0",)},
        {"layout": "two-engines"},
        {"attention": "native"},
        {"plugin_version": None},
        {"limits": dataclasses.replace(LIMITS, max_seq_len=101)},
        {"graphs": {"prefill": "a", "decode": "B"}},
        {"weights": "C"},
    ],
)
def test_whatever_makes_another_engine_makes_another_key(change: dict[str, Any]) -> None:
    assert dataclasses.replace(BUILD, **change).key != BUILD.key


def test_a_key_is_the_same_for_the_same_build() -> None:
    reordered = dataclasses.replace(BUILD, graphs={"decode": "b", "prefill": "a"})
    assert reordered.key == BUILD.key == EngineBuild.from_dict(BUILD.to_dict()).key
    assert BUILD.key.startswith("tensorrt-rtx-1.7.1-sm80+sm89-")
    assert os.sep not in BUILD.key


def test_both_phases_of_one_engine_run_the_prefill_graph() -> None:
    one = _manifest({})
    two = _manifest({}, build=dataclasses.replace(BUILD, layout="two-engines"))
    assert one.spec("decode") == one.spec("prefill") == two.spec("prefill")
    names = [tensor.name for tensor in two.spec("decode").inputs]
    assert names[:2] == ["input_ids", "input_pos"]
    assert "logits_index" not in names


def test_an_engine_takes_a_fixed_cache_and_gives_its_largest_logits() -> None:
    spec = engine_spec(CONFIG, "prefill", "float16", LIMITS)
    inputs = {tensor.name: (tensor.dtype, tensor.dims) for tensor in spec.inputs}
    assert inputs["input_ids"] == ("int64", ("B", "S"))
    assert inputs["logits_index"] == ("int64", ("B", "L"))
    assert inputs["past_key_values.1.value"] == ("float16", ("B", 4, 100, 8))
    outputs = [(tensor.name, tensor.dtype, tensor.dims) for tensor in spec.outputs]
    assert outputs[:5] == [
        ("logits", "float32", ("B", "L", 50)),
        ("top_logits", "float32", ("B", "L", 7)),
        ("top_indices", "int64", ("B", "L", 7)),
        ("logits_sum", "float32", ("B", "L")),
        ("present.0.key", "float16", ("B", 4, 100, 8)),
    ]


def test_the_build_command_says_everything() -> None:
    given = shlex.split(build_command(Path("my bundle"), BUILD))
    assert given == [
        *("gemma-deploy", "build", "my bundle", "--backend", "tensorrt-rtx"),
        *("--max-batch", "2", "--max-seq-len", "100", "--prefill-chunk", "30"),
        *("--max-logits", "3", "--top-logits", "7"),
        *("--compute-capability", "8.0", "--compute-capability", "8.9"),
    ]
    other = dataclasses.replace(
        BUILD, flavour="tensorrt", layout="two-engines", attention="native", targets=("9.0",)
    )
    command = build_command(Path("b"), other)
    assert command.endswith("--top-logits 7 --layout two-engines --attention native")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("files", "engine.plan", "size_bytes"), "5", "size_bytes is '5', expected an integer"),
        (("files", "engine.plan", "size_bytes"), [], r"size_bytes is \[\], expected an integer"),
        (("plans", "prefill", "path"), {}, r"plans\.prefill\.path is {}, expected a string"),
        (("plans", "prefill", "profile"), "0", "profile is '0', expected an integer"),
        (("model_max_seq_len",), float("inf"), "model_max_seq_len is inf, expected a whole"),
        (("model_max_seq_len",), 0, "model_max_seq_len is 0, expected a whole number from 1"),
        (("model", "num_hidden_layers"), 10**12, "num_hidden_layers is 1000000000000, expected"),
        (("model",), [], r"the model is \[\], expected a JSON object"),
        (
            ("build", "limits", "max_batch_size"),
            10**12,
            "max_batch_size is 1000000000000, expected",
        ),
        (("build", "limits", "max_logits"), -1, "max_logits is -1, expected a whole number from 1"),
        (("build", "graphs"), {"prefill": "a"}, "graphs names prefill, expected prefill, decode"),
        (("build", "layout"), [], r"layout is \[\], expected one of one-engine, two-engines"),
        (("versions",), {"python": 3}, r"versions\.python is 3, expected a string"),
        (("tokenizer",), "tokenizer.json", "tokenizer is 'tokenizer.json', expected a list"),
    ],
)
def test_values_that_cannot_be(
    folder: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    _change(folder, *keys, value=value)
    with pytest.raises(EngineError, match=f"{ENGINE_FILE} is damaged .*{message}"):
        EngineFolder.open(folder)
