"""What the programs in benchmarks/ take on their command lines, for `argparse`."""

import argparse


def whole_number(text: str, *, least: int = 1) -> int:
    """Return the number a word stands for.

    Raises:
        ArgumentTypeError: It is none, or less than `least`.
    """
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from {least} on")
    return int(text)


def two_or_more(text: str) -> int:
    """Return a number of new tokens: with one alone nothing is decoded, the first is prefill's.

    Raises:
        ArgumentTypeError: It is no number from 2 on.
    """
    return whole_number(text, least=2)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers from 1 on in a list with commas.

    Raises:
        ArgumentTypeError: It holds anything else.
    """
    return tuple(map(whole_number, text.split(",")))
