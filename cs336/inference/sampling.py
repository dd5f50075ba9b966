"""How the next token is drawn from logits (B, V): pure functions, a row apart from the others.

A filter sets the logits of the tokens it excludes to -inf, and always leaves one. B = batch, V = vocabulary.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from operator import index
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from cs336.utils.files import read_text

MAX_LOGPROBS = 20
NONE = arg(help_behavior_hint="(default: none)")
GRAMMARS = ("json_schema", "regex", "choice", "lark")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# On the command line: a file of it.
SCHEMA_FILE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="FILE",
    instance_from_str=lambda words: read_text(words[0]),
    is_instance=lambda value: value is None or isinstance(value, str | Mapping),
    str_from_instance=lambda value: ["none" if value is None else str(value)],
)


def _schema(schema: Any) -> str | None:
    """As JSON. Raises ValueError for what is no JSON object."""
    if schema is None:
        return None
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(found, Mapping):
            return json.dumps(dict(found), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema is not JSON: {error}") from None
    raise ValueError(f"json_schema must be a JSON object, got {schema!r:.80}")


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Raises ValueError for values out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens that together reach this probability (arXiv:1904.09751)."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest (arXiv:2407.01082)."""
    max_tokens: int = 128
    seed: int | None = None
    """Same seed, same continuation, whatever else is in the batch. None: torch's global generator."""
    stop: Annotated[tuple[str, ...] | str, NONE] = ()
    """Strings that end the text; they are not part of it."""
    stop_token_ids: Annotated[tuple[int, ...], NONE] = ()
    """Tokens that end the text, besides the model's own; they are not part of it."""
    ignore_eos: bool = False
    """Go on past the model's own ends."""
    min_tokens: int = 0
    """Until so many tokens are sampled none of those that end the text is."""
    n: int = 1
    """Continuations of each prompt; with a seed the i-th is that of seed + i."""
    logprobs: int | None = None
    """Log-probabilities of each sampled token and of so many likeliest ones, 0 to 20."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, from the second on."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that were there, and multiplies the others (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens in the output, for each time that they are there."""
    logit_bias: Annotated[Mapping[int, float] | tuple[tuple[int, float], ...], NONE] = ()
    """Token: what is added to its logits. Kept as pairs."""
    json_schema: Annotated[Mapping[str, Any] | str | None, SCHEMA_FILE] = None
    """The text is JSON of this schema, {"type": "object"} for any object. Kept as JSON."""
    regex: str | None = None
    """The text as a whole matches it, in the syntax of Rust's regex: without look-around and back-references."""
    choice: Annotated[tuple[str, ...], NONE] = ()
    """The text is one of these."""
    lark: str | None = None
    """The text is of this grammar, in llguidance's Lark, where <[256]> is the special token 256."""

    def __post_init__(self):
        for name in ("stop", "stop_token_ids", "choice"):
            if not isinstance(value := getattr(self, name), Iterable | None):
                raise ValueError(f"{name} must be a sequence, got {value!r}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "choice", self.choice if isinstance(self.choice, str) else tuple(self.choice or ()))
        object.__setattr__(self, "logit_bias", self.biases)
        object.__setattr__(self, "json_schema", _schema(self.json_schema))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not (_number(value) or (value is None and name in ("top_p", "min_p"))):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        for name in ("top_k", "max_tokens"):
            value = getattr(self, name)
            if not (value is None and name == "top_k") and (not _whole(value) or value < 1):
                raise ValueError(f"{name} must be an integer, 1 or more, got {value}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.seed is not None and not (_whole(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be an integer in 0..2**63 - 1, got {self.seed!r}")
        if not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop must be strings, got {self.stop!r}: tokens that end a text are stop_token_ids")
        if not all(_whole(token) for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be integers, got {self.stop_token_ids!r}")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which would end every text at once")
        if not _whole(self.n) or self.n < 1:
            raise ValueError(f"n must be an integer, 1 or more, got {self.n}")
        if not _whole(self.min_tokens) or not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be in 0..max_tokens, {self.max_tokens}, got {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not (_whole(value) and 0 <= value <= MAX_LOGPROBS):
                raise ValueError(f"{name} must be an integer in 0..{MAX_LOGPROBS}, got {value}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        for name, value in (
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
            *((f"logit_bias of token {token}", bias) for token, bias in self.biases),
        ):
            if not -100 <= value <= 100:
                raise ValueError(f"{name} must be in -100..100, got {value}")
        self._check_grammar()

    def _check_grammar(self) -> None:
        for name in ("regex", "lark"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"{name} must be a string, got {value!r:.80}")
        if isinstance(self.choice, str) or not all(isinstance(text, str) for text in self.choice):
            raise ValueError(f"choice must be a list of strings, got {self.choice!r:.80}")
        given = [name for name in GRAMMARS if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise ValueError(f"a text follows one grammar, got {' and '.join(given)}: give one of them")
        if given and self.min_tokens:
            raise ValueError(f"{given[0]} says where a text may end, and min_tokens does: give one of them")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """logit_bias as pairs."""
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else self.logit_bias
        try:
            return tuple((index(int(t) if isinstance(t, str) else t), float(value)) for t, value in pairs)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"logit_bias must be tokens and numbers, got {self.logit_bias!r:.80}") from None

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def grammar(self) -> tuple[str, str] | None:
        """The field that says what the text must be, and what it says, as a text."""
        if self.choice:
            return "choice", json.dumps(self.choice)
        found = {"json_schema": self.json_schema, "regex": self.regex, "lark": self.lark}
        return next(((name, text) for name, text in found.items() if isinstance(text, str)), None)

    def ends(self, of_model: Collection[int]) -> tuple[int, ...]:
        """The tokens that end a text, of which a model has some of its own."""
        return (*self.stop_token_ids, *(() if self.ignore_eos else of_model))


ENGINE_ONLY = {*GRAMMARS, "min_tokens", "n", "logprobs", "prompt_logprobs", "logit_bias"}
ENGINE_ONLY |= {"repetition_penalty", "presence_penalty", "frequency_penalty"}


def refuse_engine_only(params: SamplingParams) -> None:
    """Raises ValueError for what an engine does, and `generate` does not."""
    if wanted := [name for name in sorted(ENGINE_ONLY) if getattr(params, name) != getattr(SamplingParams, name)]:
        raise ValueError(f"generate and stream do not take {', '.join(wanted)}: use cs336.inference.LLM")


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row."""
    kept = logits_BV.topk(min(k, logits_BV.shape[-1]))
    return torch.full_like(logits_BV, -torch.inf).scatter(-1, kept.indices, kept.values)


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest largest logits of each row whose probabilities reach p."""
    ordered_BV, index_BV = logits_BV.sort(descending=True, stable=True)
    probs_BV = ordered_BV.softmax(-1, dtype=torch.float64)
    excluded_BV = probs_BV.cumsum(-1) - probs_BV >= p  # what comes before has reached p
    excluded_BV[..., 0] = False
    return logits_BV.masked_fill(excluded_BV.scatter(-1, index_BV, excluded_BV), -torch.inf)


def min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the logits of each row whose probability is at least p times the largest."""
    probs_BV = logits_BV.softmax(-1, dtype=torch.float32)
    return logits_BV.masked_fill(probs_BV < p * probs_BV.amax(-1, keepdim=True), -torch.inf)


def filter_logits(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Apply temperature, then min-p, top-k and top-p, each to what the one before left: the order of ops.sample, and of
    vLLM. Temperature must not be 0.

    The largest logit of a row becomes 0 first, so that no temperature makes NaN of it.
    """
    logits_BV = logits_BV.float()
    logits_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)).double() / params.temperature).float()
    if params.min_p is not None:
        logits_BV = min_p(logits_BV, params.min_p)
    if params.top_k is not None:
        logits_BV = top_k(logits_BV, params.top_k)
    if params.top_p is not None and params.top_p < 1:
        logits_BV = top_p(logits_BV, params.top_p)
    return logits_BV


