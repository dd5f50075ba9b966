"""Tokens to text as they come."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Text of tokens as they come: whole characters, cut before the first stop string.

    What may yet become a stop string is held back until it does or cannot. at_start: a text begins here, so that a
    space at its front is left out where the tokenizer's encoding puts one there.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = (), at_start: bool = False):
        self._tokenizer, self._stop = tokenizer, stop
        self._strips = at_start and tokenizer.strips_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that is now certain. Sets `stopped` once a stop string is complete; then push no more."""
        data = self._tokenizer.token_bytes(token_id)
        if self._strips:
            data, self._strips = data.removeprefix(b" "), False
        text = self._decoder.decode(data)
        return self._release(text) if self._stop else text

    def close(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(s), at) for s, at in ((s, text.find(s)) for s in self._stop) if at >= 0]
        if found:
            _, at = min(found)  # the first to be complete, however the text came in tokens
            self.stopped, self._held = True, ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop, short of all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
