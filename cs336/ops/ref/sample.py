"""Sampling in plain torch, fp32. For a row of logits l, in this order:

    l += bias;  seen tokens: l = l / repetition if l > 0 else l * repetition
    l -= frequency * count + presence * (count > 0)          count: occurrences in the output
    z = (l - max l) / temperature
    keep z >= log(min_p),  then the top_k largest,  then the fewest largest whose share of what is kept reaches top_p
    token = argmax over kept of z - log(e)                    e: exponential draws (the Gumbel-max trick)

Equal values are kept or dropped together, and the lowest of equal tokens wins. temperature 0 takes argmax l.
"""

import torch
from torch import Tensor

from cs336.ops.ref.philox import philox

IN_PROMPT = 1 << 30  # in counts: the token is in the prompt
ROUNDS = 7


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seeds_B: Tensor,
    offsets_B: Tensor,
    counts_BV: Tensor | None,
    repetition_B: Tensor | None,
    presence_B: Tensor | None,
    frequency_B: Tensor | None,
    bias_BV: Tensor | None,
    num_logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raw_BV = finite(logits_BV)
    logprobs_BV = torch.log_softmax(raw_BV, -1)
    l_BV = raw_BV if bias_BV is None else finite(raw_BV + bias_BV)
    if counts_BV is not None:
        l_BV = finite(penalised(l_BV, counts_BV, repetition_B, presence_B, frequency_B))
    greedy_B = ~(temperature_B > 0)
    z_BV = (l_BV - l_BV.amax(-1, keepdim=True)).nan_to_num(nan=0.0, neginf=-torch.inf)  # a row of -inf: all equal
    z_BV = z_BV / torch.where(greedy_B, 1.0, temperature_B).clamp(max=torch.finfo(torch.float32).max)[:, None]
    z_BV = kept(z_BV, top_k_B, top_p_B, min_p_B)
    score_BV = torch.where(greedy_B[:, None], l_BV, z_BV - exponential(seeds_B, offsets_B, logits_BV.shape[1]).log())
    token_B = score_BV.argmax(-1)  # the first of equal ones
    top_BN = token_B.new_empty(len(token_B), 0)
    if num_logprobs > 0:
        top_BN = torch.sort(logprobs_BV, dim=-1, descending=True, stable=True).indices[:, :num_logprobs].contiguous()
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0], top_BN, logprobs_BV.gather(1, top_BN)


def finite(x: Tensor) -> Tensor:
    """fp32 with NaN as -inf, so that it is never chosen, and no +inf."""
    return x.float().nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)


def penalised(l_BV, counts_BV, repetition_B, presence_B, frequency_B) -> Tensor:
    if repetition_B is not None:
        repeated_BV = torch.where(l_BV > 0, l_BV / repetition_B[:, None], l_BV * repetition_B[:, None])
        l_BV = torch.where(counts_BV > 0, repeated_BV, l_BV)
    generated_BV = counts_BV & (IN_PROMPT - 1)
    if frequency_B is not None:
        l_BV = l_BV - frequency_B[:, None] * generated_BV
    if presence_B is not None:
        l_BV = l_BV - presence_B[:, None] * (generated_BV > 0)
    return l_BV


def kept(z_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """z with -inf for what is filtered out. top_k <= 0, top_p >= 1 and min_p <= 0 filter nothing."""
    V = z_BV.shape[1]
    z_BV = z_BV.masked_fill(z_BV < min_p_B.clamp(0, 1).log()[:, None], -torch.inf)
    if z_BV.device.type == "cpu" and not ((top_k_B > 0) | (top_p_B < 1)).any():  # looking makes a GPU's host wait
        return z_BV
    sorted_BV = z_BV.sort(-1, descending=True).values
    k_B = torch.where(top_k_B > 0, top_k_B, V).clamp(max=V).long()
    least_B1 = sorted_BV.gather(1, k_B[:, None] - 1)
    z_BV = z_BV.masked_fill(z_BV < least_B1, -torch.inf)
    p_BV = torch.exp(sorted_BV.masked_fill(sorted_BV < least_B1, -torch.inf).double())
    above_BV = p_BV.cumsum(-1) - p_BV  # the mass of what stands before
    inside_BV = above_BV < (top_p_B.double() * p_BV.sum(-1))[:, None]
    inside_BV[:, 0] = True
    inside_BV |= (top_p_B >= 1)[:, None]
    least_B1 = torch.where(inside_BV, sorted_BV, torch.inf).amin(-1, keepdim=True)
    return z_BV.masked_fill(z_BV < least_B1, -torch.inf)


def exponential(seeds_B: Tensor, offsets_B: Tensor, V: int) -> Tensor:
    """-log(1 - u), u = (word + 1/2) 2^-32: word v % 4 of Philox4x32-7 at (v // 4, offset, offset >> 32, 0)."""
    v_1N = torch.arange((V + 3) // 4, device=seeds_B.device)[None]
    low_B1, high_B1 = (offsets_B & 0xFFFFFFFF)[:, None], (offsets_B >> 32 & 0xFFFFFFFF)[:, None]
    words = philox(seeds_B[:, None], [v_1N, low_B1, high_B1, torch.zeros_like(low_B1)], ROUNDS)
    word_BV = torch.stack([w.expand(len(seeds_B), -1) for w in words], -1).flatten(1)[:, :V]
    u_BV = (word_BV.float() + 0.5) * 2.0**-32
    return -torch.log1p(-u_BV.clamp(max=1 - 2.0**-24))
