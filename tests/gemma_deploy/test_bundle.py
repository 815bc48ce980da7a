import dataclasses
import functools
import hashlib
import json
import operator
import os
import re
from pathlib import Path

import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.checkpoint_source import CheckpointSource
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import (
    BundleError,
    BundleVersionError,
    RequestError,
    UnsafePathError,
)
from gemma_deploy.file_records import record_file
from gemma_deploy.graph_spec import Precision
from gemma_deploy.install_hint import install_line
from gemma_deploy.limits import MAX_CONFIG_BYTES
from gemma_deploy.manifest import Manifest
from gemma_deploy.residual_scaling import ResidualScaling
from gemma_deploy.safe_paths import safe_path

FILES = {
    "prefill.onnx": b"prefill",
    "decode.onnx": b"decode",
    "weights.safetensors": bytes(range(200)),
    "tokenizer.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [1, 107]}',
    "LICENSE": b"terms",
}
UNSAFE_PATHS = [
    "/etc/passwd",
    "../outside",
    "sub/../../outside",
    "..",
    "",
    "..\\outside",
    "sub\\..\\..\\outside",
    "\\outside",
    "C:\\outside",
    "C:outside",
    "//server/share/outside",
    "zero\0byte",
    "link",
    "linked_folder/outside",
    "loop",
]

REMOVED = "<removed>"
SOURCE = CheckpointSource(config_sha256="a" * 64, headers_sha256="b" * 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle by its manifest; its graphs are never run here."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        config=GemmaConfig(vocab_size=16, num_hidden_layers=1, max_position_embeddings=64),
        precision=Precision.of("bfloat16"),
        graphs={"onnxruntime": {"prefill": "prefill.onnx", "decode": "decode.onnx"}},
        weights="weights.safetensors",
        tokenizer=("tokenizer.json",),
        generation="generation_config.json",
        max_seq_len=64,
        files={name: record_file(folder / name) for name in FILES},
        versions={"python": "3.11"},
        source=SOURCE,
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def surroundings(folder: Path) -> Path:
    """The bundle with links that lead out of it."""
    (folder.parent / "outside").write_bytes(b"secret")
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "linked_folder").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    return folder


def edit(folder: Path, where: str, value: object) -> None:
    """Change one value of the manifest; `where` is its path, keys and indexes between slashes."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = [int(key) if key.isdigit() else key for key in where.split("/")]
    target = functools.reduce(operator.getitem, parents, raw)
    if value == REMOVED:
        del target[last]
    else:
        target[last] = value
    path.write_text(json.dumps(raw), encoding="utf-8")


def test_opening_reads_back_what_was_written(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.config == GemmaConfig(
        vocab_size=16, num_hidden_layers=1, max_position_embeddings=64
    )
    assert bundle.manifest.precision == Precision(
        weights="bfloat16", activations="float32", cache="float32"
    )
    assert bundle.graph_path("prefill") == folder / "prefill.onnx"
    assert bundle.graph_path("decode") == folder / "decode.onnx"
    assert bundle.weights_path == folder / "weights.safetensors"
    assert bundle.generation_config() == {"eos_token_id": [1, 107]}
    assert bundle.manifest.max_seq_len == 64
    assert bundle.manifest.versions == {"python": "3.11"}
    assert bundle.manifest.source == SOURCE
    assert (folder / "manifest.json").read_text(encoding="utf-8") == bundle.manifest.to_json()


def test_an_older_bundle_does_not_say_what_it_was_made_of(folder: Path) -> None:
    edit(folder, "source", REMOVED)

    assert Bundle.open(folder).manifest.source is None


def with_tensorrt_graphs(folder: Path) -> Path:
    """Add the entries that a bundle with TensorRT graphs has besides."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for phase in ("prefill", "decode"):
        name = f"{phase}.tensorrt"
        (folder / f"{name}.onnx").write_bytes(name.encode())
        raw["files"][f"{name}.onnx"] = dataclasses.asdict(record_file(folder / f"{name}.onnx"))
        graph = json.loads(json.dumps(raw["graphs"][phase]))
        for tensor in (*graph["inputs"], *graph["outputs"]):
            if tensor["name"].endswith((".key", ".value")):
                tensor["dtype"] = "bfloat16"
        raw["graphs"][name] = graph | {"path": f"{name}.onnx"}
    path.write_text(json.dumps(raw), encoding="utf-8")
    return folder


