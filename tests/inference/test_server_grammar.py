"""What clients send for texts of a grammar, and what they are told of one that is none."""

import asyncio
import importlib.util
import json
import threading

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("llguidance")

from inference.serving import ask, listening, tiny_llm, until

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "digit", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def served():
    with listening(tiny_llm(max_len=128)) as found:
        yield found


def post(served, body, path=CHAT):
    body = ({"messages": MESSAGES} if path == CHAT else {"prompt": "a"}) | {"seed": 3, "max_tokens": 70} | body
    status, (answer,) = asyncio.run(ask(served[1], body, path=path))
    return status, json.loads(answer)


def content(served, body, path=CHAT):
    status, answer = post(served, body, path)
    assert status == 200, answer
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"] if path == CHAT else choice["text"]


def test_forms(served):
    for path in (CHAT, "/v1/completions"):
        for body in ({"response_format": NAMED}, {"structured_outputs": {"json": SCHEMA}}):
            found = json.loads(content(served, body, path))
            assert list(found) == ["n"]
            assert found["n"] in range(10)
        as_text = {"structured_outputs": {"json": json.dumps(SCHEMA)}}
        assert list(json.loads(content(served, as_text, path))) == ["n"]
        assert content(served, {"structured_outputs": {"regex": "[ab]{5}c"}}, path)[5] == "c"
        assert content(served, {"structured_outputs": {"choice": ["yes", "no"]}}, path) in ("yes", "no")
    bias = {"logit_bias": {str(ord("}")): 100}}
    for body in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert isinstance(json.loads(content(served, body | bias)), dict)
    assert post(served, {"response_format": {"type": "text"}, "max_tokens": 3})[0] == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, 'takes {"json_schema": {"schema": ...}}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "json_schema.schema: Field required",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "Invalid type: x"),
        ({"response_format": {"type": "grammar"}}, "response_format.type: "),
        ({"structured_outputs": {"regex": "("}}, "regex cannot be followed: "),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "got regex and choice"),
        ({"structured_outputs": {"json": {}, "json_object": True}}, "json and json_object: give one"),
        ({"structured_outputs": {"json": "{"}}, "json_schema is not JSON"),
        ({"structured_outputs": {"choice": []}}, "choice is an empty list"),
        ({"structured_outputs": {"regex": "a", "choice": []}}, "choice is an empty list"),
        ({"structured_outputs": {}}, "takes one of json, json_object, regex and choice, got none"),
        ({"structured_outputs": {"json_object": False}}, "takes one of json"),
        ({"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}}, "grammar: "),  # which llguidance gives up
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs.grammar: "),
        ({"structured_outputs": {"choice": [""]}}, "allows no text but the empty one"),
        ({"structured_outputs": {"regex": "a"}, "response_format": NAMED}, "both say what the text must be"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "and min_tokens does: give one of them"),
        ({"guided_regex": "a"}, "argument supplied: guided_regex"),
    ],
)
def test_what_is_refused(served, body, message):
    status, answer = post(served, {"max_tokens": 5} | body)
    assert (status, message in answer["error"]["message"]) == (400, True), answer
    assert served[0].under_way == 0


def test_the_missing_extra_is_named(monkeypatch):
    found = importlib.util.find_spec
    with listening(tiny_llm()) as served:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llguidance" else found(name))
        status, answer = post(served, {"response_format": NAMED})
    assert status == 400
    assert "pip install 'cs336[structured]'" in answer["error"]["message"]


def test_streams_beside_free_texts_by_the_openai_client(served):
    openai = pytest.importorskip("openai")
    made = {"base_url": f"http://127.0.0.1:{served[1]}/v1", "api_key": "none", "max_retries": 0}
    free = {"model": "cs336", "messages": MESSAGES, "seed": 4, "max_tokens": 30}
    alone = openai.OpenAI(**made).chat.completions.create(**free).choices[0].message.content

    async def streamed(client, **how):
        parts = await client.chat.completions.create(model="cs336", messages=MESSAGES, stream=True, **how)
        return "".join([part.choices[0].delta.content or "" async for part in parts if part.choices])

    async def together():
        async with openai.AsyncOpenAI(**made) as client:
            bound = [streamed(client, seed=i, response_format=NAMED) for i in range(6)]
            regex = streamed(client, seed=1, extra_body={"structured_outputs": {"regex": "(é|日){7}"}})
            plain = client.chat.completions.create(**free)
            return await asyncio.gather(*bound, regex, plain)

    *texts, seven, beside = asyncio.run(together())
    assert all(json.loads(text)["n"] in range(10) for text in texts)
    assert len(seven) == 7
    assert beside.choices[0].message.content == alone
    until(lambda: not served[0].llm.engine.busy)
    served[0].llm.engine.check()


def test_a_grammar_is_read_beside_the_event_loop(served, monkeypatch):
    """Others are answered meanwhile."""
    engine, reads = served[0].llm.engine, threading.Event()
    validate = engine.validate

    def slow(ids, params):
        if params.grammar is not None and threading.current_thread() is not served[0].worker:
            assert reads.wait(60)
        validate(ids, params)

    monkeypatch.setattr(engine, "validate", slow)

    async def both():
        bound = asyncio.create_task(ask(served[1], {"prompt": "a", "structured_outputs": {"regex": "a"}}))
        free = await ask(served[1], {"prompt": "a", "max_tokens": 3})
        reads.set()
        return free[0], (await bound)[0]

    assert asyncio.run(both()) == (200, 200)


def test_what_the_engine_refuses_late_ends_that_request_alone(served, monkeypatch):
    def refuse(*_):
        raise ValueError("not this one")

    with monkeypatch.context() as patch:
        patch.setattr(served[0].llm.engine, "add", refuse)
        status, answer = post(served, {"max_tokens": 3})
    assert (status, answer["error"]["message"]) == (400, "not this one")
    assert post(served, {"max_tokens": 3})[0] == 200
