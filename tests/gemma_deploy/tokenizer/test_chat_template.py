import re
from typing import Any

import pytest

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.tokenizer.chat_template import DEFAULT_CHAT_TEMPLATE, ChatTemplate
from gemma_deploy.tokenizer.control_tokens import ControlTokens
from gemma_deploy.tokenizer.conversation import Conversation

USER = {"role": "user", "content": " What is\n a  llama? "}
MODEL = {"role": "assistant", "content": "An animal.\n\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}],
}

# Exercises whitespace control, the filters and the globals that checkpoints' templates use.
BUSY_TEMPLATE = """\
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
    {% else %}
{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
    {% endif %}
    {% if loop.index > 6 %}{% break %}{% endif %}
{% endfor %}
{% set ns = namespace(count=messages | length) %}
{{ {'<a>': "é", 'n': ns.count} | tojson(indent=2) }}
{%- if tools %}tools{% endif %}
{{ strftime_now('%Y') }}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def test_default_is_gemmas_turns(tokenizer: GemmaTokenizer) -> None:
    assert tokenizer.apply_chat_template([USER]) == (
        "<bos><start_of_turn>user\nWhat is\n a  llama?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert tokenizer.apply_chat_template([USER, MODEL], add_generation_prompt=False) == (
        "<bos><start_of_turn>user\nWhat is\n a  llama?<end_of_turn>\n"
        "<start_of_turn>model\nAn animal.<end_of_turn>\n"
    )


def test_default_puts_the_system_message_before_the_first_user_turn(
    tokenizer: GemmaTokenizer,
) -> None:
    assert tokenizer.apply_chat_template([SYSTEM, USER, MODEL, PARTS]) == (
        "<bos><start_of_turn>user\nBe brief.\n\nWhat is\n a  llama?<end_of_turn>\n"
        "<start_of_turn>model\nAn animal.<end_of_turn>\n"
        "<start_of_turn>user\nab<end_of_turn>\n<start_of_turn>model\n"
    )


def test_role_model_is_assistant(tokenizer: GemmaTokenizer) -> None:
    theirs = {**MODEL, "role": "model"}
    assert tokenizer.apply_chat_template([USER, theirs, USER]) == tokenizer.apply_chat_template(
        [USER, MODEL, USER]
    )


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, BUSY_TEMPLATE])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [[USER], [USER, MODEL, USER], [USER, MODEL] * 5])
def test_renders_and_encodes_as_transformers(
    write_folder: Any, oracle: Any, template: str, prompt: bool, messages: Any
) -> None:
    ours = GemmaTokenizer.from_pretrained(write_folder(template=template))
    expected = {
        tokenize: oracle.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=tokenize,
            return_dict=False,
        )
        for tokenize in (True, False)
    }
    assert ours.apply_chat_template(messages, add_generation_prompt=prompt) == expected[False]
    assert ours.encode_chat(messages, add_generation_prompt=prompt) == expected[True]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, USER], 'must alternate .* but message 2 is from "user"'),
        ([MODEL], 'must alternate .* but message 1 is from "assistant"'),
        ([SYSTEM, MODEL], 'must alternate .* but message 2 is from "assistant"'),
        ([USER, SYSTEM], 'must alternate .* but message 2 is from "system"'),
        ([SYSTEM], "a system message needs a user message"),
        ([USER, {**MODEL, "tool_calls": [{}]}], "it has no place for tools"),
    ],
)
def test_default_refuses(tokenizer: GemmaTokenizer, messages: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=f"Gemma's chat template cannot .*{message}"):
        tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "no user"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% for a in [] %}" * 30 + "{% endfor %}" * 30, "nested blocks"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
        ("{{ raise_exception('x' * 10 ** 6) }}", r"xxxx… \(1,000,000 characters\)"),
    ],
)
def test_template_that_fails(template: str, reason: str) -> None:
    with pytest.raises(
        TokenizerError, match=re.compile(f"checkpoint's chat .*{reason}", re.DOTALL)
    ):
        ChatTemplate(template, {}, ControlTokens([])).render(Conversation(messages=[USER]))


def test_base_vocabulary_has_no_turns() -> None:
    with pytest.raises(
        TokenizerError, match=r"no <start_of_turn> and no <end_of_turn>, .* plain pr"
    ):
        GemmaTokenizer().encode_chat([USER])


# What a template for tools does: declarations, calls, results, reasoning.
TOOL_TEMPLATE = """\
{{ bos_token }}{% if tools %}{{ tools | tojson }}{% for tool in tools %}[{{ tool.function.name }}]\
{% endfor %}{% endif %}{% for m in messages %}<start_of_turn>{{ m.role }} {{ m.name }}
{% if m.reasoning_content %}({{ m.thinking }}){% endif %}{{ m.content | trim }}\
{% for call in m.tool_calls or [] %}CALL {{ call.function.name }} {{ call.function.arguments }}\
{% endfor %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How warm it is, é.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"id": "0", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "0", "name": "weather", "content": "21 C"}


