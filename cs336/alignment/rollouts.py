"""Responses from the engine, and what they are worth. B = responses, S = tokens of a row, T = S - 1 predictions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cs336.alignment.functions import response_mask
from cs336.alignment.rewards import score_of
from cs336.data.loader import permute
from cs336.inference import LLM, SamplingParams
from cs336.verifiers import Verdict

Reward = Callable[[str, Any], Verdict | float]
"""(response, expected answer) -> a score: a verifier, for one."""
Draw = Callable[[int], Sequence[tuple[str, Any]]]
"""So many further prompts, each with its answer."""
Item = TypeVar("Item")


class Sampled(Protocol):
    """What of a configuration says how responses are drawn."""

    @property
    def prompts_per_step(self) -> int: ...
    @property
    def num_generations(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def temperature(self) -> float: ...


@dataclass(frozen=True)
class Rollouts:
    """Responses to prompts, those of a prompt one after the other."""

    texts: list[str]
    token_ids_BS: Tensor
    """(B, S) int64: prompt, response and the token that ended it, padded on the right with zeros."""
    mask_BT: Tensor
    """(B, T) bool: predictions of the responses' tokens."""
    sampled_log_probs_BT: Tensor
    """(B, T) float32: what the engine said of the tokens that it drew, before temperature; 0 elsewhere."""
    truncated_B: Tensor
    """(B,) bool: cut by max_tokens or the room there was."""


def rollout(llm: LLM, prompts: Sequence[str], config: Sampled, seed: int) -> Rollouts:
    """num_generations responses to each prompt; equal weights and seeds draw equal responses."""
    n = config.num_generations
    params = [
        SamplingParams(config.temperature, max_tokens=config.max_tokens, n=n, logprobs=0, seed=seed + i * n)
        for i in range(len(prompts))
    ]
    texts, rows, lengths, truncated = list[str](), list[list[int]](), list[int](), list[bool]()
    logs = list[list[float]]()
    for request in llm.generate(prompts, params):
        for output in request.outputs:
            drawn = [*(output.logprobs or []), *([output.end] if output.end else [])]
            texts.append(output.text)
            rows.append(request.prompt_token_ids + [token.id for token in drawn])
            lengths.append(len(request.prompt_token_ids))
            logs.append([token.logprob for token in drawn])
            truncated.append(output.finish_reason == "length")
    S = max(map(len, rows))
    token_ids_BS, logs_BT = torch.zeros(len(rows), S, dtype=torch.int64), torch.zeros(len(rows), S - 1)
    for b, (row, start, log) in enumerate(zip(rows, lengths, logs, strict=True)):
        token_ids_BS[b, : len(row)] = torch.tensor(row)
        logs_BT[b, start - 1 : len(row) - 1] = torch.tensor(log)
    mask_BT = response_mask(torch.tensor(lengths), torch.tensor([len(row) for row in rows]), S)
    device = llm.model.device
    return Rollouts(
        texts, token_ids_BS.to(device), mask_BT.to(device), logs_BT.to(device), torch.tensor(truncated, device=device)
    )


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """The rows of several, padded to the longest."""
    S = max(part.token_ids_BS.shape[1] for part in parts)

    def padded(x: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, length - x.shape[1]))

    return Rollouts(
        [text for part in parts for text in part.texts],
        torch.cat([padded(part.token_ids_BS, S) for part in parts]),
        torch.cat([padded(part.mask_BT, S - 1) for part in parts]),
        torch.cat([padded(part.sampled_log_probs_BT, S - 1) for part in parts]),
        torch.cat([part.truncated_B for part in parts]),
    )


def rows(rollouts: Rollouts, places_B: Tensor) -> Rollouts:
    """Some of the responses, by their number."""
    device = rollouts.token_ids_BS.device
    at_B = places_B.to(device)
    return Rollouts(
        [rollouts.texts[i] for i in places_B.tolist()],
        rollouts.token_ids_BS[at_B],
        rollouts.mask_BT[at_B],
        rollouts.sampled_log_probs_BT[at_B],
        rollouts.truncated_B[at_B],
    )


def by_length(mask_BT: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """`size` rows at a time and how many predictions those have at most, the longest rows first: little is padding.

    mask_BT: (B, T) bool.
    """
    places_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    lengths_B, order_B = (mask_BT * places_T).amax(1).sort(descending=True, stable=True)
    for longest, rows_b in zip(lengths_B[::size].tolist(), order_B.split(size), strict=True):
        yield rows_b, max(1, longest)


def scores(texts: Sequence[str], answers: Sequence[Any], reward: Reward) -> Tensor:
    """(B,) float32. Raises ValueError for a score that is no finite number."""
    each = zip(texts, answers, strict=True)
    return torch.tensor([score_of(reward(text, answer), text) for text, answer in each], dtype=torch.float32)


class Order(Generic[Item]):
    """An endless order of items, each once before any comes again: `position` is all that there is to save.

    Raises ValueError without items.
    """

    def __init__(self, items: Sequence[Item], seed: int):
        if not items:
            raise ValueError("there are no prompts to learn from")
        self.items, self.seed, self.position = items, seed, 0

    def take(self, count: int) -> list[Item]:
        """The next ones."""
        epochs, places = np.divmod(np.arange(self.position, self.position + count), len(self.items))
        self.position += count
        chosen = [
            int(permute(places[i : i + 1], len(self.items), self.seed, int(epoch))[0]) for i, epoch in enumerate(epochs)
        ]
        return [self.items[i] for i in chosen]
