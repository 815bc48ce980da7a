import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.cli.verification_rows import describe_rows, spread, token_rows
from gemma_deploy.config import GemmaConfig
from gemma_deploy.parity import TokenRow


class TestTokenRows:
    @pytest.mark.parametrize("tokens", [16, 256, 3000])
    def test_our_own_text_is_as_long_as_asked(self, tokens: int, bundle: Path) -> None:
        text, *others = token_rows(Bundle.open(bundle), None, tokens)

        assert len(text.token_ids) == tokens
        assert text.positions == tuple(range(tokens))
        assert len({len(row.positions) for row in others}) == 1

    def test_a_text_of_ones_own_is_not_repeated(self, bundle: Path) -> None:
        rows = token_rows(Bundle.open(bundle), "A text of my own, with a number: 42.", 3000)

        assert len(rows[0].token_ids) < 40

    def test_the_models_limit_holds(self, bundle: Path) -> None:
        rows = token_rows(Bundle.open(bundle), None, 100_000)

        assert len(rows[0].token_ids) == 8192


class TestSpread:
    def test_is_everything_where_memory_allows(self) -> None:
        assert spread(256, 512) == tuple(range(256))

    def test_is_even_and_bounded_where_it_does_not(self) -> None:
        positions = spread(5000, 262_144)

        gaps = {b - a for a, b in itertools.pairwise(positions)}
        assert (positions[0], positions[-1]) == (0, 4999)
        assert len(positions) * 262_144 * 4 <= 200e6
        assert len(positions) > 150
        assert max(gaps) - min(gaps) <= 1


class TestDescribeRows:
    @pytest.mark.parametrize(
        ("tokens", "said"),
        [
            (8, "do NOT pass the sliding window of 8 tokens, which stays untested: --tokens 10"),
            (9, "they pass the sliding window of 8 tokens"),
        ],
    )
    def test_says_whether_the_window_was_passed(
        self, tokens: int, said: str, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        config = GemmaConfig.from_file(tiny_checkpoint("gemma3"))

        assert said in describe_rows(config, [row(tokens)], tokens)

    def test_a_model_without_windows(self, tiny_checkpoint: Callable[..., Path]) -> None:
        config = GemmaConfig.from_file(tiny_checkpoint("gemma1"))

        assert describe_rows(config, [row(20)], 50) == (
            "20 tokens of the 50 asked for are read, 20 positions of them compared"
        )


def row(tokens: int) -> TokenRow:
    return TokenRow(token_ids=tuple(range(tokens)), positions=tuple(range(tokens)))
