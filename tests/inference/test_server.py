"""The server's answers are the engine's, in OpenAI's words, and bad requests get an error that says what was wrong."""

import asyncio
import json
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from inference.serving import TOKENIZER, ask, connect, listening, tiny_llm, until

from cs336.inference import SamplingParams
from cs336.inference.server.config import ServerConfig
from cs336.inference.server.worker import Worker

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def served():
    with listening(tiny_llm(), ServerConfig(max_requests=16, max_body_bytes=20_000, timeout=120)) as found:
        yield found


def post(served, body, path="/v1/completions", **how):
    """(status, answer)."""
    status, found = asyncio.run(whole(served[1], body, path, **how))
    return status, json.loads(found) if found else None


async def whole(port, body, path, **how):
    reader, writer = await connect(port, body, path, **how)
    status = int((await reader.readline()).split()[1])
    body = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    return status, body


def events(served, body, path="/v1/completions"):
    status, found = asyncio.run(ask(served[1], body | {"stream": True}, path=path))
    assert status == 200
    assert found[-1] == b"[DONE]"
    return [json.loads(event) for event in found[:-1]]


def test_completions(served, llm):
    want = [o.text for o in llm.generate(["hello", "naïve"], GREEDY)]
    body = {"prompt": ["hello", "naïve"], "temperature": 0, "max_tokens": 12}
    status, answer = post(served, body)
    assert status == 200
    assert [c["text"] for c in answer["choices"]] == want
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert {c["finish_reason"] for c in answer["choices"]} == {"length"}
    used = answer["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"]) == (11, 24, 35)
    for prompt in ([*b"hello"], [[*b"hello"]], "hello"):
        _, answer = post(served, body | {"prompt": prompt})
        assert [c["text"] for c in answer["choices"]] == want[:1]
    texts = {0: "", 1: ""}
    found = events(served, body | {"stream_options": {"include_usage": True}})
    for event in found[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert [texts[0], texts[1]] == want
    assert found[-1]["usage"]["completion_tokens"] == 24


def test_samples_and_seeds(served, llm):
    params = SamplingParams(temperature=2.0, max_tokens=8, seed=4, n=3)
    want = [o.text for o in llm.generate("hello", params)[0].outputs]
    body = {"prompt": "hello", "temperature": 2.0, "max_tokens": 8, "seed": 4, "n": 3}
    assert [c["text"] for c in post(served, body)[1]["choices"]] == want
    assert len(set(want)) == 3


def test_what_lm_eval_asks(served, llm):
    """Its local-completions sends ids, echoed with log-probabilities, and reads [context:-1] of what it gets."""
    context, continuation = [*b"the cat "], [*b"sat"]
    body = {"model": None, "prompt": [context + continuation, [*context, *b"x"]], "max_tokens": 1, "logprobs": 1}
    _, answer = post(served, body | {"echo": True, "temperature": 0, "seed": 1234})
    scores = llm.score([context] * 2, [continuation, [*b"x"]], top=1)
    for choice, tokens in zip(answer["choices"], scores, strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(context) + len(tokens) + 1
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert found["token_logprobs"][len(context) : -1] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
        for text, top, token in zip(
            found["tokens"][len(context) :], found["top_logprobs"][len(context) :], tokens, strict=False
        ):
            assert (max(top, key=top.get) == text) == (token.top[0][0] == token.id)
        assert found["text_offset"][:3] == [0, 1, 2]
        assert choice["text"].startswith("the cat ")


def test_echo_alone(served):
    _, answer = post(served, {"prompt": "abc", "echo": True, "max_tokens": 0, "logprobs": 0})
    (choice,) = answer["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 0)
    usage = {"stream_options": {"include_usage": True}}
    *_, last = events(served, {"prompt": "abc", "echo": True, "max_tokens": 0} | usage)
    assert (last["usage"]["completion_tokens"], last["usage"]["total_tokens"]) == (0, 3)
    found = events(served, {"prompt": "abc", "echo": True, "max_tokens": 4, "temperature": 0, "logprobs": 1})
    _, answer = post(served, {"prompt": "abc", "echo": True, "max_tokens": 4, "temperature": 0, "logprobs": 1})
    assert "".join(e["choices"][0]["text"] for e in found) == answer["choices"][0]["text"]
    tokens = [t for e in found for t in (e["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == answer["choices"][0]["logprobs"]["tokens"]


def test_chat(served, llm):
    messages = [{"role": "user", "content": "hi"}]
    (want,) = llm.chat(messages, GREEDY)
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    path = "/v1/chat/completions"
    _, answer = post(served, body, path)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text}
    content = choice["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 12
    assert bytes(b for entry in content for b in entry["bytes"]).decode(errors="replace") == want.text
    found = events(served, body, path)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in found) == want.text
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    streamed = [e for event in found for e in (event["choices"][0].get("logprobs") or {"content": []})["content"]]
    assert [e["token"] for e in streamed] == [e["token"] for e in content]
    assert [e["logprob"] for e in streamed] == pytest.approx([e["logprob"] for e in content], abs=1e-4)
    _, free = post(served, {"messages": messages, "temperature": 0}, path)  # until there is no more room
    assert free["usage"]["total_tokens"] == 128


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_ends_once_though_the_engine_has_finished_before_it_is_written(served, monkeypatch, path):
    held, send = [], Worker._send

    def at_the_end(self, messages):
        held.extend(messages)
        if any(message is None for _, message in messages):
            send(self, held[:])
            held.clear()

    monkeypatch.setattr(Worker, "_send", at_the_end)
    asked = {"prompt": "hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hello"}]}
    found = events(served, asked | {"temperature": 0, "max_tokens": 8}, path=path)
    reasons = [event["choices"][0]["finish_reason"] for event in found]
    assert len(reasons) > 4
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_stop_strings(served, llm):
    whole_text = llm.generate("hello", GREEDY)[0].text
    stop = whole_text[4:6]
    _, answer = post(served, {"prompt": "hello", "temperature": 0, "max_tokens": 12, "stop": [stop, "never"]})
    assert answer["choices"][0]["text"] == whole_text[: whole_text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_token_that_ends_the_text_is_among_those_told(served, llm):
    first, *_ = llm.generate("hello", GREEDY)[0].token_ids
    body = {
        "prompt": "hello",
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 0,
        "echo": True,
        "stop_token_ids": [first],
    }
    (choice,) = post(served, body)[1]["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "stop")
    assert len(choice["logprobs"]["tokens"]) == 5 + 1  # lm-eval leaves out the last


def test_tokens_and_models(served):
    _, answer = post(served, {"prompt": "hé<|endoftext|>"}, "/tokenize")
    assert answer == {"tokens": [104, 195, 169, 256], "count": 4, "max_model_len": 128}
    assert post(served, {"tokens": answer["tokens"]}, "/detokenize") == (200, {"prompt": "hé<|endoftext|>"})
    _, answer = post(served, {"messages": [{"role": "user", "content": "a"}]}, "/tokenize")
    assert TOKENIZER.decode(answer["tokens"]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    _, answer = post(served, {"prompt": [97]}, "/tokenize")  # which takes one text
    assert answer["error"]["message"] == "prompt: Input should be a valid string"
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        assert post(served, body | {"model": "cs336"}, path)[0] == 200
        assert post(served, body | {"model": "other"}, path)[0] == 404


def test_what_changes_no_answer_is_passed_over(served):
    body = {"prompt": "hello", "temperature": 2.0, "max_tokens": 8, "seed": 4}
    want = post(served, body | {"top_k": 1})[1]["choices"]
    given = {"user": "me", "store": False, "metadata": {}, "service_tier": "auto", "extra_body": {"top_k": 1}}
    assert post(served, body | given)[1]["choices"] == want
    nulls = dict.fromkeys(
        ("n", "top_p", "stop", "stream", "presence_penalty", "logit_bias", "stop_token_ids", "suffix")
    )
    assert post(served, body | given | nulls)[1]["choices"] == want
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "function_call": "none"}
    assert post(served, chat | {"tools": None, "top_logprobs": None, "n": None}, "/v1/chat/completions")[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"temperature": -1}, 400, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": float("nan")}, 400, "temperature: "),
        ({"max_tokens": "many"}, 400, "max_tokens: "),
        ({"prompt": []}, 400, "prompt must be 1 to 1024 prompts"),
        ({"prompt": [[]]}, 400, "the prompt is empty"),
        ({"prompt": [[1, 999]]}, 400, "there is no token 999"),
        ({"prompt": [-4]}, 400, "prompt must be a text, token ids, or a list of either"),
        ({"prompt": {"a": 1}}, 400, "prompt must be a text, token ids, or a list of either"),
        ({"stop": 5}, 400, "stop must be a text, or a list of at most 256 texts"),
        ({"prompt": "a" * 128}, 400, "128 tokens, which leaves no room in a sequence of 128"),
        ({"prompt": "a" * 25_000}, 413, "no more than 20000 bytes"),
        ({"n": 17}, 400, "17 continuations were asked for at once, 16 is the most"),
        ({"best_of": 4}, 400, "best_of is not supported"),
        ({"temprature": 0, "user": "me", "guided_json": {}}, 400, "argument supplied: guided_json, temprature"),
        ({"extra_body": {"top_k": 3, "wrong": 1}}, 400, "argument supplied: wrong"),
        ({"max_tokens": 128}, 400, "max_tokens is 128, and the model's context length leaves 127 behind the prompt"),
        ({"logprobs": 21}, 400, "logprobs: "),
        ({"stop": ["a"] * 257}, 400, "stop"),
        ({"stop": [""]}, 400, "stop holds an empty string"),
        ({"logit_bias": {"3": 1000}}, 400, "logit_bias of token 3 must be in"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"model": "other"}, 404, "there is no model 'other' here, but 'cs336'"),
        (b"{", 400, "the body is not JSON"),
        (b"[" * 15_000, 400, "error parsing the body"),
        (b"\xff\xfe", 400, ""),
        (b"", 400, "the body is empty: expected a JSON object"),
        (b"null", 400, ""),
    ],
)
def test_bad_requests(served, body, status, message):
    got, answer = post(served, body if isinstance(body, bytes) else {"prompt": "a"} | body)
    assert got == status, answer
    assert message in answer["error"]["message"]
    assert served[0].under_way == 0


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": 5}, "prompt", None),
        ({"prompt": []}, "prompt", None),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"max_tokens": 500}, "max_tokens", None),
        ({"min_tokens": 99, "max_tokens": 9}, "min_tokens", None),
        ({"stop": [""]}, "stop", None),
        ({"stop_token_ids": "a"}, "stop_token_ids", None),
        ({"logit_bias": {"3": 1000}}, "logit_bias", None),
        ({"min_p": 2}, "min_p", None),
        ({"response_format": {"type": "xml"}}, "response_format.type", None),
        ({"best_of": 4}, "best_of", None),
        ({"model": "other"}, "model", "model_not_found"),
        ({"unknown": 1}, None, None),
    ],
)
def test_errors_say_which_field_they_are_of(served, body, param, code):
    _, answer = post(served, {"prompt": "a"} | body)
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "there are no messages"),
        ({"messages": [{"content": "a"}]}, 'message 0 must be {"role"'),
        ({"messages": "hi"}, "messages: "),
        ({"tools": [{}]}, 'tools.0 must be {"type": "function"'),
        ({"functions": [{}]}, "functions is not supported"),
        ({"response_format": {"type": "xml"}}, "response_format.type: "),
        ({"chat_template_kwargs": {"messages": 1}, "messages": []}, "there are no messages"),
    ],
)
def test_bad_chats(served, body, message):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} | body
    status, answer = post(served, body, "/v1/chat/completions")
    assert (status, message in answer["error"]["message"]) == (400, True)
    if message.endswith(" is not supported"):
        assert answer["error"]["param"] == message.split()[0]
    if message.startswith("message 0"):
        assert answer["error"]["param"] == "messages.0"
    assert served[0].under_way == 0


