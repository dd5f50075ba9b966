"""Calls of tools over HTTP, whole and in pieces, in the form that OpenAI's client reads."""

import asyncio
import json
import pathlib
import re

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("llguidance")

from inference.scripted import ASK, TEMPLATES, TOOLS, saying, tool, tool_llm, written
from inference.serving import ask, listening, until

from cs336.inference.chat import ChatTemplate

CHAT = "/v1/chat/completions"
DOCS = pathlib.Path(__file__).parents[2] / "docs/inference.md"
FIELDS = ("tools", "tool_choice", "parallel_tool_calls", "messages")
NOW = {"type": "function", "function": {"name": "now"}}
TWO = f"Let me look.\n{written('hermes', ('weather', {'city': 'Łódź', 'x': ['{', {}]}), ('now', {}))}\nWait."
WANT = [("weather", '{"city": "Łódź", "x": ["{", {}]}'), ("now", "{}")]


@pytest.fixture(scope="module")
def served():
    with listening(tool_llm()) as found:
        yield found


@pytest.fixture
def client(served):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served[1]}/v1", api_key="none", max_retries=0)


def post(served, body, path=CHAT):
    status, found = asyncio.run(ask(served[1], {"messages": ASK, "tools": TOOLS} | body, path=path))
    return status, json.loads(found[0])


def streamed(served, body):
    """The choices of the chunks."""
    body = {"messages": ASK, "tools": TOOLS, "stream": True} | body
    status, found = asyncio.run(ask(served[1], body, path=CHAT))
    assert (status, found[-1]) == (200, b"[DONE]")
    return [choice for event in found[:-1] for choice in json.loads(event)["choices"]]


def told(message):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]


def test_an_answer_that_calls(served):
    with saying(served[0].llm, TWO, "<tool_call>No.", written("hermes", ("now", {}))):
        status, answer = post(served, {"logprobs": True})
        plain = post(served, {})[1]["choices"][0]
        alone = post(served, {})[1]["choices"][0]
    assert status == 200
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look.\nWait."
    assert told(choice["message"]) == WANT
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    assert len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"] == len(TWO.encode())
    assert plain["message"] == {"role": "assistant", "content": "<tool_call>No."}
    assert plain["finish_reason"] == "stop"
    assert alone["message"]["content"] is None


def test_a_stream_in_openais_form(served):
    with saying(served[0].llm, TWO):
        chunks = streamed(served, {"logprobs": True})
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    assert chunks[-1]["delta"] == {}
    assert "".join(c["delta"].get("content") or "" for c in chunks) == "Let me look.\nWait."
    parts = [part for c in chunks for part in c["delta"].get("tool_calls", [])]
    for index, (name, arguments) in enumerate(WANT):
        first, *rest = (part for part in parts if part["index"] == index)
        assert first.keys() == {"index", "id", "type", "function"}
        assert first["function"] == {"name": name, "arguments": ""}
        assert all(part.keys() == {"index", "function"} for part in rest)
        assert all(part["function"].keys() == {"arguments"} for part in rest)
        assert "".join(part["function"]["arguments"] for part in rest) == arguments
        assert len(rest) == len(arguments.encode()) - 3 * (name == "weather")  # a byte a token; 3 letters have two
    assert sum(len((c.get("logprobs") or {"content": []})["content"]) for c in chunks) == len(TWO.encode())


def test_openais_client_reads_streams(served, client):
    for text in (TWO, "No.", TWO[: TWO.index('"{"')]):
        limit = {"max_tokens": len(text)} if text.startswith("Let") and text != TWO else {}
        with saying(served[0].llm, text + "..." if limit else text, text + "..." if limit else text):
            asked = {"model": "cs336", "messages": ASK, "tools": TOOLS, **limit}
            whole = client.chat.completions.create(**asked).choices[0]
            pieces = list(client.chat.completions.create(**asked, stream=True))
        said = "".join(p.choices[0].delta.content or "" for p in pieces)
        assert said == (whole.message.content or "")
        calls = {}
        for part in (part for p in pieces for part in p.choices[0].delta.tool_calls or []):
            call = calls.setdefault(part.index, [part.function.name, ""])
            call[1] += part.function.arguments
        found = whole.message.tool_calls or []
        assert [tuple(call) for call in calls.values()] == [(c.function.name, c.function.arguments) for c in found]
        assert pieces[-1].choices[0].finish_reason == whole.finish_reason
        assert whole.finish_reason == ("length" if limit else "tool_calls" if calls else "stop")


