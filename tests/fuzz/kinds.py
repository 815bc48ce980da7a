"""The kinds of files that are read: how a right one is made, changed, and what a command does with it."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import (
    Mutation,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_onnx,
    mutated_safetensors,
    mutated_template,
)

_SAMPLE = Path(__file__).parents[2] / "samples" / "tiny-gemma"
_MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hi <end_of_turn>"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
]
_NF4_STATE = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Kind:
    """A file and its reader.

    Attributes:
        fixture: The folder that a right one lies in, below that of the fixtures.
        file: Its path there.
        mutate: What changes it.
        read: Does with the folder what a command does; returns, or raises.
        manifest: The file that states its size, to be told of the new one.
    """

    fixture: str
    file: str
    mutate: Mutation
    read: Callable[[Path], object]
    manifest: str | None = None


def build_fixtures(root: Path) -> None:
    """Write the folders that the kinds name."""
    import numpy as np
    from safetensors.numpy import save_file

    from gemma_deploy.checkpoint import expected_tensors
    from gemma_deploy.config import GemmaConfig
    from gemma_deploy.exporters.export import export_checkpoint

    raw = json.loads((_SAMPLE / "config.json").read_text()) | {
        "dtype": "float32",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 16,
        "rope_theta": 10000.0,
    }
    draw = np.random.default_rng(0)
    shapes = expected_tensors(GemmaConfig.from_dict(raw))
    weights = {x: draw.normal(0, 0.1, shape).astype(np.float32) for x, shape in shapes.items()}
    checkpoint = root / "checkpoint"
    _write_checkpoint(checkpoint, raw)
    save_file(weights, checkpoint / "model.safetensors")
    (checkpoint / "special_tokens_map.json").write_text('{"bos_token": {"content": "<bos>"}}')
    (checkpoint / "added_tokens.json").write_text('{"<bos>": 2}')

    sharded = root / "sharded"
    _write_checkpoint(sharded, raw)
    save_file(weights, sharded / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    for name, text in (("jinja", None), ("template", "json")):
        folder = root / name
        shutil.copytree(checkpoint, folder)
        source = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        if text is None:
            (folder / "chat_template.jinja").write_text(source)
        else:
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": source}))

    _write_nf4(root / "nf4", raw, weights)
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma"}')
    export_checkpoint(checkpoint, root / "bundle", dtype="float16")
    _add_choices(root / "bundle")
    _write_engine(root / "engine")
    _write_small_files(root)


def _write_checkpoint(folder: Path, raw: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(_SAMPLE / name, folder / name)
    (folder / "config.json").write_text(json.dumps(raw))


def _write_nf4(folder: Path, raw: dict[str, Any], weights: dict[str, Any]) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    }
    _write_checkpoint(folder, raw | {"quantization_config": quantization})
    name = "model.layers.0.mlp.up_proj.weight"
    rows, columns = weights[name].shape
    blocks = rows * columns // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [rows, columns]}
    nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    parts = {
        "": np.zeros((rows * columns // 2, 1), np.uint8),
        ".quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        ".absmax": np.zeros(blocks, np.uint8),
        ".nested_absmax": np.ones(-(-blocks // 256), np.float32),
        ".nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        _NF4_STATE: np.frombuffer(json.dumps(state | nested).encode(), np.uint8),
    }
    save_file(weights | {name + x: part for x, part in parts.items()}, folder / "model.safetensors")


def _add_choices(bundle: Path) -> None:
    choice = {"name": "model.layers.0.mlp.up_proj.weight", "format": "int4/32", "size_bytes": 9}
    text = json.dumps({"choices": [choice | {"kl_nats": 0.5}]})
    (bundle / "sensitivities.json").write_text(text)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["sensitivities.json"] = {"size_bytes": len(text), "sha256": ""}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _write_engine(folder: Path) -> None:
    from gemma_deploy.config import GemmaConfig
    from gemma_deploy.engine import EngineManifest, Plan
    from gemma_deploy.file_records import record_file
    from tests.engine_build import BUILD

    folder.mkdir()
    (folder / "engine.plan").write_bytes(b"plan")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(_SAMPLE / name, folder / name)
    plans = {
        phase: Plan(path="engine.plan", profile=i) for i, phase in enumerate(("prefill", "decode"))
    }
    manifest = EngineManifest(
        model=GemmaConfig(num_hidden_layers=2),
        cache_dtype="bfloat16",
        build=BUILD,
        plans=plans,  # type: ignore[arg-type]  # its keys are phases
        tokenizer=("tokenizer.json", "tokenizer_config.json"),
        generation="generation_config.json",
        model_max_seq_len=8192,
        files={path.name: record_file(path) for path in sorted(folder.iterdir())},
        versions={"python": "3.11"},
    )
    (folder / "engine.json").write_text(manifest.to_json())


def _write_small_files(root: Path) -> None:
    import torch

    from gemma_deploy.exporters.quantization.work_folder import WorkFolder
    from gemma_deploy.plugins.attention.cubins import CompiledKernel, KernelArchive
    from gemma_deploy.plugins.attention.schedule import KernelShape
    from gemma_deploy.runtime.benchmark.results import Contender, Roofline, RoundTimes

    WorkFolder(root / "work", {"a": 1}).save("layer", {"x": torch.zeros(4, 4)})
    prompts = root / "prompts"
    prompts.mkdir()
    (prompts / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "id": 3}\n')
    (prompts / "p.txt").write_text("one\ntwo\r\nthree\n")
    (root / "bench").mkdir()
    record, case = _bench_record(root / "bench")
    record.add_contender(Contender(name="gemma-deploy", description="x", load_s=1.0))
    record.add_roofline(
        Roofline(
            read_bytes_per_s=1e9,
            matrix_flop_per_s=1e9,
            weights_bytes_per_step=5,
            cache_bytes_per_token=5,
            flop_per_token=5,
        )
    )
    record.add_round(case, {"gemma-deploy": RoundTimes(ttft_s=0.1, step_s=(0.1, 0.1))})
    kernel = CompiledKernel(
        name="narrow",
        capability=89,
        symbol="attend",
        num_warps=4,
        shared_bytes=9,
        block_m=16,
        cubin=b"image",
    )
    shape = KernelShape(head_dim=256, group=2, dtype="float16", has_softcap=False)
    kernels = root / "kernels"
    kernels.mkdir()
    (kernels / "archive").write_bytes(KernelArchive(shape=shape, kernels=(kernel,)).to_bytes())
    cache = root / "prepacked"
    (cache / ("a" * 32)).mkdir(parents=True)
    entry = {"key": {"a": "b"}, "source": "x", "model_sha256": "", "data": {}, "made_at_s": 1}
    (cache / ("a" * 32) / "entry.json").write_text(json.dumps(entry))
    hub = root / "hub" / "models--org--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("1" * 40)
    shutil.copytree(root / "checkpoint", hub / "snapshots" / ("1" * 40))


def _bench_record(folder: Path) -> tuple[Any, Any]:
    from gemma_deploy.runtime.benchmark.plan import BenchPlan
    from gemma_deploy.runtime.benchmark.record import BenchRecord
    from gemma_deploy.runtime.benchmark.results import BenchCase

    case = BenchCase(prompt_tokens=4, new_tokens=3, batch_size=1)
    # The folder is another at each run, and the record holds where it is: it must not be absolute.
    plan = BenchPlan(model=Path("/model"), cases=(case,))
    return BenchRecord(plan, {}, folder / "rounds.jsonl"), case


def _read_bench(folder: Path) -> None:
    from gemma_deploy.cli.bench_tables import print_report

    with contextlib.redirect_stdout(io.StringIO()):
        print_report(_bench_record(folder)[0].report())


def _read_checkpoint(folder: Path) -> None:
    from gemma_deploy.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    for name, info in checkpoint.tensors.items():
        checkpoint.float_rows(name, 0, min(2, info.num_rows))


def _read_source(folder: Path) -> None:
    from gemma_deploy.runtime.source import ModelSource

    source = ModelSource.open(folder)
    source.generation_defaults().warn_of_ignored("file")
    json.dumps(sorted(source.eos_token_ids))


def _read_tokenizer(folder: Path) -> None:
    from gemma_deploy.tokenizer import GemmaTokenizer

    tokenizer = GemmaTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("hello <bos> there\n\n é", allow_special=False)
    tokenizer.decode(ids).encode()
    stream = tokenizer.stream()
    for token in ids:
        stream.push(token)
    tokenizer.encode_chat(_MESSAGES)
    sorted(tokenizer.end_of_turn_ids)


def _read_bundle(folder: Path) -> None:
    from gemma_deploy.inspection import inspect_folder

    json.dumps(inspect_folder(folder).to_dict())


def _read_reports(folder: Path) -> None:
    from gemma_deploy.bundle import Bundle

    bundle = Bundle.open(folder)
    bundle.choices()
    report = bundle.overflow_report()
    if report is not None:
        json.dumps(report.to_dict())
        [peak.headroom for peak in report.peaks]


def _run_bundle(folder: Path) -> None:
    import gemma_deploy

    with contextlib.closing(gemma_deploy.load(str(folder), device="cpu", threads=1)) as model:
        model.generate("a", max_new_tokens=3, ignore_eos=True)


def _load_decode_graph(folder: Path) -> None:
    """Load it as `verify` does: nothing else reads it."""
    from gemma_deploy.bundle import Bundle
    from gemma_deploy.runtime.devices import Device
    from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource, OnnxRuntimeGraph

    source = GraphSource.of(Bundle.open(folder), "decode", "onnxruntime")
    OnnxRuntimeGraph(source, Device(kind="cpu"), 1)


def _read_engine(folder: Path) -> None:
    from gemma_deploy.engine import EngineFolder
    from gemma_deploy.inspection import engine_report

    _read_source(folder)
    engine = EngineFolder.open(folder)
    json.dumps(engine_report(engine))
    engine.manifest.spec("decode")


def _read_work(folder: Path) -> None:
    from safetensors import safe_open

    from gemma_deploy.exporters.quantization.work_folder import WorkFolder

    found = WorkFolder(folder, {"a": 1}).find("layer")
    if found is not None:
        with safe_open(found, framework="pt") as file:
            list(file.keys())


def _read_prepacked(folder: Path) -> None:
    from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache

    cache = PrepackedCache(folder=folder)
    json.dumps([entry.source for entry in cache.entries()])
    cache.find({"a": "b"})


def _read_kernels(folder: Path) -> None:
    from gemma_deploy.plugins.attention.cubins import KernelArchive

    KernelArchive.from_bytes((folder / "archive").read_bytes())


def _mutated_archive(rng: random.Random, raw: bytes) -> bytes:
    """Return an archive of kernels with another list in it, and a checksum that is right."""
    import hashlib
    import zlib

    contents = zlib.decompress(raw[40:])
    size = int.from_bytes(contents[:4], "little")
    index = mutated_json(rng, contents[4 : 4 + size])
    contents = len(index).to_bytes(4, "little") + index + contents[4 + size :]
    payload = zlib.compress(contents) if rng.random() < 0.8 else mutated_bytes(rng, raw[40:])
    return raw[:8] + hashlib.sha256(payload).digest() + payload


def _mutated_state(rng: random.Random, raw: bytes) -> bytes:
    """Return a checkpoint with another quant_state."""
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    name = next(x for x in header if x.endswith(_NF4_STATE))
    start, end = header[name]["data_offsets"]
    state = mutated_json(rng, data[start:end])
    grown = len(state) - (end - start)
    for entry in header.values():
        begin, stop = entry.get("data_offsets", (0, 0))
        if begin >= end:
            entry["data_offsets"] = [begin + grown, stop + grown]
    header[name] |= {"data_offsets": [start, start + len(state)], "shape": [len(state)]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[:start] + state + data[end:]


def _read_prompts(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from gemma_deploy.cli.prompts import read_prompts

        for prompt in read_prompts((), str(folder / name)):
            prompt.encode()

    return read


def _read_hub(folder: Path) -> None:
    from gemma_deploy.hub import download

    os.environ["HF_HUB_OFFLINE"] = "1"
    _read_checkpoint(download("org/name", cache_folder=folder))


def _read_adapter(folder: Path) -> None:
    from gemma_deploy.checkpoint_files import require_checkpoint

    require_checkpoint(folder)


_MANIFEST = "manifest.json"
KINDS = {
    "config": Kind("checkpoint", "config.json", mutated_json, _read_checkpoint),
    "config-nf4": Kind("nf4", "config.json", mutated_json, _read_checkpoint),
    "generation-config": Kind("checkpoint", "generation_config.json", mutated_json, _read_source),
    "bundle-generation-config": Kind(
        "bundle", "generation_config.json", mutated_json, _read_source, _MANIFEST
    ),
    "tokenizer": Kind("checkpoint", "tokenizer.json", mutated_json, _read_tokenizer),
    "tokenizer-config": Kind("checkpoint", "tokenizer_config.json", mutated_json, _read_tokenizer),
    "special-tokens-map": Kind(
        "checkpoint", "special_tokens_map.json", mutated_json, _read_tokenizer
    ),
    "added-tokens": Kind("checkpoint", "added_tokens.json", mutated_json, _read_tokenizer),
    "chat-template-json": Kind("template", "chat_template.json", mutated_json, _read_tokenizer),
    "chat-template": Kind("jinja", "chat_template.jinja", mutated_template, _read_tokenizer),
    "safetensors": Kind("checkpoint", "model.safetensors", mutated_safetensors, _read_checkpoint),
    "index": Kind("sharded", "model.safetensors.index.json", mutated_json, _read_checkpoint),
    "quant-state": Kind("nf4", "model.safetensors", _mutated_state, _read_checkpoint),
    "adapter-config": Kind("adapter", "adapter_config.json", mutated_json, _read_adapter),
    "manifest": Kind("bundle", _MANIFEST, mutated_json, _read_bundle),
    "bundle-weights": Kind(
        "bundle", "weights.safetensors", mutated_safetensors, _read_bundle, _MANIFEST
    ),
    "prefill-graph": Kind("bundle", "prefill.onnx", mutated_onnx, _run_bundle, _MANIFEST),
    "decode-graph": Kind("bundle", "decode.onnx", mutated_onnx, _load_decode_graph, _MANIFEST),
    "overflow": Kind("bundle", "overflow.json", mutated_json, _read_reports, _MANIFEST),
    "sensitivities": Kind("bundle", "sensitivities.json", mutated_json, _read_reports, _MANIFEST),
    "engine": Kind("engine", "engine.json", mutated_json, _read_engine),
    "calibration-key": Kind("work", "calibration.json", mutated_json, _read_work),
    "calibration-layer": Kind("work", "layer.safetensors", mutated_safetensors, _read_work),
    "prepacked-entry": Kind("prepacked", f"{'a' * 32}/entry.json", mutated_json, _read_prepacked),
    "bench-record": Kind("bench", "rounds.jsonl", mutated_lines, _read_bench),
    "prompts-jsonl": Kind("prompts", "p.jsonl", mutated_lines, _read_prompts("p.jsonl")),
    "prompts-text": Kind("prompts", "p.txt", mutated_bytes, _read_prompts("p.txt")),
    "hub-reference": Kind("hub", "models--org--name/refs/main", mutated_bytes, _read_hub),
    "kernels": Kind("kernels", "archive", _mutated_archive, _read_kernels),
}


def prepared(kind: Kind, fixtures: Path, scratch: Path, source: int | str | None) -> Path:
    """Return a fresh copy of a kind's folder, its file changed.

    Args:
        kind: The kind.
        fixtures: What `build_fixtures` wrote.
        scratch: Where the copy goes.
        source: The seed of the change; or the path of what is put in the file's place; None for the
            file as it is.
    """
    folder = scratch / kind.fixture
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(fixtures / kind.fixture, folder)
    path = folder / kind.file
    if isinstance(source, int):
        path.write_bytes(kind.mutate(random.Random(source), path.read_bytes()))
    elif source is not None:
        shutil.copy(source, path)
    if kind.manifest is not None and path.name != kind.manifest:
        manifest = json.loads((folder / kind.manifest).read_text())
        manifest["files"][kind.file]["size_bytes"] = path.stat().st_size
        (folder / kind.manifest).write_text(json.dumps(manifest))
    return folder
