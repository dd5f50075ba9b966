"""Regular expressions that tiktoken, Hugging Face's tokenizers and the `regex` package read alike.

Three engines match the expressions of tokenizers, and to each some of what is written means something else: `$` is the
end of a line to one and of the text to another, `[a-z&&[^aeiou]]` is an intersection to two and a set with brackets to
the third, (?i:ss) is \N{LATIN SMALL LETTER SHARP S} too to one alone. `translate` lets through what all read alike,
rewrites for `regex` what the others agree on, and refuses the rest by name.
"""

import string
from typing import NamedTuple, NoReturn

import regex

PROPERTIES = {
    *("L", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N", "Nd", "Nl", "No", "P", "Pc", "Pd", "Ps", "Pe"),
    *("Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "Cc", "Cf", "Co"),
    *("Han", "Hiragana", "Katakana", "Hangul", "Latin", "Greek", "Cyrillic", "Arabic", "Hebrew", "Thai", "Devanagari"),
}
_CONTROLS = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
_ESCAPABLE = set(string.punctuation) - set("<>") | {" "}
_GROUPS = {"(?:": "(?:", "(?>": "(?>", "(?=": "(?=", "(?!": "(?!", "(?<=": "(?<=", "(?<!": "(?<!"}
_FOLDS = {"s": "\u017f", "k": "\u212a"}  # what an ASCII letter stands for besides its two cases
_JOINED = {"ss", "ff", "fi", "fl", "st"}  # what one engine takes for a single letter, as it does ß


class _Part(NamedTuple):
    """A piece of an expression for `regex`, and how many characters it matches at the least and at the most."""

    text: str
    least: int
    most: float


def translate(expression: str) -> str:
    """An expression for the `regex` package that matches what tiktoken and Hugging Face's tokenizers match.

    Raises ValueError for what they do not read alike, with its place and, where there is one, another way to write it.
    """
    parser = _Parser(expression)
    part = parser.alternatives()
    if parser.place < len(expression):
        parser.refuse("a bracket that closes none", ")")
    if part.least == 0:
        raise ValueError("it can match nothing at all, which each engine takes in another way")
    try:
        regex.compile(part.text)
    except regex.error as error:
        raise ValueError(str(error)) from None
    return part.text


def quoted(expression: str) -> str:
    """As it was typed, where it can be seen: places in it are counted there, without the backslashes of a repr."""
    return f"'{expression}'" if expression.isprintable() else repr(expression)


class _Parser:
    def __init__(self, expression: str):
        self.expression = expression
        self.place = 0

    # ---- reading ----

    def peek(self, size: int = 1) -> str:
        return self.expression[self.place : self.place + size]

    def take(self, wanted: str) -> bool:
        if not self.expression.startswith(wanted, self.place):
            return False
        self.place += len(wanted)
        return True

    def refuse(self, what: str, text: str, instead: str | None = None) -> NoReturn:
        advice = f": write {instead}" if instead else ""
        raise ValueError(f"it has {what}, {quoted(text)} at {self.place}, which engines read in different ways{advice}")

    # ---- expressions ----

    def alternatives(self) -> _Part:
        parts = [self.sequence()]
        while self.take("|"):
            parts.append(self.sequence())
        return _Part("|".join(p.text for p in parts), min(p.least for p in parts), max(p.most for p in parts))

    def sequence(self) -> _Part:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom()))
        return _Part("".join(p.text for p in parts), sum(p.least for p in parts), sum(p.most for p in parts))

    def repeated(self, part: _Part) -> _Part:
        begin = self.place
        bounds = {"*": (0, float("inf")), "+": (1, float("inf")), "?": (0, 1)}
        if self.peek() in bounds and self.peek():
            least, most = bounds[self.peek()]
            self.place += 1
            if self.peek() in ("?", "+"):
                self.place += 1
        elif self.peek() == "{":
            found = regex.compile(r"\{(\d+)(,?)(\d*)\}").match(self.expression, self.place)
            if not found:
                self.refuse("a brace that is no count", "{", r"\{")
            self.place = found.end()
            least = int(found[1])
            most = float(found[3] or "inf") if found[2] else least
            if self.peek() == "+":
                self.refuse("a count that gives nothing back", found[0] + "+", "(?>...) around it and its operand")
            if self.peek() == "?":
                if not found[2]:
                    self.refuse("a lazy count of one size", found[0] + "?", found[0])
                self.place += 1
            if most < least:
                self.refuse("a count that is empty", found[0])
        else:
            return part
        if self.peek() and self.peek() in "*+?{":
            self.refuse("a repetition of a repetition", self.peek(), "(?:...) around the first")
        if part.least == 0:
            self.refuse("a repetition of what can match nothing", self.expression[begin : self.place])
        return _Part(part.text + self.expression[begin : self.place], part.least * least, part.most * most)

    def atom(self) -> _Part:
        char = self.peek()
        if char == "(":
            return self.group()
        if char == "[":
            return _Part(self.char_class(), 1, 1)
        if char == "\\":
            return _Part(self.escape(), 1, 1)
        if char == ".":
            self.place += 1
            return _Part(".", 1, 1)
        if char == "$":
            self.refuse("the end of a line or of the text", "$", r"(?![\s\S]) for the end of the text")
        if char == "^":
            self.refuse("the start of a line or of the text", "^", r"(?<![\s\S]) for the start of the text")
        if char in "*+?{":
            self.refuse("a repetition of nothing", char, "\\" + char)
        self.place += 1
        return _Part(literal(char), 1, 1)

    def group(self) -> _Part:
        begin = self.place
        if self.take("(?i:"):
            return self.any_case(begin)
        opening = next((text for text in _GROUPS if self.take(text)), None)
        if opening is None:
            if self.peek(2) in ("(?", "(*"):
                found = regex.compile(r"\(\?P?<\w+>|\(\?[\w-]+[:)]|\([?*].").match(self.expression, self.place)
                text = found[0] if found else self.peek(3)
                self.refuse("a group of another kind", text, "(?i:...)" if text == "(?i)" else None)
            self.take("(")
            opening = "(?:"
        part = self.alternatives()
        if not self.take(")"):
            raise ValueError(f"it opens a bracket at {begin} and does not close it")
        text = f"{opening}{part.text})"
        if opening in ("(?:", "(?>"):
            return _Part(text, part.least, part.most)
        if opening in ("(?<=", "(?<!") and part.least != part.most:
            self.refuse("a look behind at texts of several sizes", self.expression[begin : self.place])
        return _Part(text, 0, 0)

    # ---- any case ----

    def any_case(self, begin: int) -> _Part:
        """Inside (?i:...): ASCII literals and sets of them, which have the same folds everywhere."""
        texts, sizes, row = [""], [], list[str]()
        while not self.take(")"):
            char = self.peek()
            if char == "|":
                self.place += 1
                sizes.append(len(row))
                texts[-1:] = [texts[-1], ""]
                row = []
                continue
            if char == "[":
                found = regex.compile(r"\[([A-Za-z]+)\]").match(self.expression, self.place)
                chars = found[1] if found else ""
                self.place = found.end() if found else self.place
            elif char == "\\" and self.peek(2)[1:] in _ESCAPABLE:
                chars = self.peek(2)[1:]
                self.place += 2
            else:
                chars = char if char not in "()[]{}*+?.^$\\" and char.isascii() else ""
                self.place += len(chars)
            if not chars:
                self.refuse("more than ASCII letters and sets of them in any case", self.peek(), "both cases out")
            chars = chars.lower()
            if row and any(a + b in _JOINED for a in row[-1] for b in chars):
                self.refuse("letters that are also one in any case", self.expression[begin : self.place], "them out")
            row.append(chars)
            every = sorted({other for c in chars for other in (c, c.upper(), _FOLDS.get(c, c))})
            texts[-1] += literal(every[0]) if len(every) == 1 else f"[{''.join(map(literal, every))}]"
        sizes.append(len(row))
        return _Part(f"(?:{'|'.join(texts)})", min(sizes), max(sizes))

    # ---- characters ----

    def escape(self) -> str:
        """Outside a set and in one: what stands for a character, or for a class of them."""
        begin = self.place
        self.place += 1
        kind = self.peek()
        self.place += 1
        if kind in ("p", "P"):
            found = regex.compile(r"\{(\w+)\}").match(self.expression, self.place)
            if not found or found[1] not in PROPERTIES:
                text = self.expression[begin : self.expression.find("}", begin) + 1] or self.expression[begin:]
                self.place = begin
                self.refuse("a property", text, "one of " + ", ".join(sorted(PROPERTIES)))
            self.place = found.end()
            return self.expression[begin : self.place]
        if kind in _CONTROLS:
            return literal(_CONTROLS[kind])
        if kind and kind in "sSdD":
            return "\\" + kind
        if kind in _ESCAPABLE:
            return literal(kind)
        if kind in ("x", "u"):
            found = regex.compile(r"(?<=u)[0-9a-fA-F]{4}|(?<=x)[0-7][0-9a-fA-F]|(?<=x)\{([0-9a-fA-F]{1,6})\}").match(
                self.expression, self.place
            )
            if found and (code := int(found[1] or found[0], 16)) < 0x110000 and not 0xD800 <= code < 0xE000:
                self.place = found.end()
                return literal(chr(code))
        self.place = begin
        instead = r"a set of properties, as [\p{L}\p{M}\p{N}_]" if kind in ("w", "W") else None
        return self.refuse("an escape", self.peek(2), instead)

    def char_class(self) -> str:
        """A set as an expression that matches one character: sets in it, and &&, become looks ahead."""
        begin = self.place
        self.place += 1
        is_negated = self.take("^")
        operands = [self.union()]
        while self.take("&&"):
            operands.append(self.union())
        if not self.take("]"):
            raise ValueError(f"it opens a set at {begin} and does not close it")
        first, *others = operands
        if others:
            text = "(?:" + "".join(f"(?={other})" for other in others) + first + ")"
        elif first.startswith("["):
            return f"[^{first[1:]}" if is_negated else first
        else:
            text = first
        return rf"(?:(?!{text})[\s\S])" if is_negated else text

    def union(self) -> str:
        items, nested = "", list[str]()
        is_first = True
        while self.peek() not in ("", "]") and self.peek(2) != "&&":
            if self.peek(2) in ("--", "~~", "||", "[:", "&]"):
                self.refuse("an operator of sets", self.peek(2), "\\" + self.peek())
            if self.peek() == "[":
                nested.append(self.char_class())
                is_first = False
                continue
            is_dash = self.peek() == "-"
            if is_dash and not is_first and self.expression[self.place + 1 : self.place + 2] != "]":
                self.refuse("a dash between others", "-", r"\-")
            items += self.range()
            is_first = False
        if not items and not nested:
            self.refuse("a set of nothing", self.peek(), r"\]" if self.peek() == "]" else None)
        sets = ([f"[{items}]"] if items else []) + nested
        return sets[0] if len(sets) == 1 else f"(?:{'|'.join(sets)})"

    def range(self) -> str:
        """One member of a set, or a range."""
        low = self.member()
        if self.peek() != "-" or self.expression[self.place + 1 : self.place + 2] in ("]", ""):
            return low
        begin = self.place
        if self.peek(2) == "--":
            self.refuse("an operator of sets", "--", r"\-")
        self.place += 1
        if self.peek() in ("[", "&"):
            self.refuse("a range with no end", self.peek(), r"\-")
        high = self.member()
        if not (_is_char(low) and _is_char(high)) or low[-1] > high[-1]:
            self.place = begin
            self.refuse("a range that is none", f"{low}-{high}", r"\-")
        return f"{low}-{high}"

    def member(self) -> str:
        if self.peek() == "\\":
            return self.escape()
        char = self.peek()
        self.place += 1
        return literal(char)


def literal(char: str) -> str:
    """The expression for one character, in a set or outside one."""
    return "\\" + char if char in string.punctuation or char == " " else char


def _is_char(text: str) -> bool:
    return len(text) == 1 or (len(text) == 2 and (text[1] in string.punctuation or text[1] == " "))
