"""The Jinja sandbox in which whatever a template does is metered: `MeteredSandbox`.

Jinja's own sandbox keeps templates from Python's internals, not from time and memory. Here a template
has no way to run for long, or to make much, past its `Meter`:

* Code is run more than once by loops, macros and blocks only. Each execution of a body is charged
  for all that stands in it (`instrumented`).
* Values are made by operators, filters, tests and calls only. Each is charged by its operands before it
  runs, so that no operation in C takes long or makes much.
* What walks through a value (writing it, comparing it, hashing it) is charged for all that it holds: a
  list that holds another twice, forty times over, is small and has no end.
"""

import functools
from collections.abc import Callable, Iterable
from string import Formatter
from types import BuiltinMethodType, MethodType
from typing import Any, Final

from jinja2 import Template, TemplateRuntimeError, nodes
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from gemma_deploy.tokenizer.template_meter import STEP, current_meter, length, metered

# For HTML and for prose to fill pages; their cost is not to be told beforehand, or grows with a square.
_WITHOUT_USE: Final = frozenset(
    {"filesizeformat", "pprint", "unique", "urlize", "wordwrap", "xmlattr"}
)
_BUILT_IN: Final = (str, int, float, list, tuple, dict)
# They give bytes, numbers without bounds or HTML, or hash what they are given.
_WITHOUT_USE_METHODS: Final = frozenset(
    {"encode", "to_bytes", "from_bytes", "as_integer_ratio", "striptags", "unescape", "fromkeys"}
    | {"isdisjoint"}
)
_COMPARING_TESTS: Final = frozenset({"lower", "upper"})


class MeteredSandbox(ImmutableSandboxedEnvironment):
    """See the module."""

    # Operators that are not to be computed when a template is compiled.
    intercepted_binops = frozenset({"*", "**", "%", "-", "/", "//"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in _WITHOUT_USE:
            del self.filters[name]
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.filters = {name: metered_filter(name, x) for name, x in self.filters.items()}
        self.tests = {name: _metered_test(name, x) for name, x in self.tests.items()}  # type: ignore[arg-type]  # jinja2 does not say what they are

    def meter_additions(self) -> None:
        """Meter additions from now on: those of constants are computed by then."""
        self.intercepted_binops = frozenset({*self.intercepted_binops, "+"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator."""
        meter = current_meter()
        left, right = meter.taken(left), meter.taken(right)
        meter.charge_operator(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        meter.charge_result(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, PYI063  as in Jinja
        """Call what a template calls."""
        owner = getattr(__obj, "__self__", None)
        if owner is __self:
            return __obj(*args)
        meter = current_meter()
        args = tuple(map(meter.taken, args))
        if isinstance(owner, _BUILT_IN):
            meter.charge(meter.size(owner) if isinstance(owner, list | tuple) else STEP)
            meter.charge_call(__obj.__name__, [owner, *args, *kwargs.values()])
        elif isinstance(owner, LoopContext):  # `changed` compares
            meter.charge(STEP + sum(map(meter.size, args)))
        else:  # macros look at what they are given when they use it; functions hash it or write it
            size = length if isinstance(__obj, Macro | LoopContext) else meter.size
            meter.charge(8 * STEP + sum(map(size, args)))
        result = meter.taken(super().call(__context, __obj, *args, **kwargs))
        meter.charge_result(result)
        return result

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether a template may look an attribute up."""
        return attr not in _WITHOUT_USE_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a metered form of `str.format`; None for anything else."""
        if not isinstance(value, MethodType | BuiltinMethodType):
            return None
        text = value.__self__
        if value.__name__ not in ("format", "format_map") or not isinstance(text, str):
            return None
        if isinstance(text, Markup):
            raise TemplateRuntimeError("HTML cannot be formatted")
        formatter: Formatter = _MeteredFormatter(self)
        if value.__name__ == "format":
            return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)
        return lambda mapping: formatter.vformat(text, (), mapping)

    # What `instrumented` puts calls of into templates.

    def charged(self, units: int) -> bool:
        """Charge for a body that is about to be executed."""
        current_meter().charge(units)
        return True

    def walked(self, value: Any) -> Any:
        """Return a value that is going to be compared, hashed or written."""
        meter = current_meter()
        value = meter.taken(value)
        meter.charge(meter.size(value))
        return value

    def copied(self, value: Any) -> Any:
        """Return a slice."""
        current_meter().charge_result(value)
        return value

    def joined(self, *parts: Any) -> str:
        """Return values written one after the other."""
        return "".join(str(self.walked(part)) for part in parts)


class MeteredTemplate(Template):
    """A template of the sandbox; what it is given decides what it may spend."""

    def render(self, **variables: Any) -> str:
        """Return the text.

        Raises:
            TokenizerError: It takes more than its meter allows.
            Exception: Whatever else a template can do.
        """
        with metered(variables):
            return super().render(variables)


def instrumented(tree: nodes.Template) -> nodes.Template:
    """Return a template that says what it is going to spend; its constants are folded already."""
    return _Instrument().visit(tree)  # type: ignore[no-any-return]


class _Instrument(NodeTransformer):
    def __init__(self) -> None:
        self._units = 0  # of executing all nodes that were visited so far once, calls aside

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._units += STEP
        if isinstance(node, nodes.Const | nodes.TemplateData):
            self._units += length(node.value if isinstance(node, nodes.Const) else node.data)
        return super().visit(node, *args, **kwargs)

    def _visit_body(self, node: Any) -> Any:
        before = self._units
        self.generic_visit(node)
        charged = _call("charged", [nodes.Const(self._units - before)])
        node.body = [nodes.ExprStmt(charged), *node.body]
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(charged, node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _visit_body  # noqa: N815  as Jinja calls them

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _walked(node.expr)
        for operand in node.ops:
            operand.expr = _walked(operand.expr)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        is_made = node.ctx == "load" and not all(isinstance(x, nodes.Const) for x in node.items)
        return _call("walked", [node]) if is_made else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _call("copied", [node])
        node.arg = _walked(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _walked(node.key)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [x if isinstance(x, nodes.TemplateData) else _walked(x) for x in node.nodes]
        return node


def _call(name: str, arguments: Iterable[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _walked(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call("walked", [node])


def metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is charged for."""
    is_given_context = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        meter = current_meter()
        context, values = args[:is_given_context], [*map(meter.taken, args[is_given_context:])]
        meter.charge_call(name, [*values, *kwargs.values()])
        result = meter.taken(function(*context, *values, **kwargs))
        meter.charge_result(result)
        return result

    return run


def _metered_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    is_given_context = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        meter = current_meter()
        context, values = args[:is_given_context], args[is_given_context:]
        walked = values if len(values) > 1 or name in _COMPARING_TESTS else ()
        meter.charge(STEP + sum(map(meter.size, walked)))
        return function(*context, *values)

    return run


class _MeteredFormatter(SandboxedFormatter):
    def vformat(self, format_string: str, args: Any, kwargs: Any) -> str:
        current_meter().charge(STEP * len(format_string))
        return super().vformat(format_string, args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> Any:
        meter = current_meter()
        meter.charge_widths(format_spec)
        meter.charge(meter.size(value))
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        meter = current_meter()
        meter.charge(meter.size(value))
        return super().convert_field(value, conversion)


class _Namespace(Namespace):
    """Jinja's, which would write all that it holds."""

    __repr__ = object.__repr__
