"""What the tensors of a checkpoint are called: in each layout, in wrappers, and in no text model.

Every stored name gets a canonical one, `model.layers.0.mlp.up_proj.weight`, whatever layout it was
saved in. What the text model of the config does not use is sorted here, too: into what is harmless
to leave out, and what makes the file another model than its config says.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gemma_deploy.config import GemmaConfig
from gemma_deploy.quoting import shortened_text

HEAD_WEIGHT: Final = "lm_head.weight"
EMBEDDING_WEIGHT: Final = "model.embed_tokens.weight"

# Where the text model of each layout lives, longest first: `gemma3` as transformers >= 4.52 writes
# it, `gemma3` as on the hub, `gemma3` without its head, then the text model, with and without head.
_PREFIXES: Final = (
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("model.", "model."),
    ("lm_head.", "lm_head."),
    ("", "model."),
)
_ROOTS: Final = tuple(prefix for prefix, target in _PREFIXES if target == "model.")
# Every Gemma has it, and nothing else is called so: what precedes it is where the model lives.
_ANCHOR: Final = "layers.0.input_layernorm.weight"
# What torch.compile, DDP, FSDP, activation checkpointing and Opacus put into names.
_WRAPPER_PARTS: Final = frozenset(
    {"_orig_mod", "module", "_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)

# What may be left out. Patterns are of canonical names.
_HARMLESS: Final = (
    (
        "of vision and audio towers and projectors",
        r"^model\.((vision|audio)_(tower|model|encoder)|multi_?modal_projector|embed_(vision|audio))\.",
    ),
    (
        "of rotary frequencies, which the config gives",
        r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.\w*inv_freq$",
    ),
)


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A kind of tensors that no Gemma text model of the config has.

    Attributes:
        pattern: Of canonical names.
        what: What they are, as a message names them.
        remedy: What to do.
    """

    pattern: str
    what: str
    remedy: str


# These take the place of the model's own tensors, so that others would seem to be missing.
_IN_PLACE: Final = (
    _Foreign(
        r"\b(lora|ia3|vera|lokr|loha|hada|oft|boft|adalora|dora)_\w+\b|"
        r"\.(base_layer|modules_to_save|original_module)\.|\b(adapters?|adaption_\w+|trainable_tokens_\w+)\b|"
        r"\bprompt_(embeddings|encoder)\b",
        "of an adapter that was never merged",
        "Merge it into its base model (merge_and_unload and save_pretrained in PEFT), and export that",
    ),
    _Foreign(
        r"\.(scales|biases|qweight|qzeros|g_idx|SCB|weight_format|input_scale|weight_(scale(_inv|_2)?|"
        r"packed|shape|zero_point)|absmax|quant_map|nested_\w+|quant_state\..*)$",
        "of quantized weights in a format that is not read (MLX writes .scales and .biases, GPTQ and "
        "AWQ .qweight)",
        "Export the original float checkpoint",
    ),
    _Foreign(
        r"\.parametrizations\.|\.weight_(orig|mask|[gvuUV])$|_proj\.linear\.",
        "of weights in parts (pruned, normalized or wrapped while training)",
        "Save the model again with whole weights (torch.nn.utils.parametrize.remove_parametrizations)",
    ),
)
_BESIDE: Final = (
    _Foreign(
        r"^model\.(score|classifier|classification_head|(v|value|reward|regression|rank)_head|"
        r"summary|dense|qa_outputs|linear)\.",
        "of a head for classification, reward or embedding",
        "gemma-deploy runs text generators only: use the language model that it was made from",
    ),
    _Foreign(
        r"\.self_attn\.[qkvo]_proj\.bias$",
        "of biases that the config denies",
        "Set attention_bias to true in config.json if attention was trained with them",
    ),
    _Foreign(
        r"\.bias$",
        "of biases that the config denies",
        "Gemma has them in attention only: the weights are another family's",
    ),
    _Foreign(
        r"^model\.layers\.\d+\.\w*\.?\w*norm\.weight$",
        "of norms that this generation of Gemma has not",
        "Correct model_type in config.json: the weights are another generation's or family's",
    ),
)
_UNKNOWN: Final = _Foreign(
    "", "that no Gemma text model has", "Use the tool that the checkpoint was made with"
)
_LAYER: Final = re.compile(r"^model\.layers\.(\d+)\.")
_MAX_NAMED: Final = 3


