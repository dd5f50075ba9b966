"""Tokenizer: what a vocabulary and its merges do to text. The work is done in C++ (csrc/cpu/text)."""

import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from cs336 import _text
from cs336.tokenizer import formats, sentencepiece_json, sentencepiece_model
from cs336.tokenizer.formats import Parts
from cs336.tokenizer.huggingface import read_huggingface
from cs336.tokenizer.parts import (
    check_others_read,
    check_tiktoken_reads,
    checked_merges,
    checked_specials,
    checked_vocab,
    every_split,
    place_characters,
    place_specials,
)
from cs336.tokenizer.patterns import canonical, for_core, portable
from cs336.tokenizer.sentencepiece import NAME, SentencePiece
from cs336.tokenizer.text_stream import TextStream
from cs336.tokenizer.training import Source, train
from cs336.utils.batching import batches
from cs336.utils.shards import META, SHARD_TOKENS, ShardWriter, TokenMeta, read_meta
from cs336.utils.special_tokens import END_OF_TEXT
from cs336.utils.threads import thread_count

Specials = Literal["all"] | Iterable[str]
STREAM_STEP = 64 << 10  # bytes of text that encode_iterable encodes at a time
FILE_STEP = 8 << 20  # and encode_to_file
NO_RANK = (1 << 32) - 1  # below which all merges are


