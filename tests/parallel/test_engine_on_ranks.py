"""A model divided among two ranks: each has an engine, and all of them say what one alone says."""

import pytest
import torch
from gloo_ranks import error_of, on_two_ranks

from cs336.inference import LLM, SamplingParams
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig
from cs336.parallel import tensor_parallel

BLOCKS = (BlockConfig(AttentionConfig(4, 2, qk_norm=True)), BlockConfig(AttentionConfig(4, 2, window=6)))
CONFIG = TransformerConfig(272, 96, num_layers=2, d_model=32, init_std=0.3, layers=BLOCKS, tie_embeddings=True)
PROMPTS = [[5, 6, 7], list(range(40)), [9] * 11, [*range(30), 2]]
GREEDY = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
OPTIONS = {"page_size": 4, "max_seqs": 3, "max_step_tokens": 12, "num_pages": 24, "quiet": True}


def model():
    torch.manual_seed(5)
    return Transformer(CONFIG).eval()


def said(llm):
    torch.manual_seed(len(str(llm.model.embedding)))
    outputs = llm.generate(PROMPTS * 2, [GREEDY] * 4 + [SamplingParams(max_tokens=20, n=2)] * 4)
    ids = [one.token_ids for output in outputs for one in output.outputs]
    return ids, [[token.logprob for token in output.outputs[0].logprobs] for output in outputs[:4]]


def divided(rank):
    llm = LLM(tensor_parallel(model()), overlap=True, **OPTIONS)
    torch.manual_seed(rank)  # what others draw on a rank
    refused = error_of(lambda: LLM(llm.model, invariant=True))
    return *said(llm), llm.engine.scheduler.num_preemptions, llm.engine.memory.pages, refused


def test_ranks_say_what_one_says(tmp_path):
    first, second = on_two_ranks(divided, tmp_path)
    alone = LLM(model(), **OPTIONS)
    ids, logprobs = said(alone)
    assert first == second
    assert first[0][:4] == ids[:4]
    for a, b in zip(first[1], logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert len({tuple(i) for i in first[0][4:]}) == 8
    assert first[2] > 0
    assert first[3] == alone.engine.memory.pages / 2  # each has its heads' keys
    assert "depend on the number of ranks" in first[4]
