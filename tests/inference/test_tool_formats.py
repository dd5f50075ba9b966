"""How families write calls: what each reads and writes, which types values have, and how templates show it."""

import json

import pytest
from inference.test_tool_parser import parser_of

from cs336.inference.answer import read_answer
from cs336.inference.tool_formats import FORMATS, format_of
from cs336.inference.tool_formats.types import json_of_literal, types_of, value_of
from cs336.inference.tool_parser import ToolParser

KINDS = {
    "i": {"type": "integer"},
    "x": {"type": "number"},
    "b": {"type": "boolean"},
    "s": {"type": "string"},
    "maybe": {"type": ["string", "null"]},
    "list": {"type": "array", "items": {"type": "integer"}},
    "map": {"$ref": "#/$defs/map"},
    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "unit": {"enum": ["1", "2"]},
    "any": {},
}
SCHEMAS = {"f": {"type": "object", "properties": KINDS, "$defs": {"map": {"type": "object"}}}, "g": {}, "ns_f": {}}
SPECIAL_TEXT = 'é "quoted" \\ <b>\n\n<parameter=s>\n{"a": 1}'
VALUES = {
    "i": 7, "x": -2.5, "b": True, "s": "12", "maybe": None, "list": [1, 2], "map": {"a": [None, {"b": "c"}]},
    "either": 3, "unit": "1", "any": {"k": "v"},
}  # fmt: skip


def message_of(kind, pieces, reason="stop", **options):
    """Of the answer, without the ids of calls; and why it ended."""
    if kind == "gpt_oss":
        parser = parser_of(kind, **options)
        parser._schemas = SCHEMAS
    else:
        parser = ToolParser(FORMATS[kind], SCHEMAS, **options)
    events = [event for piece in pieces[:-1] for event in parser.push(piece)]

    class Rest:
        def push(self, text):
            return events + parser.push(text)

        close, finish_reason = parser.close, parser.finish_reason

    message, reason = read_answer(pieces[-1], reason, Rest())
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
    return message["content"], message.get("reasoning_content"), calls, reason


def same_in_pieces(kind, text, want, step=1):
    assert message_of(kind, [text]) == want
    assert message_of(kind, [*text, ""]) == want
    for at in range(0, len(text) + 1, step):
        assert message_of(kind, [text[:at], text[at:]]) == want, text[:at]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read(kind):
    calls = [("f", VALUES), ("g", {}), ("f", {"s": SPECIAL_TEXT, "maybe": ""})]
    if kind == "gpt_oss":
        calls = calls[:1]
    same_in_pieces(kind, FORMATS[kind].write(calls), (None, None, calls, "tool_calls"), step=5)


