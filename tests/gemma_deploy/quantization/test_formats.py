import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.quantization.formats import StoredPart, WeightFormat

TEXTS = ("int4/32", "int4/128", "int8/64", "int8/channel", "nf4/64", "fp8/channel", "float16")


@pytest.mark.parametrize("text", TEXTS)
def test_a_format_is_read_back_from_its_text(text: str) -> None:
    assert str(WeightFormat.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", r"no weight format 'int3'; expected one of int4, int8, nf4, fp8, float32"),
        ("int4/48", r"int4 with a block size of 48; expected 32, 64, 128, 256$"),
        ("int4/channel", r"int4 with a block size of channel; expected 32, 64, 128, 256$"),
        ("int8/16", r"int8 with a block size of 16; expected 32, 64, 128, 256, channel"),
        ("int4/many", r"'int4/many' is no weight format; expected e\.g\. int4/64"),
        ("float16/64", r"'float16/64' is no weight format: only int4"),
    ],
)
def test_what_is_no_format_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        WeightFormat.parse(text)


def test_a_quantized_matrix_is_codes_and_scales() -> None:
    shape = (6, 256)

    def parts(text: str) -> list[StoredPart]:
        return list(WeightFormat.parse(text).parts("w", shape))

    assert parts("int4/64") == [
        StoredPart("w", "U8", (6, 128)),
        StoredPart("w.scales", "F16", (6, 4)),
    ]
    assert parts("int8/channel") == [
        StoredPart("w", "I8", (6, 256)),
        StoredPart("w.scales", "F16", (6, 1)),
    ]
    assert parts("fp8/32")[0] == StoredPart("w", "F8_E4M3", (6, 256))
    assert parts("bfloat16") == [StoredPart("w", "BF16", (6, 256))]


@pytest.mark.parametrize(
    ("text", "bits"), [("int4/32", 4.5), ("nf4/64", 4.25), ("int8/128", 8.125), ("float16", 16)]
)
def test_sizes_count_the_scales(text: str, bits: float) -> None:
    shape = (4, 512)
    assert WeightFormat.parse(text).size_bytes(shape) * 8 / (4 * 512) == bits


@pytest.mark.parametrize(
    ("block_size", "columns", "remedy"),
    [(128, 64, "choose 32 or 64"), (32, 72, "keep it in 16 bits"), (64, 96, "choose 32")],
)
def test_blocks_must_divide_rows(block_size: int, columns: int, remedy: str) -> None:
    message = rf"w has rows of {columns} elements, which blocks of {block_size} do not .*{remedy}"
    with pytest.raises(RequestError, match=message):
        WeightFormat("int4", block_size).parts("w", (8, columns))


def test_four_bits_need_an_even_number_of_columns() -> None:
    with pytest.raises(RequestError, match="w has rows of 7 elements"):
        WeightFormat("nf4", 32).parts("w", (2, 7))