@pytest.mark.parametrize("tools", [None, [], [SCHEMA], [SCHEMA, SCHEMA]])
@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASKED, RESULT],
        [USER, {**ASKED, "content": ""}, RESULT, MODEL, USER],
        [USER, {key: ASKED[key] for key in ("role", "tool_calls")}, RESULT],
        [USER, {"role": "assistant", "content": None}, USER],
        [USER, {**MODEL, "reasoning": "hm"}, {**MODEL, "thinking": "so", "tool_calls": None}],
    ],
)
def test_tools_and_calls_as_in_transformers(
    write_folder: Any, oracle: Any, tools: Any, messages: Any
) -> None:
    ours = GemmaTokenizer.from_pretrained(write_folder(template=TOOL_TEMPLATE))
    keywords = {"tools": tools, "add_generation_prompt": True}
    theirs = {
        tokenize: oracle.apply_chat_template(
            messages,
            chat_template=TOOL_TEMPLATE,
            tokenize=tokenize,
            return_dict=False,
            **keywords,
        )
        for tokenize in (True, False)
    }
    assert ours.apply_chat_template(messages, **keywords) == theirs[False]
    assert ours.encode_chat(messages, **keywords) == theirs[True]


@pytest.mark.parametrize(
    "template",
    [
        DEFAULT_CHAT_TEMPLATE,
        TOOL_TEMPLATE,
        "{{ bos_token }}{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ eos_token }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}{{ m.content | trim }} <eos>{% endfor %}",
    ],
)
@pytest.mark.parametrize(
    "content", ["It is", "It is ", " It is\n\n", "", "a\ue000b \U000f0000", "b"]
)
@pytest.mark.parametrize("as_parts", [False, True])
def test_continues_the_last_message_as_transformers(
    write_folder: Any, oracle: Any, template: str, content: str, as_parts: bool
) -> None:
    ours = GemmaTokenizer.from_pretrained(write_folder(template=template))
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": content}]
    expected = oracle.apply_chat_template(
        messages, chat_template=template, continue_final_message=True, return_dict=False
    )
    if as_parts:
        messages[1] = {"role": "model", "content": [{"type": "text", "text": content}]}
    assert ours.encode_chat(messages, continue_final_message=True) == expected
    text = ours.apply_chat_template(messages, continue_final_message=True)
    assert oracle(text, add_special_tokens=False)["input_ids"] == expected


def test_template_that_leaves_out_the_message_to_continue(write_folder: Any) -> None:
    ours = GemmaTokenizer.from_pretrained(write_folder(template="{{ messages[0].content }}"))
    with pytest.raises(TokenizerError, match="leaves out the end of the last message"):
        ours.encode_chat([USER, MODEL], continue_final_message=True)


@pytest.mark.parametrize("template", [DEFAULT_CHAT_TEMPLATE, "{{ messages[0].content[0].type }}"])
def test_images_are_refused_whatever_the_template(write_folder: Any, template: str) -> None:
    ours = GemmaTokenizer.from_pretrained(write_folder(template=template))
    messages = [{"role": "user", "content": [{"type": "image", "url": "cat.png"}]}]
    for method in (ours.apply_chat_template, ours.encode_chat):
        with pytest.raises(TokenizerError, match="Message 1 has a content part of type 'image'"):
            method(messages)


def test_default_has_no_place_for_tools(tokenizer: GemmaTokenizer) -> None:
    with pytest.raises(TokenizerError, match="it has no place for tools"):
        tokenizer.encode_chat([USER], tools=[SCHEMA])
