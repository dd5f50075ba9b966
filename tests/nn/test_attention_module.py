import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cs336.nn import Attention, AttentionConfig, Context, RotaryEmbedding
from cs336.ops import registry
from cs336.ops.attention_varlen import cu_seqlens


def test_is_torchs_multi_head_attention():
    ours = Attention(16, 4, bias=True, causal=False)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    projections = [getattr(ours, f"{name}_proj") for name in "qkv"]
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.3)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([p.weight for p in projections]),
            "in_proj_bias": torch.cat([p.bias for p in projections]),
            "out_proj.weight": ours.o_proj.weight,
            "out_proj.bias": ours.o_proj.bias,
        }
    )
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-5, rtol=1e-5)
    ours.causal = True
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    want = theirs(x, x, x, attn_mask=later, need_weights=False)[0]
    torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(None, None), (2, 6), (1, None)])
def test_grouped_queries_qk_norm_and_rope(num_kv_heads, head_dim):
    rope = RotaryEmbedding(head_dim or 4, 16)
    layer = Attention(16, 4, num_kv_heads, head_dim, qk_norm=True, norm_eps=1e-3, rope=rope)
    torch.nn.init.normal_(layer.q_norm.weight)
    torch.nn.init.normal_(layer.k_norm.weight)
    x, D, Hkv = torch.randn(2, 7, 16), head_dim or 4, num_kv_heads or 4
    assert (layer.q_proj.weight.shape, layer.k_proj.weight.shape) == ((4 * D, 16), (Hkv * D, 16))
    heads = lambda proj, n: (x @ proj.weight.T).view(2, 7, n, D)  # noqa: E731
    q = F.rms_norm(heads(layer.q_proj, 4), (D,), layer.q_norm.weight, 1e-3).transpose(1, 2)
    k = F.rms_norm(heads(layer.k_proj, Hkv), (D,), layer.k_norm.weight, 1e-3).transpose(1, 2)
    k, v = (t.repeat_interleave(4 // Hkv, 1) for t in (k, heads(layer.v_proj, Hkv).transpose(1, 2)))
    o = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
    torch.testing.assert_close(layer(x), o.transpose(1, 2).reshape(2, 7, 4 * D) @ layer.o_proj.weight.T)


def test_state_continues():
    layer = Attention(16, 4, 2, rope=RotaryEmbedding(4, 16))
    x, state = torch.randn(2, 9, 16), layer.new_state(2, 16)
    parts = [layer(x[:, a:b], Context(lengths=torch.tensor([a, a])), state) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))


def test_positions_and_mask():
    layer = Attention(16, 4, rope=RotaryEmbedding(4, 16))
    x = torch.randn(1, 5, 16)
    padded = torch.cat((torch.randn(1, 3, 16), x), 1)
    y = layer(padded, Context((torch.arange(8) - 3).clamp(min=0), torch.arange(8) >= 3))
    torch.testing.assert_close(y[:, 3:], layer(x))


@pytest.mark.parametrize("causal", [True, False])
def test_documents_by_their_ends_are_documents_by_a_mask(causal):
    """What a GPU takes and what a CPU takes; an id that comes again in a row is another document."""
    layer = Attention(16, 4, 2, causal=causal, qk_norm=True, rope=RotaryEmbedding(4, 16))
    segments = torch.tensor([[5, 5, 5, 2, 5, 5, 0], [0, 0, 0, 0, 0, 1, 1]])
    masked = Context.packed(segments)
    by_ends = Context(masked.positions, cu_seqlens=cu_seqlens(segments))
    assert by_ends.cu_seqlens.tolist() == [0, 3, 4, 6, 7, 12, 14]
    x, dy, outcomes = torch.randn(2, 7, 16), torch.randn(2, 7, 16), []
    for context in (masked, by_ends):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, context)
        outcomes.append((y, *torch.autograd.grad(y, (leaf, *layer.parameters()), dy)))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outcomes[0][0][0, 4:6], layer(x[:1, 4:6])[0])
    with pytest.raises(ValueError, match="no mask"):
        layer(x, dataclasses.replace(by_ends, mask=masked.mask))
    if causal:
        with pytest.raises(ValueError, match="without a mask or cu_seqlens"):
            layer(x, dataclasses.replace(by_ends, lengths=torch.zeros(2, dtype=torch.long)), layer.new_state(2, 16))


