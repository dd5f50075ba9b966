"""Expressions mean to us what they mean to tiktoken and Hugging Face's tokenizers, or are refused by name."""

import random

import pytest
import tiktoken

from cs336 import _text
from cs336.tokenizer import PATTERNS, Tokenizer, patterns
from cs336.tokenizer.dialect import PROPERTIES, translate

tokenizers = pytest.importorskip("tokenizers")

BYTES = {i: bytes([i]) for i in range(256)}
RANKS = {token: i for i, token in BYTES.items()} | {b"he": 256}
# What the engines are told apart by: cases, folds, line ends, marks, and what sets are made of.
CHARS = (
    "aeshkSKfitz\u00df\u017f\u212a\u0131\u00e9\u4e2d\u3042\u0301 \n\r\t\u00a019\u0661\u00b2[]^&-|~$.,'\"\\/_\U0001f600"
)


def by_tiktoken(expression):
    return tiktoken.Encoding("x", pat_str=expression, mergeable_ranks=RANKS, special_tokens={}).encode_ordinary


def ends_by_huggingface(expression):
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")

    def ends(text):
        return [len(text[:end].encode()) for _, (_, end) in split.pre_tokenize_str(text)]

    return ends


def agrees(expression, texts):
    """Whether ours is theirs; with [\\s\\S] behind it, since tiktoken drops what an expression leaves out."""
    whole = rf"(?:{expression})|[\s\S]"
    split, ids_of = patterns.for_core(patterns.canonical(whole)), by_tiktoken(whole)
    ends_of = ends_by_huggingface(whole)
    tokenizer = Tokenizer(BYTES | {256: b"he"}, None, pattern=whole)
    for text in texts:
        assert split(text.encode()) == ends_of(text), (expression, text)
        assert tokenizer.encode_ordinary(text) == ids_of(text), (expression, text)


def random_texts(rng, count):
    return ["".join(rng.choice(CHARS) for _ in range(rng.randrange(1, 25))) for _ in range(count)]


def test_an_intersection():
    expression = r"[a-z&&[^aeiou]]+|[a-z]+|\s+"
    assert Tokenizer(BYTES | {256: b"he"}, [(b"h", b"e")], pattern=expression).encode("she he") == (
        [115, 104, 101, 32, 104, 101]
    )
    agrees(expression, random_texts(random.Random(0), 200))


@pytest.mark.parametrize(
    "expression",
    [
        r"[^a-z&&[^aeiou]]+",
        r"[a-z&&[^aeiou]&&[s-z]]",
        r"[[a-f][s-z]]+",
        r"[^[a-f]s]+",
        r"[a[^\s]&&[\S]]",
        r"[\p{L}\p{M}&&[^\p{Han}]]+|\p{Han}+",
        r"[\]\[\-&^|~]+",
        r"[-a]|[a-]|[a^]",
        r"(?i:'s|[sk]h|\.)|(?>\p{N}{1,3})|\p{Lu}?+\p{Ll}++",
        r"a(?=s|h)|(?<=s)e|(?<!s)h",
        r"\x61|\x{df}+|\u4e2d",
        r"(s|h){2,}?.|\d+|\D\S",
    ],
)
def test_read_alike(expression):
    agrees(expression, random_texts(random.Random(1), 150))


@pytest.mark.parametrize("name", sorted(PROPERTIES))
def test_properties(name):
    rng = random.Random(2)
    known = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000 and chr(i).isprintable()]  # of an older Unicode
    agrees(rf"\p{{{name}}}+|\P{{{name}}}+", ["".join(map(chr, rng.sample(known, 400))) for _ in range(10)])


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("a$", r"the end of a line or of the text, '\$' at 1"),
        ("^a", r"the start of a line or of the text, '\^' at 0"),
        (r"\p{N}{1,3}+", r"gives nothing back, '\{1,3\}\+'.*write \(\?>"),
        (r"a{2}?", "lazy count"),
        (r"a{,3}", "a brace that is no count"),
        (r"a**", "a repetition of a repetition"),
        (r"(?:a?)*", "can match nothing"),
        (r"a?", "it can match nothing at all"),
        (r"a|(?=b)", "it can match nothing at all"),
        (r"(?i)a", r"a group of another kind, '\(\?i\)'"),
        (r"(?i:daß)", "ASCII letters"),
        (r"(?i:fuss)", "also one in any case"),
        (r"(?i:[a-z])", "ASCII letters"),
        (r"(?i:a+)", "ASCII letters"),
        (r"(?P<x>a)", r"a group of another kind, '\(\?P<x>'"),
        (r"(a)\1", r"an escape, '\\1'"),
        (r"\w+", r"an escape, '\\w'.*a set of properties"),
        (r"\bthe\b", r"an escape, '\\b'"),
        (r"\h", r"an escape, '\\h'"),
        (r"\xe9", r"an escape"),
        (r"\pL", "a property"),
        (r"\p{Alphabetic}", r"a property, '\\p\{Alphabetic\}.*one of Arabic, Cc"),
        (r"[a--b]", "an operator of sets, '--'"),
        (r"[a~~b]", "an operator of sets, '~~'"),
        (r"[a||b]", r"an operator of sets, '\|\|'"),
        (r"[[:alpha:]]", r"an operator of sets, '\[:'"),
        (r"[]a]", "a set of nothing"),
        (r"[a&&]", "a set of nothing"),
        (r"[a-\s]", "a range that is none"),
        (r"[z-a]", "a range that is none"),
        (r"[a", "opens a set at 0"),
        (r"(a", "opens a bracket at 0"),
        (r"a)", "closes none"),
        (r"(?<=a+)b", "a look behind at texts of several sizes"),
    ],
)
def test_refused_by_name(expression, named):
    with pytest.raises(ValueError, match=named):
        translate(expression)
    with pytest.raises(ValueError, match=named):
        patterns.portable(expression)


