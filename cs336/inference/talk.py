"""A conversation with a model, turn by turn."""

import dataclasses
import time
from collections.abc import Generator

from cs336.inference.llm import LLM
from cs336.inference.sampling import SamplingParams


class Talk:
    """system: what the model is told first. `speed` is of the last answer, in tokens a second."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None):
        self._llm, self._system = llm, system
        self._params = dataclasses.replace(params, stop=(*params.stop, *llm.chat_template.stop))
        self.speed = 0.0
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def say(self, text: str) -> Generator[str]:
        """The answer, piece by piece. Closed early, what was said so far is the answer.

        Raises ValueError where the conversation is longer than the model reads, and leaves it as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
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
