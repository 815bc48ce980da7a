"""The Jinja sandbox that chat templates run in, set up as transformers sets up its own."""

import json
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.nodes import Node

    from gemma_deploy.tokenizer.template_sandbox import MeteredSandbox

_MAX_TIME_FORMAT: Final = 100
_MAX_DEPTH: Final = 150
_MAX_BLOCKS: Final = 20  # as many loops within each other as Python compiles
_MAX_NODES: Final = 50_000  # each counted in all blocks that hold it, as Jinja walks them


def compiled(source: str, change: Callable[[str], str] = str) -> "Template":
    """Return a template, metered, with `change` applied to every string that it spells.

    Strings that it spells in parts (`'<start_of_' ~ 'turn>'`) are put together before.
    """
    from jinja2.optimizer import optimize

    from gemma_deploy.tokenizer.template_meter import metered
    from gemma_deploy.tokenizer.template_sandbox import MeteredTemplate, instrumented

    sandbox = _sandbox()
    tree = sandbox.parse(source)
    _check(tree)
    with metered(source):  # constants are computed here
        optimize(tree, sandbox)
        _change_strings(tree, change)
        sandbox.meter_additions()
        code = sandbox.compile(instrumented(tree))
    return MeteredTemplate.from_code(sandbox, code, sandbox.make_globals(None))


def names_in(source: str) -> frozenset[str]:
    """Return the strings and attributes that a template spells, such as keys that it looks up."""
    from jinja2 import nodes

    names: set[str] = set()

    def noted(text: str) -> str:
        names.add(text)
        return text

    tree = _sandbox().parse(source)
    _change_strings(tree, noted)
    return frozenset(names | {node.attr for node in tree.find_all(nodes.Getattr)})


def _sandbox() -> "MeteredSandbox":
    """Return a new sandbox: templates come with checkpoints and are other people's code."""
    from jinja2.ext import loopcontrols

    from gemma_deploy.tokenizer.template_sandbox import MeteredSandbox, metered_filter

    # Chat templates make text for a model, not HTML: nothing is to be escaped.
    sandbox = MeteredSandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        optimized=False,  # `compiled` does it, once: Jinja tries again at every level of an expression
        extensions=[loopcontrols, _generation_extension()],
    )
    sandbox.filters["tojson"] = metered_filter("tojson", _tojson)
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _check(tree: "Node") -> None:
    """Refuse what takes long to compile, and numbers that take long to compute with."""
    from jinja2 import nodes

    from gemma_deploy.tokenizer.template_meter import MAX_INT_BITS

    level = [(tree, 0)]
    count = depth = 0
    while level:
        level = [
            (child, blocks + ("body" in child.fields))
            for node, blocks in level
            for child in node.iter_child_nodes()
        ]
        depth += 1
        count += sum(1 + blocks for _, blocks in level)
        if depth > _MAX_DEPTH:
            _raise_exception(f"it is nested deeper than {_MAX_DEPTH} expressions and blocks")
        if any(blocks > _MAX_BLOCKS for _, blocks in level):
            _raise_exception(f"it has more than {_MAX_BLOCKS} nested blocks")
        if count > _MAX_NODES:
            _raise_exception(f"it has more than {_MAX_NODES:,} expressions, counted in each block")
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, int) and constant.value.bit_length() > MAX_INT_BITS:
            _raise_exception(f"it has a number of more than {MAX_INT_BITS} bits")


def _change_strings(tree: "Node", change: Callable[[str], str]) -> None:
    from jinja2 import nodes

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list | tuple):
            return type(value)(map(changed, value))
        if isinstance(value, dict):
            return {changed(key): changed(item) for key, item in value.items()}
        return value

    for constant in tree.find_all(nodes.Const):
        constant.value = changed(constant.value)
    for data in tree.find_all(nodes.TemplateData):
        data.data = change(data.data)


def _generation_extension() -> Any:
    """Return the extension for `{% generation %}` blocks, which mark what a model wrote.

    They matter to training only; here their body is rendered as if the tags were not there.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance attribute

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  templates may pass it by this name
    if len(format) > _MAX_TIME_FORMAT:
        _raise_exception("the format of a time is too long")
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