def draw(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the running sum of a row's probabilities passes its uniform number in [0, 1): ids (B,)."""
    sums_BV = probs_BV.double().cumsum(-1)
    target_B1 = uniform_B.double()[:, None] * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, target_B1, right=True)[:, 0]


class Uniforms:
    """The numbers in [0, 1) that decide a batch's tokens, step by step: (B,) float32 on the CPU.

    With a seed a row's number is that of its sample, so that it does not depend on the batch: sample n of every prompt
    has those of seed + n. Without one each row has its own, from torch's global generator.
    """

    def __init__(self, seed: int | None, num_samples: int = 1):
        seeds = [] if seed is None else range(seed, seed + num_samples)
        self._generators = [torch.Generator().manual_seed(s) for s in seeds]

    def draw(self, samples: Sequence[int]) -> Tensor:
        """For rows of these samples."""
        if not self._generators:
            return torch.rand(len(samples), device="cpu")
        return torch.cat([torch.rand(1, generator=g) for g in self._generators])[list(samples)]


def check_finite(logits_BV: Tensor) -> None:
    """Raises ValueError where a row is not finite: NaN, +inf, or -inf throughout."""
    if not logits_BV.amax(-1).isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or training diverged")


def sample(logits_BV: Tensor, params: SamplingParams, uniform_B: Tensor | None = None) -> Tensor:
    """Draw a token for each row of logits (B, V): ids (B,) int64.

    uniform_B: the numbers in [0, 1) that decide; if None, the first of Uniforms(params.seed).

    Raises ValueError for another shape, and where a row is not finite: NaN, +inf, or -inf throughout.
    """
    if logits_BV.dim() != 2 or logits_BV.shape[1] == 0:
        raise ValueError(f"logits must be (batch, vocabulary), got shape {tuple(logits_BV.shape)}")
    check_finite(logits_BV)
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    if uniform_B is None:
        uniform_B = Uniforms(params.seed).draw([0] * len(logits_BV))
    probs_BV = filter_logits(logits_BV, params).softmax(-1)
    return draw(probs_BV, uniform_B.to(probs_BV.device))
