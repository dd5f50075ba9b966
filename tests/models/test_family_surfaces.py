"""What runs a model runs those of each family too: the engine, its counts, `cs336 model info`, and ranks or why not."""

import copy
import dataclasses

import pytest
import torch
from test_families import NEWER, THEIRS, randomised

from cs336.cli.program import main
from cs336.inference import SamplingParams
from cs336.inference.engine import Engine, EngineConfig
from cs336.models import Transformer, save_pretrained
from cs336.models.huggingface.directory import FAMILIES
from cs336.parallel.tensor import why_not

transformers = pytest.importorskip("transformers")

NAMES = [name for name in THEIRS if name.split(",")[0] in NEWER]
PROMPTS = [[5, 6, 7], [28], list(range(30)), [9] * 11]


def made(name):
    family, options = THEIRS[name]
    theirs = getattr(transformers, f"{family}Config")(**copy.deepcopy(options)).to_dict()  # which it changes
    return randomised(Transformer(FAMILIES[theirs["model_type"]].config(theirs)))


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_says_what_the_model_does(name):
    """In pages, in chunks, several at once: each token is the likeliest, and as likely, but for rounding."""
    model = made(name)
    engine = Engine(model, None, EngineConfig(page_size=4, max_seqs=3, max_step_tokens=9))
    requests = [engine.add(prompt, SamplingParams(temperature=0, max_tokens=12)) for prompt in PROMPTS]
    while engine.busy:
        engine.step()
    for prompt, request in zip(PROMPTS, requests, strict=True):
        tokens = request.samples[0].tokens
        ids = [token.id for token in tokens]
        with torch.inference_mode():
            log_p = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert (log_p.max(-1).values - log_p[range(12), ids]).max() < 1e-3
        want = log_p[range(12), ids]
        torch.testing.assert_close(torch.tensor([token.logprob for token in tokens]), want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_the_models_own(name, tmp_path, capsys):
    model = made(name)
    assert model.config.num_parameters() == sum(p.numel() for p in model.parameters())
    save_pretrained(model, tmp_path)
    assert main(["model", "info", str(tmp_path)]) == 0
    assert f"{model.config.num_parameters():,}" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_ranks_divide_it_or_it_says_why_not(name):
    config = made(name).config
    padded = Transformer(dataclasses.replace(config, vocab_size=98), device="meta")
    assert (why_not(padded, 2) or "") == REASONS.get(name, "")


EXPERTS = "layer 0 is a mixture of experts: give ranks whole experts with expert_parallel"
REASONS = dict.fromkeys(
    ("olmoe", "olmoe, normalised", "qwen2_moe", "qwen2_moe, normalised", "gpt_oss", "gpt_oss, plain rope"), EXPERTS
) | {
    "phi3, partial": "layer 0: num_kv_heads 1 / 2 = 0.5, and a head is on one rank",
}
