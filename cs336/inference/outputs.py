"""What an engine says of requests: as they go on, and when they end."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Token(NamedTuple):
    """A token and what the model thought of it, in nats before temperature, penalties and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens in its place, the first first, as many as were asked for."""


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    """What follows the prompt, without the stop string."""
    token_ids: list[int]
    """The tokens that were sampled, without the one that ended the text."""
    finish_reason: str
    """"stop" at an end, a stop token or a stop string; "length" at max_tokens or the longest sequence there is room
    for; "cancelled"."""
    logprobs: list[Token] | None
    """Of token_ids, if they were asked for."""
    end: Token | None = None
    """The token that ended the text."""
    message: Mapping[str, Any] | None = None
    """Of LLM.chat, to go on with: {"role": "assistant", "content": ..., "reasoning_content": ..., "tool_calls": ...},
    the last two where there are some; finish_reason is "tool_calls" where there are calls."""
    score: float | None = None
    """Of LLM.beam_search: the sum of log-probabilities, over the length ** length_penalty."""


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuations; text, token_ids, finish_reason and message are those of the first."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Token | None] | None = None
    """Of each token of the prompt, if they were asked for; None for the first, which nothing precedes."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed again."""

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def message(self) -> Mapping[str, Any] | None:
        return self.outputs[0].message


def warn_if_cut(sampled: int, max_tokens: int, max_len: int) -> None:
    """Warns of a text that reached the end of the context, and not max_tokens."""
    if sampled < max_tokens:
        warnings.warn(
            f"the text ends where the model's context of {max_len} tokens does: {sampled} of max_tokens = {max_tokens} "
            "fit after the prompt",
            stacklevel=3,
        )
