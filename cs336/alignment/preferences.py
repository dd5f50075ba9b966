"""Losses of pairs, of which one answer was preferred, and of answers that were judged each by itself. Pure functions;
B = pairs or answers, TRL's names of losses."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cs336.alignment.functions import check_shapes

DPOLoss = Literal["sigmoid", "ipo", "robust", "hinge", "simpo", "orpo"]
NO_REFERENCE = ("simpo", "orpo")


def dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    reference_chosen_B: Tensor | None = None,
    reference_rejected_B: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: DPOLoss = "sigmoid",
    label_smoothing: float = 0.0,
    margin: float = 0.0,
) -> Tensor:
    """Loss of each pair, (B,), from log-probabilities of whole answers, (B,) each.

    With h = (chosen - rejected) - (reference_chosen - reference_rejected), e = label_smoothing, s = log sigmoid:

        sigmoid  -(1 - e) s(beta h) - e s(-beta h)                              DPO, arXiv:2305.18290
        robust   (-(1 - e) s(beta h) + e s(-beta h)) / (1 - 2e)                 arXiv:2403.00409
        ipo      (h - 1 / (2 beta))^2                                           arXiv:2310.12036
        hinge    max(0, 1 - beta h)                                             SLiC, arXiv:2305.10425, 2309.06657
        simpo    -s(beta (chosen - rejected) - margin)                          arXiv:2405.14734
        orpo     -chosen - beta s(log odds(chosen) - log odds(rejected))        arXiv:2403.07691

    with odds(x) = e^x / (1 - e^x). sigmoid, robust and hinge take sums over an answer's tokens, simpo and orpo means,
    without a reference; ipo either (TRL: means).
    Raises ValueError for shapes that differ, a reference that is missing or not wanted, and options that are not of
    the loss.
    """
    if loss_type not in get_args(DPOLoss):
        raise ValueError(f"loss_type must be one of {', '.join(get_args(DPOLoss))}, got {loss_type!r}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ("sigmoid", "robust")):
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), and 0 but for sigmoid and robust, got {label_smoothing}"
        )
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")
    if margin and loss_type != "simpo":
        raise ValueError(f"margin is simpo's, not {loss_type}'s")
    check_shapes(chosen_B, rejected=rejected_B)
    h_B = chosen_B - rejected_B
    if loss_type in NO_REFERENCE:
        if reference_chosen_B is not None or reference_rejected_B is not None:
            raise ValueError(f"{loss_type} has no reference: leave reference_chosen and reference_rejected out")
        if loss_type == "simpo":
            return -logsigmoid(beta * h_B - margin)
        return -chosen_B - beta * logsigmoid(_log_odds(chosen_B) - _log_odds(rejected_B))
    if reference_chosen_B is None or reference_rejected_B is None:
        raise ValueError(f"{loss_type} takes reference_chosen and reference_rejected")
    check_shapes(chosen_B, reference_chosen=reference_chosen_B, reference_rejected=reference_rejected_B)
    h_B = h_B - (reference_chosen_B - reference_rejected_B)
    if loss_type == "ipo":
        return (h_B - 1 / (2 * beta)).square()
    if loss_type == "hinge":
        return (1 - beta * h_B).relu()
    right_B, wrong_B = -logsigmoid(beta * h_B), -logsigmoid(-beta * h_B)
    if loss_type == "robust":
        return ((1 - label_smoothing) * right_B - label_smoothing * wrong_B) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right_B + label_smoothing * wrong_B


def kto_loss(
    answer_B: Tensor,
    reference_B: Tensor,
    kl_B: Tensor,
    desirable_B: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization, arXiv:2402.01306: the loss of each answer, (B,), from sums over its tokens, (B,).

        desirable_weight (1 - sigmoid(beta (answer - reference - kl)))      of a desirable answer
        undesirable_weight (1 - sigmoid(beta (kl - answer + reference)))    of another

    kl_B is the reference point, an estimate of KL(policy | reference), 0 or more: see kto_reference_point. It gets no
    gradient. desirable_B: bool.
    Raises ValueError for shapes that differ, a desirable_B that is not bool, and options that are not above 0.
    """
    options = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    if bad := [f"{name} {value}" for name, value in options.items() if not 0 < value < math.inf]:
        raise ValueError(f"beta, desirable_weight and undesirable_weight must be above 0, got {', '.join(bad)}")
    check_shapes(answer_B, reference=reference_B, kl=kl_B, desirable=desirable_B)
    if desirable_B.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable_B.dtype}: labels of 1 and 0 are desirable.bool()")
    better_B = beta * (answer_B - reference_B - kl_B.detach())
    return torch.where(desirable_B, desirable_weight * (-better_B).sigmoid(), undesirable_weight * better_B.sigmoid())


def kto_reference_point(unrelated_B: Tensor, reference_B: Tensor) -> Tensor:
    """KL(policy | reference), at least 0, (): the mean log-ratio of answers (B,) that were given to other prompts."""
    check_shapes(unrelated_B, reference=reference_B)
    return (unrelated_B - reference_B).detach().mean().clamp(min=0)


def reward_model_loss(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None) -> Tensor:
    """Loss of each pair, (B,), from rewards (B,): -log sigmoid(chosen - rejected - margin).

    Bradley-Terry; the margin, how much better the chosen answer is, as in arXiv:2307.09288.
    Raises ValueError for shapes that differ.
    """
    check_shapes(chosen_B, rejected=rejected_B)
    difference_B = chosen_B - rejected_B
    if margin_B is not None:
        check_shapes(chosen_B, margin=margin_B)
        difference_B = difference_B - margin_B
    return -logsigmoid(difference_B)


def _log_odds(log_p_B: Tensor) -> Tensor:
    """log(p / (1 - p)), finite for p = 1, which rounding makes of what is nearly certain."""
    log_p_B = log_p_B.clamp(max=-torch.finfo(log_p_B.dtype).eps)
    return log_p_B - (-torch.expm1(log_p_B)).log()
