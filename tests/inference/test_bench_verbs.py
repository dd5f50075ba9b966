"""`cs336 bench offline|latency|serve` and `cs336 chat`, as they are typed."""

import io
import json
import re
import socket
import sys

import pytest
import torch
from inference.serving import CONFIG, TOKENIZER, listening, tiny_llm

from cs336.cli import main
from cs336.inference import LLM, SamplingParams
from cs336.inference.bench import Load, Times, run_engine, summary
from cs336.inference.talk import Talk
from cs336.models import Transformer, save_pretrained

LOAD = ["--num-requests", "6", "--input-len", "3", "9", "--output-len", "2", "5"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    save_pretrained(Transformer(CONFIG), path, TOKENIZER)
    return str(path)


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_load():
    requests = Load(50, (3, 9), (2, 5), shared_prefix=4).requests(100)
    assert requests == Load(50, (3, 9), (2, 5), shared_prefix=4).requests(100)
    assert {len(ids) for ids, _ in requests} == set(range(7, 14))
    assert {p.max_tokens for _, p in requests} == {2, 3, 4, 5}
    assert len({tuple(ids[:4]) for ids, _ in requests}) == 1
    assert all(0 <= i < 100 for ids, _ in requests for i in ids)
    with pytest.raises(ValueError, match="input_len must be 1 <= fewest <= most, got 9 and 3"):
        Load(input_len=(9, 3))


def test_a_summary():
    found = summary([Times(0.0, [1.0, 1.5, 2.5]), Times(1.0, [1.25])], 4.0)
    assert (found["requests"], found["output_tokens"], found["tok_s"], found["req_s"]) == (2, 4, 1.0, 0.5)
    assert (found["ttft_p50_ms"], found["ttft_p99_ms"]) == (250.0, 1000.0)
    assert (found["itl_p50_ms"], found["itl_p99_ms"], found["tpot_p50_ms"]) == (500.0, 1000.0, 750.0)


def test_what_is_counted():
    llm = tiny_llm()
    requests = [([1, 2, 3] * 8, SamplingParams(max_tokens=4, ignore_eos=True))] * 3
    found = run_engine(llm, requests)
    assert (found["input_tokens"], found["output_tokens"]) == (72, 12)
    assert found["cached_tokens"] == 2 * 16
    assert 0 < found["cache_peak"] <= 1
    assert {"mbu", "mfu"} <= found.keys()


def test_lengths_fit_the_context():
    fitted = Load(input_len=(100, 1024), output_len=(10, 1024), shared_prefix=8).within(256)
    assert (fitted.input_len, fitted.output_len) == ((100, 120), (10, 128))
    assert Load(input_len=(1, 8), output_len=(1, 8)).within(256) == Load(input_len=(1, 8), output_len=(1, 8))


def test_offline_and_latency(directory, capsys):
    assert main(["bench", "offline", directory, "--device", "cpu", "--max-seqs", "4", *LOAD]) == 0
    found = last_line(capsys)
    assert (found["bench"], found["requests"]) == ("offline", 6)
    one = ["--input-len", "8", "--output-len", "4", "--device", "cpu", "--repeats", "1"]
    assert main(["bench", "latency", directory, *one]) == 0
    found = last_line(capsys)
    assert (found["bench"], found["output_tokens"], found["steps"]) == ("latency", 4, 4)
    assert main(["bench", "offline", directory, "--input-len", "5", "2"]) == 2


@pytest.mark.parametrize(
    ("verb", "option", "value", "message"),
    [
        ("latency", "--repeats", "0", "repeats must be 1 or more, got 0"),
        ("latency", "--batch-size", "0", "num_requests must be 1 or more, got 0"),
        ("latency", "--input-len", "0", "input_len must be 1 <= fewest <= most, got 0 and 0"),
        ("offline", "--num-requests", "0", "num_requests must be 1 or more, got 0"),
        ("offline", "--shared-prefix", "-1", "shared_prefix must be 0 tokens or more, got -1"),
        ("serve", "--concurrency", "0", "concurrency must be 1 or more, got 0"),
        ("serve", "--vocab-size", "0", "vocab_size must be 1 or more, got 0"),
    ],
)
def test_nothing_to_time_is_refused_before_a_model_is_read(capsys, verb, option, value, message):
    assert main(["bench", verb, "no-model", option, value]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-requests", "0", "max_requests must be 1 or more, got 0"),
        ("--max-body-bytes", "-1", "max_body_bytes must be 1 or more, got -1"),
        ("--timeout", "0", "timeout must be above 0 seconds, got 0.0"),
        ("--timeout", "nan", "timeout must be above 0 seconds, got nan"),
        ("--drain", "-1", "drain must be 0 seconds or more, got -1.0"),
        ("--api-key", "", "api_key is empty, which no client can send"),
    ],
)
def test_a_server_that_could_serve_nobody_is_refused(capsys, option, value, message):
    assert main(["serve", "no-model", "--port", "0", option, value]) == 2
    assert message in capsys.readouterr().err


