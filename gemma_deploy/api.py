"""The library's front door: `export`, `build`, `pack`, `load`, `pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.install_hint import explain_missing_package, missing_package

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gemma_deploy.bundle import Bundle
    from gemma_deploy.engine import EngineFolder
    from gemma_deploy.exporters.engine import BuildOptions
    from gemma_deploy.exporters.quantization.options import QuantizationOptions
    from gemma_deploy.graph_spec import CacheDType, DType, Lowering
    from gemma_deploy.runtime.pipeline import TextGenerationPipeline
    from gemma_deploy.runtime.text_generator import TextGenerator
    from gemma_deploy.tensorrt import Flavour
    from gemma_deploy.tokenizer import GemmaTokenizer

TASK = "text-generation"


def export(  # noqa: PLR0913  # a keyword for each decision
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: DType | None = None,
    cache_dtype: CacheDType | None = None,
    graphs: Iterable[Lowering] | None = None,
    quantization: QuantizationOptions | None = None,
    calibration_text: str | Path | None = None,
    is_calibrated: bool = True,
    force: bool = False,
    on_progress: Callable[[str, int, int], object] = lambda *_: None,
) -> Bundle:
    """Turn a Gemma checkpoint into a bundle that runs without torch.

    Args:
        checkpoint: Folder in Hugging Face layout.
        output: The bundle folder to create; it appears whole or not at all.
        dtype: `float32`, `float16` or `bfloat16`; None keeps the checkpoint's own. With
            `quantization` what to compute in; None then means float32, and float16 on TensorRT.
        cache_dtype: What the KV cache holds, but on TensorRT; None for what graphs compute in.
            `int8` has its scales measured on the text.
        graphs: What to write graphs for: any of `onnxruntime` (always written), `tensorrt` and
            `portable` (standard ONNX operators only). None means `onnxruntime` and, unless no
            engine can have them (in float32, or with nf4 weights), `tensorrt`.
        quantization: What matrices to quantize, and how: `QuantizationOptions(scheme="int4")`.
        calibration_text: A UTF-8 text file to measure activations on, and at its end how far
            quantized weights are from the original; None for built-in texts.
        is_calibrated: Whether the model is run on text; else what overflows float16 is bounded by the
            weights, int4 is rounded to nearest unless another method is asked for, and how far
            quantized weights are from the original (`manifest.divergence`) is not known.
        force: Whether an existing bundle at `output` may be replaced.
        on_progress: Called with what is being done, how much is done and how much there is.

    Raises:
        CheckpointError: Weights missing, truncated, of the wrong shape or dtype.
        ConfigError: Another model family.
        RequestError: `checkpoint` or the text is not there or too short, another dtype, other
            graphs, or quantization that the model's sizes do not allow.
        OutputExistsError: `output` exists and `force` is False, or holds more than a bundle.
        ExportError: `output` cannot be written, or the export failed.
        BackendUnavailableError: A package that writes graphs is not installed.
    """
    from gemma_deploy.graph_spec import CACHE_DTYPE_BYTES, DTYPE_BYTES, LOWERINGS
    from gemma_deploy.text_files import read_text

    for name, given, known in (
        ("dtype", dtype, tuple(DTYPE_BYTES)),
        ("cache_dtype", cache_dtype, tuple(CACHE_DTYPE_BYTES)),
    ):
        if given is not None and given not in known:
            raise RequestError(f"{name} is {given!r}; expected {', '.join(known)}, or None")
    if graphs is not None:
        graphs = tuple(graphs)
        for name in graphs:
            if name not in LOWERINGS:
                raise RequestError(f"graphs has {name!r}; expected any of {', '.join(LOWERINGS)}")
    try:
        from gemma_deploy.exporters.export import export_checkpoint
    except ModuleNotFoundError as err:
        package = missing_package(err)
        if package is None:
            raise
        raise BackendUnavailableError(explain_missing_package(package, "export")) from err
    if not Path(checkpoint).exists():
        raise RequestError(
            f"{checkpoint} is not there: give a checkpoint folder. A model on a hub is downloaded "
            "by `gemma-deploy export ID`, or first by huggingface_hub.snapshot_download"
        )
    return export_checkpoint(
        Path(checkpoint),
        Path(output),
        dtype=dtype,
        cache_dtype=cache_dtype,
        graphs=graphs,
        quantization=quantization,
        calibration_text=None if calibration_text is None else read_text(Path(calibration_text)),
        is_calibrated=is_calibrated,
        force=force,
        on_progress=on_progress,
    )


def build(
    bundle: str | Path,
    options: BuildOptions,
    *,
    force: bool = False,
    on_progress: Callable[[str, int, int], object] = lambda *_: None,
) -> EngineFolder:
    """Build a TensorRT engine of a bundle; it is kept in the bundle, and not built twice.

    Args:
        bundle: A bundle folder that was exported in float16 or bfloat16.
        options: The library and the engine's sizes: `BuildOptions(flavour="tensorrt-rtx")`.
        force: Whether to build again what is there already.
        on_progress: Called with what is being done, how much is done and how much there is.

    Raises:
        RequestError: Options that the model or the library cannot serve.
        BackendUnavailableError: The library is not installed, or needs a GPU that is not here.
        BundleError: The bundle is damaged, or has no graphs for TensorRT.
        EngineBuildError: Memory or disk do not suffice, or the library failed; nothing is left behind.
    """
    from gemma_deploy.bundle import Bundle
    from gemma_deploy.exporters.engine import build_engine

    opened = Bundle.open(Path(bundle))
    return build_engine(opened, options, force=force, on_progress=on_progress).engine


def pack(
    bundle: str | Path,
    output: str | Path,
    backend: Flavour,
    *,
    engine: str | None = None,
    force: bool = False,
    on_progress: Callable[[str, int, int], object] = lambda *_: None,
) -> EngineFolder:
    """Copy an engine, with tokenizer, generation and licence files, into a folder that runs by itself.

    Args:
        bundle: A bundle folder that an engine was built in.
        output: The folder to create; it appears whole or not at all.
        backend: `tensorrt` or `tensorrt-rtx`: what the engine was built with.
        engine: Name of the engine's folder in `bundle/engines`; None for the only one.
        force: Whether an engine at `output` may be replaced.
        on_progress: Called with what is being done, how much is done and how much there is.

    Raises:
        RequestError: Several engines to choose from, or none of that name.
        EngineError: No engine, or one that is damaged or older than the bundle.
        BundleError: The bundle is damaged.
        OutputExistsError: `output` exists and `force` is False, or is no engine.
        ExportError: `output` cannot be written.
    """
    from gemma_deploy.bundle import Bundle
    from gemma_deploy.exporters.engine import pack_engine

    opened = Bundle.open(Path(bundle))
    return pack_engine(
        opened, backend, Path(output), key=engine, force=force, on_progress=on_progress
    )


def load(  # a keyword for each decision
    path: str | Path,
    backend: str = "auto",
    device: object = "auto",
    max_seq_len: int | None = None,
    threads: int | None = None,
    prepacked_cache: str | Path | None = None,
    *,
    dtype: object = None,
) -> TextGenerator:
    """Load a model to generate with; use it as a context manager.

    A bundle runs on ONNX Runtime and imports no torch; a checkpoint runs on the eager torch model; an
    engine runs on TensorRT. What is returned may be used from several threads: they take turns, and
    each gets the text it would get alone (see `TextGenerator`).

    Args:
        path: A bundle folder, as `export` writes it, a checkpoint folder, or an engine that
            `gemma-deploy pack` wrote.
        backend: `auto`, `onnxruntime` (bundles), `torch` (checkpoints), or `tensorrt` or
            `tensorrt-rtx` (packed engines, and bundles with engines that `gemma-deploy build` built).
        device: `auto` (CUDA where it works), `cpu`, `cuda` or `cuda:N`; or N, or -1 for the CPU; or a
            `torch.device`.
        max_seq_len: Capacity of the KV cache in tokens, allocated once; None for what each call
            needs, up to what the model is made for.
        threads: Threads of the CPU kernels; None for one per core that this process may use. More than
            that become as many, and more than 4 for each core are refused. With the torch backend it holds for the whole process.
        prepacked_cache: Folder where ONNX Runtime keeps a bundle's weights in the layout that this
            machine's CPU multiplies with, so that later loads are quick and share them
            (docs/prepacked-cache.md); None for nowhere.
        dtype: What a checkpoint is loaded in: `float32`, `float16` or `bfloat16`, or torch's own of
            these names; None or `auto` for the checkpoint's own. A bundle or an engine has its own
            already: another one is refused.

    Returns:
        A `TextGenerator` with `generate`, `stream` and `chat`.

    Raises:
        RequestError: `path` is no model folder, or an option is out of range.
        BundleError: The bundle is damaged, or newer than this gemma-deploy.
        CheckpointError: The checkpoint is damaged.
        ConfigError: The model is no Gemma, or its generation_config.json holds what no model can have.
        BackendUnavailableError: The backend's package or the device is not here.
        EngineError: The engine is damaged, or of another library version or GPU; or the bundle has
            none that fits.
        SessionError: The backend failed to load the model.

    Warns:
        GemmaDeployWarning: generation_config.json has fields that are not implemented, or a checkpoint's
            tensors and config.json differ in what the tensors decide; or `threads` are more than
            cores.
    """
    from gemma_deploy.runtime.source import ModelSource
    from gemma_deploy.runtime.text_generator import TextGenerator

    return TextGenerator.open(
        ModelSource.open(path),
        backend=backend,
        device=device,
        max_seq_len=max_seq_len,
        threads=threads,
        prepacked_cache=None if prepacked_cache is None else Path(prepacked_cache),
        dtype=dtype,
    )


def pipeline(  # noqa: PLR0913  # transformers' keywords, and ours
    task: str | None = TASK,
    model: str | Path | TextGenerator | None = None,
    *,
    tokenizer: str | Path | GemmaTokenizer | None = None,
    dtype: object = None,
    torch_dtype: object = None,
    device: object = None,
    device_map: object = None,
    backend: str = "auto",
    max_seq_len: int | None = None,
    threads: int | None = None,
    prepacked_cache: str | Path | None = None,
    **defaults: Any,
) -> TextGenerationPipeline:
    """Return a pipeline that behaves as transformers' of the same task.

    Args:
        task: Only `text-generation`.
        model: A bundle, checkpoint or engine folder, or what `load` returned; or, if there is no such
            folder, a model's name on the hub, which is downloaded and run by the torch backend.
        tokenizer: A loaded `GemmaTokenizer`, or the folder of one, in place of the model's own.
        dtype: As for `load`.
        torch_dtype: transformers' older name of `dtype`.
        device: As for `load`, or a `torch.device`; None for CUDA where it works.
        device_map: In place of `device`: `auto`, a device, or `{"": device}`, the whole model on one.
        backend: As for `load`, like the next three; a loaded model already has its own.
        max_seq_len: As for `load`.
        threads: As for `load`.
        prepacked_cache: As for `load`.
        **defaults: Keyword arguments for every call, such as `max_new_tokens`.

    Raises:
        RequestError: Another task, no model, an unknown keyword argument, both `device` and
            `device_map`, or what a loaded model does not have; and as `load`.
        HubError: The model cannot be downloaded.
        TokenizerError: The tokenizer cannot be read.
    """
    from gemma_deploy.runtime.pipeline import TextGenerationPipeline
    from gemma_deploy.runtime.pipeline_model import (
        check_loaded,
        model_folder,
        placed,
        read_tokenizer,
    )
    from gemma_deploy.runtime.pipeline_settings import check_keywords
    from gemma_deploy.runtime.text_generator import TextGenerator

    if task not in (TASK, None):
        raise RequestError(f"task is {task!r}; gemma-deploy has only {TASK!r}")
    check_keywords(defaults)  # before a large model is loaded
    place = placed(device, device_map)
    dtype = torch_dtype if dtype is None or dtype == "auto" else dtype
    other = None if tokenizer is None else read_tokenizer(tokenizer)
    if isinstance(model, TextGenerator):
        check_loaded(model, place, dtype)
    else:
        folder = model_folder(model)
        model = load(folder, backend, place, max_seq_len, threads, prepacked_cache, dtype=dtype)
    return TextGenerationPipeline(
        model if other is None else model.with_tokenizer(other), **defaults
    )
