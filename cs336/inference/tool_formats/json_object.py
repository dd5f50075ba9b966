"""Objects of JSON as they come, and calls that are one: {"name": ..., "arguments": {...}}."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cs336.inference.tool_formats.format import SPACE, Schema, Symbols, ToolFormat, json_rule

ARGUMENTS = ("arguments", "parameters")
_WORD = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, kw_only=True)
class ObjectFormat(ToolFormat):
    """A call is one object, with its name and arguments in any order."""

    name: str = "name"
    arguments: str = "arguments"
    numbered: bool = False
    """A call says its number among the calls first, as Cohere's `tool_call_id`."""

    def reader(self, schemas: Mapping[str, Schema]) -> "ObjectReader":
        return ObjectReader(schemas, self.name)

    def rules(self, rule: str, name: str, schema: Schema, symbols: Symbols) -> list[str]:
        head = json.dumps(f'"{self.name}": "{name}", "{self.arguments}": ')
        number = """/"tool_call_id": "[0-9]+", /""" if self.numbered else ""
        begin, end = json.dumps("{"), json.dumps("}")
        return [f"{rule}: {begin} {number} {head} {rule}_arguments {end}", json_rule(f"{rule}_arguments", schema)]

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        number = {"tool_call_id": "0"} if self.numbered else {}
        return json.dumps(number | {self.name: name, self.arguments: arguments}, ensure_ascii=False)


class ObjectReader:
    """A call that is an object, whose name is in the member called so."""

    def __init__(self, schemas: Mapping[str, Schema], name: str):
        self.name: str | None = None
        self._schemas, self._name, self._object, self._sent = schemas, name, JsonObject(), 0

    @property
    def done(self) -> bool:
        return self._object.done

    def push(self, char: str) -> str:
        found = self._object
        if not found.chars and char != "{":
            raise ValueError("no object")
        found.push(char)
        spans = [found.spans[key] for key in ARGUMENTS if key in found.spans]
        if len(spans) > 1:
            raise ValueError("there are arguments twice")
        if self.name is None:
            name = found.string(self._name)
            if name is not None and name not in self._schemas:
                raise ValueError("there is no such tool")
            if spans and found.chars[spans[0][0]] != "{":
                raise ValueError("the arguments are no object")
            if found.done and not (name and spans):
                raise ValueError("an object that is no call")
            if not (name and spans):
                return ""
            self.name, self._sent = name, spans[0][0]
        begin, self._sent = self._sent, max(self._sent, spans[0][1] or len(found.chars))
        return "".join(found.chars[begin : self._sent])


class JsonObject:
    """An object of JSON as it comes. `push` raises ValueError at the first character that cannot be."""

    def __init__(self):
        self.chars: list[str] = []
        self.done = False
        self.spans: dict[str, tuple[int, int | None]] = {}
        """Where the values of its own members begin and end."""
        self._stack: list[str] = []
        self._state, self._string_state = "value", "string"
        self._key, self._from, self._hex = "", 0, 0

    def string(self, key: str) -> str | None:
        """A member's value; None where it has not ended. Raises ValueError where it is no string."""
        if key not in self.spans:
            return None
        begin, end = self.spans[key]
        if self.chars[begin] != '"':
            raise ValueError("no string")
        return None if end is None else json.loads("".join(self.chars[begin:end]))

    def push(self, char: str) -> None:
        self._take(char)
        self.chars.append(char)

    def _take(self, char: str) -> None:
        if self._state == "word":
            if char.isascii() and (char.isalnum() or char in "+-."):
                return
            if not _WORD.fullmatch("".join(self.chars[self._from :])):
                raise ValueError("no value")
            self._value_ended(len(self.chars))
        match self._state:
            case "string" | "key string":
                self._string(char)
            case "escape":
                self._state, self._hex = self._string_state, 4 if char == "u" else 0
                if char not in '"\\/bfnrtu':
                    raise ValueError("no escape")
            case _ if char in SPACE:
                return
            case "key" | "first key" if char == '"':
                self._state, self._string_state, self._from = "key string", "key string", len(self.chars)
            case "colon" if char == ":":
                self._state = "value"
            case "after" if char == ",":
                self._state = "key" if self._stack[-1] == "{" else "value"
            case "after" | "first key" | "first value" if char in "}]":
                self._close(char)
            case "value" | "first value":
                self._value(char)
            case _:
                raise ValueError("no JSON")

    def _string(self, char: str) -> None:
        if self._hex:
            if char not in "0123456789abcdefABCDEF":
                raise ValueError("no escape")
            self._hex -= 1
        elif char == "\\":
            self._state = "escape"
        elif char < " ":
            raise ValueError("a control character in a string")
        elif char == '"' and self._state == "key string":
            self._state = "colon"
            if len(self._stack) == 1:
                self._key = json.loads("".join(self.chars[self._from :]) + '"')
                if self._key in self.spans:
                    raise ValueError("a member that is there twice")
        elif char == '"':
            self._value_ended(len(self.chars) + 1)

    def _value(self, char: str) -> None:
        if len(self._stack) == 1:
            self.spans[self._key] = (len(self.chars), None)
        if char in "{[":
            self._stack.append(char)
            self._state = "first key" if char == "{" else "first value"
        elif char == '"':
            self._state = self._string_state = "string"
        elif char in "-0123456789tfn":
            self._state, self._from = "word", len(self.chars)
        else:
            raise ValueError("no value")

    def _close(self, char: str) -> None:
        if self._stack.pop() + char not in ("{}", "[]"):
            raise ValueError("a bracket that was not opened")
        self._value_ended(len(self.chars) + 1)
        self.done = not self._stack

    def _value_ended(self, at: int) -> None:
        self._state = "after"
        if len(self._stack) == 1:
            self.spans[self._key] = (self.spans[self._key][0], at)
