"""A random model's texts are those of their grammars, whatever runs beside them, and nothing else changes for it."""

import dataclasses
import functools
import importlib.util
import json
import random
import re

import pytest
import torch

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

import jsonschema

from cs336.cli import main
from cs336.inference import LLM, SamplingParams
from cs336.inference.grammar import Grammars, Guide
from cs336.models import Transformer, TransformerConfig, save_pretrained
from cs336.tokenizer import Tokenizer

# Padded, and with special tokens between the others: 300 is the end.
SPECIAL = {"<|im_end|>": 256, "<|endoftext|>": 300}
TOKENIZER = Tokenizer(
    {i: bytes([i]) for i in range(256)} | {i: text.encode() for text, i in SPECIAL.items()}, [], [*SPECIAL]
)
END = SPECIAL["<|endoftext|>"]
CONFIG = TransformerConfig(317, 1024, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, init_std=0.3)
REGEXES = [
    r"[0-9]{3}-[0-9]{4}",
    r"(é|ü|日本)+x",
    r"[a-f]{2,9}",
    r"(yes|no)( (yes|no)){0,4}",
    r"<\|endoftext\|>[ab]/\\",
    r"[^\n]{1,30}",
]
FEW_PAGES = {"num_pages": 25, "max_len": 200, "max_seqs": 12}
UNBOUND = SamplingParams(max_tokens=60, seed=7)


def llm(**options):
    torch.manual_seed(5)
    options = {"page_size": 8, "max_seqs": 8, "max_step_tokens": 32} | options
    return LLM(Transformer(CONFIG).eval(), TOKENIZER, quiet=True, **options)


@pytest.fixture(scope="module")
def plain():
    return llm()


@pytest.fixture(scope="module")
def alone(plain):
    """The tokens of a text that nothing runs beside."""
    return functools.cache(lambda prompt, params: plain.generate(prompt, params)[0].token_ids)


def schema(rng, depth=2):
    """A random one, of texts that end soon."""
    kinds = ["enum", "integer", "string", "pattern", "boolean", "null"] + ["object", "array", "anyOf"] * (depth > 0)
    match rng.choice(kinds):
        case "enum":
            return {"enum": rng.sample(["a", 'q"\\', "né", 1, -2.5, None, True, [1, 2], {"k": []}], 3)}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)}
        case "string":
            return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 6)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", "^(0x)?[0-9a-f]{2}$", "^é+ü$"])}
        case "object":
            fields = {name: schema(rng, depth - 1) for name in rng.sample(["a", "b b", "ç", 'd"'], rng.randint(1, 2))}
            required = [name for name in fields if rng.random() < 0.6]
            return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
        case "array":
            return {"type": "array", "items": schema(rng, depth - 1), "maxItems": rng.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [schema(rng, depth - 1), schema(rng, depth - 1)]}
        case kind:
            return {"type": kind}


def requests():
    rng = random.Random(3)
    schemas = [schema(rng) for _ in range(20)] + [
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/n"}},
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"n": {"type": "boolean"}},
        }
    ]
    found = [SamplingParams(json_schema=s, max_tokens=900, seed=i) for i, s in enumerate(schemas)]
    found += [SamplingParams(regex=r, max_tokens=900, seed=i) for i, r in enumerate(REGEXES * 2)]
    found += [
        SamplingParams(choice=("ab", "abc", 'n"o\n', "\0é/", "(.|[^a]*)+x"), max_tokens=900, seed=i) for i in range(6)
    ]
    random.Random(4).shuffle(found)
    return found


