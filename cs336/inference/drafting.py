"""Drafts by a smaller model, or by the first layers of the model itself (arXiv:2404.16710): what it would draw next.

    draft  d = argmax over kept of log q - log e        e: exponential draws of the counter (seed, offset)
    model  t = argmax over kept of log p - log e        the same e, for both stand in the same place

A draft is drawn with the numbers that decide the model's own token in its place: where p and q are alike, so mostly are
d and t. Of drafts at least (1 - D) / (1 + D) are right, D the total variation distance of p and q (arXiv:2408.07978);
accepting by min(1, p / q) instead, and drawing again from max(0, p - q), would reach 1 - D (arXiv:2302.01318). But so a
text stays what it is without drafts, token by token for a seed, whether or not a step had room for them.

The drafter runs beside the engine on the same page table: for each sequence that runs there is another of its own, in
the same slot and on pages of the same numbers, so that prefixes are shared and places given up as the model's are.
"""

import copy
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from torch import nn

from cs336.inference.runner import Launched, Runner
from cs336.inference.sampling import SamplingParams
from cs336.inference.scheduler import Chunk, Sequence, Step
from cs336.models import PagedState, Transformer


@dataclass(eq=False, kw_only=True)
class Drafted(Sequence):
    """A sequence as the drafter has it: `computed` tokens of its text, and behind them guesses."""

    of: Sequence
    admission: int
    """How often `of` had been preempted: what was computed before is lost."""
    guesses: Rows[int] = ()
    """Drafts whose state is there: they may have become text."""


class Drafter:
    """runner: of the draft model, with the slots and the page table of the engine's.

    shares: its layers' states are the engine's own, which hold all that the engine has computed.
    """

    def __init__(self, runner: Runner, *, shares: bool):
        self.runner, self.shares = runner, shares
        self._drafted: dict[int, Drafted] = {}
        self._launched: list[Launched] = []

    def follow(self, step: Step) -> None:
        """Read what a step of the engine has read of prompts."""
        if self.shares:
            return
        chunks = []
        for chunk in step.chunks:
            if not chunk.drafts:
                drafted = self._of(chunk.sequence, chunk.start)
                drafted.computed = chunk.start + chunk.count
                chunks.append(Chunk(drafted, chunk.start, chunk.count, False))
        if chunks:
            self._launch(Step([], chunks, step.copies))

    def draft(self, wanted: Rows[tuple[Sequence, int]]) -> list[list[int]]:
        """So many tokens, 1 at least, that may follow each sequence, which has pages for them; none where too much of
        its text was not read yet."""
        budget, first, rows = self.runner.max_step_tokens, Step([], [], []), []
        for sequence, most in wanted:
            drafted = self._of(sequence, sequence.computed)
            self._settle(drafted)
            missing = len(sequence.token_ids) - drafted.computed
            count = min(missing, budget)
            budget -= count
            if count == missing == 1:
                drafted.corrected = True
                first.decodes.append(drafted)
            elif count:
                first.chunks.append(Chunk(drafted, drafted.computed, count, count == missing))
            drafted.computed += count
            drafted.sampled = sequence.sampled + 1
            rows.append((drafted, most if count == missing else 0))
        drafts: dict[Drafted, list[int]] = {drafted: [] for drafted, _ in rows}
        passes = [self._launch(first)]
        while any(most > len(passes) for _, most in rows):
            live: list[Sequence] = [drafted for drafted, most in rows if most > len(passes)]
            for guessing in live:
                guessing.computed += 1
                guessing.sampled += 1
            passes.append(self._launch(Step(live, [], [])))
        for launched in passes:
            launched.wait()
            for of, token in zip(launched.sequences, launched.drawn.token_ids.tolist(), strict=True):
                assert isinstance(of, Drafted)
                drafts[of].append(token)
        for drafted, found in drafts.items():
            drafted.guesses = found[:-1]
            drafted.computed -= len(drafted.guesses)
        return list(drafts.values())

    def _of(self, sequence: Sequence, computed: int) -> Drafted:
        """Its like here; a new one, of which so many tokens are computed, where it was admitted since."""
        assert sequence.slot is not None
        drafted = self._drafted.get(sequence.slot)
        if drafted is None or drafted.of is not sequence or drafted.admission != sequence.preemptions:
            p = sequence.params
            drafted = self._drafted[sequence.slot] = Drafted(
                token_ids=sequence.token_ids,
                limit=sequence.limit,
                params=SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p),
                seed=sequence.seed,
                slot=sequence.slot,
                computed=computed,
                of=sequence,
                admission=sequence.preemptions,
            )
        pages = zip(drafted.pages, sequence.pages, strict=False)  # one that filled may have become another's
        drafted.told = min(drafted.told, next((i for i, (old, new) in enumerate(pages) if old != new), drafted.told))
        drafted.pages = list(sequence.pages)
        return drafted

    def _settle(self, drafted: Drafted) -> None:
        """Its guesses count as far as they have become text, whose newest token is always read anew."""
        if self.shares:
            drafted.computed = drafted.of.computed
            return
        ids = drafted.token_ids
        for guess in drafted.guesses:
            if drafted.computed >= len(ids) - 1 or ids[drafted.computed] != guess:
                break
            drafted.computed += 1
        drafted.guesses = ()

    def _launch(self, step: Step) -> Launched:
        """The buffers of the launch before the last are free only when it is through."""
        if len(self._launched) == 2:
            self._launched.pop(0).wait()
        self._launched.append(self.runner.launch(step))
        return self._launched[-1]


def check_draft(model: Transformer, draft: Transformer, max_len: int, tokenizer=None) -> None:
    """Raises ValueError for a draft model that cannot draft for sequences of max_len tokens of this one."""
    size, drafts, context = model.config.vocab_size, draft.config.vocab_size, draft.config.context_length
    if tokenizer is None and size != drafts:
        raise ValueError(f"the draft model has {drafts} tokens, the model {size}: they must have the same tokenizer")
    if tokenizer is not None and max(tokenizer.vocab) >= drafts:
        raise ValueError(f"the draft model has {drafts} tokens, the tokenizer one of id {max(tokenizer.vocab)}")
    if context < max_len:
        raise ValueError(f"the draft model reads {context} tokens, and a sequence may have {max_len}: lower max_len")
    if draft.device != model.device:
        raise ValueError(f"the draft model is on {draft.device}, the model on {model.device}: put it there")


def early_exit(model: Transformer, num_layers: int) -> Transformer:
    """The first layers of a model, then its norm and head: the modules are the model's own, and stay so.

    Raises ValueError where the model has no layers behind these.
    """
    if not 1 <= num_layers < model.config.num_layers:
        raise ValueError(f"exit_layer must be in 1..{model.config.num_layers - 1}, got {num_layers}: fewer than all")
    draft = copy.copy(model)
    draft.__dict__["_modules"] = dict(model._modules)
    draft.layers = nn.ModuleList(list(model.layers)[:num_layers])
    draft.config = model.config.with_blocks(model.config.blocks[:num_layers])
    return draft


def first_layers(state: PagedState, num_layers: int) -> PagedState:
    """The states of the first layers, not copied."""
    return PagedState(state.layers[:num_layers])
