"""From one format of tokenizers to another, with the same ids for every text, or an error that says why not.

A tokenizer.json holds everything; GPT-2's two files and tiktoken's ranks hold neither the pattern nor which tokens are
special, so reading them needs both from the user: nothing is guessed.
"""

import base64
import itertools
import json
import os
from pathlib import Path
from typing import Any, Literal

from cs336.tokenizer.formats import reading, spell, unspell
from cs336.tokenizer.tokenizer import Tokenizer
from cs336.utils.files import replacing

Format = Literal["json", "tiktoken", "gpt2"]


def load(
    path: str | os.PathLike, pattern: str | None = None, special_tokens: dict[str, int] | None = None
) -> Tokenizer:
    """Read a tokenizer.json (ours or Hugging Face's), a file of tiktoken's ranks, or a directory with GPT-2's
    vocab.json and merges.txt.

    Args:
        pattern, special_tokens: for the last two, which do not hold them; a tokenizer.json has its own.

    Raises ValueError for a file of another kind, for one that does what a Tokenizer does not (it says what), and if a
    pattern is missing or not wanted.
    """
    path = Path(path)
    if path.is_dir() or not _is_json(path):
        if pattern is None:
            raise ValueError(f"{path} does not say how text is split first: give its pattern")
        if path.is_dir():
            # Special tokens are spelled as they are in vocab.json: their ids are there.
            return Tokenizer.from_gpt2(path / "vocab.json", path / "merges.txt", special_tokens or (), pattern)
        return Tokenizer.from_tiktoken(path, pattern, special_tokens)
    if pattern is not None or special_tokens is not None:
        raise ValueError(f"{path} has a pattern and special tokens of its own: give none")
    document = json.loads(path.read_text(encoding="utf-8"))
    if "cs336" in document.get("model", {}):
        return Tokenizer.load(path)
    with reading(path):
        return _from_huggingface(document)


def save(tokenizer: Tokenizer, path: str | os.PathLike, to: Format) -> list[str]:
    """Write a tokenizer.json, tiktoken's ranks, or a directory with vocab.json and merges.txt; whole or not at all.

    Returns what the format does not hold and its readers must be told. Raises ValueError where the format would give
    other ids.
    """
    path = Path(path)
    if to == "json":
        tokenizer.save(path)
        return []
    ids = {token: i for i, token in tokenizer.vocab.items() if i not in tokenizer.special_tokens.values()}
    merges = tokenizer.merges
    _check_merges_are_ranks(ids, merges)
    told = [f"the pattern {tokenizer.pattern}"]
    if to == "tiktoken":
        with replacing(path, "wb") as file:
            for token, i in sorted(ids.items(), key=lambda item: item[1]):
                file.write(base64.b64encode(token) + b" %d\n" % i)
    else:
        spelled = {spell(token): i for token, i in ids.items()}
        if taken := spelled.keys() & tokenizer.special_tokens.keys():
            raise ValueError(f"vocab.json cannot hold both the special token {taken.pop()!r} and a token spelled so")
        vocab = dict(sorted((spelled | tokenizer.special_tokens).items(), key=lambda item: item[1]))
        path.mkdir(parents=True, exist_ok=True)
        with replacing(path / "vocab.json") as file:
            json.dump(vocab, file, ensure_ascii=False)
        with replacing(path / "merges.txt") as file:
            file.write("#version: 0.2\n" + "".join(f"{spell(left)} {spell(right)}\n" for left, right in merges))
    return told + [f"the special token {text} = {i}" for text, i in tokenizer.special_tokens.items()]


def _check_merges_are_ranks(ids: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> None:
    """That merging by a list, and merging any two tokens that together are a token, lowest id first, are the same.

    They are if each token longer than a byte is made by one merge, of tokens made before, and ids follow that order:
    what a stretch of text merges to, while no token crosses its ends, then depends on its bytes alone, so two tokens
    that together are a third meet only as the two of its merge.
    """
    made = [left + right for left, right in merges]
    multiple = {token for token in ids if len(token) > 1}
    if missing := multiple.difference(made):
        raise ValueError(
            f"no merge makes the token {min(missing, key=ids.__getitem__)!r}, and {len(missing) - 1} others: the "
            "format would lose them, or find them where they were not"
        )
    if len(made) != len(multiple):
        raise ValueError("a token is made by several merges: ranks would not say which comes first")
    order = [ids[token] for token in made]
    parts_first = all(max(ids[left], ids[right]) < ids[left + right] for left, right in merges if len(left + right) > 2)
    if order != sorted(order) or not parts_first:
        raise ValueError("the ids do not follow the order of the merges: as ranks they would merge in another order")


def _is_json(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"{")


# ---- Hugging Face ----


def _from_huggingface(document: dict[str, Any]) -> Tokenizer:
    model = document["model"]
    _require("the model", model.get("type", "BPE"), "BPE")
    _require("normalizer", document.get("normalizer"), None)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        _require(f"model.{key}", model.get(key) or None, None)
    _require("model.byte_fallback", model.get("byte_fallback", False), False)
    special_tokens = {}
    for token in document.get("added_tokens", []):
        for flag in ("single_word", "lstrip", "rstrip"):
            _require(f"{flag} of the added token {token['content']!r}", token.get(flag, False), False)
        special_tokens[token["content"]] = token["id"]
    vocab = {i: unspell(token) for token, i in model["vocab"].items() if special_tokens.get(token) != i}
    if len(vocab) + sum(special_tokens.get(token) == i for token, i in model["vocab"].items()) < len(model["vocab"]):
        raise ValueError("an id is given to two tokens")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    listed = [(unspell(left), unspell(right)) for left, right in pairs]
    if model.get("ignore_merges", False):
        _check_every_split_is_listed(vocab, listed)
    merges = None if model.get("ignore_merges", False) else listed
    return Tokenizer(vocab, merges, special_tokens, _pattern(document.get("pre_tokenizer")))


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The pattern of a ByteLevel pre-tokenizer, or of a Split and one after the other."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *splits, last = steps
    _require("the last pre-tokenizer", (last or {}).get("type"), "ByteLevel")
    _require("pre_tokenizer.add_prefix_space", last.get("add_prefix_space", True), False)
    if not splits:
        _require("pre_tokenizer.use_regex", last.get("use_regex", True), True)
        return "gpt2"
    _require("pre_tokenizer.use_regex after a Split", last.get("use_regex", True), False)
    if len(splits) > 1:
        raise ValueError(f"it splits text {len(splits)} times, one after the other, which a Tokenizer does not")
    (split,) = splits
    _require("the first pre-tokenizer", split["type"], "Split")
    _require("its behavior", split["behavior"], "Isolated")
    _require("its invert", split.get("invert", False), False)
    return split["pattern"]["Regex"]


def _check_every_split_is_listed(vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]]) -> None:
    """With ignore_merges a piece that is a token is that token; ranks do so too, and merge whatever is a token."""
    known, listed = set(vocab.values()), set(merges)
    ids = {token: i for i, token in vocab.items()}
    for token in known:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in known and pair[1] in known and pair not in listed:
                raise ValueError(
                    f"it ignores merges and does not list that of {pair[0]!r} and {pair[1]!r}, as ranks do"
                )
    made = [ids[left + right] for left, right in merges]
    if any(later < earlier for earlier, later in itertools.pairwise(made)):
        raise ValueError("it ignores merges, and lists them in another order than their ids")


def _require(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise ValueError(f"{what} is {json.dumps(found)}, and a Tokenizer has only {json.dumps(wanted)}")