def test_packed_documents_need_no_mask_on_a_gpu(device):
    context = Context.packed(torch.zeros(1, 4, dtype=torch.long, device=device))
    assert (context.mask is None, context.cu_seqlens is None) == ((True, False) if device == "cuda" else (False, True))


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_any_number_of_batch_dims(lead):
    layer = Attention(16, 4, 2, qk_norm=True, rope=RotaryEmbedding(4, 16))
    x, positions = torch.randn(*lead, 5, 16), torch.randint(0, 16, (*lead, 5))
    mask = torch.randn(*lead, 4, 5, 5)
    got, moved, masked = layer(x), layer(x, Context(positions)), layer(x, Context(mask=mask))
    one = x.view(-1, 5, 16), positions.view(-1, 5), mask.view(-1, 4, 5, 5)
    for i, (row, row_positions, row_mask) in enumerate(zip(*one, strict=True)):
        torch.testing.assert_close(got.view(-1, 5, 16)[i], layer(row[None])[0])
        torch.testing.assert_close(moved.view(-1, 5, 16)[i], layer(row[None], Context(row_positions))[0])
        torch.testing.assert_close(masked.view(-1, 5, 16)[i], layer(row[None], Context(mask=row_mask))[0])


@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16)])
def test_nothing(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = Attention(16, 4, 2, qk_norm=True, rope=RotaryEmbedding(4, 16))(x)
    assert y.shape == shape
    y.sum().backward()


def test_bad_arguments():
    with pytest.raises(ValueError, match="d_model 16 is not a multiple of num_heads 3"):
        Attention(16, 3)
    with pytest.raises(ValueError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        Attention(16, 4, 3)
    with pytest.raises(ValueError, match="rope rotates heads of 8 features, these have 4"):
        Attention(16, 4, rope=RotaryEmbedding(8, 16))
    for bad in (torch.zeros(16), torch.zeros(1, 7, 8)):
        with pytest.raises(ValueError, match=r"x must be \(\.\.\., tokens, 16\), got shape"):
            Attention(16, 4)(bad)
    layer = Attention(16, 4)
    state = layer.new_state(2, 4)
    with pytest.raises(ValueError, match=r"needs context\.lengths"):
        layer(torch.zeros(2, 3, 16), Context(), state)
    for context in (Context(mask=torch.ones(3, 3), lengths=torch.zeros(2).long()), Context(lengths=torch.tensor([0]))):
        with pytest.raises(ValueError, match=r"without a mask|fit the state"):
            layer(torch.zeros(1 if context.mask is None else 2, 3, 16), context, state)
    layer.causal = False
    with pytest.raises(ValueError, match="a state needs causal attention"):
        layer(torch.zeros(2, 3, 16), Context(lengths=torch.zeros(2).long()), state)


@pytest.mark.parametrize("change", [{}, {"num_kv_heads": 2}, {"num_kv_heads": 1, "head_dim": 6, "qkv_bias": True}])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_config_builds_and_counts(change, qk_norm):
    config = AttentionConfig(4, **change, qk_norm=qk_norm)
    layer = config.build(16, norm_eps=1e-3, rope=None)
    assert config.num_parameters(16) == sum(p.numel() for p in layer.parameters())
    assert config.state_bytes(16, 9, 4) == layer.new_state(3, 9).nbytes // 3
    assert not qk_norm or layer.q_norm.eps == 1e-3
    with registry.use("ref"), FlopCounterMode(display=False) as counter:
        layer(torch.zeros(2, 5, 16))
    assert counter.get_total_flops() == 2 * 5 * config.flops(16, 5)
