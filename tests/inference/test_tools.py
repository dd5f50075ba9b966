"""Tools in a conversation: what templates are given, what is refused, and what a model that must call can write."""

import functools
import importlib.util
import json
import re

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema
from inference.scripted import (
    ASK,
    SCHEMAS,
    SPECIAL,
    TEMPLATES,
    TOKENIZER,
    TOOLS,
    lark_of,
    saying,
    tool,
    tool_llm,
    written,
)

from cs336.cli import main
from cs336.inference import LLM, SamplingParams
from cs336.inference.chat import ChatTemplate
from cs336.inference.grammar import Grammars
from cs336.inference.reasoning import REASONING
from cs336.inference.tool_formats import FORMATS
from cs336.inference.tools import Tools

llm_of = functools.cache(tool_llm)
CALLED = [
    *ASK,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "abcdefgh1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Łódź", "x": [1, {"a": null}]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": [{"type": "text", "text": "warm"}]},
]


def as_objects(messages):
    """With arguments as Hugging Face's templates take them."""
    found = json.loads(json.dumps(messages))
    for call in found[1]["tool_calls"]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    found[1]["content"], found[2]["content"] = "", "warm"
    return found


@pytest.mark.parametrize("kind", TEMPLATES)
def test_templates_are_given_what_transformers_gives(kind):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = ChatTemplate(TEMPLATES[kind])
    assert template.takes_tools
    assert template.tool_format is FORMATS[kind]
    for tools in (TOOLS, []):
        (want,), _ = utils.render_jinja_template(
            [as_objects(CALLED)], tools or None, None, TEMPLATES[kind], add_generation_prompt=True
        )
        assert template.render(CALLED, tools=tools) == want
        assert template.render(as_objects(CALLED), tools=tools) == want
        assert ("<b>é</b>" in want) == bool(tools)
        assert "Łódź" in want


def test_what_the_model_wrote_is_what_it_reads_in_the_next_turn():
    text = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź", "days": 1}}\n</tool_call>'
    llm = llm_of("hermes")
    with saying(llm, text):
        (answer,) = llm.chat(ASK, tools=TOOLS)
    before = llm.chat_template.render(ASK, tools=TOOLS)
    after = llm.chat_template.render([*ASK, answer.message], tools=TOOLS, add_generation_prompt=False)
    assert answer.message["content"] == "Let me look."
    assert after == before + text + "<|im_end|>\n"


def test_calls_where_the_template_has_no_place_for_them():
    """They are written as the model wrote them."""
    granite = ChatTemplate(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ tools }} respond with <|tool_call|> [...]"
    )
    call = '<|tool_call|>[{"name": "weather", "arguments": {"city": "Łódź", "x": [1, {"a": null}]}}]'
    assert granite.render(CALLED).startswith(f"[user]{ASK[0]['content']}[assistant]{call}[tool]warm")


def test_a_template_with_another_name_for_tools():
    template = ChatTemplate("{% if xml_tools %}{{ xml_tools | tojson }}{% endif %}{{ messages[0].content }}")
    assert json.loads(template.render([{"role": "user", "content": ""}], tools=TOOLS)) == TOOLS
    assert template.render([{"role": "user", "content": "a"}]) == "a"


def test_templates_that_take_arguments_as_text():
    deepseek = ChatTemplate(
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + '\\n' + c.function.arguments }}"
        "{% endfor %}{% endfor %}"
    )
    for messages in (CALLED, as_objects(CALLED)):
        assert deepseek.render(messages) == 'weather\n{"city": "Łódź", "x": [1, {"a": null}]}'
    with pytest.raises(ValueError, match="the chat template refuses these messages: can only concatenate str"):
        ChatTemplate("{{ 'a' + 1 }} tool_calls").render(CALLED)


def test_what_was_thought_is_gpt_oss_thinking():
    template = ChatTemplate("{% for m in messages %}{{ m.thinking }}|{% endfor %} tool_calls")
    thought = {"reasoning_content": "Hm."}
    assert template.render([*ASK, CALLED[1] | thought]) == "|Hm.| tool_calls"
    assert template.render([*ASK, {"role": "assistant", "content": "a"} | thought]) == "|Hm.| tool_calls"
    assert template.render([*ASK, CALLED[1] | thought | {"content": "I look."}]) == "|| tool_calls"


