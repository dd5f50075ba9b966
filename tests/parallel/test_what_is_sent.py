"""A plan's bytes are those that the steps of `cs336 train` send, in every layout, on two ranks."""

import dataclasses
import itertools
import pathlib

import pytest
import torch
from gloo_ranks import on_two_ranks

from cs336.models import BlockConfig, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig
from cs336.parallel import Layout, ParallelConfig, count_traffic
from cs336.parallel.planner import Work, sent_bytes
from cs336.training import DataConfig, TrainConfig
from cs336.training.learner import Learner

V, S, ROWS = 256, 32, 8
PLAIN = TransformerConfig(V, S, 4, 64, 4, 2)
EXPERTS = BlockConfig(AttentionConfig(4), MoEConfig(4, 2, balance="none"))
MODELS = {
    "plain": PLAIN,
    "tied": dataclasses.replace(PLAIN, tie_embeddings=True),
    "capped": dataclasses.replace(PLAIN, logit_softcap=5.0),
    "moe": TransformerConfig(V, S, 2, 64, layers=(EXPERTS,)),
}
LAYOUTS = [{}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}, {"expert": 2}]
STEPS = [(2, "none", "fp32"), (2, "selective", "bf16"), (4, "full", "bf16")]  # rows of a pass, recomputation, precision
IMPOSSIBLE = {("moe", "tensor"), ("moe", "pipeline"), ("plain", "expert"), ("tied", "expert"), ("capped", "expert")}
CASES = [
    (name, table, step)
    for name, table, step in itertools.product(MODELS, LAYOUTS, STEPS)
    if not any((name, axis) in IMPOSSIBLE for axis in table)
]


def config(name, table, rows, recompute, precision):
    return TrainConfig(
        pathlib.Path("runs/none"),
        DataConfig(pathlib.Path("none")),
        MODELS[name],
        batch_size=ROWS,
        micro_batch_size=rows,
        parallel=ParallelConfig(**table),
        device="cpu",
        precision=precision,
        gradient_checkpointing=recompute,
    )


def sent_and_planned(rank):
    found = []
    ids, targets = torch.randint(V, (2, ROWS, S), generator=torch.Generator().manual_seed(0))
    for name, table, (rows, recompute, precision) in CASES:
        learner = Learner(config(name, table, rows, recompute, precision))
        place, parts = learner.division.row_place
        batch = ids.chunk(parts)[place], targets.chunk(parts)[place]
        learner.update(batch, 1e-3)
        with count_traffic() as traffic:
            learner.update(batch, 1e-3)
        sizes = learner.division.sizes
        layout = Layout(**sizes, zero=table.get("zero", 0), micro_batch=rows, recompute=recompute)
        work = Work(
            MODELS[name],
            ROWS,
            S,
            compute_bytes=learner.dtype.itemsize,
            fused_head=learner.division.objective.fused_head,
        )
        planned = sent_bytes(work, layout, learner.division.place("pipeline"))
        found.append([sum(traffic.bytes.values()), sum(planned.values())])
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(sent_and_planned, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("i", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_a_plan_says_what_is_sent(ranks, i):
    """But for a step's few numbers, gradients of norms that tensor parallel sums, and what routers choose."""
    for found in ranks:
        sent, planned = found[i]
        assert planned == pytest.approx(sent, rel=0.03 if "expert" in CASES[i][1] else 0.011)
