"""What `--auto` chose for each matrix, as a bundle tells it: `Choice`."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from gemma_deploy.json_values import typed
from gemma_deploy.quantization.formats import WeightFormat

CHOICES_FILE: Final = "sensitivities.json"
"""Name of the list in a bundle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was chosen for one matrix.

    Attributes:
        name: The checkpoint's name of it.
        format: How it is stored.
        size_bytes: What that takes.
        kl_nats: What rounding it to nearest costs, as mean KL divergence.
    """

    name: str
    format: WeightFormat
    size_bytes: int
    kl_nats: float


def choices_json(choices: Sequence[Choice]) -> str:
    """Return the contents of the file."""
    rows = [dataclasses.asdict(x) | {"format": str(x.format)} for x in choices]
    return json.dumps({"choices": rows}, indent=1) + "\n"


def parse_choices(raw: dict[str, Any]) -> tuple[Choice, ...]:
    """Return what `choices_json` wrote, parsed as JSON.

    Raises:
        KeyError, TypeError, ValueError, RequestError: It did not.
    """
    return tuple(
        Choice(
            name=typed(str, row["name"], "name"),
            format=WeightFormat.parse(typed(str, row["format"], "format")),
            size_bytes=typed(int, row["size_bytes"], "size_bytes"),
            kl_nats=typed(float, row["kl_nats"], "kl_nats"),
        )
        for row in raw["choices"]
    )