def test_a_bundle_of_one_lowering_says_how_to_get_another(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest.lowerings == ("onnxruntime",)
    message = (
        "the bundle has no tensorrt graphs, only onnxruntime. Export it again: `gemma-deploy export "
        "CHECKPOINT --output BUNDLE --force --dtype bfloat16 --graphs tensorrt`"
    )
    for ask in (bundle.graph_path, bundle.manifest.spec):
        with pytest.raises(BundleError, match=re.escape(message)):
            ask("prefill", "tensorrt")
    with pytest.raises(BundleError, match="has no portable graphs"):
        bundle.manifest.precision_of("portable")


def test_a_float32_bundle_cannot_have_tensorrt_graphs() -> None:
    manifest = Manifest(
        config=GemmaConfig(vocab_size=16, num_hidden_layers=1),
        precision=Precision.of("float32"),
        graphs={"onnxruntime": {"prefill": "prefill.onnx", "decode": "decode.onnx"}},
        weights="weights.safetensors", tokenizer=(), generation=None, max_seq_len=64, files={},
        versions={},
    )  # fmt: skip
    with pytest.raises(BundleError, match=r"is in float32 .* --force --fp16` \(or --bf16\)"):
        manifest.spec("decode", "tensorrt")


def test_a_bundle_of_two_lowerings(folder: Path) -> None:
    bundle = Bundle.open(with_tensorrt_graphs(folder))
    assert bundle.manifest.lowerings == ("onnxruntime", "tensorrt")
    assert bundle.graph_path("decode", "tensorrt") == folder / "decode.tensorrt.onnx"
    assert bundle.graph_path("decode") == folder / "decode.onnx"
    assert bundle.manifest.precision_of("tensorrt") == Precision(
        weights="bfloat16", activations="bfloat16", cache="bfloat16"
    )
    for lowering, dtype in (("onnxruntime", "float32"), ("tensorrt", "bfloat16")):
        spec = bundle.manifest.spec("prefill", lowering)  # type: ignore[arg-type]  # by name
        assert {tensor.dtype for tensor in spec.cache_inputs} == {dtype}
    rewritten = json.loads(bundle.manifest.to_json())
    assert rewritten == json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "decode.tensorrt.onnx").write_bytes(b"decode.TENSORRT")
    assert bundle.changed_files() == ["decode.tensorrt.onnx"]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("graphs/decode.tensorrt", REMOVED, r"damaged \(KeyError: 'decode.tensorrt'"),
        ("graphs/decode.tensorrt/path", "other", "'other', which is not among its files"),
        ("graphs/prefill.tensorrt/inputs/3/dtype", "float16", "of the prefill.tensorrt graph"),
    ],
)
def test_a_second_lowering_that_is_damaged(
    folder: Path, where: str, value: object, message: str
) -> None:
    edit(with_tensorrt_graphs(folder), where, value)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_the_manifest_states_sizes_and_hashes(folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert raw["format_version"] == 1
    assert raw["files"] == {
        name: {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in FILES.items()
    }


def test_no_generation_config_is_an_empty_one(folder: Path) -> None:
    edit(folder, "generation", None)
    assert Bundle.open(folder).generation_config() == {}


def test_a_generation_config_that_is_no_object(folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(b"[" + b" " * 24 + b"]")
    with pytest.raises(BundleError, match=r"generation_config.json holds a list, expected a JSON"):
        Bundle.open(folder).generation_config()


def test_a_generation_config_that_is_too_large(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "generation_config.json").write_bytes(b" " * MAX_CONFIG_BYTES + b"{}")
    with pytest.raises(BundleError, match=r"generation_config.json is larger than 1,048,576 bytes"):
        bundle.generation_config()


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        Bundle.open(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not a bundle: it has no manifest.json"
    assert caught.value.exit_code == 2


def test_a_checkpoint_in_place_of_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        RequestError, match="this looks like a checkpoint: run `gemma-deploy export`"
    ):
        Bundle.open(tmp_path)


def test_a_missing_file(folder: Path) -> None:
    (folder / "LICENSE").unlink()
    with pytest.raises(
        BundleError, match=r"LICENSE is missing, the manifest says 5 bytes: the bun"
    ):
        Bundle.open(folder)


def test_a_file_of_another_size(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(bytes(199))
    with pytest.raises(
        BundleError, match=r"has 199 bytes, the manifest says 200 bytes: .* incompl"
    ):
        Bundle.open(folder)


def test_a_newer_format(folder: Path) -> None:
    edit(folder, "format_version", 2)
    message = (
        f"{folder} has bundle format 2, this gemma-deploy reads up to 1: upgrade it: get the newer "
        f"source, and {install_line()}"
    )
    with pytest.raises(BundleVersionError, match=re.escape(message)):
        Bundle.open(folder)


@pytest.mark.parametrize("version", [None, "1", 0, -1, True, 1.0])
def test_a_manifest_without_version(folder: Path, version: object) -> None:
    edit(folder, "format_version", version)
    message = (
        f"{folder / 'manifest.json'} has format_version {version!r}, expected a whole number from 1: "
        "not a gemma-deploy manifest; export the bundle again"
    )
    with pytest.raises(BundleError, match=re.escape(message)):
        Bundle.open(folder)


@pytest.mark.parametrize("limit", [-5, 0, 65, 10**9, 2.9, True, "64"])
def test_a_length_that_the_model_does_not_have(folder: Path, limit: object) -> None:
    edit(folder, "limits/max_seq_len", limit)
    message = f"max_seq_len is {limit!r}, expected a whole number from 1 to 64"
    with pytest.raises(BundleError, match=re.escape(message)):
        Bundle.open(folder)


@pytest.mark.parametrize("limit", [1, 64])
def test_a_length_that_the_model_has(folder: Path, limit: int) -> None:
    edit(folder, "limits/max_seq_len", limit)
    assert Bundle.open(folder).manifest.max_seq_len == limit


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer.model", "tokenizer_config.json"]
)
@pytest.mark.parametrize("is_link", [False, True])
def test_a_tokenizer_file_that_was_dropped_in(folder: Path, name: str, is_link: bool) -> None:
    target = folder.parent / "outside" if is_link else folder / name
    target.write_text("{}")
    if is_link:
        (folder / name).symlink_to(target)
    message = (
        f"{folder / name} is a tokenizer file that manifest.json does not list: it was not part of "
        "the export; remove it, or export the bundle again with it in the checkpoint"
    )
    with pytest.raises(BundleError, match=re.escape(message)):
        Bundle.open(folder)


def test_other_unlisted_files_are_nobody_s_business(folder: Path) -> None:
    (folder / "notes.txt").touch()
    assert Bundle.open(folder).config.vocab_size == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format_version": 1', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "holds a list, expected a JSON object"),
        (b'{"format_version": 1}', r"damaged \(KeyError: 'precision'\)"),
    ],
)
def test_a_damaged_manifest(folder: Path, content: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("precision/extra", 1),
        ("model/model_type", "llama"),
        ("limits/max_seq_len", "long"),
        ("limits/max_seq_len", float("inf")),
        ("files/LICENSE/size_bytes", "many"),
        ("files/LICENSE/sha256", REMOVED),
        ("files", []),
        ("graphs", []),
        ("tokenizer", None),
        ("versions", 3),
        ("source", "google/gemma-2b"),
        ("source/headers_sha256", REMOVED),
        ("source/commit", "main"),
        ("source/path", "/home/me/gemma"),
        ("graphs/decode", REMOVED),
        ("quantization", False),
        ("quantization", {"method": "rtn"}),
        ("quantization", {"method": 5, "formats": {}}),
        ("quantization", {"method": "rtn", "formats": {"model.embed_tokens.weight": "float16"}}),
        ("quantization", {"method": "rtn", "formats": {"model.norm.weight": "int4/32"}}),
        ("quantization", {"method": "rtn", "formats": {"unknown.weight": "int4/32"}}),
        (
            "scaling",
            ResidualScaling(
                residual=2, layers=(), has_post_norms=False, rms_norm_eps=1e-6
            ).to_dict(),
        ),
    ],
)
def test_a_manifest_with_nonsense(folder: Path, where: str, value: object) -> None:
    edit(folder, where, value)
    with pytest.raises(BundleError, match=r"manifest.json is damaged \(.*export the bundle again"):
        Bundle.open(folder)


