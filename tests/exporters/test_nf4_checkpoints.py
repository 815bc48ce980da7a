"""Checkpoints that bitsandbytes quantized to NF4: read, exported with their own codes, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError, ConfigError, RequestError
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.exporters.quantization.options import QuantizationOptions
from gemma_deploy.model import GemmaForCausalLM

Tensors = dict[str, npt.NDArray[Any]]

BLOCK = 64
NESTED_BLOCK = 256
# bitsandbytes' quant_map, as its 0.50.2 writes it.
VALUES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
UP = "model.layers.1.mlp.up_proj.weight"

# What bitsandbytes 0.50.2 (quantize_4bit, blocksize 64) makes of sin(0), ..., sin(255) as [2, 128],
# the second row times 3; and what its dequantize_4bit gives back at both ends.
RECORDED_CODES = bytes.fromhex(
    "7ef9104efc202cfe4019fe7106efa103dfd301bfe5017ef9104efc202cfd4019"
    "fe7006efa103dfd301bfe5017ef8104efb202cfd4019fe7006efa103dfc201bf"
    "e5018ff8105efb202cfd4019fe6006efa103dfc202bfe5018ff8105efb202cfd"
    "301afe6006ef9104dfc202bfe5018ff8105efb102cfd301afe6007ef9104dfc2"
)
RECORDED_ABSMAX = [0.9999902248382568, 0.9995201826095581, 2.9950361251831055, 2.9964499473571777]
RECORDED_HEAD = [0.0, 0.722949743270874, 0.9999902248382568, 0.1609286218881607]
RECORDED_TAIL = [1.6858537197113037, 2.9964499473571777, 1.3205649852752686, -1.5733550786972046]
# The same with double quantization: scales' codes, their map's only used entries, the rest.
RECORDED_NESTED_CODES = [0, 0, 255, 255]
RECORDED_NESTED_ENDS = (-0.992968738079071, 1.0)
RECORDED_NESTED_ABSMAX = [0.9987008571624756]
RECORDED_OFFSET = 1.9977490901947021
RECORDED_NESTED_HEAD = [0.0, 0.7273454666137695, 1.0060703754425049, 0.1619071066379547]


def _state(shape: tuple[int, ...], /, **more: Any) -> npt.NDArray[np.uint8]:
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(shape)}
    return np.frombuffer(json.dumps(state | more).encode(), np.uint8)


def _quantized(weight: npt.NDArray[np.float32], is_nested: bool) -> tuple[Tensors, Tensors]:
    """Return the parts by suffix, and under "" the matrix they stand for."""
    blocks = weight.reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(1)
    nearest = np.abs(blocks[..., None] / absmax[:, None, None] - VALUES).argmin(-1)
    codes = nearest.reshape(-1).astype(np.uint8)
    parts: Tensors = {"": (codes[::2] << 4 | codes[1::2])[:, None], ".quant_map": VALUES}
    nested: dict[str, Any] = {}
    if is_nested:
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        offset = np.float32(absmax.mean())
        groups = [
            absmax[i : i + NESTED_BLOCK] - offset for i in range(0, len(absmax), NESTED_BLOCK)
        ]
        outer = np.array([np.abs(group).max() for group in groups], np.float32)
        each = np.repeat(outer, NESTED_BLOCK)[: len(absmax)]
        scale_codes = np.abs(((absmax - offset) / each)[:, None] - table).argmin(1)
        absmax = table[scale_codes] * each + offset
        parts |= {".absmax": scale_codes.astype(np.uint8), ".nested_absmax": outer}
        parts[".nested_quant_map"] = table
        nested = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        nested["nested_offset"] = float(offset)
    else:
        parts[".absmax"] = absmax
    parts[".quant_state.bitsandbytes__nf4"] = _state(weight.shape, **nested)
    return parts, {"": (VALUES[nearest] * absmax[:, None]).reshape(weight.shape)}


def _write(
    source: Path,
    folder: Path,
    is_nested: bool = False,
    change: Callable[[Tensors], object] = lambda _: None,
    **config: Any,
) -> Tensors:
    """Write a checkpoint's layers' matrices in NF4; return what all tensors stand for."""
    folder.mkdir(exist_ok=True)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        parts, matrix = ({"": weight}, {"": weight})
        if name.endswith("proj.weight"):
            parts, matrix = _quantized(weight, is_nested)
        stored |= {name + suffix: part for suffix, part in parts.items()}
        meant[name] = matrix[""]
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantization |= {"bnb_4bit_quant_type": "nf4"} | config
    raw = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(raw))
    return meant


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_matrices_are_what_their_codes_stand_for(
    is_nested: bool, name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    meant = _write(tiny_checkpoint(name), tmp_path, is_nested)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.nf4_block_sizes == {
        x: BLOCK for x in checkpoint.tensors if x.endswith("proj.weight")
    }
    model = GemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for tensor in checkpoint.nf4_block_sizes:
        ours = model.get_parameter(tensor).detach().numpy()
        np.testing.assert_allclose(ours, meant[tensor], rtol=1e-6, atol=1e-9)
    # Rows in the middle: their blocks of scales do not begin at 0.
    into = bytearray(3 * checkpoint.tensors[UP].row_bytes)
    checkpoint.read_rows(UP, 5, 8, memoryview(into))
    rows = np.frombuffer(into, np.float32).reshape(3, -1)
    np.testing.assert_allclose(rows, meant[UP][5:8], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("is_nested", [False, True])
def test_recorded_bytes_of_bitsandbytes(
    is_nested: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    head = RECORDED_NESTED_HEAD if is_nested else RECORDED_HEAD

    def put_recorded(stored: Tensors) -> None:
        # A matrix of two rows of 128 has as many elements as four rows of 64, which this one has.
        prefix = "model.layers.0.mlp.up_proj.weight"
        codes = stored[prefix].copy()
        codes[: len(RECORDED_CODES), 0] = np.frombuffer(RECORDED_CODES, np.uint8)
        stored[prefix] = codes
        absmax = stored[f"{prefix}.absmax"].copy()
        absmax[:4] = RECORDED_NESTED_CODES if is_nested else RECORDED_ABSMAX
        stored[f"{prefix}.absmax"] = absmax
        if is_nested:
            table = stored[f"{prefix}.nested_quant_map"].copy()
            table[[0, 255]] = RECORDED_NESTED_ENDS
            stored[f"{prefix}.nested_quant_map"] = table
            stored[f"{prefix}.nested_absmax"] = np.array(RECORDED_NESTED_ABSMAX, np.float32)
            nested = {"nested_blocksize": NESTED_BLOCK, "nested_offset": RECORDED_OFFSET}
            state = _state((128, 64), **nested)
            stored[f"{prefix}.quant_state.bitsandbytes__nf4"] = state

    _write(tiny_checkpoint("gemma3"), tmp_path, is_nested, put_recorded)
    checkpoint = Checkpoint.open(tmp_path)
    into = bytearray(4 * 64 * 4)
    checkpoint.read_rows("model.layers.0.mlp.up_proj.weight", 0, 4, memoryview(into))
    values = np.frombuffer(into, np.float32)
    np.testing.assert_allclose(values[:4], head, rtol=1e-6)
    np.testing.assert_allclose(values[-4:], RECORDED_TAIL, rtol=1e-6)


@pytest.mark.slow
def test_export_keeps_the_codes_bit_for_bit(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, folder = tmp_path / "checkpoint", tmp_path / "bundle"
    _write(tiny_checkpoint("gemma3"), source, is_nested=True)
    bundle = export_checkpoint(source, folder, graphs=["onnxruntime"])
    stored, written = (load_file(x) for x in (source / "model.safetensors", bundle.weights_path))
    for name in Checkpoint.open(source).nf4_block_sizes:
        assert str(bundle.manifest.formats[name]) == f"nf4/{BLOCK}"
        np.testing.assert_array_equal(written[name].reshape(-1, 1), stored[name])
    with pytest.raises(RequestError, match=r"quantized already .*keeps its codes"):
        export_checkpoint(source, tmp_path / "again", quantization=QuantizationOptions())


def _without(suffix: str) -> Callable[[Tensors], object]:
    return lambda stored: stored.pop(UP + suffix)


def _with(suffix: str, value: npt.NDArray[Any]) -> Callable[[Tensors], object]:
    return lambda stored: stored.update({UP + suffix: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(".absmax"), r"lacks .*up_proj.weight.absmax"),
        (_without(".quant_map"), r"lacks .*up_proj.weight.quant_map"),
        (
            _with(".absmax", np.ones(5, np.float32)),
            r"absmax .* F32 of 20 bytes, expected 512 bytes",
        ),
        (
            _with("", np.zeros((7, 1), np.uint8)),
            r"up_proj.weight .* U8 of 7 bytes, expected 4096 bytes",
        ),
        (
            _with(".quant_state.bitsandbytes__nf4", _state((64, 128))),
            r"NF4 of shape \[64, 128\], expected \[128, 64\]",
        ),
        (
            _with(".quant_state.bitsandbytes__nf4", np.frombuffer(b"{nonsense", np.uint8)),
            r"quant_state.bitsandbytes__nf4 in .* cannot be read as JSON: Expecting property name",
        ),
        (
            _with(".quant_state.bitsandbytes__nf4", _state((128, 64), quant_type="fp4")),
            r"quant_type 'fp4'; .* only nf4 is read",
        ),
        (
            _with(".absmax", np.ones(128, np.float64)),
            r"absmax .* is F64, expected F32 or F16 or BF16",
        ),
        (_with(".absmax", np.ones(128, np.uint8)), r"absmax .* is U8, expected F32 or F16 or BF16"),
        (_with(".quant_map", np.ones(16, np.int32)), r"quant_map .* is I32, expected F32 or F16"),
    ],
)
def test_broken_parts_are_named(
    change: Callable[[Tensors], object],
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    _write(tiny_checkpoint("gemma3"), tmp_path, change=change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


_NESTED = {"nested_blocksize": NESTED_BLOCK, "nested_offset": 0.5}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        *(
            ({"blocksize": size}, rf"blocksize is {found}, expected a whole number from 1 to 4,096")
            for size, found in [
                (0, "0"),
                (-64, "-64"),
                (10**10, "10000000000"),
                (10**30, "10{30}"),
                (10**400, r"10{79}… \(401 characters\)"),
                (64.5, "64.5"),
                (64.0, "64.0"),
                (True, "True"),
                ("64", "'64'"),
                (None, "None"),
                ([64], r"\[64\]"),
                (float("inf"), "inf"),
                (float("nan"), "nan"),
            ]
        ),
        (_NESTED | {"nested_blocksize": 0}, "nested_blocksize is 0, expected a whole number"),
        (
            _NESTED | {"nested_blocksize": 10**30},
            "nested_blocksize is 10{30}, expected a whole number",
        ),
        *(
            (
                _NESTED | {"nested_offset": offset},
                rf"nested_offset is {found}, expected a (finite )?number",
            )
            for offset, found in [
                (float("nan"), "nan"),
                (float("-inf"), "-inf"),
                (1e300, r"1e\+300"),
                (10**400, r"10{79}… \(401 characters\)"),
                ("1", "'1'"),
                (None, "None"),
            ]
        ),
        ({"nested_blocksize": NESTED_BLOCK}, "it lacks nested_offset"),
        ({"shape": [128, -64]}, r"NF4 of shape \[128, -64\], expected \[128, 64\]"),
        ({"shape": [128]}, r"NF4 of shape \[128\], expected \[128, 64\]"),
        ({"shape": [10**400, 1]}, r"shape\[0\] is 10{79}… .* expected an integer"),
        ({"shape": "128"}, "shape is '128', expected (a list|an integer)"),
        ({"shape": 8192}, "shape is 8192, expected (a list|an integer)"),
        ({"shape": [128.0, 64]}, r"shape\[0\] is 128.0, expected (a list|an integer)"),
        ({"quant_type": ["nf4"]}, r"says quant_type \['nf4'\]; .* only nf4 is read"),
    ],
)
def test_states_that_cannot_be(
    entries: dict[str, Any],
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    state = _state((128, 64), **entries)
    change = _with(".quant_state.bitsandbytes__nf4", state)
    _write(
        tiny_checkpoint("gemma3"), tmp_path, is_nested="nested_blocksize" in entries, change=change
    )
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["quant_type", "blocksize", "shape"])
def test_states_that_lack_something(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    state = json.loads(_state((128, 64)).tobytes())
    del state[name]
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    change = _with(".quant_state.bitsandbytes__nf4", raw)
    _write(tiny_checkpoint("gemma3"), tmp_path, change=change)
    with pytest.raises(CheckpointError, match=f"cannot be used: it lacks {name}. Expected JSON"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"[1]", "holds a list"),
        (b"nf4", "cannot be read as JSON: Expecting value"),
        (b"\xff\xfe", "cannot be read as JSON: "),
        (b"[" * 200_000, "objects and lists are nested deeper"),
        (b" " * 2_000_000, "it has 2000000 bytes"),
    ],
)
def test_states_that_are_no_object(
    raw: bytes, message: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    change = _with(".quant_state.bitsandbytes__nf4", np.frombuffer(raw, np.uint8))
    _write(tiny_checkpoint("gemma3"), tmp_path, change=change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


_NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def _narrow(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Store all scales and maps in a narrow dtype; return what the matrices then stand for."""
    stored = load_torch_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        if name.endswith(_FLOAT_PARTS) and tensor.is_floating_point():
            stored[name] = tensor.to(dtype)
    save_torch_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    marker = ".quant_state.bitsandbytes__nf4"
    names = [name.removesuffix(marker) for name in stored if name.endswith(marker)]
    return {name: _dequantized(stored, name) for name in names}


