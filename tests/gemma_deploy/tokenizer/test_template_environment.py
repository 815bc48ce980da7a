import pytest

from gemma_deploy.tokenizer.template_environment import compiled, names_in


@pytest.mark.parametrize(
    "source",
    [
        "<x>",
        "{{ '<x>' }}",
        "{{ '<' ~ 'x' ~ '>' }}",
        "{{ '<' + 'X>' | lower }}",
        "{{ ['a', '<x>'][1] }}",
        "{% set tokens = {'user': '<x>'} %}{{ tokens.user }}",
        "{% macro turn(open='<x>') %}{{ open }}{% endmacro %}{{ turn() }}",
    ],
)
def test_spelled_strings_are_changed(source: str) -> None:
    assert compiled(source, lambda text: text.replace("<x>", "!")).render() == "!"


def test_names_are_the_strings_and_attributes() -> None:
    found = names_in("text {{ a.b['c'].d }}{% if e == 'f' %}{% endif %}{{ {'g': 1}[h] }}")
    assert found == {"text ", "b", "c", "d", "f", "g"}
