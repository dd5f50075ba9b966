import pytest
import torch
import torch.distributed as dist
from gloo_ranks import error_of, on_ranks

from cs336 import ops
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.nn import AlibiConfig, AttentionConfig, LinearAttentionConfig
from cs336.parallel import all_to_all_attention, context_parallel, count_traffic, own_tokens, ring_attention

WORLD = 3
V, S, M = 17, 12, 48
CASES = {
    "causal": {"causal": True},
    "both ways": {"causal": False, "scale": 0.3},
    "softcap": {"causal": True, "softcap": 2.0},
}
ULYSSES = CASES | {"window": {"causal": True, "window": (4, 0)}, "alibi": {"causal": True}}
CONFIGS = {
    ("ring", "tied"): TransformerConfig(V, S, 2, M, 3, 1, tie_embeddings=True),
    ("all_to_all", "tied"): TransformerConfig(V, S, 2, M, 6, 3, tie_embeddings=True),
    ("all_to_all", "alibi"): TransformerConfig(
        V, S, 1, M, layers=(BlockConfig(AttentionConfig(3, window=5, sinks=True), positions=AlibiConfig()),)
    ),
}


def qkv(kind):
    torch.manual_seed(0)
    heads = (3, 1, 1) if kind == "ring" else (6, 3, 3)
    return [torch.randn(2, H, S, D) for H, D in zip(heads, (8, 8, 10), strict=True)], torch.randn(2, heads[0], S, 10)


def options(kind, name):
    slopes = {"alibi_slopes": torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1, 0.05])} if name == "alibi" else {}
    return (ULYSSES if kind == "all_to_all" else CASES)[name] | slopes


def attended(kind, name, dtype=torch.float32):
    leaves, do = qkv(kind)
    leaves = [own_tokens(x, dim=2, kind=kind).to(dtype).requires_grad_() for x in leaves]
    call = ring_attention if kind == "ring" else all_to_all_attention
    with count_traffic() as traffic:
        o = call(*leaves, **options(kind, name))
        o.backward(own_tokens(do, dim=2, kind=kind).to(dtype))
    return [o.detach(), *(x.grad for x in leaves)], dict(traffic.bytes)


def model(kind, name):
    torch.manual_seed(0)
    net = Transformer(CONFIGS[kind, name])
    net.layers[0].mlp.up_proj.weight.requires_grad_(False)
    return net


def batch():
    ids, targets = torch.randint(V, (2, 2, S), generator=torch.Generator().manual_seed(1))
    targets[0, 2:5] = -100
    return ids, targets


def trained(kind, name):
    net = context_parallel(model(kind, name), kind=kind)
    ids, targets = (own_tokens(x, kind=kind) for x in batch())
    total = torch.zeros(())
    for rows in (slice(0, 1), slice(1, 2)):
        loss = net(ids[rows], targets=targets[rows])
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
    return total, grads, net(ids).detach()


def mistakes():
    def of(config, kind):
        return error_of(lambda: context_parallel(Transformer(config), kind=kind))

    short = TransformerConfig(V, S, 1, M, 6, 2)
    windowed = TransformerConfig(V, S, 1, M, layers=(BlockConfig(AttentionConfig(3, window=5)),))
    linear = TransformerConfig(V, S, 1, M, layers=(BlockConfig(LinearAttentionConfig(3)),))
    net = context_parallel(Transformer(short))
    ids, state = torch.zeros(1, 4, dtype=torch.long), Transformer(short).new_state(1)
    q = torch.zeros(1, 1, 3, 8)
    return [
        *(of(short, "all_to_all"), of(windowed, "ring"), of(linear, "ring"), of(short, "rings")),
        error_of(lambda: net(ids, segments=ids)),
        error_of(lambda: net(ids, state=state)),
        error_of(lambda: net(torch.zeros(1, 6, dtype=torch.long))),
        error_of(lambda: own_tokens(torch.zeros(1, 9))),
        error_of(lambda: ring_attention(q, q, q)),
        error_of(lambda: own_tokens(ids, kind="rings")),
    ]


def case(rank):
    functions = {("ring", name): attended("ring", name) for name in CASES}
    functions |= {("all_to_all", name): attended("all_to_all", name) for name in ULYSSES}
    functions["ring", "bfloat16"] = attended("ring", "causal", torch.bfloat16)
    return functions, {key: trained(*key) for key in CONFIGS}, mistakes()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(case, tmp_path_factory.mktemp("context"), WORLD)


def in_order(parts, dim, kind):
    """The tensors of the ranks, as one with the tokens in order."""
    if kind == "all_to_all":
        return torch.cat(parts, dim)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def close(got, want, what="", tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(
    ("kind", "name"), [*(("ring", name) for name in [*CASES, "bfloat16"]), *(("all_to_all", name) for name in ULYSSES)]
)
def test_attention_over_the_tokens_of_all_ranks(ranks, kind, name):
    leaves, do = qkv(kind)
    leaves = [x.requires_grad_() for x in leaves]
    o = ops.attention(*leaves, **options(kind, "causal" if name == "bfloat16" else name))
    o.backward(do)
    found = [r[0][kind, name][0] for r in ranks]
    for i, want in enumerate((o, *(x.grad for x in leaves))):
        got = in_order([outs[i] for outs in found], 2, kind)
        close(got.float(), want, f"{i}", 0.06 if name == "bfloat16" else 1e-5)


def test_a_ring_sends_keys_and_values_round(ranks):
    size = 4 * 2 * (S // WORLD) * (8 + 10)  # float32, two sequences, one head
    forward = size * (WORLD - 1)
    assert ranks[0][0]["ring", "causal"][1] == {"shift": forward + forward + size * WORLD}  # and float32 gradients
    assert set(ranks[0][0]["all_to_all", "causal"][1]) == {"all_to_all"}


@pytest.mark.parametrize(("kind", "name"), CONFIGS)
def test_a_transformer_over_the_tokens_of_all_ranks(ranks, kind, name):
    net = model(kind, name)
    ids, targets = batch()
    loss = net(ids, targets=targets)
    loss.backward()
    logits = in_order([r[1][kind, name][2] for r in ranks], 1, kind)
    close(logits, net(ids), "logits")
    for total, grads, _ in (r[1][kind, name] for r in ranks):
        close(total, loss.detach())
        assert grads.keys() == {n for n, p in net.named_parameters() if p.requires_grad}
        for n, grad in grads.items():
            close(grad, net.get_parameter(n).grad, n)


def test_what_cannot_be_divided_is_refused(ranks):
    for found in (r[2] for r in ranks):
        heads, window, linear, kind, segments, state, tokens, odd, uneven, dealt = found
        assert "num_kv_heads 2 / 3 = 0.666667; a ring takes any" in heads
        assert "a ring has no window; all_to_all has" in window
        assert "LinearAttention, not Attention" in linear
        assert "kind must be 'ring' or 'all_to_all', got 'rings'" in kind
        assert dealt == kind
        assert "no segments" in segments
        assert "state" in state
        assert "18 tokens do not fit the model's context_length of 12" in tokens
        assert "9 tokens" in odd
        assert "must be even, got 3" in uneven
