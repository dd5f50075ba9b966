"""What a model writes while it is trained."""

from collections.abc import Callable, Sequence
from typing import Any

from cs336.inference.generate import generate
from cs336.inference.sampling import SamplingParams
from cs336.models import Transformer


def sampler(
    tokenizer, prompts: Sequence[str], seed: int, max_tokens: int = 64
) -> Callable[[Transformer], list[dict[str, Any]]]:
    """A function that continues the same prompts with the same draws, whenever it is called: rows of samples.jsonl."""
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens, seed=seed)

    def sample(model: Transformer) -> list[dict[str, Any]]:
        return [{"prompt": c.prompt, "text": c.text} for c in generate(model, tokenizer, prompts, params)]

    return sample
