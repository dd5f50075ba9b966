"""What a model thinks before it answers, between the marks that it was taught, apart from the answer."""

from dataclasses import dataclass
from typing import Literal

from cs336.inference.answer_events import Event
from cs336.inference.tool_formats.format import SPACE, Symbols, overlap, until_rules
from cs336.inference.tool_formats.harmony import MESSAGE, NEXT

Place = Literal["before", "within", "behind"]


@dataclass(frozen=True)
class ReasoningFormat:
    """Reasoning stands where an answer begins, between `begin` and `end`."""

    begin: str
    end: str
    dropped: tuple[str, ...] = ()
    """Marks around the rest."""
    final: str = ""
    """A mark of the answer itself."""

    def place(self, prompt: str) -> Place:
        """Where an answer to this prompt begins: templates may write `begin` themselves, or leave no room."""
        text = prompt.rstrip()
        return "within" if text.endswith(self.begin) else "behind" if text.endswith(self.end) else "before"

    def rules(self, place: Place, symbols: Symbols) -> list[str]:
        """Lark of what may come before an answer or calls, as the rule `lead`."""
        begin, option = ("", "") if place == "within" else (symbols(self.begin), "?")
        return [f"lead: ({begin} thought){option}", *until_rules("thought", self.end, symbols)]


class ChannelFormat(ReasoningFormat):
    """gpt-oss's, whose answer has a mark of its own."""

    def place(self, prompt: str) -> Place:
        return "before"


REASONING: dict[str, ReasoningFormat] = {
    "gpt_oss": ChannelFormat(f"<|channel|>analysis{MESSAGE}", NEXT, final=f"<|channel|>final{MESSAGE}"),
    "think": ReasoningFormat("<think>", "</think>"),
    "granite": ReasoningFormat("<think>", "</think>", ("<response>", "</response>")),
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "cohere": ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_RESPONSE|>", "<|END_RESPONSE|>")),
}
# The first whose marks are all in a template says its format.
SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gpt_oss", ("<|channel|>", "analysis")),
    ("cohere", ("<|START_THINKING|>",)),
    ("mistral", ("[THINK]",)),
    ("granite", ("<think>", "<response>")),
    ("think", ("</think>",)),
)


def reasoning_of(template: str) -> ReasoningFormat | None:
    """The one that a chat template shows, if it is one of REASONING."""
    return next((REASONING[name] for name, marks in SIGNS if all(mark in template for mark in marks)), None)


class ReasoningParser:
    """Of one answer. Its events are reasoning and content, without the white space at their borders."""

    def __init__(self, format: ReasoningFormat, place: Place = "before"):
        self._format, self._place = format, place
        self._held, self._said, self._answering = "", False, False

    def push(self, text: str) -> list[Event]:
        """What is certain now."""
        self._held += text
        events: list[Event] = []
        if self._place == "before":
            begun, begin = self._held.lstrip(SPACE), self._format.begin
            if begun.startswith(begin):
                self._held, self._place = begun[len(begin) :], "within"
            elif begin.startswith(begun):
                return events
            else:
                self._place, self._answering = "behind", True  # its white space is its own
        if self._place == "within":
            if not self._said:
                self._held = self._held.lstrip(SPACE)
            text, found, behind = self._held.partition(self._format.end)
            certain = text if found else text[: len(text) - overlap(text, self._format.end)]
            certain = certain.rstrip(SPACE)
            self._held = behind if found else self._held[len(certain) :]
            if certain:
                self._said = True
                events.append(Event("reasoning", certain))
            if not found:
                return events
            self._place = "behind"
        return events + self._content()

    def close(self) -> list[Event]:
        """What was held back."""
        if self._place == "within":
            text = self._held.rstrip(SPACE)
            return [Event("reasoning", text)] if text else []
        return [Event("content", self._held)] if self._held and (self._answering or self._place == "before") else []

    def _content(self) -> list[Event]:
        dropped, said = self._format.dropped, list[str]()
        while True:
            found = [(at, mark) for mark in dropped if (at := self._held.find(mark)) >= 0]
            at, mark = min(found, default=(len(self._held), ""))
            if not found:
                at -= max((overlap(self._held, mark) for mark in dropped), default=0)
            text, self._held = self._held[:at], self._held[at + len(mark) :]
            if not self._answering:
                text = text.lstrip(SPACE)
                self._answering = bool(text)
            said.append(text)
            if not found:
                text = "".join(said)
                return [Event("content", text)] if text else []