def follows(params, text):
    if params.json_schema is not None:
        jsonschema.validate(json.loads(text), json.loads(params.json_schema))
    elif params.regex is not None:
        assert re.fullmatch(params.regex, text), (params.regex, text)
    else:
        assert text in params.choice


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        FEW_PAGES,
        {"speculation": "ngram", "overlap": True},
    ],
    ids=["plain", "overlap", "preempted", "speculation"],
)
def test_texts_follow_their_grammars_beside_others(alone, options):
    mixed = [params for i, bound in enumerate(requests()) for params in [bound, UNBOUND][: 2 - bool(i % 4)]]
    model = llm(**options)
    outputs = model.generate([["a", "hello"][i % 2] for i in range(len(mixed))], mixed)
    texts = set()
    for params, output in zip(mixed, outputs, strict=True):
        if params.grammar is None:
            assert output.token_ids == alone(output.prompt, params)
            continue
        assert output.finish_reason == "stop"
        assert not set(output.token_ids) & {256, END}
        follows(params, output.text)
        assert output.token_ids == alone(output.prompt, params)
        texts.add(output.text)
    assert len(texts) > 15
    model.engine.check()
    if "num_pages" in options:
        assert model.engine.scheduler.num_preemptions > 0


def test_tokens_of_several_bytes():
    spoken = (
        json.dumps({"a": ["né", 'q"\\', 12], "b b": {"ç": None, 'd"': True}}, ensure_ascii=False)
        + "yes no yes 日本日本ab\n"
    )
    tokenizer = Tokenizer.train([spoken * 20], 310, ["<|endoftext|>"])
    assert sum(len(token) > 2 for token in tokenizer.vocab.values()) > 5
    torch.manual_seed(5)
    model = LLM(Transformer(CONFIG).eval(), tokenizer, quiet=True, page_size=8, overlap=True)
    asked = requests()
    for params, output in zip(asked, model.generate(["a"] * len(asked), asked), strict=True):
        assert output.finish_reason == "stop"
        follows(params, output.text)


def one(model, params=None, prompt="a", **given):
    return model.generate(prompt, params or SamplingParams(**({"seed": 1, "max_tokens": 60} | given)))[0]


def test_ends_come_where_the_grammar_accepts(plain):
    eager = {"logit_bias": {END: 100}}
    assert one(plain, regex="a{3}b*", **eager).text == "aaa"
    assert one(plain, regex="a*", **eager).outputs[0].end.id == END
    assert one(plain, regex="a{3}", **eager).outputs[0].end is None  # nothing can follow: no end is drawn
    assert one(plain, regex="a*", ignore_eos=True, **eager).finish_reason == "length"
    assert one(plain, regex="a{4}b", ignore_eos=True).text == "aaaab"
    assert one(plain, regex="a{2}c?", stop_token_ids=(256,), logit_bias={256: 100}).outputs[0].end.id == 256


def test_what_cuts_a_text(plain):
    cut = one(plain, regex="[ab]{20}", max_tokens=7)
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 7)
    assert one(plain, regex="[ab]{7}", max_tokens=7).finish_reason == "stop"
    whole = one(plain, regex="[ab]{20}").text
    assert one(plain, regex="[ab]{20}", stop="ab").text == whole[: whole.index("ab")]
    early = one(plain, regex="[ab]{20}", stop_token_ids=(ord("b"),))
    assert early.text == whole[: whole.index("b")]


def test_greedy_filters_and_penalties_are_of_what_is_allowed(plain):
    for how in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert one(plain, regex="[ab]{20}", **how).text == one(plain, regex="[ab]{20}", temperature=0).text
    assert "a" not in one(plain, regex="[ab]{20}", logit_bias={ord("a"): -100}).text
    assert {*one(plain, regex="[ab]{20}", temperature=0, frequency_penalty=2).text} == {"a", "b"}


def test_log_probabilities_are_the_models_own(plain):
    output = one(plain, regex="[ab]{5}", logprobs=2)
    (scored,) = plain.score(["a"], [output.text], top=2)
    for found, want in zip(output.outputs[0].logprobs, scored, strict=True):
        assert found.logprob == pytest.approx(want.logprob, abs=1e-4)
        assert [i for i, _ in found.top] == [i for i, _ in want.top]


