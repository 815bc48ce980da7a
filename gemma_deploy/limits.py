"""Limits of what files can ask for: beyond any Gemma's needs, and small enough to be held.

Everything that is read can come from somebody else. What is allocated, or looped over, because a file
says so is held against these numbers first.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_MIB: Final = 1 << 20

# Parsed JSON takes up to some 30 times its bytes in memory.
MAX_CONFIG_BYTES: Final = 1 * _MIB
"""config.json, generation_config.json, adapter_config.json, quant_state, records of the cache: a few KB."""

MAX_METADATA_BYTES: Final = 16 * _MIB
"""Files with a line for each tensor or token: index.json and safetensors headers (160,000 tensors fit;
Gemma 3 27B has 1,247), manifest.json and engine.json, tokenizer_config.json (1.2 MB in Gemma 3)."""

MAX_TOKENIZER_BYTES: Final = 256 * _MIB
"""tokenizer.json: 33 MB in Gemma 3."""

# A parsed graph of empty messages takes up to 100 times its bytes in memory.
MAX_GRAPH_BYTES: Final = 8 * _MIB
"""A graph without its weights: up to 15 KB for each layer, 0.9 MB for Gemma 3 27B."""

MAX_GRAPH_PARTS: Final = 1 << 18
"""Messages and strings of a graph (nodes, their inputs, attributes, tensors, shapes): up to 1,300 for
each layer, 80,000 for Gemma 3 27B. Looking at all of them takes less than a second."""

MAX_DIMS: Final = 8
"""Dimensions of a tensor: 4 in Gemma 3."""

MAX_DIM: Final = 1 << 40
"""Each of them, so that what they make together has few digits."""

MAX_TEXT_BYTES: Final = 256 * _MIB
"""Prompts, and texts that are evaluated or calibrated with."""

MAX_RECORD_BYTES: Final = 64 * _MIB
"""The rounds of a benchmark: 20 bytes for each step."""

MAX_KERNELS_BYTES: Final = 256 * _MIB
"""The compiled attention kernels of an engine, unpacked: a few MB."""

MAX_TEMPLATE_CHARACTERS: Final = 64 * 1024
"""A chat template's source: Gemma 3's has 1,500 characters, the longest in use some 20,000."""

MAX_JSON_DEPTH: Final = 64
"""Objects and lists within each other; JSON schemas of tools and multimodal configs reach 10."""

MAX_JSON_DIGITS: Final = 1000
"""Digits of a whole number: the time to read one grows with their square."""

MAX_POSITIONS: Final = 1 << 27
"""Tokens of a sequence, a window or a cache: 131,072 in Gemma 3."""

MAX_LAYERS: Final = 1000
"""Decoder layers: 62 in Gemma 3 27B."""

MAX_TOKEN_ID: Final = (1 << 31) - 1
"""Token ids, which libraries keep in 32 bits."""

MAX_LISTED_IDS: Final = 1000
"""Tokens that end a text: 3 in Gemma 3."""

MAX_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "vocab_size": 1 << 24,  # Gemma 3: 262,208
        "hidden_size": 1 << 20,  # 5,376
        "intermediate_size": 1 << 22,  # Gemma 2 27B: 36,864
        "num_hidden_layers": MAX_LAYERS,
        "num_attention_heads": 1 << 14,  # 32
        "num_key_value_heads": 1 << 14,
        "head_dim": 1 << 14,  # 256
        "max_position_embeddings": MAX_POSITIONS,
        "sliding_window": MAX_POSITIONS,
    }
)
"""The largest that each size of a `GemmaConfig` may be, by its name."""
