"""Every kind of block against its formula in fp64, decoded, counted, and refused where it does not fit."""

import dataclasses
import math
import tomllib

import pytest
import torch
import torch.nn.functional as F
from test_memory import saved_bytes
from test_transformer import make, mean_loss
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.end_to_end.variants import BOUNDS, MLPS, NORMS, POSITIONS, VARIANTS, block, model
from cs336 import ops
from cs336.models import BlockConfig, Transformer, TransformerBlock, TransformerConfig, training_memory
from cs336.nn import (
    AlibiConfig,
    AttentionConfig,
    LayerNormConfig,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLPConfig,
    MoEConfig,
    NoMLPConfig,
    NoPositionsConfig,
    RopeConfig,
    YarnScaling,
)
from cs336.ops import registry, rope_tables
from cs336.utils.config import dumps, parse, to_table

SCALED = dataclasses.replace(BOUNDS["soft-caps"], logit_scale=0.3)
OF_FORMULA = MLPS | NORMS | POSITIONS | BOUNDS | {"scaled logits, bounded": SCALED}


GATED = {"MoE, shared behind a gate": block(mlp=MoEConfig(4, 2, 24, num_shared=2, shared_gate=True))}
GATED |= {"MoE, biases": block(mlp=MoEConfig(4, 2, 24, bias=True, activation="clamped_gelu"))}
GATED |= {"clamped": block(mlp=MLPConfig("clamped_gelu", gated=True, d_ff=24))}
EVERY = VARIANTS | GATED


@pytest.fixture(params=EVERY)
def config(request):
    return EVERY[request.param]


def uses_experts(config):
    return any(isinstance(block.mlp, MoEConfig) for block in config.blocks)


def ids(config, B=2, S=17):
    return torch.randint(0, config.vocab_size, (B, S))


ACTIVATIONS = {
    "relu": lambda h: h * (h > 0),
    "relu2": lambda h: h * h * (h > 0),
    "gelu": lambda h: h * (1 + torch.erf(h / math.sqrt(2))) / 2,
    "gelu_tanh": lambda h: h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2,
    "silu": lambda h: h / (1 + torch.exp(-h)),
    "sigmoid": lambda h: 1 / (1 + torch.exp(-h)),
}


