"""What a model thinks is told apart from its answer, however it comes in pieces; grammars are of the answer."""

import json
import random

import pytest
from inference.test_tool_formats import SCHEMAS

from cs336.inference.answer import AnswerReader, read_answer
from cs336.inference.answer_events import joined, message_of
from cs336.inference.reasoning import REASONING, ReasoningParser, reasoning_of
from cs336.inference.tool_formats import FORMATS
from cs336.inference.tool_formats.harmony import HarmonyReader
from cs336.inference.tool_parser import ToolParser

ASIDE = "<|channel|>analysis<|message|>Hm.\n<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"i": 1}'
NOW = "<tool_call>\n<function=f>\n<parameter=i>\n1\n</parameter>\n</function>\n</tool_call>"
# kind, where the answer begins, the text, (content, reasoning, calls)
ANSWERS = {
    "thought": ("think", "before", "<think>\nHm. <thin\n\n</think>\n\n Yes.\n", ("Yes.\n", "Hm. <thin", [])),
    "begun in the prompt": ("think", "within", "Hm.\n</think>\nYes.", ("Yes.", "Hm.", [])),
    "begun in the prompt and written again": ("think", "within", " </think>", (None, None, [])),
    "not thought": ("think", "before", " \n<thin k> </think> ", (" \n<thin k> </think> ", None, [])),
    "no room": ("think", "behind", "<think>a</think>b", ("<think>a</think>b", None, [])),
    "no end": ("think", "before", "<think>Hm. </think", (None, "Hm. </think", [])),
    "nothing": ("think", "before", "", ("", None, [])),
    "a mark within": ("think", "before", "<think>a<think>b</think>c</think>d", ("c</think>d", "a<think>b", [])),
    "and calls": ("think", "before", f"<think>{NOW}</think>\nSo:\n{NOW}", ("So:", NOW, [("f", {"i": 1})])),
    "mistral": ("mistral", "before", "[THINK]Hm.[/THINK]Yes.", ("Yes.", "Hm.", [])),
    "granite": ("granite", "before", "<think>Hm.</think>\n<response>Yes.</response>", ("Yes.", "Hm.", [])),
    "cohere": (
        "cohere",
        "within",
        "Hm.<|END_THINKING|><|START_RESPONSE|>Yes <|START.<|END_RESPONSE|>",
        ("Yes <|START.", "Hm.", []),
    ),
    "gpt-oss": ("gpt_oss", "before", f"{ASIDE}<|channel|>final<|message|>Yes.", ("Yes.", "Hm.\n", [])),
    "gpt-oss, a call": ("gpt_oss", "before", ASIDE + CALL, (None, "Hm.\n", [("f", {"i": 1})])),
    "gpt-oss, all kinds": (
        "gpt_oss",
        "before",
        f"{ASIDE}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{ASIDE}{CALL}<|call|>",
        ("I look.", "Hm.\n\nHm.\n", [("f", {"i": 1})]),
    ),
    "gpt-oss, a call in the role": (
        "gpt_oss",
        "before",
        ' to=functions.f<|channel|>commentary json<|message|> {"i": 1} \n<|call|>',
        (None, None, [("f", {"i": 1})]),
    ),
    "gpt-oss, text alone": ("gpt_oss", "before", " <b> Yes.", (" <b> Yes.", None, [])),
    "gpt-oss, no arguments": (
        "gpt_oss",
        "before",
        "<|channel|>commentary to=functions.f<|message|>[1]<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        ("<|channel|>commentary to=functions.f<|message|>[1]\nYes.", None, []),
    ),
}


def reader_of(kind, place):
    if kind == "gpt_oss":
        return HarmonyReader(SCHEMAS)
    return AnswerReader(ReasoningParser(REASONING[kind], place), ToolParser(FORMATS["qwen3_coder"], SCHEMAS))


def read(kind, place, pieces, *, cut=False):
    reader = reader_of(kind, place)
    message = message_of([event for piece in pieces for event in reader.push(piece)] + reader.close(cut=cut))
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
    return message["content"], message.get("reasoning_content"), calls


@pytest.mark.parametrize("name", ANSWERS)
def test_every_way_to_cut_a_text_gives_the_same(name):
    kind, place, text, want = ANSWERS[name]
    want = ("", *want[1:]) if want == (None, None, []) else want  # an answer without anything is an empty one
    assert read(kind, place, [text]) == want
    assert read(kind, place, text) == want
    for at in range(len(text) + 1):
        assert read(kind, place, [text[:at], text[at:]]) == want, text[:at]


def test_any_text_is_read_alike_in_any_pieces():
    rng = random.Random(3)
    marks = {"<think>", "</think>", "<|channel|>", "<|message|>", "<|start|>assistant", "<|end|>", NOW, ASIDE, CALL}
    atoms = [*sorted(marks), "analysis", "final", " to=functions.f ", '{"i": 1}', "<", "\n", " ", "a"]
    thought = called = 0
    for _ in range(400):
        kind, place = rng.choice([("think", "before"), ("think", "within"), ("gpt_oss", "before")])
        text, cut = "".join(rng.choices(atoms, k=rng.randint(1, 9))), rng.random() < 0.3
        want, at = read(kind, place, [text]), rng.randint(0, len(text))
        assert read(kind, place, text) == read(kind, place, [text[:at], text[at:]]) == want, text
        thought, called = thought + bool(want[1]), called + bool(want[2])
        reader = reader_of(kind, place)
        pieces = [event for char in text for event in reader.push(char)] + reader.close(cut=cut)
        whole = reader_of(kind, place)
        assert [e[:3] for e in joined(pieces)] == [e[:3] for e in joined(whole.push(text) + whole.close(cut=cut))]
    assert min(thought, called) > 20


def test_thoughts_that_are_cut():
    reader = AnswerReader(ReasoningParser(REASONING["think"]))
    message, reason = read_answer("<think>Hm. ", "length", reader)
    assert (message, reason) == ({"role": "assistant", "content": None, "reasoning_content": "Hm."}, "length")
    text = ASIDE + CALL
    for at in range(len(text)):
        content, reasoning, _ = read_cut(text[:at])
        assert not content
        assert ASIDE.removeprefix("<|channel|>analysis<|message|>").startswith(reasoning or "")


def read_cut(text):
    message, _ = read_answer(text, "length", HarmonyReader(SCHEMAS))
    return message["content"], message.get("reasoning_content"), message.get("tool_calls")


def test_where_an_answer_begins():
    think = REASONING["think"]
    assert think.place("<|im_start|>assistant\n") == "before"
    assert think.place("<|im_start|>assistant\n<think>\n") == "within"
    assert think.place("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "behind"
    assert REASONING["gpt_oss"].place(ASIDE) == "before"


def test_formats_are_known_by_their_templates():
    assert reasoning_of("{{ messages }}") is None
    assert reasoning_of("content.split('</think>')[-1]") is REASONING["think"]
    assert reasoning_of("<think></think> tags and <response></response> tags") is REASONING["granite"]
    assert reasoning_of("[THINK]{{ thought }}[/THINK]") is REASONING["mistral"]
    assert reasoning_of("<|START_THINKING|>") is REASONING["cohere"]
    assert reasoning_of("<|channel|>analysis<|message|>") is REASONING["gpt_oss"]
