"""Every mixer against its formula, token by token from its weights alone, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from mixers import MIXERS, make

from cs336.nn import Context, RopeConfig

EPS = 1e-5


def rms(x, w=None):
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y if w is None else y * w


def rotated(x_SHD):
    """The two halves of a head turned by the token's position."""
    S, D = x_SHD.shape[0], x_SHD.shape[-1]
    angle = torch.outer(torch.arange(S).double(), 10000.0 ** (-torch.arange(0, D, 2).double() / D))[:, None]
    a, b = x_SHD.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def softmax_attention(q_SHD, k_SHD, v_SHE, window=None):
    """A token and a head at a time."""
    S, _, D = q_SHD.shape
    out = []
    for t in range(S):
        first = 0 if window is None else max(0, t - window + 1)
        p_HT = torch.softmax(torch.einsum("hd,thd->ht", q_SHD[t], k_SHD[first : t + 1]) / D**0.5, -1)
        out.append(torch.einsum("ht,the->he", p_HT, v_SHE[first : t + 1]))
    return torch.stack(out).flatten(1)


def attention(x, w, c):
    def heads(n):
        return (x @ w[f"{n}_proj.weight"].T + w.get(f"{n}_proj.bias", 0)).unflatten(-1, (-1, c.head_size(32)))

    q, k, v = map(heads, "qkv")
    if c.qk_norm:
        q, k = rms(q, w["q_norm.weight"]), rms(k, w["k_norm.weight"])
    k, v = (t.repeat_interleave(c.num_heads // c.kv_heads, 1) for t in (rotated(k), v))
    return softmax_attention(rotated(q), k, v, c.window) @ w["o_proj.weight"].T


def latent_attention(x, w, c):
    H, D, R, L = c.num_heads, c.head_dim, c.rope_head_dim, c.kv_rank
    latent = rms(x @ w["q_a_proj.weight"].T, w["q_a_norm.weight"]) if c.q_rank else x
    q = (latent @ w["q_proj.weight"].T).unflatten(-1, (H, D + R))
    both = x @ w["kv_a_proj.weight"].T
    shared = rotated(both[:, None, L:])
    kv = (rms(both[:, :L], w["kv_a_norm.weight"]) @ w["kv_b_proj.weight"].T).unflatten(-1, (H, -1))
    q = torch.cat((q[..., :D], rotated(q[..., D:])), -1)
    k = torch.cat((kv[..., :D], shared.expand(-1, H, -1)), -1)
    return softmax_attention(q, k, kv[..., D:]) @ w["o_proj.weight"].T


def causal_conv(x_SC, w):
    weight, size = w["conv1d.weight"][:, 0], w["conv1d.weight"].shape[-1]
    padded = torch.cat((x_SC.new_zeros(size - 1, x_SC.shape[1]), x_SC))
    y = torch.stack([(padded[t : t + size] * weight.T).sum(0) for t in range(len(x_SC))])
    return y + w.get("conv1d.bias", 0)


def linear_attention(x, w, c):
    H, K, V = c.num_heads, c.key_size(32), c.value_size(32)
    qkv = torch.cat([x @ w[f"{n}_proj.weight"].T for n in "qkv"], -1)
    qkv = F.silu(qkv if c.conv_size == 0 else causal_conv(qkv, w))
    q, k, v = (t.unflatten(-1, (H, -1)) for t in qkv.split((H * K, H * K, H * V), -1))
    if c.delta:
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        beta = torch.sigmoid(x @ w["b_proj.weight"].T)
    keep = torch.ones(len(x), H).double()
    if c.decay == "head":
        keep = keep * (1 - 2.0 ** (-5 - torch.arange(H).double()))
    elif c.decay == "token":
        keep = torch.exp(-w["A_log"].exp() * torch.log1p((x @ w["a_proj.weight"].T + w["dt_bias"]).exp()))
    out = []
    for h in range(H):
        S = torch.zeros(K, V).double()
        for t in range(len(x)):
            S = keep[t, h] * S
            if c.delta:
                S = S - beta[t, h] * torch.outer(k[t, h], k[t, h] @ S)
                S = S + beta[t, h] * torch.outer(k[t, h], v[t, h])
            else:
                S = S + torch.outer(k[t, h], v[t, h])
            out.append(S.T @ q[t, h] / K**0.5)
    o = torch.stack(out).unflatten(0, (H, -1)).transpose(0, 1)
    gate = F.silu(x @ w["g_proj.weight"].T).unflatten(-1, (H, V))
    return (rms(o, w["o_norm.weight"]) * gate).flatten(1) @ w["o_proj.weight"].T


def mamba2(x, w, c):
    inner, H, G, N, P = c.inner_size(32), c.num_heads(32), c.num_groups, c.state_dim, c.head_dim
    z, xBC, dt = (x @ w["in_proj.weight"].T).split((inner, c.conv_channels(32), H), -1)
    u, B, C = F.silu(causal_conv(xBC, w)).split((inner, G * N, G * N), -1)
    u, B, C = u.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    dt = torch.log1p((dt + w["dt_bias"]).exp())
    y = torch.zeros(len(x), H, P).double()
    for h in range(H):
        S = torch.zeros(P, N).double()
        for t in range(len(x)):
            S = torch.exp(-w["A_log"][h].exp() * dt[t, h]) * S + dt[t, h] * torch.outer(u[t, h], B[t, h * G // H])
            y[t, h] = S @ C[t, h * G // H] + w["D"][h] * u[t, h]
    normed = rms((y.flatten(1) * F.silu(z)).unflatten(-1, (G, -1))).flatten(1)
    return normed * w["norm.weight"] @ w["out_proj.weight"].T


def hyena(x, w, c):
    q, k, v = causal_conv(x @ w["in_proj.weight"].T, w).chunk(3, -1)
    lag = torch.arange(min(len(x), c.filter_length)).double()[:, None] / c.filter_length
    angle = 2 * math.pi * lag * torch.arange(1, 17)
    h = torch.cat((lag, angle.cos(), angle.sin()), -1)
    for name in ("in_proj", "hidden_proj"):
        h = torch.sin(w["filter.frequency"] * (h @ w[f"filter.{name}.weight"].T + w[f"filter.{name}.bias"]))
    h = (
        h
        @ w["filter.out_proj.weight"].T
        * torch.exp(lag * math.log(0.01) / torch.linspace(0.3, 1.5, 32, dtype=torch.float64))
    )
    u = k * v
    y = torch.stack([sum(h[j] * u[t - j] for j in range(min(t + 1, len(h)))) for t in range(len(x))])
    return (q * (y + w["D"] * u)) @ w["out_proj.weight"].T


DEFINITIONS = {f.__name__: f for f in (attention, latent_attention, linear_attention, mamba2, hyena)}


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_its_formula(name):
    mixer, config = make(name, dtype=torch.float64).layers[0].attention, MIXERS[name]
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    if mixer_rope := getattr(mixer, "rope", None):  # the model's is of its context_length
        mixer.rope = RopeConfig().build(mixer_rope.head_dim, 70)
    weights = {n: p.detach() for n, p in mixer.named_parameters()}
    got = mixer(x)
    for row in range(2):
        want = DEFINITIONS[config.kind](x[row], weights, config)
        error = (got[row] - want).norm() / want.norm()
        assert error < (1e-6 if mixer_rope else 1e-11), error  # rotary tables are float32
    assert torch.equal(mixer(x, Context()), got)


def test_mamba2_is_that_of_transformers():
    """Of the same weights under the same names."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = MIXERS["mamba2"]
    theirs = Mamba2Mixer(
        transformers.Mamba2Config(
            hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, conv_kernel=4, expand=2, chunk_size=16,
            layer_norm_epsilon=EPS, use_bias=False, use_conv_bias=True, rms_norm=True,
        ),
        layer_idx=0,
    )  # fmt: skip
    ours = config.build(32, norm_eps=EPS, rope=None)
    assert str(theirs.load_state_dict(ours.state_dict())) == "<All keys matched successfully>"
    x = torch.randn(2, 40, 32)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
