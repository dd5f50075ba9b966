"""Texts that follow a grammar (a JSON schema, a regular expression, a list of texts, Lark): which tokens may come next.

A token may come where what is there, and then its bytes, begins a text of the grammar; llguidance finds these tokens.
Special tokens are no text, but where Lark names them. Those that end a text may come where it is one of the grammar's;
where nothing can follow it ends by itself. V = vocabulary.
"""

import copy
import functools
import importlib.util
import json
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from cs336.inference.sampling import SamplingParams

# Between the parts of JSON, at most: a model that is unsure would go on with white space up to max_tokens.
SPACE = r"[ \n\t]{0,20}"
RECENT = 64  # grammars that are kept compiled


class Guide:
    """Where one text stands in its grammar. matcher: llguidance's, which is changed from here on."""

    def __init__(self, matcher: Any, ends: Rows[int], vocab_size: int):
        self._matcher, self._ends, self._vocab_size = matcher, ends, vocab_size
        self.ended = False
        """Nothing can follow."""
        self.allowed = self._allowed()
        """The tokens that may come next, as bits, the lowest of a byte first: uint8 (ceil(V / 8),)."""

    def advance(self, token_id: int) -> None:
        """Raises ValueError where the text is none of the grammar's and no token can make it one."""
        self._matcher.consume_token(token_id)
        self.allowed = self._allowed()

    def copy(self) -> "Guide":
        """Of another text, which stands where this one does."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def _allowed(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: -(-self._vocab_size // 8)].copy()
        _set(bits, [self._vocab_size], False)  # the end that llguidance knows, behind all tokens
        if self._matcher.is_error():
            raise ValueError(f"the text cannot go on by its grammar: {_said(self._matcher)}")
        self.ended = not bits.any()
        if self._matcher.is_accepting():
            _set(bits, self._ends, True)
        return bits


class Grammars:
    """Guides of texts of one tokenizer, for a model of vocab_size tokens. From any thread."""

    def __init__(self, tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._begin = functools.lru_cache(RECENT)(self._compile)

    def guide(self, params: SamplingParams, ends: Rows[int] = ()) -> Guide | None:
        """Of a text that begins now, if params have a grammar. ends: the tokens that end the text.

        Raises ValueError for a grammar that is none, that llguidance does not know, or whose texts no token begins,
        where there is no tokenizer, and where llguidance is not installed.
        """
        if params.grammar is None:
            return None
        begin = self._begin(*params.grammar)
        try:
            guide = Guide(begin.deep_copy(), ends, self._vocab_size)
        except ValueError:  # copies share a lexer, which another text may have driven to its limit: one of its own
            guide = Guide(self._compile(*params.grammar), ends, self._vocab_size)
        if guide.ended:
            raise ValueError(f"{params.grammar[0]} allows no text but the empty one: let it have others")
        return guide

    def _compile(self, kind: str, text: str) -> Any:
        """llguidance's matcher of a text that begins."""
        vocabulary = self._vocabulary
        if kind == "regex" and (len(text) - len(text.rstrip("\\"))) % 2:  # which llguidance would pass over
            raise ValueError("regex cannot be followed: its last backslash escapes nothing")
        from llguidance import LLMatcher

        try:
            if kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": SPACE})
            elif kind == "lark":
                grammar = LLMatcher.grammar_from_lark(text)
            else:
                regex = text if kind == "regex" else "|".join(map(_literal, json.loads(text)))
                grammar = LLMatcher.grammar_from_regex(regex)
            matcher = LLMatcher(vocabulary, grammar, log_level=0)
        except ValueError as error:  # of what is no Unicode, or nested too deeply
            raise ValueError(f"{kind} cannot be followed: {error}") from None
        matcher.compute_bitmask()  # finds some errors that nothing before does
        if matcher.is_error():
            raise ValueError(f"{kind} cannot be followed: {_said(matcher)}")
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The tokenizer as llguidance has it."""
        if self._tokenizer is None:
            raise ValueError("json_schema, regex, choice and lark are of texts: give the engine a tokenizer")
        _check_installed("json_schema, regex, choice and lark")
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)))


class _Vocabulary:
    """A tokenizer as llguidance wants it, with an end of its own behind the model's tokens."""

    bos_token_id = None

    def __init__(self, tokenizer, vocab_size: int):
        vocab, special = tokenizer.vocab, tokenizer.special_ids
        self.eos_token_id = vocab_size
        self.tokens = [vocab.get(i, b"") for i in range(vocab_size)] + [b"<end>"]
        self.special_token_ids = [i for i in range(vocab_size + 1) if i in special or i not in vocab]
        ordinary = next((i for i in vocab if i not in special), 0)  # what it may be behind
        self._encode = functools.partial(tokenizer.encode, allowed_special=(), disallowed_special=(), behind=[ordinary])

    def __call__(self, text: str | bytes) -> list[int]:
        """As the tokenizer has it, so that what can only come so does; none of what it has no tokens for."""
        try:
            return self._encode(text)
        except ValueError:
            return []


def check_schema(schema: Mapping[str, Any], name: str) -> None:
    """Raises ValueError where llguidance cannot follow the schema called so, and where it is not installed."""
    _check_installed(f"calls by {name}")
    from llguidance import LLMatcher

    try:
        reason = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    except ValueError as error:  # as in _compile
        reason = str(error)
    if reason:
        raise ValueError(f"{name} cannot be followed: {_line(reason)}")


def _check_installed(what: str) -> None:
    if importlib.util.find_spec("llguidance") is None:
        raise ValueError(f"{what} need llguidance: pip install 'cs336[structured]'")


def _literal(text: str) -> str:
    """A regular expression of this text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _set(bits: np.ndarray, token_ids: Rows[int], to: bool) -> None:
    for i in token_ids:
        if i < 8 * len(bits):
            bit = 1 << (i & 7)
            bits[i >> 3] = bits[i >> 3] | bit if to else bits[i >> 3] & 0xFF - bit


def _said(matcher: Any) -> str:
    """llguidance's reason, on one line, without the state that it prints behind."""
    reason = _line(matcher.get_error())
    return "no token may come next" if reason == "NoExtensionBias" else reason


def _line(reason: str) -> str:
    return " ".join(reason.partition("\n<state>")[0].split())[:500]
