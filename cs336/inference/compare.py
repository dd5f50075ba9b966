"""A model beside transformers': the same files read by both, the same text, likelihoods and greedy continuation.

T = tokens, V = vocabulary.
"""

import os
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cs336.inference.generate import generate_ids
from cs336.inference.load import load_tokenizer
from cs336.inference.sampling import SamplingParams
from cs336.models import Transformer, from_pretrained
from cs336.models.huggingface import OURS, read_kind
from cs336.tokenizer import sentencepiece
from cs336.tokenizer.patterns import is_portable
from cs336.utils.device import pick


@dataclass(frozen=True)
class HuggingFaceComparison:
    tokens: int
    """Of the text, as far as the model's context reaches."""
    same_tokens: bool
    """Both tokenizers give the same ids."""
    log_likelihood: float
    """Mean nats of a token given those before, by our model."""
    their_log_likelihood: float
    worst_difference: float
    """Between the log-likelihoods of one token."""
    new_tokens: int
    """Continued greedily from the first half of the text."""
    same_new_tokens: int
    """Until the first that differs."""
    margin: float | None
    """Where they first differ: between their likeliest two logits. Near 0 is a tie that rounding decides."""

    def __str__(self) -> str:
        greedy = f"{self.same_new_tokens} of {self.new_tokens} greedy tokens are the same"
        if self.margin is not None:
            greedy += f"; at the next their two likeliest are {self.margin:.2g} apart"
        return (
            f"{self.tokens} tokens, {'the same ids' if self.same_tokens else 'OTHER IDS'} from both tokenizers\n"
            f"log-likelihood a token: {self.log_likelihood:.6f} (cs336), {self.their_log_likelihood:.6f} "
            f"(transformers), worst difference {self.worst_difference:.2g}\n{greedy}"
        )


@torch.inference_mode()
def compare_huggingface(
    directory: str | os.PathLike,
    text: str,
    device: str = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    new_tokens: int = 64,
) -> HuggingFaceComparison:
    """Read a directory in the Hugging Face layout with both libraries and compare what the models make of a text.

    Args:
        directory: config.json, weights and tokenizer.json of a Llama, Mistral, Qwen2 or Qwen3.
        text: cut to the model's context; its first half is what both continue, for up to new_tokens. A LongRoPE is
            read for a text of its length, and stays so while both continue.
        device: "auto" is a GPU if there is one.
        dtype: that both compute in.

    Raises ImportError without transformers, FileNotFoundError where a file is missing, ValueError for a model that one
    of the two does not read and for a text of less than two tokens.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    except ImportError as error:
        raise ImportError(f"comparing needs transformers ({error}): pip install 'cs336[hf]'") from None
    directory, where = pathlib.Path(directory), pick(device)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} is not in the Hugging Face layout, which transformers reads: name an export, which a "
            "finished run has"
        )
    if read_kind(directory) == OURS:
        raise ValueError(f"{directory} holds a model that no family of transformers has: see save_pretrained")
    tokenizer = load_tokenizer(directory)
    if tokenizer.pattern != sentencepiece.NAME and not is_portable(tokenizer.pattern):
        raise ValueError(
            f"{directory / 'tokenizer.json'} cuts texts by {tokenizer.pattern!r}, which no other program reads as this "
            "one does: there is nothing to compare"
        )
    their_tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ids, their_ids = tokenizer.encode(text), their_tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: give one of two at least")
    ours = from_pretrained(directory, where, dtype, max_len=len(ids)).eval()
    read = ids[: ours.config.context_length]
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    theirs = theirs.to(where, dtype).eval()
    ids_1T = torch.tensor([read], device=where)
    found_T, their_T = (_log_likelihoods(logits, ids_1T) for logits in (ours(ids_1T), theirs(ids_1T).logits))
    prompt = read[: len(read) // 2]
    greedy = GenerationConfig(
        max_new_tokens=min(new_tokens, ours.config.context_length - len(prompt)),
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    mine, other, margins = _greedy(ours, theirs, prompt, greedy)
    same = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return HuggingFaceComparison(
        tokens=len(read),
        same_tokens=ids == their_ids,
        log_likelihood=found_T.mean().item(),
        their_log_likelihood=their_T.mean().item(),
        worst_difference=(found_T - their_T).abs().max().item(),
        new_tokens=len(mine),
        same_new_tokens=same,
        margin=None if same == len(mine) else margins[same],
    )


def _log_likelihoods(logits_1TV: Tensor, ids_1T: Tensor) -> Tensor:
    """Of each token but the first, in float64: (T - 1,)."""
    log_p_TV = logits_1TV[0, :-1].double().log_softmax(-1)
    return log_p_TV.gather(1, ids_1T[0, 1:, None])[:, 0]


def _greedy(ours: Transformer, theirs, prompt: list[int], how) -> tuple[list[int], list[int], list[float]]:
    """Our continuation, theirs, and how far apart their likeliest two logits were at each token; no end is minded."""
    (mine,) = generate_ids(ours, [prompt], SamplingParams(temperature=0, max_tokens=how.max_new_tokens), end_id=())
    ids_1T = torch.tensor([prompt], device=ours.device)
    theirs.generation_config = how  # in place of its own, which may sample and end
    out = theirs.generate(ids_1T, attention_mask=torch.ones_like(ids_1T))
    likeliest_N2 = torch.cat(out.logits).float().topk(2).values
    return mine, out.sequences[0, len(prompt) :].tolist(), (likeliest_N2[:, 0] - likeliest_N2[:, 1]).tolist()
