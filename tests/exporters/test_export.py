import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    OutputExistsError,
    RequestError,
    TokenizerError,
)
from gemma_deploy.exporters.compact_tokenizer import compact_tokenizer
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.graph_checks import OPERATORS
from gemma_deploy.graph_spec import LOWERINGS, PHASES, DType, Lowering, Phase, Precision

TinyFolders = Callable[..., Path]

TINY_GEMMA = Path(__file__).parents[2] / "samples" / "tiny-gemma"
TRAVELLING = {
    **{
        name: (TINY_GEMMA / name).read_text(encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json")
    },
    "generation_config.json": '{"eos_token_id": [1, 107]}',
    "LICENSE": "terms",
    "NOTICE.txt": "notice",
    "Gemma_Terms_of_Use.md": "terms of use",
    "PROHIBITED_USE_POLICY.md": "policy",
}
STAYING = {"README.md": "about", "training_args.json": "{}", "pytorch_model.bin": "pickle"}

_EXPORT_AND_WAIT = """
import sys, time
from pathlib import Path
from gemma_deploy.exporters.compact_tokenizer import compact_tokenizer
from gemma_deploy.exporters.export import export_checkpoint

def wait(*_):
    print("writing", flush=True)
    time.sleep(600)

export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=wait)
"""


@dataclass(frozen=True)
class Export:
    """A complete checkpoint, exported after an earlier attempt was killed."""

    checkpoint: Path
    bundle: Bundle
    progress: list[tuple[str, int, int]]
    left_by_the_killed: list[str]
    left_at_the_end: list[str]


@pytest.fixture(scope="module")
def export(tiny_checkpoint: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Export:
    checkpoint = tmp_path_factory.mktemp("complete") / "checkpoint"
    shutil.copytree(tiny_checkpoint("gemma1", "bfloat16"), checkpoint)
    # Many small tensors in another dtype do not make it the checkpoint's own.
    tensors = load_file(checkpoint / "model.safetensors")
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if tensor.ndim == 1}
    save_file(tensors, checkpoint / "model.safetensors")
    for name, text in (TRAVELLING | STAYING).items():
        (checkpoint / name).write_text(text, encoding="utf-8")
    (checkpoint / "licenses").mkdir()
    output = tmp_path_factory.mktemp("output") / "bundle"
    arguments = [str(checkpoint), str(output)]
    with subprocess.Popen(
        [sys.executable, "-c", _EXPORT_AND_WAIT, *arguments], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    left = _names(output.parent)
    progress: list[tuple[str, int, int]] = []
    bundle = export_checkpoint(checkpoint, output, on_progress=lambda *x: progress.append(x))
    return Export(checkpoint, bundle, progress, left, _names(output.parent))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def checkpoint(tiny_checkpoint: TinyFolders, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    folder = tmp_path / "source" / "checkpoint"
    shutil.copytree(tiny_checkpoint("gemma1"), folder)
    return folder


@pytest.fixture
def old_bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "place" / "bundle"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("old")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 70 MB: room for the tiny bundle and what the export keeps in reserve."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def spoil(checkpoint: Path, name: str, value: float) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)


def assert_untouched(old_bundle: Path) -> None:
    assert _names(old_bundle.parent) == ["bundle"]
    assert _names(old_bundle) == ["manifest.json"]
    assert (old_bundle / "manifest.json").read_text() == "old"


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(export: Export) -> None:
    (partial,) = export.left_by_the_killed
    assert re.fullmatch(r"\.bundle\.partial-\d+-.*", partial)
    assert export.left_at_the_end == ["bundle"]


def test_the_files_of_a_bundle(export: Export) -> None:
    made = {"manifest.json", "prefill.onnx", "decode.onnx", "weights.safetensors"}
    made |= {"prefill.tensorrt.onnx", "decode.tensorrt.onnx"}
    assert set(_names(export.bundle.folder)) == made | TRAVELLING.keys()
    for name in TRAVELLING.keys() - {"tokenizer.json"}:
        assert (export.bundle.folder / name).read_text() == TRAVELLING[name]


def test_the_tokenizer_of_a_bundle_is_the_checkpoints_in_a_shorter_form(export: Export) -> None:
    made, given = (
        (folder / "tokenizer.json").read_text() for folder in (export.bundle.folder, TINY_GEMMA)
    )
    assert made == compact_tokenizer(given)
    assert len(made) < len(given) / 2


def test_the_manifest_tells_the_truth(export: Export) -> None:
    folder = export.bundle.folder
    raw = json.loads((folder / "manifest.json").read_text())
    assert raw["files"].keys() | {"manifest.json"} == set(_names(folder))
    for name, record in raw["files"].items():
        content = (folder / name).read_bytes()
        assert record["size_bytes"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert raw["tokenizer"] == ["tokenizer.json", "tokenizer_config.json"]
    assert raw["generation"] == "generation_config.json"
    for name in ("prefill", "decode", "prefill.tensorrt", "decode.tensorrt"):
        assert raw["graphs"][name]["path"] == f"{name}.onnx"
    assert len(raw["graphs"]) == 4
    config = json.loads((export.checkpoint / "config.json").read_text())
    assert raw["limits"] == {"max_seq_len": config["max_position_embeddings"]}
    assert raw["model"]["vocab_size"] == config["vocab_size"]


def test_the_versions_of_everything_that_made_it_are_recorded(export: Export) -> None:
    versions = export.bundle.manifest.versions
    for package in ("torch", "onnx", "onnx-ir", "onnxscript", "gemma-deploy"):
        assert versions[package] == metadata.version(package)
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"onnxruntime", "onnxruntime-gpu"} & versions.keys()


def test_the_checkpoint_it_was_made_of_is_recorded_by_no_path(export: Export) -> None:
    source = export.bundle.manifest.source
    config = (export.checkpoint / "config.json").read_bytes()
    assert source is not None
    assert source.config_sha256 == hashlib.sha256(config).hexdigest()
    for path in export.bundle.folder.glob("*.json"):
        assert str(export.checkpoint.parent) not in path.read_text()


def test_the_default_dtype_is_the_checkpoints_own(export: Export) -> None:
    assert export.bundle.manifest.precision.weights == "bfloat16"
    stored = load_file(export.bundle.weights_path)
    source = load_file(export.checkpoint / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert stored[name].dtype == torch.bfloat16
    assert torch.equal(stored[name], source[name])


def test_progress_is_told(export: Export) -> None:
    weights_bytes = sum(
        x.numel() * x.itemsize for x in load_file(export.bundle.weights_path).values()
    )
    weights = [
        (done, total) for stage, done, total in export.progress if stage == "writing weights"
    ]
    assert weights == sorted(weights)
    assert weights[-1] == (weights_bytes, weights_bytes)
    assert [step for step in export.progress if step[0] != "writing weights"] == [
        ("tracing the prefill graph", 0, 2),
        ("tracing the decode graph", 1, 2),
        ("finishing", 2, 2),
    ]


def test_published_files_are_readable_by_others(export: Export) -> None:
    """Temporary folders are private; a bundle is as readable as any other new folder."""
    mask = os.umask(0)
    os.umask(mask)
    assert export.bundle.folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_existing_output_is_refused_before_any_work(old_bundle: Path) -> None:
    with pytest.raises(OutputExistsError, match="exists; use --force to replace it") as caught:
        export_checkpoint(Path("no such checkpoint"), old_bundle)
    assert caught.value.exit_code == 2
    assert_untouched(old_bundle)


def test_force_does_not_replace_a_folder_of_others(checkpoint: Path, tmp_path: Path) -> None:
    """Above all not the checkpoint itself."""
    before = _names(checkpoint)
    with pytest.raises(OutputExistsError, match="is not a folder that gemma-deploy made"):
        export_checkpoint(checkpoint, checkpoint, force=True)
    assert _names(checkpoint) == before
    assert _names(checkpoint.parent) == ["checkpoint"]
    assert _names(tmp_path) == ["source"]


def test_force_does_not_take_the_checkpoint_along(checkpoint: Path) -> None:
    """A checkpoint inside the bundle that would be replaced."""
    bundle = checkpoint.parent
    (bundle / "manifest.json").write_text("old")
    with pytest.raises(OutputExistsError, match=r"holds the checkpoint .* choose another output"):
        export_checkpoint(checkpoint, bundle, force=True)
    assert _names(bundle) == ["checkpoint", "manifest.json"]


def test_force_does_not_take_other_files_along(
    checkpoint: Path, tiny_bundle: TinyFolders, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("gemma1"), bundle)
    (bundle / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"holds notes.txt, which is not of the bundle"):
        export_checkpoint(checkpoint, bundle, force=True)
    assert (bundle / "notes.txt").read_text() == "mine"


def test_force_takes_engines_along(
    checkpoint: Path, tiny_bundle: TinyFolders, tmp_path: Path
) -> None:
    """They were built from the graphs that are replaced."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("gemma1"), bundle)
    (bundle / "engines" / "key").mkdir(parents=True)
    (bundle / "engines" / "key" / "engine.plan").write_bytes(b"plan")
    export_checkpoint(checkpoint, bundle, force=True)
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize(
    ("dtype", "graphs", "lowerings"),
    [
        ("float32", None, ("onnxruntime",)),
        ("float16", None, ("onnxruntime", "tensorrt")),
        ("bfloat16", ["portable"], ("onnxruntime", "portable")),
        ("float16", ["tensorrt", "portable", "tensorrt"], LOWERINGS),
        ("bfloat16", [], ("onnxruntime",)),
    ],
)
def test_graphs_of_the_lowerings_asked_for(
    dtype: DType,
    graphs: list[Lowering] | None,
    lowerings: tuple[Lowering, ...],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[DType] = []

    def trace(_config: object, _phase: Phase, activations: DType, _scaling: object) -> str:
        traced.append(activations)
        return activations

    def write(model: str, lowering: Lowering, precision: Precision, *rest: Any) -> None:
        assert model == precision.activations
        assert (precision.activations == dtype) or (lowering != "tensorrt")
        rest[-1].write_text(lowering)

    monkeypatch.setattr("gemma_deploy.exporters.bundle_files.trace_model", trace)
    monkeypatch.setattr("gemma_deploy.exporters.bundle_files.write_graph", write)
    monkeypatch.setattr("gemma_deploy.exporters.bundle_files.check_graph", lambda *_: None)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", dtype=dtype, graphs=graphs)
    assert bundle.manifest.lowerings == lowerings
    for lowering in lowerings:
        for phase in PHASES:
            assert bundle.graph_path(phase, lowering).read_text() == lowering
    # Graphs that compute alike are traced once for all.
    assert len(traced) == 2 * len(set(traced))


def test_tensorrt_graphs_of_a_float32_bundle(checkpoint: Path, tmp_path: Path) -> None:
    message = "engines compute in float16 or bfloat16: export with --fp16 or --bf16, or without"
    with pytest.raises(RequestError, match=message):
        export_checkpoint(checkpoint, tmp_path / "bundle", graphs=["tensorrt"])
    assert _names(tmp_path) == ["source"]


def test_a_tokenizer_that_cannot_be_read(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(TokenizerError, match=r"tokenizer.json"):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("matrix", "value", "dtype", "error", "message"),
    [
        (
            "mlp.down_proj",
            float("nan"),
            "float32",
            CheckpointError,
            r"down_proj.* holds NaN or inf",
        ),
        (
            "mlp.down_proj",
            float("nan"),
            "float16",
            CheckpointError,
            r"down_proj.* holds NaN or inf",
        ),
        ("self_attn.q_proj", 1e5, "float16", ExportError, r"q_proj.* holds 100000, too large for "),
    ],
)
def test_a_weight_that_cannot_be_stored(
    checkpoint: Path,
    old_bundle: Path,
    matrix: str,
    value: float,
    dtype: DType,
    error: type[Exception],
    message: str,
) -> None:
    """In the last layer: most of the weights are on the disk by then, where nothing looks first."""
    spoil(checkpoint, f"model.layers.2.{matrix}.weight", value)
    for output, force in ((old_bundle, True), (old_bundle.parent / "new", False)):
        with pytest.raises(error, match=message):
            export_checkpoint(checkpoint, output, dtype=dtype, force=force)
        assert_untouched(old_bundle)


def test_a_weight_that_float16_holds_divided(checkpoint: Path, tmp_path: Path) -> None:
    spoil(checkpoint, "model.layers.2.mlp.down_proj.weight", 1e5)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", dtype="float16")
    assert bundle.manifest.scaling is not None
    report = bundle.overflow_report()
    assert report is not None
    assert report.scaling == bundle.manifest.scaling


def test_a_truncated_checkpoint(checkpoint: Path, old_bundle: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        export_checkpoint(checkpoint, old_bundle, force=True)
    assert_untouched(old_bundle)


def test_a_checkpoint_truncated_while_it_is_read(checkpoint: Path, old_bundle: Path) -> None:
    def truncate(*_: Any) -> None:
        os.truncate(checkpoint / "model.safetensors", 10_000)

    with pytest.raises(CheckpointError, match="could not be read to the end of"):
        export_checkpoint(checkpoint, old_bundle, force=True, on_progress=truncate)
    assert_untouched(old_bundle)


def test_ctrl_c(checkpoint: Path, old_bundle: Path) -> None:
    def interrupt(*_: Any) -> None:
        assert len(_names(old_bundle.parent)) == 2
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, old_bundle, force=True, on_progress=interrupt)
    assert_untouched(old_bundle)


def test_an_encoder_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["use_bidirectional_attention"] = True
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = (
        f"{checkpoint} attends in both directions (use_bidirectional_attention): an encoder, which "
        "cannot generate text. Only causal models are exported"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert _names(tmp_path) == ["source"]


def test_a_head_size_that_onnx_runtime_does_not_take(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    # 4 query heads of 64 are as wide as 128 of 2.
    config |= {"num_attention_heads": 128, "num_key_value_heads": 32, "head_dim": 2}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"head_dim is 2; .* takes multiples of 8"):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert _names(tmp_path) == ["source"]


def test_a_checkpoint_replaced_while_it_is_exported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        os.utime(checkpoint / "model.safetensors")

    monkeypatch.setattr("gemma_deploy.exporters.export.write_bundle", write)
    with pytest.raises(
        CheckpointError, match="safetensors was replaced or changed while it was being"
    ):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_graph_that_could_not_be_loaded_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another torch may trace operators that no bundle had before."""
    fewer = {domain: names - {"RMSNormalization"} for domain, names in OPERATORS.items()}
    monkeypatch.setattr("gemma_deploy.graph_checks.OPERATORS", fewer)
    with pytest.raises(
        ExportError, match=r"made a graph that gemma-deploy does not know .*RMSNorm"
    ):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_too_small_a_disk_is_noticed_before_writing(checkpoint: Path, disk: Path) -> None:
    (disk / "other").write_bytes(bytes(20 << 20))
    seen: list[object] = []
    message = (
        rf"{re.escape(str(disk))} has \d+\.\d\d MiB free, the bundle needs \d+\.\d\d MiB \(64.00 MiB .*\): free space, "
        "choose another output"
    )
    with pytest.raises(ExportError, match=message):
        export_checkpoint(checkpoint, disk / "bundle", on_progress=lambda *x: seen.append(x))
    assert not seen
    assert _names(disk) == ["other"]


def test_a_disk_that_fills_up_on_the_way(checkpoint: Path, disk: Path) -> None:
    def fill(*_: Any) -> None:
        free_bytes = shutil.disk_usage(disk).free
        if free_bytes:
            (disk / "other").write_bytes(bytes(free_bytes))

    message = (
        f"cannot write {disk / 'bundle'}: the disk is full. Nothing was left behind; free space"
    )
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        export_checkpoint(checkpoint, disk / "bundle", on_progress=fill)
    assert caught.value.exit_code == 1
    assert _names(disk) == ["other"]


def test_an_output_inside_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ExportError, match=f"cannot write {tmp_path}/file/bundle: .* where a folder"
    ):
        export_checkpoint(checkpoint, tmp_path / "file" / "bundle")


def test_a_torch_that_cannot_export(
    checkpoint: Path, old_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.onnx.OnnxExporterError("no such op")

    monkeypatch.setattr(torch.onnx, "export", fail)
    message = (
        rf"torch {re.escape(torch.__version__)} could not export the model: no such op\. The v"
    )
    with pytest.raises(ExportError, match=message):
        export_checkpoint(checkpoint, old_bundle, force=True)
    assert_untouched(old_bundle)
