import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import CheckpointError, ExportError, RequestError
from gemma_deploy.exporters.weights import (
    WeightsFile,
    is_norm,
    plan_weights,
    stored_name,
    write_weights,
)
from gemma_deploy.graph_spec import DType, Precision
from gemma_deploy.quantization.codes import quantize, unpack
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.residual_scaling import LayerScaling, ResidualScaling

TinyFolders = Callable[..., Path]
NARROW_DTYPES: tuple[DType, ...] = ("float16", "bfloat16")


def write(checkpoint: Path, path: Path, dtype: DType) -> WeightsFile:
    source = Checkpoint.open(checkpoint)
    return write_weights(source, plan_weights(source, Precision.of(dtype)), path)


def edited(checkpoint: Path, folder: Path, **changes: Tensor) -> Path:
    """Copy a checkpoint with some tensors replaced; `__` in a keyword stands for a dot."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        assert name.replace("__", ".") in tensors
        tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


def expected(name: str, tensor: Tensor, dtype: DType) -> tuple[str, Tensor]:
    """Say what the weights file should hold for a checkpoint's tensor."""
    if name.split(".")[-2].endswith("norm"):
        return name.replace("weight", "scale"), 1 + tensor.float()
    if name.endswith("bias") and dtype == "bfloat16":
        return name, tensor.float()
    return name, tensor.to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", *NARROW_DTYPES])
@pytest.mark.parametrize("name", ["gemma1-mha-bias", "gemma1-untied", "gemma2", "gemma3"])
def test_every_tensor_of_the_checkpoint_is_stored(
    tiny_checkpoint: TinyFolders, tmp_path: Path, name: str, dtype: DType
) -> None:
    path = tmp_path / "weights.safetensors"
    write(tiny_checkpoint(name), path, dtype)
    source = load_file(tiny_checkpoint(name) / "model.safetensors")
    assert len(source) > 28
    wanted = dict(expected(key, tensor, dtype) for key, tensor in source.items())
    stored = load_file(path)
    assert stored.keys() == wanted.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == wanted[key].dtype, key
        assert torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize("source_dtype", NARROW_DTYPES)
def test_narrow_checkpoints_widen_exactly(
    tiny_checkpoint: TinyFolders, tmp_path: Path, source_dtype: str
) -> None:
    path = tmp_path / "weights.safetensors"
    write(tiny_checkpoint("gemma3", source_dtype), path, "float32")
    source = load_file(tiny_checkpoint("gemma3", source_dtype) / "model.safetensors")
    assert {tensor.dtype for tensor in source.values()} == {getattr(torch, source_dtype)}
    wanted = dict(expected(key, tensor, "float32") for key, tensor in source.items())
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in load_file(path).items())


def test_norms_are_folded_before_they_could_be_rounded(
    tiny_checkpoint: TinyFolders, tmp_path: Path
) -> None:
    """1 + 2^-12 needs more bits than float16 and bfloat16 have."""
    weight = torch.full((64,), 2**-12, dtype=torch.bfloat16)
    checkpoint = edited(
        tiny_checkpoint("gemma1", "bfloat16"), tmp_path / "c", model__norm__weight=weight
    )
    write(checkpoint, tmp_path / "w.safetensors", "float16")
    stored = load_file(tmp_path / "w.safetensors")["model.norm.scale"]
    assert torch.equal(stored, torch.full((64,), 1 + 2**-12))


