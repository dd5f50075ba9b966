"""What makes a tokenizer one of SentencePiece's kind: Llama 2, Mistral, Mixtral, Gemma, Phi-3.

Its merges begin with characters, not with bytes, and a text is not split first: a space is a character like any other,
and tokens hold it. Its files write "▁" for a space, in text too; here both are a space. A character that is no token
becomes those of its bytes, which merge with nothing.
"""

from dataclasses import dataclass
from typing import Literal

from cs336 import _text

MARK = "\u2581"  # what files have for a space
NAME = "sentencepiece"  # where other tokenizers have the name of a pattern


@dataclass(frozen=True)
class SentencePiece:
    """Raises ValueError where nothing stands for a character that is no token, or files could not tell the prefix."""

    byte_ids: tuple[int, ...] = ()
    """The ids of the 256 bytes, for characters that are no token; or none, and then"""
    unknown: int | None = None
    """the id for such a character, or,"""
    fuses_unknown: bool = False
    """for a run of them."""
    prefix: Literal["never", "first", "always"] = "never"
    """Where a space goes that the text lacks: before its start, or after each special token too,"""
    doubled: bool = False
    """even where the text begins with one."""
    before_spaces: bool = False
    """No token goes on with a space: not even one of several."""
    strips: bool = False
    """Decoding leaves out a space that the text would begin with."""
    tied: tuple[int, ...] = ()
    """How many merges in a row are of one rank, of which the leftmost in a text comes first; or none are."""
    found: frozenset[str] = frozenset()
    """The special tokens that any text is searched for, allowed or not."""
    left: frozenset[str] = frozenset()
    """Those that take the white space before them with them;"""
    right: frozenset[str] = frozenset()
    """and after them."""
    begin: tuple[int, ...] = ()
    """The ids that a model expects before a text; encoding does not add them."""

    def __post_init__(self):
        if len(self.byte_ids) not in (0, 256):
            raise ValueError(f"byte_ids are of all 256 bytes or none, got {len(self.byte_ids)}")
        if not self.byte_ids and self.unknown is None:
            raise ValueError("nothing stands for a character that is no token: give byte_ids, or unknown")
        if self.doubled and (self.prefix == "first" or self.before_spaces):
            raise ValueError('no file can tell of a doubled prefix that is the "first", or of pieces before spaces')

    def for_core(self) -> _text.Characters:
        return _text.Characters(
            byte_ids=list(self.byte_ids),
            unknown=self.unknown,
            fuses_unknown=self.fuses_unknown,
            prefix=getattr(_text.Prefix, self.prefix),
            doubled=self.doubled,
            before_spaces=self.before_spaces,
            tied=list(self.tied),
        )

    def spelled(self, vocab: dict[int, bytes]) -> dict[int, str]:
        """The texts that files have for tokens."""
        return {i: token.decode().replace(" ", MARK) for i, token in vocab.items() if i not in self.byte_ids} | {
            i: byte_token(byte) for byte, i in enumerate(self.byte_ids)
        }


def byte_token(byte: int) -> str:
    return f"<0x{byte:02X}>"
