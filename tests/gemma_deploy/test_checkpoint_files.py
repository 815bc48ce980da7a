import pytest

from gemma_deploy.checkpoint_files import is_licence


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "LICENCE",
        "license.txt",
        "NOTICE",
        "notice.txt",
        "COPYING",
        "Gemma_Terms_of_Use.md",
        "PROHIBITED_USE_POLICY.md",
    ],
)
def test_licences(name: str) -> None:
    assert is_licence(name)


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.model", "my_license_key"])
def test_other_files(name: str) -> None:
    assert not is_licence(name)
