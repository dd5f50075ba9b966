"""What a model thinks is told apart from its answer, however it comes in pieces; grammars are of the answer."""

import asyncio
import functools
import json
import random
import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from inference.scripted import ASK, DIGIT, SPECIAL, THINKING, TOKENIZER, TOOLS, lark_of, saying, tool_llm, written
from inference.serving import ask, listening
from inference.test_tool_formats import SCHEMAS
from inference.test_tools import accepts

from cs336.inference import LLM, SamplingParams
from cs336.inference.answer import AnswerReader, read_answer
from cs336.inference.answer_events import joined, message_of
from cs336.inference.chat import ChatTemplate
from cs336.inference.grammar import Grammars
from cs336.inference.reasoning import REASONING, ReasoningParser, reasoning_of
from cs336.inference.tool_formats import FORMATS
from cs336.inference.tool_formats.harmony import HarmonyReader
from cs336.inference.tool_parser import ToolParser
from cs336.inference.tools import Tools

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
    "gpt-oss, a header without an end": (
        "gpt_oss",
        "before",
        f"<|channel|>{'x' * 1100}",
        (f"<|channel|>{'x' * 1100}", None, []),
    ),
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


@pytest.mark.parametrize("before", ["", " \n", "<|channel|>final<|message|>Yes.<|end|>"])
def test_a_header_without_end_is_text(before):
    text = "<|start|>" + 2000 * "x"
    content, _, _ = read("gpt_oss", "before", [before + text])
    assert content.endswith(text)
    assert read("gpt_oss", "before", before + text) == (content, None, [])


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


@functools.cache
def thinking_llm():
    llm = tool_llm()
    llm.chat_template = ChatTemplate(THINKING + "{{ tools | tojson if tools }}")
    return llm


def test_messages_of_a_model_that_thinks():
    llm, call = thinking_llm(), written("hermes", ("now", {}))
    llm._tool_parser = "hermes"
    with saying(llm, "<think>\nHm.\n</think>\n\nYes.", f"<think>{call}</think>{call}", "Yes."):
        (answer,) = llm.chat(ASK)
        (called,) = llm.chat(ASK, SamplingParams(max_tokens=300), tools=TOOLS)
        (plain,) = llm.chat(ASK)
    assert answer.text == "<think>\nHm.\n</think>\n\nYes."
    assert answer.message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert (called.message["reasoning_content"], called.finish_reason) == (call, "tool_calls")
    assert [c["function"]["name"] for c in called.message["tool_calls"]] == ["now"]
    assert plain.message == {"role": "assistant", "content": "Yes."}
    prompt = llm.chat_template.render([*ASK, answer.message], add_generation_prompt=False)
    assert prompt.endswith("assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n")
    with pytest.raises(ValueError, match=r"messages\.1\.reasoning_content must be a text, got 3"):
        llm.chat_template.render([*ASK, {"role": "assistant", "content": "", "reasoning_content": 3}])


def test_the_parser_that_is_named():
    llm = tool_llm()
    options = {"quiet": True, "page_size": 16, "max_seqs": 8, "max_step_tokens": 512}
    with pytest.raises(
        ValueError, match="reasoning_parser must be one of gpt_oss, think, granite, mistral, cohere, none"
    ):
        LLM(llm.model, TOKENIZER, reasoning_parser="qwen3", **options)
    for named, content in ((None, "<think>a</think>b"), ("think", "b"), ("none", "<think>a</think>b")):
        llm = LLM(llm.model, TOKENIZER, reasoning_parser=named, **options)
        with saying(llm, "<think>a</think>b"):
            assert llm.chat(ASK)[0].message["content"] == content