def canonical_names(stored: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the canonical name of each stored one, and the wrappers' prefixes taken off.

    Args:
        stored: Every name of a checkpoint.
    """
    bare = {name: _without_wrapper_parts(name) for name in stored}
    removed = {f"{part}." for name in stored for part in name.split(".") if part in _WRAPPER_PARTS}
    prefix = _outer_prefix(bare.values())
    if prefix:
        removed.add(prefix)
        bare = {name: short.removeprefix(prefix) for name, short in bare.items()}
    return {name: _canonical(short) for name, short in bare.items()}, tuple(sorted(removed))


def harmless_kind(name: str) -> str | None:
    """Return what a tensor of a canonical name is that may be left out; None if it may not."""
    return next((what for what, pattern in _HARMLESS if re.search(pattern, name)), None)


def explain_replaced(names: Mapping[str, str]) -> str | None:
    """Tell what unused tensors stand where the text model's own should; None if none do.

    Args:
        names: Stored names by canonical ones, of the tensors that the model has no use for.
    """
    return _explain(names, _IN_PLACE, others=None)


def explain_unused(names: Mapping[str, str], config: GemmaConfig) -> str | None:
    """Tell what the tensors are that the text model has no use for; None without any.

    Args:
        names: Stored names by canonical ones.
        config: The text model's.
    """
    layers = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    surplus = [layer for layer in layers if layer >= config.num_hidden_layers]
    if surplus:
        beyond = {n: s for n, s in names.items() if _layer_of(n) >= config.num_hidden_layers}
        return (
            f"{_listed(beyond.values())} of layers beyond num_hidden_layers, which is "
            f"{config.num_hidden_layers} (layers up to {max(surplus)} were found). Correct "
            "num_hidden_layers in config.json, or save the pruned model again"
        )
    return _explain(names, _BESIDE, others=_UNKNOWN)


def _explain(
    names: Mapping[str, str], kinds: Sequence[_Foreign], others: _Foreign | None
) -> str | None:
    for kind in kinds:
        found = [stored for name, stored in names.items() if re.search(kind.pattern, name)]
        if found:
            return f"{_listed(found)} {kind.what}. {kind.remedy}"
    if others is None or not names:
        return None
    return f"{_listed(names.values())} {others.what}. {others.remedy}"


def _listed(stored: Iterable[str]) -> str:
    """Return `2 tensors (a.weight, b.weight)`, naming no more than fit a message."""
    names = sorted(stored)
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"{count} ({listed_names(names)})"


def listed_names(names: Sequence[str]) -> str:
    """Return the first few names, each of bounded length and on one line."""
    shown = [
        shortened_text(name if name.isprintable() else repr(name), 100)
        for name in names[:_MAX_NAMED]
    ]
    return ", ".join([*shown, "..."] if len(names) > _MAX_NAMED else shown)


def _layer_of(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _without_wrapper_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def _outer_prefix(names: Iterable[str]) -> str:
    """Return what a wrapper put before the names of a known layout, such as `base_model.model.`.

    Where several places look like a text model, one without a prefix counts, then the shortest; what is
    in the others has no use, and is named.
    """
    places = [
        name.removesuffix(_ANCHOR)
        for name in names
        if name == _ANCHOR or (name.endswith(f".{_ANCHOR}") and not harmless_kind(_canonical(name)))
    ]
    prefixes = {
        place.removesuffix(
            next(x for x in _ROOTS if place == x or place.endswith(f".{x}") or not x)
        )
        for place in places
    }
    return min(prefixes, key=lambda prefix: (len(prefix), prefix), default="")


def _canonical(name: str) -> str:
    return next(
        target + name.removeprefix(prefix)
        for prefix, target in _PREFIXES
        if name.startswith(prefix)
    )