def test_continuations_have_places_of_their_own(plain):
    many = one(plain, json_schema={"type": "array", "items": {"type": "integer"}, "maxItems": 3}, n=4)
    texts = [c.text for c in many.outputs]
    assert len({*texts}) > 1
    for i, text in enumerate(texts):
        params = SamplingParams(json_schema={"type": "array", "items": {"type": "integer"}, "maxItems": 3}, seed=1 + i)
        assert one(plain, dataclasses.replace(params, max_tokens=60)).text == text
        assert isinstance(json.loads(text), list)


def test_streams_and_new_weights(plain):
    params = SamplingParams(regex="(é|日){9}", seed=2)
    pieces = list(plain.stream("a", params))
    assert "".join(pieces) == one(plain, params).text
    model = llm()
    request = model.engine.add([97], params)
    while len(request.samples[0].logprobs) < 5:
        model.engine.step()
    model.update_weights(model.model.state_dict())  # all is computed anew
    while not request.finished:
        model.engine.step()
    assert request.output().text == "".join(pieces)


def test_invariant_neighbours_stay_to_the_bit():
    model = llm(invariant=True)
    free = SamplingParams(max_tokens=30, seed=3, logprobs=0)
    alone = one(model, free)
    beside = model.generate(["a", "b"], [free, SamplingParams(regex="[ab]{25}", seed=1)])[0]
    assert beside.outputs[0].logprobs == alone.outputs[0].logprobs


def test_special_tokens_and_padding_are_no_text():
    guide = Grammars(TOKENIZER, 317).guide(SamplingParams(regex=r"(<\|endoftext\|>|[\s\S])*"), [END])

    def allowed():
        return [i for i in range(317) if guide.allowed[i >> 3] >> (i & 7) & 1]

    assert {*range(128)} < {*allowed()}
    assert max(allowed()) == END  # and 256 is none of them
    assert 256 not in allowed()
    for byte in "<é".encode():
        guide.advance(byte)
    assert END in allowed()


def test_params_survive_the_way_to_other_ranks():
    for given in ({"json_schema": {"type": "null"}}, {"regex": "é"}, {"choice": ["a", "b"]}):
        params = SamplingParams(**given)
        assert SamplingParams(**json.loads(json.dumps(dataclasses.asdict(params)))) == params
        assert hash(params) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json_schema": []}, r"json_schema must be a JSON object, got \[\]"),
        ({"json_schema": "{"}, "json_schema is not JSON: Expecting"),
        ({"json_schema": {"const": float("nan")}}, "json_schema is not JSON: "),
        ({"json_schema": {"const": "\ud800"}}, "json_schema cannot be followed: "),
        ({"json_schema": {"type": "x"}}, "json_schema cannot be followed: Invalid type: x"),
        ({"json_schema": {"not": {}}}, r'json_schema cannot be followed: Unimplemented keys: \["not"\]'),
        ({"json_schema": {"enum": []}}, "json_schema cannot be followed: Unsatisfiable"),
        ({"json_schema": {"$ref": "http://example.com/x"}}, "json_schema cannot be followed: "),
        ({"regex": "("}, "regex cannot be followed: .* unclosed group"),
        ({"regex": "a(?=b)"}, "look-ahead"),
        ({"regex": r"[^\s\S]"}, "regex cannot be followed: no token may come next"),
        ({"regex": ""}, "regex allows no text but the empty one"),
        ({"regex": "a\\"}, "its last backslash escapes nothing"),
        ({"regex": "\ud800"}, "regex cannot be followed: "),
        ({"regex": 5}, "regex must be a string, got 5"),
        ({"choice": "ab"}, "choice must be a list of strings, got 'ab'"),
        ({"choice": (1,)}, "choice must be a list of strings"),
        ({"choice": ("",)}, "choice allows no text but the empty one"),
        ({"regex": "a", "choice": ("b",)}, "one grammar, got regex and choice"),
        ({"regex": "a", "min_tokens": 2}, "regex says where a text may end, and min_tokens does"),
    ],
)
def test_what_is_no_grammar(plain, given, message):
    with pytest.raises(ValueError, match=message):
        plain.generate("a", SamplingParams(**given))
    assert not plain.engine.busy


