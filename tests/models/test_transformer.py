import copy
import dataclasses
import functools
import pathlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cs336 import ops
from cs336.models import BlockConfig, Transformer, TransformerConfig
from cs336.models.block import Stream
from cs336.models.config import SHORT
from cs336.nn import (
    AttentionConfig,
    GELUConfig,
    LayerNormConfig,
    NoPositionsConfig,
    RopeConfig,
    RotaryEmbedding,
)
from cs336.ops import registry

SMALL = TransformerConfig(97, 24, num_layers=3, d_model=32, num_heads=4, init_std=0.15)
VARIANTS = {
    "plain": {},
    "interleaved": {"rope_interleaved": True, "rope_theta": 50.0},
    "grouped": {"num_kv_heads": 2, "tie_embeddings": True},
    "everything": {
        "num_kv_heads": 1,
        "head_dim": 12,
        "qk_norm": True,
        "qkv_bias": True,
        "logit_softcap": 2.0,
        "d_ff": 40,
    },
}


SHORT_DEFAULTS = {f.name: f.default for f in dataclasses.fields(TransformerConfig)}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(SMALL, **VARIANTS[request.param])


def make(config, **options):
    model = Transformer(config, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)  # norm weights of 1 would hide a norm that is not applied
    return model


def ids(config, B=2, S=17):
    return torch.randint(0, config.vocab_size, (B, S))


def definition(config, weights, token_ids):
    """The same model from its weights alone, in float64, layer by layer."""
    w = {name: t.double() for name, t in weights.items()}
    norm = lambda x, name: F.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config.norm_eps)  # noqa: E731
    B, S = token_ids.shape
    D = config.head_size
    angles = torch.outer(torch.arange(S).double(), config.rope_theta ** (-torch.arange(0, D, 2).double() / D))
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):
        if config.rope_interleaved:
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = w["embedding.weight"][token_ids]
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        h = norm(x, f"{layer}.attention_norm")
        q, k, v = (
            (h @ w[f"{layer}.attention.{n}_proj.weight"].T + w.get(f"{layer}.attention.{n}_proj.bias", 0))
            .view(B, S, -1, D)
            .transpose(1, 2)
            for n in "qkv"
        )
        if config.qk_norm:
            q, k = norm(q, f"{layer}.attention.q_norm"), norm(k, f"{layer}.attention.k_norm")
        k, v = (t.repeat_interleave(config.num_heads // config.kv_heads, 1) for t in (k, v))
        scores = rotate(q.contiguous()) @ rotate(k.contiguous()).transpose(-1, -2) / D**0.5
        scores = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf)
        o = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1)
        x = x + o @ w[f"{layer}.attention.o_proj.weight"].T
        h = norm(x, f"{layer}.mlp_norm")
        gate, up = (h @ w[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
    logits = norm(x, "norm") @ w["embedding.weight" if config.tie_embeddings else "head.weight"].T
    cap = config.logit_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def mean_loss(model, token_ids, targets):
    return ops.cross_entropy(model(token_ids), targets)


def test_the_sum_of_losses_without_logits(config):
    """Head and loss together: the loss and gradients of the logits' cross-entropy."""
    model, x, y = make(config), ids(config), ids(config)
    y[0, :3] = -1
    want = ops.cross_entropy(model(x), y, ignore_index=-1, reduction="sum")
    got = model(x, targets=y, ignore_index=-1)
    torch.testing.assert_close(got, want)
    parameters = list(model.parameters())
    for g, w in zip(*(torch.autograd.grad(loss, parameters) for loss in (got, want)), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x, targets=y, ignore_index=-1), want)


@pytest.mark.parametrize("forced", [None, "ref"])
def test_logits_loss_and_gradients_against_fp64(config, forced):
    model, x, y = make(config), ids(config), ids(config)
    y[0, :3] = -100
    weights = {name: t.detach().double().requires_grad_() for name, t in model.state_dict().items()}
    want = definition(config, weights, x)
    want_loss = F.cross_entropy(want.flatten(0, 1), y.flatten())
    want_loss.backward()
    with registry.use(forced):
        logits, loss = model(x), mean_loss(model, x, y)
        loss.backward()
    assert loss.dtype == torch.float32
    close = lambda a, b: torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)  # noqa: E731
    close(logits, want)
    close(loss, want_loss)
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        close(p.grad, weights[name].grad)


