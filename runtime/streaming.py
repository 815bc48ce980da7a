"""Text while it is being generated: `TextStream`."""

from collections.abc import Callable, Generator, Iterator
from typing import Self

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.rows import Row


class TextStream(Iterator[str]):
    """Iterates over pieces of text as soon as their tokens are there; never an empty piece.

    The pieces joined are `result.text`. Closing the stream, or leaving a `with` block around it,
    cancels what is left, and so does Ctrl-C during a step; `result` then holds what there was, as it
    does after an error.

    Args:
        row: What the steps extend.
        steps: Runs one step for each item; the row has got a token then.
        push: Takes a token and returns the text it completes.
        finish: Returns the text held back.
        to_result: Makes a result of the finished row and its text.
    """

    def __init__(
        self,
        row: Row,
        steps: Iterator[object],
        *,
        push: Callable[[int], str],
        finish: Callable[[], str],
        to_result: Callable[[Row, str], GenerationResult],
    ) -> None:
        self._row = row
        self._to_result = to_result
        self._text: list[str] = []
        self._result: GenerationResult | None = None
        self._pieces = self._run(steps, push, finish)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is left; nothing happens when the stream has ended."""
        self._pieces.close()
        self._end()

    @property
    def result(self) -> GenerationResult:
        """The whole text and how it ended.

        Raises:
            RequestError: The stream has not ended: iterate to its end, or close it.
        """
        if self._result is None:
            raise RequestError(
                "the stream has not ended: iterate to its end, or close it, before asking for its "
                "result"
            )
        return self._result

    def _run(
        self, steps: Iterator[object], push: Callable[[int], str], finish: Callable[[], str]
    ) -> Generator[str]:
        try:
            for _ in steps:
                # The token that ended the text is no part of it.
                if self._row.finish_reason != "stop" and (piece := push(self._row.last_token)):
                    self._text.append(piece)
                    yield piece
            if rest := finish():
                self._text.append(rest)
                yield rest
        finally:
            self._end()

    def _end(self) -> None:
        self._row.finish("cancelled")
        if self._result is None:
            self._result = self._to_result(self._row, "".join(self._text))