def test_only_caches_hold_int8(folder: Path) -> None:
    edit(folder, "precision/activations", "int8")
    with pytest.raises(
        BundleError, match=r"precision\.activations is 'int8', expected one of float32"
    ):
        Bundle.open(folder)


def test_an_unknown_dtype(folder: Path) -> None:
    edit(folder, "precision/cache", "float8")
    with pytest.raises(BundleError, match=r"precision\.cache is 'float8', expected one of float32"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("precision/cache", "float16"),
        ("model/vocab_size", 17),
        ("graphs/prefill/inputs", []),
        ("graphs/prefill/inputs/0/name", "tokens"),
        ("graphs/prefill/outputs/0/dims/1", 1),
        ("graphs/prefill/outputs", REMOVED),
    ],
)
def test_graphs_of_another_model(folder: Path, where: str, value: object) -> None:
    edit(folder, where, value)
    with pytest.raises(BundleError, match="inputs and outputs of the prefill graph are not those"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("weights", "other"),
        ("tokenizer", ["other"]),
        ("generation", "../../etc/passwd"),
        ("graphs/decode/path", "/etc/passwd"),
        ("files/tokenizer.json", REMOVED),
    ],
)
def test_a_reference_to_an_unlisted_file(folder: Path, where: str, value: object) -> None:
    edit(folder, where, value)
    with pytest.raises(BundleError, match="which is not among its files: export the bundle again"):
        Bundle.open(folder)


