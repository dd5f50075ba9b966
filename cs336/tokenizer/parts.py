"""The parts of a tokenizer, checked: its vocabulary, its merges, its special tokens and where they go."""

from collections.abc import Iterable

from cs336.tokenizer.dialect import quoted
from cs336.tokenizer.formats import spell
from cs336.tokenizer.patterns import left_out, portable
from cs336.tokenizer.sentencepiece import MARK, SentencePiece

MAX_ID = (1 << 24) - 1
MAX_SPECIAL = 1024


def checked_vocab(vocab: dict[int, bytes]) -> dict[int, bytes]:
    if not isinstance(vocab, dict):
        raise TypeError(f"vocab must be a dict of ids and tokens, got {type(vocab).__name__}")
    for i, token in vocab.items():
        if type(i) is not int or not 0 <= i <= MAX_ID:
            raise ValueError(f"ids must be integers from 0 to {MAX_ID}, got {i!r}")
        if not isinstance(token, bytes) or not token:
            raise ValueError(f"tokens must be bytes, at least one, got {token!r} for id {i}")
    return dict(vocab)


def checked_merges(merges: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    pairs: dict[tuple[bytes, bytes], None] = {}
    for merge in merges:
        if len(merge) != 2 or not all(isinstance(token, bytes) for token in merge):
            raise ValueError(f"a merge must be a pair of bytes, got {merge!r}")
        left, right = merge
        if (left, right) in pairs:
            raise ValueError(f"the merge {(left, right)!r} is listed twice")
        pairs[left, right] = None
    return list(pairs)


def check_others_read(what: str, pattern: str, kind: SentencePiece | None) -> None:
    """Raises ValueError if other programs could not read a text as this tokenizer does by what a file tells them."""
    if kind is not None:
        raise ValueError(f"{what} cannot tell how a tokenizer of SentencePiece's kind reads text: save it as json")
    try:
        portable(pattern)
    except ValueError as error:
        raise ValueError(f"{what} would give others other ids: {error}") from None


def check_tiktoken_reads(pattern: str, kind: SentencePiece | None) -> None:
    """As check_others_read, of ranks: raises ValueError too for a pattern that is seen not to match everything."""
    check_others_read("a file of ranks", pattern, kind)
    if gap := left_out(pattern):
        raise ValueError(
            f"tiktoken leaves out what its pattern does not match, which is a piece here, and {quoted(pattern)} does "
            f"not match {gap!r} everywhere: save it as json, or train it with one more alternative, |[\\s\\S]"
        )


def checked_specials(special_tokens: Iterable[str]) -> list[str]:
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens must be a list of str, got the str {special_tokens!r}")
    specials = list(special_tokens)
    for text in specials:
        if not isinstance(text, str) or not text:
            raise ValueError(f"a special token must be a str, not empty, got {text!r}")
        if len(text) > MAX_SPECIAL:  # looking for it would be slow in some texts
            raise ValueError(f"a special token may have {MAX_SPECIAL} characters, got {len(text)}: {text[:40]!r}...")
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"the special token {text!r} has a lone surrogate, which UTF-8 cannot hold")
    if len(set(specials)) < len(specials):
        raise ValueError(f"a special token is listed twice: {specials}")
    return specials


def place_specials(
    vocab: dict[int, bytes],
    special_tokens: Iterable[str] | dict[str, int] | None,
    merges: list[tuple[bytes, bytes]] | None,
) -> tuple[dict[str, int], set[int]]:
    """The ids of the special tokens, and which of them are ordinary tokens too; new ones are added to the vocabulary.

    merges: None for ranks.
    """
    specials = checked_specials(special_tokens or ())
    given = special_tokens if isinstance(special_tokens, dict) else {}
    for text, i in given.items():
        checked_vocab({i: text.encode()})
    wanted = {text.encode() for text in specials}
    ids_of: dict[bytes, list[int]] = {}
    for i, token in sorted(pair for pair in vocab.items() if pair[1] in wanted):
        ids_of.setdefault(token, []).append(i)
    made = {left + right for left, right in merges or ()} if ids_of else set()
    placed: dict[str, int] = {}
    shared = set()
    new = max([*vocab, *given.values()], default=-1) + 1
    for text in specials:
        token = text.encode()
        candidates = ids_of.get(token, [])
        # A byte, or the result of a merge, is an ordinary token: its first id is no candidate.
        is_ordinary = len(token) == 1 or token in made
        ordinary = candidates[0] if is_ordinary and candidates else None
        candidates = candidates[is_ordinary:]
        if text in given:
            i = given[text]
            if vocab.get(i, token) != token:
                raise ValueError(f"the special token {text!r} cannot have id {i}, which is {vocab[i]!r}")
            if i == ordinary:
                if spell([token]) != [text]:  # files would have two texts for one id
                    raise ValueError(f"the special token {text!r} cannot have id {i}, that of the ordinary token")
                shared.add(i)
        elif candidates:
            i = candidates[-1]
        else:
            i, new = new, new + 1
        vocab.update(checked_vocab({i: token}))
        placed[text] = i
    return placed, shared


def place_characters(
    kind: SentencePiece,
    vocab: dict[int, bytes],
    special_tokens: Iterable[str] | dict[str, int] | None,
    merges: list[tuple[bytes, bytes]],
) -> tuple[dict[str, int], set[int]]:
    """`place_specials` for SentencePiece's kind. A special token that merges come to is ordinary too, under its id."""
    for byte, i in enumerate(kind.byte_ids):
        if vocab.get(i) != bytes([byte]):
            raise ValueError(f"the id {i} of the byte {byte} is {vocab.get(i)!r} in the vocabulary")
    of_bytes = set(kind.byte_ids)
    known = {token: i for i, token in vocab.items() if i not in of_bytes}
    if b" " not in known:
        raise ValueError(f"the vocabulary lacks {MARK!r}, the space")
    made = {left + right for left, right in merges}
    placed: dict[str, int] = {}
    for text in checked_specials(special_tokens or ()):
        token = text.replace(MARK, " ").encode()
        new = max([*vocab, *placed.values()], default=-1) + 1
        i = special_tokens[text] if isinstance(special_tokens, dict) else known.get(token, new)
        if vocab.setdefault(i, token) != token:
            raise ValueError(f"the special token {text!r} cannot have id {i}, which is {vocab[i]!r}")
        checked_vocab({i: token})
        placed[text] = i
    if unknown := (kind.found | kind.left | kind.right) - placed.keys():
        raise ValueError(f"{sorted(unknown)} are not among the special tokens, {list(placed)}")
    return placed, {i for i in placed.values() if vocab[i] in made or len(vocab[i].decode()) == 1}


def every_split(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that together are one, in the order of that one."""
    known, sizes = set(tokens), {len(token) for token in tokens}
    cuts = {size: sorted(cut for cut in sizes if size - cut in sizes) for size in sizes}
    splits = ((token[:cut], token[cut:]) for token in tokens for cut in cuts[len(token)])
    return [(left, right) for left, right in splits if left in known and right in known]
