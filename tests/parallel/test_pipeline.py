import itertools

import pytest
import torch
from gloo_ranks import error_of, on_ranks

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig, NoPositionsConfig
from cs336.parallel import Pipeline, count_traffic, pipeline_stage
from cs336.parallel.pipeline import gpipe, layers_of, most_in_flight, one_forward_one_backward

WORLD, MICRO = 3, 4
V, S, M, B = 17, 8, 16, 8
MOE = BlockConfig(AttentionConfig(2), MoEConfig(4, 2, balance_loss=0.5))
PLAIN = BlockConfig(AttentionConfig(2), positions=NoPositionsConfig())
CONFIGS = {
    "untied": TransformerConfig(V, S, 4, M, 2),
    "tied": TransformerConfig(V, S, 3, M, 2, tie_embeddings=True),
    "moe": TransformerConfig(V, S, 3, M, layers=(MOE,)),
    "learned": TransformerConfig(V, S, 3, M, layers=(PLAIN,), position_embedding="learned"),
}


def model(name, checkpointing=False):
    torch.manual_seed(0)
    net = Transformer(CONFIGS[name])
    net.layers[1].mlp.requires_grad_(name == "moe")
    net.gradient_checkpointing = checkpointing
    return net


def batch(step):
    ids, targets = torch.randint(V, (2, B, S), generator=torch.Generator().manual_seed(step))
    targets[0, :3] = -100
    return ids, targets


def gradients(net):
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


MORE = {"label_smoothing": 0.1, "z_loss": 0.01}


def piped(name, schedule, checkpointing=False, **more):
    """Losses and gradients of two steps that add up."""
    stage = pipeline_stage(model(name, checkpointing))
    pipeline = Pipeline(stage, num_microbatches=MICRO, schedule=schedule)
    with count_traffic() as traffic:
        losses = [pipeline.step(*batch(step), scale=0.1, **more) for step in range(2)]
    found = gradients(stage)
    with torch.no_grad():
        losses.append(pipeline.step(*batch(2), **more))
    assert gradients(stage).keys() == found.keys()
    names = list(dict(stage.named_parameters()))
    losses = [torch.stack(sums) for sums in losses] if more else losses
    return torch.stack(losses), found, names, dict(traffic.bytes)


def mistakes():
    stage = pipeline_stage(model("tied"))
    pipeline = Pipeline(stage, num_microbatches=3)
    return [
        error_of(lambda: pipeline.step(*batch(0))),
        error_of(lambda: pipeline_stage(Transformer(TransformerConfig(V, S, 2, M, 2)))),
        error_of(lambda: Pipeline(stage, num_microbatches=1, schedule="interleaved")),
        error_of(lambda: Pipeline(stage, num_microbatches=0)),
    ]


def case(rank):
    results = {(name, how): piped(name, how) for name, how in itertools.product(CONFIGS, ("gpipe", "1f1b"))}
    results["tied", "checkpointed"] = piped("tied", "1f1b", checkpointing=True)
    results["untied", "smoothed"] = piped("untied", "1f1b", **MORE)
    return results, mistakes()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(case, tmp_path_factory.mktemp("pipeline"), WORLD)


def alone(name, **more):
    """The same in one process, a micro-batch at a time."""
    net, losses = model(name), []
    for step in range(3):
        total = torch.zeros(2) if more else torch.zeros(())
        for ids, targets in zip(*(x.chunk(MICRO) for x in batch(step)), strict=True):
            loss, routing = net(ids, targets=targets, return_routing=True, **more)
            total += torch.stack(loss).detach() if more else loss.detach()
            loss = loss[0] if more else loss
            if step < 2:
                added = 0 if routing is None else (targets != -100).sum() * (routing.balance + routing.z)
                (0.1 * (loss + added)).backward()
        losses.append(total)
    return torch.stack(losses), gradients(net), list(dict(net.named_parameters()))


OTHERS = ("tied", "checkpointed"), ("untied", "smoothed")


@pytest.mark.parametrize(("name", "how"), [*itertools.product(CONFIGS, ("gpipe", "1f1b")), *OTHERS])
def test_stages_equal_one_process_bit_for_bit(ranks, name, how):
    losses, grads, names = alone(name, **(MORE if how == "smoothed" else {}))
    seen = set()
    for got_losses, got, got_names, _ in (r[0][name, how] for r in ranks):
        assert torch.equal(got_losses, losses)
        assert got.keys() <= grads.keys()
        for n, grad in got.items():
            # A tied table is summed over stages last, in one process a batch at a time; routers' losses join elsewhere.
            if name == "moe" or (name == "tied" and n == "embedding.weight"):
                torch.testing.assert_close(grad, grads[n], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(grad, grads[n]), n
        seen |= got.keys()
        assert set(got_names) <= set(names)
    assert seen == grads.keys()


def test_ends_hold_one_table(ranks):
    first, _, last = (r[0]["tied", "1f1b"][1]["embedding.weight"] for r in (ranks[0], ranks[0], ranks[2]))
    assert torch.equal(first, last)
    assert "embedding.weight" not in ranks[1][0]["tied", "1f1b"][2]


def test_what_is_sent_is_the_stream(ranks):
    size = 2 * B * S * M * 4  # two steps, float32
    assert [r[0]["untied", "gpipe"][3].get("send") for r in ranks] == [size, 2 * size, size]


def test_what_cannot_be_is_refused(ranks):
    for uneven, few, schedule, none in (r[1] for r in ranks):
        assert "8 / 3 = 2.66667" in uneven
        assert "2 layers cannot be 3 stages" in few
        assert "schedule must be one of gpipe, 1f1b" in schedule
        assert "num_microbatches must be 1 or more" in none


@pytest.mark.parametrize("schedule", [gpipe, one_forward_one_backward])
@pytest.mark.parametrize(("N", "m"), [(1, 1), (1, 3), (2, 1), (4, 2), (4, 8), (5, 5)])
def test_schedules(schedule, N, m):
    """Each micro-batch once forward and once backward, backwards in order, and no rank waits for ever."""
    todo = [schedule(rank, N, m) for rank in range(N)]
    for rank, actions in enumerate(todo):
        assert sorted(actions) == sorted((kind, i) for kind in ("forward", "backward") for i in range(m))
        assert [i for kind, i in actions if kind == "backward"] == list(range(m))
        assert most_in_flight(actions) == (m if schedule is gpipe else min(m, N - rank))
    done, turns = set(), 0
    while any(todo):
        ready = []
        for rank, actions in enumerate(todo):
            if actions:
                kind, i = actions[0]
                needs = (kind, rank - 1, i) if kind == "forward" else (kind, rank + 1, i)
                if not 0 <= needs[1] < N or needs in done:
                    ready.append(rank)
        assert ready, "every rank waits"
        done |= {(todo[rank][0][0], rank, todo[rank][0][1]) for rank in ready}
        for rank in ready:
            todo[rank].pop(0)
        turns += 1
    assert turns == 2 * (m + N - 1)


def test_layers_of():
    assert [len(layers_of(r, 4, 10)) for r in range(4)] == [2, 3, 2, 3]
    assert [i for r in range(3) for i in layers_of(r, 3, 7)] == list(range(7))