def test_lone_surrogates(served):
    status, answer = post(served, rb'{"prompt": "\ud800x", "echo": true, "max_tokens": 1}')
    assert (status, answer["choices"][0]["text"][:2]) == (200, "\ufffdx")


def test_too_many_are_told_to_come_back(served):
    server, port = served

    async def crowd():
        long = {"prompt": "a", "max_tokens": 100, "temperature": 0, "n": 16, "stream": True}
        first = await connect(port, long)
        await first[0].readuntil(b"data: ")
        reader, writer = await connect(port, {"prompt": "b"})
        head = await reader.readuntil(b"\r\n\r\n")
        for w in (writer, first[1]):
            w.close()
        return head.lower()

    head = asyncio.run(crowd())
    assert b" 429 " in head
    assert b"retry-after: 1" in head
    until(lambda: server.under_way == 0)
    until(lambda: not server.llm.engine.busy)
    server.llm.engine.check()


def test_who_leaves_is_cancelled(served):
    server, port = served
    engine = server.llm.engine

    async def leave(stream):
        sampled = engine.stats.sampled_tokens
        reader, writer = await connect(port, {"prompt": "a", "max_tokens": 100, "temperature": 0, "stream": stream})
        if stream:
            await reader.readuntil(b"data: ")
        else:
            while engine.stats.sampled_tokens < sampled + 2:
                await asyncio.sleep(0.001)
        writer.transport.abort()
        return sampled

    for stream in (True, False):
        sampled = asyncio.run(leave(stream))
        until(lambda: server.under_way == 0 and not engine.busy)
        assert engine.stats.sampled_tokens - sampled < 100
        assert engine.cache.in_use == 0


