"""Random checkpoints of the shapes that benchmarks measure.

Time and memory do not depend on what the weights are, so none need be downloaded.
"""

import json
from pathlib import Path

import numpy as np

from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.config import CONFIG_FILE, GemmaConfig, ModelType
from gemma_deploy.safetensors_files import SINGLE_FILE

SHAPES = {"g270m": (640, 2048, 4), "g2b": (2048, 16_384, 8)}
"""Hidden size, feed-forward width and query heads; the rest is `shape_config`'s."""
_BLOCK_ELEMENTS = 8 << 20
_ARCHITECTURES: dict[ModelType, str] = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def shape_config(shape: str) -> GemmaConfig:
    """Return the config of a shape: one key-value head of 256, 18 layers, 256,000 tokens."""
    hidden_size, intermediate_size, num_heads = SHAPES[shape]
    return GemmaConfig(
        vocab_size=256_000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=18,
        num_attention_heads=num_heads,
        num_key_value_heads=1,
        head_dim=256,
    )


def write_random_checkpoint(folder: Path, config: GemmaConfig) -> None:
    """Write a bfloat16 checkpoint of random weights, block by block, and its config.json.

    Standard deviation 0.02. No two weights are equal: a library would store them once.

    Args:
        folder: Where to write; it exists.
        config: What to write.
    """
    entries, end = {}, 0
    for name, shape in expected_tensors(config).items():
        start, end = end, end + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    header = json.dumps(entries).encode()
    values = np.random.default_rng(0).standard_normal(_BLOCK_ELEMENTS, np.float32) * 0.02
    block = (values.view(np.uint32) >> 16).astype("<u2")  # a float32's upper half is a bfloat16
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for number, start in enumerate(range(0, end, block.nbytes)):
            file.write(np.roll(block, 4099 * number).tobytes()[: end - start])
    # Others' converters choose by the architecture.
    text = json.dumps({"architectures": [_ARCHITECTURES[config.model_type]], **config.to_dict()})
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
