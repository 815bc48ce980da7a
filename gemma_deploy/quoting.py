"""Values of any size, quoted in messages of bounded length."""


def shortened(value: object, limit: int = 80) -> str:
    """Return a value's `repr`, cut behind `limit` characters.

    A cut one ends in an ellipsis and says how long the whole is: `'aaaa… (1,000,002 characters)`.

    Args:
        value: Anything. What has no `repr` (it is nested too deeply, or a number of too many
            digits) is named by its type.
        limit: Number of characters to keep, at least 1.
    """
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} that is too large to show"
    return shortened_text(text, limit)


def shortened_text(text: str, limit: int = 80) -> str:
    """Return a text, cut as `shortened` cuts, without quotes around it."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text):,} characters)"
