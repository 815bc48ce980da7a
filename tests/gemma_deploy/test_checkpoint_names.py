import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_names import canonical_names
from gemma_deploy.errors import CheckpointError, ConfigError, GemmaDeployWarning
from gemma_deploy.model import GemmaForCausalLM, GemmaModel

SAVED = "model.safetensors"
LAYER = "model.layers.0"
QUERY = f"{LAYER}.self_attn.q_proj"


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a tiny Gemma 1: three layers, width 64."""
    return Path(shutil.copytree(tiny_checkpoint("gemma1"), tmp_path / "checkpoint"))


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / SAVED)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / SAVED)


def add(folder: Path, **names: torch.Tensor) -> None:
    save_file(load_file(folder / SAVED) | names, folder / SAVED)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"], "adapter that was never merged"),
        ([f"{QUERY}.lora_A.default.weight"], "adapter that was never merged"),
        ([f"{QUERY}.lora_magnitude_vector.default.weight"], "adapter that was never merged"),
        ([f"{LAYER}.mlp.down_proj.ia3_l.default"], "adapter that was never merged"),
        (["lm_head.modules_to_save.default.weight"], "adapter that was never merged"),
        (["model.layers.0.adaption_gate"], "adapter that was never merged"),
        ([f"{QUERY}.parametrizations.weight.original0"], "weights in parts"),
        ([f"{QUERY}.weight_orig"], "weights in parts"),
        (["foo.model.vision_tower.x"], "that no Gemma text model has"),
        (["ema.model.layers.0.input_layernorm.weight"], "that no Gemma text model has"),
        (["score.weight"], "a head for classification"),
        (["classifier.weight", "classifier.bias"], "a head for classification"),
        (["v_head.summary.weight"], "a head for classification"),
        ([f"{QUERY}.bias"], "biases that the config denies.*attention_bias"),
        (["lm_head.bias"], "biases that the config denies. Gemma has them in attention only"),
        ([f"{LAYER}.mlp.up_proj.bias"], "biases that the config denies"),
        ([f"{LAYER}.input_layernorm.bias"], "biases that the config denies"),
        ([f"{LAYER}.post_feedforward_layernorm.weight"], "norms that this generation of Gemma has"),
        ([f"{LAYER}.self_attn.q_norm.weight"], "norms that this generation of Gemma has"),
        (["model.layers.3.mlp.up_proj.weight"], "num_hidden_layers, which is 3 .layers up to 3"),
        (["model.layers.17.anything"], "num_hidden_layers, which is 3 .layers up to 17"),
        ([f"{QUERY}.weight_scale"], "quantized weights in a format that is not read"),
        ([f"{QUERY}.SCB"], "quantized weights in a format that is not read"),
        ([f"{LAYER}.self_attn.sinks"], "that no Gemma text model has"),
        (["garbage"], "that no Gemma text model has"),
        (["vision.head"], "that no Gemma text model has"),
    ],
)
def test_a_tensor_without_use_is_refused_by_name(folder: Path, names: list[str], said: str) -> None:
    add(folder, **{name: torch.ones(2) for name in names})
    with pytest.raises(CheckpointError, match=said) as caught:
        Checkpoint.open(folder)
    assert names[0] in str(caught.value)


def test_many_tensors_without_use_are_counted_not_listed(folder: Path) -> None:
    add(folder, **{f"extra.{number}": torch.ones(1) for number in range(500)})
    with pytest.raises(
        CheckpointError, match=r"500 tensors \(extra.0, extra.1, extra.10, \.\.\.\)"
    ):
        Checkpoint.open(folder)


def test_an_adapter_around_the_base_layers_is_named_before_what_it_hides(folder: Path) -> None:
    rename(folder, lambda name: name.replace("q_proj.", "q_proj.base_layer."))
    add(folder, **{f"{QUERY}.lora_A.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"base_layer.*adapter that was never merged. Merge"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("states", [{"quantization": {"group_size": 64, "bits": 4}}, {}])
def test_codes_of_mlx_are_refused_by_name(folder: Path, states: dict[str, Any]) -> None:
    set_config(folder, **states)
    codes = {f"{QUERY}.weight": torch.ones(64, 8, dtype=torch.uint32)}
    add(folder, **codes, **{f"{QUERY}.{x}": torch.ones(64, 1) for x in ("scales", "biases")})
    with pytest.raises((CheckpointError, ConfigError), match="MLX"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{LAYER}.self_attn.rotary_emb.inv_freq", "rotary"),
        ("model.rotary_emb.inv_freq", "rotary"),
        ("model.rotary_emb_local.inv_freq", "rotary"),
        ("model.rotary_emb.sliding_attention_original_inv_freq", "rotary"),
        ("vision_tower.vision_model.embeddings.patch_embedding.bias", "vision"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", "vision"),
        ("multi_modal_projector.mm_soft_emb_norm.weight", "vision"),
        ("model.audio_tower.conformer.0.norm.weight", "audio"),
    ],
)
def test_what_is_harmless_is_left_out(folder: Path, name: str, kind: str) -> None:
    add(folder, **{name: torch.ones(2)})
    (found,) = Checkpoint.open(folder).unused.items()
    assert kind in found[0]
    assert found[1] == (name,)


@pytest.mark.parametrize(
    ("change", "removed"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: f"module.{name}", "module."),
        (lambda name: f"base_model.model.{name}", "base_model.model."),
        (lambda name: f"module._orig_mod.{name}", "_orig_mod. and module."),
        (lambda name: f"base_model.{name}", "base_model."),  # PEFT around the model without head
        (lambda name: f"model.{name}", "model."),
        (lambda name: f"policy.llm.{name}", "policy.llm."),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "_orig_mod."),
        (lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."), "_checkpoint"),
        (lambda name: f"_orig_mod.{name}".replace("model.", "model.language_model."), "_orig_mod."),
    ],
    ids=[
        "torch.compile",
        "DDP",
        "PEFT",
        "DDP of torch.compile",
        "PEFT without head",
        "Lightning",
        "two names",
        "compiled layer",
        "checkpointed layer",
        "compiled multimodal",
    ],
)
def test_prefixes_of_wrappers_are_taken_off_with_a_notice(
    folder: Path,
    tiny_checkpoint: Callable[..., Path],
    change: Callable[[str], str],
    removed: str,
) -> None:
    rename(folder, change)
    with pytest.warns(GemmaDeployWarning, match=rf"{removed}.*was taken off"):
        opened = Checkpoint.open(folder)
    expected = Checkpoint.open(tiny_checkpoint("gemma1"))
    assert opened.tensors.keys() == expected.tensors.keys()
    for name, info in expected.tensors.items():
        rows = opened.float_rows(name, 0, info.num_rows)
        assert (rows == expected.float_rows(name, 0, info.num_rows)).all()


@pytest.mark.parametrize("head", ["lm_head", "model.lm_head", "model.language_model.lm_head"])
def test_a_head_is_found_under_every_name(folder: Path, head: str) -> None:
    table = load_file(folder / SAVED)["model.embed_tokens.weight"]
    add(folder, **{f"{head}.weight": table.flip(0)})
    with pytest.warns(GemmaDeployWarning, match="that is the head"):
        assert Checkpoint.open(folder).tensors["lm_head.weight"].stored_name == f"{head}.weight"


def test_a_tower_that_looks_like_a_text_model_is_none(folder: Path) -> None:
    rename(folder, lambda name: f"language_model.{name}")
    add(folder, **{"vision_tower.layers.0.input_layernorm.weight": torch.ones(1)})
    assert len(Checkpoint.open(folder).unused) == 1


def test_names_are_quoted_on_one_line_and_short(folder: Path) -> None:
    add(folder, **{"a\n\x1b[31m": torch.ones(1), "b" * 10_000: torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_other_names_are_quoted(folder: Path) -> None:
    rename(folder, lambda name: name.replace("layers", "blocks"))
    with pytest.raises(CheckpointError, match=r"holds 29 tensors: model.blocks.0.input_layernorm"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "file",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "adapter_model-00001-of-00002.safetensors",
        "adapter_model.safetensors.index.json",
        "adapters.safetensors",
        "adapter_0.pt",
        "pytorch_lora_weights.safetensors",
        "gemma-lora.gguf",
    ],
)
@pytest.mark.parametrize("has_base", [True, False])
def test_an_adapter_in_the_folder_is_refused(folder: Path, file: str, has_base: bool) -> None:
    (folder / file).write_text("{}")
    if not has_base:
        (folder / "config.json").unlink()
        (folder / SAVED).unlink()
    with pytest.raises(
        CheckpointError, match=rf"holds an adapter \({file}\), which is not applied"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name", ["GemmaForSequenceClassification", "GemmaForTokenClassification", "Gemma3TextModel"]
)
def test_what_generates_no_text_is_refused_as_a_generator(folder: Path, name: str) -> None:
    set_config(folder, architectures=[name])
    with pytest.raises(CheckpointError, match=rf"saved from {name}, which generates no text"):
        GemmaForCausalLM.from_pretrained(folder)
    GemmaModel.from_pretrained(folder)


def test_one_architecture_may_be_given_without_a_list(folder: Path) -> None:
    set_config(folder, architectures="GemmaForCausalLM")
    assert Checkpoint.open(folder).architectures == ("GemmaForCausalLM",)


@pytest.mark.parametrize("named", [3, [1], {"a": 1}])
def test_architectures_of_another_type_are_refused(folder: Path, named: Any) -> None:
    set_config(folder, architectures=named)
    with pytest.raises(ConfigError, match=r"architectures is .*, expected a list of class names"):
        Checkpoint.open(folder)


def test_a_name_is_canonical_already() -> None:
    names = [f"{LAYER}.input_layernorm.weight", "lm_head.weight", "model.norm.weight"]
    assert canonical_names(names) == ({name: name for name in names}, ())
