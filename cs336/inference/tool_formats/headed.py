"""Calls whose name stands before the arguments, an object of JSON: DeepSeek's, and the newer ones of Mistral."""

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
)
from cs336.inference.tool_formats.json_object import JsonObject


@dataclass(frozen=True, kw_only=True)
class HeadedFormat(ToolFormat):
    """`before`, the name, `between`, the arguments, `behind`. The name ends where `between` begins, or white space."""

    before: str = ""
    between: str
    behind: tuple[str, ...] = ()
    call_id: str = ""
    """A mark behind the name and before an id of the model's own, up to `between`."""

    def reader(self, schemas: Mapping[str, Schema]) -> "HeadedReader":
        return HeadedReader(self, schemas)

    def rules(self, rule: str, name: str, schema: Schema, symbols: Symbols) -> list[str]:
        head, behind = symbols(self.before + name + self.between), symbols("".join(self.behind))
        return [f"{rule}: {head} {rule}_arguments {behind}", json_rule(f"{rule}_arguments", schema)]

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        return self.before + name + self.between + json.dumps(arguments, ensure_ascii=False) + "".join(self.behind)


class HeadedReader(GeneratedReader):
    def __init__(self, format: HeadedFormat, schemas: Mapping[str, Schema]):
        self._format = format
        super().__init__(schemas)

    def _read(self) -> Reading:
        format = self._format
        if format.before:
            yield from mark_of(format.before)
        between = format.between.strip(SPACE)
        yield from self._named(between[0])
        marks = filter(None, (between, format.call_id))
        if (yield from mark_of(*marks, again=between[0])) == format.call_id:
            yield from until(between)
        found = JsonObject()
        char = yield
        while char in SPACE:
            char = yield
        if char != "{":
            raise ValueError("the arguments are no object")
        while True:
            found.push(char)
            self._said += char
            if found.done:
                break
            char = yield
        for mark in format.behind:
            yield from mark_of(mark.strip(SPACE))
