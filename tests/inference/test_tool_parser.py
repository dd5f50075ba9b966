"""Calls are found in what models write, however it comes in pieces; what is no call stays text."""

import json
import random

import pytest

from cs336.inference.answer import read_answer
from cs336.inference.tool_formats import FORMATS
from cs336.inference.tool_formats.harmony import HarmonyReader
from cs336.inference.tool_parser import ToolParser

NAMES = {"f": {}, "get-weather_2": {}}  # and the schemas of their arguments


def call(name, arguments, key="arguments", **dumped):
    return json.dumps({"name": name, key: arguments}, **dumped)


def parser_of(kind, **options):
    if kind == "gpt_oss":  # whose marks are never text, whether a call must come or not
        return HarmonyReader(NAMES, parallel=options.get("parallel", True))
    return ToolParser(FORMATS[kind], NAMES, **options)


def read(kind, pieces, *, cut=False, parallel=True):
    """(content, calls as (name, arguments), complete ones, events)."""
    parser = parser_of(kind, parallel=parallel)
    events = [event for piece in pieces for event in parser.push(piece)] + parser.close(cut=cut)
    calls, content = {}, ""
    for event in events:
        match event.kind:
            case "call":
                assert event.number not in calls
                calls[event.number] = [event.text, ""]
            case "arguments":
                calls[event.number][1] += event.text
            case "broken":
                del calls[event.number]
                content += event.text
            case "content":
                content += event.text
    return content, [tuple(found) for found in calls.values()], parser.complete


