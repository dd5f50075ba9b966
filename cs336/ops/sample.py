"""Sampling of next tokens: penalties, bias, temperature, min-p, top-k, top-p, a draw, and log-probabilities.

Each request draws from its own counter, (seed, offset), by the Gumbel-max trick: what it gets depends on its own row
alone, not on its batch or on how a kernel adds. ref/sample.py has the formulas. Bytes that must move: the logits once.

B = requests, V = vocabulary, N = log-probabilities asked for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cs336.ops import registry
from cs336.ops.checks import check_last_dims, like, no_float64
from cs336.ops.dispatch import rows
from cs336.ops.ref import sample as ref

IN_PROMPT = ref.IN_PROMPT
NATIVE_VOCABULARY = 8 * 48 * 1024  # what the shared memory of a cluster holds: csrc/kernels/sample.h


class Sampled(NamedTuple):
    token_ids: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) float32, of the tokens
    top_token_ids: Tensor  # (B, N) int64, the most likely first
    top_logprobs: Tensor  # (B, N) float32


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    *,
    counts: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    bias: Tensor | None = None,
    num_logprobs: int = 0,
) -> Sampled:
    """One token a row.

    Args:
        logits: (B, V) floating point. A NaN is never drawn.
        temperature: (B,) float32; 0 takes the most likely token, the lowest of equal ones.
        top_k: (B,) int32, tokens to keep; 0 for all. Values equal to the last one kept are kept too.
        top_p: (B,) float32, share of the probability, after top_k, that the tokens kept must reach; 1 for all.
        min_p: (B,) float32, probability relative to the most likely token's; 0 for all.
        seeds, offsets: (B,) int64: a draw is a function of both, so a request counts its offset up by one a token.
        counts: (B, V) int32, how often each token is in the output, plus ops.IN_PROMPT if it is in the prompt.
        repetition_penalty: (B,) float32, divides positive logits of tokens in prompt or output, multiplies others
            (arXiv:1909.05858); 1 for none. This and the next two need counts.
        presence_penalty, frequency_penalty: (B,) float32, taken off the logits of tokens in the output, once and once
            for each time; 0 for none.
        bias: (B, V) float32, added to the logits; -inf forbids a token.
        num_logprobs: N, how many of the most likely tokens to return.

    Returns Sampled(token_ids, logprobs, top_token_ids, top_logprobs). Log-probabilities are those of the logits as they
    came in, before bias, penalties and temperature. Raises ValueError for arguments that do not fit.
    """
    if logits.dim() == 2:
        logits = rows(logits)
    penalties = repetition_penalty, presence_penalty, frequency_penalty
    options = counts, *penalties, bias, num_logprobs
    _check(logits, temperature, top_k, top_p, min_p, seeds, offsets, *options)
    return Sampled(*registry.call("sample", logits, temperature, top_k, top_p, min_p, seeds, offsets, *options))


def _check(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seeds,
    offsets,
    counts,
    repetition,
    presence,
    frequency,
    bias,
    num_logprobs,
) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be (B, V) floating point with V >= 1, got {like(logits)}")
    check_last_dims(logits=logits)
    B, V = logits.shape
    of_rows = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "seeds": (seeds, torch.int64),
        "offsets": (offsets, torch.int64),
        "repetition_penalty": (repetition, torch.float32),
        "presence_penalty": (presence, torch.float32),
        "frequency_penalty": (frequency, torch.float32),
    }
    for name, (x, dtype) in of_rows.items():
        if x is not None and (x.shape != (B,) or x.dtype != dtype or x.device != logits.device):
            raise ValueError(f"{name} must be {(B,)} {dtype} on {logits.device}, got {like(x)}")
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {x.stride()}")
    for name, x, dtype in (("counts", counts, torch.int32), ("bias", bias, torch.float32)):
        if x is not None and (x.shape != (B, V) or x.dtype != dtype or x.device != logits.device):
            raise ValueError(f"{name} must be {(B, V)} {dtype} on {logits.device}, got {like(x)}")
        check_last_dims(**{name: x})
    if counts is None and any(x is not None for x in (repetition, presence, frequency)):
        raise ValueError("penalties need counts, (B, V) torch.int32: how often each token is in the output")
    if not 0 <= num_logprobs <= V:
        raise ValueError(f"num_logprobs must be from 0 to the {V} tokens of the vocabulary, got {num_logprobs}")


def _native_refuses(logits, *_) -> str | None:
    if reason := no_float64(logits):
        return reason
    if logits.device.type != "cpu" and logits.shape[1] > NATIVE_VOCABULARY:
        return f"the native kernel takes at most {NATIVE_VOCABULARY} tokens, not {logits.shape[1]}"
    return None


def _fake(logits, *rest):
    B, N = logits.shape[0], rest[-1]
    return (
        logits.new_empty(B, dtype=torch.int64),
        logits.new_empty(B, dtype=torch.float32),
        logits.new_empty(B, N, dtype=torch.int64),
        logits.new_empty(B, N, dtype=torch.float32),
    )


registry.define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor offsets, "
    "Tensor? counts, Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, Tensor? bias, "
    "int num_logprobs) -> (Tensor token_ids, Tensor logprobs, Tensor top_token_ids, Tensor top_logprobs)",
    fake=_fake,
    ref=ref.sample,
    check=_check,
    capabilities={"native": ((9, 0), (9, 0))},  # clusters of blocks that read each other's shared memory
    supports={"native": _native_refuses},
)
