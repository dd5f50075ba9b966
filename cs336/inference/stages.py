"""Steps of a data build that run a language model: what reads unlike its text goes, and what stays is written anew.

    [[steps]]
    kind = "model_perplexity"
    model = "runs/small/export"
    most = 80

    [[steps]]
    kind = "rewrite"
    model = "models/instruct"
    prompt = "Say this as an encyclopedia would:\\n\\n{text}"

They stand in a ModelRecipe beside the steps of cs336.data, which knows no model. Each worker loads the models, and runs
one document at a time: what becomes of it depends on no other, and is the same in a build that was begun anew.
"""

import datetime
import hashlib
import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pydantic
import torch

from cs336.data.recipe import AnyDedup, AnyStep, Recipe
from cs336.data.step import Apply, Removed
from cs336.inference.embed import Semantic
from cs336.inference.llm import LLM
from cs336.inference.load import checked_context, find_model, load_model, load_tokenizer
from cs336.inference.sampling import SamplingParams
from cs336.models import Transformer
from cs336.utils.documents import Document
from cs336.utils.special_tokens import END_OF_TEXT

TEXT = "{text}"
TODAY = datetime.date(2025, 1, 1)  # for chat templates that tell it: a build must not depend on when it ran


@dataclass(frozen=True)
class ModelPerplexity:
    """Keeps documents whose perplexity under a language model is within bounds, and may note it for later steps."""

    model: pathlib.Path
    """An export, a checkpoint or a run directory, with its tokenizer."""
    least: float | None = None
    most: float | None = None
    field: str | None = None
    """The metadata field that gets the perplexity, for quality buckets."""
    max_tokens: int = 1024
    """Of a document's beginning that are read, or the model's context where that is shorter."""
    device: str = "cpu"
    kind: Literal["model_perplexity"] = "model_perplexity"

    def __post_init__(self):
        if self.least is self.most is self.field is None:
            raise ValueError("this model_perplexity filter changes nothing: give least, most or field")
        if self.least is not None and self.most is not None and not self.least <= self.most:
            raise ValueError(f"expected least <= most, got {self.least}, {self.most}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {self.max_tokens}")

    def check(self) -> None:
        checked_context(self.model, self.device)

    def build(self) -> Apply:
        path = find_model(self.model)
        model, tokenizer = load_model(path, self.device), load_tokenizer(path)
        begin = tokenizer.special_tokens.get(END_OF_TEXT, model.special_ids.get("bos_token_id"))
        head = [] if begin is None else [begin]

        def apply(document: Document) -> Document | Removed:
            ids = [*head, *tokenizer.encode_ordinary(document.text)[: self.max_tokens]]
            ids = ids[: model.config.context_length]
            if len(ids) < 2:
                return Removed("no model perplexity", "one token, which nothing precedes")
            perplexity = _perplexity(model, ids)
            detail = f"{perplexity:.1f} over {len(ids) - 1:,} tokens"
            if self.least is not None and perplexity < self.least:
                return Removed("model perplexity too low", detail)
            if self.most is not None and perplexity > self.most:
                return Removed("model perplexity too high", detail)
            if self.field is None:
                return document
            return replace(document, metadata=document.metadata | {self.field: perplexity})

        return apply


@dataclass(frozen=True)
class Rewrite:
    """Puts in each document's place what a language model makes of it; how is in metadata "rewritten".

    A document that holds a special token of the model is removed: it would be taken for the prompt's own.
    """

    model: pathlib.Path
    """An export, a checkpoint or a run directory, with its tokenizer and, if it has one, its chat template."""
    prompt: str
    """With {text} where the document goes."""
    max_tokens: int = 1024
    """Of what is written, which is cut there."""
    max_prompt_tokens: int = 2048
    """Of the prompt with the document in it: longer ones are removed."""
    temperature: float = 0.0
    """0: the likeliest token each time."""
    seed: int = 0
    """Of the draws, together with the document's text."""
    device: str = "cpu"
    kind: Literal["rewrite"] = "rewrite"

    def __post_init__(self):
        if self.prompt.count(TEXT) != 1:
            raise ValueError(f"the prompt must hold {TEXT} once, where the document goes, got {self.prompt!r:.200}")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens must be 1 or more, got {self.max_prompt_tokens}")
        self._params("")

    def check(self) -> None:
        context = checked_context(self.model, self.device)
        if self.max_tokens >= context:
            raise ValueError(
                f"max_tokens = {self.max_tokens} leaves no room for a document in the context of {context} tokens of "
                f"{self.model}: give fewer"
            )

    def build(self) -> Apply:
        context = checked_context(self.model, self.device)
        longest = min(self.max_prompt_tokens, context - self.max_tokens)
        # One at a time, nothing remembered and no length that free memory decides: the same bytes again.
        options: dict[str, Any] = {"max_seqs": 1, "max_len": longest + self.max_tokens, "prefix_cache": False}
        llm = LLM(self.model, device=self.device, quiet=True, **options)
        template = llm.chat_template
        dated = {"strftime_now": TODAY.strftime}

        def apply(document: Document) -> Document | Removed:
            if held := [token for token in llm.tokenizer.special_tokens if token in document.text]:
                return Removed("special token in text", f"{held[0]!r} is one of the model's")
            prompt = self.prompt.replace(TEXT, document.text)
            if not template.is_default:
                prompt = template.render([{"role": "user", "content": prompt}], extra=dated)
            (ids,) = llm.encode([prompt])
            if len(ids) > longest:
                return Removed("too long to rewrite", f"a prompt of {len(ids):,} tokens, of at most {longest:,}")
            (output,) = llm.generate([ids], self._params(document.text))
            how: dict[str, Any] = {
                "model": llm.name,
                "prompt_tokens": len(ids),
                "tokens": len(output.token_ids),
                "finish_reason": output.finish_reason,
            }
            return replace(document, text=output.text, metadata=document.metadata | {"rewritten": how})

        return apply

    def _params(self, text: str) -> SamplingParams:
        """Equal documents are written alike, wherever they are."""
        mixed = hashlib.blake2b(f"{self.seed}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        seed = int.from_bytes(mixed, "little") >> 1  # below 2**63
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens, seed=seed)


ModelStep = Annotated[AnyStep | ModelPerplexity | Rewrite, pydantic.Field(discriminator="kind")]
ModelDedup = Annotated[AnyDedup | Semantic, pydantic.Field(discriminator="kind")]


@dataclass(frozen=True)
class ModelRecipe(Recipe):
    """A recipe whose steps and deduplication may run language models."""

    steps: tuple[ModelStep, ...] = ()  # type: ignore[assignment]  # more kinds than Recipe has, of the same protocol
    """Over each document, in order."""
    dedup: tuple[ModelDedup, ...] = ()  # type: ignore[assignment]
    """Over all documents, in order."""


@torch.inference_mode()
def _perplexity(model: Transformer, ids: Sequence[int]) -> float:
    """Of the tokens from the second on. Raises ValueError where the logits are not finite."""
    ids_BS = torch.tensor([ids], device=model.device)
    loss = float(model(ids_BS[:, :-1], targets=ids_BS[:, 1:])) / (len(ids) - 1)
    if not math.isfinite(loss):
        raise ValueError("the model's logits are not finite: its weights are damaged, or training diverged")
    return math.exp(loss)