def random_set(rng, depth=0):
    items = []
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(6 - (depth > 1))
        items.append(
            [
                lambda: rng.choice("aeshkz"),
                lambda: rng.choice(["a-m", "h-z", "0-9", "\u00df-\u017f"]),
                lambda: rng.choice([r"\s", r"\S", r"\d", r"\p{L}", r"\P{L}", r"\p{M}", r"\p{Han}"]),
                lambda: "\\" + rng.choice("[]^&-|~$.'"),
                lambda: rng.choice([r"\n", r"\r", r"\u4e2d", " "]),
                lambda: random_set(rng, depth + 1),
            ][kind]()
        )
    text = "".join(items)
    if rng.random() < 0.3:
        text += "&&" + random_set(rng, depth + 1) if rng.random() < 0.5 else "&&" + rng.choice(["a-s", r"\p{L}\s", "h"])
    return f"[{'^' * (rng.random() < 0.3)}{text}]"


def random_expression(rng, depth=0):
    def atom():
        kind = rng.randrange(7 - 2 * (depth > 1))
        if kind < 2:
            return random_set(rng)
        if kind == 2:
            return rng.choice([".", r"\s", r"\S", r"\p{Lu}", r"\p{N}"])
        if kind < 5:
            return rng.choice(["s", "h", "e", " ", r"\n", r"\.", "(?i:s|k|'S)", "(?i:[sk]h)"])
        inner = random_expression(rng, depth + 1)
        return rng.choice(["(?:{})", "(?>{})", "({})", "(?={})", "(?!{})"]).format(inner)

    def part():
        text = atom()
        quantifiers = ["", "", "", "+", "*", "?", "++", "*+", "?+", "+?", "{1,3}", "{2}", "{2,}?"]
        return text if text.startswith(("(?=", "(?!")) else text + rng.choice(quantifiers)

    return "|".join("".join(part() for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4)))


@pytest.mark.parametrize("seed", range(4))
def test_random_expressions(seed):
    """What is let through is read alike; a good part of what is tried is let through."""
    rng = random.Random(seed)
    read = 0
    for _ in range(150):
        expression = random_expression(rng)
        try:
            translate(rf"(?:{expression})|[\s\S]")
        except ValueError:
            continue
        read += 1
        agrees(expression, random_texts(rng, 12))
    assert read > 40


# ---- the patterns of models, as their own files have them ----

DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


@pytest.fixture(scope="module")
def documents(text):
    rng = random.Random(3)
    pieces = [text[i : i + 400] for i in range(0, len(text), 400)]
    chars = CHARS + "\u3040\u3097\u3099\u30fb\u3005\u2e80\u3007\u9fa6\U00020000\U00016ff0\u01c5\u02b0\x00\x01\u0378"
    return pieces + ["".join(rng.choice(chars) for _ in range(rng.randrange(1, 40))) for _ in range(3000)]


@pytest.mark.parametrize("name", PATTERNS)
def test_named_patterns_are_those_of_tiktoken_and_hugging_face(name, documents):
    tokenizer = Tokenizer(BYTES | {256: b"he"}, None, pattern=name)
    ids_of = by_tiktoken(PATTERNS[name])
    split = tokenizers.pre_tokenizers.Split
    steps = [split(tokenizers.Regex(e), "isolated") for e in (DEEPSEEK if name == "deepseek" else [PATTERNS[name]])]
    if name == "gpt2_digits":
        digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
        steps = [digits, split(tokenizers.Regex(PATTERNS["gpt2"]), "isolated")]
    theirs = tokenizers.pre_tokenizers.Sequence(steps)
    for document in documents:
        ends = [len(document[:end].encode()) for _, (_, end) in theirs.pre_tokenize_str(document)]
        assert _text.split(name, document) == ends, ascii(document)
        assert tokenizer.encode_ordinary(document) == ids_of(document), ascii(document)
