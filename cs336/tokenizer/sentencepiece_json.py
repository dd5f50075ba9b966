"""A tokenizer.json of SentencePiece's kind: what it says in our terms, or why its ids would not be ours; and back.

Hugging Face's tokenizers has one in several parts. A space before the text comes from a normalizer, Prepend, which
always puts one, or from the pre-tokenizer Metaspace, which puts one where there is none; spaces become marks by the
normalizer Replace or by Metaspace; a decoder of several steps undoes that, and Strip takes one space off the front.
"""

import json
import os
from typing import Any

from cs336.tokenizer.added_tokens import STRIPS, read_added_tokens
from cs336.tokenizer.formats import OF_CHARACTERS, Parts, field, shortened
from cs336.tokenizer.sentencepiece import MARK, SentencePiece, byte_token
from cs336.utils.files import replacing

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_PREPEND = {"type": "Prepend", "prepend": MARK}
_UNREPLACE = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}


def is_of_characters(document: Any) -> bool:
    """Whether it has spaces for marks, as byte-level tokenizers have not."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return False
    steps = _steps(document, "normalizer", "normalizers") + _steps(document, "pre_tokenizer", "pretokenizers")
    has_marks = any(step == _REPLACE or step.get("type") == "Metaspace" for step in steps)
    return document["model"].get("type", "BPE") == "BPE" and has_marks


def parts_of_characters(document: dict[str, Any], without_normalizer: bool = False) -> Parts:
    """Raises ValueError for all that would make ids, or the text of ids, differ.

    But a special token that a file of 2023 would look for behind a space alone, as "normalized" beside Prepend, is
    found beside any character: so does the tokenizer_config.json of such files have it, and so do all later ones.
    """
    model = field(document, "model", dict)
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"its model has {option} = {shortened(model[option])}, which this tokenizer has not")
    ids = field(model, "vocab", dict, "model")
    if bad := next((token for token, i in ids.items() if type(i) is not int), None):
        raise ValueError(f"ids must be integers: that of {bad!r} is {shortened(ids[bad])}")
    prefix, doubled, before_spaces, is_replaced = _spaces_of(document, without_normalizer)
    specials = read_added_tokens(document, ids, may_strip=True)
    added = document.get("added_tokens") or []
    for token in added:
        text = token["content"]
        strips = any(token.get(flag) for flag in STRIPS)
        is_plain = not (strips or MARK in text or " " in text)
        if is_replaced and token.get("normalized") and not (is_plain and (token.get("special") or prefix == "never")):
            raise ValueError(
                f"the added token {text!r} is looked for after spaces became {MARK!r}, and found beside them alone: "
                'give it "normalized": false'
            )
    byte_ids = _byte_ids(model, ids)
    unknown = None if byte_ids else _unknown(model, ids)
    vocab = {i: token.replace(MARK, " ").encode("utf-8", "surrogatepass") for token, i in ids.items()}
    if len(vocab) < len(ids):
        raise ValueError("its vocabulary gives an id to two tokens")
    merges = _merges(model, ids, vocab)
    vocab |= {i: bytes([byte]) for byte, i in enumerate(byte_ids)}
    kind = SentencePiece(
        byte_ids=byte_ids,
        unknown=unknown,
        fuses_unknown=unknown is not None and bool(model.get("fuse_unk")),
        prefix=prefix,
        doubled=doubled,
        before_spaces=before_spaces,
        strips=_decoder_strips(document, vocab, bool(byte_ids)),
        found=frozenset(token["content"] for token in added if not token.get("special")),
        left=frozenset(token["content"] for token in added if token.get("lstrip")),
        right=frozenset(token["content"] for token in added if token.get("rstrip")),
        begin=_begin(document, specials),
        tied=_tied(model),
    )
    return Parts(vocab, merges, specials, "", kind)


def _tied(model: dict[str, Any]) -> tuple[int, ...]:
    section = model.get("cs336")
    if not isinstance(section, dict):
        return ()
    sizes = field(section, "tied", list, "model.cs336")
    if not all(type(size) is int and 0 < size < 1 << 32 for size in sizes):
        raise ValueError(f"model.cs336.tied is {shortened(sizes)}, expected how many merges in a row are of one rank")
    return tuple(sizes)


def _steps(document: dict[str, Any], name: str, plural: str) -> list[dict[str, Any]]:
    """Of Sequences in Sequences, in a row."""

    def flat(step: Any) -> list[dict[str, Any]]:
        if step is None:
            return []
        if field(step, "type", str, name) != "Sequence":
            return [step]
        return [inner for part in field(step, plural, list, name) for inner in flat(part)]

    return flat(document.get(name))


def _spaces_of(document: dict[str, Any], without_normalizer: bool) -> tuple[Any, bool, bool, bool]:
    """prefix, doubled, before_spaces, and whether the normalizer makes the marks."""
    normalizers = _steps(document, "normalizer", "normalizers")
    ours = [step for step in normalizers if step in (_PREPEND, _REPLACE)]
    if len(ours) < len(normalizers) and not without_normalizer:
        other = next(step for step in normalizers if step not in ours)
        raise ValueError(
            f"it changes text before it encodes it, by the normalizer {shortened(other)}, and this tokenizer never "
            "does: do that yourself and pass without_normalizer=True"
        )
    steps = _steps(document, "pre_tokenizer", "pretokenizers")
    if _REPLACE in ours:
        # There is no space left to split at.
        kept = [s for s in steps if s.get("type") != "Split" or s.get("pattern") != {"String": " "} or s.get("invert")]
        if kept or ours.count(_PREPEND) > 1:
            raise ValueError(f"its pre_tokenizer has {shortened(kept or ours)} behind a normalizer that makes marks")
        return ("always" if _PREPEND in ours else "never"), True, False, True
    if len(steps) != 1 or ours:
        raise ValueError(f"its pre_tokenizer is {shortened(document.get('pre_tokenizer'))}, expected Metaspace alone")
    (step,) = steps
    if step.get("replacement", MARK) != MARK:
        raise ValueError(f"its Metaspace has {shortened(step['replacement'])} for a space, expected {MARK!r}")
    scheme = step.get("prepend_scheme", "always") if step.get("add_prefix_space", True) else "never"
    if scheme not in ("first", "always", "never"):
        raise ValueError(
            f'its Metaspace has the prepend_scheme {shortened(scheme)}, expected "first", "always", "never"'
        )
    return scheme, False, bool(step.get("split", True)), False


def _byte_ids(model: dict[str, Any], ids: dict[str, int]) -> tuple[int, ...]:
    if not model.get("byte_fallback"):
        return ()
    names = [byte_token(byte) for byte in range(256)]
    if lacking := [name for name in names if name not in ids]:
        raise ValueError(
            f"its model has byte_fallback, and its vocabulary lacks {lacking[0]} and {len(lacking) - 1} more"
        )
    return tuple(ids[name] for name in names)


def _unknown(model: dict[str, Any], ids: dict[str, int]) -> int:
    text = model.get("unk_token")
    if not isinstance(text, str) or text not in ids:
        raise ValueError(
            f"its model has no byte_fallback, and the unk_token {shortened(text)}: expected one of its vocabulary, "
            "since without it a character that is no token would be left out"
        )
    return ids[text]


def _merges(model: dict[str, Any], ids: dict[str, int], vocab: dict[int, bytes]) -> list[tuple[bytes, bytes]]:
    pairs = []
    for number, merge in enumerate(field(model, "merges", list, "model")):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"merge {number} is {shortened(merge)}, expected two tokens")
        left, right = (ids.get(token) for token in pair)
        if left is None or right is None:
            missing = pair[0] if left is None else pair[1]
            raise ValueError(f"merge {number}, of {pair[0]!r} and {pair[1]!r}, has {missing!r}, which is no token")
        pairs.append((vocab[left], vocab[right]))
    return pairs


def _decoder_strips(document: dict[str, Any], vocab: dict[int, bytes], has_bytes: bool) -> bool:
    """Whether a space comes off the front."""
    steps = _steps(document, "decoder", "decoders")
    kinds = [step.get("type") for step in steps]
    if [kind for kind in kinds if kind != "Fuse"] == ["ByteFallback"] * has_bytes + ["Metaspace"]:
        (step,) = (step for step in steps if step["type"] == "Metaspace")
        scheme = step.get("prepend_scheme", "always") if step.get("add_prefix_space", True) else "never"
        if scheme != "never" and any(token.startswith(b"  ") for token in vocab.values()):
            raise ValueError("its decoder, Metaspace, leaves out all spaces of a first token, and a token has several")
        return scheme != "never"
    rest = [step for step in steps if step.get("type") not in ("Fuse", "ByteFallback")]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds.count("ByteFallback") == has_bytes and rest in ([_UNREPLACE], [_UNREPLACE, strip]):
        if len(rest) == 1:
            return False
        if kinds[-2:] == ["Fuse", "Strip"]:
            return True
    raise ValueError(
        f"its decoder is {shortened(document.get('decoder'))}, expected Replace of {MARK!r} by a space, "
        f"{'ByteFallback, ' * has_bytes}Fuse, and Strip of one space or none; or Metaspace"
    )


def _begin(document: dict[str, Any], specials: dict[str, int]) -> tuple[int, ...]:
    """The ids that its post-processor puts before a text."""
    ids: list[int] = []
    for step in _steps(document, "post_processor", "processors"):
        if step.get("type") != "TemplateProcessing":
            continue
        tokens = field(step, "special_tokens", dict, "post_processor")
        for part in field(step, "single", list, "post_processor"):
            if not isinstance(part, dict) or "SpecialToken" not in part:
                break
            name = field(part["SpecialToken"], "id", str, "post_processor")
            ids += field(field(tokens, name, dict, "special_tokens"), "ids", list, name)
    if bad := [i for i in ids if i not in specials.values()]:
        raise ValueError(f"its post_processor puts {bad[0]!r} before a text, which is no id of an added token")
    return tuple(ids)


def write_json(path: str | os.PathLike, parts: Parts, fingerprint: str) -> None:
    """Write a tokenizer.json of format 2 (see cs336/tokenizer/formats.py), whole or not at all."""
    kind, specials, merges = parts.sentencepiece, parts.special_tokens, parts.merges
    assert kind is not None
    assert merges is not None
    hidden = {i for text, i in specials.items() if parts.vocab[i] == text.encode()}
    vocab = {text: i for i, text in kind.spelled(parts.vocab).items() if i not in hidden}
    for text, i in specials.items():
        vocab.setdefault(text, i)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": text in kind.left,
                "rstrip": text in kind.right,
                "normalized": False,
                "special": text not in kind.found,
            }
            for text, i in sorted(specials.items(), key=lambda item: item[1])
        ],
        **_written_spaces(kind),
        "post_processor": _written_begin(kind, specials),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _UNREPLACE,
                *([{"type": "ByteFallback"}] if kind.byte_ids else []),
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if kind.strips else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((text for text, i in vocab.items() if i == kind.unknown), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": kind.fuses_unknown,
            "byte_fallback": bool(kind.byte_ids),
            "ignore_merges": False,
            "cs336": {
                "format": OF_CHARACTERS,
                "tied": list(kind.tied),
                "fingerprint": fingerprint,
            },
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[token.decode().replace(" ", MARK) for token in merge] for merge in merges],
        },
    }
    with replacing(path) as file:
        json.dump(document, file, ensure_ascii=False, indent=1)


def _written_spaces(kind: SentencePiece) -> dict[str, Any]:
    if kind.doubled:
        steps = [_PREPEND, _REPLACE] if kind.prefix == "always" else [_REPLACE]
        return {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    metaspace = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": kind.prefix, "split": kind.before_spaces}
    return {"normalizer": None, "pre_tokenizer": metaspace}


def _written_begin(kind: SentencePiece, specials: dict[str, int]) -> dict[str, Any] | None:
    if not kind.begin:
        return None
    name_of = {i: text for text, i in specials.items()}
    names = [name_of[i] for i in kind.begin]

    def template(*sequences: str) -> list[dict[str, Any]]:
        first = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
        return first + [{"Sequence": {"id": name, "type_id": int(name == "B")}} for name in sequences]

    tokens = {name: {"id": name, "ids": [specials[name]], "tokens": [name]} for name in names}
    return {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"), "special_tokens": tokens}
