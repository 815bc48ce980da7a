"""Parts of the Markdown files in benchmarks/results/."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as a table, the first its head; what would end a cell early is escaped."""
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    rule = f"|{'---|' * len(rows[0])}"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def bullets(facts: Sequence[tuple[str, str]]) -> str:
    """Return names and values as a list."""
    return "\n".join(f"- {name}: {value}" for name, value in facts)
