"""torch.func over every op that has gradients: grad, jvp, vmap and their compositions give what backward does."""

import inspect
import math

import pytest
import torch
from torch.func import grad, jvp, vmap

from cs336 import ops

WITHOUT = {  # made for inference or a training step, or in place
    "adamw_", "append_kv_", "causal_conv1d_step_", "copy_pages_", "expert_swiglu", "fp8_copies", "linear_scaled",
    "paged_attention", "paged_prefill", "qk_norm_rope_append_", "recurrent_step_", "sample", "sharded_adamw_reduce_",
    "sharded_adamw_step_", "sharded_adamw_total_", "sharded_adamw_wait_",
}  # fmt: skip


def some(*shape):
    """Numbers between -1 and 1, the same each time, inside of transforms too."""
    return torch.arange(1, 1 + math.prod(shape), dtype=torch.float64).square().sin().view(shape)


CU, IDS = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([3, 0, 2, 1, 2])
HEADS = some(1, 2, 5, 4), some(1, 2, 5, 4) / 2, some(1, 2, 5, 4) * 2
TURNS = some(5, 2).cos().float(), some(5, 2).sin().float()
WEIGHT, SCALES = some(6, 4), some(6, 2).abs()
CASES = {  # x, and the op as a function of it
    "attention": (HEADS[0], lambda q: ops.attention(q, *HEADS[1:], causal=True)),
    "attention_invariant": (
        some(5, 2, 4),
        lambda q: ops.attention_invariant(q, q, 2 * q, CU, 3, window=1, sinks=some(2).float()),
    ),
    "attention_varlen": (some(5, 2, 4), lambda q: ops.attention_varlen(q, q, 2 * q, CU, causal=True)),
    "causal_conv1d": (some(2, 5, 3), lambda x: ops.causal_conv1d(x, some(3, 2))),
    "cross_entropy": (some(5, 4), lambda x: ops.cross_entropy(x, IDS, z_loss=0.1)),
    "dropout": (some(3, 4), lambda x: ops.dropout(x, 0.5, seed=torch.tensor(3))),
    "embedding": (some(4, 3), lambda table: ops.embedding(IDS, table)),
    "gated_delta_rule": (HEADS[0], lambda q: ops.gated_delta_rule(q, *HEADS[1:], some(1, 2, 5).sigmoid())),
    "geglu": (some(3, 4), lambda x: ops.geglu(x, 2 * x)),
    "gram": (some(1, 3, 4), ops.gram),
    "layer_norm": (some(3, 4), lambda x: ops.layer_norm(x, some(4))),
    "linear_attention": (HEADS[0], lambda q: ops.linear_attention(q, *HEADS[1:])),
    "linear_cross_entropy": (some(5, 4), lambda x: ops.linear_cross_entropy(x, WEIGHT, IDS)),
    "linear_few_rows": (some(3, 4), lambda x: ops.linear_few_rows(x, WEIGHT, some(6))),
    "linear_fp8": (
        some(3, 4).float(),
        lambda x: ops.linear_fp8(x, WEIGHT.to(torch.float8_e4m3fn), SCALES, group=2),
    ),
    "linear_int4": (
        some(3, 4).float(),
        lambda x: ops.linear_int4(x, torch.full((6, 2), 0xB3, dtype=torch.uint8), SCALES, group=2),
    ),
    "linear_int8": (some(3, 4).float(), lambda x: ops.linear_int8(x, (WEIGHT * 9).to(torch.int8), SCALES, group=2)),
    "linear_invariant": (some(3, 4), lambda x: ops.linear_invariant(x, WEIGHT, some(6))),
    "linear_log_probs": (some(5, 4), lambda x: ops.linear_log_probs(x, WEIGHT, IDS)),
    "linear_loss_sums": (some(5, 4), lambda x: ops.linear_loss_sums(x, WEIGHT, IDS, label_smoothing=0.1)[0]),
    "linears": (some(3, 4), lambda x: sum(ops.linears(x, [WEIGHT, 2 * WEIGHT]))),
    "long_conv": (some(1, 5, 3), lambda x: ops.long_conv(x, some(5, 3))),
    "qk_norm_rope": (some(1, 2, 5, 4), lambda q: sum(ops.qk_norm_rope(q, q, some(4), some(4), *TURNS))),
    "relu2": (some(3, 4), ops.relu2),
    "rms_norm": (some(3, 4), lambda x: ops.rms_norm(x, some(4))),
    "rope": (some(2, 5, 4), lambda x: ops.rope(x, *TURNS)),
    "rope_qk": (some(1, 2, 5, 4), lambda q: sum(ops.rope_qk(q, 2 * q, *TURNS))),
    "silu": (some(3, 4), ops.silu),
    "softmax": (some(3, 4), ops.softmax),
    "swiglu": (some(3, 4), lambda x: ops.swiglu(x, 2 * x)),
}


def test_no_op_is_forgotten():
    assert CASES.keys() | WITHOUT == {name for name, op in vars(ops).items() if inspect.isfunction(op)}


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize("name", CASES)
def test_transforms_are_backwards(name):
    x, op = CASES[name]

    def loss(x):
        return op(x).tanh().sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(x), want)
    torch.testing.assert_close(jvp(loss, (x,), (x,))[1], (want * x).sum())
    slope = jvp(grad(loss), (x,), (x,))[1]
    near = (grad(loss)(x * (1 + 1e-3)) - grad(loss)(x * (1 - 1e-3))) / 2e-3
    torch.testing.assert_close(slope, near, atol=1e-2, rtol=1e-2)
    many = torch.stack((x, -x))
    torch.testing.assert_close(vmap(op)(many), torch.stack([op(x), op(-x)]))
    torch.testing.assert_close(vmap(grad(loss))(many)[0], want)
