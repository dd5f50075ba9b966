import pytest
import torch
from gloo_ranks import WORLD, error_of, on_two_ranks

from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AttentionConfig, MoEConfig
from cs336.nn.moe import balance_experts
from cs336.parallel import DDP, count_traffic, expert_parallel, expert_parameters

V, S, M = 17, 6, 16
MIXTURES = {
    "softmax": MoEConfig(4, 2, d_ff=8, num_shared=1, balance="none"),
    "sigmoid": MoEConfig(6, 3, d_ff=8, gated=False, activation="gelu", router="sigmoid", balance="bias", bias_rate=0.5),
    "biases": MoEConfig(4, 2, 8, 1, "clamped_gelu", bias=True, shared_gate=True, balance="none"),
    "one sided": MoEConfig(4, 1, d_ff=8, balance="none"),
}


def model(name):
    torch.manual_seed(0)
    block = BlockConfig(AttentionConfig(2), MIXTURES[name])
    net = Transformer(TransformerConfig(V, S, 2, M, layers=(block,), tie_embeddings=True))
    net.layers[0].mlp.experts.down_proj.requires_grad_(False)
    if name == "one sided":  # every token goes to an expert of the first rank
        with torch.no_grad():
            for layer in net.layers:
                layer.mlp.router.weight.zero_()
    return net


def batch(step):
    return torch.randint(V, (2, 4, S), generator=torch.Generator().manual_seed(step))


def train(net, parts, finish=lambda: None, no_sync=None):
    """Two steps of two micro-batches; biases of the second are those of the first's loads."""
    losses = []
    for step in range(2):
        ids, targets = batch(step)
        for i, rows in enumerate(parts):
            loss = net(ids[rows], targets=targets[rows])
            if no_sync is not None and (step, i) != (1, len(parts) - 1):
                with no_sync():
                    loss.backward()
            else:
                loss.backward()
            losses.append(loss.detach())
        balance_experts(net)
    finish()
    return torch.stack(losses), {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def case(rank):
    results = {}
    for name in MIXTURES:
        net = expert_parallel(model(name))
        mine = [n for n, p in net.named_parameters() if any(p is e for e in expert_parameters(net))]
        ddp = DDP(net, ignored=expert_parameters(net))
        parts = [slice(i * 2 + rank, i * 2 + rank + 1) for i in range(2)]
        with count_traffic() as traffic:
            found = train(ddp, parts, ddp.finish_gradient_synchronization, ddp.no_sync)
        grads = {n.removeprefix("module."): g for n, g in found[1].items()}
        results[name] = found[0], grads, mine, dict(traffic.calls)
    dense = Transformer(TransformerConfig(V, S, 1, M, 2))
    odd = Transformer(TransformerConfig(V, S, 1, M, layers=(BlockConfig(AttentionConfig(2), MoEConfig(3, 1)),)))
    errors = [error_of(lambda n=n: expert_parallel(n)) for n in (dense, odd, net)]
    return results, errors


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(case, tmp_path_factory.mktemp("expert"))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_all_ranks_equal_one_process(ranks, name):
    net = model(name)
    losses, grads = train(net, [slice(0, 2), slice(2, 4)])
    found = [r[0][name] for r in ranks]
    torch.testing.assert_close(sum(f[0] for f in found), losses, rtol=1e-5, atol=1e-5)
    assert all(f[1].keys() == grads.keys() for f in found)
    for n, want in grads.items():
        if n in found[0][2]:
            got = torch.cat([f[1][n] for f in found])
        else:
            got = found[0][1][n]
            assert torch.equal(got, found[1][1][n])
        torch.testing.assert_close(WORLD * got, want, rtol=1e-4, atol=1e-5, msg=n)
    assert len(found[0][2]) == 2 * sum(1 for _ in net.layers[0].mlp.experts.parameters())


def test_each_layer_exchanges_counts_and_tokens_both_ways(ranks):
    for found in ranks[0][0].values():
        assert found[3]["all_to_all"] == 4 * 2 * (3 + 2)  # micro-batches, layers, forward and backward


def test_what_cannot_be_divided_is_refused(ranks):
    for dense, odd, twice in (r[1] for r in ranks):
        assert "no mixtures of experts" in dense
        assert "3 experts cannot be divided among 2 ranks: 3 / 2 = 1.5" in odd
        assert "divided before" in twice
