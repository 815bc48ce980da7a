import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file

from gemma_deploy import api
from gemma_deploy.cli.verification import describe_parity
from gemma_deploy.cli.verification_graphs import GraphChoice
from gemma_deploy.engine_build import Attention
from gemma_deploy.file_records import record_file
from gemma_deploy.graph_spec import LOWERINGS
from gemma_deploy.parity import ParityCounter


@pytest.fixture(scope="module")
def narrow_checkpoint(bundle_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in bfloat16, so that its bundle's weights are not rounded any further."""
    folder = tmp_path_factory.mktemp("narrow") / "checkpoint"
    shutil.copytree(bundle_checkpoint, folder)
    tensors = load_torch_file(folder / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def narrow(narrow_checkpoint: Path) -> Path:
    """Its bundle, with every lowering."""
    folder = narrow_checkpoint.with_name("bundle")
    return api.export(narrow_checkpoint, folder, graphs=LOWERINGS).folder


class TestWholeBundle:
    def test_passes(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("verify", bundle)

        assert result.exit_code == 0
        names = [line.split(":")[0] for line in result.stdout.splitlines()]
        assert names == [
            f"ok    {name}" for name in ("manifest", "hashes", "weights", "tokenizer", "graphs")
        ]

    def test_agrees_with_its_checkpoint_by_every_walk(
        self, invoke: Callable[..., Result], bundle: Path, bundle_checkpoint: Path
    ) -> None:
        result = invoke("verify", bundle, "--checkpoint", bundle_checkpoint, "--json")

        report = json.loads(result.stdout)
        parity = {c["name"]: c["parity"] for c in report["checks"] if c["parity"]}
        assert result.exit_code == 0
        assert report["ok"] is True
        assert list(parity) == [
            "parity, prefill graph, whole text",
            "parity, prefill graph, in chunks",
            "parity, decode graph, token by token",
            "parity, both graphs, ragged batch",
            "parity, prefill graph, ragged batch in chunks",
        ]
        for figures in parity.values():
            assert 0 < figures["max_abs_difference"] <= figures["tolerance"]
            assert figures["greedy_agreement"] == 1
        assert parity["parity, prefill graph, whole text"]["positions"] == 256

    def test_without_tokenizer_reads_any_tokens(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        bare = shutil.copytree(bundle, tmp_path / "bare")
        manifest = json.loads((bare / "manifest.json").read_text())
        for name in manifest["tokenizer"]:
            del manifest["files"][name]
            (bare / name).unlink()
        (bare / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": []}))

        result = invoke("verify", bare, "--checkpoint", bundle_checkpoint)

        assert result.exit_code == 0, result.stdout
        assert "tokenizer: none: only token ids can be given" in result.stdout
        assert "ok    checkpoint: 256 tokens are read, 256 positions of them" in result.stdout
        assert result.stdout.count("ok    parity, ") == 5

    def test_names_tokens_that_the_model_has_no_embedding_of(
        self, invoke: Callable[..., Result], bundle: Path, tmp_path: Path
    ) -> None:
        changed = Path(shutil.copytree(bundle, tmp_path / "changed"))
        path = changed / "tokenizer.json"
        raw = json.loads(path.read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        image = {"id": 512, "content": "<image_soft_token>", "special": True, **flags}
        path.write_text(json.dumps({**raw, "added_tokens": [*raw["added_tokens"], image]}))
        manifest = json.loads((changed / "manifest.json").read_text())
        manifest["files"][path.name] = dataclasses.asdict(record_file(path))
        (changed / "manifest.json").write_text(json.dumps(manifest))

        result = invoke("verify", changed)

        assert result.exit_code == 0, result.stdout
        assert "513 tokens, 512 in the model; the model has no embedding of <image_soft" in (
            result.stdout
        )

    def test_reads_a_text_of_ones_own(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        (tmp_path / "text").write_text("A text of my own, with a number: 42. " * 3)

        result = invoke(
            "verify",
            bundle,
            "--checkpoint",
            bundle_checkpoint,
            "--text",
            tmp_path / "text",
            "--tokens",
            20,
        )

        assert result.exit_code == 0
        assert "of 20 positions" in result.stdout

    def test_compares_as_many_positions_as_memory_allows(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        limit_bytes = 20 * 512 * 4
        monkeypatch.setattr("gemma_deploy.cli.verification_rows._MAX_LOGITS_BYTES", limit_bytes)

        result = invoke("verify", bundle, "--checkpoint", bundle_checkpoint, "--tokens", 600)

        assert result.exit_code == 0, result.stdout
        assert "600 tokens are read, 20 positions of them compared" in result.stdout
        assert result.stdout.count("of 20 positions") == 3


class TestOtherGraphs:
    @pytest.mark.parametrize("attention", [None, "native", "plugin"])
    def test_tensorrt_graphs_agree_and_it_is_said_what_ran(
        self,
        attention: str | None,
        invoke: Callable[..., Result],
        narrow: Path,
        narrow_checkpoint: Path,
    ) -> None:
        options = [] if attention is None else ["--attention", attention]
        result = invoke(
            "verify", narrow, "--checkpoint", narrow_checkpoint, "--graph", "tensorrt", *options
        )

        assert result.exit_code == 0, result.stdout
        assert result.stdout.count("ok    parity, ") == 5
        assert "NO TensorRT kernel ran: ONNX Runtime computes in float32" in result.stdout
        assert f"with attention {attention or 'auto'}" in result.stdout
        is_assumed = "taken from its documentation" in result.stdout
        assert is_assumed is (attention != "plugin")

    @pytest.mark.parametrize(
        ("attention", "softcap", "window", "is_assumed"),
        [
            ("auto", None, None, True),
            ("native", None, None, True),
            ("plugin", None, None, False),
            ("auto", 50.0, None, False),
            ("auto", None, 8, False),
            ("native", None, 8, False),  # by a mask
        ],
    )
    def test_only_layers_by_length_rest_on_the_documentation(
        self, attention: Attention, softcap: float | None, window: int | None, *, is_assumed: bool
    ) -> None:
        config: Any = SimpleNamespace(
            attn_logit_softcapping=softcap, num_hidden_layers=2, window_of=lambda _layer: window
        )
        session: Any = SimpleNamespace(device=SimpleNamespace(kind="cpu"))
        graphs = GraphChoice(lowering="tensorrt", attention=attention, device="cpu", threads=None)

        said = graphs.describe(config, session)

        assert "NO TensorRT kernel ran: ONNX Runtime computes in float32" in said
        assert ("taken from its documentation" in said) is is_assumed

    def test_portable_graphs_agree(
        self, invoke: Callable[..., Result], narrow: Path, narrow_checkpoint: Path
    ) -> None:
        result = invoke("verify", narrow, "--checkpoint", narrow_checkpoint, "--graph", "portable")

        assert result.exit_code == 0, result.stdout
        assert result.stdout.count("ok    parity, ") == 5
        assert "TensorRT" not in result.stdout

    def test_other_weights_under_the_right_hash(
        self,
        invoke: Callable[..., Result],
        narrow: Path,
        narrow_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        tampered = shutil.copytree(narrow, tmp_path / "tampered")
        tamper(tampered, "model.norm.scale", factor=1.2)

        result = invoke(
            "verify", tampered, "--checkpoint", narrow_checkpoint, "--graph", "tensorrt"
        )

        assert result.exit_code == 1
        assert "ok    graphs" in result.stdout
        assert result.stdout.count("FAIL  parity, ") == 5

    def test_a_graph_that_computes_in_another_dtype(
        self, invoke: Callable[..., Result], narrow: Path, tmp_path: Path
    ) -> None:
        """Rewritten to float32, it would pass for the graph it should be."""
        changed = shutil.copytree(narrow, tmp_path / "changed")
        path = changed / "decode.tensorrt.onnx"
        model = onnx.load(path, load_external_data=False)
        for value in model.graph.input:
            if value.name.startswith("past_key_values"):
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
        path.write_bytes(model.SerializeToString())
        rerecord(path)

        result = invoke("verify", changed, "--graph", "tensorrt")

        assert result.exit_code == 1
        assert "past_key_values.0.key is float16; expected bfloat16" in result.stdout

    def test_graphs_that_are_not_there(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("verify", bundle, "--graph", "portable")

        assert result.exit_code == 1
        assert "FAIL  graphs: the bundle has no portable graphs, only onnxruntime" in result.stdout
        assert "--graphs portable" in result.stdout

    def test_tensorrt_graphs_of_a_float32_bundle(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        result = invoke("verify", bundle, "--graph", "tensorrt")

        assert result.exit_code == 1
        assert "FAIL  graphs: the bundle is in float32" in result.stdout
        assert "--fp16" in result.stdout

    def test_on_another_device(self, invoke: Callable[..., Result], narrow: Path) -> None:
        result = invoke("verify", narrow, "--graph", "portable", "--device", "cuda")

        assert result.exit_code == 2
        assert "portable graphs are checked on the CPU" in result.stderr

    def test_attention_of_graphs_that_have_no_choice(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        result = invoke("verify", bundle, "--attention", "native")

        assert result.exit_code == 2
        assert "give --graph tensorrt too" in result.stderr


class TestDamage:
    def test_a_tolerance_that_rounding_passes(
        self, invoke: Callable[..., Result], bundle: Path, bundle_checkpoint: Path
    ) -> None:
        result = invoke("verify", bundle, "--checkpoint", bundle_checkpoint, "--tolerance", "1e-9")

        assert result.exit_code == 1
        assert result.stdout.count("FAIL  parity, ") == 5

    def test_a_changed_file(
        self, invoke: Callable[..., Result], bundle: Path, tmp_path: Path
    ) -> None:
        changed = shutil.copytree(bundle, tmp_path / "changed")
        text = (changed / "tokenizer_config.json").read_text()
        (changed / "tokenizer_config.json").write_text(text.replace("true", "TRUE"))

        result = invoke("verify", changed)

        assert result.exit_code == 1
        assert "ok    manifest" in result.stdout
        assert "FAIL  hashes: tokenizer_config.json changed since they were made" in result.stdout
        assert "graphs" not in result.stdout

    def test_a_missing_file(
        self, invoke: Callable[..., Result], bundle: Path, tmp_path: Path
    ) -> None:
        broken = shutil.copytree(bundle, tmp_path / "broken")
        (broken / "decode.onnx").unlink()

        result = invoke("verify", broken, "--json")

        report = json.loads(result.stdout)
        assert result.exit_code == 1
        assert report["ok"] is False
        assert "decode.onnx is missing" in report["checks"][0]["detail"]

    @pytest.mark.parametrize(
        "tensor", ["model.layers.1.self_attn.v_proj.weight", "model.norm.scale"]
    )
    def test_other_weights_under_the_right_hash(
        self,
        tensor: str,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        tampered = shutil.copytree(bundle, tmp_path / "tampered")
        tamper(tampered, tensor)

        result = invoke("verify", tampered, "--checkpoint", bundle_checkpoint)

        assert result.exit_code == 1
        assert "ok    graphs" in result.stdout
        assert result.stdout.count("FAIL  parity, ") == 5

    def test_logits_that_are_not_finite(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        tampered = shutil.copytree(bundle, tmp_path / "tampered")
        tamper(tampered, "model.norm.scale", factor=np.nan)

        result = invoke("verify", tampered, "--checkpoint", bundle_checkpoint, "--json")

        report = json.loads(result.stdout, parse_constant=pytest.fail)
        parity = report["checks"][-1]["parity"]
        assert result.exit_code == 1
        assert parity["non_finite_positions"] == parity["positions"]
        assert parity["max_abs_difference"] is None
        assert "the weights or a graph are damaged" in report["checks"][-1]["detail"]

    def test_overflow_in_float16_names_its_remedy(self) -> None:
        counter = ParityCounter(1.0)
        counter.add(np.zeros((2, 3)), np.array([[0, 0, 0], [0, np.inf, 0]]))

        detail = describe_parity(counter.report(), "float16")

        assert detail.startswith("logits are NaN or infinite at 1 of 2 positions: ")
        assert "export with --bf16 or --fp32" in detail

    def test_a_decode_graph_of_its_own(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        tampered = shutil.copytree(bundle, tmp_path / "tampered")
        tamper_attention_scale(tampered, "decode.onnx")

        result = invoke("verify", tampered, "--checkpoint", bundle_checkpoint)

        assert result.exit_code == 1
        assert "ok    parity, prefill graph, whole text" in result.stdout
        assert "ok    parity, prefill graph, in chunks" in result.stdout
        assert "FAIL  parity, decode graph, token by token" in result.stdout
        assert "FAIL  parity, both graphs, ragged batch" in result.stdout

    def test_a_file_that_cannot_be_read(
        self, invoke: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path, _on_bytes: object) -> str:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr("gemma_deploy.file_records.sha256_of", refuse)

        result = invoke("verify", bundle)

        assert result.exit_code == 1
        assert "ok    manifest" in result.stdout
        assert f"FAIL  hashes: {bundle}/" in result.stdout
        assert "cannot be used: Permission denied" in result.stdout

    def test_not_a_bundle(self, invoke: Callable[..., Result], bundle_checkpoint: Path) -> None:
        result = invoke("verify", bundle_checkpoint)

        assert result.exit_code == 2
        assert "run `gemma-deploy export` on it first" in result.stderr


class TestRequests:
    def test_another_checkpoint(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        tiny_checkpoint: Callable[..., Path],
    ) -> None:
        result = invoke("verify", bundle, "--checkpoint", tiny_checkpoint("gemma1-h256"))

        assert result.exit_code == 1
        assert "FAIL  checkpoint: " in result.stdout
        assert "is not what" in result.stdout

    def test_a_checkpoint_that_is_not_there(
        self, invoke: Callable[..., Result], bundle: Path, tmp_path: Path
    ) -> None:
        result = invoke("verify", bundle, "--checkpoint", tmp_path / "nowhere")

        assert result.exit_code == 2
        assert "nowhere does not exist; expected a checkpoint" in result.stderr

    def test_a_tolerance_for_nothing(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("verify", bundle, "--tolerance", "1")

        assert result.exit_code == 2
        assert "give --checkpoint too" in result.stderr

    @pytest.mark.parametrize("tolerance", ["nan", "inf"])
    def test_a_tolerance_that_is_no_number(
        self, tolerance: str, invoke: Callable[..., Result], bundle: Path, bundle_checkpoint: Path
    ) -> None:
        result = invoke(
            "verify", bundle, "--checkpoint", bundle_checkpoint, "--tolerance", tolerance
        )

        assert result.exit_code == 2
        assert f"--tolerance is {tolerance}; expected a finite number" in result.stderr

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"short", "at least 16 are needed"), (b"\xff\xfe", "is not UTF-8 text")],
    )
    def test_a_text_that_cannot_be_used(
        self,
        content: bytes,
        message: str,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        (tmp_path / "text").write_bytes(content)

        result = invoke(
            "verify", bundle, "--checkpoint", bundle_checkpoint, "--text", tmp_path / "text"
        )

        assert result.exit_code == 2
        assert message in result.stderr


def tamper(bundle: Path, tensor: str, *, factor: float = 1.02) -> None:
    """Multiply a tensor and make the manifest agree with the file."""
    path = bundle / "weights.safetensors"
    tensors = load_file(path)
    size = path.stat().st_size
    raw = bytearray(path.read_bytes())
    old = tensors[tensor].tobytes()
    start = bytes(raw).index(old)
    raw[start : start + len(old)] = (tensors[tensor] * np.float32(factor)).tobytes()
    path.write_bytes(raw)
    assert path.stat().st_size == size
    rerecord(path)


def tamper_attention_scale(bundle: Path, graph: str) -> None:
    """Scale attention in one graph by half as much again, and make the manifest agree."""
    path = bundle / graph
    model = onnx.load(path, load_external_data=False)
    scales = [
        attribute
        for node in model.graph.node
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute
        if attribute.name == "scale"
    ]
    assert scales
    for attribute in scales:
        attribute.f *= 1.5
    path.write_bytes(model.SerializeToString())
    rerecord(path)


def rerecord(path: Path) -> None:
    """Make the manifest beside a file agree with it."""
    manifest_file = path.with_name("manifest.json")
    manifest = json.loads(manifest_file.read_text())
    manifest["files"][path.name] = dataclasses.asdict(record_file(path))
    manifest_file.write_text(json.dumps(manifest))
