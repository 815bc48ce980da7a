"""Values quoted in messages, short enough to read: `shortened`."""


def shortened(value: object, limit: int = 80) -> str:
    """Return a value's repr, its middle left out where it is longer than `limit` characters."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[len(text) - half :]}"
