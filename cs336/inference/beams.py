"""Beam search: the likeliest continuations that are found by keeping the best few at each token; nothing is drawn.

A text's score is the sum of its tokens' log-probabilities, its end's too, over their number ** length_penalty.
B = prompts that go on, K = beams, R = B K rows, V = vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from cs336.inference.generate import Completion, check_prompts, end_of, prefill
from cs336.inference.sampling import check_finite
from cs336.inference.vocabulary import begins_text, encode_prompts, ends_of, unused_ids
from cs336.models import Transformer
from cs336.utils import nvtx


@dataclass(frozen=True)
class BeamParams:
    """How to search. Raises ValueError for values out of range."""

    beams: int = 4
    """Texts that are kept at each token. 1: the likeliest token each time."""
    max_tokens: int = 128
    length_penalty: float = 1.0
    """Scores are sums over length ** length_penalty: above 0 longer texts are favoured, below 0 shorter ones."""
    early_stopping: bool = False
    """End once so many texts have ended. False: once no text that goes on scores more than the worst of them too."""

    def __post_init__(self):
        for name in ("beams", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer, 1 or more, got {value!r}")
        if not abs(self.length_penalty) <= 10:
            raise ValueError(f"length_penalty must be from -10 to 10, got {self.length_penalty}")


@dataclass(frozen=True)
class Beam:
    token_ids: list[int]
    """New ones, without the end."""
    score: float
    ended: bool
    """By an end, not by max_tokens or the context."""


def beam_search(
    model: Transformer,
    tokenizer,
    prompts: str | Sequence[str],
    params: BeamParams | None = None,
    *,
    num_samples: int = 1,
) -> list[Completion]:
    """The num_samples best continuations of each prompt, one after the other, the best first.

    Prompts are read, and texts end, as in generate. Raises what it does, and ValueError for more samples than beams.
    """
    params = params or BeamParams()
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not 1 <= num_samples <= params.beams:
        raise ValueError(f"num_samples must be in 1..beams, {params.beams}, got {num_samples}")
    ends, encoded = ends_of(model, tokenizer), encode_prompts(model, tokenizer, prompts)
    read = [end_of(ids, model, params.max_tokens) for ids in encoded]
    found = beam_search_ids(model, read, params, ends, unused_ids(model, tokenizer))
    return [
        Completion(
            prompts[i],
            tokenizer.decode(beam.token_ids, at_start=begins_text(tokenizer, encoded[i])),
            beam.token_ids,
            "stop" if beam.ended else "length",
            len(encoded[i]) - len(read[i]),
        )
        for i, beams in enumerate(found)
        for beam in beams[:num_samples]
    ]


@torch.inference_mode()
def beam_search_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: BeamParams,
    end_ids: Collection[int],
    unused: Collection[int] = (),
) -> list[list[Beam]]:
    """The `beams` best continuations of each prompt, the best first; no id in `unused` is in one.

    Raises ValueError for prompts as generate_ids does, and for more beams than there are tokens to begin with.
    """
    check_prompts(model, [list(prompt) for prompt in prompts])
    K, V, ends = params.beams, model.config.vocab_size, frozenset(end_ids)
    if (first := V - len(ends | set(unused))) < K:
        raise ValueError(f"beams must be at most the {first} tokens that a text can begin with, got {K}")
    if not prompts:
        return []
    room = [model.config.context_length - len(prompt) for prompt in prompts]
    searches = [_Search(params, ends, min(params.max_tokens, most)) for most in room]
    state = model.new_state(len(prompts), max(len(p) + s.limit for p, s in zip(prompts, searches, strict=True)))
    unused_ids = torch.tensor(sorted(unused), dtype=torch.int64, device=model.device)
    with nvtx.annotate("prefill"):
        features_RM = prefill(model, [list(prompt) for prompt in prompts], state)
    rows = [b for b in range(len(prompts)) for _ in range(K)]
    features_RM, state, going = features_RM[rows], state.select(rows), searches
    while True:
        logits_RV = model.logits(features_RM).float().index_fill(1, unused_ids, -torch.inf)
        check_finite(logits_RV)
        scores_R1 = torch.tensor([s.scores for s in going], device=model.device).view(-1, 1)
        totals_BN = (scores_R1 + logits_RV.log_softmax(-1)).view(len(going), K * V)
        # A beam ends in as many ways as there are ends: behind those there are K that go on.
        best_BC, place_BC = totals_BN.topk(min(max(2, 1 + len(ends)) * K, K * V))
        candidates = zip(best_BC.tolist(), (place_BC // V).tolist(), (place_BC % V).tolist(), strict=True)
        parents = [search.extend(*found) for search, found in zip(going, candidates, strict=True)]
        rows = [b * K + parent for b, search in enumerate(going) if not search.done for parent in parents[b]]
        going = [search for search in going if not search.done]
        if not going:
            return [search.ended for search in searches]
        state = state.select(rows)
        last_R = torch.tensor([ids[-1] for search in going for ids in search.texts], device=model.device)
        with nvtx.annotate("decode"):
            features_RM = model.features(last_R[:, None], state=state)[:, -1]


@dataclass
class _Search:
    """Of one prompt: the K texts that go on, and the K best of those that ended, the best first."""

    params: BeamParams
    ends: frozenset[int]
    limit: int
    ended: list[Beam] = field(default_factory=list)
    done: bool = False

    def __post_init__(self):
        self.texts: list[list[int]] = [[] for _ in range(self.params.beams)]
        self.scores = [0.0] + [-math.inf] * (self.params.beams - 1)  # all begin alike: one of them is enough

    def extend(self, scores: list[float], parents: list[int], tokens: list[int]) -> list[int]:
        """Go on with candidates, the best first: texts `parents`, each with another token. Returns the parents of the
        texts that go on."""
        K, before = self.params.beams, self.texts
        length = len(before[0]) + 1
        divisor = length**self.params.length_penalty
        going = list[int]()
        self.texts, self.scores = [], []
        for rank, (score, parent, token) in enumerate(zip(scores, parents, tokens, strict=True)):
            ended = token in self.ends
            if ended or length == self.limit:
                if rank < K:  # those behind are there to go on
                    ids = before[parent] if ended else [*before[parent], token]
                    self.ended.append(Beam(ids, score / divisor, ended))
            elif len(going) < K:
                going.append(parent)
                self.texts.append([*before[parent], token])
                self.scores.append(score)
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:K]
        full = len(self.ended) == K
        self.done = length == self.limit or (
            full and (self.params.early_stopping or self.scores[0] / divisor <= self.ended[-1].score)
        )
        return going
