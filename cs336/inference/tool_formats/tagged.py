"""Calls with a tag a name and a tag a value, as Qwen3-Coder and GLM-4.5 write them. Values are texts, and become what
the tool's schema says: "12" is a number or a string."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cs336.inference.tool_formats.format import (
    SPACE,
    GeneratedReader,
    Reading,
    Schema,
    Symbols,
    ToolFormat,
    json_rule,
    mark_of,
    until,
    until_rules,
)
from cs336.inference.tool_formats.types import types_of, value_of


@dataclass(frozen=True, kw_only=True)
class TaggedFormat(ToolFormat):
    """`head`, the name, `behind_name`; for each argument `key`, its name, `value`, the value, `behind_value`; `end`."""

    head: str = ""
    behind_name: str
    key: str
    value: str
    behind_value: str
    end: str
    line: str = ""
    """Before and behind a value, and no part of it."""

    def reader(self, schemas: Mapping[str, Schema]) -> "TaggedReader":
        return TaggedReader(self, schemas)

    def rules(self, rule: str, name: str, schema: Schema, symbols: Symbols) -> list[str]:
        places, lines = [], list[str]()
        behind = self.line + self.behind_value
        properties = schema.get("properties", {})
        for i, (key, inner) in enumerate(properties.items()):
            place = f"{rule}_{i}"
            texts = inner.get("enum", ()) if isinstance(inner, Mapping) else ()
            value = f"{place}_value"
            if texts and all(isinstance(text, str) for text in texts):
                choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
                lines.append(f"{value}: ({choices}) {symbols(behind)}")
            elif "string" in (types_of(inner, schema) or {"string"}):
                lines += until_rules(value, behind, symbols, _count(inner))
            else:
                shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
                lines += [f"{value}: {value}_json {symbols(behind)}", json_rule(f"{value}_json", {**inner, **shared})]
            lines.append(f'{place}: {symbols(self.key + key + self.value + self.line)} {value} "\\n"')
            places.append(place if key in schema.get("required", ()) else f"{place}?")
        if not properties and schema.get("additionalProperties", True) is not False:  # of a tool that is not strict
            free, name_end = f"{rule}_any", until_rules(f"{rule}_key", self.value + self.line, symbols)
            lines += [*name_end, *until_rules(f"{rule}_text", behind, symbols)]
            lines.append(f'{free}: {symbols(self.key)} {rule}_key {rule}_text "\\n"')
            places.append(f"{free}*")
        head = symbols(self.head + name + self.behind_name)
        return [f"{rule}: {head} {' '.join(places)} {symbols(self.end)}", *lines]

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        parts = [self.head + name + self.behind_name]
        for key, value in arguments.items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts.append(self.key + key + self.value + self.line + shown + self.line + self.behind_value + "\n")
        return "".join([*parts, self.end])


def _count(schema: Any) -> str:
    """How many characters a text may have, for a regular expression."""
    if not isinstance(schema, Mapping) or not {"minLength", "maxLength"} & schema.keys():
        return "*"
    return f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"


class TaggedReader(GeneratedReader):
    def __init__(self, format: TaggedFormat, schemas: Mapping[str, Schema]):
        self._format = format
        super().__init__(schemas)

    def _read(self) -> Reading:
        format, keys, again = self._format, list[str](), ""
        if format.head:
            yield from mark_of(format.head)
            yield from self._named(format.behind_name.strip(SPACE))
        else:
            again = format.key[0]
            yield from self._named(again)
        assert self.name is not None
        schema = self._schemas[self.name]
        while (yield from mark_of(format.key, format.end, again=again)) == format.key:
            again = ""
            behind_key, *value = format.value.split()
            key = (yield from until(behind_key)).strip(SPACE)
            if key in keys:
                raise ValueError("an argument that is there twice")
            if value:
                yield from mark_of(*value)
            self._said += f"{', ' if keys else '{'}{json.dumps(key, ensure_ascii=False)}: "
            keys.append(key)
            yield from self._value(types_of(schema.get("properties", {}).get(key), schema))
        self._said += "}" if keys else "{}"

    def _value(self, types: set[str]) -> Reading:
        """Strings are told as they come."""
        format = self._format
        mark, line = format.behind_value, format.line
        first = ""
        if line and (first := (yield)) == line:
            first = ""
        if types == {"string"}:
            self._said += '"'
            yield from until(mark, first, self._say, line)
            self._said += '"'
        else:
            text = yield from until(mark, first, line=line)
            self._said += value_of(text, types)

    def _say(self, text: str) -> None:
        self._said += json.dumps(text, ensure_ascii=False)[1:-1]
