"""A conversation with a model, turn by turn."""

import dataclasses
import time
import warnings
from collections.abc import Generator

from cs336.inference.llm import LLM
from cs336.inference.sampling import SamplingParams


class Talk:
    """system: what the model is told first. `speed` is of the last answer, in tokens a second.

    Raises ValueError where the model reads too little for any answer."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None):
        self._llm, self._system = llm, system
        self._params = dataclasses.replace(params, stop=(*params.stop, *llm.chat_template.stop))
        self.speed = 0.0
        self.forget()
        shortest, most = self._length([*self.messages, {"role": "user", "content": "?"}]), llm.engine.max_len
        if shortest >= most:
            raise ValueError(
                f"the chat template{' and the system message take' if system else ' takes'} {shortest} of the {most} "
                "tokens that the model reads, which leaves no room for an answer: talk to a model of a longer context, "
                "or let this one write with `cs336 generate`"
            )

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def say(self, text: str) -> Generator[str]:
        """The answer, piece by piece. Closed early, what was said so far is the answer.

        Where the conversation leaves the answer little room, its oldest turns are dropped, with a warning. Raises
        ValueError where the text alone is longer than the model reads, and leaves the conversation as it was.
        """
        messages = self._shortened([*self.messages, {"role": "user", "content": text}])
        pieces: list[str] = []
        sampled, begin = self._llm.engine.stats.sampled_tokens, time.perf_counter()
        stream = self._llm.stream(self._llm.chat_template.render(messages), self._params)
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            stream.close()
            count = self._llm.engine.stats.sampled_tokens - sampled
            self.speed = count / (time.perf_counter() - begin)
            if count:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _shortened(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Without the oldest turns, as long as the rest leaves no room for max_tokens or half of the context."""
        most, first = self._llm.engine.max_len, int(self._system is not None)
        left = messages
        while len(left) > first + 1 and self._length(left) > most - min(self._params.max_tokens, most // 2):
            left = left[:first] + left[first + 2 :]
        dropped = len(messages) - len(left)
        if not dropped or self._length(left) >= most:
            return messages
        warnings.warn(f"the oldest {dropped} messages do not fit any more and are forgotten", stacklevel=3)
        return left

    def _length(self, messages: list[dict[str, str]]) -> int:
        """Tokens of a conversation, up to where the model answers."""
        (ids,) = self._llm.encode([self._llm.chat_template.render(messages)])
        return len(ids)
