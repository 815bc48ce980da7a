"""Write a checkpoint of Gemma 1's layout as GGUF, matrices in Q4_0: `write_gguf CHECKPOINT OUTPUT`.

For timing alone: the vocabulary is made of dummies. The embedding, which is the head too, is in Q4_0
like all matrices; llama.cpp's own quantizer would give it 6 bits, which are slower to read.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
# https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h, enum llama_token_type
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def gguf_name(name: str) -> str:
    """Return what GGUF calls a tensor of a Gemma 1 checkpoint.

    Raises:
        KeyError: Gemma 1 has no such tensor.
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    # model.layers.<layer>.<part>.weight
    _, _, layer, *part, _ = name.split(".")
    return f"blk.{int(layer)}.{_LAYER_NAMES['.'.join(part)]}.weight"


def gguf_values(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a tensor as GGUF stores it: RMSNorm's whole factor, where Gemma stores its distance from 1."""
    return weight + np.float32(1) if name.endswith("norm.weight") else weight


def gguf_tokens(vocab_size: int) -> tuple[list[str], list[int]]:
    """Return as many tokens and their types: marks, bytes, then dummies."""
    tokens = [*_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [_CONTROL] * 3 + [_UNKNOWN] + [_BYTE] * 256
    dummies = vocab_size - len(tokens)
    return tokens + [f"<unused{i}>" for i in range(dummies)], types + [_NORMAL] * dummies


def read_bfloat16(file: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the name and values of each tensor of a .safetensors file that holds bfloat16 alone."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data = np.memmap(file, np.uint8, "r", offset=8 + length)
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        halves = data[start:stop].view("<u2")
        # A bfloat16 is the upper half of a float32.
        values = (halves.astype(np.uint32) << 16).view(np.float32)
        yield name, values.reshape(entry["shape"])


def write(checkpoint: Path, output: Path) -> None:
    """Convert a checkpoint of one file."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(output, "gemma")
    _add_metadata(writer, config)
    quantized = gguf.GGMLQuantizationType.Q4_0
    for name, weight in read_bfloat16(checkpoint / "model.safetensors"):
        values = gguf_values(name, weight)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            codes = gguf.quants.quantize(values, quantized)
            writer.add_tensor(gguf_name(name), codes, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    tokens, types = gguf_tokens(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    for mark, add in (
        ("<pad>", writer.add_pad_token_id),
        ("<eos>", writer.add_eos_token_id),
        ("<bos>", writer.add_bos_token_id),
        ("<unk>", writer.add_unk_token_id),
    ):
        add(_SPECIAL_TOKENS.index(mark))


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
