"""Calls of tools in what a model writes, found character by character: how the text came in pieces changes nothing.

A call is an object of JSON with a tool's name and its arguments, between the marks of a format. It is announced when
its name and the first character of its arguments are there; what is no call stays text, as it was written.
"""

import itertools
import json
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

SPACE = " \t\r\n"
ARGUMENTS = ("arguments", "parameters")
_WORD = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls: `begin`, `opening`, objects with `separator` between them, `closing`."""

    begin: str
    written: tuple[str, str, str]
    """What the model is made to write before, between and behind objects where it must call."""
    opening: str = ""
    separator: str = ""
    closing: str = ""
    bare: bool = False
    """A text that begins with an object needs no `begin`."""
    arguments: str = "arguments"
    id_length: int | None = None
    """Of the bare ids that the family's templates take; None: OpenAI's."""


FORMATS = {
    "hermes": ToolFormat(
        "<tool_call>",
        ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        closing="</tool_call>",
    ),
    "llama3_json": ToolFormat("<|python_tag|>", ("", "; ", ""), separator=";", bare=True, arguments="parameters"),
    "mistral": ToolFormat(
        "[TOOL_CALLS]", ("[TOOL_CALLS][", ", ", "]"), opening="[", separator=",", closing="]", id_length=9
    ),
}


def format_of(template: str) -> ToolFormat | None:
    """The one that a chat template writes calls in, if it is one of FORMATS."""
    if any(mark in template for mark in ("<function=", "<arg_key>", "[ARGS]")):  # names or arguments outside of JSON
        return None
    if '"parameters": dictionary' in template:  # what Llama's asks for
        return FORMATS["llama3_json"]
    return next((format for format in FORMATS.values() if format.begin in template), None)


class Event(NamedTuple):
    kind: Literal["content", "call", "arguments", "broken"]
    """broken: a call that was announced is none."""
    text: str
    """Of the answer, or the call's name, or of its arguments, or the whole call as it was written."""
    number: int = 0
    """Of the call."""
    id: str = ""
    """Of a call that begins."""


