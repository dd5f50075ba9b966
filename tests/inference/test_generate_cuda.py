"""On a GPU: what generate captures gives the tokens of steps that are launched one by one."""

import pytest
import torch
from block_kinds import MIXERS

from cs336.inference import SamplingParams, generate_ids
from cs336.models import Transformer, TransformerConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_steps(kind, dtype, monkeypatch):
    """Rows of different lengths, one of which leaves on the way."""
    torch.manual_seed(1)
    config = TransformerConfig(512, 128, 2, 64, layers=(MIXERS[kind],), init_std=0.2)
    model = Transformer(config, device="cuda", dtype=dtype).eval()
    prompts = [torch.randint(512, (n,)).tolist() for n in (5, 90, 1)]
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    monkeypatch.setattr("cs336.inference.generate.STEPS_BEFORE_CAPTURE", 8)
    found = generate_ids(model, prompts, SamplingParams(temperature=0, max_tokens=50))
    assert [len(ids) for ids in found] == [50, 38, 50]
    assert len({id(graph) for graph in replays}) == (0 if kind == "experts" and dtype == torch.float32 else 2)
    monkeypatch.setattr("cs336.inference.generate.STEPS_BEFORE_CAPTURE", 1000)
    assert generate_ids(model, prompts, SamplingParams(temperature=0, max_tokens=50)) == found
