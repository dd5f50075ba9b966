"""Losses of pairs, of which one answer was preferred. Pure functions; B = pairs, TRL's names of losses."""

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import logsigmoid

from cs336.alignment.functions import check_shapes

DPOLoss = Literal["sigmoid", "ipo", "robust", "simpo"]


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
        simpo    -s(beta (chosen - rejected) - margin)                          arXiv:2405.14734

    sigmoid and robust take sums over an answer's tokens, simpo means, without a reference; ipo either (TRL: means).
    Raises ValueError for shapes that differ, a reference that is missing or not wanted, and options that are not of
    the loss.
    """
    if loss_type not in ("sigmoid", "ipo", "robust", "simpo"):
        raise ValueError(f"loss_type must be sigmoid, ipo, robust or simpo, got {loss_type!r}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type in ("ipo", "simpo")):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and 0 for ipo and simpo, got {label_smoothing}")
    if not math.isfinite(margin):
        raise ValueError(f"margin must be finite, got {margin}")
    if margin and loss_type != "simpo":
        raise ValueError(f"margin is simpo's, not {loss_type}'s")
    check_shapes(chosen_B, rejected=rejected_B)
    h_B = chosen_B - rejected_B
    if loss_type == "simpo":
        if reference_chosen_B is not None or reference_rejected_B is not None:
            raise ValueError("simpo has no reference: leave reference_chosen and reference_rejected out")
        return -logsigmoid(beta * h_B - margin)
    if reference_chosen_B is None or reference_rejected_B is None:
        raise ValueError(f"{loss_type} takes reference_chosen and reference_rejected")
    check_shapes(chosen_B, reference_chosen=reference_chosen_B, reference_rejected=reference_rejected_B)
    h_B = h_B - (reference_chosen_B - reference_rejected_B)
    if loss_type == "ipo":
        return (h_B - 1 / (2 * beta)).square()
    right_B, wrong_B = -logsigmoid(beta * h_B), -logsigmoid(-beta * h_B)
    if loss_type == "robust":
        return ((1 - label_smoothing) * right_B - label_smoothing * wrong_B) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right_B + label_smoothing * wrong_B


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
