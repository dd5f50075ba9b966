"""What all formats of calls have in common: marks around calls, and readers that take a call character by character."""

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cs336.inference.grammar import SPACE as GRAMMAR_SPACE

SPACE = " \t\r\n"
LONGEST = 256  # characters of a name, with white space around it
Schema = Mapping[str, Any]
Symbols = Callable[[str], str]
"""A text in llguidance's Lark, where marks that are special tokens are these."""
Reading = Generator[None, str, Any]
"""Takes a character at a time; raises ValueError at the first that cannot be."""


class CallReader(Protocol):
    """Of one call. The name is known when the first piece of its arguments is there."""

    name: str | None

    @property
    def done(self) -> bool: ...

    def push(self, char: str) -> str:
        """The piece of its arguments, as JSON, that is certain now. Raises ValueError where this is no call."""
        ...


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """How a family of models writes calls: `begin`, `opening`, calls with `separator` between them, `closing`; white
    space may stand between all of these."""

    begin: str
    opening: str = ""
    separator: str = ""
    closing: tuple[str, ...] = ()
    adjacent: bool = False
    """Another call may follow without a separator."""
    unmarked: str = ""
    """What a call begins with where the model leaves out `begin`, and with it perhaps `closing`."""
    bare: str = ""
    """What a text begins with that is calls without `begin`."""
    written: tuple[str, str, str]
    """What the model is made to write before, between and behind calls where it must call."""
    id_length: int | None = None
    """Of the bare ids that the family's templates take; None: OpenAI's."""

    def reader(self, schemas: Mapping[str, Schema]) -> CallReader:
        """Of a call of one of these tools."""
        raise NotImplementedError

    def rules(self, rule: str, name: str, schema: Schema, symbols: Symbols) -> list[str]:
        """Lark of a call of the tool, in rules whose names begin with `rule`."""
        raise NotImplementedError

    def text(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as the model writes it, without what stands around calls."""
        raise NotImplementedError

    def only_calls(self, parallel: bool, symbols: Symbols) -> list[str]:
        """Lark of an answer that is nothing but calls, of the rule `call`."""
        return [f"calls: {symbols(self._mark)} {self._behind_mark(parallel, symbols)}"]

    def text_and_calls(self, parallel: bool, symbols: Symbols, marks: Sequence[int]) -> list[str]:
        """Lark of an answer that is text, where what begins as calls is some. marks: the special tokens of a text."""
        if self.bare:
            return [f"answer: calls | /[^{re.escape(self.bare)}](.|\\n)*/ | /()/", *self.only_calls(parallel, symbols)]
        begin = symbols(self._mark)
        others = ",".join(str(i) for i in marks if f"<[{i}]>" != begin)
        text = f"TEXT (<[{others}]> TEXT)*" if others else "TEXT"
        lines = [f"answer: (before {self._behind_mark(parallel, symbols)}){'*' if parallel else '?'} text"]
        lines += [f"text: {text}", "TEXT: /(.|\\n)*/"]
        if begin.startswith("<["):
            return [*lines, f"before: text {begin}"]
        skipped = f"(TEXT <[{others}]>)*" if others else ""
        return [*lines, f"before: {skipped} begin", f"begin[lazy]: TEXT {begin}"]

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, (name, arguments), as the model writes them."""
        before, between, behind = self.written
        return before + between.join(self.text(name, arguments) for name, arguments in calls) + behind

    @property
    def _mark(self) -> str:
        """What is written first."""
        return self.begin if self.written[0].startswith(self.begin) else ""

    def _behind_mark(self, parallel: bool, symbols: Symbols) -> str:
        between, behind = map(symbols, self.written[1:])
        before = self.written[0].removeprefix(self._mark)
        space = '" "?' if before and before == self.opening else ""  # as the tokenizers of a family differ
        return f"{space} {symbols(before)} call {f'({between} call)*' if parallel else ''} {behind}"


class GeneratedReader:
    """A reader whose `_read` is a Reading of the whole call, which says pieces of its arguments."""

    def __init__(self, schemas: Mapping[str, Schema]):
        self.name: str | None = None
        self.done = False
        self._schemas, self._said = schemas, ""
        self._reading = self._read()
        next(self._reading)

    def push(self, char: str) -> str:
        try:
            self._reading.send(char)
        except StopIteration:
            self.done = True
        said, self._said = self._said, ""
        return said

    def _read(self) -> Reading:
        raise NotImplementedError

    def _named(self, mark: str) -> Reading:
        """The name of a tool, up to a mark of one character, which is taken."""
        text = ""
        while (char := (yield)) != mark:
            text += char
            if len(text) > LONGEST or not any(name.startswith(text.strip(SPACE)) for name in self._schemas):
                raise ValueError("there is no such tool")
        self.name = text.strip(SPACE)
        if self.name not in self._schemas:
            raise ValueError("there is no such tool")


def mark_of(*marks: str, again: str = "") -> Reading:
    """Which of the marks comes, behind white space; none begins another. again: a character that came already."""
    text = ""
    while text not in marks:
        char, again = again or (yield), ""
        if text or char not in SPACE:
            text += char
        if not any(mark.startswith(text) for mark in marks):
            raise ValueError(f"expected {' or '.join(marks)}")
    return text


def until(mark: str, held: str = "", say: Callable[[str], None] = lambda text: None, line: str = "") -> Reading:
    """The text before a mark. held: what came of it already. say: is told it as it becomes certain. line: what may
    stand before the mark, and is no part of the text."""
    text, said = held, 0
    while not text.endswith(mark):
        certain = len(text) - max(overlap(text, mark), overlap(text, line + mark))
        if certain > said:
            say(text[said:certain])
            said = certain
        text += yield
    text = text.removesuffix(mark).removesuffix(line)
    say(text[said:])
    return text


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text that begins the mark, short of all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def json_rule(rule: str, schema: Schema) -> str:
    """Lark of JSON by a schema."""
    return f"{rule}: %json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': GRAMMAR_SPACE}})}"


def until_rules(rule: str, mark: str, symbols: Symbols, count: str = "*") -> list[str]:
    """Lark of any text, of so many characters, and the mark behind it, the first that comes."""
    symbol, text, any = symbols(mark), f"{rule.upper()}_TEXT", f"/(.|\\n){count}/"
    if (at := symbol.find("<[")) >= 0:  # a special token, which no text has in it
        return [f"{rule}: {text} {symbol[at:]}", f"{text}: {any}"]
    return [f"{rule}[lazy]: {text} {symbol}", f"{text}: {any}"]


def symbols_of(text: str, special_tokens: Mapping[str, int]) -> str:
    """In llguidance's Lark: special tokens by their ids, and the text between."""
    found = [mark for mark in special_tokens if mark and mark in text]
    if not found:
        return json.dumps(text, ensure_ascii=False) if text else ""
    mark = max(found, key=len)
    before, _, behind = text.partition(mark)
    symbols = [symbols_of(before, special_tokens), f"<[{special_tokens[mark]}]>", symbols_of(behind, special_tokens)]
    return " ".join(filter(None, symbols))
