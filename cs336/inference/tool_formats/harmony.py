"""What gpt-oss writes: messages in channels, <|channel|>NAME to=functions.TOOL <|constrain|>json<|message|>...<|end|>.

Reasoning is in `analysis`, the answer in `final`, and a call in a message to its tool.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cs336.inference.answer_events import Event, joined, new_call_id
from cs336.inference.tool_formats.format import SPACE, Schema, Symbols, ToolFormat, json_rule, overlap, until_rules
from cs336.inference.tool_formats.json_object import JsonObject

MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
BEGINS = ("<|channel|>", "<|start|>", "to=")
LONGEST = 1000  # characters of a header
NEXT = "<|end|><|start|>assistant"


class HarmonyFormat(ToolFormat):
    """An answer ends with its call, so that there is one."""

    def rules(self, rule: str, name: str, schema: Schema, symbols: Symbols) -> list[str]:
        head = symbols(f"<|channel|>commentary to=functions.{name} <|constrain|>json{MESSAGE}")
        return [f"{rule}: {head} {rule}_arguments", json_rule(f"{rule}_arguments", schema)]

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        return f"<|channel|>commentary to=functions.{name} <|constrain|>json{MESSAGE}" + json.dumps(
            arguments, ensure_ascii=False
        )

    def only_calls(self, parallel: bool, symbols: Symbols) -> list[str]:
        return ["calls: call"]

    def text_and_calls(self, parallel: bool, symbols: Symbols, marks: Sequence[int]) -> list[str]:
        final, channel, message = map(symbols, (f"<|channel|>final{MESSAGE}", "<|channel|>", MESSAGE))
        return [
            f"answer: aside* ({final} TEXT | call)",
            f'aside: {channel} ("analysis" | "commentary") {message} aside_text',
            *until_rules("aside_text", NEXT, symbols),
            "TEXT: /(.|\\n)*/",
        ]


class HarmonyReader:
    """Reads one answer, as AnswerReader does. Of several messages of a kind, each begins on a line of its own."""

    def __init__(self, schemas: Mapping[str, Schema], *, parallel: bool = True):
        self._schemas, self._parallel = schemas, parallel
        self._held = ""
        self._within: str | None = None
        """content, reasoning or call; None in a header."""
        self._raw: list[str] = []  # of a call and its header
        self._object = JsonObject()
        self._announced = False
        self._number = 0
        self._said: set[str] = set()
        self._first = False
        self._events: list[Event] = []
        self.complete = 0

    def push(self, text: str) -> list[Event]:
        self._held += text
        while self._header() if self._within is None else self._body():
            pass
        return self._taken()

    def close(self, *, cut: bool = False) -> list[Event]:
        held, self._held = self._held, ""
        if self._within == "call":
            self._arguments(held)
            if not cut:
                self._call_ended()
        elif self._within is not None:
            self._say(self._within, held)
        elif not (cut and held.lstrip(SPACE).startswith("<")):  # the beginning of a header is no text
            self._say("content", held)
        return self._taken()

    def finish_reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self.complete else reason

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return joined(events)

    def _header(self) -> bool:
        """Whether to go on."""
        begun = self._held.lstrip(SPACE)
        at = begun.find(MESSAGE, 0, LONGEST)
        likely = any(begun.startswith(mark) or mark.startswith(begun) for mark in BEGINS)
        if not likely or (at < 0 and len(begun) >= LONGEST):
            self._within, self._first = "content", True  # no message: all of it is text
            self._say("content", self._held[:1])  # of <|start|> too, which would be the end of this text
            self._held = self._held[1:]
            return True
        if at < 0:
            return False
        header, self._held = begun[:at], begun[at + len(MESSAGE) :]
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        to = re.search(r"\bto=functions\.([\w-]+)", header)
        if to and to[1] in self._schemas:
            self._within, self._raw, self._object, self._announced = "call", [header, MESSAGE], JsonObject(), False
            self._name = to[1]
        else:
            self._within, self._first = "reasoning" if channel and channel[1] == "analysis" else "content", True
            if "to=" in header:  # to what is no tool
                self._say(self._within, header + MESSAGE)
        return True

    def _body(self) -> bool:
        ends = [(at, end) for end in ENDS if (at := self._held.find(end)) >= 0]
        if not ends:
            certain = len(self._held) - max(overlap(self._held, end) for end in ENDS)
            text, self._held = self._held[:certain], self._held[certain:]
            self._arguments(text) if self._within == "call" else self._say(self._within or "", text)
            return False
        at, end = min(ends)
        text, self._held = self._held[:at], self._held[at + len(end) * (end != "<|start|>") :]
        if self._within == "call":
            self._arguments(text)
            self._call_ended()
        else:
            self._say(self._within or "", text)
        self._within = None
        return True

    def _arguments(self, text: str) -> None:
        for i, char in enumerate(text):
            self._raw.append(char)
            if self._within != "call":
                self._say("content", text[i:])
                return
            if self._object.done and char in SPACE:
                continue
            try:
                if self._object.done or (not self._object.chars and char not in SPACE + "{"):
                    raise ValueError("no object")
                if self._object.chars or char == "{":
                    self._object.push(char)
            except ValueError:
                self._broken()
                continue
            if not self._told or not self._object.chars:
                continue
            if not self._announced:
                self._announced = True
                self._events.append(Event("call", self._name, self._number, new_call_id()))
            self._events.append(Event("arguments", char, self._number))

    def _call_ended(self) -> None:
        if self._within != "call":
            return
        if not self._object.done:
            self._broken()
            return
        self._number += self._told
        self.complete += 1

    def _broken(self) -> None:
        """What was read of the call is text, and so is what follows."""
        if self._announced:
            self._events.append(Event("broken", "".join(self._raw), self._number))
            self._number += 1
        else:
            self._say("content", "".join(self._raw))
        self._within, self._first = "content", False

    @property
    def _told(self) -> bool:
        return self._parallel or not self.complete

    def _say(self, kind: str, text: str) -> None:
        if not text:
            return
        if self._first and kind in self._said:
            text = "\n" + text
        self._first = False
        self._said.add(kind)
        self._events.append(Event(kind, text))  # type: ignore[arg-type]
