from typing import Any

import pytest

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer import GemmaTokenizer

# How templates read contents, with what they make of the texts "Hi " and "you".
LOOP = "{% for part in m.content %}{{ part.text | trim }};{% endfor %}"
BOTH = "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}"
STRINGS = [
    "{{ m.content }}",
    "{{ m['content'] | trim }}",
    "{{ '' ~ m.content }}",
    "{{ '' + m.content }}",
    "{{ '%s' | format(m.content) }}",
    "{{ '{}'.format(m.content) }}",
    "{{ m.content | join }}",
    "{{ m.content | string }}",
    "{{ m.content.strip() }}",
    "{{ m.content.split('|')[0] }}",
    "{% if m.content is string %}{{ m.content }}{% endif %}",
    "{% if m.content is string %}{{ m.content }}{% else %}{{ raise_exception('text!') }}{% endif %}",
    "{% set text = m.content %}{{ text }}",
    "{{ m.content }}{{ m.content[0].text }}",
    "{% for c in m.content %}{{ c }}{% endfor %}",
]
PARTS = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]


@pytest.fixture
def render(write_folder: Any) -> Any:
    def render(body: str, *messages: dict[str, Any]) -> str:
        template = "{% for m in messages %}" + body + "|{% endfor %}"
        tokenizer = GemmaTokenizer.from_pretrained(write_folder(template=template))
        text = tokenizer.apply_chat_template(messages)
        ids = tokenizer.encode_chat(messages)
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
        return text

    return render


@pytest.mark.parametrize("body", STRINGS)
def test_parts_become_one_text_where_strings_are_expected(render: Any, body: str) -> None:
    answer = {"role": "assistant", "content": PARTS[1:]}
    text = render(
        body, {"role": "user", "content": PARTS}, answer, {"role": "user", "content": "x"}
    )
    assert text == "Hi you|you|x|"


@pytest.mark.parametrize(
    "body",
    [
        LOOP,
        BOTH,
        "{% for part in m['content'] %}{{ part['text'].strip() }};{% endfor %}",
        "{% for part in m.content %}{{ part.get('text') | trim }};{% endfor %}",
        "{% for part in m.content %}{{ part.type }}{{ (part.items() | list)[1][1] | trim }};{% endfor %}",
        "{% for text in m.content | map(attribute='text') %}{{ text | trim }};{% endfor %}",
        "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text | trim }};{% endfor %}",
    ],
)
def test_parts_stay_where_the_template_loops_over_them(render: Any, body: str) -> None:
    text = render(body, {"role": "user", "content": PARTS})
    assert text.replace("text", "") == "Hi;you;|"


def test_each_role_in_its_own_form(render: Any) -> None:
    body = "{% if m.role == 'user' %}" + LOOP + "{% else %}{{ m.content + '' }}{% endif %}"
    chat = [{"role": role, "content": PARTS} for role in ("user", "assistant", "user")]
    assert render(body, *chat) == "Hi;you;|Hi you|Hi;you;|"


def test_json_of_parts_is_as_in_transformers(render: Any, oracle: Any) -> None:
    message = {"role": "user", "content": PARTS}
    template = "{{ messages[0].content | tojson }}"
    expected = oracle.apply_chat_template([message], chat_template=template, tokenize=False)
    assert render("{{ m.content | tojson }}", message) == expected + "|"


def test_no_parts_are_no_text(render: Any) -> None:
    assert render("{{ m.content }}", {"role": "user", "content": []}) == "|"


def test_a_template_that_takes_neither_fails_with_its_own_words(render: Any) -> None:
    with pytest.raises(TokenizerError, match="no user"):
        render("{{ raise_exception('no ' + m.role) }}", {"role": "user", "content": PARTS})


RESULT = {"role": "tool", "content": {"name": "f", "response": {"mm": 3}}}


@pytest.mark.parametrize(
    ("body", "text"),
    [("{{ m.content.response.mm }}", "3|"), ("{{ m.content.response | tojson }}", '{"mm": 3}|')],
)
def test_what_a_tool_returns_is_read(render: Any, body: str, text: str) -> None:
    assert render(body, RESULT) == text


@pytest.mark.parametrize(
    "body", ["{{ m.content }}", "{{ m.content.response }}", "{{ [m.content] }}"]
)
def test_what_a_tool_returns_is_not_printed_as_python_does(render: Any, body: str) -> None:
    with pytest.raises(TokenizerError, match=r"Message 1 has an object as content.* as JSON text"):
        render(body, RESULT)