def test_several_answers_and_stop_strings(served):
    with saying(served[0].llm, TWO, TWO, TWO):
        choices = post(served, {"n": 3})[1]["choices"]
        chunks = streamed(served, {"n": 2})
        (stopped,) = post(served, {"stop": ['"x"']})[1]["choices"]
    assert [told(c["message"]) for c in choices] == [WANT] * 3
    assert len({call["id"] for c in choices for call in c["message"]["tool_calls"]}) == 6
    for index in range(2):
        parts = [p for c in chunks if c["index"] == index for p in c["delta"].get("tool_calls", [])]
        assert "".join(p["function"]["arguments"] for p in parts) == "".join(arguments for _, arguments in WANT)
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"] == {"role": "assistant", "content": TWO[: TWO.index('"x"')]}


def test_what_must_be_called_is_called(served, client):
    for how in ({"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": NOW}):
        for seed in range(2):
            (choice,) = post(served, how | {"seed": seed, "max_tokens": 400})[1]["choices"]
            assert choice["finish_reason"] == "tool_calls"
            ((name, arguments),) = told(choice["message"])
            assert how["tool_choice"] == "required" or (name, json.loads(arguments)) == ("now", {})
            assert isinstance(json.loads(arguments), dict)
    (cut,) = post(served, {"tool_choice": "required", "max_tokens": 12})[1]["choices"]
    assert (cut["message"], cut["finish_reason"]) == ({"role": "assistant", "content": ""}, "length")
    chunks = streamed(served, {"tool_choice": "required", "max_tokens": 12})
    assert [c["delta"] for c in chunks] == [{"role": "assistant", "content": ""}, {}]
    with client.chat.completions.stream(
        model="cs336", messages=ASK, tools=TOOLS, tool_choice=NOW, seed=1, max_tokens=100
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert [call.function.name for call in final.message.tool_calls] == ["now"]
    assert final.finish_reason == "tool_calls"


def test_tool_choice_none(served):
    """The model is not told of tools, and what it writes is text."""
    with saying(served[0].llm, TWO):
        _, answer = post(served, {"tool_choice": "none"})
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": TWO}
    _, bare = post(served, {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == bare["usage"]["prompt_tokens"]
    _, counted = post(served, {}, "/tokenize")
    with saying(served[0].llm, "No."):
        assert counted["count"] == post(served, {})[1]["usage"]["prompt_tokens"] > bare["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"tools": {}}, "tools: Input should be a valid list"),
        ({"tools": ["f"]}, "tools.0: Input should be a valid dictionary"),
        ({"tools": [{"type": "function"}]}, "tools.0 must be "),
        ({"tools": [tool("a b")]}, "tools.0.function.name must be 1 to 64"),
        ({"tools": [*TOOLS, TOOLS[1]]}, "tools.3.function.name is 'square', as is another tool's"),
        ({"tools": [tool("f", {"items": {"type": "x"}})]}, "tools.0.function.parameters.items.type must be one of"),
        ({"tools": [tool("f", {"type": "array"})]}, "tools.0.function.parameters must be a JSON schema"),
        (
            {"tools": [tool("f", {"properties": {"a": {"not": {}}}})], "tool_choice": "required"},
            "tools.0.function.parameters cannot be followed: ",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice must be "),
        ({"tool_choice": 3}, "tool_choice must be a text, or "),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name is 'g'"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice asks for a call, and there are no tools"),
        ({"parallel_tool_calls": "perhaps"}, "parallel_tool_calls: "),
        ({"tools": [TOOLS[1]], "min_tokens": 3}, "tools says where a text may end, and min_tokens does"),
        ({"reasoning_effort": "low"}, "reasoning_effort 'low' is nothing that this model's chat template takes"),
        ({"reasoning_effort": "most"}, "reasoning_effort: Input should be 'none', 'minimal', 'low'"),
        ({"tool_choice": NOW, "min_tokens": 3}, "tool_choice says where a text may end"),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "a", "content": ""}]}, "messages.1.tool_call_id is 'a'"),
        (
            {"messages": [*ASK, {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": 3}}]}]},
            "messages.1.tool_calls.0 must be ",
        ),
    ],
)
def test_what_is_refused(served, body, reason):
    status, answer = post(served, body)
    assert (status, reason in answer["error"]["message"]) == (400, True), answer
    assert served[0].under_way == 0
    named = reason.partition(" ")[0].rstrip(".:")
    assert (answer["error"]["param"] or "").startswith(named if named.partition(".")[0] in FIELDS else "")


def test_a_response_format_beside_tools(served):
    schema = {"type": "object", "properties": {"n": {"const": 1}}, "required": ["n"], "additionalProperties": False}
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    for seed in range(4):
        body = wanted | {"seed": seed, "max_tokens": 600, "parallel_tool_calls": False}  # so that it ends
        (choice,) = post(served, body)[1]["choices"]
        if choice["finish_reason"] == "tool_calls":
            assert choice["message"]["content"] is None
        else:
            assert json.loads(choice["message"]["content"]) == {"n": 1}


def test_the_effort_of_reasoning(served, monkeypatch):
    for template, effort, want in (
        ("{{ reasoning_effort }}", "low", "low"),
        ("{{ reasoning_effort }}", "none", "none"),
        ("{{ enable_thinking }}", "none", "False"),
    ):
        llm, seen = served[0].llm, []
        monkeypatch.setattr(llm, "chat_template", ChatTemplate(template))
        monkeypatch.setattr(llm, "encode", lambda texts, seen=seen: [seen.append(texts[0]) or [65]])
        assert post(served, {"tools": None, "reasoning_effort": effort, "max_tokens": 1})[0] == 200
        assert seen == [want]
    status, answer = post(served, {"tools": None, "reasoning_effort": "low"})
    assert (status, answer["error"]["param"]) == (400, "reasoning_effort")


def test_a_template_without_tools(served, monkeypatch):
    monkeypatch.setattr(served[0].llm, "chat_template", ChatTemplate())
    status, answer = post(served, {})
    assert (status, "has no place for tools" in answer["error"]["message"]) == (400, True)
    assert post(served, {"tool_choice": "none", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("kind", ["llama3_json", "mistral"])
def test_other_families(served, monkeypatch, kind):
    monkeypatch.setattr(served[0].llm, "chat_template", ChatTemplate(TEMPLATES[kind]))
    with saying(served[0].llm, written(kind, ("now", {}))):
        message = post(served, {})[1]["choices"][0]["message"]
    assert told(message) == [("now", "{}")]
    answered = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "12:00"}
    assert post(served, {"messages": [*ASK, message, answered], "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("name", ["tools over HTTP", "tools in a program"])
def test_the_round_trip_of_the_docs(served, capsys, name):
    pytest.importorskip("openai")
    llm, port = served[0].llm, served[1]
    (text,) = re.findall(rf"<!-- snippet: {name} -->\n```python\n(.*?)\n```", DOCS.read_text(), re.DOTALL)
    called = written("hermes", ("weather", {"city": "Łódź"}))
    with saying(llm, called, "It rains in Łódź."):
        exec(
            compile(text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace('"mine"', '"cs336"'), DOCS, "exec"),
            {"llm": llm},
        )
    assert "It rains in Łódź." in capsys.readouterr().out
    until(lambda: not llm.engine.busy)