def _dequantized(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the matrix that parts stand for, in float64."""
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    packed = stored[name].flatten().long()
    codes = torch.stack((packed // 16, packed % 16), dim=-1).flatten()
    scales = stored[f"{name}.absmax"]
    if "nested_blocksize" in state:
        outer = stored[f"{name}.nested_absmax"].double().repeat_interleave(NESTED_BLOCK)
        inner = stored[f"{name}.nested_quant_map"].double()[scales.long()]
        scales = inner * outer[: len(inner)] + state["nested_offset"]
    values = stored[f"{name}.quant_map"].double()[codes]
    return (values * scales.double().repeat_interleave(BLOCK)).reshape(state["shape"])


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_and_maps_in_16_bits(
    dtype: str, is_nested: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    _write(tiny_checkpoint("gemma3"), tmp_path, is_nested)
    meant = _narrow(tmp_path, _NARROW[dtype])
    model = GemmaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, expected in meant.items():
        ours = model.get_parameter(name).detach().double()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_export_of_scales_in_16_bits(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source, folder = tmp_path / "checkpoint", tmp_path / "bundle"
    _write(tiny_checkpoint("gemma3"), source)
    meant = _narrow(source, torch.bfloat16)
    bundle = export_checkpoint(source, folder, graphs=["onnxruntime"])
    stored, written = (
        load_torch_file(x) for x in (source / "model.safetensors", bundle.weights_path)
    )
    assert meant
    for name in meant:
        assert torch.equal(written[name].reshape(-1, 1), stored[name])
        scales = written[f"{name}.scales"].flatten().double()
        # In float16, whose 11 bits hold a bfloat16's 8; the map's largest value is 1.
        assert torch.equal(scales, stored[f"{name}.absmax"].double())


@pytest.mark.parametrize(
    "config",
    [{"bnb_4bit_quant_type": "fp4"}, {"load_in_4bit": False}, {"quant_method": "gptq"}],
)
def test_other_quantizations_are_refused(
    config: dict[str, Any], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    _write(tiny_checkpoint("gemma3"), tmp_path, **config)
    with pytest.raises(ConfigError, match=r"already quantized .* only bitsandbytes' NF4 is read"):
        Checkpoint.open(tmp_path)
