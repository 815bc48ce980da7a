"""The TensorRT plugin `GemmaAttention`: `register_plugin`, for building and for loading engines.

As an ONNX node it is
    op_type GemmaAttention, attributes plugin_namespace="gemma_deploy", plugin_version="1"
    inputs  query [B, S, N, H], key_cache [B, K, T, H], value_cache [B, K, T, H], input_pos int32 [B]
    output  [B, S, N, H]
    attributes scale (float), softcap (float, 0 for none), sliding_window (int, 0 for none)
with query already rotated and caches already holding the step's keys and values, all float16 or
bfloat16. Query i of row b sees keys j <= input_pos[b] + i, and with a window only
j > input_pos[b] + i - sliding_window.

At build time the kernels are compiled with Triton and go into the plan as a field of each layer; at
run time they come from there, and neither Triton nor torch is imported.

TensorRT's side: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Plugin/IPluginV3.html
Engines with it have been built (TensorRT for RTX 1.7); none has run on hardware yet.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np

from gemma_deploy.errors import BackendUnavailableError, EngineBuildError, EngineError
from gemma_deploy.plugins.attention.cubins import KernelArchive, read_archive
from gemma_deploy.plugins.attention.launch import Scalars, Tensors, load_kernels
from gemma_deploy.plugins.attention.plugin_fields import (
    KERNELS_FIELD,
    PLUGIN_NAME,
    Settings,
    read_fields,
)
from gemma_deploy.plugins.attention.schedule import (
    CallShape,
    KernelDType,
    KernelShape,
    max_scratch_bytes,
)
from gemma_deploy.tensorrt import TensorRTLibrary

PLUGIN_NAMESPACE: Final = "gemma_deploy"
PLUGIN_VERSION: Final = "1"


def register_plugin(library: TensorRTLibrary, targets: Sequence[str] = ()) -> None:
    """Make a library know `GemmaAttention`, before parsing a graph or deserializing an engine.

    May be called again: the plugin is registered once, and the targets of the last call count.
    What goes wrong inside the plugin, where TensorRT drops exceptions, is put into `library.log`.

    Args:
        library: As `load_library` gives it.
        targets: Compute capabilities, such as `8.9`, that engines are built for from now on; not
            needed to load engines.

    Raises:
        EngineBuildError: A target is not a compute capability.
        EngineError: TensorRT refuses the plugin.
    """
    capabilities = tuple(_capability(target) for target in targets)
    _registered_creator(library).capabilities = capabilities


@functools.cache
def _registered_creator(library: TensorRTLibrary) -> Any:
    module = library.module
    creator = _creator_class(library, module)()
    if not module.get_plugin_registry().register_creator(creator, PLUGIN_NAMESPACE):
        raise EngineError(
            f"{library.flavour} {library.version} refuses the plugin {PLUGIN_NAME}: "
            f"{library.log.take_errors() or 'it does not say why'}"
        )
    return creator


def _creator_class(library: TensorRTLibrary, trt: Any) -> Any:
    """Derive the creator from the library's own base class: bindings accept no other."""
    # 10.6 and later know aliasing; we have none, but only this class says so.
    build_base = getattr(trt, "IPluginV3OneBuildV2", trt.IPluginV3OneBuild)
    plugin_class = _plugin_class(library, trt, build_base)

    class GemmaAttentionCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]  # the base is only known at run time
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = PLUGIN_NAME
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.plugin_version = PLUGIN_VERSION
            self.capabilities: tuple[int, ...] = ()
            # Kept here: a collection points into its fields and does not keep them.
            self._fields = [
                trt.PluginField("scale", np.array([]), trt.PluginFieldType.FLOAT32),
                trt.PluginField("softcap", np.array([]), trt.PluginFieldType.FLOAT32),
                trt.PluginField("sliding_window", np.array([]), trt.PluginFieldType.INT32),
            ]
            self.field_names = trt.PluginFieldCollection(self._fields)

        def create_plugin(self, _name: str, fields: Any, phase: Any) -> Any:
            with _reported(library, "creating"):
                settings = read_fields(fields)
                if phase == trt.TensorRTPhase.BUILD:
                    settings = replace(settings, capabilities=self.capabilities)
                else:
                    read_archive(settings.kernels)  # damage shows when the engine is loaded
                return plugin_class(settings)

    return GemmaAttentionCreator


