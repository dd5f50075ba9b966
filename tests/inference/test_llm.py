"""A model with its engine, as programs use it."""

import numpy as np
import pytest
import torch

from cs336.cli import main
from cs336.inference import LLM, SamplingParams, generate
from cs336.inference.load import load_model
from cs336.models import BlockConfig, Transformer, TransformerConfig, save_pretrained
from cs336.nn import AttentionConfig, LongRopeScaling, RopeConfig
from cs336.tokenizer import Tokenizer

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"])
CONFIG = TransformerConfig(272, 96, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)
PROMPTS = ["hello", "", "a much longer prompt, of 36 bytes", "naïve", "<|endoftext|>x"]
GREEDY = SamplingParams(temperature=0, max_tokens=20)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return Transformer(CONFIG).eval()


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, TOKENIZER, quiet=True, page_size=16, max_seqs=4)


def test_texts_are_those_of_generate(model, llm):
    for params in (GREEDY, SamplingParams(temperature=0, max_tokens=200, stop=["\n", "a"])):
        want = generate(model, TOKENIZER, PROMPTS, params)
        got = llm.generate(PROMPTS, params)
        assert [(o.prompt, o.text, o.token_ids, o.finish_reason) for o in got] == [
            (c.prompt, c.text, c.token_ids, c.finish_reason) for c in want
        ]
        for output in got:
            assert "".join(llm.stream(output.prompt, params)) == output.text
    assert llm.engine.cache.in_use == 0


@pytest.fixture
def longrope(tmp_path):
    """A model in a directory whose original context is of 24 tokens."""
    torch.manual_seed(6)
    scaling = LongRopeScaling((1.0, 1.1, 1.2, 1.3), (1.0, 2.0, 4.0, 6.0), 24, 4.0)
    block = BlockConfig(AttentionConfig(4, 2), positions=RopeConfig(100.0, scaling=scaling))
    config = TransformerConfig(272, 96, 2, 32, init_std=0.3, layers=(block,))
    save_pretrained(Transformer(config), tmp_path, TOKENIZER)
    return tmp_path


def test_longrope_is_chosen_by_max_len(longrope):
    """Not by the length of a text."""
    long, short = load_model(longrope, "cpu"), load_model(longrope, "cpu", max_len=24)
    assert (long.config.context_length, short.config.context_length) == (96, 24)
    params, texts = SamplingParams(temperature=0, max_tokens=15), []
    for model, max_len in ((long, 25), (short, 24)):
        texts.append(generate(model, TOKENIZER, ["text, two"], params)[0].token_ids)
        llm = LLM(longrope, device="cpu", quiet=True, page_size=8, max_seqs=2, max_len=max_len)
        assert llm.generate("text, two", params)[0].token_ids == texts[-1]
    assert texts[0] != texts[1]


def test_generate_reads_a_longrope_for_what_it_writes(longrope, capsys):
    """The verb: with its short factors where prompt and answer fit the original context, drafted or not."""
    command = ["generate", str(longrope), "--prompt", "text, two", "--temperature", "0", "--ignore-eos"]
    for tokens, max_len in ((15, 24), (16, 25)):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        (want,) = generate(load_model(longrope, "cpu", max_len=max_len), TOKENIZER, ["text, two"], params)
        (other,) = generate(load_model(longrope, "cpu", max_len=49 - max_len), TOKENIZER, ["text, two"], params)
        assert want.text != other.text
        for drafting in ([], ["--draft", str(longrope)]):
            capsys.readouterr()
            assert main([*command, "--max-tokens", str(tokens), "--device", "cpu", *drafting]) == 0
            assert want.text in capsys.readouterr().out


def test_params_of_each_prompt_and_ids(llm):
    short, long = SamplingParams(temperature=0, max_tokens=2), GREEDY
    a, b = llm.generate(["hello", [*b"hello"]], [short, long])
    assert (a.prompt, b.prompt) == ("hello", None)
    assert a.prompt_token_ids == b.prompt_token_ids
    assert a.token_ids == b.token_ids[:2]
    (c,) = llm.generate([*b"hello"], long)
    assert c.token_ids == b.token_ids
    (d,) = llm.generate("hello", SamplingParams(n=3, temperature=2.0, max_tokens=5))
    assert [o.index for o in d.outputs] == [0, 1, 2]
    assert len({o.text for o in d.outputs}) == 3
    assert llm.generate([]) == []
    for ids in (torch.tensor([*b"hello"]), torch.tensor([[*b"hello"]]), torch.tensor([[*b"hello"]]).numpy()):
        (e,) = llm.generate(ids, long)
        assert e.token_ids == b.token_ids
    for prompts in (np.array([*b"hello"]), [*np.array([*b"hello"])], [torch.tensor([*b"hello"])], (*b"hello",)):
        (f,) = llm.generate(prompts, long)
        assert f.token_ids == b.token_ids
    for prompts in (None, 5, 1.5, [1.5], [None, "a"], b"hello", [b"hello"], {"prompt": "a"}, torch.tensor([0.5])):
        with pytest.raises(ValueError, match="a prompt is a text or a list of token ids, got"):
            llm.generate(prompts, short)
    with pytest.raises(ValueError, match="got one number"):
        llm.generate(torch.tensor(5))
    with pytest.raises(ValueError, match="params must be SamplingParams, got"):
        llm.generate(["a"], {"temperature": 0})
    with pytest.raises(ValueError, match="2 prompts and 1 params"):
        llm.generate(["a", "b"], [short])