@pytest.mark.parametrize("specials", [SPECIAL, {}])
@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ({"json_schema": DIGIT}, '{"n": 3}', '{"n": 10}'),
        ({"regex": "/[ab]{3}"}, "/aba", "/ab"),
        ({"regex": r"a\/\\/b"}, "a/\\/b", "a/b"),
        ({"choice": ("yes", 'n"o')}, 'n"o', "no"),
    ],
)
def test_a_grammar_is_of_the_answer(kind, good, bad, specials):
    grammars = Grammars(TOKENIZER, len(TOKENIZER.vocab))
    think = REASONING["think"]
    optional = lark_of(Tools(None), None, specials, think, "before", **kind)
    must = lark_of(Tools(None), None, specials, think, "within", **kind)
    within = f"Hm <\n{{</think>\n\n{good}"
    for lark, text, want in (
        (optional, f"<think>{within}", True),
        (optional, good, True),
        (optional, bad, False),
        (optional, f"<think>a</think>{bad}", False),
        (optional, f"a</think>{good}", False),
        (must, within, True),
        (must, good, False),
        (must, f"a</think>{bad}", False),
    ):
        assert accepts(grammars, lark, text, special=bool(specials)) == want, (lark, text)
    assert lark_of(Tools(None), None, specials, think, "behind", **kind) is None
    assert lark_of(Tools(None), None, specials, think, "before") is None


def test_a_random_model_thinks_before_a_grammar():
    llm = thinking_llm()
    params = SamplingParams(json_schema=DIGIT, max_tokens=300, seed=2)
    number = r'\s*\{\s*"n"\s*:\s*\d\s*\}'
    (free,) = llm.chat(ASK, params)
    assert free.message["content"] is None or re.fullmatch(number, free.message["content"])
    (begun,) = llm.chat(ASK, params, chat_template_kwargs={"enable_thinking": True})
    assert begun.message["content"] is None or re.fullmatch(number, begun.message["content"])
    (without,) = llm.chat(ASK, params, chat_template_kwargs={"enable_thinking": False})
    assert without.prompt.endswith("</think>\n\n")
    assert re.fullmatch(number, without.text)


@pytest.mark.parametrize("kind", ["hermes", "qwen3_coder", "gpt_oss"])
def test_a_model_that_must_call_may_think_first(kind):
    grammars, tools = Grammars(TOKENIZER, len(TOKENIZER.vocab)), Tools(TOOLS, "required")
    reasoning = REASONING["gpt_oss" if kind == "gpt_oss" else "think"]
    call, thought = FORMATS[kind].write([("now", {})]), f"{reasoning.begin}Hm.{reasoning.end}"
    lark = lark_of(tools, kind, SPECIAL, reasoning, "before")
    for text, want in ((call, True), (thought + call, True), (thought, False), (f"{thought}Yes.", False)):
        assert accepts(grammars, lark, text) == want, text
    lark = lark_of(tools, kind, SPECIAL, reasoning, "within")
    assert accepts(grammars, lark, thought.removeprefix(reasoning.begin) + call)
    assert not accepts(grammars, lark, call)
    assert not accepts(grammars, lark_of(tools, kind, SPECIAL, reasoning, "behind"), thought + call)


def test_a_stream_of_thoughts():
    text = "<think>\nHm <b>.\n</think>\n\nYes."
    llm = thinking_llm()
    with listening(llm) as (_, port):

        def post(**body):
            status, found = asyncio.run(ask(port, {"messages": ASK} | body, path="/v1/chat/completions"))
            assert status == 200, found
            return found

        with saying(llm, text, text, text.removeprefix("<think>\n")):
            whole = json.loads(post()[0])["choices"][0]
            events = [json.loads(event)["choices"] for event in post(stream=True)[:-1]]
            begun = json.loads(post(chat_template_kwargs={"enable_thinking": True})[0])["choices"][0]
    want = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm <b>."}
    assert (whole["message"], begun["message"], whole["finish_reason"]) == (want, want, "stop")
    deltas = [choice["delta"] for choices in events for choice in choices]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm <b>."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert len([delta for delta in deltas if delta.get("reasoning_content")]) > 3  # as they come