def test_a_template_of_its_own_for_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": TEMPLATES["hermes"]}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.find(tmp_path)
    assert template.render(ASK) == "plain"
    assert template.render(ASK, tools=TOOLS) == ChatTemplate(TEMPLATES["hermes"]).render(ASK, tools=TOOLS)
    assert template.render(CALLED) == ChatTemplate(TEMPLATES["hermes"]).render(CALLED)
    assert template.tool_format is FORMATS["hermes"]


def test_templates_without_a_place():
    for template in (ChatTemplate(), ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")):
        assert not template.takes_tools
        with pytest.raises(ValueError, match="has no place for tools: leave them out"):
            template.render(ASK, tools=TOOLS)
        with pytest.raises(ValueError, match="has no place for tool_calls"):
            template.render(CALLED)
    llm = tool_llm()
    llm.chat_template = ChatTemplate("{{ tools | tojson if tools }}{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"does not show how calls .* give tool_parser .*hermes, qwen3_coder, glm45"):
        llm.chat(ASK, tools=TOOLS)
    assert (
        llm.chat(ASK, SamplingParams(max_tokens=2), tools=TOOLS, tool_choice="none")[0].message["content"] is not None
    )
    with pytest.raises(ValueError, match="tool_parser must be one of hermes"):
        LLM(llm.model, TOKENIZER, quiet=True, tool_parser="qwen")


def message(calls, **more):
    return [*ASK, {"role": "assistant", "tool_calls": calls} | more]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (message("f()"), "messages.1.tool_calls must be a list, got 'f()'"),
        (message([{}]), 'messages.1.tool_calls.0 must be {"id"'),
        (message([{"id": 3, "function": {"name": "f"}}]), 'messages.1.tool_calls.0 must be {"id"'),
        (message([{"function": {"name": ["f"]}}]), 'messages.1.tool_calls.0 must be {"id"'),
        (message([{"function": {"name": "f", "arguments": "{"}}]), "tool_calls.0.function.arguments is not JSON: "),
        (message([{"function": {"name": "f", "arguments": "[1]"}}]), "arguments must be an object, as JSON, got [1]"),
        (message([{"function": {"name": "f", "arguments": 0}}]), "arguments must be an object, as JSON, got 0"),
        (
            [*CALLED[:2], CALLED[2] | {"tool_call_id": "other"}],
            "messages.2.tool_call_id is 'other', and the calls before",
        ),
        (
            [*CALLED[:2], {"role": "tool", "content": "a"}],
            "messages.2.tool_call_id is None, and the calls before it are abc",
        ),
        ([CALLED[2], *CALLED[:2]], "messages.0.tool_call_id is 'abcdefgh1', and the calls before it are none"),
        ([*CALLED[:2], CALLED[2] | {"tool_call_id": ["a"]}], "messages.2.tool_call_id is ['a']"),
    ],
)
def test_bad_calls_in_messages(messages, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        ChatTemplate(TEMPLATES["hermes"]).render(messages)


def test_calls_without_what_may_be_left_out():
    template = ChatTemplate(TEMPLATES["hermes"])
    for arguments in ({}, {"arguments": ""}, {"arguments": "null"}, {"arguments": "{}"}, {"arguments": None}):
        messages = [*message([{"function": {"name": "now"} | arguments}]), {"role": "tool", "content": "12:00"}]
        assert '{"name": "now", "arguments": {}}' in template.render(messages)
    for nothing in (None, []):
        assert template.render(message(nothing, content="a")) == template.render(
            [*ASK, {"role": "assistant", "content": "a"}]
        )


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def changed(**function):
    return [{"type": "function", "function": {"name": "f"} | function}]


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ("weather", None, "tools must be a list of"),
        ([{"name": "f", "parameters": {}}], None, "tools.0 must be "),
        ([TOOLS[0], {"type": "web_search"}], None, "tools.1 must be "),
        ([TOOLS[0] | {"more": 1}], None, "tools.0 has more, and the fields are function, type"),
        (changed(args={}), None, "tools.0.function has args, and the fields are description, name"),
        (changed(name=None), None, "tools.0.function.name must be 1 to 64"),
        (changed(name="a b"), None, "tools.0.function.name must be 1 to 64 letters, digits, _ and -, got 'a b'"),
        (changed(name="a" * 65), None, "tools.0.function.name must be"),
        ([*TOOLS, TOOLS[0]], None, "tools.3.function.name is 'weather', as is another"),
        (changed(description=1), None, "tools.0.function.description must be a str"),
        (changed(strict="yes"), None, "tools.0.function.strict must be a bool"),
        (changed(parameters=[]), None, "tools.0.function.parameters must be a JSON schema of"),
        (changed(parameters={"type": "string"}), None, "tools.0.function.parameters must be a JSON schema of"),
        (changed(parameters={"default": float("nan")}), None, "tools.0.function.parameters is not JSON"),
        *(
            (changed(parameters={"properties": {"a": schema}}), None, f"function.parameters.properties.a{reason}")
            for schema, reason in (
                ("string", " must be a JSON schema"),
                ({"type": "text"}, ".type must be one of array, boolean, integer, null"),
                ({"type": ["string", {}]}, ".type must be one of"),
                ({"required": "b"}, ".required must be a list of names"),
                ({"enum": "b"}, ".enum must be a list"),
                ({"properties": []}, ".properties must be an object"),
                ({"anyOf": [{}, {"oneOf": [True, {"type": 1}]}]}, ".anyOf.1.oneOf.1.type must be one of"),
                ({"items": {"additionalProperties": {"$defs": {"c": 3}}}}, ".items.additionalProperties.$defs.c must"),
            )
        ),
        (TOOLS, "any", 'tool_choice must be "none", "auto", "required", {"type": "function"'),
        (TOOLS, {"type": "function", "name": "now"}, "tool_choice must be"),
        (TOOLS, {"type": "function", "function": {"name": "then"}}, "tool_choice.function.name is 'then', and"),
        (TOOLS, {"type": "function", "function": {"name": []}}, "tool_choice.function.name is []"),
        (None, "required", "tool_choice asks for a call, and there are no tools"),
        (TOOLS, allowed("none"), 'tool_choice.allowed_tools must be {"mode": "auto" or "required", "tools": '),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice.allowed_tools must be "),
        (TOOLS, allowed("auto", "now", "then"), "tool_choice.allowed_tools has 'then', and the tools are weather, "),
        (TOOLS, allowed("required"), "tool_choice asks for a call, and there are no tools"),
        ([], {"type": "function", "function": {"name": "now"}}, "tool_choice asks for a call, and there are no tools"),
    ],
)  # fmt: skip
def test_what_is_refused(tools, choice, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        Tools(tools, choice)


def test_what_must_be_called():
    assert Tools(None).offered == Tools(None, "auto").offered == Tools([], "none").offered == []
    assert Tools(TOOLS, "none").offered == []
    assert (Tools(TOOLS).offered, [*Tools(TOOLS).must]) == (TOOLS, [])
    assert Tools(TOOLS, "required").must == ["weather", "square", "now"]
    named = Tools(TOOLS, {"type": "function", "function": {"name": "now"}})
    assert (named.must, named.parallel, [*named.schemas]) == (["now"], False, ["weather", "square", "now"])


def test_some_of_the_tools_are_allowed():
    """The template tells of all of them."""
    required = Tools(TOOLS, allowed("required", "now", "weather"))
    assert (required.must, [*required.schemas]) == (["weather", "now"], ["weather", "now"])
    assert (required.offered, required.parallel, required.strict) == (TOOLS, True, False)
    auto = Tools(TOOLS, allowed("auto", "square"))
    assert ([*auto.must], [*auto.schemas], auto.strict) == ([], ["square"], True)
    llm, text = llm_of("hermes"), written("hermes", ("now", {}))
    with saying(llm, text, text):
        (refused,) = llm.chat(ASK, tools=TOOLS, tool_choice=allowed("auto", "square"))
        (called,) = llm.chat(ASK, tools=TOOLS, tool_choice=allowed("auto", "now"))
    assert (refused.message["content"], refused.finish_reason) == (text, "stop")
    assert called.finish_reason == "tool_calls"


@pytest.mark.parametrize("kind", FORMATS)
def test_calls_or_a_text_of_a_grammar(kind):
    """As with OpenAI: what is no call is of the schema; where a call must be there is no text."""
    grammars = Grammars(TOKENIZER, len(TOKENIZER.vocab))
    final = "<|channel|>final<|message|>" if kind == "gpt_oss" else ""
    reasoning = REASONING["gpt_oss"] if kind == "gpt_oss" else None
    one = {"json_schema": {"properties": {"n": {"const": 1}}, "required": ["n"], "additionalProperties": False}}
    call, ten = (FORMATS[kind].write([("square", {"n": n})]) for n in (3, 10))
    lark = lark_of(Tools(TOOLS), kind, reasoning=reasoning, **one)
    good, bad = (f'{final}{{"n":{n}}}' for n in (1, 2))
    for text, want in ((call, True), (good, True), (ten, False), (bad, False), ("", False)):
        assert accepts(grammars, lark, text) == want, text
    must = lark_of(Tools(TOOLS, "required"), kind, reasoning=reasoning, **one)
    assert accepts(grammars, must, call)
    assert not accepts(grammars, must, good)


def accepts(grammars, lark, text, special=True):
    """Whether the grammar lets each token of the text come, and then its end."""
    end = SPECIAL["<|endoftext|>"]
    guide = grammars.guide(SamplingParams(lark=lark), [end])
    for token in TOKENIZER.encode(text, allowed_special="all" if special else (), disallowed_special=()):
        if not guide.allowed[token >> 3] >> (token & 7) & 1:
            return False
        guide.advance(token)
    return guide.ended or bool(guide.allowed[end >> 3] >> (end & 7) & 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_grammar_of_calls(kind):
    grammars = Grammars(TOKENIZER, len(TOKENIZER.vocab))
    weather, square, now = ("weather", {"city": 'Ł"}', "days": 30}), ("square", {"n": 3}), ("now", {})
    several = lark_of(Tools(TOOLS, "required"), kind, SPECIAL)
    together = [[now, weather, square], [weather, weather]] if kind != "gpt_oss" else []  # which ends with its call
    for calls in ([weather], [square], [now], *together):
        assert accepts(grammars, several, written(kind, *calls))
    if kind == "mistral":
        assert accepts(grammars, several, written(kind, now, square).replace("[TOOL_CALLS][", "[TOOL_CALLS] ["))
    for call in (
        ("then", {}),
        ("now", {"n": 3}),
        ("square", {"n": 10}),
        ("square", {}),
        ("weather", {"city": "a", "days": 3}),
        ("weather", {"city": "abcdef", "days": 1}),
    ):
        assert not accepts(grammars, several, written(kind, call))
    assert not accepts(grammars, several, "")
    assert not accepts(grammars, several, f"so: {written(kind, now)}")
    one = lark_of(Tools(TOOLS, "required", parallel=False), kind, SPECIAL)
    assert accepts(grammars, one, written(kind, square))
    assert not accepts(grammars, one, written(kind, square, now))
    named = lark_of(Tools(TOOLS, {"type": "function", "function": {"name": "now"}}), kind, SPECIAL)
    assert accepts(grammars, named, written(kind, now))
    assert not accepts(grammars, named, written(kind, square))
    assert not accepts(grammars, named, written(kind, now, now))
    without = {text: i for text, i in SPECIAL.items() if text == "<|endoftext|>"}  # then marks are texts
    assert f"<[{SPECIAL['<tool_call>']}]>" not in lark_of(Tools(TOOLS, "required"), kind, without)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("specials", [SPECIAL, {}])
def test_calls_of_strict_tools_that_nobody_asks_for(kind, specials):
    """Text is free, and where a call begins it is one, by its schema if its tool is strict."""
    format, grammars = FORMATS[kind], Grammars(TOKENIZER, len(TOKENIZER.vocab))
    tools = Tools([TOOLS[1], tool("now")])
    assert (tools.strict, Tools([tool("now")]).strict, Tools(TOOLS, "none").strict) == (True, False, False)
    follows = functools.partial(accepts, grammars, lark_of(tools, kind, specials), special=bool(specials))
    three, ten = (format.write([("square", {"n": n})]) for n in (3, 10))
    assert follows(three)
    assert follows(format.write([("now", {"n": 3, "s": "a"})]))
    assert not follows(ten)
    assert not follows(format.write([("then", {})]))
    if kind == "gpt_oss":  # whose answers have a mark as well
        aside = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        assert follows(f"{aside}<|channel|>final<|message|>No {{ <tool_call.")
        assert follows(f"{aside}{aside}{three}")
        assert not follows(f"{aside}{ten}")
        return
    assert follows("")
    assert follows("No { <tool_call.")
    if not format.bare:
        assert follows(f"<think>a</think>So:\n{three} and\n{three}.")
        assert not follows(f"So:\n{ten}")
        assert not follows(f"{three}{ten}")
        once = lark_of(Tools([TOOLS[1]], parallel=False), kind, specials)
        assert accepts(grammars, once, f"So: {three}!", special=bool(specials))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_random_model_that_must_call(kind, name):
    """Its weights say nothing, and its calls are by the schema."""
    llm = llm_of(kind)
    choice = {"type": "function", "function": {"name": name}}
    (output,) = llm.chat(ASK, SamplingParams(seed=3, n=3, max_tokens=400), tools=TOOLS, tool_choice=choice)
    for answer in output.outputs:
        assert answer.finish_reason == "tool_calls"
        assert answer.message["content"] is None
        (call,) = answer.message["tool_calls"]
        assert call["function"]["name"] == name
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[name])
    assert len({c["id"] for o in output.outputs for c in o.message["tool_calls"]}) == 3
    prompt = llm.chat_template.render(ASK, tools=TOOLS)
    assert output.prompt == prompt
    begun = TOKENIZER.encode(FORMATS[kind].write([(name, {})]), allowed_special="all")[0]
    assert output.token_ids[0] == begun  # the mark as the model was taught it, one token


def test_answers_with_and_without_calls():
    llm = llm_of("hermes")
    two = written("hermes", ("now", {}), ("square", {"n": 3}))
    with saying(llm, two, "No.", two, two, two):
        (called,) = llm.chat(ASK, tools=TOOLS)
        (plain,) = llm.chat(ASK, tools=TOOLS)
        (one,) = llm.chat(ASK, tools=TOOLS, parallel_tool_calls=False)
        (none,) = llm.chat(ASK, tools=TOOLS, tool_choice="none")
        (cut,) = llm.chat(ASK, SamplingParams(max_tokens=len(two) - 70), tools=TOOLS)
    assert called.text == two
    assert called.finish_reason == "tool_calls"
    assert [c["function"] for c in called.message["tool_calls"]] == [
        {"name": "now", "arguments": "{}"},
        {"name": "square", "arguments": '{"n": 3}'},
    ]
    assert (plain.message, plain.finish_reason) == ({"role": "assistant", "content": "No."}, "stop")
    assert [c["function"]["name"] for c in one.message["tool_calls"]] == ["now"]
    assert (none.message, none.finish_reason) == ({"role": "assistant", "content": two}, "stop")
    assert cut.finish_reason == "length"
    follow = llm.chat([*ASK, called.message], SamplingParams(max_tokens=2), tools=TOOLS)
    assert follow[0].message["role"] == "assistant"


def test_what_leaves_no_room_for_calls(monkeypatch):
    llm = llm_of("hermes")
    with pytest.raises(ValueError, match="lark says what the text must be, which leaves no room for calls"):
        llm.chat(ASK, SamplingParams(lark='start: "a"'), tools=TOOLS)
    assert llm.chat(ASK, SamplingParams(regex="a"), tools=TOOLS, tool_choice="none")[0].text == "a"
    with pytest.raises(ValueError, match="tool_choice says where a text may end, and min_tokens does"):
        llm.chat(ASK, SamplingParams(min_tokens=2), tools=TOOLS, tool_choice="required")
    bad = [TOOLS[0], tool("bad", {"type": "object", "properties": {"a": {"not": {"type": "null"}}}})]
    llm.chat(ASK, SamplingParams(max_tokens=2), tools=bad)  # the model may have been told so
    with pytest.raises(ValueError, match=r"tools.1.function.parameters cannot be followed: .*not"):
        llm.chat(ASK, tools=bad, tool_choice="required")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llguidance" else found(name))
    with pytest.raises(ValueError, match=r"need llguidance: pip install 'cs336\[structured\]'"):
        llm.chat(ASK, tools=TOOLS, tool_choice="required")
    with pytest.raises(ValueError, match=r"need llguidance: pip install 'cs336\[structured\]'"):
        llm.chat(ASK, tools=TOOLS)  # one of which is strict
    llm.chat(ASK, SamplingParams(max_tokens=2), tools=[TOOLS[0], TOOLS[2]])


def test_lark():
    llm = llm_of("hermes")
    (output,) = llm.generate("a", SamplingParams(lark='start: <[258]> "x" /[ab]{3}/', seed=1))
    assert re.fullmatch("<tool_call>x[ab]{3}", output.text)
    for lark, reason in (("start: (", "lark cannot be followed"), (3, "lark must be a string, got 3")):
        with pytest.raises(ValueError, match=reason):
            llm.generate("a", SamplingParams(lark=lark))


def test_the_verb_knows_every_format(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = re.sub(r"[\s│|]", "", capsys.readouterr().out)
    assert "{" + ",".join(FORMATS) + "}" in shown
    assert "{" + ",".join([*REASONING, "none"]) + "}" in shown
