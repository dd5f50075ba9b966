import copy

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import error_of, on_ranks
from torch import nn

from cs336 import ops
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AlibiConfig, AttentionConfig, GELUConfig, LayerNormConfig, MLPConfig, MoEConfig, NoPositionsConfig
from cs336.parallel import Mesh, count_traffic, tensor_parallel
from cs336.parallel.mesh import resolve
from cs336.parallel.tensor import ColumnLinear, Region, RowLinear, whole_state_dict
from cs336.parallel.vocabulary import (
    VocabularyEmbedding,
    vocabulary_cross_entropy,
    vocabulary_linear_cross_entropy,
    vocabulary_linear_loss_sums,
)

WORLD = 2
V, S, M = 48, 8, 32
MORE = {"z_loss": 0.1}, {"label_smoothing": 0.2}, {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 3.0}
ALIBI = BlockConfig(AttentionConfig(4, qkv_bias=True, out_bias=True), GELUConfig(40), LayerNormConfig(), AlibiConfig())
SANDWICH = BlockConfig(
    AttentionConfig(4, 2, qk_norm=True, window=5, sinks=True), MLPConfig("gelu", bias=True), placement="sandwich"
)
PARALLEL = BlockConfig(AttentionConfig(2), parallel=True)
REORDERED = BlockConfig(AttentionConfig(2), placement="reordered")
LEARNED = BlockConfig(AttentionConfig(2), positions=NoPositionsConfig())
SCALES = {"embedding_scale": 2.0, "logit_scale": 1.5}
CONFIGS = {
    "short": TransformerConfig(V, S, 2, M, 4, 2, qk_norm=True, qkv_bias=True),
    "tied": TransformerConfig(V, S, 1, M, 4, tie_embeddings=True, logit_softcap=2.0, **SCALES),
    "alibi": TransformerConfig(V, S, 1, M, layers=(ALIBI,)),
    "learned": TransformerConfig(V, S, 1, M, layers=(LEARNED,), position_embedding="learned"),
    "placements": TransformerConfig(V, S, 3, M, layers=(SANDWICH, PARALLEL, REORDERED)),
}


def model(name):
    torch.manual_seed(0)
    net = Transformer(CONFIGS[name])
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    net.layers[0].mlp.up_proj.weight.requires_grad_(False)
    return net


def batch():
    ids, targets = torch.randint(V, (2, 2, S), generator=torch.Generator().manual_seed(1))
    targets[0, :3] = -100
    return ids, targets


def train(net, parts):
    """The loss, logits, features and accumulated gradients, with a segment of documents."""
    ids, targets = batch()
    losses = [net(ids[rows], targets=targets[rows]) for rows in parts]
    for loss in losses:
        (loss / 10).backward()
    with torch.no_grad():
        segments = torch.tensor([[0] * 3 + [1] * (S - 3)] * 2)
        return sum(losses).detach(), net(ids), net(ids, segments=segments), net.features(ids)


def whole_gradients(net):
    whole = copy.copy(net)
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    whole.state_dict = lambda: grads
    return whole_state_dict(whole)


def the_transformers(rank):
    results = {}
    for name in CONFIGS:
        for sequence in (False, True):
            net = tensor_parallel(model(name), sequence=sequence)
            with count_traffic() as traffic:
                outs = train(net, [slice(0, 1), slice(1, 2)])
            weights = whole_state_dict(net)
            frozen = [n for n, p in net.named_parameters() if not p.requires_grad]
            results[name, sequence] = outs, whole_gradients(net), weights, frozen, dict(traffic.calls)
    return results


