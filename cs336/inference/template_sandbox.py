"""Jinja of others, run within bounds: jinja2 keeps it from the machine, and here it is kept from taking a core for
ever, or all memory.

    a loop, a macro    turns and seconds are counted, over the whole text
    * ** + %           refused where the result would be long
    a call, a filter   no large width goes in, nor what could become long together; no long text comes out
    ~, {% set %}       no long text comes out
    [..] (..) {..}     all that hangs together counts: x = [x, x] doubles it
"""

import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

LONGEST = 1 << 22  # characters of a text, items of a list
MOST_PRODUCT = 1 << 30  # of the sizes of two arguments: replace and join may make so much of them
MOST_TURNS, MOST_SECONDS = 1 << 18, 10.0
MOST_BITS = 1 << 14  # of a whole number
# Filters and methods whose numbers say how long a result gets.
WIDENING = {
    "batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "to_bytes", "tojson", "zfill",
}  # fmt: skip
WIDE = re.compile(r"\d{4}|\*|\{[^{}]*\{")  # in a format: a width of thousands, or of an argument


@dataclass
class _Spent:
    deadline: float
    turns: int = 0


_spent: contextvars.ContextVar[_Spent] = contextvars.ContextVar("spent")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates end. They fail with jinja2.TemplateError where they would go on."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self) -> None:
        # optimized: what is constant would be worked out as the template is read, beside all bounds.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _Generation])
        filters = {**self.filters, "tojson": to_json}
        self.filters = {name: _bounded_filter(name, call) for name, call in filters.items()}
        self.filters["bounded"] = _bounded
        del self.globals["lipsum"]  # paragraphs without end

    def write(self, template: jinja2.Template, known: Mapping[str, Any]) -> str:
        """What a template of this environment writes."""
        _spent.set(_Spent(time.monotonic() + MOST_SECONDS))
        pieces, length = [], 0
        for piece in template.generate(known):
            pieces.append(piece)
            length += len(piece)
            _check_length(length)
        return "".join(pieces)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
            if bits > MOST_BITS:
                raise jinja2.TemplateError(f"a number of more than {MOST_BITS:,} bits")
        elif operator == "*":
            _check_length(_size(left) * _size(right))
        elif operator == "+":
            _check_length(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # format, which jinja2 wraps
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str) and method.__name__ in ("format", "format_map"):
            _check_format(owner)
        _check_arguments(getattr(method, "__name__", ""), owner, *args, **kwargs)
        return _bounded(super().call(__context, __obj, *args, **kwargs))

    def turn(self) -> None:
        """Of a loop, or a macro."""
        spent = _spent.get()
        spent.turns += 1
        if spent.turns > MOST_TURNS:
            raise jinja2.TemplateError(f"more than {MOST_TURNS:,} turns of loops and macros")

    def _parse(self, *arguments: Any) -> nodes.Template:
        return _Bounds().visit(super()._parse(*arguments))


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """The filter `tojson`: not for HTML, as jinja2's is."""
    pieces, length = [], 0
    for piece in json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **options).iterencode(value):
        pieces.append(piece)
        length += len(piece)
        _check_length(length)
    return "".join(pieces)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which marks what an assistant said, stands for its content."""

    tags = {"generation"}  # noqa: RUF012 (as in jinja2)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Bounds(NodeTransformer):
    """Puts the calls that count, and the filters that measure, into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _turn(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _turn(node))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _measured(self.generic_visit(node))

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _measured(node.filter, node.lineno)
        return node

    def visit_List(self, node: nodes.List | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _measured(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _measured(self.generic_visit(node))


def _turn(node: nodes.Node) -> nodes.Node:
    call = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)
    return nodes.ExprStmt(call).set_lineno(node.lineno)


def _measured(node: Any, line: int | None = None) -> nodes.Filter:
    measured = nodes.Filter(node, "bounded", [], [], None, None)
    measured.set_lineno(line or node.lineno)
    return measured


def _bounded_filter(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _check_format(str(args[0]))
        _check_arguments(name, *args, **kwargs)
        return _bounded(call(*args, **kwargs))

    return bounded


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _size(value: Any) -> int:
    """What a value can multiply the length of another by."""
    return abs(value) if isinstance(value, int) else _length(value)


def _check_arguments(called: str, of: Any, /, *args: Any, **kwargs: Any) -> None:
    """Of a filter, or of a method of `of`. Numbers count where they are widths: others are data, as a time is."""
    if time.monotonic() > _spent.get().deadline:
        raise jinja2.TemplateError(f"more than {MOST_SECONDS:.0f} seconds")
    measure = _size if called in WIDENING else _length
    sizes = sorted([_length(of), *map(measure, (*args, *kwargs.values()))], reverse=True)
    _check_length(sizes[0])
    if len(sizes) > 1 and sizes[0] * sizes[1] > MOST_PRODUCT:
        raise jinja2.TemplateError(f"a call of {sizes[0]:,} times {sizes[1]:,} characters or items")


def _check_format(text: str | bytes) -> None:
    if WIDE.search(text if isinstance(text, str) else text.decode("latin-1")):
        raise jinja2.TemplateError("a format with a width of thousands, or of an argument")


def _bounded(value: Any) -> Any:
    """The value itself, which is no longer than LONGEST, with all that hangs on it."""
    if isinstance(value, str | bytes):
        _check_length(len(value))
    elif isinstance(value, list | tuple | dict):
        size, rest = 0, [value]
        while rest:
            item = rest.pop()
            size += 1
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, dict):
                rest += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                rest += item
            _check_length(size + len(rest))
    return value


def _check_length(size: int) -> None:
    if size > LONGEST:
        raise jinja2.TemplateError(f"more than {LONGEST:,} characters or items")
