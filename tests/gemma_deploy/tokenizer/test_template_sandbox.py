"""Chat templates that would take all time or memory, and those that only look as if they did."""

from typing import Any

import pytest

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.tokenizer.backend import minimal_backend
from gemma_deploy.tokenizer.settings import TokenizerSettings

_DOUBLED = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
_FRAYED = (
    "{% set a = 'a' * 200000 %}{% set b = 'ab' + 'a' * 100000 %}{% set c = 'b' * 100000 + 'a' %}"
)
_LONG = "{% set a = 'a' * 1000000 %}{% set b = 'b' * 1000000 %}"


def doubling(step: str, start: str = "'a'") -> str:
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}"
        "{% endfor %}{{ ns.x | length }}"
    )


BOMBS = [
    # Loops and calls without an end.
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) if range(99999) | sum == 1 %}{% endfor %}",
    "{% for i in range(99999) %}{{ -1 in range(99999) | map('abs') }}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | select %}{% endfor %}",
    "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "".join(
        f"{{% block b{i} %}}{{% if {i} %}}{{{{ self.b{i - 1}() }}}}{{{{ self.b{i - 1}() }}}}{{% endif %}}{{% endblock %}}"
        for i in range(1, 60)
    )
    + "{% block b0 %}{% endblock %}",
    "{% for i in range(99999) %}{% for j in range(99) %}"
    + "x" * 50_000
    + "{% endfor %}{% endfor %}",
    # Operators and formats.
    "{{ 'a' * 10**10 }}",
    "{{ ([1] * 10**10) | length }}",
    "{{ 10 ** (10 ** 9) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '%(()a())9999999999d' % {'()a()': 1} }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:>10000000000}'.format('a') }}",
    "{{ '{:>{w}}'.format('a', w=10**10) }}",
    "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    _LONG + "{{ ('{0}' * 1000000).format(a) }}",
    # Filters and methods.
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '\t'.expandtabs(10**10) }}",
    "{{ 'a\nb' | indent(10**10) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ [1] | batch(10**10, 'x') | list | length }}",
    "{{ [1] | slice(10**10) | list | length }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    _LONG + "{{ a.join(b) }}",
    _LONG + "{{ b | join(a) }}",
    _LONG + "{{ a | replace('a', b) }}",
    _LONG + "{{ a | replace(new=b, old='a') }}",
    _LONG + "{{ a.translate({97: b}) }}",
    _LONG + "{% for i in range(99999) %}{% set x = a | upper %}{% endfor %}",
    _LONG + "{% for i in range(99999) %}{% set x = a[1:] %}{% endfor %}",
    "{{ ('<!---->' * 1000000) | striptags }}",
    "{{ ([[1] * 1000] * 10000) | sum(start=[]) | length }}",
    "{{ range(99999) | map(attribute='a.' * 1000000) | list | length }}",
    # Searches again at each character.
    *(
        _FRAYED + f"{{{{ {search} }}}}"
        for search in [
            "a.rfind(b)",
            "a.rindex(b)",
            "a.rsplit(b)",
            "a.rpartition(b)",
            "a.strip(c)",
            "a.lstrip(c)",
            "a.rstrip(c)",
            "a | trim(c)",
        ]
    ),
    "{% set a = 'a' * 1000000 %}{{ ('a' * 999999 ~ 'b').startswith((a,) * 1000000) }}",
    "{{ ('{0' ~ '[0]' * 1000000 ~ '}').format('a') }}",
    # Whole numbers: few have one hash, and all are small.
    "{{ dict(range(0, 40000 * 2305843009213693951, 2305843009213693951) | batch(2)) | length }}",
    "{% set n = 9223372036854775807 %}{{ range(0, n + n + n + n, n) | length }}",
    "{{ range(0, 9223372036854775807 + 9223372036854775807 + 9223372036854775807, 2305843009213693951) | length }}",
    "{{ '1e300' | int }}",
    "{{ 1e300 | int }}",
    "{{ 2 ** 65 }}",
    "{{ messages[0].content | length * 2 ** 63 * 4 }}",
    # Twice as much, sixty times.
    doubling("ns.x ~ ns.x"),
    doubling("ns.x + ns.x"),
    doubling("ns.x + ns.x", "[1]"),
    doubling("ns.x | replace('a', 'aa')"),
    "{% set x = 'a' %}" + "{% set x = x + x %}" * 60,
    # Small values that hold themselves many times over, or very deeply.
    _DOUBLED + "{{ ns.x }}",
    _DOUBLED + "{{ ns.x | string | length }}",
    _DOUBLED + "{{ ns.x | tojson }}",
    _DOUBLED + "{{ 'x' ~ ns.x }}",
    _DOUBLED + "{{ '%s' % (ns.x,) }}",
    _DOUBLED + "{{ '{}'.format(ns.x) }}",
    _DOUBLED + "{{ ns.x == ns.y }}",
    _DOUBLED + "{{ ns.x is eq(ns.y) }}",
    _DOUBLED + "{{ [ns.x].count(ns.y) }}",
    _DOUBLED + "{% for i in range(2) %}{{ loop.changed(ns.x if i else ns.y) }}{% endfor %}",
    "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}",
    doubling("({ns.x: ns.x}.items() | list)[0]", "(1,)"),
    doubling("(dict([[ns.x, ns.x]]).items() | list)[0]", "(1,)"),
    *(
        doubling("cycler(ns.x, ns.x).items", "(1,)") + f"{{{{ {sink} }}}}"
        for sink in [
            "{ns.x: 1} | length",
            "{}[ns.x]",
            "{}.get(ns.x)",
            "[{}] | map(attribute=ns.x) | list",
            "{1: ns.x}.items() - []",
            "{}.keys() - [ns.x]",
            "namespace([[ns.x, 1]])",
            "raise_exception(ns.x)",
        ]
    ),
    "{% set ns = namespace(x=(1,)) %}{% for i in range(9999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} | length }}",
]
BROKEN = [
    "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "{% for i in [1] %}" * 300 + "{% endfor %}" * 300,
    "{% if 1 %}" * 2500 + "{% endif %}" * 2500,
    "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "{{ " + "9" * 5000 + " }}",
    "{% for a in b %}" * 21 + "{{ a }}" + "{% endfor %}" * 21,
    "{% for a in b %}" * 20 + "{{ a }}" * 8_000 + "{% endfor %}" * 20,
    "{% for a in b %}{{ [" + "a," * 26_000 + "] }}{% endfor %}",
    "{{ " + "9" * 21 + " }}",
    "{{ 'a' | wordwrap(1) }}",
    "{{ [1] | unique }}",
    "{{ {}.fromkeys([1]) }}",
    "{{ {}.keys().isdisjoint([1]) }}",
    "{{ (0.1).as_integer_ratio() }}",
    "{{ a" + ".b" * 300 + " }}",
    "{{ a" + " + a" * 200 + " }}",
    "{{ 'a'" + " | upper" * 200 + " }}",
    "{% macro a(n) %}{{ a(n + 1) }}{% endmacro %}{{ a(1) }}",
    "{% include 'a' %}",
    "{{ range(10**9) | list }}",
]
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]


