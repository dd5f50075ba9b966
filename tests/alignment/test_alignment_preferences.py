"""Losses of pairs against closed forms."""

import math

import pytest
import torch

from cs336.alignment import dpo_loss, kto_loss, kto_reference_point, reward_model_loss

PAIR = [torch.tensor([x]).double() for x in (-1.0, -2.0, -1.5, -1.7)]  # h = 1.0 - 0.2
H, BETA = 0.8, 0.5


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_dpo_losses():
    right, wrong = -math.log(sigmoid(BETA * H)), -math.log(sigmoid(-BETA * H))
    for options, want in (
        ({}, right),
        ({"label_smoothing": 0.1}, 0.9 * right + 0.1 * wrong),
        ({"loss_type": "robust", "label_smoothing": 0.1}, (0.9 * right - 0.1 * wrong) / 0.8),
        ({"loss_type": "ipo"}, (H - 1) ** 2),
        ({"loss_type": "hinge"}, 1 - BETA * H),
    ):
        got = dpo_loss(*PAIR, beta=BETA, **options)
        assert got.shape == (1,)
        assert got.item() == pytest.approx(want)
    simpo = dpo_loss(*PAIR[:2], beta=2.0, loss_type="simpo", margin=0.5)
    assert simpo.item() == pytest.approx(-math.log(sigmoid(2.0 * 1.0 - 0.5)))
    assert dpo_loss(*(torch.tensor([x]) for x in (-1e5, 0.0, 0.0, 0.0))).item() == pytest.approx(1e4)  # no overflow
    assert dpo_loss(*PAIR, beta=1.3, loss_type="hinge").item() == 0  # beta h is above 1


def test_orpo_is_likelihood_and_odds():
    """Of probabilities 0.2 and 0.6 of a token, by the paper's own terms: odds 1 / 4 and 3 / 2."""
    chosen, rejected = torch.tensor([0.2]).double().log(), torch.tensor([0.6]).double().log()
    loss = dpo_loss(chosen, rejected, beta=0.5, loss_type="orpo")
    assert loss.item() == pytest.approx(-math.log(0.2) - 0.5 * math.log(sigmoid(math.log((1 / 4) / (3 / 2)))))
    certain = torch.zeros(1, requires_grad=True)  # odds without end
    loss = dpo_loss(certain, torch.zeros(1), loss_type="orpo")
    assert loss.item() == pytest.approx(0.1 * math.log(2))
    assert torch.autograd.grad(loss.sum(), certain)[0].isfinite()


def test_kto():
    answer, reference, desirable = (
        torch.tensor([-1.0, -2.0]).double(),
        torch.tensor([-1.5, -1.8]).double(),
        [True, False],
    )
    unrelated = torch.tensor([-3.0, -4.0], dtype=torch.float64, requires_grad=True)
    kl = kto_reference_point(unrelated, torch.tensor([-3.4, -4.2]).double())
    assert kl.item() == pytest.approx(0.3)
    assert not kl.requires_grad
    assert kto_reference_point(unrelated - 1, unrelated).item() == 0  # a divergence is never negative
    options = {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    losses = kto_loss(answer, reference, kl.expand(2), torch.tensor(desirable), **options)
    want = [1.5 * (1 - sigmoid(BETA * (0.5 - 0.3))), 0.7 * (1 - sigmoid(BETA * (0.3 + 0.2)))]
    assert losses.tolist() == pytest.approx(want)
    with pytest.raises(ValueError, match=r"must be above 0, got undesirable_weight 0.0"):
        kto_loss(answer, reference, kl.expand(2), torch.tensor(desirable), undesirable_weight=0.0)
    with pytest.raises(ValueError, match="kl must have shape"):
        kto_loss(answer, reference, kl, torch.tensor(desirable))
    with pytest.raises(ValueError, match=r"desirable must be bool, got torch.int64: .* desirable.bool\(\)"):
        kto_loss(answer, reference, kl.expand(2), torch.tensor([1, 0]))


def test_dpo_gradient_on_a_vocabulary_of_two():
    """Logits (a, 0), chosen token 0: log p0 - log p1 = a, so that d loss / d a = -beta sigmoid(-beta (a - a_ref))."""
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    policy = torch.stack([a, torch.zeros_like(a)]).log_softmax(0)
    reference = torch.tensor([-0.4, 0.0]).double().log_softmax(0)
    loss = dpo_loss(policy[:1], policy[1:], reference[:1], reference[1:], beta=BETA)
    (grad,) = torch.autograd.grad(loss.sum(), a)
    assert grad.item() == pytest.approx(-BETA * sigmoid(-BETA * 0.7))


@pytest.mark.parametrize(
    ("pair", "options", "message"),
    [
        (PAIR, {"loss_type": "kto"}, "must be one of sigmoid, ipo, robust, hinge, simpo, orpo, got 'kto'"),
        (PAIR, {"beta": 0.0}, "beta"),
        (PAIR, {"label_smoothing": 0.5}, "label_smoothing"),
        (PAIR, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        (PAIR, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        (PAIR, {"loss_type": "orpo"}, "orpo has no reference"),
        (PAIR, {"margin": 1.0}, "margin is simpo's"),
        (PAIR[:2], {"loss_type": "simpo", "margin": float("nan")}, "margin must be finite"),
        (PAIR, {"loss_type": "simpo"}, "no reference"),
        (PAIR[:2], {}, "takes reference_chosen"),
        ([PAIR[0], torch.zeros(2)], {"loss_type": "simpo"}, "rejected must have shape"),
    ],
)
def test_dpo_refuses(pair, options, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*pair, **options)


def test_reward_model_loss():
    chosen, rejected = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.5, 0.0]).double()
    assert reward_model_loss(chosen, rejected).tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(2)])
    margin = torch.tensor([1.0, 3.0]).double()
    want = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(3))]
    assert reward_model_loss(chosen, rejected, margin).tolist() == pytest.approx(want)
    with pytest.raises(ValueError, match="margin must have shape"):
        reward_model_loss(chosen, rejected, margin[:1])
