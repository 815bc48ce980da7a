import dataclasses
import types
from typing import Any

import pytest

from gemma_deploy.config import GemmaConfig, RopeParameters
from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.exporters.engine.attention import check_attention, check_plugin, uses_plugin
from gemma_deploy.tensorrt import TensorRTLibrary, load_library

RTX = load_library("tensorrt-rtx")
PLAIN = GemmaConfig(num_hidden_layers=2)
CAPPED = dataclasses.replace(PLAIN, attn_logit_softcapping=50.0)
WINDOWED = dataclasses.replace(
    PLAIN,
    sliding_window=8,
    layer_types=("sliding_attention", "full_attention"),
    rope_parameters={
        "sliding_attention": RopeParameters(),
        "full_attention": RopeParameters(),
    },
)


def _old_library() -> TensorRTLibrary:
    log: Any = None
    module = types.SimpleNamespace()
    return TensorRTLibrary(flavour="tensorrt", module=module, version="10.15", log=log)


@pytest.mark.parametrize(
    ("config", "auto_needs_it"), [(PLAIN, False), (CAPPED, True), (WINDOWED, True)]
)
def test_auto_takes_the_plugin_where_native_has_no_kernel(
    config: GemmaConfig, auto_needs_it: bool
) -> None:
    assert uses_plugin(config, "auto", RTX) == auto_needs_it
    assert uses_plugin(config, "auto", _old_library())
    assert uses_plugin(config, "plugin", RTX)
    assert not uses_plugin(config, "native", RTX)


def test_native_attention_that_is_not_there() -> None:
    check_attention(WINDOWED, "native", RTX)
    check_attention(CAPPED, "auto", RTX)
    with pytest.raises(RequestError, match="caps attention scores at 50 in all 2 layers"):
        check_attention(CAPPED, "native", RTX)
    with pytest.raises(RequestError, match=r"tensorrt 10\.15 has no attention over a KV cache"):
        check_attention(PLAIN, "native", _old_library())


def test_what_the_plugin_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plugin(CAPPED, "float16", ["8.0", "12.0"])
    with pytest.raises(RequestError, match=r"capability 7\.5; it has for 8\.0, .*12\.0"):
        check_plugin(CAPPED, "float16", ["7.5", "8.0"])
    wide = dataclasses.replace(PLAIN, head_dim=512)
    with pytest.raises(RequestError, match="head_dim"):
        check_plugin(wide, "float16", ["8.0"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BackendUnavailableError, match="pip install triton"):
        check_plugin(CAPPED, "float16", ["8.0"])
