"""Any tokenizer.json of byte-level BPE: the ids of Hugging Face's tokenizers, or a sentence that says why not."""

import copy
import json
import random
import re

import pytest

from cs336.tokenizer import Tokenizer, convert
from cs336.tokenizer.formats import spell

tokenizers = pytest.importorskip("tokenizers")

BYTES = dict(zip(spell([bytes([i]) for i in range(256)]), range(256), strict=True))
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_LEVEL = LEVEL | {"use_regex": False}
CL100K_OF_OTHERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
TEXTS = [
    "the other",
    "a 12  345 the\n\n the",
    "he 1the2 's the's",
    "\u4e2d\u6587\u30fb the 7 ",
    "a, b,  c the",
    "x<|e|>the",
]


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps]}


def document(**changed):
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 259, "content": "<|e|>", **added}],
        "normalizer": None,
        "pre_tokenizer": LEVEL,
        "post_processor": None,
        "decoder": LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": BYTES | {"he": 256, "the": 257, "\u0120t": 258},
            "merges": ["h e", "t he", "\u0120 t"],
        },
    } | changed


def check(path, theirs=None):
    """Ours is theirs for all texts."""
    theirs = theirs or tokenizers.Tokenizer.from_file(str(path))
    ours = convert.load(path, allowed_special="all")
    rng = random.Random(0)
    made = ["".join(rng.choice("the 12,'s\n\u4e2d\u30fb<|e|>.") for _ in range(rng.randrange(30))) for _ in range(300)]
    for text in TEXTS + made:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    return ours


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, LEVEL)}, "gpt2_digits"),  # SmolLM2
        ({"pre_tokenizer": sequence(*[split({"Regex": e}) for e in DEEPSEEK], PLAIN_LEVEL)}, "deepseek"),
        ({"pre_tokenizer": sequence(split({"Regex": CL100K_OF_OTHERS}), PLAIN_LEVEL)}, "llama3"),
        ({"pre_tokenizer": sequence(split({"Regex": CL100K_OF_OTHERS}, "Removed", True), PLAIN_LEVEL)}, "llama3"),
        ({"pre_tokenizer": sequence(sequence(), sequence(LEVEL), sequence())}, "gpt2"),
        ({"pre_tokenizer": PLAIN_LEVEL}, r"[\s\S]+"),
        ({"pre_tokenizer": sequence(split({"String": ", "}), PLAIN_LEVEL)}, r"\,\ "),
        ({"pre_tokenizer": sequence(split({"String": "gpt2"}), PLAIN_LEVEL)}, "(?:gpt2)"),
        ({"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False}, PLAIN_LEVEL)}, r"\p{N}+"),
        ({"normalizer": {"type": "Sequence", "normalizers": []}}, "gpt2"),  # DeepSeek
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}}, "gpt2"),
    ],
)
def test_layouts(changed, pattern, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document(**changed)))
    ours = check(path)
    assert ours.pattern == pattern
    ours.save(tmp_path / "ours.json")
    assert convert.load(tmp_path / "ours.json") == ours
    check(tmp_path / "ours.json", tokenizers.Tokenizer.from_file(str(path)))
    check(tmp_path / "ours.json")


def test_an_added_token_that_is_ordinary(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document()))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.add_tokens(["the", "e"])
    theirs.save(str(path))
    ours = check(path, theirs)
    assert ours.encode("the other") == [257, 32, 111, 257, 114]
    assert ours.decode([257, 32, 111, 257, 114]) == "the other"
    assert ours.encode_ordinary("the he") == [257, 32, 256]
    assert ours.special_tokens == {"<|e|>": 259, "the": 257, "e": BYTES["e"]}
    ours.save(tmp_path / "ours.json")
    assert Tokenizer.load(tmp_path / "ours.json") == ours
    check(tmp_path / "ours.json", theirs)
    with pytest.raises(ValueError, match="cannot have id 258, that of the ordinary token"):
        Tokenizer(ours.vocab, ours.merges, {" t": 258})


def test_added_tokens_that_overlap(tmp_path):
    made = document()
    flags = made["added_tokens"][0]
    for late, early, reads in [("ab", "bc", False), ("abcd", "bc", False), ("bc", "ab", True), ("bc", "abcd", True)]:
        made["added_tokens"] = [
            flags | {"id": 259, "content": early},
            flags | {"id": 260, "content": late, "normalized": True},
        ]
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(made))
        if not reads:
            with pytest.raises(ValueError, match="which may overlap"):
                convert.load(path)
            continue
        ours, theirs = convert.load(path, allowed_special="all"), tokenizers.Tokenizer.from_file(str(path))
        for text in ("abc", "ababcbc", "aabbccabcd", "bcabcd"):
            assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize(("text", "message"), [("<|e|>", "would make it 259"), ("the", "and 257 in the vocabulary")])
def test_added_tokens_with_ids_that_are_not_kept(text, message, tmp_path):
    made = document()
    made["added_tokens"][0] |= {"content": text, "id": 300}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(made))
    assert tokenizers.Tokenizer.from_file(str(path)).token_to_id(text) != 300
    with pytest.raises(ValueError, match=message):
        convert.load(path)


def test_a_normalizer_is_the_callers(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document(normalizer={"type": "NFC"})))
    with pytest.raises(ValueError, match="without_normalizer=True"):
        convert.load(path)
    assert convert.load(path, without_normalizer=True).encode("the") == [257]


# What Python says of types, and a reader should not.
PYTHON = re.compile(
    r"NoneType|object (is|has|of)|unhashable|indices|argument|attribute|not iterable|unpack|'\w+' and '"
)


def mutated(rng, value):
    """A document with one value replaced, dropped or moved."""
    places = []

    def visit(node):
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            visit(node[key])

    visit(value)
    structural = [place for place in places if not (isinstance(place[0], dict) and len(place[0]) > 100)]
    node, key = rng.choice(structural if rng.random() < 0.8 else places)
    odd = [
        None,
        3,
        -1,
        1.5,
        True,
        "",
        "x",
        "\ud800",
        [],
        [[]],
        {},
        {"type": "BPE"},
        10**30,
        ["a", 1],
        sequence(),
        LEVEL,
    ]
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = copy.deepcopy(rng.choice([*odd, rng.choice(places)[0]]))
    return value


def refusal(path):
    try:
        convert.load(path)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("which", ["others", "ours"])
def test_mutated_documents(which, tmp_path):
    rng = random.Random(4)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document(pre_tokenizer=sequence(split({"Regex": CL100K_OF_OTHERS}), PLAIN_LEVEL))))
    if which == "ours":
        convert.load(path).save(path)
    good = json.loads(path.read_text())
    refused = 0
    for _ in range(1500):
        made = good
        for _ in range(rng.randrange(1, 3)):
            made = mutated(rng, copy.deepcopy(made))
        path.write_text(json.dumps(made))
        message = refusal(path)
        refused += message is not None
        assert message is None or (str(path) in message and not PYTHON.search(message)), message
    assert refused > 300
