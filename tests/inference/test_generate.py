import dataclasses

import pytest
import torch

from cs336.inference import Completion, SamplingParams, generate, generate_ids, sample, stream
from cs336.inference.sampling import Uniforms
from cs336.models import Transformer, TransformerConfig
from cs336.tokenizer import Tokenizer

END = "<|endoftext|>"
TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], [END])
CONFIG = TransformerConfig(272, 48, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)
PROMPTS = ["hello", "", "a much longer prompt, of 36 bytes", "naïve"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return Transformer(CONFIG)


class Scripted(torch.nn.Module):
    """Stands in for a model: after n tokens it is sure that the next is script[n]."""

    def __init__(self, script, vocab_size=257, context_length=64):
        super().__init__()
        self.script = torch.tensor([*script, *[0] * (context_length + 1 - len(script))])
        self.config = dataclasses.replace(CONFIG, vocab_size=vocab_size, context_length=context_length, num_layers=1)
        self.real = Transformer(self.config)
        self.device, self.new_state = self.real.device, self.real.new_state
        self.end_ids, self.special_ids = (), {}

    def features(self, ids_BS, *, segments=None, state):
        counts_BS = state.lengths[:, None] + 1 + torch.arange(ids_BS.shape[1])
        self.real.features(ids_BS, segments=segments, state=state)
        return counts_BS[..., None]

    def logits(self, features):
        return 50.0 * torch.nn.functional.one_hot(self.script[features[..., 0]], self.config.vocab_size)


def says(text, end=True):
    ids = [0, *text.encode()]  # the prompt is one token
    return Scripted([*ids, 256] if end else ids)


def no_cache(model, ids, params, count):
    """Generation by the definition: the whole text again for each token."""
    uniforms = Uniforms(params.seed)
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[:, -1]
        ids += sample(logits, params, uniforms.draw([0])).tolist()
    return ids[-count:]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=15),
        SamplingParams(seed=1, max_tokens=15),
        SamplingParams(seed=2, max_tokens=15, temperature=0.7, top_k=40, top_p=0.95, min_p=0.01),
    ],
)
def test_equals_the_full_forward_for_each_row_alone(model, params):
    prompts = [[5, 6, 7], [300 % 272], list(range(30)), [9] * 11]
    got = generate_ids(model, prompts, params)
    assert got == [no_cache(model, prompt, params, 15) for prompt in prompts]
    same_length = torch.randint(0, 272, (3, 7))
    assert generate_ids(model, same_length, params) == [
        no_cache(model, row, params, 15) for row in same_length.tolist()
    ]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_prompt_gives_the_same_text_in_any_company(model, temperature):
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=60, stop=["q", "zz"])
    together = generate(model, TOKENIZER, PROMPTS, params)
    assert [c.prompt for c in together] == PROMPTS
    for completion in together:
        assert generate(model, TOKENIZER, completion.prompt, params) == [completion]
        assert "".join(stream(model, TOKENIZER, completion.prompt, params)) == completion.text
    assert generate(model, TOKENIZER, PROMPTS[::-1], params) == together[::-1]


def test_without_a_seed_rows_differ(model):
    completions = generate(model, TOKENIZER, ["same"] * 4, SamplingParams(temperature=5.0, max_tokens=20))
    assert len({c.text for c in completions}) == 4
    with_seed = generate(model, TOKENIZER, ["same"] * 4, SamplingParams(temperature=5.0, max_tokens=20, seed=1))
    assert len({c.text for c in with_seed}) == 1


def test_ends_at_the_end_of_text():
    model = says("that is all")
    assert generate(model, TOKENIZER, "x") == [Completion("x", "that is all", list(b"that is all"), "stop")]
    assert "".join(stream(model, TOKENIZER, "x")) == "that is all"
    assert generate_ids(model, [[7]], end_id=256) == [[*b"that is all", 256]]


@pytest.mark.parametrize("ends", [(105,), (300, 105)])
def test_ends_where_the_model_says(ends):
    model = says("that is all")
    model.end_ids = ends  # 105: i
    assert generate(model, TOKENIZER, "x") == [Completion("x", "that ", list(b"that "), "stop")]
    assert "".join(stream(model, TOKENIZER, "x")) == "that "
    assert generate_ids(model, [[7]]) == [list(b"that i")]
    assert generate_ids(model, [[7]], end_id=[32, 104]) == [list(b"th")]
    model.end_ids = (300,)
    with pytest.raises(ValueError, match="ends a text with token 300, which the tokenizer does not have"):
        generate(model, TOKENIZER, "x")


def test_samples_of_each_prompt(model):
    params = SamplingParams(seed=4, max_tokens=9, temperature=3.0)
    got = generate(model, TOKENIZER, ["ab", "cde"], params, num_samples=3)
    assert [c.prompt for c in got] == ["ab"] * 3 + ["cde"] * 3
    for i, completion in enumerate(got):
        alone = dataclasses.replace(params, seed=4 + i % 3)
        assert generate(model, TOKENIZER, completion.prompt, alone) == [completion]
    assert len({c.text for c in got}) > 4
    assert len(generate(model, TOKENIZER, "ab", SamplingParams(max_tokens=9), num_samples=2)) == 2


