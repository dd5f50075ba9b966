"""Our models in lm-evaluation-harness (the extra `lm-eval`).

import lm_eval
from cs336.evaluation import LMEvalModel
lm_eval.simple_evaluate(LMEvalModel("runs/mine"), tasks=["arc_easy"])
"""

import os
from collections.abc import Sequence
from typing import Any

from cs336.evaluation.tasks.likelihood import loglikelihoods, rolling
from cs336.inference import LLM, SamplingParams

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError("LMEvalModel takes lm-evaluation-harness: pip install 'cs336[lm-eval]'") from error

NEW_TOKENS = 256  # of an answer, where a task does not say


class LMEvalModel(LM):
    """model: an LLM, or what LLM takes, with its options. All requests of a kind go through the engine in one batch."""

    def __init__(self, model: LLM | str | os.PathLike, **options: Any):
        super().__init__()
        self.llm = model if isinstance(model, LLM) else LLM(model, quiet=True, **options)

    @property
    def tokenizer_name(self) -> str:
        return self.llm.name

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        return self.llm.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats of the continuation, whether it is the greedy one) of each (context, continuation)."""
        found = loglikelihoods(self.llm, [request.args for request in requests])
        return [(scored.logprob, scored.greedy) for scored in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each text, in windows of the context."""
        return rolling(self.llm, [request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to one of the strings of `until`; greedy unless a task says do_sample and a temperature."""
        prompts, params = [], []
        for context, asked in (request.args for request in requests):
            until = asked.get("until") or ()
            hot = float(asked.get("temperature") or 0) if asked.get("do_sample") else 0.0
            most = min(
                asked.get("max_gen_toks") or asked.get("max_new_tokens") or NEW_TOKENS, self.llm.engine.max_len - 1
            )
            ids = self.llm.encode([context])[0][most - self.llm.engine.max_len :]
            prompts.append(ids)
            params.append(
                SamplingParams(
                    temperature=hot,
                    top_p=asked.get("top_p"),
                    max_tokens=most,
                    stop=(until,) if isinstance(until, str) else tuple(until),
                )
            )
        return [output.text for output in self.llm.generate(prompts, params)] if prompts else []
