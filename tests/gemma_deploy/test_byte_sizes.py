import pytest

from gemma_deploy.byte_sizes import format_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (5_012_344_832, "4.67 GiB"),
        (5 << 50, "5120.00 TiB"),
    ],
)
def test_in_binary_units(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text
