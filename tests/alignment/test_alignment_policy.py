"""Advantages and policy-gradient losses against closed forms and plain float64 loops."""

import math

import pytest
import torch

from cs336.alignment import gae, group_advantages, policy_gradient_loss, policy_gradient_terms
from cs336.alignment.policy import KINDS

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
TYPES = list(KINDS)


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(4, 5, generator=generator, dtype=torch.float64) * 3
    new = old + 0.4 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), old, torch.tensor([1.0, -0.5, -1.5, 2.0]).double()


def by_hand(new, old, advantages, loss_type, low, high, max_length=None):
    """Each token's loss, one after the other."""
    sums, tokens = [], []
    for b in range(4):
        places = [t for t in range(5) if MASK[b, t]]
        terms = []
        for t in places:
            logs = {"gspo": places, "rloo": places}.get(loss_type, [t])
            log_ratio = sum(new[b, i] - old[b, i] for i in logs) / (len(places) if loss_type == "gspo" else 1)
            ratio, A = log_ratio.exp(), advantages[b]
            if loss_type in ("reinforce", "expert_iteration"):
                terms.append(-A * new[b, t])
            elif loss_type == "cispo":
                terms.append(-A * min(ratio.detach(), torch.tensor(1 + high)) * new[b, t])
            else:
                terms.append(-min(ratio * A, ratio.clamp(1 - low, 1 + high) * A))
        sums.append(sum(terms))
        tokens.append(len(terms))
    if loss_type in ("bnpo", "dapo", "cispo", "expert_iteration"):
        return sum(sums) / sum(tokens)
    if loss_type in ("reinforce", "dr_grpo"):
        return sum(sums) / 4 / (max_length or 1)
    return sum(s / n for s, n in zip(sums, tokens, strict=True) if n) / 4


@pytest.mark.parametrize("loss_type", TYPES)
def test_losses_and_gradients_are_those_of_a_loop(loss_type):
    new, old, advantages = inputs()
    options = {"max_length": 7} if loss_type == "dr_grpo" else {}
    got = policy_gradient_loss(
        new, old, advantages, MASK, loss_type=loss_type, epsilon=0.2, epsilon_high=0.3, **options
    )
    want = by_hand(new, old, advantages, loss_type, 0.2, 0.3, **options)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, new)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)
    assert not grads[0][~MASK].any()
    assert grads[0].any()


@pytest.mark.parametrize("loss_type", TYPES)
def test_parts_of_a_batch_add_up_and_what_is_masked_may_be_nan(loss_type):
    new, old, advantages = inputs()
    options = {"loss_type": loss_type} | ({"max_length": 7} if loss_type == "dr_grpo" else {})
    whole = policy_gradient_terms(new, old, advantages, MASK, **options)
    nan_old, nan_new = old.masked_fill(~MASK, torch.nan), new.detach().masked_fill(~MASK, torch.nan).requires_grad_()
    halves = [slice(0, 2), slice(2, 4)]
    parts = [policy_gradient_terms(nan_new[h], nan_old[h], advantages[h], MASK[h], **options) for h in halves]
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    assert sum(p[1] for p in parts) == whole[1]
    if KINDS[loss_type].mean == "token":
        for name, value in whole[2].items():
            torch.testing.assert_close(sum(p[2][name] for p in parts), value)
    assert torch.autograd.grad(sum(p[0] for p in parts), nan_new)[0].isfinite().all()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "gspo", "rloo"])
def test_one_step_is_reinforce_with_baseline(loss_type):
    """Where old and new policy are one, the gradient of a clipped loss is that of -(r - baseline) log p."""
    new, _, _ = inputs()
    mask = torch.ones(4, 5).bool()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])[:4]
    baseline = "leave_one_out" if loss_type == "rloo" else "mean"
    advantages = group_advantages(rewards, 4, baseline=baseline, normalize_std=False).double()
    options = {"max_length": 5} if loss_type == "dr_grpo" else {}
    loss = policy_gradient_loss(new, new.detach(), advantages, mask, loss_type=loss_type, **options)
    b = (rewards.sum() - rewards) / 3 if loss_type == "rloo" else rewards.mean()
    per_sequence = -(rewards - b).double() * new.sum(1) / (1 if loss_type == "rloo" else 5)
    torch.testing.assert_close(torch.autograd.grad(loss, new), torch.autograd.grad(per_sequence.mean(), new))