@pytest.mark.parametrize("path", UNSAFE_PATHS)
def test_a_manifest_that_leads_out_of_the_bundle(surroundings: Path, path: str) -> None:
    manifest = surroundings / "manifest.json"
    raw = json.loads(manifest.read_text(encoding="utf-8"))
    raw["files"][path] = {"size_bytes": 6, "sha256": ""}
    manifest.write_text(json.dumps(raw), encoding="utf-8")
    message = f"manifest.json names {path!r}, which leads out of the bundle {surroundings}: refused"
    with pytest.raises(UnsafePathError, match=re.escape(message)):
        Bundle.open(surroundings)


def test_a_loop_is_refused_where_resolve_does_not_object(
    surroundings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python 3.13 on, resolving a link to itself gives the link, without an error."""
    monkeypatch.setattr(Path, "resolve", lambda path: Path(os.path.realpath(path)))
    with pytest.raises(UnsafePathError, match="leads out of the bundle"):
        safe_path(surroundings, "loop", "test")


def test_paths_that_stay_inside_are_fine(folder: Path) -> None:
    (folder / "alias").symlink_to("LICENSE")
    (folder / "sub").mkdir()
    for name in ("LICENSE", "alias", "sub/file", "..odd", "a..b"):
        assert safe_path(folder, name, "test") == folder / name


def test_a_bundle_reached_through_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert Bundle.open(link).weights_path == link / "weights.safetensors"


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    bundle = Bundle.open(folder)
    assert bundle.changed_files() == []
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    assert Bundle.open(folder).changed_files() == [name]


def test_hashing_reports_every_byte(folder: Path) -> None:
    seen: list[int] = []
    Bundle.open(folder).changed_files(seen.append)
    assert sum(seen) == sum(map(len, FILES.values()))


def test_opening_does_not_read_the_weights(folder: Path) -> None:
    """Opening checks sizes only: a sparse file of 8 TB opens at once."""
    huge_bytes = 8 << 40
    os.truncate(folder / "weights.safetensors", huge_bytes)
    edit(folder, "files/weights.safetensors/size_bytes", huge_bytes)
    assert Bundle.open(folder).manifest.files["weights.safetensors"].size_bytes == huge_bytes