class Tokenizer:
    """A BPE tokenizer of bytes or, of SentencePiece's kind, of characters. Immutable, picklable, and safe to use from
    several threads at once, and after a fork.

    Each thread of a call uses a cache of at most 22 MB, or of a few times the size of the vocabulary if that is more,
    which is kept for later calls.

    Args:
        vocab: id -> bytes. Ids may have holes and any order, up to 2**24 - 1; each up to the largest takes 30 bytes.
        merges: pairs of tokens, first merge first; the two together must be in the vocabulary too. None: any two tokens
            that together are a token merge, the lowest id first, and a piece that is a token is that token: the rule
            of tiktoken, where ids are ranks.
        special_tokens: texts that stand for one id and are never merged; a dict gives the ids. One that the vocabulary
            does not have, or has only as an ordinary token, gets the next id after the largest. Ordinary text never
            encodes to a special token, but to one that a dict gives the id of the ordinary token that merges make of
            the same text: that one is both.
        pattern: a name in cs336.tokenizer.PATTERNS, or a regular expression of the `regex` package. Where other engines
            read one in other ways (cs336/tokenizer/dialect.py), no file of another's format is read or written with it.
        allowed_special: the special tokens that text is searched for, "all" or a set of them, where a call does not
            say; not saved.
        sentencepiece: what makes it one of SentencePiece's kind (cs336/tokenizer/sentencepiece.py): tokens are then
            characters as UTF-8, with spaces, merges are listed, and there is no pattern.

    Text is str, or bytes, which need not be UTF-8. A lone surrogate in a str becomes U+FFFD.
    Raises ValueError if the parts do not fit together.
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: Iterable[tuple[bytes, bytes]] | None,
        special_tokens: Iterable[str] | dict[str, int] | None = None,
        pattern: str = "gpt2",
        allowed_special: Specials = (),
        sentencepiece: SentencePiece | None = None,
    ):
        self._vocab = checked_vocab(vocab)
        self._listed_merges = None if merges is None else checked_merges(merges)
        self._kind = sentencepiece
        if sentencepiece is None:
            self._pattern = canonical(pattern)
            self._specials, shared = place_specials(self._vocab, special_tokens, self._listed_merges)
        elif self._listed_merges is None:
            raise ValueError("a tokenizer of SentencePiece's kind needs its merges listed")
        else:
            self._pattern = NAME
            self._specials, shared = place_characters(sentencepiece, self._vocab, special_tokens, self._listed_merges)
        apart = (set(self._specials.values()) - shared) | set(sentencepiece.byte_ids if sentencepiece else ())
        self._ordinary_ids = sorted(self._vocab.keys() - apart)
        left, right = (sentencepiece.left, sentencepiece.right) if sentencepiece else ((), ())
        self._core = _text.Encoder(
            tokens=list(self._vocab.items()),
            ordinary=self._ordinary_ids,
            merges=self._listed_merges,
            specials=[(text.encode(), i, text in left, text in right) for text, i in self._specials.items()],
            pattern=sentencepiece.for_core() if sentencepiece else for_core(self._pattern),
        )
        self._policy = lru_cache(maxsize=64)(self._make_policy)
        self._ordinary = self._get_policy((), ())
        self._allowed_special = _frozen(allowed_special)
        self._get_policy(None, "all")

    # ---- making one ----

    @classmethod
    def train(
        cls,
        source: Source,
        vocab_size: int,
        special_tokens: Sequence[str] = (),
        pattern: str = "gpt2",
        num_threads: int | None = None,
        progress: bool = False,
        allowed_special: Specials = (),
    ) -> "Tokenizer":
        """Train byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909).

        Ids: the 256 bytes, then the merges in order, then the special tokens. Each merge is of the most frequent pair;
        of equally frequent ones, the pair whose byte strings are greatest. The result does not depend on the number
        of threads, nor on how a file is read.

        Args:
            source: a path; several, as `pathlib.Path` or a list of str that are all paths; or an iterable of
                documents, str or bytes. A str alone is a path. JSON lines and parquet are read by
                cs336.utils.documents.read_documents, of a directory each file but binary ones, and any other file as a
                stream of bytes, unpacked if its name ends in .gz, .xz or .bz2. Nothing is merged across documents,
                files or special tokens.
            vocab_size: the size wanted, special tokens included; at least 256 and one for each of them.
                Fewer are made, with a warning, where the text has no pair left to merge.
            special_tokens: the text is split at these first (the longest that fits), and they are not counted.
            num_threads: None for as many as this process may run on.
            progress: show a bar.
            allowed_special: the new tokenizer's default, as in the constructor.

        Raises ValueError for a vocab_size that is too small and for a source that is none of the above, TypeError for
        a document that is neither str nor bytes, and FileNotFoundError.
        Memory does not grow with the size of the text, but with its distinct pieces, all of which are counted
        exactly: some 150 bytes for a word of English, 13 a byte for others, 0.5 MB and 48 bytes a merge for each
        thread, and 16 MB, four times the longest piece, or twice the longest document.
        """
        pattern = canonical(pattern)
        specials = checked_specials(special_tokens)
        merges = train(source, operator.index(vocab_size), specials, pattern, thread_count(num_threads), progress)
        tokens = [bytes([byte]) for byte in range(256)]
        pairs = []
        for left, right in merges:
            pairs.append((tokens[left], tokens[right]))
            tokens.append(tokens[left] + tokens[right])
        vocab = dict(enumerate(tokens)) | {len(tokens) + i: text.encode() for i, text in enumerate(specials)}
        ids = {text: len(tokens) + i for i, text in enumerate(specials)}
        return cls(vocab, pairs, ids, pattern, allowed_special)

    @classmethod
    def load(cls, path: str | os.PathLike, allowed_special: Specials = ()) -> "Tokenizer":
        """Read what `save` wrote. Raises ValueError if the file is another kind, damaged or altered.

        cs336.tokenizer.convert.load reads the files of others too.
        """
        document, section = formats.read_own(path)
        with formats.reading(path):
            is_of_bytes = section["format"] == formats.FORMAT
            parts = (formats.parts_of if is_of_bytes else sentencepiece_json.parts_of_characters)(document)
            tokenizer = cls._of(parts, allowed_special)
            found = tokenizer.fingerprint
        if found != section.get("fingerprint"):
            raise ValueError(f"{path} was changed after it was saved: its fingerprint does not match its contents")
        return tokenizer

    @classmethod
    def from_gpt2(
        cls,
        vocab_json: str | os.PathLike,
        merges_txt: str | os.PathLike,
        special_tokens: Iterable[str] | None = None,
        pattern: str = "gpt2",
        allowed_special: Specials = (),
    ) -> "Tokenizer":
        """Read GPT-2's two files. special_tokens: None for <|endoftext|> if the vocabulary has it."""
        specials = None if special_tokens is None else checked_specials(special_tokens)
        vocab, merges, given, *_ = formats.read_gpt2(vocab_json, merges_txt, specials)
        with formats.naming(vocab_json):
            return cls(vocab, merges, given if specials is None else specials, portable(pattern), allowed_special)

    @classmethod
    def from_tiktoken(
        cls,
        ranks: str | os.PathLike,
        pattern: str,
        special_tokens: Iterable[str] | dict[str, int] | None = None,
        allowed_special: Specials = (),
    ) -> "Tokenizer":
        """Read a .tiktoken file: ranks, which are the ids. It knows neither its pattern nor its special tokens. What
        the pattern does not match, and tiktoken drops, is a piece here."""
        vocab = formats.read_tiktoken(ranks)
        with formats.naming(ranks):
            return cls(vocab, None, special_tokens, portable(pattern), allowed_special)

    @classmethod
    def from_huggingface(
        cls, path: str | os.PathLike, without_normalizer: bool = False, allowed_special: Specials = ()
    ) -> "Tokenizer":
        """Read a tokenizer.json of BPE that others wrote, of bytes or of SentencePiece's kind. Its added tokens become
        special tokens; Hugging Face's own encode looks for all of them, as ours does with allowed_special="all". In
        SentencePiece's kind those that the file does not call special are looked for in any text.

        Raises ValueError if its ids would not be ours: for another model, pre-tokenizer or kind of added token, and for
        a normalizer unless `without_normalizer`. With ignore_merges ids are taken as ranks, if the merges listed are
        those of ranks: one for each token, or every split of it; in SentencePiece's kind, merges must come to each
        token. A post-processor, which adds tokens around a text, truncation and padding are left out; `begin_ids` has
        the tokens that it puts before one.
        """
        parts, whole_pieces = read_huggingface(path, without_normalizer)
        with formats.reading(path):
            tokenizer = cls._of(parts, allowed_special)
            if not whole_pieces:
                return tokenizer
            if parts.sentencepiece is not None:
                tokens = tokenizer._ordinary_tokens().items()
                if lost := [token for i, token in tokens if tokenizer._core.merge_piece(token, NO_RANK) != [i]]:
                    raise ValueError(f"it has ignore_merges, and its merges do not come to its token {lost[0]!r}")
                return tokenizer
            ranked = cls._of(parts._replace(merges=None), allowed_special)
            made_once = tokenizer._unmade_token() is None and ranked.merges == tokenizer.merges
            if not made_once and not tokenizer._lists_every_split():
                raise ValueError("it has ignore_merges, and its merges are not those of its ids as ranks")
            return ranked

    @classmethod
    def from_sentencepiece(cls, path: str | os.PathLike, allowed_special: Specials = ()) -> "Tokenizer":
        """Read a tokenizer.model of SentencePiece, if it is BPE and does not change text first.

        Ids are SentencePiece's, but for text that holds tokens of a user's: behind one a text begins anew, as with
        Hugging Face and llama.cpp, and one of spaces is looked for among spaces alone, not marks.
        """
        parts = sentencepiece_model.read_model(path)
        with formats.reading(path):
            return cls._of(parts, allowed_special)

    @classmethod
    def _of(cls, parts: Parts, allowed_special: Specials) -> "Tokenizer":
        return cls(*parts[:4], allowed_special, parts.sentencepiece)

    def _parts(self) -> Parts:
        return Parts(self._vocab, self._listed_merges, self._specials, self._pattern, self._kind)

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json, which Hugging Face's tokenizers reads too (see cs336/tokenizer/formats.py), but for a
        pattern that it would read in another way: it refuses that file."""
        parts = self._parts()
        if self._kind is not None:
            sentencepiece_json.write_json(path, parts, self.fingerprint)
            return
        by_rank = self._listed_merges is None and self._unmade_token()
        formats.write_json(path, parts, self._every_split() if by_rank else self.merges, self.fingerprint)

    def to_gpt2(self, vocab_json: str | os.PathLike, merges_txt: str | os.PathLike) -> None:
        """Write GPT-2's two files, which do not tell the pattern.

        Raises ValueError if ids are ranks and some token is not made by merges: the files could not say so.
        """
        check_others_read("vocab.json and merges.txt", self._pattern, self._kind)
        merges = self.merges
        if self._listed_merges is None and (token := self._unmade_token()):
            raise ValueError(f"no merge of two others makes the token {token!r}: vocab.json and merges.txt cannot tell")
        formats.write_gpt2(vocab_json, merges_txt, Parts(self._vocab, merges, self._specials, self._pattern))

    def to_tiktoken(self, path: str | os.PathLike) -> None:
        """Write tiktoken's ranks, which tell neither the pattern nor the special tokens.

        Raises ValueError if the merges are not those that the ids give as ranks, or do not make every token, and for a
        pattern that is seen not to match everything: tiktoken leaves out what is a piece here.
        """
        check_tiktoken_reads(self._pattern, self._kind)
        if self._listed_merges is not None:
            if token := self._unmade_token():
                raise ValueError(f"no merge makes the token {token!r}, which would be found as a rank")
            if Tokenizer(self._vocab, None, self._specials, self._pattern).merges != self._listed_merges:
                raise ValueError("the merges are not in the order of the ids, which is all that ranks can tell")
        formats.write_tiktoken(path, self._ordinary_tokens())

    # ---- encoding ----

    def encode(
        self,
        text: str | bytes,
        allowed_special: Specials | None = None,
        disallowed_special: Specials = "all",
        num_threads: int = 1,
        behind: Sequence[int] = (),
    ) -> list[int]:
        """The ids of text.

        behind: ids of what this text goes on, if it is not the beginning: SentencePiece's kind puts a space before that
        alone, or after special tokens too.

        A special token in the text becomes its id if allowed ("all", or a set of them; None for what the tokenizer was
        made with), raises ValueError if disallowed ("all" means all that are not allowed), and is ordinary text
        otherwise.
        """
        policy = self._get_policy(allowed_special, disallowed_special)
        if len(behind):
            after = _text.After.special if behind[-1] in self._specials.values() else _text.After.text
            return _text.StreamEncoder(self._core, policy, STREAM_STEP, after).feed(text, True)
        return self._core.encode_batch([text], policy, thread_count(num_threads))[0]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that a model reads of a text: special tokens written in it are such, and `begin_ids` come first, if
        they are not written there."""
        ids, begin = self.encode(text, "all"), list(self.begin_ids)
        return ids if ids[: len(begin)] == begin else begin + ids

    def encode_ordinary(self, text: str | bytes, num_threads: int = 1) -> list[int]:
        """The ids of text in which special tokens are text like any other."""
        return self._core.encode_batch([text], self._ordinary, thread_count(num_threads))[0]

    def encode_batch(
        self,
        texts: Iterable[str | bytes],
        num_threads: int | None = None,
        allowed_special: Specials | None = None,
        disallowed_special: Specials = "all",
    ) -> list[list[int]]:
        """`encode` for many texts, on several threads (None: as many as this process may run on)."""
        policy = self._get_policy(allowed_special, disallowed_special)
        return self._core.encode_batch(_listed(texts), policy, thread_count(num_threads))

    def encode_batch_numpy(
        self,
        texts: Iterable[str | bytes],
        num_threads: int | None = None,
        allowed_special: Specials | None = None,
        disallowed_special: Specials = "all",
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of many texts one after the other, (N,) uint16 or uint32 by vocab_size, and where each text begins
        and the last ends, (len(texts) + 1,) int64."""
        policy = self._get_policy(allowed_special, disallowed_special)
        return self._core.encode_batch_numpy(_listed(texts), policy, thread_count(num_threads))

    def encode_documents(
        self, texts: Iterable[str | bytes], eot_token: str = END_OF_TEXT, num_threads: int | None = None
    ) -> tuple[np.ndarray, int]:
        """The ids of documents, each followed by eot_token, (N,) uint16 or uint32, and how many bytes the documents
        have as UTF-8. In a document special tokens are ordinary text.

        Raises ValueError if eot_token is not one of the special tokens.
        """
        after = list(self._specials.values()).index(self._special_id(eot_token))
        return self._core.encode_documents(_listed(texts), self._ordinary, after, thread_count(num_threads))

    def encode_iterable(
        self,
        chunks: Iterable[str | bytes],
        allowed_special: Specials | None = None,
        disallowed_special: Specials = "all",
    ) -> Iterator[int]:
        """`encode` for one text that comes in chunks: the same ids, wherever it is cut.

        Lazy: a special token that is not allowed raises ValueError when it is reached. Holds some 64 KB of text, or a
        few times its longest piece if that is more: for o200k its longest run of letters and marks, and with a pattern
        that is a regular expression all text between two special tokens.
        """
        policy = self._get_policy(allowed_special, disallowed_special)
        stream = _text.StreamEncoder(self._core, policy, STREAM_STEP)
        held = ""  # the first half of a surrogate pair
        for chunk in chunks:
            if not isinstance(chunk, str):
                yield from stream.feed(held, False)
                held = ""
            else:
                chunk = held + chunk
                held = chunk[-1:] if "\ud800" <= chunk[-1:] <= "\udbff" else ""
                chunk = chunk[: len(chunk) - len(held)]
            yield from stream.feed(chunk, False)
        yield from stream.feed(held, True)

    def encode_to_file(
        self,
        documents: Iterable[str | bytes],
        directory: str | os.PathLike,
        eot_token: str = END_OF_TEXT,
        num_threads: int | None = None,
        shard_tokens: int = SHARD_TOKENS,
        replace: bool = False,
    ) -> TokenMeta:
        """Encode documents, each followed by eot_token, into a directory of token shards (cs336/utils/shards.py).

        In a document special tokens are ordinary text. Holds some 8 MB of text, or the longest document. Returns what
        meta.json says. Raises ValueError if eot_token is not one of the special tokens, if documents is one text or
        path, or if there are none, and TypeError for a document that is neither str nor bytes. Shards that the
        directory has are replaced if they are this tokenizer's; with `replace` any are, else ValueError.
        """
        if isinstance(documents, str | bytes | os.PathLike):
            raise ValueError(f"expected a list of texts, got one text or path: {type(documents).__name__}")
        eot_id = self._special_id(eot_token)
        is_held = (Path(directory) / META).exists() and not replace
        if is_held and (found := read_meta(directory).tokenizer) != self.fingerprint:
            raise ValueError(
                f"{directory} holds shards of another tokenizer, {found[:12]}, and this one is "
                f"{self.fingerprint[:12]}: give another directory, or replace=True"
            )
        with ShardWriter(
            directory,
            vocab_size=self.vocab_size,
            tokenizer=self.fingerprint,
            eot_id=eot_id,
            shard_tokens=shard_tokens,
            save_tokenizer=self.save,
        ) as writer:
            for batch in batches(documents, FILE_STEP):
                ids, num_bytes = self.encode_documents(batch, eot_token, num_threads)
                writer.write(ids, documents=len(batch), text_bytes=num_bytes)
            if not writer.meta.documents:
                raise ValueError("there are no documents to encode")
        return writer.meta

    # ---- decoding ----

    def decode_bytes(self, ids: Iterable[int], at_start: bool = True) -> bytes:
        """The bytes of ids. Raises ValueError for an id that is not in the vocabulary.

        at_start: a text begins here; one of SentencePiece's kind is without the space that encoding put before it.
        """
        data = self._core.decode(ids)
        return data.removeprefix(b" ") if at_start and self.strips_space else data

    def decode(self, ids: Iterable[int], at_start: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Raises ValueError for an unknown id."""
        text = self._core.decode_text(ids)
        return text.removeprefix(" ") if at_start and self.strips_space else text

    def decode_batch(self, batch: Iterable[Iterable[int]]) -> list[str]:
        """`decode` for many rows of ids."""
        return [self.decode(ids) for ids in batch]

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, a character never before all of its bytes; together what `decode` gives."""
        stream = TextStream(self, at_start=True)
        for i in ids:
            if text := stream.push(i):
                yield text
        if text := stream.close():
            yield text

    def decode_with_offsets(self, ids: Iterable[int]) -> tuple[str, list[int]]:
        """The text of ids, and for each the character of the text that its first byte belongs to.

        Raises ValueError for an unknown id and, since its characters could not be counted, for text that is not UTF-8.
        """
        tokens = [self._core.decode((i,)) for i in ids]
        text = b"".join(tokens).decode("utf-8")
        offsets, begun = [], 0
        for token in tokens:
            offsets.append(begun - (token[:1] >= b"\x80" and token[:1] < b"\xc0"))
            begun += sum(byte & 0xC0 != 0x80 for byte in token)
        if self.strips_space and text.startswith(" "):
            return text[1:], [max(0, offset - 1) for offset in offsets]
        return text, offsets

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one id. Raises ValueError if it is not in the vocabulary."""
        return self._core.decode((id,))

    def token_to_id(self, token: str | bytes) -> int:
        """The id of one token: a special token, or else an ordinary one. Raises ValueError if there is none."""
        if isinstance(token, str) and token in self._specials:
            return self._specials[token]
        found = self._id_of.get(token.encode("utf-8", "surrogatepass") if isinstance(token, str) else token)
        if found is None:
            raise ValueError(f"{token!r} is not a token of the vocabulary")
        return found

    @cached_property
    def _id_of(self) -> dict[bytes, int]:
        of_bytes = {bytes([byte]): i for byte, i in enumerate(self._kind.byte_ids)} if self._kind else {}
        return of_bytes | {token: i for i, token in self._ordinary_tokens().items()}

    # ---- what it is made of ----

    @cached_property
    def vocab_size(self) -> int:
        """The largest id and one: the rows that an embedding needs."""
        return max(self._vocab, default=-1) + 1

    @property
    def vocab(self) -> dict[int, bytes]:
        """id -> bytes, special tokens included; a copy."""
        return dict(self._vocab)

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merges in order; a copy. Where ids are ranks, the last merge of each token that merges lead to."""
        return list(self._found_merges if self._listed_merges is None else self._listed_merges)

    def _special_id(self, text: str) -> int:
        if text not in self._specials:
            raise ValueError(f"{text!r} is not a special token of this tokenizer, which has {list(self._specials)}")
        return self._specials[text]

    def _ordinary_tokens(self) -> dict[int, bytes]:
        return {i: self._vocab[i] for i in self._ordinary_ids}

    def _unmade_token(self) -> bytes | None:
        """The first ordinary token of several bytes that no merge makes."""
        made = {left + right for left, right in self.merges}
        tokens = (token for _, token in sorted(self._ordinary_tokens().items()))
        return next((token for token in tokens if len(token) > 1 and token not in made), None)

    def _every_split(self) -> list[tuple[bytes, bytes]]:
        return every_split([token for _, token in sorted(self._ordinary_tokens().items())])

    def _lists_every_split(self) -> bool:
        """Whether merges are all those of ranks, in the order of ids; those of one token in any order."""
        id_of = {token: i for i, token in self._ordinary_tokens().items()}
        made = [id_of[left + right] for left, right in self.merges]
        return made == sorted(made) and set(self.merges) == set(self._every_split())

    @cached_property
    def _found_merges(self) -> list[tuple[bytes, bytes]]:
        halves = (
            self._core.merge_piece(token, i) for i, token in sorted(self._ordinary_tokens().items()) if len(token) > 1
        )
        return [(self._vocab[pair[0]], self._vocab[pair[1]]) for pair in halves if len(pair) == 2]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id; a copy."""
        return dict(self._specials)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Of the special tokens but those that any text is searched for, which are text."""
        found = self._kind.found if self._kind else ()
        return frozenset(i for text, i in self._specials.items() if text not in found)

    @property
    def pattern(self) -> str:
        """The name of the pattern, or its regular expression; "sentencepiece" where there is none."""
        return self._pattern

    @property
    def strips_space(self) -> bool:
        """Whether a text is decoded without a space that it would begin with."""
        return self._kind is not None and self._kind.strips

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The ids that its models expect before a text, as a file of SentencePiece's kind says; encoding adds none."""
        return self._kind.begin if self._kind is not None else ()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that decides how text encodes, in hex."""
        return formats.fingerprint_of(self._parts())

    def __len__(self) -> int:
        return self.vocab_size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, pattern={self._pattern!r}, special_tokens={self._specials}, "
            f"fingerprint={self.fingerprint[:12]})"
        )

    def __reduce__(self):
        return Tokenizer._of, (self._parts(), self._allowed_special)

    def _get_policy(self, allowed: Specials | None, disallowed: Specials) -> _text.Policy:
        return self._policy(self._allowed_special if allowed is None else _frozen(allowed), _frozen(disallowed))

    def _make_policy(self, allowed: Specials, disallowed: Specials) -> _text.Policy:
        named = {name for specials in (allowed, disallowed) if specials != "all" for name in specials}
        if unknown := named - self._specials.keys():
            raise ValueError(f"{unknown} are not special tokens of this tokenizer, which has {list(self._specials)}")
        always = self._kind.found if self._kind else ()
        is_allowed = [allowed == "all" or text in allowed or text in always for text in self._specials]
        is_disallowed = [
            not ok if disallowed == "all" else text in disallowed
            for text, ok in zip(self._specials, is_allowed, strict=True)
        ]
        return _text.Policy(is_allowed, is_disallowed)


def _listed(texts: Iterable[str | bytes]) -> list[str | bytes]:
    if isinstance(texts, str | bytes):  # whose characters are texts too
        raise ValueError(f"expected a list of texts, got one text: {type(texts).__name__}")
    return list(texts)


def _frozen(specials: Specials) -> Literal["all"] | frozenset[str]:
    if specials == "all":
        return "all"
    if isinstance(specials, str):
        raise ValueError(f'expected "all" or a set of special tokens, got the str {specials!r}')
    return frozenset(specials)
