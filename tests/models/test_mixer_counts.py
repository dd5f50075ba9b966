"""What configurations count against what models do: parameters, FLOPs and bytes kept for the backward."""

import dataclasses

import pytest
import torch
from mixers import MIXERS, NAMES, config, make
from torch.utils.flop_counter import FlopCounterMode

from cs336.models import Transformer
from cs336.ops import dispatch, registry
from cs336.ops.chunked import CHUNK


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_parameters(name):
    assert sum(p.numel() for p in make(name, device="meta").parameters()) == config(name).num_parameters()


@pytest.mark.parametrize("name", MIXERS)
def test_flops(name):
    """Of the forward. torch's counter leaves out triangular solves and FFTs, and counts all scores of a window."""
    T, D = 2 * CHUNK, 32
    model, mixer = make(name, context_length=T), MIXERS[name]
    attends = mixer.kind in ("attention", "latent_attention")  # torch's own kernel on a CPU is not counted
    with registry.use("ref" if attends else None), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, T, dtype=torch.long))
    uncounted = 0
    for _ in model.config.blocks:
        if mixer.kind == "linear_attention" and mixer.delta:
            uncounted += mixer.num_heads * CHUNK * (mixer.key_size(D) + mixer.value_size(D)) * T
        if mixer.kind == "attention" and mixer.window is not None:
            uncounted -= 4 * mixer.num_heads * mixer.head_size(D) * (T - mixer.window) * T
        if mixer.kind == "hyena":
            uncounted += 15 * D * (2 * T).bit_length() * T  # by the usual 2.5 n log2 n a transform
            matrices = 2 * mixer._filter(D)
            uncounted += int(matrices * min(1, mixer.filter_length / T)) * T - matrices * min(T, mixer.filter_length)
    assert counter.get_total_flops() + uncounted == T * model.config.flops_per_token(T) // 3


def kept_bytes(model, T, monkeypatch):
    """Of the distinct memory that a forward keeps for the backward; parameters and tables apart, and the mask that
    torch's kernel on a CPU needs for a window."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(t):
        if t.shape[-2:] == (T, T):
            return t
        saved[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    checkpoint = dispatch.checkpoint

    def kept_by_checkpoint(function, *args, **options):
        for t in args:
            if isinstance(t, torch.Tensor):
                keep(t)
        return checkpoint(function, *args, **options)

    monkeypatch.setattr(dispatch, "checkpoint", kept_by_checkpoint)
    x = torch.randn(2, T, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        for layer in model.layers:
            x = layer.attention(layer.attention_norm(x).detach().requires_grad_())
    return sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in known)


def with_equal_heads(block):
    """Torch's kernel on a CPU takes no values of another size than keys: it would keep the scores."""
    if block.mixer.kind != "latent_attention":
        return block
    value_dim = block.mixer.head_dim + block.mixer.rope_head_dim
    return dataclasses.replace(block, mixer=dataclasses.replace(block.mixer, value_dim=value_dim))


@pytest.mark.parametrize("name", [name for name in NAMES if "without positions" not in name])
def test_activation_bytes(name, monkeypatch):
    """A token's share: what 64 tokens more of two texts keep more. (Without positions attention's output may happen to
    lie as o_proj reads it, and is kept once.)"""
    described = config(name, context_length=3 * CHUNK)
    model = Transformer(dataclasses.replace(described, layers=tuple(map(with_equal_heads, described.layers))))
    norm = model.config.blocks[0].norm.activation_bytes(32, 4)
    with monkeypatch.context() as patch:
        long, short = (kept_bytes(model, T, patch) for T in (3 * CHUNK, 2 * CHUNK))
    blocks = model.config.blocks
    assert (long - short) / (2 * CHUNK) == sum(b.mixer.activation_bytes(32, 4) for b in blocks) + len(blocks) * norm


def test_a_window_costs_what_it_sees():
    full, window = MIXERS["attention"], MIXERS["window"]
    assert full.flops(32, 100) - window.flops(32, 100) == 4 * 4 * 8 * 95
    assert full.flops(32, 4) == window.flops(32, 4)


def test_a_recurrence_costs_the_same_at_any_length():
    for name in ("linear", "gated delta", "mamba2"):
        assert MIXERS[name].flops(32, 10) == MIXERS[name].flops(32, 10**6)


def test_training_flops_are_three_forwards():
    described = config("mamba2")
    forward = sum(b.flops(32, 16) for b in described.blocks) + 2 * 97 * 32
    assert described.flops_per_token(16) == 3 * forward
