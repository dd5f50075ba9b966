"""A tokenizer.json that Hugging Face's tokenizers wrote: what it says in our terms, or why its ids would not be ours.

Its text goes through added tokens, normalizer, pre-tokenizer and model. Ours goes through special tokens, one pattern
and byte-level BPE; so a pre-tokenizer must come to one pattern, then ByteLevel, and a normalizer to nothing. Those of
SentencePiece's kind are read by sentencepiece_json.py.
"""

import json
import os
from typing import Any

import regex

from cs336.tokenizer import dialect
from cs336.tokenizer.added_tokens import read_added_tokens
from cs336.tokenizer.formats import Parts, field, listed_merges, load_json, reading, shortened, vocab_of
from cs336.tokenizer.patterns import PATTERNS, canonical, of_sequence
from cs336.tokenizer.sentencepiece_json import is_of_characters, parts_of_characters


def read_huggingface(path: str | os.PathLike, without_normalizer: bool) -> tuple[Parts, bool]:
    """The parts of any tokenizer.json of BPE, and whether a piece that is a token is that token.

    Raises ValueError for all that would make ids differ.
    """
    document = load_json(path)
    with reading(path):
        if is_of_characters(document):
            return parts_of_characters(document, without_normalizer), bool(document["model"].get("ignore_merges"))
        model = field(document, "model", dict)
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"its model is {shortened(model['type'])}, expected 'BPE'")
        for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(option):
                raise ValueError(f"its model has {option} = {shortened(model[option])}, which byte-level BPE has not")
        normalizer = document.get("normalizer")
        if not (without_normalizer or _does_nothing(normalizer)):
            raise ValueError(
                f"it changes text before it encodes it, by the normalizer {shortened(normalizer)}, and this tokenizer "
                "never does: do that yourself and pass without_normalizer=True"
            )
        ids = field(model, "vocab", dict, "model")
        specials = read_added_tokens(document, ids)
        pattern = _pattern_of(document.get("pre_tokenizer"))
        vocab = vocab_of(ids, specials)
        return Parts(vocab, listed_merges(model), specials, pattern), bool(model.get("ignore_merges"))


def _does_nothing(normalizer: Any) -> bool:
    if normalizer is None:
        return True
    is_sequence = isinstance(normalizer, dict) and normalizer.get("type") == "Sequence"
    return is_sequence and all(map(_does_nothing, field(normalizer, "normalizers", list, "normalizer")))


def _pattern_of(pre_tokenizer: Any) -> str:
    steps = _steps(pre_tokenizer)
    if not steps:
        raise ValueError(
            f"its pre_tokenizer is {shortened(pre_tokenizer)}: without ByteLevel its tokens are of characters, and "
            "those of this tokenizer are of bytes"
        )
    *splits, last = steps
    if last["type"] != "ByteLevel":
        raise ValueError(f"its pre_tokenizer ends with {shortened(last)}, expected ByteLevel")
    if last.get("add_prefix_space", True):
        raise ValueError("its pre_tokenizer has ByteLevel with add_prefix_space, which puts a space before each text")
    expressions = [_expression_of(step) for step in splits]
    if last.get("use_regex", True):
        expressions.append(PATTERNS["gpt2"])
    if not expressions:
        return r"[\s\S]+"  # the text is one piece
    pattern = of_sequence(tuple(expressions))
    if pattern is None:
        raise ValueError(
            f"its pre_tokenizer splits by one expression after the other, {shortened(expressions)}: this tokenizer "
            "splits by one, and knows no one that these come to"
        )
    return pattern


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """Of Sequences in Sequences, in a row."""
    if pre_tokenizer is None:
        return []
    if field(pre_tokenizer, "type", str, "pre_tokenizer") != "Sequence":
        return [pre_tokenizer]
    return [step for part in field(pre_tokenizer, "pretokenizers", list, "pre_tokenizer") for step in _steps(part)]


def _expression_of(step: dict[str, Any]) -> str:
    """The expression that a step splits by."""
    if step["type"] == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    if step["type"] != "Split":
        raise ValueError(f"its pre_tokenizer has {shortened(step)} before ByteLevel, expected Split or Digits")
    given = field(step, "pattern", dict, "pre_tokenizer")
    if "String" in given:
        expression = "".join(map(dialect.literal, field(given, "String", str, "pattern")))
    else:
        # The line ends as they are, or written out: the same.
        expression = field(given, "Regex", str, "pattern").replace("\r", r"\r").replace("\n", r"\n")
    dialect.translate(expression)  # though tiktoken's reading of it may have a name
    if regex.fullmatch(r"[\w-]+", expression):
        expression = f"(?:{expression})"  # a word alone would be a name
    kept = (step.get("behavior"), bool(step.get("invert")))
    # What is between matches is dropped in the second way: there is nothing between those of a pattern that has a name.
    if kept == ("Isolated", False) or (kept == ("Removed", True) and canonical(expression) in PATTERNS):
        return expression
    raise ValueError(f"its pre_tokenizer splits in another way: {json.dumps(step)[:200]}")
