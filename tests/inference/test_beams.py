"""Beam search against transformers', and against all texts that there are."""

import itertools

import pytest
import torch
from block_kinds import MIXERS
from test_generate import TOKENIZER

from cs336.cli.program import main
from cs336.inference import LLM, BeamParams, SamplingParams, beam_search, generate_ids
from cs336.inference.beams import beam_search_ids
from cs336.models import Transformer, TransformerConfig, save_pretrained

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3]]


def tiny(vocab_size=23, seed=0, context_length=48):
    torch.manual_seed(seed)
    shape = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "init_std": 0.25}
    return Transformer(TransformerConfig(vocab_size, context_length, **shape))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("ends", [(7,), (7, 12, 20), ()])
@pytest.mark.parametrize(
    "options",
    [{"beams": 1}, {"beams": 3}, {"beams": 4, "early_stopping": True}, {"beams": 5, "length_penalty": 0.0},
     {"beams": 3, "length_penalty": -1.0}, {"beams": 4, "length_penalty": 2.0, "early_stopping": True}],
)  # fmt: skip
def test_equal_to_transformers(tmp_path, options, ends, seed):
    transformers = pytest.importorskip("transformers")
    model, params = tiny(seed=seed), BeamParams(max_tokens=14, **options)
    save_pretrained(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = beam_search_ids(model, PROMPTS, params, ends)
    more = {"return_dict_in_generate": True, "output_scores": True} if params.beams > 1 else {}
    for prompt, beams in zip(PROMPTS, found, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=14, do_sample=False,
            num_beams=params.beams, num_return_sequences=params.beams, eos_token_id=list(ends) or None, pad_token_id=0,
            length_penalty=params.length_penalty, early_stopping=params.early_stopping, **more,
        )  # fmt: skip
        sequences = output.sequences if more else output
        for n, beam in enumerate(beams):
            ids = sequences[n, len(prompt) :].tolist()
            cut = next((i for i, token in enumerate(ids) if token in ends), None)
            assert (beam.token_ids, beam.ended) == (ids[:cut], cut is not None)
            if more:
                assert beam.score == pytest.approx(output.sequences_scores[n].item(), rel=1e-4)
        assert len(beams) == params.beams


def test_as_many_beams_as_tokens_forget_no_text_of_two():
    model = tiny(5, context_length=8)
    texts = list(itertools.product(range(5), repeat=2))
    with torch.no_grad():
        log_probs = model(torch.tensor([[2, *text] for text in texts])).log_softmax(-1)[:, :-1]
    sums = log_probs.gather(-1, torch.tensor(texts)[..., None]).sum((1, 2))
    (found,) = beam_search_ids(model, [[2]], BeamParams(beams=5, max_tokens=2, length_penalty=0.0), ())
    best = sums.topk(5)
    assert [beam.token_ids for beam in found] == [list(texts[i]) for i in best.indices]
    assert [beam.score for beam in found] == pytest.approx(best.values.tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="beams must be at most the 4 tokens that a text can begin with, got 5"):
        beam_search_ids(model, [[2]], BeamParams(beams=5), (0,))


def test_prompts_of_a_batch_are_searched_apart():
    model, params = tiny(context_length=16), BeamParams(beams=3, max_tokens=14)
    together = beam_search_ids(model, PROMPTS, params, (7,))
    for prompt, beams in zip(PROMPTS, together, strict=True):
        ((*alone,),) = beam_search_ids(model, [prompt], params, (7,))
        assert [beam.token_ids for beam in alone] == [beam.token_ids for beam in beams]
        assert all(len(prompt) + len(beam.token_ids) <= 16 for beam in beams)
    assert beam_search_ids(model, [], params, (7,)) == []


def test_one_beam_is_greedy_and_texts_are_completions():
    torch.manual_seed(2)
    model = Transformer(TransformerConfig(272, 48, num_layers=2, d_model=32, num_heads=4, init_std=0.3))
    (greedy,) = generate_ids(model, [[1, 2]], SamplingParams(temperature=0, max_tokens=9), end_id=256)
    ((beam,),) = beam_search_ids(model, [[1, 2]], BeamParams(beams=1, max_tokens=9), (256,))
    assert beam.token_ids == greedy[: len(beam.token_ids)]
    found = beam_search(model, TOKENIZER, ["ab", "x" * 60], BeamParams(beams=4, max_tokens=9), num_samples=2)
    assert [completion.prompt[:2] for completion in found] == ["ab", "ab", "xx", "xx"]
    assert [completion.dropped for completion in found] == [0, 0, 21, 21]
    assert all(max(c.token_ids, default=0) < 256 for c in found)  # 257 to 271 are no tokens
    assert found[0].text == TOKENIZER.decode(found[0].token_ids)
    with pytest.raises(ValueError, match=r"num_samples must be in 1..beams, 4, got 5"):
        beam_search(model, TOKENIZER, "ab", num_samples=5)


def test_of_an_engine():
    torch.manual_seed(2)
    model = Transformer(TransformerConfig(272, 48, num_layers=2, d_model=32, num_heads=4, init_std=0.3)).eval()
    llm = LLM(model, TOKENIZER, quiet=True, page_size=16)
    options = {"length_penalty": 0.5, "early_stopping": True}
    outputs = llm.beam_search(["ab", [99, 100]], 3, 9, **options)
    found = beam_search_ids(model, [[97, 98], [99, 100]], BeamParams(3, 9, **options), (256,), range(257, 272))
    assert [(o.prompt, o.prompt_token_ids) for o in outputs] == [("ab", [97, 98]), (None, [99, 100])]
    for output, beams in zip(outputs, found, strict=True):
        assert [o.index for o in output.outputs] == [0, 1, 2]
        for one, beam in zip(output.outputs, beams, strict=True):
            assert (one.token_ids, one.score) == (beam.token_ids, beam.score)
            assert one.text == TOKENIZER.decode(beam.token_ids)
            assert one.finish_reason == ("stop" if beam.ended else "length")
    scores = [one.score for one in outputs[0].outputs]
    assert scores == sorted(scores, reverse=True)
    (bare,) = LLM(model, quiet=True, page_size=16).beam_search([97, 98], 2, 5)
    assert (bare.text, len(bare.outputs)) == ("", 2)
    assert llm.beam_search([]) == []
    for wrong, message in (
        (("ab", 0), "beams must be an integer, 1 or more, got 0"),
        (("x" * 48,), "48 tokens, which leaves no room"),
        ((["ab", []],), "prompt 1 is empty"),
        (("ab", 500), "beams must be at most the 256 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.beam_search(*wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams must be an integer, 1 or more, got 0"),
        ({"beams": 2.0}, "beams must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"length_penalty": float("nan")}, "length_penalty must be from -10 to 10"),
        ({"length_penalty": 1000.0}, "length_penalty must be from -10 to 10"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        BeamParams(**options)


def test_logits_that_are_not_finite():
    model = tiny()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        beam_search_ids(model, [[1]], BeamParams(), ())


def test_the_verb(tmp_path, capsys):
    torch.manual_seed(2)
    model = Transformer(TransformerConfig(272, 48, num_layers=2, d_model=32, num_heads=4, init_std=0.3))
    save_pretrained(model, tmp_path, tokenizer=TOKENIZER)
    command = ["generate", str(tmp_path), "--prompt", "ab", "--max-tokens", "5", "--device", "cpu"]
    options = ["--beams", "3", "--num-samples", "2", "--length-penalty", "0", "--early-stopping"]
    assert main([*command, *options]) == 0
    params = BeamParams(beams=3, max_tokens=5, length_penalty=0.0, early_stopping=True)
    best = beam_search(model, TOKENIZER, "ab", params, num_samples=2)
    assert capsys.readouterr().out == "\n\n".join("ab" + completion.text for completion in best) + "\n"
    for wrong, message in (
        (
            ["--beams", "3", "--top-k", "4", "--seed", "1"],
            "keeps the likeliest texts and draws none: leave out --top-k, --",
        ),
        (["--beams", "3", "--draft", str(tmp_path)], "leave out --draft"),
        (["--early-stopping"], "give --beams N as well"),
        (["--beams", "3", "--num-samples", "4"], "num_samples must be in 1..beams, 3, got 4"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_follows_its_beams(kind):
    """A text's score is what the model says of the whole of it, though its state came from other rows."""
    torch.manual_seed(3)
    model = Transformer(TransformerConfig(23, 32, 2, 32, init_std=0.25, layers=(MIXERS[kind],) * 2)).eval()
    for prompt, beams in zip(
        PROMPTS, beam_search_ids(model, PROMPTS, BeamParams(beams=3, max_tokens=6), ()), strict=True
    ):
        for beam in beams:
            ids = torch.tensor([prompt + beam.token_ids])
            with torch.no_grad():
                log_probs = model(ids).log_softmax(-1)[0, len(prompt) - 1 : -1]
            mean = log_probs.gather(-1, ids[0, len(prompt) :, None]).mean()
            assert beam.score == pytest.approx(mean.item(), rel=1e-3, abs=1e-4)