def test_a_stream_that_is_left_ends_its_request(llm):
    pieces = llm.stream("hello", SamplingParams(temperature=0, max_tokens=60))
    first = next(pieces)
    (other,) = llm.generate("naïve", GREEDY)  # meanwhile the stream goes on
    assert first + next(pieces) == llm.generate("hello", GREEDY)[0].text[: len(first) + 1]
    assert other.text == llm.generate("naïve", GREEDY)[0].text
    pieces.close()
    assert not llm.engine.busy or not llm.engine.scheduler.running
    assert llm.engine.cache.in_use == 0


def test_scores_are_log_likelihoods(model, llm):
    prefix = "the cat sat on the mat, and "
    continuations = ["the dog", "a", [7, 8, 9]]
    scores = llm.score([prefix] * 3, continuations, top=1)
    for continuation, tokens in zip(continuations, scores, strict=True):
        ids = [*continuation.encode()] if isinstance(continuation, str) else continuation
        whole = [*prefix.encode(), *ids]
        with torch.inference_mode():
            log_p = model(torch.tensor([whole]))[0].log_softmax(-1)
        assert [t.id for t in tokens] == ids
        for i, token in enumerate(tokens, len(prefix) - 1):
            assert token.logprob == pytest.approx(log_p[i, token.id].item(), abs=1e-4)
            assert token.top[0][0] == int(log_p[i].argmax())
    for empty in ([], ""):  # as a prompt, an empty text would begin a document
        with pytest.raises(ValueError, match="empty continuation"):
            llm.score(["a"], [empty])
    with pytest.raises(ValueError, match="empty prompt"):
        llm.score(["a", []], ["b", [7, 8]])
    with pytest.raises(ValueError, match="2 prompts and 1 continuations"):
        llm.score(["a", "b"], ["c"])


def test_from_a_directory(tmp_path, model, llm, capsys):
    save_pretrained(model, tmp_path, TOKENIZER)
    read = LLM(tmp_path, device="cpu", page_size=16, max_seqs=4)
    assert "memory: " in capsys.readouterr().err
    assert [o.outputs for o in read.generate(PROMPTS, GREEDY)] == [o.outputs for o in llm.generate(PROMPTS, GREEDY)]
    half = LLM(tmp_path, tmp_path / "tokenizer.json", device="cpu", dtype=torch.bfloat16, quiet=True, max_seqs=1)
    assert half.model.embedding.weight.dtype == torch.bfloat16
    assert capsys.readouterr().err == ""
    for name, dtype in (("bfloat16", torch.bfloat16), ("auto", torch.float32)):
        assert LLM(tmp_path, dtype=name, quiet=True, max_seqs=1).model.embedding.weight.dtype == dtype
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, bfloat16, float16, .* got 'int8'"):
        LLM(tmp_path, dtype="int8", quiet=True)
    for whole in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"of these, got {whole}"):
            LLM(tmp_path, dtype=whole, quiet=True)


def test_chat(tmp_path, model, llm):
    messages = [{"role": "user", "content": "hi"}]
    (answer,) = llm.chat(messages, GREEDY)
    written = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.prompt == written
    assert answer.text == llm.generate(written, GREEDY)[0].text
    assert [o.text for o in llm.chat([messages, messages], GREEDY)] == [answer.text] * 2
    save_pretrained(model, tmp_path, TOKENIZER)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    other = LLM(tmp_path, device="cpu", quiet=True, max_seqs=1, page_size=16)
    assert other.chat(messages, GREEDY)[0].prompt == "hi!"


def test_the_weights_of_a_module_that_is_trained_on(model):
    trained = Transformer(CONFIG).eval()
    llm = LLM(trained, TOKENIZER, quiet=True, page_size=16, max_seqs=2)
    before = llm.generate("hello", GREEDY)[0].text
    with torch.no_grad():
        for mine, other in zip(trained.parameters(), model.parameters(), strict=True):
            mine.copy_(other)  # an optimizer's step, in place
    llm.update_weights(trained)
    assert llm.generate("hello", GREEDY)[0].text == generate(model, TOKENIZER, "hello", GREEDY)[0].text != before


def test_without_a_tokenizer(model):
    llm = LLM(model, quiet=True, max_seqs=1, page_size=16)
    assert len(llm.generate([[1, 2]], GREEDY)[0].token_ids) == 20
    assert llm.generate([[1, 2]], GREEDY)[0].text == ""
    for call in (lambda: llm.generate("a"), lambda: next(llm.stream([1]))):
        with pytest.raises(ValueError, match="tokenizer"):
            call()
    with pytest.raises(ValueError, match="of one continuation"):
        next(LLM(model, TOKENIZER, quiet=True).stream("a", SamplingParams(n=2)))


def test_generate_names_what_it_does_not_do(model):
    with pytest.raises(ValueError, match=r"do not take logprobs, n: use cs336.inference.LLM"):
        generate(model, TOKENIZER, "a", SamplingParams(n=2, logprobs=1))
    greedy = generate(model, TOKENIZER, "hello", GREEDY)[0].token_ids
    (cut,) = generate(model, TOKENIZER, "hello", SamplingParams(temperature=0, stop_token_ids=(greedy[4],)))
    assert cut.token_ids == greedy[: greedy.index(greedy[4])]
