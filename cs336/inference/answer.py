"""Reads an answer as it comes: what was thought first, calls of tools, and the text."""

from typing import Any, Protocol

from cs336.inference.answer_events import Event, joined, message_of
from cs336.inference.reasoning import ChannelFormat, Place, ReasoningFormat, ReasoningParser
from cs336.inference.tool_formats import ToolFormat
from cs336.inference.tool_formats.harmony import HarmonyFormat, HarmonyReader
from cs336.inference.tool_parser import ToolParser
from cs336.inference.tools import Tools


class Reader(Protocol):
    """Of one answer."""

    def push(self, text: str) -> list[Event]:
        """What is certain now."""
        ...

    def close(self, *, cut: bool = False) -> list[Event]:
        """What is left where the text ends. cut: by max_tokens."""
        ...

    def finish_reason(self, reason: str) -> str:
        """Of the answer, where the engine's is `reason`."""
        ...


class AnswerReader:
    """reasoning and tools: parsers of these, where there are any."""

    def __init__(self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None):
        self._reasoning, self._tools = reasoning, tools

    def push(self, text: str) -> list[Event]:
        if self._reasoning is None:
            return self._content(text)
        return self._read(self._reasoning.push(text))

    def close(self, *, cut: bool = False) -> list[Event]:
        events = self._read(self._reasoning.close()) if self._reasoning is not None else []
        return joined(events + (self._tools.close(cut=cut) if self._tools is not None else []))

    def finish_reason(self, reason: str) -> str:
        return reason if self._tools is None else self._tools.finish_reason(reason)

    def _read(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._content(event.text) if event.kind == "content" else [event]
        return found

    def _content(self, text: str) -> list[Event]:
        if self._tools is not None:
            return self._tools.push(text)
        return [Event("content", text)] if text else []


def new_reader(tools: Tools, format: ToolFormat | None, reasoning: ReasoningFormat | None, place: Place) -> Reader:
    """For one answer. format: of calls, where tools are offered. place: where the answer begins."""
    if isinstance(format, HarmonyFormat) or isinstance(reasoning, ChannelFormat):
        return HarmonyReader(tools.schemas, parallel=tools.parallel)
    parser = None
    if format is not None:
        parser = ToolParser(format, tools.schemas, parallel=tools.parallel, forced=bool(tools.must))
    return AnswerReader(None if reasoning is None else ReasoningParser(reasoning, place), parser)


def read_answer(text: str, finish_reason: str, reader: Reader) -> tuple[dict[str, Any], str]:
    """A whole one as a message, and why it ended. reader: a new one."""
    events = reader.push(text) + reader.close(cut=finish_reason == "length")
    return message_of(events), reader.finish_reason(finish_reason)