NESTED = {
    "q": 'a "b" } ] </tool_call> [TOOL_CALLS] \\',
    "é日": [{"x": [1, -2.5e-3, None]}, [], {}],
    "s": "\n\t\u2028😀",
}
A, B = call("f", NESTED), call("get-weather_2", {}, ensure_ascii=False)
WITHIN = [("f", json.dumps(NESTED)), ("get-weather_2", "{}")]
LLAMA = call("f", NESTED, "parameters"), call("get-weather_2", {}, "parameters")
LOOSE = '{ "arguments" :\n{"a" : "\\u00e9\\ud83d\\ude00" }\t,"id": [7, {"name": 1}], "name":"f"}'
ANSWERS = {
    "alone": ("hermes", f"<tool_call>\n{A}\n</tool_call>", "", WITHIN[:1]),
    "two, and text around": (
        "hermes",
        f"Let me look.\n\n<tool_call>{A}</tool_call>\n<tool_call>\n{B}</tool_call>\nDone. ",
        "Let me look.\nDone. ",
        WITHIN,
    ),
    "no end": ("hermes", f"<tool_call>\n{A}", "", WITHIN[:1]),
    "another order": (
        "hermes",
        f"<tool_call>{LOOSE}</tool_call>",
        "",
        [("f", '{"a" : "\\u00e9\\ud83d\\ude00" }')],
    ),
    "marks that are none": ("hermes", "a < b <tool <tool_cal <<tool_call ", "a < b <tool <tool_cal <<tool_call ", []),
    "a mark within another": ("hermes", f"<tool<tool_call>{B}</tool_call>", "<tool", WITHIN[1:]),
    "begun twice": ("hermes", f"<tool_call> <tool_call>{B}</tool_call>", "<tool_call>", WITHIN[1:]),
    "array": ("mistral", f"Well.[TOOL_CALLS] [{A}, {B}]", "Well.", WITHIN),
    "array without an end": ("mistral", f"[TOOL_CALLS][{A}", "", WITHIN[:1]),
    "bare": ("llama3_json", LLAMA[0], "", WITHIN[:1]),
    "bare, with both names of the member": ("llama3_json", f"\n {LLAMA[0]}; {B} ;", "", WITHIN),
    "tagged": ("llama3_json", f"Hm. <|python_tag|>{LLAMA[0]};{LLAMA[1]}", "Hm.", WITHIN),
    "bare, and text": ("llama3_json", f"{LLAMA[1]}\n so {LLAMA[0]}", f"\n so {LLAMA[0]}", WITHIN[1:]),
    "no call": ("llama3_json", "none { at all } \n", "none { at all } \n", []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_every_way_to_cut_a_text_gives_the_same(name):
    kind, text, content, calls = ANSWERS[name]
    want = (content, calls, len(calls))
    assert read(kind, [text]) == want
    for at in range(len(text) + 1):
        assert read(kind, [text[:at], text[at:]]) == want, text[:at]
    assert read(kind, text) == want
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


BAD = [
    "<tool_call>",
    "<tool_call>weather",
    "<tool_call>[]</tool_call>",
    '<tool_call>"f", {}</tool_call>',
    "<tool_call>3, {}</tool_call>",
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"name": "h", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": null, "arguments": {}}</tool_call>',
    '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": []}</tool_call>',
    '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>',
    '<tool_call>{"parameters": {}, "arguments": {}, "name": "f"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": [1}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\n"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\\x"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\\u00g0"}}</tool_call>',
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    '<tool_call>{"name": "f", "arguments": {"a": "b',
    '<tool_call>{"name": "f", "arguments": {}} </tool_',
    '<tool_call>{"name": "f", "arguments": {}} and more',
]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_call_stays_as_it_was_written(text):
    for whole in (text, f" I think\n {text} so \n"):
        complete = whole.endswith("</tool_")  # it ends before its mark does, and is all there
        want = ("", [("f", "{}")], 1) if complete else (whole, [], 0)
        for at in range(len(whole) + 1):
            assert read("hermes", [whole[:at], whole[at:]]) == want
        assert read("hermes", whole) == want
        if not complete:
            message, reason = read_answer(whole, "stop", ToolParser(FORMATS["hermes"], NAMES))
            assert (message, reason) == ({"role": "assistant", "content": whole}, "stop")


def test_a_bad_call_spoils_no_other():
    text = (
        f"a <tool_call>{B[:-1]}</tool_call> b <tool_call>{A}</tool_call> <tool_call>{B[:-1]}<tool_call>{B}</tool_call>"
    )
    want = f"a <tool_call>{B[:-1]}</tool_call> b <tool_call>{B[:-1]}", WITHIN, 2
    for pieces in ([text], text):
        assert read("hermes", pieces) == want


@pytest.mark.parametrize("kind", FORMATS)
def test_a_call_that_is_cut(kind):
    """What was announced stays, as far as it came; the rest of a call before that is text."""
    names = [*NAMES][: 1 if kind == "gpt_oss" else 2]
    text = FORMATS[kind].write([(name, {"a": [1, "x"]}) for name in names])
    whole = json.dumps({"a": [1, "x"]})
    for at in range(len(text) + 1):
        content, calls, complete = read(kind, [text[:at]], cut=True)
        assert len(calls) in (complete, complete + 1)
        for _, arguments in calls:
            assert whole.startswith(arguments)
        assert [name for name, _ in calls] == names[: len(calls)]
        assert text[:at].endswith(content)
        forced, _ = read_answer(text[:at], "length", parser_of(kind, forced=True))
        assert not forced["content"]
        assert [c["function"]["arguments"] for c in forced.get("tool_calls", ())] == [found[1] for found in calls]
        message, reason = read_answer(text[:at], "length", parser_of(kind))
        assert reason == "length"
        assert len(message.get("tool_calls", ())) == len(calls)
        assert message["content"] == (content or (None if calls else ""))
    assert calls == [(name, whole) for name in names]


def test_arguments_come_in_pieces_behind_the_name():
    parser = ToolParser(FORMATS["hermes"], NAMES)
    text = f"<tool_call>\n{A}\n</tool_call>"
    arguments = text.index(json.dumps(NESTED))
    assert not [event for char in text[:arguments] for event in parser.push(char)]
    (begun, first) = parser.push(text[arguments])
    assert (begun.kind, begun.text, first.kind, first.text) == ("call", "f", "arguments", "{")
    rest = [event for char in text[arguments + 1 :] for event in parser.push(char)]
    assert [event.text for event in rest] == [*json.dumps(NESTED)[1:]]


def test_ids_are_unique_and_of_their_family():
    lengths = {}
    for kind, format in FORMATS.items():
        several = 1 if kind == "gpt_oss" else 50
        message, reason = read_answer(format.write([("f", {})] * several), "stop", parser_of(kind))
        ids = {found["id"] for found in message["tool_calls"]}
        assert (len(ids), reason, message["content"]) == (several, "tool_calls", None)
        assert all(found["type"] == "function" for found in message["tool_calls"])
        lengths[kind] = {len(id) for id in ids}
        assert not kind.startswith("mistral") or all(id.isalnum() for id in ids)
    assert lengths["mistral"] == lengths["mistral_args"] == {9}  # its templates refuse others


def test_calls_behind_the_first_are_left_out():
    for kind, text in (
        ("hermes", f"a<tool_call>{B}</tool_call> <tool_call>{A}</tool_call>"),
        ("llama3_json", f"{B};{A}"),
    ):
        content, calls, _ = read(kind, text, parallel=False)
        assert (content, calls) == ("a" if kind == "hermes" else "", WITHIN[1:])
    bad = f"<tool_call>{A[:-1]}</tool_call><tool_call>{B}</tool_call>"
    assert read("hermes", bad, parallel=False)[1] == WITHIN[1:]


def test_any_text_is_read_alike_in_any_pieces():
    """And where nothing is called, all of it is content."""
    rng = random.Random(1)
    marks = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", *'[],;{}"<\\ \nx']
    called = dict.fromkeys(FORMATS, 0)
    for kind in [*FORMATS] * 60:
        format, cut = FORMATS[kind], rng.random() < 0.3
        own = [format.begin, format.opening, *format.closing, *format.written]
        own += [format.text("f", {}), format.text("get-weather_2", {"a": "b\n", "c": [1]}), format.text("g", {})]
        own += [format.text("f", {"a": "b"})[:-1], format.write([("f", NESTED)])]
        own[-1] += "<|call|>" * (kind == "gpt_oss")
        pieces = rng.choices([*own, *own, *marks, "f", "</"], k=rng.randint(1, 9))
        text = "".join([own[-1] if rng.random() < 0.2 else "", *pieces])
        want = read(kind, [text], cut=cut)
        at = rng.randint(0, len(text))
        assert read(kind, text, cut=cut) == read(kind, [text[:at], text[at:]], cut=cut) == want, text
        content, calls, complete = want
        called[kind] += complete
        if cut:
            continue
        assert calls or content == text or kind == "gpt_oss"  # whose marks are no text
        assert len(calls) == complete
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls), text
    assert min(called.values()) > 3, called


def test_strictly_as_json_reads():
    """Texts with a character changed are calls where Python's JSON has one with arguments, and not elsewhere."""
    rng, good = random.Random(7), 0
    text = '{"name": "f", "arguments": {"a": [1.5, {"b": null}], "c": "x\\u00e9\\n", "d": true}}'
    for _ in range(1000):
        at = rng.randrange(len(text))
        changed = (
            text[:at] + rng.choice(['"', "{", "}", "]", "[", ",", ":", "\\", "0", "-", "e", " ", ""]) + text[at + 1 :]
        )
        try:
            found = json.loads(changed)
            name, arguments = found.get("name"), found.get("arguments")
        except ValueError:
            name = arguments = None
        is_call = name == "f" and isinstance(arguments, dict)
        content, calls, complete = read("hermes", [f"<tool_call>{changed}</tool_call>"])
        assert bool(complete) == is_call, changed
        if is_call:
            good += 1
            assert content == ""
            assert [(n, json.loads(a)) for n, a in calls] == [("f", arguments)]
        else:
            assert content == f"<tool_call>{changed}</tool_call>"
    assert good > 30


def test_deep_and_long_arguments():
    deep, long = "[" * 9_000 + "]" * 9_000, '"' + "x" * 20_000 + '"'
    for value in (deep, long):
        arguments = f'{{"a": {value}}}'
        text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
        assert read("hermes", [text]) == ("", [("f", arguments)], 1)
        unnamed = f'<tool_call>{{"name": {value}, "arguments": {{}}}}</tool_call>'
        assert read("hermes", [unnamed]) == (unnamed, [], 0)