def test_a_vocabulary_without_the_next_letter():
    letters = {i: bytes([i]) for i in range(97, 123)}
    torch.manual_seed(5)
    model = LLM(Transformer(CONFIG).eval(), Tokenizer(letters, [], ["<|endoftext|>"]), quiet=True, page_size=8)
    with pytest.raises(ValueError, match="regex cannot be followed: no token may come next"):
        one(model, regex="#")
    with pytest.raises(ValueError, match="the text cannot go on by its grammar: no token may come next"):
        one(model, regex="[a-c]{2}#")
    assert one(model, regex="ab|a#").text == "ab"
    model.engine.check()


def test_without_a_tokenizer_or_llguidance(plain, monkeypatch):
    ids = LLM(Transformer(CONFIG).eval(), quiet=True, page_size=8)
    with pytest.raises(ValueError, match="of texts: give the engine a tokenizer"):
        ids.generate([[1]], SamplingParams(regex="a"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llguidance" else found(name))
    with pytest.raises(ValueError, match=r"need llguidance: pip install 'cs336\[structured\]'"):
        one(llm(), regex="a")


def test_on_the_command_line(plain, tmp_path, capsys):
    save_pretrained(plain.model, tmp_path / "model", TOKENIZER)
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["né", 12]}', encoding="utf-8")
    verb = ["generate", str(tmp_path / "model"), "--prompt", "a:", "--max-tokens", "40"]
    assert main([*verb, "--json-schema", str(file)]) == 0
    assert capsys.readouterr().out in ('a:"né"\n', "a:12\n")
    assert main([*verb, "--regex", "[xy]{3}", "--num-samples", "2"]) == 0
    assert re.fullmatch(r"a:[xy]{3}\n\na:[xy]{3}\n", capsys.readouterr().out)
    assert main([*verb, "--choice", "no", "yes"]) == 0
    assert capsys.readouterr().out in ("a:no\n", "a:yes\n")
    assert main([*verb, "--regex", "None"]) == 0  # a text, not the absence of one
    assert capsys.readouterr().out == "a:None\n"
    assert main([*verb, "--regex", "("]) == 2
    assert "regex cannot be followed: " in capsys.readouterr().err
    assert main([*verb, "--json-schema", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    file.write_text("[1]")
    assert main([*verb, "--json-schema", str(file)]) == 2
    assert "json_schema must be a JSON object, got '[1]'" in capsys.readouterr().err


def test_a_text_that_is_given_up_spoils_no_other():
    grammars, params = Grammars(TOKENIZER, 317), SamplingParams(regex="(((a?){50}){50}){50}")
    guide = grammars.guide(params)
    with pytest.raises(ValueError, match="the text cannot go on by its grammar: "):
        list(map(guide.advance, [97] * 100))
    assert not grammars.guide(params).ended


def test_samples_of_a_prompt_begin_with_one_mask(monkeypatch):
    """And go on each by itself."""
    model, calls, allowed = llm(), [], Guide._allowed
    monkeypatch.setattr(Guide, "_allowed", lambda guide: calls.append(guide) or allowed(guide))
    guides = {}
    for n in (1, 5):
        calls.clear()
        request = model.engine.add([97], SamplingParams(regex="[ab]{3}", max_tokens=9, n=n, seed=1))
        guides[n] = [sample.guide for sample in request.samples], len(calls)
        while not request.finished:
            model.engine.step()
        assert all(re.fullmatch("[ab]{3}", output.text) for output in request.output().outputs)
    assert guides[1][1] == guides[5][1]
    assert len({id(guide) for guide in guides[5][0]}) == 5