class ToolParser:
    """Of one answer. names: the tools that can be called; a call of another is text. parallel: False leaves out calls
    behind the first. forced: the answer is nothing but calls, so that the beginning of one is no text."""

    def __init__(self, format: ToolFormat, names: Collection[str], *, parallel: bool = True, forced: bool = False):
        self._format, self._names, self._parallel, self._forced = format, names, parallel, forced
        self._events: list[Event] = []
        self._step = self._text
        self._space: list[str] = []  # in text: white space that may stand before a call, and belongs to it then
        self._mark = ""  # what may become begin or closing
        self._raw: list[str] = []  # of the call that is read
        self._object = _Object()
        self._opened = self._announced = False
        self._sent = self._number = 0
        self._fresh, self._after_call = True, False
        self.complete = 0
        """Calls that have ended."""

    def push(self, text: str) -> list[Event]:
        """What is certain now."""
        for char in text:
            self._step(char)
        return self._taken()

    def close(self, *, cut: bool = False) -> list[Event]:
        """What is left where the text ends. cut: by max_tokens: a call that was announced stays, as far as it came."""
        if self._step == self._between:
            self._completed()
        elif cut and self._forced:
            return self._taken()
        elif self.complete and "".join(self._raw).strip(SPACE) == self._format.separator:
            pass  # nothing follows it
        elif self._step != self._text and not (cut and self._announced):
            self._malformed()
        if self._step == self._text and (self._mark or not self._after_call):
            self._say("".join(self._space) + self._mark)
        return self._taken()

    def finish_reason(self, reason: str) -> str:
        """Of the answer, where the engine's is `reason`."""
        return "tool_calls" if reason == "stop" and self.complete else reason

    def _taken(self) -> list[Event]:
        """Neighbours of one kind are one."""
        found = []
        for _, group in itertools.groupby(self._events, key=lambda event: (event.kind, event.number)):
            first, *more = group
            found.append(first._replace(text="".join([first.text, *(event.text for event in more)])))
        self._events = []
        return found

    # ---- states: each takes a character ----

    def _text(self, char: str) -> None:
        """Outside of calls."""
        begin = self._format.begin
        if self._format.bare and self._fresh and char == "{" and not self._mark:
            self._begin("", opened=True)
            self._open(char)
            return
        text = self._mark + char
        if text == begin:
            self._begin(begin, opened=not self._format.opening)
            return
        keep = next(n for n in range(len(text), -1, -1) if begin.startswith(text[len(text) - n :]))
        self._mark, text = text[len(text) - keep :], text[: len(text) - keep]
        if text.strip(SPACE):
            self._say("".join(self._space) + text.rstrip(SPACE))
            self._space = []
        self._space += text[len(text.rstrip(SPACE)) :]

    def _open(self, char: str) -> None:
        """Before an object."""
        if char == "{" and self._opened:
            self._object = _Object()
            self._step = self._call
            self._call(char)
        elif char in SPACE or (char == self._format.opening and not self._opened):
            self._opened |= char not in SPACE
            self._raw.append(char)
        else:
            self._malformed(char)

    def _call(self, char: str) -> None:
        """Within an object."""
        try:
            self._object.push(char)
            self._announce()
        except ValueError:
            self._malformed(char)
            return
        self._raw.append(char)
        if self._object.done:
            self._step = self._between

    def _between(self, char: str) -> None:
        """Behind an object."""
        closing = self._format.closing
        text = self._mark + char
        if text == self._format.separator:
            self._completed()
            self._begin(text, opened=True)
        elif text == closing:
            self._completed()
        elif closing.startswith(text):
            self._mark = text
        elif char in SPACE and not self._mark:
            self._raw.append(char)
        elif closing:
            self._mark = ""
            self._malformed(text)
        else:
            raw = "".join(self._raw)
            self._completed()
            self._space = [raw[len(raw.rstrip(SPACE)) :]]
            self._text(char)

    # ---- what they have in common ----

    def _begin(self, written: str, *, opened: bool) -> None:
        self._raw = [*self._space, written]
        self._space, self._mark, self._opened, self._announced = [], "", opened, False
        self._step = self._open

    def _announce(self) -> None:
        """Tell what is new of the call. Raises ValueError where it is none."""
        found = self._object
        spans = [found.spans[key] for key in ARGUMENTS if key in found.spans]
        if len(spans) > 1:
            raise ValueError("there are arguments twice")
        if not self._announced:
            name = found.string("name")
            if name is not None and name not in self._names:
                raise ValueError("there is no such tool")
            if spans and found.chars[spans[0][0]] != "{":
                raise ValueError("the arguments are no object")
            if found.done and not (name and spans):
                raise ValueError("an object that is no call")
            if not (name and spans):
                return
            self._announced, self._sent = True, spans[0][0]
            if self._told:
                self._events.append(Event("call", name, self._number, self._new_id()))
        end = spans[0][1] or len(found.chars)
        if self._told and end > self._sent:
            self._events.append(Event("arguments", "".join(found.chars[self._sent : end]), self._number))
        self._sent = end

    @property
    def _told(self) -> bool:
        return self._parallel or not self.complete

    def _new_id(self) -> str:
        length = self._format.id_length
        return uuid.uuid4().hex[:length] if length else f"call_{uuid.uuid4().hex[:24]}"

    def _completed(self) -> None:
        self._number += self._told
        self.complete += 1
        self._raw, self._mark, self._announced = [], "", False
        self._after_call, self._fresh = True, False
        self._step = self._text

    def _malformed(self, again: str = "") -> None:
        """What was read is text; what came last is read again."""
        raw = "".join(self._raw)
        text = raw.rstrip(SPACE)
        if self._announced and self._told:
            self._events.append(Event("broken", text, self._number))
            self._number += 1
            self._fresh = self._after_call = False
        else:
            self._say(text)
        self._raw, self._space, self._announced, self._step = [], [raw[len(text) :]], False, self._text
        for char in again:
            self._step(char)

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Event("content", text))
            self._fresh = self._after_call = False


class _Object:
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


def message_of(events: Sequence[Event]) -> dict[str, Any]:
    """An answer as OpenAI has it, of all of its events. Content is None where there are calls alone."""
    content, calls = [], dict[int, dict[str, Any]]()
    for event in events:
        if event.kind == "call":
            calls[event.number] = call_of(event)
        elif event.kind == "arguments":
            calls[event.number]["function"]["arguments"] += event.text
        else:
            if event.kind == "broken":
                del calls[event.number]
            content.append(event.text)
    text = "".join(content)
    if not calls:
        return {"role": "assistant", "content": text}
    return {"role": "assistant", "content": text or None, "tool_calls": list(calls.values())}


def read_answer(text: str, finish_reason: str, parser: ToolParser | None) -> tuple[dict[str, Any], str]:
    """A whole one as a message, and why it ended. parser: a new one, or None where nothing can be called."""
    if parser is None:
        return {"role": "assistant", "content": text}, finish_reason
    events = parser.push(text) + parser.close(cut=finish_reason == "length")
    return message_of(events), parser.finish_reason(finish_reason)


def call_of(event: Event) -> dict[str, Any]:
    """A call that begins."""
    return {"id": event.id, "type": "function", "function": {"name": event.text, "arguments": ""}}
