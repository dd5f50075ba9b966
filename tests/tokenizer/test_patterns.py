"""The hand-written scanners against the `regex` package, which reads what dialect.py makes of an expression."""

import importlib.util
import pathlib
import re

import pytest
import regex
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cs336 import _text
from cs336.tokenizer import PATTERNS, Tokenizer, patterns
from cs336.tokenizer.dialect import quoted, translate

TABLE = pathlib.Path(__file__).parents[2] / "csrc/cpu/text/unicode_table.h"


def classes_in_header():
    runs = [int(run, 16) for run in re.findall(r"\b0x([0-9a-f]+),", TABLE.read_text())]
    classes = []
    for run, following in zip(runs, [*runs[1:], 0x110000 << 8], strict=True):
        classes += [run & 255] * ((following >> 8) - (run >> 8))
    return classes


def load_generator():
    spec = importlib.util.spec_from_file_location("make_unicode_table", TABLE.with_name("make_unicode_table.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULE = load_generator()
OURS, UNASSIGNED = classes_in_header(), list(MODULE.CLASSES).index("unassigned") + 1
# The regex package knows more characters, or fewer.
AGREED = [a == b for a, b in zip(OURS, MODULE.classify(regex.findall), strict=True)]
EXPRESSIONS = {name: translate(expression) for name, expression in PATTERNS.items()}


def matches_of_tiktoken(expression, text):
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
    return list(encoding.decode(encoding.encode_ordinary(text)))  # which leaves out what does not match


@pytest.mark.parametrize("matches", [MODULE.matches_of_huggingface, matches_of_tiktoken])
def test_table_is_that_of_other_tokenizers(matches):
    """Where they differ, one of them holds the code point for unassigned: run make_unicode_table.py again."""
    assert len(OURS) == 0x110000
    differing = [i for i, (a, b) in enumerate(zip(OURS, MODULE.classify(matches), strict=True)) if a != b]
    assert not [hex(i) for i in differing if UNASSIGNED not in (OURS[i] & 15,)]
    assert len(differing) < 10_000


ASCII = [chr(i) for i in range(128)]
FEW = [
    *"aAzZ 's't're've'm'll'd'S'LL'Re\n\r\t09.,!?/'\"_-\\(",
    *"\u017f\u212a\u0131\u0130",  # long s, Kelvin sign, dotless i, dotted I
    *"\u00a0\u0085\u1680\u2003\u2028\u2029\u202f\u3000\u200b\u180e\ufeff\x1c\x1f\x0b\x0c",  # white space, and not
    *"\u01c5\u02b0\u00aa\u4e2d\u3042\u05d0\u0e01\u1f88",  # Lt, Lm, Lo
    *"\u0301\u0903\u20dd\u200d\ufe0f",  # M, joiner, selector
    *"\u00b2\u00bd\u2160\u0664\U0001d7d8\u3007",  # N
    *"\U0001f600\U0001f1e6\u20ac\u00ad\u0378\ue000\U0010ffff\x00",  # S, Cf, Cn, Co
    *"\u3040\u3097\u3099\u309b\u30fb\u30fc\u3005\u2e80\u4e00\u9fa5\u9fa6\U00020000\U00016ff0",  # beside kana and Han
]
CHARS = st.one_of(
    st.sampled_from(FEW),
    st.sampled_from(ASCII),
    st.characters(codec="utf-8").filter(lambda c: AGREED[ord(c)]),
)
TEXTS = st.one_of(st.text(CHARS, max_size=40), st.text(st.sampled_from(FEW[:40]), max_size=12))


def pieces(pattern, data):
    ends = _text.split(pattern, data)
    assert ends == sorted(set(ends))
    return [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def expected(pattern, data):
    found = regex.findall(EXPRESSIONS[pattern], data.decode("utf-8", "surrogateescape"))
    return [piece.encode("utf-8", "surrogateescape") for piece in found]


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
@example("it's IT'S it'\u017ft 'll'LL 're  x\n\n  y \r\n ")
@example("\u4e2d\u0301ABCdefGH'\u017f!\n/\n/ \u0301a \u0301A")
@example("   \n \n  ")
@example("a  1  \u0664  b\u4e2d\u30fb\u4e2d's \u2e80\u3007 1\u3007\u3040\u3097\x00\x01\x01a")
def test_equal_to_regex(pattern, text):
    assert pieces(pattern, text.encode()) == expected(pattern, text.encode())


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.one_of(TEXTS.map(str.encode), st.binary(max_size=4)), max_size=6))
@example([b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xe4\xb8", b"a", b"\xe4\xb8\xad", b"\xf0\x9f\x98"])
def test_broken_utf8_is_one_character_a_byte(pattern, parts):
    data = b"".join(parts)
    assert pieces(pattern, data) == expected(pattern, data)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_both_ends_of_every_run_of_code_points(pattern):
    edges = [i for i in range(1, 0x110000) if OURS[i] != OURS[i - 1]]
    points = sorted({*range(0x300), *edges, *(i - 1 for i in edges), 0x10FFFF} - {*range(0xD800, 0xE000)})
    for c in (chr(i) for i in points if AGREED[i]):
        data = f"{c}a {c}1{c}{c}Z{c} ".encode()
        assert pieces(pattern, data) == expected(pattern, data), ascii(c)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_no_piece_goes_across_a_stable_prefix(pattern, text):
    data = text.encode()
    whole = pieces(pattern, data)
    for seen in range(len(data) + 1):
        stable = _text.stable_prefix(pattern, data[:seen])
        assert stable <= seen
        assert pieces(pattern, data[:stable]) + pieces(pattern, data[stable:]) == whole, (seen, stable)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_stable_prefix_is_found(pattern):
    for text in (
        "a b c",
        "aa\nb",
        "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u518d\u89c1" * 5,
        "12,34,56789",
        "x=1;" * 2000,
    ):
        assert _text.stable_prefix(pattern, text) > len(text.encode()) // 4
    for text in ("", "a", " " * 10_000, "a" * 10_000):
        assert _text.stable_prefix(pattern, text) == 0


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=100, deadline=None)
@given(head=TEXTS, tail=TEXTS)
def test_expression_as_function_gives_the_same(pattern, head, tail):
    data = (head + tail).encode()
    split = patterns.for_core(f"(?:{PATTERNS[pattern]})")
    assert split(data) == _text.split(pattern, data)


def test_what_an_expression_leaves_out_is_a_piece():
    split = patterns.for_core(r"\d+")
    assert split("ab12é3".encode()) == [2, 4, 6, 7]
    assert split(b"") == []
    assert split(b"\xff1\xff") == [1, 2, 3]


@pytest.mark.parametrize("spelling", [*PATTERNS.values(), *patterns._OTHER_SPELLINGS])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_spellings_are_of_one_pattern(spelling, text):
    name = patterns.canonical(spelling)
    expression = spelling if spelling in patterns._OTHER_SPELLINGS else translate(spelling)
    assert regex.findall(expression, text) == regex.findall(EXPRESSIONS[name], text)


@pytest.mark.parametrize("bad", ["(", "[z-a]", "gpt3(", "\ud800|a", "(" * 100_000])
def test_bad_pattern(bad):
    with pytest.raises(ValueError, match="neither one of gpt2"):
        patterns.canonical(bad)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("cl100k_base", "cl100k"), ("o200k_base", "o200k"), ("r50k_base", "gpt2")]
)
def test_names_of_tiktoken(theirs, ours):
    assert patterns.canonical(theirs) == ours