@pytest.mark.parametrize(("length", "max_tokens", "kept"), [(47, 1, 47), (48, 1, 47), (100, 10, 38), (100, 1000, 24)])
def test_of_a_long_prompt_the_end_is_read(model, length, max_tokens, kept):
    prompt = "".join(chr(97 + i % 26) for i in range(length))
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    (completion,) = generate(model, TOKENIZER, prompt, params)
    assert (completion.prompt, completion.dropped) == (prompt, length - kept)
    assert completion.token_ids == generate(model, TOKENIZER, prompt[-kept:], params)[0].token_ids
    if completion.dropped:
        with pytest.warns(UserWarning, match=f"the model's context 48: its first {length - kept} are not read"):
            assert "".join(stream(model, TOKENIZER, prompt, params)) == completion.text


def test_greedy_generation_takes_no_random_number(model):
    state = torch.get_rng_state()
    generate(model, TOKENIZER, "x", SamplingParams(temperature=0, max_tokens=3))
    assert torch.equal(torch.get_rng_state(), state)


def test_ends_at_max_tokens():
    (completion,) = generate(says("one two three"), TOKENIZER, "x", SamplingParams(max_tokens=7))
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("one two", "length", 7)


def test_ends_at_the_context(model):
    params = SamplingParams(temperature=0, max_tokens=1000)
    for prompt, new in zip((40, 47, 1), generate_ids(model, [[1] * 40, [1] * 47, [1]], params), strict=True):
        assert len(new) == 48 - prompt
    (completion,) = generate(model, TOKENIZER, "x" * 47, SamplingParams(temperature=0, stop="never this"))
    assert completion.finish_reason == "length"


def test_stop_strings_do_not_leak():
    model = says("user: hi\nbot: hello\nuser: more")
    for stop in ("\nuser:", ["nothing", "\nuser:"]):
        params = SamplingParams(stop=stop)
        (completion,) = generate(model, TOKENIZER, "x", params)
        assert (completion.text, completion.finish_reason) == ("user: hi\nbot: hello", "stop")
        pieces = list(stream(model, TOKENIZER, "x", params))
        assert "".join(pieces) == completion.text
        assert "\n" not in pieces[-1]
    (late,) = generate(says("so\nuse", end=True), TOKENIZER, "x", SamplingParams(stop="\nuser:"))
    assert late.text == "so\nuse"  # what was held back and never became a stop string


def test_streams_whole_characters():
    text = "naïve café 😀 €"
    pieces = list(stream(says(text), TOKENIZER, "x"))
    assert "".join(pieces) == text
    assert pieces == list(text)
    (cut,) = generate(says("a😀"), TOKENIZER, "x", SamplingParams(max_tokens=3))
    assert cut.text == TOKENIZER.decode(cut.token_ids) == "a\ufffd"


def test_stream_is_lazy():
    pieces = stream(says("abcdef"), TOKENIZER, "x")
    assert next(pieces) == "a"
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    pieces.close()


def test_never_samples_an_id_that_is_no_token():
    vocab = {i: bytes([i]) for i in range(256)} | {259: b"the"}  # a hole, and 12 rows of padding
    tokenizer = Tokenizer(vocab, [], {END: 258})
    model = Transformer(dataclasses.replace(CONFIG, init_std=1e-4))  # every id is equally likely
    torch.manual_seed(0)
    completions = generate(model, tokenizer, ["x"] * 300, SamplingParams(max_tokens=40))
    ids = {i for c in completions for i in c.token_ids}
    assert {i for i in ids if i > 255} == {259}
    assert len(ids) == 257


def test_special_tokens_in_a_prompt(model):
    params = SamplingParams(temperature=0, max_tokens=8)
    (begins,), (written,) = (generate(model, TOKENIZER, prompt, params) for prompt in ("", END))
    assert begins.token_ids == written.token_ids
    assert written.token_ids != generate_ids(model, [END.encode()], params)[0]


def test_no_prompts(model):
    assert generate(model, TOKENIZER, []) == []
    assert generate_ids(model, []) == []


def test_under_autocast(model):
    params = SamplingParams(temperature=0, max_tokens=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert [len(ids) for ids in generate_ids(model, [[1, 2, 3], [4]], params)] == [5, 5]


def test_bad_arguments(model):
    with pytest.raises(ValueError, match="prompt 1 has 48 tokens, which leaves no room in the model's context of 48"):
        generate_ids(model, [[1], [1] * 48])
    with pytest.raises(ValueError, match="num_samples must be 1 or more, got 0"):
        generate(model, TOKENIZER, "a", num_samples=0)
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model 200"):
        generate(Transformer(dataclasses.replace(CONFIG, vocab_size=200)), TOKENIZER, "a")
    bare = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    with pytest.raises(ValueError, match=r"an empty prompt begins a document after <\|endoftext\|>"):
        generate(model, bare, ["a", ""])
    for bad in (272, -1):
        with pytest.raises(ValueError, match=f"prompt 0 has token id {bad}, the model's are 0 to 271"):
            generate_ids(model, [[1, bad, 2]])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_ids(model, [[1], []])
    with pytest.raises(ValueError, match=r"token_ids must be \(batch, tokens\), got shape \(3,\)"):
        generate_ids(model, torch.arange(3))
    with pytest.raises(ValueError, match=r"write \[ids\] for one row"):
        generate_ids(model, [1, 2, 3])
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generate_ids(model, [[1]], SamplingParams(stop="a"))
    broken = Transformer(CONFIG)
    torch.nn.init.constant_(broken.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(broken, TOKENIZER, "a")
