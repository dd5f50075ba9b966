"""Calls of tools in what a model writes, found character by character: how the text came in pieces changes nothing.

A call is announced when its name and the first piece of its arguments are there; what is no call stays text, as it was
written.
"""

from collections.abc import Mapping

from cs336.inference.answer_events import Event, joined, new_call_id
from cs336.inference.tool_formats.format import SPACE, CallReader, Schema, ToolFormat, overlap


class ToolParser:
    """Of one answer. schemas: of the tools that can be called; a call of another is text. parallel: False leaves out
    calls behind the first. forced: the answer is nothing but calls, so that the beginning of one is no text."""

    def __init__(
        self, format: ToolFormat, schemas: Mapping[str, Schema], *, parallel: bool = True, forced: bool = False
    ):
        self._format, self._schemas, self._parallel, self._forced = format, schemas, parallel, forced
        self._events: list[Event] = []
        self._step = self._text
        self._space: list[str] = []  # in text: white space that may stand before a call, and belongs to it then
        self._mark = ""  # what may become a mark
        self._raw: list[str] = []  # of the call that is read
        self._call_reader: CallReader | None = None
        self._opened = self._announced = self._marked = False
        self._number = 0
        self._closed = 0  # marks of closing that were there
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
            self._raw.append(self._mark)
            self._mark = ""
            self._malformed()
        if self._step == self._text and (self._mark or not self._after_call):
            self._say("".join(self._space) + self._mark)
        return self._taken()

    def finish_reason(self, reason: str) -> str:
        """Of the answer, where the engine's is `reason`."""
        return "tool_calls" if reason == "stop" and self.complete else reason

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return joined(events)

    # ---- states: each takes a character ----

    def _text(self, char: str) -> None:
        """Outside of calls."""
        begin = self._format.begin
        if char == self._format.bare and self._fresh and not self._mark:
            self._begin("", opened=not self._format.opening)
            self._open(char)
            return
        text = self._mark + char
        if text == begin:
            self._begin(begin, opened=not self._format.opening)
            return
        if text == self._format.unmarked:
            self._begin("", opened=True, marked=False)
            for again in text:
                self._step(again)
            return
        keep = max(overlap(text, begin), overlap(text, self._format.unmarked))
        self._mark, text = text[len(text) - keep :], text[: len(text) - keep]
        if text.strip(SPACE):
            self._say("".join(self._space) + text.rstrip(SPACE))
            self._space = []
        self._space += text[len(text.rstrip(SPACE)) :]

    def _open(self, char: str) -> None:
        """Before a call."""
        text, opening = self._mark + char, self._format.opening
        if char in SPACE and not self._mark:
            self._raw.append(char)
        elif self._opened:
            self._call_reader, self._step = self._format.reader(self._schemas), self._call
            self._call(char)
        elif text == opening:
            self._opened, self._mark = True, ""
            self._raw.append(text)
        elif opening.startswith(text):
            self._mark = text
        else:
            self._mark = ""
            self._malformed(text)

    def _call(self, char: str) -> None:
        """Within a call."""
        assert self._call_reader is not None
        try:
            more = self._call_reader.push(char)
        except ValueError:
            self._malformed(char)
            return
        self._raw.append(char)
        if more and not self._announced:
            self._announced = True
            if self._told:
                self._events.append(Event("call", self._call_reader.name or "", self._number, self._new_id()))
        if more and self._told:
            self._events.append(Event("arguments", more, self._number))
        if self._call_reader.done:
            self._step = self._between
            if not (self._format.closing or self._format.separator):
                self._completed()

    def _between(self, char: str) -> None:
        """Behind a call."""
        format = self._format
        closing = format.closing[self._closed] if format.closing else ""
        marks = [closing, format.separator if not self._closed else ""]
        text = self._mark + char
        if text not in marks and any(mark.startswith(text) for mark in marks):
            self._mark = text
        elif text == format.separator and not self._closed:
            self._completed()
            self._begin(text, opened=True)
        elif text == closing and self._closed + 1 < len(format.closing):
            self._closed, self._mark = self._closed + 1, ""
            self._raw.append(text)
        elif text == closing:
            self._completed()
        elif char in SPACE and not self._mark:
            self._raw.append(char)
        elif format.adjacent and not self._mark:
            self._completed()
            self._begin("", opened=True)
            self._open(char)
        elif closing and not self._closed and self._marked:
            self._mark = ""
            self._malformed(text)
        else:
            raw = "".join(self._raw)
            self._completed()
            self._space = [raw[len(raw.rstrip(SPACE)) :]]
            for again in text:
                self._step(again)

    # ---- what they have in common ----

    def _begin(self, written: str, *, opened: bool, marked: bool = True) -> None:
        self._raw = [*self._space, written]
        self._space, self._mark, self._opened, self._marked, self._announced = [], "", opened, marked, False
        self._step = self._open

    @property
    def _told(self) -> bool:
        return self._parallel or not self.complete

    def _new_id(self) -> str:
        return new_call_id(self._format.id_length)

    def _completed(self) -> None:
        self._number += self._told
        self.complete += 1
        self._raw, self._mark, self._announced, self._closed = [], "", False, 0
        self._after_call, self._fresh = True, False
        self._step = self._text

    def _malformed(self, again: str = "") -> None:
        """What was read is text; what came last is read again, and what may begin another call."""
        raw = "".join(self._raw)
        keep = overlap(raw, self._format.begin)
        raw, again = raw[: len(raw) - keep], raw[len(raw) - keep :] + again
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