# ---- expressions that engines read in different ways: what the regex package makes of them ----

OF_REGEX_ALONE = [
    r"\w+|[^\w\s]+|\s+",
    r"\b\w+\b|\W",
    r"(?i)[a-m]+|[\s\S]",
    r"^\s*\S+|\S+$|[\s\S]",
    r"(?P<word>\S)(?P=word)*|\s+",
    r"\X",
    r"(?=[A-Z])",  # cuts, and matches nothing
]


@pytest.mark.parametrize("expression", OF_REGEX_ALONE)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_any_other_expression_is_that_of_regex(expression, text):
    cuts = {0, len(text)}
    for match in regex.finditer(expression, text):
        cuts.update(match.span())
    ends = [len(text[:cut].encode()) for cut in sorted(cuts)][1:]
    assert patterns.for_core(patterns.canonical(expression))(text.encode()) == ends


@pytest.mark.parametrize("expression", OF_REGEX_ALONE)
def test_it_trains_encodes_and_comes_back(expression, tmp_path):
    texts = ["The cat sat, the cat ran; THE END_1 aaa", " caf\u00e9 \u4e2d\u6587 A1B2\n", ""]
    tokenizer = Tokenizer.train(texts * 3, 262, ["<|e|>"], pattern=expression)
    assert tokenizer == Tokenizer.train(iter(texts * 3), 262, ["<|e|>"], pattern=expression, num_threads=3)
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.pattern == expression
    for text in texts:
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert list(loaded.encode_iterable(text)) == ids == tokenizer.encode_batch([text], num_threads=2)[0]


def test_it_is_not_handed_to_those_who_read_it_in_another_way(tmp_path):
    tokenizer = Tokenizer.train(["the cat"], 258, pattern=r"\w+|\W+")
    tokenizer.save(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"t\.json"):
        Tokenizer.from_huggingface(tmp_path / "t.json")
    for write in (tokenizer.to_tiktoken, lambda path: tokenizer.to_gpt2(path, tmp_path / "merges.txt")):
        with pytest.raises(ValueError, match=r"would give others other ids: .*has an escape, '\\w'"):
            write(tmp_path / "theirs")
    with pytest.raises(ValueError, match="read alike"):
        Tokenizer.from_tiktoken(ranks_file(tmp_path), r"\w+|\W+")
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(Exception, match=r"pre_tokenizer|PreTokenizer|variant|untagged"):
        tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("expression", "gap"),
    [
        (r"\p{N}+|\p{L}+|.", "\n"),
        (r"\p{L}+|\s", "\0"),
        (r"(?<!a)1|[^1]", "1"),  # behind an a alone
        ("[^\U0001f600]", "\U0001f600"),
        ("[^\U000e0123]", "\U000e0123"),
    ],
)
def test_gaps_that_tiktoken_would_leave_out_are_refused(expression, gap, tmp_path):
    tokenizer = Tokenizer.train(["a1"], 256, pattern=expression)
    assert tokenizer.decode(tokenizer.encode(f"a1 {gap}\n")) == f"a1 {gap}\n"
    with pytest.raises(ValueError, match=re.escape(f"{quoted(expression)} does not match {gap!r} everywhere")):
        tokenizer.to_tiktoken(tmp_path / "ranks")
    assert not (tmp_path / "ranks").exists()
    whole = Tokenizer.train(["a1"], 256, pattern=rf"{expression}|[\s\S]")
    whole.to_tiktoken(tmp_path / "ranks")


def test_errors_show_an_expression_as_it_was_typed():
    with pytest.raises(ValueError, match=re.escape(r"pattern '(\w+' is neither") + ".* at position 4"):
        Tokenizer.train(["a"], 257, pattern=r"(\w+")


def ranks_file(directory):
    Tokenizer({i: bytes([i]) for i in range(256)}, None).to_tiktoken(directory / "r.tiktoken")
    return directory / "r.tiktoken"