class Definition:
    """A model from its weights alone, in float64, as the formulas say."""

    def __init__(self, config, weights):
        self.config, self.w = config, {name: t.double() for name, t in weights.items()}

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0)

    def norm(self, x, name, kind):
        if kind.kind == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + kind.eps).sqrt()
        return x * self.w.get(f"{name}.weight", 1) + self.w.get(f"{name}.bias", 0)

    def rotated(self, x, rope):
        D, S = x.shape[-1], x.shape[-2]
        r, rate = int(D * rope.fraction), 1.0
        frequencies = rope.theta ** (-torch.arange(0, r, 2).double() / r)
        scaling = rope.scaling
        match None if scaling is None else scaling.kind:
            case "linear":
                frequencies = frequencies / scaling.factor
            case "ntk":
                frequencies = (rope.theta * scaling.factor ** (r / (r - 2))) ** (-torch.arange(0, r, 2).double() / r)
            case "yarn":
                frequencies, rate = rope_tables.yarn(r, rope.theta, scaling.factor, scaling.original_context_length)
            case "llama3":
                factors = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
                frequencies = rope_tables.llama3(frequencies, *factors, scaling.original_context_length)
            case "longrope":
                frequencies = frequencies / torch.tensor(scaling.long_factors).double()
                rate = math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_context_length))
        turn = rate * torch.exp(1j * torch.outer(torch.arange(S).double(), frequencies))
        turned = torch.complex(*x[..., :r].chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag, x[..., r:]), -1)

    def attention(self, x, name, block):
        (B, S, _), mixer = x.shape, block.mixer
        D = mixer.head_size(self.config.d_model)
        q, k, v = (self.linear(x, f"{name}.{n}_proj") for n in "qkv")
        rms = block.norm if block.norm.kind == "rms_norm" else dataclasses.replace(VARIANTS["SwiGLU"].blocks[0].norm)
        if mixer.qk_norm == "all":
            q, k = self.norm(q, f"{name}.q_norm", rms), self.norm(k, f"{name}.k_norm", rms)
        q, k, v = (t.view(B, S, -1, D).transpose(1, 2) for t in (q, k, v))
        if mixer.qk_norm is True:
            q, k = self.norm(q, f"{name}.q_norm", rms), self.norm(k, f"{name}.k_norm", rms)
        if block.positions.kind == "rope":
            q, k = self.rotated(q, block.positions), self.rotated(k, block.positions)
        k, v = (t.repeat_interleave(mixer.num_heads // mixer.kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * (mixer.scale or D**-0.5)
        if mixer.softcap is not None:
            scores = mixer.softcap * torch.tanh(scores / mixer.softcap)
        if block.positions.kind == "alibi":
            slopes = torch.tensor([2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0, 2**-1.0, 2**-3.0]).double()  # of six heads
            distance = torch.arange(S)[:, None] - torch.arange(S)
            scores = scores - slopes[:, None, None] * distance
        scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
        if mixer.sinks:
            sink = self.w[f"{name}.sinks"][:, None, None].expand(B, -1, S, 1)
            scores, v = torch.cat((scores, sink), -1), F.pad(v, (0, 0, 0, 1))
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1), f"{name}.o_proj")

    def mlp(self, x, name, mlp):
        act, up = ACTIVATIONS[mlp.activation], self.linear(x, f"{name}.up_proj")
        hidden = act(self.linear(x, f"{name}.gate_proj")) * up if mlp.gated else act(up)
        return self.linear(hidden, f"{name}.down_proj")

    def layer(self, x, name, block):
        norm = lambda x, which: self.norm(x, f"{name}.{which}norm", block.norm)  # noqa: E731
        subs = {
            "attention_": lambda x: self.attention(x, f"{name}.attention", block),
            "mlp_": lambda x: self.mlp(x, f"{name}.mlp", block.mlp),
        }
        a = block.residual_scale
        if block.parallel:
            return x + a * (subs["attention_"](norm(x, "attention_")) + subs["mlp_"](norm(x, "attention_")))
        if block.mlp.kind == "none":
            del subs["mlp_"]
        for which, f in subs.items():
            match block.placement:
                case "pre":
                    x = x + a * f(norm(x, which))
                case "post":
                    x = norm(x + a * f(x), which)
                case "sandwich":
                    x = x + a * norm(f(norm(x, which)), f"{which}post_")
                case "reordered":
                    x = x + a * norm(f(x), which)
        return x

    def __call__(self, token_ids):
        config, M = self.config, self.config.d_model
        x = self.w["embedding.weight"][token_ids] * (config.embedding_scale or 1)
        S = token_ids.shape[1]
        if config.position_embedding == "learned":
            x = x + self.w["position_embedding.weight"][:S]
        if config.position_embedding == "sinusoidal":
            angle = torch.outer(torch.arange(S).double(), 10000.0 ** (-torch.arange(0, M, 2).double() / M))
            table = torch.zeros(S, M, dtype=torch.float64)
            table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
            x = x + table
        for i, layer in enumerate(config.blocks):
            x = self.layer(x, f"layers.{i}", layer)
        if config.blocks[-1].placement != "post":
            x = self.norm(x, "norm", config.blocks[-1].norm)
        logits = x @ self.w["embedding.weight" if config.tie_embeddings else "head.weight"].T
        logits, cap = logits * (config.logit_scale or 1), config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("name", OF_FORMULA)
def test_logits_and_gradients_against_fp64(name):
    config = OF_FORMULA[name]
    model, x, y = make(config), ids(config), ids(config)
    weights = {name: t.detach().double().requires_grad_() for name, t in model.state_dict().items()}
    want = Definition(config, weights)(x)
    F.cross_entropy(want.flatten(0, 1), y.flatten()).backward()
    logits = model(x)
    ops.cross_entropy(logits, y).backward()
    torch.testing.assert_close(logits.double(), want, atol=2e-5, rtol=1e-4)
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(p.grad.double(), weights[name].grad, atol=2e-5, rtol=1e-3)