def rendered(source: str, messages: list[dict[str, Any]] = MESSAGES) -> str:
    tokenizer = GemmaTokenizer(minimal_backend(), TokenizerSettings(chat_template=source))
    return tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize("source", BOMBS)
def test_bombs_are_stopped(source: str) -> None:
    with pytest.raises(TokenizerError, match="takes too many steps or makes too much text"):
        rendered(source)


@pytest.mark.parametrize("source", BROKEN)
def test_what_cannot_be_compiled_or_run(source: str) -> None:
    with pytest.raises(TokenizerError, match="cannot be applied to these messages"):
        rendered(source)


def test_a_template_of_any_length() -> None:
    with pytest.raises(TokenizerError, match="has 1,000,000 characters; expected at most 65,536"):
        rendered("x" * 1_000_000)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'ab' * 2 }}{{ 2 ** 10 }}{{ 'a' + 'b' }}{{ [1] + [2] }}", "abab1024ab[1, 2]"),
        ("{{ '%5d|%s' % (1, 'x') }}{{ '{:>3}'.format('y') }}{{ '%s' | format(3) }}", "    1|x  y3"),
        ("{{ 'a' | center(3) }}|{{ 'a\nb' | indent(2) }}|{{ 'a'.zfill(2) }}", " a |a\n  b|0a"),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ 'a,b' | replace(',', ';') }}", "[[1, 2], [3]]a;b"),
        ("{{ messages | map(attribute='role') | join('+') }}", "user"),
        ("{% if messages | selectattr('tool_calls') %}always{% endif %}", "always"),
        ("{% for m in messages | rejectattr('x') %}{{ loop.length }}{% endfor %}", "1"),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) ~ f(2) }}", "<1><2>"),
        (
            "{% for x in [1, [2]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
            "12",
        ),
        ("{% for i in range(9) if i is odd %}{{ i }}{% endfor %}", "1357"),
        ("{{ 'b' in ['a', 'b'] and (1, 2) == (1, 2) and 1 < 2 < 3 }}", "True"),
        ("{{ messages[0].content[:1] }}{{ undefined_thing }}", "h"),
        ("{{ 7 // 2 }}{{ 7 - 9 }}{{ 1 / 4 }}{{ -(2 ** 63) }}", "3-20.25-9223372036854775808"),
        ("{{ ' a ' | trim }}{{ 'xay'.strip('xy') }}{{ 'a,b'.rsplit(',', 1) }}", "aa['a', 'b']"),
        ("{{ {'a': 1}['a'] }}{{ dict(messages[0], content='b').content }}", "1b"),
    ],
)
def test_others_are_as_in_jinja(source: str, text: str) -> None:
    assert rendered(source) == text


def test_long_conversations_may_cost_more() -> None:
    source = (
        "{% for m in messages %}{% for c in m.content %}{{ c if c != '*' }}{% endfor %}{% endfor %}"
    )
    content = "a*" * 50_000
    assert rendered(source, [{"role": "user", "content": content}]) == "a" * 50_000
