"""Texts and token ids on which two forms of a tokenizer are compared: `texts`, `id_lists`."""

import random
import sysconfig
import unicodedata
from collections.abc import Sequence
from pathlib import Path

# First and last letters of blocks of Unicode: scripts, signs, private use, beyond 16 bits.
_BLOCKS = [
    *((0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF)),
    *((0x400, 0x4FF), (0x531, 0x58F), (0x591, 0x5F4), (0x600, 0x6FF), (0x700, 0x74F)),
    *((0x780, 0x7B1), (0x900, 0x97F), (0x980, 0x9FE), (0xA01, 0xA76), (0xA81, 0xAFF)),
    *((0xB01, 0xB77), (0xB82, 0xBFA), (0xC00, 0xC7F), (0xC80, 0xCF2), (0xD00, 0xD7F)),
    *((0xD81, 0xDF4), (0xE01, 0xE5B), (0xE81, 0xEDF), (0xF00, 0xFDA), (0x1000, 0x109F)),
    *((0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x139F), (0x13A0, 0x13FD), (0x1401, 0x167F)),
    *((0x1680, 0x169C), (0x16A0, 0x16F8), (0x1780, 0x17F9), (0x1800, 0x18AA), (0x1E00, 0x1FFF)),
    *((0x2000, 0x206F), (0x2070, 0x20BF), (0x2100, 0x23FF), (0x2460, 0x27BF), (0x2800, 0x2BFF)),
    *((0x2C80, 0x2CFF), (0x2D30, 0x2D7F), (0x3000, 0x30FF), (0x3131, 0x318E), (0x3400, 0x4DBF)),
    *((0x4E00, 0x9FFF), (0xA000, 0xA4C6), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xF900, 0xFAFF)),
    *((0xFB00, 0xFDFF), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0xFFF9, 0xFFFD), (0x10300, 0x1034A)),
    *((0x10400, 0x1044F), (0x12000, 0x12399), (0x13000, 0x1342F), (0x1D400, 0x1D7FF)),
    *((0x1F000, 0x1F0FF), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1F6FF), (0x1F900, 0x1FAFF)),
    *((0x20000, 0x2A6DF), (0xE0020, 0xE007F), (0xF0000, 0xF00FF), (0x10FF00, 0x10FFFF)),
]
_CONTROL = [
    *("<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "[@BOS@]"),
    *(
        "<unused0>",
        "<unused7>",
        "<unused99>",
        "<unused6241>",
        "<image_soft_token>",
        "<0x0A>",
        "<0xE2>",
    ),
    *(
        "<0xFF>",
        "<table>",
        "</b>",
        "<h1>",
        "<|im_start|>",
        "<start_of_image>",
        "[multimodal]",
        "</s>",
    ),
]
_SPACES = [
    " ",
    "\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\u200b",
    "▁",
    "\v",
    "\f",
    "\0",
    "\u2028",
]
_EMOJI = [
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏽",
        "🇩🇪🇯🇵",
        "1️⃣",
        "🏴󠁧󠁢󠁳󠁣󠁴󠁿",
        "🧑🏿‍🚀",
        "❤️‍🔥",
        "☺",
        "☺️",
        "\u200d",
        "\ufe0f",
        "🫠",
        "👁️‍🗨️",
    ),
]


def texts(tokens: Sequence[str], seed: int = 0) -> list[str]:
    """Return over 6,000 texts of every kind that is hard on a tokenizer, the same each time.

    Args:
        tokens: Of the vocabulary; some are put together at random.
        seed: Of what is chosen at random.
    """
    source = random.Random(seed)
    every = [chr(x) for first, last in _BLOCKS for x in range(first, last + 1)]
    words = sorted({word for line in _code() for word in line.split()})
    found = ["", "a", " ", "▁", *_CONTROL, *_SPACES, *_EMOJI, *_code()[:600]]
    for first, last in _BLOCKS:
        letters = [chr(x) for x in range(first, last + 1)]
        found += ["".join(source.choices(letters, k=source.randint(1, 40))) for _ in range(12)]
        found += [
            " ".join("".join(source.choices(letters, k=5)) for _ in range(6)) for _ in range(4)
        ]
    for space in _SPACES:
        found += [space * count for count in (*range(2, 40), 100, 1000)]
        found += [
            f"{source.choice(words)}{space * count}{source.choice(words)}" for count in range(1, 12)
        ]
    for _ in range(600):
        parts = source.choices([*_CONTROL, *_SPACES, *_EMOJI, *words], k=source.randint(2, 12))
        found.append("".join(parts))
    for control in _CONTROL:  # nearly, cut short, or run together
        found += [
            control[:-1],
            control[1:],
            control * 3,
            f" {control} ",
            control.upper(),
            f"x{control}y",
        ]
    for _ in range(1400):
        found.append("".join(source.choices(every, k=source.randint(1, 60))))
    for _ in range(1300):  # joined as no text is
        found.append("".join(source.choices(tokens, k=source.randint(2, 30))))
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        found += [unicodedata.normalize(form, "Ångström ｶﾞ ﬁ 한국어 ệ Ω ½ " + x) for x in words[:40]]
    for letter in "aA1.=-_ \n\t▁é日𝒳\u0301👍":
        found.append(letter * 10_000)
    found += [source.choice("ab") * length for length in range(1, 300, 3)]
    found += ["".join(source.choices("aab", k=length)) for length in range(1, 300, 3)]
    found += [str(source.randrange(10 ** source.randint(1, 30))) for _ in range(200)]
    found += ["\n".join(_code()[start : start + 120]) for start in range(0, 2400, 120)]
    return found


def id_lists(size: int, special: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Return 4,000 lists of token ids below `size`, with special ones and runs of bytes among them.

    Args:
        size: Number of tokens.
        special: Ids that are to come often: special and byte tokens.
        seed: Of what is chosen at random.
    """
    source = random.Random(seed)
    lists = []
    for _ in range(4000):
        share = source.choice((0.0, 0.2, 0.8))
        lists.append(
            [
                source.choice(special) if source.random() < share else source.randrange(size)
                for _ in range(source.randint(0, 30))
            ]
        )
    return lists


def _code() -> list[str]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "textwrap.py", "typing.py")
    return [line for name in names for line in (stdlib / name).read_text().splitlines()]