def test_causal_and_packed(config):
    model, x = make(config).eval(), ids(config)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % config.vocab_size
    whole = model(x)
    if uses_experts(config):  # how many rows an expert multiplies at once decides how they are rounded
        torch.testing.assert_close(model(changed)[:, :9], whole[:, :9], atol=1e-6, rtol=1e-5)
    else:
        assert torch.equal(model(changed)[:, :9], whole[:, :9])
    segments = torch.tensor([[0] * 6 + [1] * 11] * 2)
    packed = model(x, segments=segments)
    torch.testing.assert_close(packed[:, :6], model(x[:, :6]), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(packed[:, 6:], model(x[:, 6:]), atol=2e-5, rtol=2e-5)


def test_decoding_is_the_parallel_form(config):
    model, x = make(config).eval(), ids(config, 3, 20)
    state, lengths = model.new_state(3), torch.tensor([9, 4, 1])
    first = model(x[:, :9], segments=-(torch.arange(9) >= lengths[:, None]).long(), state=state)
    steps = []
    for i in range(6):
        steps.append(model(torch.stack([x[b, n + i] for b, n in enumerate(lengths.tolist())])[:, None], state=state))
        if i == 2:  # back by two tokens, and the same again
            state.truncate(state.lengths - 2)
            model(torch.stack([x[b, n + 1 : n + 3] for b, n in enumerate(lengths.tolist())]), state=state)
    for b, n in enumerate(lengths.tolist()):
        whole = model(x[b : b + 1])[0]
        torch.testing.assert_close(first[b, :n], whole[:n], atol=2e-5, rtol=2e-5)
        got = torch.stack([step[b, 0] for step in steps])
        torch.testing.assert_close(got, whole[n : n + 6], atol=2e-5, rtol=2e-5)


def test_counts_are_the_models_own(config):
    model = Transformer(config).eval()
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
    x = ids(config, 3, 11)
    with registry.use("ref"), FlopCounterMode(display=False) as counter:
        ops.cross_entropy(model(x), x).backward()
    assert counter.get_total_flops() == 3 * 11 * config.flops_per_token(11)
    state = model.new_state(2, 20)
    assert state.nbytes - state.lengths.nbytes == 2 * config.state_bytes(20, 4)


# The reference, which a CPU runs for these, keeps all scores; the kernels that the counts describe keep none.
SCORES_KEPT = {"soft-caps", "sinks", "ALiBi", "dropout"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", sorted(EVERY.keys() - SCORES_KEPT))
def test_what_a_forward_keeps(name, autocast):
    config = EVERY[name]
    token_ids, targets = torch.randint(64, (2, 3, 32))
    memory = training_memory(config, 3, compute_bytes=2 if autocast else None)
    kept = memory.casts + memory.activations + memory.logits - 3 * 32 * 64 * (10 if autocast else 4)
    if config.blocks[0].positions.kind == "none":  # without a rotation torch gives its output as o_proj reads it
        kept -= 2 * 3 * 32 * 32 * (2 if autocast else 4)
    if config.position_embedding == "learned":
        kept += 32 * 8  # the positions themselves
    found = saved_bytes(Transformer(config), token_ids, targets, autocast)
    if uses_experts(config):  # and the shares of the choices, once a layer
        assert 0 <= found - kept <= 2 * 4 * 12
    else:
        assert kept == found


def test_dropped_features_are_kept():
    plain, dropped = block(), block(dropout=0.2)
    found = []
    for config in (plain, dropped):
        x = torch.randint(64, (2, 3, 32))
        memory = training_memory(config, 3)
        found.append(saved_bytes(Transformer(config), *x, False) - memory.activations)
    assert found[0] == found[1]


def test_each_trains(config):
    torch.manual_seed(0)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.arange(32).repeat(8, 1) * torch.arange(1, 9)[:, None] % 64  # counting by ones, by twos, ...
    losses = []
    for _ in range(20):
        loss = mean_loss(model, x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]


def test_configurations_go_round_through_toml(config, tmp_path):
    (tmp_path / "config.toml").write_text(dumps(config))
    assert parse(TransformerConfig, tomllib.loads((tmp_path / "config.toml").read_text())) == config
    assert config.short_form() is None or config.short_form().blocks == config.blocks


def test_old_kinds_of_mlp_have_their_names():
    table = to_table(VARIANTS["GELU"])
    assert table["layers"][0]["mlp"] == {"kind": "gelu"}
    for kind, same in (("gelu", MLPConfig("gelu")), ("swiglu", MLPConfig("silu", gated=True))):
        table["layers"][0]["mlp"] = {"kind": kind, "d_ff": 40}
        old, new = parse(TransformerConfig, table).blocks[0].mlp, dataclasses.replace(same, d_ff=40)
        x = torch.randn(3, 32)
        first, second = old.build(32), new.build(32)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x), second(x))
        assert old.num_parameters(32) == new.num_parameters(32)


