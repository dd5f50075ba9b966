"""Calls as Python writes them, f(a=1, b="x"), with literals for arguments: Llama's where it is asked so, OLMo 3's."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cs336.inference.tool_formats.format import (
    LONGEST,
    SPACE,
    GeneratedReader,
    Reading,
    Schema,
    Symbols,
    ToolFormat,
    json_rule,
)
from cs336.inference.tool_formats.types import json_of_literal

KEY = re.compile(r"\s*[\w-]*\s*")  # of schemas too, which have names that Python has not
CLOSED = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True, kw_only=True)
class PythonicFormat(ToolFormat):
    """Literals of JSON are taken too, and are what is written here."""

    def reader(self, schemas: Mapping[str, Schema]) -> "PythonicReader":
        return PythonicReader(schemas)

    def rules(self, rule: str, name: str, schema: Schema, symbols: Symbols) -> list[str]:
        """In the order of the schema. `first`: no argument stands before."""
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        properties, required = schema.get("properties", {}), schema.get("required", ())
        lines = [f"{rule}: {json.dumps(name + '(')} {rule}_first0 {json.dumps(')')}"]
        for i, (key, inner) in enumerate(properties.items()):
            value, then = f"{rule}_value{i}", f"{rule}_more{i + 1}"
            lines.append(json_rule(value, {**(inner if isinstance(inner, Mapping) else {}), **shared}))
            left_out = "" if key in required else f" | {rule}_first{i + 1}"
            lines.append(f"{rule}_first{i}: {json.dumps(key + '=')} {value} {then}{left_out}")
            left_out = "" if key in required else f" | {then}"
            lines.append(f"{rule}_more{i}: {json.dumps(', ' + key + '=')} {value} {then}{left_out}")
        last = '""'
        if not properties and schema.get("additionalProperties", True) is not False:  # of a tool that is not strict
            last = f'({rule}_any (", " {rule}_any)*)?'
            lines += [f"{rule}_any: /[a-zA-Z_][a-zA-Z0-9_]*=/ {rule}_value", json_rule(f"{rule}_value", {})]
        return [*lines, f"{rule}_first{len(properties)}: {last}", f'{rule}_more{len(properties)}: ""']

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        given = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
        return f"{name}({', '.join(given)})"


class PythonicReader(GeneratedReader):
    def _read(self) -> Reading:
        yield from self._named("(")
        keys, end = list[str](), ","
        while end == ",":
            key = ""
            while (char := (yield)) not in "=)":
                key += char
                if len(key) > LONGEST or not KEY.fullmatch(key):
                    raise ValueError("no name of an argument")
            key = key.strip(SPACE)
            if char == ")":
                if key:
                    raise ValueError("an argument without a name")
                break
            if not key or key in keys:
                raise ValueError("no name of an argument, or one that is there twice")
            text, end = yield from _literal()
            self._said += f"{', ' if keys else '{'}{json.dumps(key, ensure_ascii=False)}: {json_of_literal(text)}"
            keys.append(key)
        self._said += "}" if keys else "{}"


def _literal() -> Reading:
    """A literal's text, and the comma or bracket that ends it."""
    text, brackets, quote, escaped = "", list[str](), "", False
    while True:
        char = yield
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in ",)" and not brackets:
            return text, char
        elif char in "\"'":
            quote = char
        elif char in "([{":
            brackets.append(char)
        elif char in CLOSED and (not brackets or brackets.pop() != CLOSED[char]):
            raise ValueError("a bracket that was not opened")
        text += char
