"""What may be possible on a machine, and the judgement of it: `Capability`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One thing that may be done with gemma-deploy.

    Attributes:
        name: What it is.
        is_available: Whether this machine can do it; None where that cannot be told.
        detail: Why, or with what.
        remedy: What to run or do to make it available; None where nothing is needed or helps.
    """

    name: str
    is_available: bool | None
    detail: str
    remedy: str | None = None