def test_later_tokens_do_not_matter(config):
    model, x = make(config), ids(config)
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % config.vocab_size
    before, after = model(x), model(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert (after[:, 9:] != before[:, 9:]).any(-1).all()


def test_autocast_runs_the_stream_in_bf16(config):
    model, x = make(config), ids(config)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(x), mean_loss(model, x, x)
    loss.backward()
    assert set(seen.values()) == {torch.bfloat16}
    assert logits.dtype == (torch.bfloat16 if config.logit_softcap is None else torch.float32)
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(loss, mean_loss(model, x, x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("variant", "autocast"), [("plain", False), ("everything", True)])
def test_compiles_whole(variant, autocast):
    config = dataclasses.replace(SMALL, **VARIANTS[variant], num_layers=2)
    model, x = make(config), ids(config)
    compiled = torch.compile(functools.partial(mean_loss, model), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = mean_loss(model, x, x)
        loss = compiled(x, x)
    torch.testing.assert_close(loss, want, atol=0.01 if autocast else 1e-5, rtol=0)
    params = list(model.parameters())
    for got, grad in zip(torch.autograd.grad(loss, params), torch.autograd.grad(want, params), strict=True):
        assert (got - grad).norm() <= (0.05 if autocast else 1e-5) * grad.norm()


def test_gradient_checkpointing_keeps_less_and_changes_nothing(config):
    model, x = make(config), ids(config)
    params = list(model.parameters())

    def run():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = mean_loss(model, x, x)
        return sum(kept), torch.autograd.grad(loss, params)

    before, want = run()
    model.gradient_checkpointing = True
    after, got = run()
    assert after < before / 2
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_starts_as_the_field_does():
    config = dataclasses.replace(SMALL, d_model=256, num_layers=8, init_std=0.02, qk_norm=True, qkv_bias=True)
    model = Transformer(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, 0 if name.endswith("bias") else 1)), name
        else:
            std = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert abs(p.std() / std - 1) < 0.03, name
    x = ids(config, 32, 24)
    assert abs(mean_loss(model, x, ids(config, 32, 24)) - torch.tensor(97.0).log()) < 0.1


def test_seed_decides_the_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(Transformer(SMALL).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


@pytest.mark.parametrize("name", VARIANTS)
def test_numbers_are_those_of_the_first_release(name):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(SMALL, **VARIANTS[name])).double()
    x = torch.randint(0, 97, (2, 17))
    want = load_file(pathlib.Path(__file__).parents[1] / "fixtures" / "logits.safetensors")[name].double()
    # In float64, since processors add up float32 in different orders: what is left is the rounding of the fixture.
    torch.testing.assert_close(model(x)[:, -4:], want, atol=2e-6, rtol=1e-6)


def test_packed_documents_are_strangers(config):
    model, documents = make(config), [ids(config, 1, n) for n in (5, 1, 11)]
    packed = torch.cat((*documents, torch.zeros(1, 3, dtype=torch.long)), 1).repeat(2, 1)
    segments = torch.tensor([[7] * 5 + [3] + [0] * 11 + [-1] * 3] * 2, dtype=torch.int32)
    got = model(packed, segments=segments)
    for document, part in zip(documents, got[0].split([5, 1, 11, 3])[:3], strict=True):
        torch.testing.assert_close(part, model(document)[0], atol=1e-5, rtol=1e-5)
    restarted = torch.cat([torch.arange(n) for n in (5, 1, 11, 3)])
    assert torch.equal(model(packed, positions=restarted, segments=segments), got)
    later = model(packed, positions=restarted.flip(0), segments=segments)
    assert not torch.allclose(later, got, atol=1e-3)


def test_positions(config):
    model, x = make(config), ids(config, 2, 9)
    rows = torch.stack((torch.arange(9) + 4, torch.arange(9)))
    both = model(x, positions=rows)
    assert torch.equal(model(x, positions=torch.arange(9)), model(x))
    torch.testing.assert_close(both, model(x), atol=1e-4, rtol=1e-4)  # rotary positions are relative
    spread = model(x, positions=2 * torch.arange(9))
    assert not torch.allclose(spread, both, atol=1e-3)


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_gradients_in_float64(variant):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    config = dataclasses.replace(config, vocab_size=5, num_layers=2, d_model=8, num_heads=2, head_dim=4, d_ff=6)
    model, x = make(config, dtype=torch.float64), torch.randint(5, (1, 4))
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        logits = torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)
        return ops.cross_entropy(logits, x.flip(1))

    assert loss(*values).dtype == torch.float64
    torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_onto_a_model_without_memory(config, assign):
    model, x = make(config), ids(config)
    with torch.device("meta"):
        late = Transformer(config)
    if not assign:
        late.to_empty(device="cpu")
        for module in late.modules():
            if isinstance(module, RotaryEmbedding):  # memory that was never written may be right by chance
                assert torch.equal(module.cos, model.layers[0].attention.rope.cos)
    assert str(late.load_state_dict(model.state_dict(), assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(late(x), model(x))


def test_block_alone_is_the_block_in_the_stack(config):
    model, x = make(config), torch.randn(2, 7, 32)
    first, second = model.layers[0], model.layers[1]
    want = x + first.attention(first.attention_norm(x))
    want = want + first.mlp(first.mlp_norm(want))
    torch.testing.assert_close(first(x), want)
    torch.testing.assert_close(second(first(Stream(x, None))).value, second(first(x)))


def test_blocks_are_sharded_one_by_one(tmp_path):
    """FSDP gathers a block's weights as the block is called; here of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = make(SMALL), ids(SMALL)
        model.gradient_checkpointing = True
        want = torch.autograd.grad(mean_loss(model, x, x), list(model.parameters()))
        for module in (*model.layers, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        mean_loss(model, x, x).backward()
        for p, grad in zip(model.parameters(), want, strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), grad)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_of_other_blocks():
    plain = BlockConfig(AttentionConfig(4), GELUConfig(48), LayerNormConfig(1e-3), NoPositionsConfig())
    rotary = BlockConfig(AttentionConfig(2, 1, qk_norm=True), positions=RopeConfig(50.0))
    config = TransformerConfig(97, 24, 4, 32, init_std=0.15, layers=(plain, rotary))
    model, x = make(config), ids(config)
    assert [type(layer.mlp).__name__ for layer in model.layers] == ["GELU", "SwiGLU"] * 2
    assert model.layers[0].attention.rope is None
    assert model.layers[1].attention.rope is model.layers[3].attention.rope
    h = model.embedding(x)
    for layer in model.layers:
        h = layer(h)
    torch.testing.assert_close(model(x), model.head(model.norm(h)), atol=1e-5, rtol=1e-5)
    mean_loss(model, x, x).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_long_form_of_the_same_model(config):
    block = config.blocks[0]
    long = dataclasses.replace(config, layers=(block,), **{f: SHORT_DEFAULTS[f] for f in SHORT})
    model, again = make(config), Transformer(long)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids(config) * 0), model(ids(config) * 0))
    assert long.blocks == config.blocks
    assert long.num_parameters() == config.num_parameters()


def test_tied_head_is_the_embedding():
    model = Transformer(dataclasses.replace(SMALL, tie_embeddings=True))
    assert model.head is None
    assert not any("head" in name for name in model.state_dict())


def test_device_and_dtype():
    model = Transformer(SMALL, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.layers[0].attention.rope.cos.dtype == torch.float32
    assert model(ids(SMALL)).dtype == torch.bfloat16
    meta = Transformer(SMALL, device="meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    real = meta.to_empty(device="cpu")
    real.reset_parameters()
    assert mean_loss(real, ids(SMALL), ids(SMALL)).isfinite()


def test_copies(tmp_path, config):
    model, x = make(config), ids(config)
    again = pickle.loads(pickle.dumps(model))
    again.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()})
    torch.save(model.state_dict(), tmp_path / "weights")
    again.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    for copied in (again, copy.deepcopy(model)):
        assert torch.equal(copied(x), model(x))
        assert copied.layers[0].attention.rope is copied.layers[1].attention.rope


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing(shape):
    x = torch.zeros(shape, dtype=torch.long)
    assert Transformer(SMALL)(x).shape == (*shape, SMALL.vocab_size)
    assert mean_loss(Transformer(SMALL), x, x) == 0


def test_bad_arguments():
    model = Transformer(SMALL)
    with pytest.raises(ValueError, match=r"token_ids must be \(batch, tokens\), got shape \(5,\)"):
        model(torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="ids must be int64 or int32"):
        model(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="25 tokens do not fit the model's context_length of 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(IndexError, match="ids must be 0 to 96"):
        model(torch.full((1, 5), 97))
    for bad in (torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5)):
        with pytest.raises(ValueError, match=r"segments must be \(1, 5\) integers as token_ids are"):
            model(torch.zeros(1, 5, dtype=torch.long), segments=bad)