def _plugin_class(library: TensorRTLibrary, trt: Any, build_base: Any) -> Any:  # noqa: C901  # one short method per callback
    """Derive the plugin from the library's own base classes."""

    class GemmaAttention(trt.IPluginV3, trt.IPluginV3OneCore, build_base, trt.IPluginV3OneRuntime):  # type: ignore[misc]  # the bases are only known at run time
        def __init__(self, settings: Settings) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            build_base.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name = PLUGIN_NAME
            self.plugin_namespace = PLUGIN_NAMESPACE
            self.plugin_version = PLUGIN_VERSION
            self.num_outputs = 1
            self._settings = settings

        def get_capability_interface(self, _kind: Any) -> Any:
            return self

        def get_output_data_types(self, input_types: Any) -> list[Any]:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Any, _shape_inputs: Any, _builder: Any) -> list[Any]:
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, position: int, inputs: Any, _num: int) -> bool:
            desc = inputs[position].desc
            if desc.format != trt.TensorFormat.LINEAR:
                return False
            if position == 0:
                return desc.type in {trt.float16, trt.bfloat16}
            expected = trt.int32 if position == 3 else inputs[0].desc.type
            return bool(desc.type == expected)

        def configure_plugin(self, inputs: Any, _outputs: Any) -> None:
            with _reported(library, "configuring"):
                if not self._settings.kernels:
                    shape = _kernel_shape([i.desc for i in inputs], self._settings.scalars)
                    kernels = _compiled(shape, self._settings.capabilities)
                    self._settings = replace(self._settings, kernels=kernels)

        def get_workspace_size(self, inputs: Any, _outputs: Any) -> int:
            with _reported(library, "sizing the scratch memory of"):
                shape = _kernel_shape([i.desc for i in inputs], self._settings.scalars)
                return max_scratch_bytes(shape, _call_shape(inputs[0].max, inputs[1].max))

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, _tactic: int) -> None:
            """There is one tactic: the kernels' sizes are chosen by arithmetic."""

        def get_aliased_input(self, _output: int) -> int:
            return -1

        def get_fields_to_serialize(self) -> Any:
            scalars, kinds = self._settings.scalars, trt.PluginFieldType
            # Kept here: TensorRT reads names and data after this call, and a collection keeps neither.
            self._fields = [
                trt.PluginField(name, np.array([value], dtype), kind)
                for name, value, dtype, kind in (
                    ("scale", scalars.scale, np.float32, kinds.FLOAT32),
                    ("softcap", scalars.softcap, np.float32, kinds.FLOAT32),
                    ("sliding_window", scalars.sliding_window, np.int32, kinds.INT32),
                )
            ]
            kernels = np.frombuffer(self._settings.kernels, np.uint8)
            self._fields.append(trt.PluginField(KERNELS_FIELD, kernels, kinds.UNKNOWN))
            return trt.PluginFieldCollection(self._fields)

        def on_shape_change(self, inputs: Any, _outputs: Any) -> None:
            with _reported(library, "changing the shapes of"):
                shape = _kernel_shape(inputs, self._settings.scalars)
                _check_archive(read_archive(self._settings.kernels), shape)

        def attach_to_context(self, _context: Any) -> Any:
            return self.clone()

        def clone(self) -> Any:
            copy = GemmaAttention(self._settings)
            copy.__dict__.update(self.__dict__)
            return copy

        def enqueue(
            self,
            inputs_desc: Any,
            _outputs_desc: Any,
            inputs: Any,
            outputs: Any,
            workspace: int,
            stream: int,
        ) -> None:
            with _reported(library, "running"):
                kernels = load_kernels(read_archive(self._settings.kernels))
                query, key_cache, value_cache, input_pos = inputs
                kernels.run(
                    _call_shape(inputs_desc[0].dims, inputs_desc[1].dims),
                    Tensors(
                        query=query,
                        key_cache=key_cache,
                        value_cache=value_cache,
                        input_pos=input_pos,
                        output=outputs[0],
                        scratch=workspace,
                    ),
                    self._settings.scalars,
                    stream,
                )

    return GemmaAttention


@contextmanager
def _reported(library: TensorRTLibrary, action: str) -> Iterator[None]:
    """Put an exception into the library's log: TensorRT only says that a callback failed."""
    try:
        yield
    except Exception as err:
        library.log.add("ERROR", f"{action} the plugin {PLUGIN_NAME}: {err}")
        raise


def _kernel_shape(inputs: Sequence[Any], scalars: Scalars) -> KernelShape:
    """Return what kernels a node needs, from its tensor descriptions."""
    _, _, num_heads, head_dim = inputs[0].dims
    _, num_kv_heads, _, _ = inputs[1].dims
    if num_heads % num_kv_heads:
        raise EngineBuildError(
            f"a node {PLUGIN_NAME} has {num_heads} query heads and {num_kv_heads} KV heads; the "
            "number of query heads must be a multiple"
        )
    dtypes: dict[str, KernelDType] = {"HALF": "float16", "BF16": "bfloat16"}
    return KernelShape(
        head_dim=head_dim,
        group=num_heads // num_kv_heads,
        dtype=dtypes[inputs[0].type.name],
        has_softcap=scalars.softcap > 0,
    )


def _call_shape(query: Sequence[int], key_cache: Sequence[int]) -> CallShape:
    return CallShape(
        batch=query[0], num_tokens=query[1], num_kv_heads=key_cache[1], capacity=key_cache[2]
    )


@functools.cache
def _compiled(shape: KernelShape, capabilities: tuple[int, ...]) -> bytes:
    """Return the kernels of a shape, compiled once for all layers that have it."""
    try:
        from gemma_deploy.plugins.attention.compile import compile_archive
    except ImportError as err:
        raise BackendUnavailableError(
            f"building an engine with the attention plugin needs the Python package triton: {err}. "
            "pip install triton (Linux), or build with --attention native"
        ) from err
    return compile_archive(shape, capabilities).to_bytes()


def _check_archive(archive: KernelArchive, shape: KernelShape) -> None:
    if archive.shape != shape:
        raise EngineError(
            f"the engine's attention kernels are for {archive.shape}, and it asks for {shape}: the "
            "plan is damaged. Build the engine again"
        )


def _capability(target: str) -> int:
    major, _, minor = target.partition(".")
    if not (major.isdecimal() and minor.isdecimal()):
        raise EngineBuildError(f"{target!r} is no compute capability; expected one such as 8.9")
    return int(major) * 10 + int(minor)