def test_a_key():
    with listening(tiny_llm(), ServerConfig(api_key="séсret")) as served:
        for head, status in (
            ("", 401),
            ("Authorization: Bearer wrong\r\n", 401),
            ("Authorization: Bearer séсret\r\n", 200),
        ):
            got, answer = post(served, {"prompt": "a"}, head=head)
            assert got == status
            assert status == 200 or answer["error"]["code"] == "invalid_api_key"


def test_timeouts():
    with listening(tiny_llm(), ServerConfig(timeout=0.01)) as served:
        long = {"prompt": "a", "max_tokens": 120, "ignore_eos": True}
        assert post(served, long)[0] == 504
        _, found = asyncio.run(ask(served[1], long | {"stream": True}))
        assert b"took too long" in found[-1]
        until(lambda: not served[0].llm.engine.busy)
        until(lambda: served[0].llm.engine.cache.in_use == 0)  # a moment after it left the scheduler


def test_an_engine_that_fails_says_so(monkeypatch):
    llm = tiny_llm()
    with listening(llm) as served:

        def fail(step):
            raise RuntimeError("the device is lost")

        monkeypatch.setattr("threading.excepthook", lambda args: None)
        monkeypatch.setattr(llm.engine.runner, "launch", fail)
        assert post(served, {"prompt": "a"})[0] == 503
        until(lambda: served[0].worker.failure is not None)
        status, answer = post(served, {"prompt": "a"})
        assert (status, "the device is lost" in answer["error"]["message"]) == (503, True)


