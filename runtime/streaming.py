"""Text while it is being generated: `TextStream`."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Self

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.rows import Row
from gemma_deploy.runtime.turns import SharedIterator


@dataclass(slots=True)
class _Text:
    """What was yielded so far, and whether that is all."""

    pieces: list[str] = field(default_factory=list)
    is_whole: bool = False


class TextStream(Iterator[str]):
    """Iterates over pieces of text as soon as their tokens are there; never an empty piece.

    The pieces joined are `result.text`. Closing the stream, or leaving a `with` block around it,
    cancels what is left, and so does Ctrl-C during a step; `result` then holds what there was, as it
    does after an error. Any thread may ask for the next piece, and each piece goes to one of them.

    Args:
        row: What the steps extend.
        steps: Runs one step for each item; the row has got a token then.
        push: Takes a token and returns the text it completes.
        finish: Returns the text held back.
        to_result: Makes a result of the finished row and its text.
        is_inside: See `SharedIterator`.
    """

    def __init__(
        self,
        row: Row,
        steps: Generator[object],
        *,
        push: Callable[[int], str],
        finish: Callable[[], str],
        to_result: Callable[[Row, str], GenerationResult],
        is_inside: Callable[[], bool] = lambda: False,
    ) -> None:
        self._row = row
        self._to_result = to_result
        self._text = _Text()
        # It does not know the stream: one that is dropped unfinished is freed at once, with its KV cache.
        pieces = _pieces(row, steps, push, finish, self._text)
        self._pieces = SharedIterator(pieces, "the stream", is_inside)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is left; nothing happens when the stream has ended.

        A step that runs in another thread, which waits for a piece, is the last one and is waited for.
        """
        self._row.finish("cancelled")
        self._pieces.close()
        self._text.is_whole = True

    @property
    def result(self) -> GenerationResult:
        """The whole text and how it ended.

        Raises:
            RequestError: The stream has not ended: iterate to its end, or close it.
        """
        if not self._text.is_whole:
            raise RequestError(
                "the stream has not ended: iterate to its end, or close it, before asking for its "
                "result"
            )
        return self._to_result(self._row, "".join(self._text.pieces))


def _pieces(
    row: Row,
    steps: Generator[object],
    push: Callable[[int], str],
    finish: Callable[[], str],
    text: _Text,
) -> Generator[str]:
    """Yield each piece of text, and note it in `text`."""
    try:
        for _ in steps:
            # The token that ended the text is no part of it.
            if row.finish_reason != "stop" and (piece := push(row.last_token)):
                text.pieces.append(piece)
                yield piece
        if rest := finish():
            text.pieces.append(rest)
            yield rest
    finally:
        # What the model was run with is given back now, not when the garbage is collected.
        steps.close()
        row.finish("cancelled")
        text.is_whole = True
