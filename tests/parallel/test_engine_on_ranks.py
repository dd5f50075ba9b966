"""A model divided among two ranks: each has an engine, and all of them say what one alone says."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from gloo_ranks import error_of, on_two_ranks

from cs336.inference import LLM, SamplingParams, ranks
from cs336.models import BlockConfig, Transformer, TransformerConfig, save_pretrained
from cs336.nn import AttentionConfig
from cs336.parallel import tensor_parallel
from cs336.tokenizer import Tokenizer

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


# ---- a model that is read, and a rank that is asked ----

ENDING = SamplingParams(temperature=0, max_tokens=30, stop=("q",), logit_bias={5: 0.5})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_pretrained(model(), path, Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"]))
    return path


def asked(engine):
    """Requests that come while others run; one goes away, which makes room."""
    first = [engine.add(ids, params) for ids, params in zip(PROMPTS, (GREEDY, ENDING, GREEDY, GREEDY), strict=True)]
    for _ in range(3):
        engine.step()
    engine.cancel(first[2])
    later = [engine.add(PROMPTS[1], ENDING), engine.add(PROMPTS[0], SamplingParams(max_tokens=9, seed=3))]
    while engine.busy:
        engine.step()
    return [r.output().outputs[0].token_ids for r in (*first, *later)]


def counts(engine):
    return engine.stats.steps, engine.stats.finished, engine.cache.in_use


def one_is_asked(rank, directory):
    llm = LLM(directory, device="cpu", tensor_parallel=True, **OPTIONS)
    if rank:
        ranks.follow(llm.engine)
        return [], counts(llm.engine)
    with ranks.leading(llm.engine) as engine:
        return asked(engine), counts(llm.engine)


def test_ranks_follow_the_one_that_is_asked(tmp_path, directory):
    (said, led), (_, followed) = on_two_ranks(functools.partial(one_is_asked, directory=directory), tmp_path)
    llm = LLM(directory, device="cpu", **OPTIONS)
    with ranks.leading(llm.engine) as engine:
        assert engine is llm.engine
        assert asked(engine) == said
    assert led == followed == counts(llm.engine)


def fails_in_a_step(rank, directory):
    llm = LLM(directory, device="cpu", tensor_parallel=True, **OPTIONS)
    if rank:
        return error_of(lambda: ranks.follow(llm.engine))

    def launch(step):
        raise MemoryError("no room")

    def serve():
        with ranks.leading(llm.engine) as engine:
            engine.add(PROMPTS[0], GREEDY)
            llm.engine.runner.launch = launch
            with pytest.raises(MemoryError, match="no room"):
                engine.step()
            raise ValueError("the engine has failed")

    return error_of(serve)


def test_a_rank_that_fails_waits_for_no_other(tmp_path, directory):
    """The other one is then in the middle of a step, and asks for nothing."""
    first, second = on_two_ranks(functools.partial(fails_in_a_step, directory=directory), tmp_path)
    assert first == "ValueError: the engine has failed"
    assert "RuntimeError" in second


def undivided(rank, directory):
    return error_of(lambda: LLM(directory, device="cpu", tensor_parallel=True, quiet=True))


def test_a_model_without_a_division_is_refused_on_every_rank(tmp_path):
    odd = Transformer(TransformerConfig(273, 16, num_layers=1, d_model=32, num_heads=4))
    save_pretrained(odd, tmp_path / "odd", Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|endoftext|>"]))
    for said in on_two_ranks(functools.partial(undivided, directory=tmp_path / "odd"), tmp_path):
        assert "vocab_size 273 / 2 = 136.5: pad it to 274" in said


def test_torchrun_divides_what_bench_offline_runs(tmp_path, directory):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "cs336"]
    load = ["--num-requests", "5", "--input-len", "3", "9", "--output-len", "2", "5", "--max-seqs", "4"]
    command = [*launcher, "bench", "offline", str(directory), "--device", "cpu", *load]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("memory:") == 1
    (told,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (told["bench"], told["requests"]) == ("offline", 5)
