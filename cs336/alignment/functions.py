"""What all algorithms of alignment are made of: log-probabilities, masks, means, entropy, divergences. Pure functions.

B = batch, S = tokens of a row, T = S - 1 its predictions, V = vocabulary. Prediction t is that of token t + 1, so that
log-probabilities, masks and advantages (B, T) lie one above the other.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cs336 import ops
from cs336.models import Transformer

KLEstimator = Literal["k1", "k2", "k3"]
IGNORED = -100


def sequence_log_probs(
    model: Transformer,
    token_ids_BS: Tensor,
    *,
    segments_BS: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Any:
    """log p(token t + 1 | tokens 0..t), (B, T) float32; the logits are never kept whole.

    Rows may be padded on the right: what follows a token does not change its log-probability.

    Args:
        token_ids_BS: (B, S) int64, S >= 2.
        segments_BS: (B, S) integers. Each run of equal ones is a document that sees no other; the first token of each
            has nothing to be predicted from, and counts 0.
        temperature: divides the logits, as it did where the tokens were sampled.
        return_entropy: return (log-probs, entropies (B, T) of the predictions in nats).

    Raises ValueError for rows of fewer than two tokens, and for a temperature that is not above 0, or other than 1
    where the model caps its logits.
    """
    if token_ids_BS.dim() != 2 or token_ids_BS.shape[1] < 2:
        raise ValueError(f"token_ids must be (batch, 2 tokens or more), got shape {tuple(token_ids_BS.shape)}")
    cap = model.config.logit_softcap
    if not 0 < temperature < float("inf") or (cap is not None and temperature != 1):
        raise ValueError(f"temperature must be above 0, and 1 for a model with logit_softcap, got {temperature}")
    targets_BT = token_ids_BS[:, 1:]
    if segments_BS is not None:
        targets_BT = targets_BT.masked_fill(segments_BS[:, 1:] != segments_BS[:, :-1], IGNORED)
    features_BTM = model.features(token_ids_BS, segments=segments_BS)[:, :-1]
    head = model.embedding if model.head is None else model.head
    return ops.linear_log_probs(
        features_BTM if temperature == 1 else features_BTM / temperature, head.weight, targets_BT.contiguous(),
        ignore_index=IGNORED, softcap=cap, return_entropy=return_entropy,
    )  # fmt: skip


def response_mask(prompt_lengths_B: Tensor, lengths_B: Tensor, num_tokens: int) -> Tensor:
    """True where a prediction is of a response's token: (B, T) bool for rows of num_tokens = S tokens.

    prompt_lengths_B, lengths_B: (B,) int64: tokens of the prompt, and of prompt and response together.
    Raises ValueError unless 1 <= prompt_lengths <= lengths <= num_tokens.
    """
    if prompt_lengths_B.dim() != 1 or prompt_lengths_B.shape != lengths_B.shape:
        shapes = tuple(prompt_lengths_B.shape), tuple(lengths_B.shape)
        raise ValueError(f"prompt_lengths and lengths must be (batch,) both, got {shapes[0]} and {shapes[1]}")
    if not ((prompt_lengths_B >= 1) & (prompt_lengths_B <= lengths_B) & (lengths_B <= num_tokens)).all():
        raise ValueError(f"expected 1 <= prompt_lengths <= lengths <= {num_tokens} tokens in every row")
    token_T = torch.arange(1, num_tokens, device=lengths_B.device)
    return (token_T >= prompt_lengths_B[:, None]) & (token_T < lengths_B[:, None])


def masked_normalize(x: Tensor, mask: Tensor, normalize_constant: float = 1.0, dim: int | None = None) -> Tensor:
    """sum of x where mask is true / normalize_constant, over dim; over all of them if None.

    What is masked may be NaN: it counts for nothing, and gets no gradient. x, mask: one shape, mask bool or 0 and 1.
    """
    check_shapes(x, mask=mask)
    return torch.where(mask.bool(), x, 0).sum(dim) / normalize_constant


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is true, over dim; over all of them if None. 0 where nothing is."""
    return masked_normalize(x, mask, dim=dim) / mask.bool().sum(dim).clamp(min=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, (..., V) -> (...), float32 at least. A logit may be -inf."""
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0)).sum(-1)


def kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate of KL(policy | reference) by each token that the policy drew, of the inputs' shape.

    With d = log_probs - reference_log_probs: k1 = d, unbiased; k2 = d^2 / 2; k3 = exp(-d) - 1 + d, unbiased and never
    negative (J. Schulman, "Approximating KL divergence", 2020).
    Raises ValueError for another estimator.
    """
    check_shapes(log_probs, reference_log_probs=reference_log_probs)
    d = log_probs - reference_log_probs
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1(-d) + d
    raise ValueError(f"estimator must be k1, k2 or k3, got {estimator!r}")


def check_shapes(x: Tensor, **others: Tensor) -> None:
    """Raises ValueError for tensors of another shape than x: what would broadcast would be a silent mistake."""
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{name} must have shape {tuple(x.shape)}, got {tuple(other.shape)}")