def test_metrics_health_and_the_page(served):
    import urllib.request

    post(served, {"prompt": "abcdefgh" * 3, "max_tokens": 4})
    post(served, {"prompt": "abcdefgh" * 3, "max_tokens": 4})

    def get(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{served[1]}{path}") as answer:
            return answer.read().decode(), answer.headers

    lines = get("/metrics")[0].splitlines()
    kinds = dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))
    counts = {name for name, kind in kinds.items() if kind == "counter"}
    assert counts == {name for name in kinds if name.endswith("_total")}
    assert {"cs336_prompt_tokens_total", "cs336_drafted_tokens_total", "cs336_requests_total"} < counts
    rows = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(rows["cs336_time_to_first_token_seconds_count"]) >= 2
    assert float(rows["cs336_inter_token_latency_seconds_count"]) >= 6
    assert float(rows["cs336_prefix_cached_tokens_total"]) >= 16
    assert float(rows['cs336_requests_total{outcome="finished"}']) >= 2
    assert 0 < float(rows["cs336_prefix_hit_share"]) < 1
    assert json.loads(get("/health")[0]) == {"status": "ok"}
    (model,) = json.loads(get("/v1/models")[0])["data"]
    assert (model["id"], model["max_model_len"]) == ("cs336", 128)
    page, headers = get("/")
    assert "v1/chat/completions" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_the_openai_client(served, llm):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served[1]}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["cs336"]
    assert client.models.retrieve("cs336").id == "cs336"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("of/others")
    done = client.completions.create(model="cs336", prompt="hello", temperature=0, max_tokens=12, logprobs=1)
    want = llm.generate("hello", GREEDY)[0].text
    assert done.choices[0].text == want
    assert len(done.choices[0].logprobs.token_logprobs) == 12
    pieces = client.completions.create(model="cs336", prompt="hello", temperature=0, max_tokens=12, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == want
    messages = [{"role": "user", "content": "hi"}]
    answer = llm.chat(messages, GREEDY)[0].text
    chat = client.chat.completions.create(
        model="cs336", messages=messages, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].message.content == answer
    assert len(chat.choices[0].logprobs.content) == 12
    parts = client.chat.completions.create(
        model="cs336",
        messages=messages,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts = list(parts)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == answer
    assert parts[-1].usage.completion_tokens == 12
    with pytest.raises(openai.BadRequestError, match="top_logprobs takes logprobs"):
        client.chat.completions.create(model="cs336", messages=messages, top_logprobs=2)
    with pytest.raises(openai.BadRequestError, match="leaves no room"):
        client.completions.create(model="cs336", prompt="a" * 200)
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="gpt-4", prompt="a")


def test_a_body_that_never_comes(served, monkeypatch):
    monkeypatch.setattr("cs336.utils.http_server.BODY_SECONDS", 0.1)

    async def dawdle():
        reader, writer = await asyncio.open_connection("127.0.0.1", served[1])
        writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        status = await reader.readline()
        writer.close()
        return status

    begin = time.monotonic()
    assert b" 408 " in asyncio.run(dawdle())
    assert time.monotonic() - begin < 10