def test_clipping_stops_the_gradient_where_it_should_and_is_counted():
    old = torch.zeros(4, 1).double()
    new = torch.tensor([[0.5], [0.5], [-0.5], [-0.5]]).double().requires_grad_()
    advantages, mask = torch.tensor([1.0, -1.0, 1.0, -1.0]).double(), torch.ones(4, 1).bool()
    total, count, metrics = policy_gradient_terms(new, old, advantages, mask)
    up, down = math.exp(0.5), math.exp(-0.5)
    assert total.item() == pytest.approx(-1.2 + up - down + 0.8)
    assert torch.autograd.grad(total, new)[0].flatten().tolist() == pytest.approx([0, up, -down, 0])
    shares = {name: (value / count).item() for name, value in metrics.items()}
    assert shares == {"clip_ratio/low_mean": 0.25, "clip_ratio/high_mean": 0.25, "clip_ratio/region_mean": 0.5}


def test_kl_to_a_reference_is_added_per_token():
    new, old, advantages = inputs()
    reference = old - 0.3
    plain = policy_gradient_loss(new, old, advantages, MASK, loss_type="dapo")
    total, count, metrics = policy_gradient_terms(
        new, old, advantages, MASK, loss_type="dapo", reference_log_probs_BT=reference, beta=0.5
    )
    d = (new - reference)[MASK]
    k3 = ((-d).exp() - 1 + d).mean()
    torch.testing.assert_close(total / count, plain + 0.5 * k3)
    assert (metrics["kl"] / count).item() == pytest.approx(k3.item(), rel=1e-5)


def test_advantages_of_tokens():
    new, old, advantages = inputs()
    each = advantages[:, None].expand(4, 5)
    want = policy_gradient_loss(new, old, advantages, MASK)
    torch.testing.assert_close(policy_gradient_loss(new, old, each, MASK), want)
    with pytest.raises(ValueError, match="advantage a sequence"):
        policy_gradient_loss(new, old, each, MASK, loss_type="gspo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "must be one of reinforce"),
        ({"loss_type": "dr_grpo"}, "max_length"),
        ({"max_length": 4}, "max_length"),
        ({"beta": 0.1}, "reference_log_probs"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"old": None}, "old_log_probs"),
        ({"old": torch.zeros(4, 1)}, "old_log_probs must have shape"),
        ({"advantages": torch.zeros(5)}, "advantages must have shape"),
    ],
)
def test_losses_refuse(options, message):
    new, old, advantages = inputs()
    old, advantages = options.pop("old", old), options.pop("advantages", advantages)
    with pytest.raises(ValueError, match=message):
        policy_gradient_loss(new, old, advantages, MASK, **options)


def test_group_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.3, 0.3, 0.3, 0.3])
    centred = [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert group_advantages(rewards, 4, normalize_std=False).tolist() == centred
    assert group_advantages(rewards, 4).tolist() == pytest.approx([x / (0.5 + 1e-4) for x in centred])
    left_out = group_advantages(rewards, 4, baseline="leave_one_out", normalize_std=False)
    assert left_out.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0])
    assert not group_advantages(rewards, 4)[4:].any()  # exactly
    for reward in (0.1, 0.7, 123.456):  # their sum over 3, 6, 11 is another number
        for size in (3, 5, 6, 7, 11):
            assert not group_advantages(torch.full((size,), reward, dtype=torch.float64), size).any()


def test_group_advantages_refuses():
    for rewards, size, message in (
        (torch.zeros(4), 1, "2 or more"),
        (torch.zeros(5), 2, "multiple of 2"),
        (torch.zeros(2, 2), 2, "multiple of 2"),
        (torch.tensor([0, torch.nan]), 2, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            group_advantages(rewards, size)
    with pytest.raises(ValueError, match="leave_one_out"):
        group_advantages(torch.zeros(2), 2, baseline="median")


def test_gae_is_the_sum_of_discounted_deltas():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 6).double(), torch.randn(3, 6).double()
    mask = torch.tensor([[1] * 6, [0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0]]).bool()
    last = torch.tensor([0.0, 0.7, 0.0]).double()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8, last_value_B=last)
    for b in range(3):
        places = mask[b].nonzero().flatten().tolist()
        v = [*values[b, places].tolist(), last[b].item()]
        deltas = [rewards[b, p].item() + 0.9 * v[i + 1] - v[i] for i, p in enumerate(places)]
        for i, p in enumerate(places):
            want = sum((0.9 * 0.8) ** (k - i) * deltas[k] for k in range(i, len(places)))
            assert advantages[b, p].item() == pytest.approx(want)
            assert returns[b, p].item() == pytest.approx(want + v[i])
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_of_lambda_1_is_the_return_less_the_value():
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[0.2, 0.5, 0.9]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3), lam=1)
    torch.testing.assert_close(advantages, 1 - values)
    torch.testing.assert_close(returns, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"in 0\.\.1"):
        gae(rewards, values, torch.ones(1, 3), gamma=1.1)
    with pytest.raises(ValueError, match="mask must have shape"):
        gae(rewards, values, torch.ones(1, 2))


def test_gae_of_no_steps():
    nothing = torch.zeros(2, 0)
    assert [x.shape for x in gae(nothing, nothing, nothing)] == [(2, 0), (2, 0)]