@pytest.mark.parametrize("option", ["dropout", "stochastic_depth", "embedding_dropout", "attention dropout"])
def test_regularisation_acts_in_training_alone(option):
    p = 0.3
    if option == "embedding_dropout":
        config = model(BlockConfig(AttentionConfig(4)), embedding_dropout=p)
    elif option == "attention dropout":
        config = block(AttentionConfig(4, dropout=p))
    else:
        config = block(**{option: p})
    network, plain, x = make(config), Transformer(block()), ids(config, 4)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(x), plain(x))
    network.train()
    torch.manual_seed(0)
    first, second = network(x), network(x)
    torch.manual_seed(0)
    assert torch.equal(network(x), first)
    assert not torch.equal(first, second)


def test_stochastic_depth_skips_whole_sequences_and_keeps_the_mean():
    made = TransformerBlock(BlockConfig(AttentionConfig(4), stochastic_depth=0.4), 32).train()
    x = made._update(torch.ones(5000, 3, 4))
    torch.testing.assert_close(x.unique(), torch.tensor([0.0, 1 / 0.6]))
    assert (x == x[:, :1, :1]).all()
    assert abs(x.mean() - 1) < 0.05


ALIBI, PLAIN = BlockConfig(AttentionConfig(4), positions=AlibiConfig()), BlockConfig(AttentionConfig(4))
ODD = BlockConfig(AttentionConfig(3), positions=NoPositionsConfig())
REFUSED = [
    (
        lambda: MLPConfig("tanh"),
        "activation must be 'relu' or 'relu2' or 'gelu' or 'gelu_tanh' or 'silu' or 'sigmoid' or 'clamped_gelu', got",
    ),
    (lambda: MLPConfig(gated=1), "gated must be true or false, got 1"),
    (lambda: MLPConfig(d_ff=0), "d_ff must be a positive integer"),
    (lambda: LayerNormConfig(weight=False), "a layer_norm with a bias and no weight is not known"),
    (lambda: block(placement="peri"), "placement must be 'pre' or 'post' or 'sandwich' or 'reordered', got 'peri'"),
    (lambda: block(parallel=True, placement="post"), "parallel blocks are normed before: placement must be 'pre'"),
    (lambda: block(parallel=True, mlp=NoMLPConfig()), "it needs an MLP, got one of kind 'none'"),
    (lambda: block(dropout=1.0), "dropout must be a number from 0 to below 1, got 1.0"),
    (lambda: block(stochastic_depth=-0.1), "stochastic_depth must be a number from 0 to below 1"),
    (lambda: block(residual_scale=0.0), "residual_scale must be a positive, finite number"),
    (lambda: block(AttentionConfig(4, softcap=0.0)), "softcap must be a positive, finite number, got 0"),
    (lambda: block(AttentionConfig(4, sinks=1)), "sinks must be true or false, got 1"),
    (lambda: block(AttentionConfig(4, qk_norm="both")), "qk_norm must be true, false or 'all', got 'both'"),
    (lambda: block(positions=RopeConfig(fraction=0.4)), "fraction 0.4 of head_dim 8 rotates 3 features"),
    (lambda: block(positions=RopeConfig(fraction=1.5)), "fraction must be at most 1"),
    (lambda: LinearScaling(0.5), "factor must be at least 1, got 0.5"),
    (lambda: YarnScaling(2.0, 0), "original_context_length must be a positive integer"),
    (lambda: Llama3Scaling(2.0, 8, 4.0, 4.0), "high_freq_factor must exceed low_freq_factor 4.0, got 4.0"),
    (lambda: LongRopeScaling((1.0,), (0.0,), 8, 2.0), r"long_factors\[0\] must be a positive, finite number, got 0.0"),
    (lambda: LongRopeScaling((1.0,), 2.0, 8, 2.0), "long_factors must be a list or tuple, got 2.0"),
    (lambda: LongRopeScaling((1.0,), (1.0,), 1, 2.0), "original_context_length must be at least 2"),
    (
        lambda: block(positions=RopeConfig(scaling=LongRopeScaling((1.0,) * 4, (1.0,) * 3, 8, 2.0))),
        "long_factors must have 4 numbers, one a rotated pair, got 3",
    ),
    (lambda: model(PLAIN, position_embedding="learned"), "'learned' beside 'rope' positions"),
    (lambda: model(ALIBI, position_embedding="sinusoidal"), "'sinusoidal' beside 'alibi' positions"),
    (lambda: model(PLAIN, position_embedding="rotary"), "position_embedding must be 'learned' or 'sinusoidal', got"),
    (lambda: model(ODD, d_model=33, position_embedding="sinusoidal"), "d_model must be even for sinusoidal positions"),
]


@pytest.mark.parametrize(("made", "message"), REFUSED)
def test_what_does_not_fit_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        made()