def test_quantized_matrices_are_their_codes_and_scales(
    tiny_checkpoint: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows are quantized by themselves, whatever their number."""
    monkeypatch.setattr("gemma_deploy.exporters.weights._BLOCK_BYTES", 1 << 12)
    texts = ("int4/32", "int8/channel", "nf4/64", "fp8/32")
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in ("q", "k", "v")] + [
        "model.layers.1.mlp.down_proj.weight"
    ]
    formats = {name: WeightFormat.parse(text) for name, text in zip(names, texts, strict=True)}
    source = Checkpoint.open(tiny_checkpoint("gemma2"))
    plan = plan_weights(source, Precision.of("float16"), formats)
    write_weights(source, plan, tmp_path / "w")
    stored = load_file(tmp_path / "w")
    original = load_file(tiny_checkpoint("gemma2") / "model.safetensors")
    for name, weight_format in formats.items():
        wanted = quantize(original[name], weight_format)
        codes = unpack(stored[name], weight_format)
        assert torch.equal(codes.float(), wanted.codes.float()), name
        assert torch.equal(stored[f"{name}.scales"], wanted.scales), name
    untouched = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stored[untouched], original[untouched].half())


def test_weights_are_stored_divided(tiny_checkpoint: TinyFolders, tmp_path: Path) -> None:
    """A power of two leaves codes as they are, and goes into scales and norms exactly."""
    source = Checkpoint.open(tiny_checkpoint("gemma2"))
    layer = LayerScaling(value=2, attention=4, up=8, feed_forward=16)
    scaling = ResidualScaling.of(source.config, 32, (layer,) * source.config.num_hidden_layers)
    formats = {"model.layers.0.mlp.up_proj.weight": WeightFormat("int4", 32)}
    for path, divided_by in ((tmp_path / "plain", None), (tmp_path / "divided", scaling)):
        plan = plan_weights(source, Precision.of("float32"), formats, divided_by)
        write_weights(source, plan, path)
    plain, divided = load_file(tmp_path / "plain"), load_file(tmp_path / "divided")
    divisors = {
        "self_attn.v_proj.weight": 2,
        "self_attn.o_proj.weight": 4 / 2,
        "mlp.up_proj.weight.scales": 8,
        "mlp.down_proj.weight": 16 / 8,
        "post_attention_layernorm.scale": 32,
        "post_feedforward_layernorm.scale": 32,
    }
    for name, tensor in plain.items():
        divisor = divisors.get(name.removeprefix("model.layers.0."), 1)
        if ".layers." not in name or ".layers.0." in name:
            assert torch.equal((tensor / divisor).to(tensor.dtype), divided[name]), name


def test_prepared_tensors_are_taken_as_they_are(
    tiny_checkpoint: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_deploy.exporters.weights._BLOCK_BYTES", 1 << 11)
    source = Checkpoint.open(tiny_checkpoint("gemma2"))
    matrix, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.scale"
    prepared = {
        matrix: torch.arange(128 * 32, dtype=torch.uint8).view(128, 32),
        f"{matrix}.scales": torch.rand(128, 1).half(),
        norm: torch.rand(64),
    }
    save_file(prepared, tmp_path / "prepared")
    layer = LayerScaling(up=2)
    scaling = ResidualScaling.of(source.config, 1, (layer,) * source.config.num_hidden_layers)
    plan = plan_weights(
        source, Precision.of("float16"), {matrix: WeightFormat("int4", 64)}, scaling
    )
    paths = dict.fromkeys((matrix, norm), tmp_path / "prepared")
    write_weights(source, plan, tmp_path / "w", prepared=paths)
    stored = load_file(tmp_path / "w")
    assert torch.equal(stored[matrix], prepared[matrix])
    assert torch.equal(stored[f"{matrix}.scales"], prepared[f"{matrix}.scales"] / 2)
    assert torch.equal(stored[norm], prepared[norm])


def test_prepared_scales_beyond_float16(tiny_checkpoint: TinyFolders, tmp_path: Path) -> None:
    source = Checkpoint.open(tiny_checkpoint("gemma2"))
    matrix = "model.layers.0.mlp.up_proj.weight"
    scales = torch.full((128, 1), torch.inf).half()
    codes = torch.zeros(128, 32, dtype=torch.uint8)
    save_file({matrix: codes, f"{matrix}.scales": scales}, tmp_path / "prepared")
    plan = plan_weights(source, Precision.of("float16"), {matrix: WeightFormat("int4", 64)})
    with pytest.raises(ExportError, match=rf"{matrix} has weights .* float16 scales of int4/64"):
        write_weights(source, plan, tmp_path / "w", prepared={matrix: tmp_path / "prepared"})


def test_blocks_that_do_not_divide_rows(tiny_checkpoint: TinyFolders) -> None:
    source = Checkpoint.open(tiny_checkpoint("gemma1"))
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RequestError, match=rf"{name} has rows of 64 .* choose 32 or 64"):
        plan_weights(source, Precision.of("float16"), {name: WeightFormat("int4", 128)})


def test_what_counts_as_a_norm() -> None:
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.1.self_attn.q_norm")
    for name in norms:
        assert is_norm(f"{name}.weight")
        assert stored_name(f"{name}.weight") == f"{name}.scale"
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert not is_norm(name)
        assert stored_name(name) == name


def test_offsets_hash_and_size_are_those_of_the_file(
    tiny_checkpoint: TinyFolders, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    written = write(tiny_checkpoint("gemma2"), path, "float16")
    content = path.read_bytes()
    assert written.record.size_bytes == len(content)
    assert written.record.sha256 == hashlib.sha256(content).hexdigest()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == written.offsets.keys()
        for name, offset in written.offsets.items():
            tensor = file.get_tensor(name)
            raw = bytearray(content[offset : offset + tensor.numel() * tensor.itemsize])
            assert torch.equal(torch.frombuffer(raw, dtype=tensor.dtype), tensor.flatten()), name


def test_data_starts_on_a_page_and_leaves_no_holes(
    tiny_checkpoint: TinyFolders, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    written = write(tiny_checkpoint("gemma1"), path, "float32")
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + header_bytes])
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert min(written.offsets.values()) == 8 + header_bytes
    assert (8 + header_bytes) % 4096 == 0
    spans = sorted(entry["data_offsets"] for entry in entries.values())
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] + 8 + header_bytes == len(content)


def test_progress_counts_every_byte_of_the_weights(
    tiny_checkpoint: TinyFolders, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_checkpoint("gemma1"))
    plan = plan_weights(source, Precision.of("float32"))
    counts: list[int] = []
    write_weights(source, plan, tmp_path / "w", counts.append)
    stored = load_file(tmp_path / "w").values()
    assert sum(counts) == sum(tensor.numel() * tensor.itemsize for tensor in stored)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_are_not_finite(
    tiny_checkpoint: TinyFolders, tmp_path: Path, dtype: DType, value: float
) -> None:
    weight = torch.zeros(64, 128)
    weight[17, 3] = value
    name = "model.layers.1.mlp.down_proj.weight"
    changes = {name.replace(".", "__"): weight}
    checkpoint = edited(tiny_checkpoint("gemma1"), tmp_path / "c", **changes)
    message = f"{name} holds NaN or infinity: the checkpoint is damaged; download it again"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        write(checkpoint, tmp_path / "w", dtype)


@pytest.mark.parametrize("value", [65520.0, -70000.0])
def test_weights_too_large_for_float16(
    tiny_checkpoint: TinyFolders, tmp_path: Path, value: float
) -> None:
    """65504 is float16's largest number; halfway to the next step, 65520, rounds to infinity."""
    weight = torch.full((64, 128), 65504.0)
    name = "model.layers.1.mlp.down_proj.weight"
    changes = {name.replace(".", "__"): weight}
    fitting = edited(tiny_checkpoint("gemma1"), tmp_path / "fitting", **changes)
    write(fitting, tmp_path / "w", "float16")
    assert load_file(tmp_path / "w")[name].max() == 65504
    weight[63, 127] = value
    too_large = edited(tiny_checkpoint("gemma1"), tmp_path / "too_large", **changes)
    message = f"{name} holds {abs(value):g}, too large for float16: export with --dtype bfloat16 or float32"
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        write(too_large, tmp_path / "w", "float16")
    write(too_large, tmp_path / "w", "bfloat16")


def test_large_norms_are_no_trouble_in_float16(
    tiny_checkpoint: TinyFolders, tmp_path: Path
) -> None:
    checkpoint = edited(
        tiny_checkpoint("gemma1"), tmp_path / "c", model__norm__weight=torch.full((64,), 1e5)
    )
    write(checkpoint, tmp_path / "w", "float16")
    assert load_file(tmp_path / "w")["model.norm.scale"].eq(100_001).all()


def test_a_checkpoint_cut_off_after_it_was_opened(
    tiny_checkpoint: TinyFolders, tmp_path: Path
) -> None:
    checkpoint = edited(tiny_checkpoint("gemma1"), tmp_path / "c")
    source = Checkpoint.open(checkpoint)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors could not be read to the end of"):
        write_weights(source, plan_weights(source, Precision.of("float32")), tmp_path / "w")


_MEASURE_GROWTH = """
import re, sys
from pathlib import Path
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.exporters.weights import plan_weights, write_weights
from gemma_deploy.graph_spec import Precision

source = Checkpoint.open(Path(sys.argv[1]))
plan = plan_weights(source, Precision.of("float32"))
def resident_bytes(kind):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+) kB", status)[1])
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = resident_bytes("VmRSS")
write_weights(source, plan, Path(sys.argv[2]))
print(resident_bytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A table of 160 MB, 320 MB as float32, passes through a few blocks of 16 MB."""
    config = GemmaConfig(
        vocab_size=125_000, hidden_size=640, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    _write_sparse_checkpoint(tmp_path, config)
    arguments = [str(tmp_path), str(tmp_path / "w")]
    # What is freed goes back at once: else glibc keeps more or less of it as it learns.
    environment = os.environ | dict.fromkeys(
        ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1048576"
    )
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE_GROWTH, *arguments],
        check=True, capture_output=True, env=environment,
    )  # fmt: skip
    assert (tmp_path / "w").stat().st_size > 320e6
    (tmp_path / "w").unlink()
    assert int(done.stdout) < 150e6


def _write_sparse_checkpoint(folder: Path, config: GemmaConfig) -> None:
    """Write a bfloat16 checkpoint of zeros that takes no disk."""
    from gemma_deploy.checkpoint import expected_tensors

    entries, end = {}, 0
    for name, shape in expected_tensors(config).items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
