import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gemma_deploy
from gemma_deploy import hub
from gemma_deploy.errors import BackendUnavailableError, OutputExistsError, RequestError
from gemma_deploy.runtime import opening
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.tokenizer import GemmaTokenizer


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Path:
    folder = tmp_path_factory.mktemp("api") / "checkpoint"
    shutil.copytree(tiny_checkpoint("gemma3"), folder)
    GemmaTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("api") / "bundle"
    seen: list[Any] = []
    exported = gemma_deploy.export(checkpoint, str(folder), on_progress=lambda *a: seen.append(a))
    assert exported.folder == folder
    assert seen
    return folder


def test_a_bundle_says_what_its_checkpoint_says(bundle: Path, checkpoint: Path) -> None:
    tokens = []
    for path in (bundle, str(checkpoint)):
        with gemma_deploy.load(path, device="cpu") as generator:
            results = generator.generate(["one", "one two three"], max_new_tokens=24)
            tokens.append([result.token_ids for result in results])
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0][0])) > 12


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what sessions are created with from now on."""
    options: list[dict[str, Any]] = []

    def create(source: Any, *, before_load: Any, **given: Any) -> Any:
        options.append(given)
        return create_session(source, before_load=before_load, **given)

    monkeypatch.setattr(opening, "create_session", create)
    return options


def test_load_hands_its_options_on(bundle: Path, created: list[dict[str, Any]]) -> None:
    with gemma_deploy.load(bundle, "onnxruntime", "cpu", max_seq_len=33, threads=1) as generator:
        assert generator.max_seq_len == 33
        assert type(generator.session).__name__ == "OnnxRuntimeSession"
    handed_on = {"backend": "onnxruntime", "device": "cpu", "threads": 1, "max_seq_len": 33}
    assert created == [handed_on | {"prepacked_cache": None, "dtype": None}]


def test_pipeline_takes_a_folder_or_a_loaded_model(bundle: Path) -> None:
    from_folder = gemma_deploy.pipeline("text-generation", model=bundle, device="cpu", top_k=3)
    with from_folder, gemma_deploy.load(bundle) as generator:
        from_generator = gemma_deploy.pipeline(model=generator)
        options = {"max_new_tokens": 6, "do_sample": False}
        assert from_folder("one", **options) == from_generator("one", **options)


def test_pipeline_hands_its_options_on(bundle: Path, created: list[dict[str, Any]]) -> None:
    options: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu", "threads": 1}
    with gemma_deploy.pipeline(model=bundle, max_seq_len=33, top_k=3, **options) as pipeline:
        assert pipeline.generator.max_seq_len == 33
    assert created == [{**options, "max_seq_len": 33, "prepacked_cache": None, "dtype": None}]


def test_both_hand_on_where_packed_weights_are_kept(
    bundle: Path, created: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "prepacked"
    gemma_deploy.load(bundle, device="cpu", prepacked_cache=str(folder)).close()
    gemma_deploy.pipeline(model=bundle, device="cpu", prepacked_cache=folder).generator.close()
    assert [options["prepacked_cache"] for options in created] == [folder, folder]
    assert len(list(folder.iterdir())) == 1


def test_pipeline_runs_as_transformers_users_call_it(checkpoint: Path) -> None:
    pipe = gemma_deploy.pipeline(
        task="text-generation", model=str(checkpoint), dtype=torch.bfloat16, device_map="auto"
    )
    with pipe:
        assert pipe.generator.session.dtype == "bfloat16"  # type: ignore[attr-defined]  # torch's
        (output,) = pipe("LLMs generate text through a process known as", max_new_tokens=5)
        assert output["generated_text"].startswith("LLMs generate text through")


def test_pipeline_downloads_what_is_no_folder(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(repo_id: str, **_: Any) -> Path:
        asked.append(repo_id)
        return checkpoint

    monkeypatch.setattr(hub, "download", download)
    with gemma_deploy.pipeline(model="google/gemma-2b", device="cpu") as pipe:
        assert type(pipe.generator.session).__name__ == "TorchSession"
    assert asked == ["google/gemma-2b"]
    for path in ("./google/gemma-2b", "build/bundle", "/google/gemma-2b", "tests/gemma-2b"):
        with pytest.raises(RequestError, match=r"does not exist; expected the folder[^.]*$"):
            gemma_deploy.pipeline(model=path)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "place",
    [
        {"device": -1},
        {"device": "cpu"},
        {"device": torch.device("cpu")},
        {"device_map": "auto"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": {"": -1}},
    ],
)
def test_pipeline_is_placed_as_in_transformers(bundle: Path, place: dict[str, Any]) -> None:
    with gemma_deploy.pipeline(model=bundle, **place) as pipe:
        assert str(pipe.device) == "cpu"


@pytest.mark.parametrize("dtype", [None, "auto", "float32", "torch.float32", torch.float32])
def test_a_bundle_agrees_with_its_own_dtype(bundle: Path, dtype: Any) -> None:
    gemma_deploy.load(bundle, device="cpu", dtype=dtype).close()
    gemma_deploy.pipeline(model=bundle, device="cpu", torch_dtype=dtype).generator.close()


def test_pipeline_takes_another_tokenizer(bundle: Path, checkpoint: Path) -> None:
    tokenizer = GemmaTokenizer.from_pretrained(checkpoint)
    with gemma_deploy.load(bundle, device="cpu") as generator:
        pipe = gemma_deploy.pipeline(model=generator, tokenizer=tokenizer)
        assert pipe.tokenizer is tokenizer
        assert generator.tokenizer is not tokenizer
        again = gemma_deploy.pipeline(model=generator, tokenizer=str(checkpoint))
        options = {"max_new_tokens": 6, "do_sample": False}
        assert pipe("one", **options) == again("one", **options)


def test_the_dtype_is_what_a_checkpoint_is_loaded_in(checkpoint: Path) -> None:
    with gemma_deploy.load(checkpoint, device="cpu", dtype="bfloat16") as generator:
        assert generator.session.dtype == "bfloat16"  # type: ignore[attr-defined]  # torch's
        with pytest.raises(RequestError, match="dtype is float16, but the model was loaded in bfl"):
            gemma_deploy.pipeline(model=generator, dtype="float16")
        with pytest.raises(RequestError, match="device is cuda:1, but the model was loaded on cpu"):
            gemma_deploy.pipeline(model=generator, device=1)


def test_pipeline_refuses_a_keyword_before_it_loads(
    bundle: Path, created: list[dict[str, Any]]
) -> None:
    with pytest.raises(RequestError, match="unknown keyword argument typo"):
        gemma_deploy.pipeline(model=bundle, typo=1)
    assert created == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: gemma_deploy.load("google/gemma-2b"), RequestError, "export google/gemma-2b"),
        (lambda b: gemma_deploy.load(b / "no"), RequestError, "does not exist"),
        (
            lambda _: gemma_deploy.load(5),  # type: ignore[arg-type]  # on purpose
            RequestError,
            r"the model is 5 \(int\); expected the path of a bundle",
        ),
        (lambda b: gemma_deploy.load(b, "tf"), RequestError, "backend is 'tf'"),
        (lambda b: gemma_deploy.load(b, device="x"), RequestError, "device is 'x'"),
        (
            lambda b: gemma_deploy.load(b, device="cuda:64"),
            BackendUnavailableError,
            "--dtype float16",
        ),
        (lambda b: gemma_deploy.load(b, max_seq_len=0), RequestError, "max_seq_len is 0"),
        (lambda b: gemma_deploy.pipeline("ner", model=b), RequestError, "only 'text-generation'"),
        (lambda _: gemma_deploy.pipeline("text-generation"), RequestError, "model is missing"),
        (
            lambda b: gemma_deploy.load(b / "manifest.json"),
            RequestError,
            "is a file; give the folder",
        ),
        (
            lambda b: gemma_deploy.load(b, dtype="int4"),
            RequestError,
            "dtype is 'int4'; expected float",
        ),
        (lambda b: gemma_deploy.load(b, dtype=16), RequestError, "dtype is 16; expected float32"),
        (
            lambda b: gemma_deploy.load(b, dtype="bfloat16"),
            RequestError,
            "stores its weights in float32 and computes in float32: leave dtype out, or export",
        ),
        (lambda b: gemma_deploy.load(b, device=1.5), RequestError, "device is 1.5; expected auto"),
        (lambda b: gemma_deploy.load(b, threads=10**4), RequestError, r"may use \d+ core"),
        (
            lambda b: gemma_deploy.pipeline(model=b, device=0, device_map="auto"),
            RequestError,
            "device is 0 and device_map is 'auto': give one of them",
        ),
        (
            lambda b: gemma_deploy.pipeline(model=b, device_map={"model.layers.0": 0, "": 1}),
            RequestError,
            "device_map is .*; a model runs on one device here",
        ),
        (
            lambda b: gemma_deploy.pipeline(model=b, device_map="balanced"),
            RequestError,
            "device_map is 'balanced'; a model runs on one device",
        ),
        (
            lambda _: gemma_deploy.pipeline(model=5),  # type: ignore[arg-type]  # on purpose
            RequestError,
            "model is int; expected the folder",
        ),
        (
            lambda b: gemma_deploy.pipeline(model=b, tokenizer="nowhere"),
            RequestError,
            "tokenizer is 'nowhere'; expected a folder",
        ),
        (
            lambda b: gemma_deploy.pipeline(model=b, tokenizer=transformers.GemmaTokenizer()),  # type: ignore[arg-type]  # on purpose
            RequestError,
            "tokenizer is a transformers.models.gemma.*; expected a folder with tokenizer.json",
        ),
        (
            lambda bundle: gemma_deploy.export(bundle, bundle, graphs=["tensorflow"]),  # type: ignore[list-item]  # no such lowering
            RequestError,
            "graphs has 'tensorflow'; expected any of onnxruntime, tensorrt, portable",
        ),
        (
            lambda bundle: gemma_deploy.export(bundle, bundle, dtype="int8"),  # type: ignore[arg-type]  # only caches
            RequestError,
            "dtype is 'int8'; expected float32, float16, bfloat16, or None",
        ),
        (
            lambda bundle: gemma_deploy.export(bundle, bundle, cache_dtype="fp8"),  # type: ignore[arg-type]  # not yet
            RequestError,
            "cache_dtype is 'fp8'; expected float32, float16, bfloat16, int8, or None",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    bundle: Path, call: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(bundle)


def test_export_does_not_replace(bundle: Path, checkpoint: Path) -> None:
    with pytest.raises(OutputExistsError, match="--force"):
        gemma_deploy.export(checkpoint, bundle)


def test_an_export_without_what_writes_graphs_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['onnx_ir'] = None\n"
        "import gemma_deploy\n"
        "from gemma_deploy.errors import BackendUnavailableError\n"
        "try: gemma_deploy.export('.', 'out')\n"
        "except BackendUnavailableError as err: print(err)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "needs the Python package onnx_ir, which is not installed: pip install" in done.stdout
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_there() -> None:
    for name in gemma_deploy.__all__:
        assert getattr(gemma_deploy, name).__name__ == name
    assert gemma_deploy.__version__ == importlib.metadata.version("gemma-deploy")
    assert {*gemma_deploy.__all__, "__version__"} <= set(dir(gemma_deploy))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gemma_deploy.nothing


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, gemma_deploy, gemma_deploy.api; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "numpy", "onnxruntime", "tokenizers", "jinja2"}
    assert not heavy & set(done.stdout.split())
