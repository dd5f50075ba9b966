"""What is found in an answer as it comes: text, reasoning, and calls of tools."""

import itertools
import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple


class Event(NamedTuple):
    kind: Literal["content", "reasoning", "call", "arguments", "broken"]
    """broken: a call that was announced is none."""
    text: str
    """Of the answer, of what was thought before it, the call's name, of its arguments, or the whole call as it was
    written."""
    number: int = 0
    """Of the call."""
    id: str = ""
    """Of a call that begins."""


def new_call_id(length: int | None = None) -> str:
    """OpenAI's, or a bare one of so many characters."""
    return uuid.uuid4().hex[:length] if length else f"call_{uuid.uuid4().hex[:24]}"


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind are one."""
    found = []
    for _, group in itertools.groupby(events, key=lambda event: (event.kind, event.number)):
        first, *more = group
        found.append(first._replace(text="".join([first.text, *(event.text for event in more)])))
    return found


def message_of(events: Sequence[Event]) -> dict[str, Any]:
    """An answer as OpenAI has it, of all of its events. Content is None where there is none beside calls or
    reasoning."""
    content, thought, calls = [], [], dict[int, dict[str, Any]]()
    for event in events:
        match event.kind:
            case "call":
                calls[event.number] = call_of(event)
            case "arguments":
                calls[event.number]["function"]["arguments"] += event.text
            case "reasoning":
                thought.append(event.text)
            case "broken":
                del calls[event.number]
                content.append(event.text)
            case "content":
                content.append(event.text)
    text = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not (calls or thought) else None}
    if thought:
        message["reasoning_content"] = "".join(thought)
    if calls:
        message["tool_calls"] = list(calls.values())
    return message


def call_of(event: Event) -> dict[str, Any]:
    """A call that begins."""
    return {"id": event.id, "type": "function", "function": {"name": event.text, "arguments": ""}}