def test_a_server_from_outside(capsys):
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    with listening(tiny_llm()) as (_, port):
        assert main(["bench", "serve", f"http://127.0.0.1:{port}", "--concurrency", "3", *LOAD]) == 0
        found = last_line(capsys)
        assert (found["bench"], found["requests"], found["concurrency"]) == ("serve", 6, 3)
        assert 0 < found["ttft_p50_ms"] <= found["ttft_p99_ms"]
        assert main(["bench", "serve", f"http://127.0.0.1:{port}", *LOAD, "--input-len", "500", "500"]) == 0
        assert re.match(r"to fit the context of (\d+): prompts of \((\d+), \2\) tokens", capsys.readouterr().out)
        assert main(["bench", "serve", f"http://127.0.0.1:{port}", *LOAD, "--vocab-size", "1000000"]) == 2
        assert "6 of 6 requests failed, the first with: HTTP/1.1 400" in capsys.readouterr().err


def test_talking(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/new\nhello\n" + "x" * 200 + "\n/quit\nnever said\n"))
    options = ["--device", "cpu", "--max-tokens", "5", "--temperature", "0", "--ignore-eos"]
    assert main(["chat", directory, "--system", "be brief", *options]) == 0
    out, err = capsys.readouterr()
    talk = Talk(
        LLM(directory, device="cpu", quiet=True, max_seqs=1),
        SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
        "be brief",
    )
    answer = "".join(talk.say("hello"))
    assert out.count(answer) == 2
    assert out.count("tokens/s]") == 2
    assert "leaves no room" in err


def test_a_warning_at_the_end_of_an_answer_has_a_line_of_its_own(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.setattr("sys.stderr", sys.stdout)
    assert (
        main(["chat", directory, "--device", "cpu", "--max-tokens", "500", "--temperature", "0", "--ignore-eos"]) == 0
    )
    assert "tokens/s]\ncs336: the text ends where the model's context of" in capsys.readouterr().out


def test_a_conversation_goes_on():
    talk = Talk(tiny_llm(), SamplingParams(temperature=0, max_tokens=3), None)
    first = "".join(talk.say("a"))
    assert talk.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": first}]
    pieces = talk.say("b")
    begun = next(pieces)
    pieces.close()
    assert talk.messages[3] == {"role": "assistant", "content": begun}
    with pytest.raises(ValueError, match="leaves no room"):
        next(talk.say("x" * 200))
    assert len(talk.messages) == 4
    talk.forget()
    assert talk.messages == []


def test_a_long_conversation_forgets_its_beginning():
    talk = Talk(tiny_llm(), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), "be brief")
    first = "".join(talk.say("a"))
    with pytest.warns(UserWarning, match="the oldest 2 messages do not fit any more and are forgotten"):
        "".join(talk.say("b" * 20))
    contents = [message["content"] for message in talk.messages]
    assert contents[:2] == ["be brief", "b" * 20]
    assert len(contents) == 3
    assert first not in contents


def test_a_context_without_room_for_any_answer(directory, capsys):
    assert main(["chat", directory, "--device", "cpu", "--system", "x" * 60]) == 2
    err = capsys.readouterr().err
    assert "the chat template and the system message take 141 of the 128 tokens" in err


def test_a_text_that_the_context_cuts(directory, capsys):
    options = ["--device", "cpu", "--prompt", "x" * 120, "--max-tokens", "40", "--temperature", "0", "--ignore-eos"]
    for more in ((), ("--draft", directory), ("--num-samples", "2"), ("--num-samples", "2", "--draft", directory)):
        assert main(["generate", directory, *options, *more]) == 0
        assert "context of 128 tokens does: 8 of max_tokens = 40 fit" in capsys.readouterr().err
    assert main(["generate", directory, *options, "--max-tokens", "8"]) == 0
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken(directory, capsys):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for verb in (["serve", directory], ["scaling", "api", "serve", f"{directory}-api"]):
            assert main([*verb, "--port", str(port)]) == 2
            out, err = capsys.readouterr()
            assert f"cs336: port {port} of 127.0.0.1 is taken: stop what listens there, or give another --port" in err
            assert "reading" not in err
            assert out == ""
    for options, message in (
        (["--port", "70000"], "port must be 0 to 65535"),
        (["--host", "no.such"], "cannot listen"),
    ):
        assert main(["serve", directory, *options]) == 2
        assert message in capsys.readouterr().err
