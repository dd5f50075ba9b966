import os
from typing import Any

from cs336.models.gguf.reader import GGUF
from cs336.tokenizer import Tokenizer
from cs336.tokenizer.formats import unspell, vocab_of
from cs336.tokenizer.sentencepiece_model import Piece, parts_of_pieces

# their name of a pre-tokenizer -> our pattern
PATTERNS = {"gpt-2": "gpt2", "smollm": "gpt2_digits", "starcoder": "gpt2_digits", "llama-bpe": "llama3"}
PATTERNS |= {"qwen2": "qwen2", "gpt-4o": "o200k", "tekken": "tekken"}
PATTERNS |= dict.fromkeys(("dbrx", "glm4", "chatglm-bpe"), "llama3")  # of Phi-4 and GLM-4
CONTROL, USER_DEFINED = 3, 4  # types of tokens that are special


def tokenizer_from_gguf(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file: byte-level BPE, or SentencePiece's; its control tokens special.

    Raises FileNotFoundError where there is no file, ValueError, naming the key, for a damaged one and for a tokenizer
    of another kind.
    """
    file = GGUF(path)
    kind, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    if kind == "llama":
        return _of_sentencepiece(file)
    if kind != "gpt2":
        raise ValueError(f"{path} has tokenizer.ggml.model {kind!r}: known are 'gpt2', byte-level BPE, and 'llama'")
    if pre not in PATTERNS:
        raise ValueError(f"{path} has tokenizer.ggml.pre {pre!r}: known are {', '.join(PATTERNS)}")
    if file.get("tokenizer.ggml.add_space_prefix", bool, False):
        raise ValueError(f"{path} has tokenizer.ggml.add_space_prefix, which no byte-level tokenizer does")
    tokens, merges = (_texts(file, f"tokenizer.ggml.{name}") for name in ("tokens", "merges"))
    kinds = _of_each(file, "token_type", tokens)
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{path} has a token of tokenizer.ggml.tokens twice")
    specials = {text: i for i, text in enumerate(tokens) if kinds[i] in (CONTROL, USER_DEFINED)}
    pairs = [merge.split(" ") for merge in merges]
    if bad := next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None):
        raise ValueError(f"{path} has the merge {bad!r}: expected two tokens with a space between")
    try:
        left, right = unspell([a for a, _ in pairs]), unspell([b for _, b in pairs])
        vocab = vocab_of({text: i for i, text in enumerate(tokens)}, specials)
        return Tokenizer(vocab, list(zip(left, right, strict=True)), specials, PATTERNS[pre])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _of_sentencepiece(file: GGUF) -> Tokenizer:
    tokens = _texts(file, "tokenizer.ggml.tokens")
    scores, kinds = _of_each(file, "scores", tokens), _of_each(file, "token_type", tokens)
    begin = file.get("tokenizer.ggml.bos_token_id", int)
    if not file.get("tokenizer.ggml.add_bos_token", bool, True):
        begin = None
    try:
        pieces = [Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)]
        parts = parts_of_pieces(pieces, file.get("tokenizer.ggml.add_space_prefix", bool, True), begin)
        return Tokenizer(*parts[:4], sentencepiece=parts.sentencepiece)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None


def _of_each(file: GGUF, name: str, tokens: list[str]) -> list[Any]:
    """A number for each token."""
    values = file.get(f"tokenizer.ggml.{name}", list, [1] * len(tokens))
    if len(values) != len(tokens) or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{file.path} has {len(tokens)} tokenizer.ggml.tokens and {len(values)} numbers in {name}")
    return values


def _texts(file: GGUF, key: str) -> list[str]:
    texts = file.get(key, list)
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file.path} lacks {key}, a list of strings")
    return texts