def the_pieces(rank):
    torch.manual_seed(0)
    table, x, targets = nn.Embedding(V, M), torch.randn(3, S, M), torch.randint(V, (3, S))
    targets[0, 0] = -100
    up, down = nn.Linear(M, 12), nn.Linear(12, M)
    results = {}
    mine = VocabularyEmbedding.of(table)
    results["embedding"] = mine(targets.clamp(min=0)).detach()
    for sequence in (False, True):
        region = Region(sequence=sequence)
        column, row = ColumnLinear.of(up, region), RowLinear.of(down, region)
        part = slice(rank * S // WORLD, (rank + 1) * S // WORLD) if sequence else slice(0, S)
        leaf = x[:, part].clone().requires_grad_()
        y = row(column(leaf))
        y.square().sum().backward()
        results["mlp", sequence] = y.detach(), leaf.grad, column.weight.grad, row.weight.grad, row.bias.grad
    logits = (x @ table.weight.detach().T).chunk(WORLD, -1)[rank].clone().requires_grad_()
    loss = vocabulary_cross_entropy(logits, targets, softcap=3.0)
    loss.backward()
    results["cross_entropy"] = loss.detach(), logits.grad
    import cs336.parallel.vocabulary as vocabulary

    vocabulary.CHUNK_BYTES = 5 * 4 * V // WORLD  # five tokens a chunk
    leaf, weight = x.clone().requires_grad_(), mine.weight
    losses = vocabulary_linear_cross_entropy(leaf, weight, targets, reduction="none")
    (losses * torch.arange(3 * S).view(3, S)).sum().backward()
    grad = leaf.grad.clone()
    dist.all_reduce(grad)
    results["linear_cross_entropy"] = losses.detach(), grad, weight.grad
    for i, options in enumerate(MORE):
        leaf, own = x.clone().requires_grad_(), weight.detach().clone().requires_grad_()
        loss, alone = vocabulary_linear_loss_sums(leaf, own, targets, **options)
        loss.backward()
        dist.all_reduce(leaf.grad)
        results["sums", i] = loss.detach(), alone, leaf.grad, own.grad
    return results


def mistakes(rank):
    gqa = TransformerConfig(V, S, 1, M, 4, 1)
    moe = TransformerConfig(V, S, 1, M, layers=(BlockConfig(AttentionConfig(2), MoEConfig(4, 2)),))
    normed = TransformerConfig(V, S, 1, M, layers=(BlockConfig(AttentionConfig(2, qk_norm="all")),))
    dropped = TransformerConfig(V, S, 1, M, layers=(BlockConfig(AttentionConfig(2), dropout=0.1),))
    odd = TransformerConfig(V + 1, S, 1, M, 2)
    found = [error_of(lambda c=c: tensor_parallel(Transformer(c))) for c in (gqa, moe, normed, dropped, odd)]
    net = tensor_parallel(Transformer(CONFIGS["tied"]), sequence=True)
    found += [error_of(lambda: net(torch.zeros(1, 7, dtype=torch.long))), error_of(lambda: tensor_parallel(net))]
    found += [error_of(lambda: net(torch.full((1, 8), V))), error_of(lambda: Mesh(data=3, tensor=2))]
    return found


def case(rank):
    return the_transformers(rank), the_pieces(rank), mistakes(rank)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(case, tmp_path_factory.mktemp("tensor"), WORLD)


def close(got, want, what=""):
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_divided_transformer_equals_a_whole_one(ranks, name, sequence):
    net = model(name)
    wanted = train(net, [slice(0, 1), slice(1, 2)])
    for outs, grads, weights, frozen, _ in (r[0][name, sequence] for r in ranks):
        for got, want in zip(outs, wanted, strict=True):
            close(got, want)
        assert frozen == [n for n, p in net.named_parameters() if not p.requires_grad]
        want_grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        assert grads.keys() == want_grads.keys()
        for n, want in want_grads.items():
            close(grads[n], want, n)
        for n, want in net.state_dict().items():
            assert torch.equal(weights[n], want)
    assert torch.equal(ranks[0][0][name, sequence][0][0], ranks[1][0][name, sequence][0][0])


def test_traffic(ranks):
    """Of two micro-batches, and three passes without a backward."""
    plain, sequence = (ranks[0][0]["tied", s][-1] for s in (False, True))
    sums = 1 + 2 + 1  # embedding, o_proj and down_proj, the loss
    assert plain["all_reduce"] == 2 * (sums + 3) + 3 * 3  # the backward: into attention, into the MLP, into the head
    backward = 2 + 1  # o_proj and down_proj, the embedding
    assert sequence["all_gather"] == 2 * (2 + 1 + backward) + 2 * (2 + 1 + 1) + (2 + 1)  # two with logits, one without
    assert sequence["reduce_scatter"] == 2 * (2 + 2) + 3 * 2


def test_pieces(ranks):
    torch.manual_seed(0)
    table, x, targets = nn.Embedding(V, M), torch.randn(3, S, M), torch.randint(V, (3, S))
    targets[0, 0] = -100
    up, down = nn.Linear(M, 12), nn.Linear(12, M)
    y = down(up(x.requires_grad_()))
    y.square().sum().backward()
    for rank, found in enumerate(r[1] for r in ranks):
        assert torch.equal(found["embedding"], table(targets.clamp(min=0)))
        for sequence in (False, True):
            part = slice(rank * S // WORLD, (rank + 1) * S // WORLD) if sequence else slice(0, S)
            got_y, got_x, got_up, got_down, got_bias = found["mlp", sequence]
            close(got_y, y[:, part])
            close(got_x, x.grad[:, part])
            close(got_up, up.weight.grad.chunk(2)[rank])
            close(got_down, down.weight.grad.chunk(2, 1)[rank])
            close(got_bias, down.bias.grad)
    leaf, weight = x.detach().requires_grad_(), table.weight
    logits = (leaf @ weight.T).detach().requires_grad_()
    loss = ops.cross_entropy(logits, targets, softcap=3.0)
    loss.backward()
    losses = ops.cross_entropy(leaf @ weight.T, targets, reduction="none")
    (losses * torch.arange(3 * S).view(3, S)).sum().backward()
    for rank, found in enumerate(r[1] for r in ranks):
        close(found["cross_entropy"][0], loss)
        close(found["cross_entropy"][1], logits.grad.chunk(2, -1)[rank])
        for got, want in zip(
            found["linear_cross_entropy"], (losses, leaf.grad, weight.grad.chunk(2)[rank]), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for i, options in enumerate(MORE):
        leaf, weight = (t.detach().requires_grad_() for t in (x, table.weight))
        loss, alone = ops.linear_loss_sums(leaf, weight, targets, **options)
        loss.backward()
        for rank, found in enumerate(r[1] for r in ranks):
            want = loss.detach(), alone, leaf.grad, weight.grad.chunk(2)[rank]
            torch.testing.assert_close(found["sums", i], want, rtol=1e-5, atol=1e-5)


def test_what_has_no_division_is_refused_with_the_arithmetic(ranks):
    for found in (r[2] for r in ranks):
        kv, moe, normed, dropped, vocabulary, tokens, twice, outside, mesh = found
        assert "layer 0: num_kv_heads 1 / 2 = 0.5" in kv
        assert "mixture of experts" in moe
        assert "qk_norm 'all'" in normed
        assert "dropout" in dropped
        assert "vocab_size 49 / 2 = 24.5: pad it to 50" in vocabulary
        assert "7 / 2 = 3.5" in tokens
        assert "divided before" in twice
        assert "IndexError" in outside or "0 to 47" in outside
        assert "data 3 x tensor 2 = 6 ranks, but there are 2" in mesh


def test_resolve():
    assert resolve({"data": -1, "tensor": 4}, 32) == {"data": 8, "tensor": 4}
    assert resolve({"data": 1}, 1) == {"data": 1}
    for axes, said in (
        ({}, "needs axes"),
        ({"data": -1, "tensor": 3}, "tensor 3 = 3 does not divide 8 ranks: data would be 2.66667"),
        ({"data": 2, "tensor": 2}, "data 2 x tensor 2 = 4 ranks, but there are 8"),
        ({"data": 0}, "data must be"),
        ({"data": True}, "data must be"),
        ({"data": -1, "tensor": -1}, "only one"),
    ):
        with pytest.raises(ValueError, match=said):
            resolve(axes, 8)
