"""Small tokenizers of SentencePiece's kind, as files of others have them, and texts that are hard for them."""

import itertools
import random
import struct

from cs336.tokenizer import Tokenizer

MARK = "\u2581"
PREPEND = {"type": "Prepend", "prepend": MARK}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
UNREPLACE = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def metaspace(scheme, split):
    return {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": split}


# name -> normalizer, pre_tokenizer, whether the decoder strips a space
LAYOUTS = {
    "llama": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None, True),
    "gemma": (REPLACE, SPLIT, False),
    "first": (None, metaspace("first", False), True),
    "always": (None, metaspace("always", False), True),
    "never": (None, metaspace("never", False), False),
    "words": (None, metaspace("always", True), True),
    "first_words": (None, metaspace("first", True), True),
}
SAID = "the other one said that there is nothing to see in here, and then (the second): 'other things are there.' "
PAIRS = [(MARK, MARK), (MARK * 2, MARK), (MARK * 2, MARK * 2), ("中", "文"), ("日", "中"), (".", ".")]


def merges():
    """Of words, which begin with a space or not, of runs of spaces, and of other scripts."""
    trained = Tokenizer.train([SAID * 3], 256 + 40).merges
    return [tuple(half.decode().replace(" ", MARK) for half in pair) for pair in trained] + PAIRS


def vocabulary():
    """Control tokens, bytes, what merges make, characters: most of ASCII, some others."""
    made = [left + right for left, right in merges()]
    chars = [MARK, *(chr(c) for c in range(33, 127)), *"\u00e9\u0416\u4e2d\u6587\u65e5\u200d\U0001f600"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *made, *chars]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def added(text, i, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": i, "content": text, **plain, **flags}


def document(layout="llama", fallback=True, fuse=True, extra=True, **changed):
    """A tokenizer.json; `changed` are options of its model."""
    normalizer, pre_tokenizer, strips = LAYOUTS[layout]
    ids = vocabulary()
    tokens = [added(text, i) for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    if extra:
        n = len(ids)
        tokens += [added("<|user|>", n, rstrip=True), added("<mask>", n + 1, lstrip=True)]
        tokens += [added("<|both|>", n + 2, lstrip=True, rstrip=True), added("<tool>", n + 3, special=False)]
    decoders = [UNREPLACE, *([{"type": "ByteFallback"}] if fallback else []), {"type": "Fuse"}]
    options = {"unk_token": "<unk>", "byte_fallback": fallback, "fuse_unk": fuse, "ignore_merges": False}
    options |= {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders + [STRIP] * strips},
        "model": {"type": "BPE", **options, "vocab": ids, "merges": [list(pair) for pair in merges()]} | changed,
    }


def hard_texts(count, specials=(), seed=0):
    rng = random.Random(seed)
    parts = [" ", "  ", "    ", MARK, MARK * 2, "\n", "\n\n", "\t", "\u00a0", "\u2003", "\u3000", "\u0085", "\x00"]
    parts += ["the", "other", "there is", "x1", "42", "\u00e9", "e\u0301", "\u4e2d\u6587", "\u65e5", "\uc548", "..."]
    parts += ["\U0001f600", "\U0001f468\u200d\U0001f469", "<0x41>", "<s", "'s", "(the", "\ufffd", *specials]
    fixed = ["", " ", "   ", MARK, "\n", "a", "the" * 200, " " * 99, "\uc548" * 90, "\u65e5\u4e2d\u6587" * 70]
    return fixed + ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 14))) for _ in range(count)]


# ---- tokenizer.model ----


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(*fields):
    """Protocol Buffers: (number, value) of whole numbers, bytes and floats."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            out += varint(number << 3) + varint(value)
    return out


def pieces():
    """(text, score, kind) of each token: as in Llama's, runs of spaces have one score, the lowest."""
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    return [
        (
            text,
            -1e9 if set(text) == {MARK} and len(text) > 1 else 0.0 if text in kinds else -float(i),
            kinds.get(text, 1),
        )
        for text, i in vocabulary().items()
    ]


def model_file(given=None, trainer=((3, 2),), normalizer=((3, 1), (4, 0))):
    tokens = [message((1, text.encode()), (2, score), (3, kind)) for text, score, kind in given or pieces()]
    return message(*((1, token) for token in tokens), (2, message(*trainer)), (3, message(*normalizer)))


def by_scores(given, text):
    """What SentencePiece makes of a text: the two neighbours of the highest score, the leftmost of equals, merge."""
    scores = {piece: score for piece, score, kind in given if kind == 1}
    ids = {piece: i for i, (piece, _, _) in enumerate(given)}
    parts = list((MARK + text.replace(" ", MARK)) if text else "")
    while True:
        found = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out