QUOTED = 'it\'s \\d "),(" ]'
ONE = [("f", {"i": 1, "s": "1"})]
ANSWERS = {
    "coder": (
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=f>\n<parameter=i>\n1\n</parameter>\n<parameter=s>\n1\n</parameter>\n"
        "</function>\n</tool_call>\nDone.",
        ("I look.\nDone.", ONE),
    ),
    "coder, in one line": (
        "qwen3_coder",
        "<tool_call><function=f><parameter=i>1</parameter><parameter=s>1</parameter></function></tool_call>",
        (None, ONE),
    ),
    "coder, lines of a value's own": (
        "qwen3_coder",
        "<tool_call>\n<function=f>\n<parameter=s>\n\n  a\n\n</para\n</parameter>\n</function>\n</tool_call>",
        (None, [("f", {"s": "\n  a\n\n</para"})]),
    ),
    "coder, without the first mark": (
        "qwen3_coder",
        "So:\n<function=g>\n</function>\n</tool_call>\n<function=g>\n</function> a <function=h>\n</function>",
        ("So: a <function=h>\n</function>", [("g", {}), ("g", {})]),
    ),
    "glm": (
        "glm45",
        "Hm.<tool_call>f\n<arg_key>i</arg_key>\n<arg_value>1</arg_value>\n<arg_key>s</arg_key>\n<arg_value>1</arg_value>\n"
        "</tool_call>\n<tool_call>g</tool_call>",
        ("Hm.", [*ONE, ("g", {})]),
    ),
    "pythonic": ("pythonic", "[f(i=1, s='1'), g()]", (None, [*ONE, ("g", {})])),
    "pythonic, with a name that Python has not": ("pythonic", "[f( s-1 = 2 )]", (None, [("f", {"s-1": 2})])),
    "pythonic, of Python's words": (
        "pythonic",
        "[f(b=True, maybe=None, any=[False, (1, -2.5e1)], s='it\\'s \\d \"),(\" ]', map={'a': {}})]",
        (None, [("f", {"b": True, "maybe": None, "any": [False, [1, -25.0]], "s": QUOTED, "map": {"a": {}}})]),
    ),
    "olmo": (
        "olmo3",
        'So.\n<function_calls>\nf(i=1, s="1")\ng()\n</function_calls>',
        ("So.", [*ONE, ("g", {})]),
    ),
    "deepseek": (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"i": 1, "s": "1"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```\n<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>",
        (None, [*ONE, ("g", {})]),
    ),
    "deepseek 3.1": (
        "deepseek_v31",
        'a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"i": 1, "s": "1"}'
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("a", [*ONE, ("g", {})]),
    ),
    "mistral's newer": (
        "mistral_args",
        '[TOOL_CALLS]f[ARGS]{"i": 1, "s": "1"}[TOOL_CALLS]g[CALL_ID]abcdefgh1[ARGS]{}',
        (None, [*ONE, ("g", {})]),
    ),
    "granite": ("granite", '<|tool_call|> [{"name": "f", "arguments": {"i": 1, "s": "1"}}]', (None, ONE)),
    "cohere": (
        "cohere",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", "parameters": {"i": 1, "s": "1"}}\n]'
        "<|END_ACTION|>",
        (None, ONE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_every_way_to_cut_a_text_gives_the_same(name):
    kind, text, (content, calls) = ANSWERS[name]
    same_in_pieces(kind, text, (content, None, calls, "tool_calls"))


FUNCTION = "<tool_call>\n<function=f>\n"
PARAMETER = "<parameter=s>\na\n</parameter>\n"
DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
BAD = {
    "qwen3_coder": [
        "<tool_call>\n<function=h>\n</function>\n</tool_call>",
        f"{FUNCTION}<parameter=s>\na\n</function>\n</tool_call>",
        f"{FUNCTION}{PARAMETER}{PARAMETER}</function>\n</tool_call>",
        f"{FUNCTION}more</function>\n</tool_call>",
        f"{FUNCTION}</function>\nmore",
    ],
    "glm45": [
        "<tool_call>h\n</tool_call>",
        "<tool_call>f\n<arg_value>1</arg_value>\n</tool_call>",
        "<tool_call>f g</tool_call>",
    ],
    "pythonic": [
        "[1, 2]",
        "[h()]",
        "[f(1)]",
        "[f(s=g())]",
        "[f(s=1, s=2)]",
        "[f(s={1, 2})]",
        "[f(s=(])]",
        "[f(s=nan)]",
    ],
    "olmo3": [
        "<function_calls>\nh()\n</function_calls>",
        "<function_calls></function_calls>",
        "<function_calls>f(s=</function_calls>",
    ],
    "deepseek_v3": [f"{DEEPSEEK}function<｜tool▁sep｜>f\n{{}}\n<｜tool▁call▁end｜>"],
    "deepseek_v31": ["<｜tool▁calls▁begin｜>f", f"{DEEPSEEK}f<｜tool▁sep｜>[]<｜tool▁call▁end｜>"],
    "mistral_args": [
        "[TOOL_CALLS]h[ARGS]{}",
        "[TOOL_CALLS]f{}",
        '[TOOL_CALLS]f[ARGS]{"s": 1',
        '[TOOL_CALLS] [{"name": "f", "arguments": {}}]',
    ],
    "granite": ['<|tool_call|>{"name": "f", "arguments": {}}', '<|tool_call|>[{"name": "h", "arguments": {}}]'],
    "cohere": ['<|START_ACTION|>[{"name": "f", "parameters": {}}]<|END_ACTION|>'],
    "gpt_oss": [
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>[1]",
        "<|channel|>commentary to=functions.h<|message|>{}",
    ],
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_call_stays_as_it_was_written(kind):
    for text in BAD[kind]:
        for whole in (text,) if kind in ("pythonic", "gpt_oss") else (text, f" I think\n {text} so \n"):
            same_in_pieces(kind, whole, (whole, None, [], "stop"))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("gpt_oss", "pythonic", "llama3_json")])
def test_a_bad_call_spoils_no_other(kind):
    format = FORMATS[kind]
    good, bad = format.write([("g", {})]), format.begin
    for text, before in ((bad + good, bad), (f"a {bad} b {good}", f"a {bad} b")):
        same_in_pieces(kind, text, (before, None, [("g", {})], "tool_calls"))


def test_strings_come_as_they_are_written():
    """And other values once they have ended."""
    parser = ToolParser(FORMATS["qwen3_coder"], SCHEMAS)
    parser.push("<tool_call>\n<function=f>\n<parameter=s>\n")
    told = [[event.text for event in parser.push(char)] for char in 'a"\n\nb</c']
    assert told == [["a"], ['\\"'], [], ["\\n"], ["\\nb"], [], [], ["</c"]]
    assert [event.text for event in parser.push("\n</parameter>")] == ['"']
    assert [event.text for event in parser.push("\n<parameter=i>\n12")] == [', "i": ']
    assert [event.text for event in parser.push("\n</parameter>")] == ["12"]


@pytest.mark.parametrize(
    ("text", "types", "json"),
    [
        ("12", {"integer"}, "12"),
        ("12", {"string"}, '"12"'),
        ("12", {"number"}, "12"),
        ("12.0", {"integer"}, "12.0"),
        ("1.5", {"integer"}, '"1.5"'),
        ("12", set(), "12"),
        ("twelve", {"integer"}, '"twelve"'),
        (" True ", {"boolean"}, "true"),
        ("null", {"string", "null"}, "null"),
        ("nil", {"string", "null"}, '"nil"'),
        ("[1, 'a', None]", {"array"}, '[1, "a", null]'),
        ("[1, 2]", {"object", "string"}, '"[1, 2]"'),
        ('"a"', set(), '"\\"a\\""'),
        ("NaN", {"number"}, '"NaN"'),
        ("", set(), '""'),
        ("9" * 5000, {"integer"}, f'"{"9" * 5000}"'),
        ("[" * 100_000, {"array"}, f'"{"[" * 100_000}"'),
    ],
)
def test_values_are_of_the_types_of_the_schema(text, types, json):
    assert value_of(text, types) == json


def test_types_of_schemas():
    root = {"$defs": {"a/b": {"type": "number"}, "loop": {"$ref": "#/$defs/loop"}}}
    for schema, types in (
        ({"type": "string"}, {"string"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"anyOf": [{"type": "integer"}, {"oneOf": [{"enum": ["a", None]}]}]}, {"integer", "string", "null"}),
        ({"anyOf": [{"type": "integer"}, {}]}, set()),
        ({"const": 1.5}, {"number"}),
        ({"$ref": "#/$defs/a~1b"}, {"number"}),
        ({"$ref": "#/$defs/loop"}, set()),
        ({"$ref": "#/nowhere/at/all"}, set()),
        (True, set()),
        (None, set()),
    ):
        assert types_of(schema, root) == types


def test_a_schema_is_read_once_however_many_point_at_it():
    names = [f"s{i}" for i in range(10)]
    definitions = {name: {"anyOf": [{"$ref": f"#/$defs/{then}"} for then in names]} for name in names}
    root = {"$defs": definitions | {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/b"}]}, "b": {"const": 1}}}
    assert types_of({"$ref": "#/$defs/s0"}, root) == set()
    assert types_of({"$ref": "#/$defs/a"}, root) == {"integer"}


def test_what_references_point_at_may_be_no_schema():
    for bad in ({"type": 5}, {"type": [[]]}, {"anyOf": 5}, {"enum": {}}, [1]):
        types = types_of({"$ref": "#/bad"}, {"bad": bad})
        assert types <= {"object"}


def test_literals():
    assert json_of_literal(r"'\d \u00e9 \n'") == r'"\\d é \n"'
    assert json_of_literal("{'a': [True, false, None, (1,)]}") == '{"a": [true, false, null, [1]]}'
    assert json_of_literal(" 1e999") == "1e999"  # whatever a float makes of it
    for text in ("f", "1 + 1", "{1: 2}", "{**{}}", "b''", "1j", "...", "'a", "", "__import__('os')", "nan"):
        with pytest.raises(ValueError, match="no literal"):
            json_of_literal(text)
    with pytest.raises(ValueError, match="surrogates"):  # half a character, which no answer could be sent with
        json_of_literal(r"{'a': '\ud800'}")
    assert json.loads(value_of(r"['\ud800']", {"array"})) == r"['\ud800']"


TEMPLATES = {
    "hermes": '{% for t in tools %}<tool_call>\n{"name": ..., "arguments"}',
    "qwen3_coder": "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "llama3_json": 'Respond {"name": function name, "parameters": dictionary of it} <|python_tag|>',
    "pythonic": "the format of [func_name1(params_name1=params_value1, ...), ...]",
    "olmo3": "<function_calls>{{ call }}</function_calls>",
    "mistral": "{{ tools }}[TOOL_CALLS] [",
    "mistral_args": "[TOOL_CALLS]name[ARGS]",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>' + name + '\\n```json\\n",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>",
    "granite": "respond with <|tool_call|> followed by a JSON list of tools used",
    "cohere": "<|START_ACTION|>[",
    "gpt_oss": "<|channel|>commentary to=functions.",
}


def test_formats_are_known_by_their_templates():
    assert TEMPLATES.keys() == FORMATS.keys()
    for name, template in TEMPLATES.items():
        assert format_of(template) is FORMATS[name], name
    assert format_of("{{ tools }}<|python_tag|>") is FORMATS["llama3_json"]
    assert format_of("{{ tools }}") is None
    assert format_of("<tool_call><function=f>{}</function>") is None
