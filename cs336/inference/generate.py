"""Generation with a state of the tokens before: prompts of different lengths together, text or plain token ids.

Prompts are padded on the right, then each row goes on at its own position and leaves the batch when it ends. A row does
not depend on the others, but for floating-point rounding: matmuls of another size add in another order.
B = batch, S = tokens, V = vocabulary.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cs336.inference.outputs import warn_if_cut
from cs336.inference.sampling import SamplingParams, Uniforms, refuse_engine_only, sample
from cs336.inference.vocabulary import encode_prompts, ends_of, text_stream, unused_ids
from cs336.models import DecodingState, Transformer
from cs336.utils import nvtx


@dataclass(frozen=True)
class Completion:
    prompt: str
    text: str
    """What follows the prompt, without the stop string."""
    token_ids: list[int]
    """The tokens that were sampled, without the end of text."""
    finish_reason: str
    """"stop" at the end of text or a stop string, "length" at max_tokens or the model's context_length."""
    dropped: int = 0
    """Tokens at the prompt's beginning that the model did not read, for the prompt exceeds its context."""


def generate(
    model: Transformer,
    tokenizer,
    prompts: str | Sequence[str],
    params: SamplingParams | None = None,
    *,
    num_samples: int = 1,
) -> list[Completion]:
    """Continue each prompt until the end of text, a stop string, max_tokens or the end of the model's context.

    A text ends at the model's end_ids, or without any at <|endoftext|>. Special tokens written in a prompt are taken as
    such; an empty prompt begins a new document. Of a prompt that exceeds the context the end is read, which leaves room
    for max_tokens or half of the context, and `dropped` says how much was not.

    num_samples: continuations of each prompt, one after the other; with a seed, the n-th is that of seed + n.
    Raises ValueError for a tokenizer that is not the model's: with more tokens, or without its end of text.
    """
    params = params or SamplingParams()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if num_samples < 1:
        raise ValueError(f"num_samples must be 1 or more, got {num_samples}")
    ends, encoded = params.ends(ends_of(model, tokenizer)), encode_prompts(model, tokenizer, prompts)
    read = [end_of(ids, model, params.max_tokens) for ids in encoded]
    count = len(prompts) * num_samples
    texts = [text_stream(tokenizer, params.stop, encoded[i // num_samples]) for i in range(count)]
    pieces: list[list[str]] = [[] for _ in range(count)]
    ids: list[list[int]] = [[] for _ in range(count)]
    finished: set[int] = set()
    for row, token_id in _decode(model, read, params, finished, unused_ids(model, tokenizer), num_samples):
        if token_id in ends:
            finished.add(row)
            continue
        ids[row].append(token_id)
        pieces[row].append(texts[row].push(token_id))
        if texts[row].stopped:
            finished.add(row)
    return [
        Completion(
            prompts[i // num_samples],
            "".join(pieces[i]) + texts[i].close(),
            ids[i],
            "stop" if i in finished else "length",
            len(encoded[i // num_samples]) - len(read[i // num_samples]),
        )
        for i in range(count)
    ]


def stream(model: Transformer, tokenizer, prompt: str, params: SamplingParams | None = None) -> Iterator[str]:
    """Continue one prompt, piece by piece: whole characters, none of a stop string. Joined, they are generate's text.

    Warns where generate sets `dropped`, and where the context ends before max_tokens. Raises what generate does.
    """
    params = params or SamplingParams()
    ends, (ids,) = params.ends(ends_of(model, tokenizer)), encode_prompts(model, tokenizer, [prompt])
    read = end_of(ids, model, params.max_tokens)
    if dropped := len(ids) - len(read):
        warnings.warn(
            f"the prompt has {len(ids)} tokens, the model's context {model.config.context_length}: "
            f"its first {dropped} are not read",
            stacklevel=2,
        )
    text = text_stream(tokenizer, params.stop, ids)
    tokens = _decode(model, [read], params, set(), unused_ids(model, tokenizer))
    for sampled, (_, token_id) in enumerate(tokens, 1):  # noqa: B007 (read in its else)
        if token_id in ends:
            break
        if piece := text.push(token_id):
            yield piece
        if text.stopped:
            return
    else:
        warn_if_cut(sampled, params.max_tokens, model.config.context_length)
    if piece := text.close():
        yield piece


def generate_ids(
    model: Transformer,
    token_ids: Tensor | Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    end_id: int | Collection[int] | None = None,
) -> list[list[int]]:
    """Continue rows of token ids, without a tokenizer: each until an end, max_tokens or the end of the model's context.

    token_ids: a tensor (B, S), or B sequences of any lengths but 0.
    end_id: one or several; the model's end_ids if None.
    Returns the new ids of each row, the end included.
    Raises ValueError for ids outside the model's vocabulary, stop strings, empty rows, and rows that fill the context.
    """
    params = params or SamplingParams()
    if params.stop:
        raise ValueError("stop strings need a tokenizer: use generate, or end_id")
    if isinstance(token_ids, Tensor) and token_ids.dim() != 2:
        raise ValueError(f"token_ids must be (batch, tokens), got shape {tuple(token_ids.shape)}")
    if any(isinstance(row, int) for row in token_ids):
        raise ValueError("token_ids must be a sequence of sequences of ids: write [ids] for one row")
    prompts = token_ids.tolist() if isinstance(token_ids, Tensor) else [list(row) for row in token_ids]
    own: Collection[int] = model.end_ids if end_id is None else (end_id,) if isinstance(end_id, int) else end_id
    ends = params.ends(own)
    ids: list[list[int]] = [[] for _ in prompts]
    finished: set[int] = set()
    for row, token_id in _decode(model, prompts, params, finished):
        ids[row].append(token_id)
        if token_id in ends:
            finished.add(row)
    return ids


def end_of(ids: list[int], model: Transformer, max_tokens: int) -> list[int]:
    """A prompt, or of one that leaves no room in the context its end."""
    context_length = model.config.context_length
    if len(ids) < context_length:
        return ids
    return ids[-max(1, context_length - min(max_tokens, context_length // 2)) :]


@torch.inference_mode()
def _decode(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    finished: set[int],
    unused: Sequence[int] = (),
    num_samples: int = 1,
) -> Iterator[tuple[int, int]]:
    """(row, token id) as they are sampled, each row once a step; never an id in `unused`.

    Row i * num_samples + n is sample n of prompt i. The caller adds the rows that shall end to `finished`.
    """
    refuse_engine_only(params)
    check_prompts(model, prompts)
    if not prompts:
        return
    lengths = [len(prompt) for prompt in prompts]
    limits = [min(params.max_tokens, model.config.context_length - length) for length in lengths]
    state = model.new_state(len(prompts), max(map(sum, zip(lengths, limits, strict=True))))
    unused_ids = torch.tensor(unused, dtype=torch.int64, device=model.device)
    uniforms = Uniforms(params.seed, num_samples)
    rows = list(range(len(prompts) * num_samples))
    with nvtx.annotate("prefill"):
        features_BM = prefill(model, prompts, state)
    if num_samples > 1:
        prompt_of = [row // num_samples for row in rows]
        features_BM, state = features_BM[prompt_of], state.select(prompt_of)
    for step in range(1, max(limits) + 1):
        logits_BV = model.logits(features_BM).index_fill(1, unused_ids, -torch.inf)
        uniform_B = uniforms.draw([row % num_samples for row in rows]) if params.temperature else None
        ids_B = sample(logits_BV, params, uniform_B)
        yield from zip(rows, ids_B.tolist(), strict=True)
        kept = [i for i, row in enumerate(rows) if row not in finished and step < limits[row // num_samples]]
        if not kept:
            return
        if len(kept) < len(rows):
            rows, ids_B, state = [rows[i] for i in kept], ids_B[kept], state.select(kept)
        with nvtx.annotate("decode"):
            features_BM = model.features(ids_B[:, None], state=state)[:, -1]


def prefill(model: Transformer, prompts: list[list[int]], state: DecodingState) -> Tensor:
    """What the head reads after each prompt: (B, M)."""
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    segments_BS = -(torch.arange(longest, device=model.device) >= lengths_B[:, None]).long()  # -1: padding
    features_BSM = model.features(ids_BS, segments=segments_BS, state=state)
    return features_BSM[torch.arange(len(prompts), device=model.device), lengths_B - 1]


def check_prompts(model: Transformer, prompts: list[list[int]]) -> None:
    """Raises ValueError for one that is empty, leaves no room in the context, or has ids that are none."""
    vocab_size, context_length = model.config.vocab_size, model.config.context_length
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty: give it at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            bad = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ValueError(f"prompt {i} has token id {bad}, the model's are 0 to {vocab_size - 1}")
        if len(prompt) >= context_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room in the model's context of "
                f"{context_length}: shorten it"
            )
