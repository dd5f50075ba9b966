"""A Llama-shaped export with a tokenizer of SentencePiece's kind: prompts, chats, streams, stops and grammars."""

import json
import urllib.request

import pytest
import torch
from inference.serving import listening

from cs336.alignment.examples import encode_completion
from cs336.alignment.sft import encode_chat
from cs336.evaluation.tasks.likelihood import loglikelihoods, rolling
from cs336.inference import LLM, BeamParams, SamplingParams, beam_search, generate
from cs336.inference.beams import Beam
from cs336.inference.generate import stream
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer
from tests.tokenizer.sentencepieces import document

GREEDY = SamplingParams(temperature=0, max_tokens=24)
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    place = tmp_path_factory.mktemp("llama")
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content = document(extra=False)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    torch.manual_seed(3)
    rows = -(-len(content["model"]["vocab"]) // 64) * 64
    model = Transformer(
        TransformerConfig(rows, 128, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)
    )
    model.special_ids |= {"bos_token_id": 1, "eos_token_id": 2}
    save_pretrained(model, place)
    (place / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return LLM(place, quiet=True, page_size=16, max_seqs=4)


def test_a_prompt_begins_as_the_model_expects(llm):
    encode = llm.tokenizer.encode
    assert llm.encode(["the other", "<s>the other", ""]) == [[1, *encode("the other")]] * 2 + [[1]]
    (asked,) = llm.encode([llm.chat_template.render([{"role": "user", "content": "the"}])])
    assert asked == [1, *encode("[INST] the [/INST]")]
    assert llm.chat([{"role": "user", "content": "the"}], GREEDY)[0].prompt_token_ids == asked


def test_text_goes_on_where_the_prompt_ends(llm):
    """A space at the front of an answer stays, unless the text begins there."""
    for prompt in ("the other", "", "<s>"):
        (output,) = llm.generate([prompt], GREEDY)
        ids, tokenizer = output.token_ids, llm.tokenizer
        data = b"".join(tokenizer.token_bytes(i) for i in ids)
        data = data if prompt == "the other" else data.removeprefix(b" ")
        assert output.text == data.decode(errors="replace")
        assert "".join(llm.stream(prompt, GREEDY)) == output.text
        assert generate(llm.model, tokenizer, [prompt], GREEDY)[0].text == output.text
        assert "".join(stream(llm.model, tokenizer, prompt, GREEDY)) == output.text
    assert llm.generate(["the"], only_the(llm))[0].text == " the the the"
    assert llm.generate([""], only_the(llm))[0].text == "the the the"


def test_beams_go_on_too(llm):
    params = BeamParams(beams=2, max_tokens=8)
    (best,) = beam_search(llm.model, llm.tokenizer, ["the other"], params)
    data = b"".join(llm.tokenizer.token_bytes(i) for i in best.token_ids)
    assert best.text == data.decode(errors="replace")
    spaced = Beam([llm.tokenizer.token_to_id(" the")], 0.0, True)
    assert llm._beam_output(0, spaced, llm.encode(["the"])[0]).text == " the"
    assert llm._beam_output(0, spaced, llm.encode([""])[0]).text == "the"


def only_the(llm, **options):
    return SamplingParams(temperature=0, max_tokens=3, logit_bias={llm.tokenizer.token_to_id(" the"): 100.0}, **options)


def test_stop_strings_across_tokens(llm):
    (output,) = llm.generate(["the other"], only_the(llm, stop=["e th"]))
    assert output.text == " th"
    assert output.finish_reason == "stop"
    (output,) = llm.generate([""], only_the(llm, stop=[" the the"]))
    assert output.text == "the"
    assert output.finish_reason == "stop"


def test_a_grammar_sees_the_bytes_of_tokens(llm):
    pytest.importorskip("llguidance")
    for params in ({"regex": "(the|other) [a-z]+: \u4e2d\n"}, {"choice": ["the other", "\u00e9\u0416"]}):
        (output,) = llm.generate(["the"], SamplingParams(temperature=0, max_tokens=60, **params))
        if "choice" in params:
            assert output.text in params["choice"]
        else:
            assert output.text.startswith(("the ", "other "))
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"]}
    schema["additionalProperties"] = False
    (output,) = llm.generate(["the"], SamplingParams(temperature=0, max_tokens=90, json_schema=schema))
    assert 0 <= json.loads(output.text)["a"] <= 9


def test_scores_of_a_text_that_goes_on(llm):
    whole = llm.encode(["the other one"])[0]
    (asked,) = llm.score(["the other"], [" one"])
    assert [token.id for token in asked] == whole[-len(asked) :]
    (scored,) = loglikelihoods(llm, [("the other", " one")])
    assert scored.logprob == pytest.approx(sum(token.logprob for token in asked), rel=1e-4)
    (alone,) = loglikelihoods(llm, [("", "the other one")])
    assert rolling(llm, ["the other one"]) == [pytest.approx(alone.logprob, rel=1e-4)]


def test_what_is_learned_is_what_is_asked(llm):
    """The tokens of a conversation are those of its text, and of a completion those that would be generated."""
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "other"}] * 2
    example = encode_chat(messages, llm.tokenizer, llm.chat_template, [2])
    text = llm.chat_template.render(messages, add_generation_prompt=False)
    assert example.token_ids == llm.tokenizer.encode_prompt(text)
    assert b"other" in llm.tokenizer.decode_bytes(
        [i for i, learned in zip(example.token_ids, example.mask, strict=True) if learned]
    )
    plain = encode_completion("the other", " one", llm.tokenizer, [2])
    assert plain.token_ids == [*llm.encode(["the other one"])[0], 2]


def test_bytes_of_a_vocabulary_are_those_of_text(llm):
    assert isinstance(llm.tokenizer, Tokenizer)
    vocab = llm.tokenizer.vocab
    assert vocab[llm.tokenizer.encode("the")[0]] == b" the"
    assert vocab[3 + 0xE4] == b"\xe4"


def test_the_server_shows_a_prompt_as_it_was_written(llm):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    with listening(llm) as (_, port):

        def post(route, **body):
            data = json.dumps({"prompt": "the other"} | body).encode()
            url, head = f"http://127.0.0.1:{port}{route}", {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(url, data, head)) as answer:
                return json.load(answer)

        (choice,) = post("/v1/completions", echo=True, max_tokens=0)["choices"]
        assert choice["text"] == "the other"
        assert post("/tokenize")["tokens"] == llm.encode(["the other"])[0]
