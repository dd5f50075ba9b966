"""Requests in, tokens out: lays out steps, runs them, and turns what they draw into texts.

While the device runs a step the host lays out the next one, so that tokens are seen one step late: a sequence that ends
with one of them has been given a token more, which is dropped. On a CPU, where nothing runs beside the host, there is
no such lag.
"""

import itertools
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cs336 import ops
from cs336.inference import ranks
from cs336.inference.drafting import Drafter, check_draft, early_exit, first_layers
from cs336.inference.grammar import Grammars, Guide
from cs336.inference.memory import EngineMemory, free_memory, plan_memory
from cs336.inference.outputs import CompletionOutput, RequestOutput, Token
from cs336.inference.pages import PageCache
from cs336.inference.runner import Launched, Runner
from cs336.inference.sampling import SamplingParams
from cs336.inference.scheduler import Scheduler, Sequence
from cs336.inference.shapes import graph_sizes, most_captured
from cs336.inference.speculation import COST, MAX_DRAFT, Speculator, StepTimes
from cs336.inference.vocabulary import ends_of, text_stream, unused_ids
from cs336.models import PagedState, Transformer
from cs336.models.invariance import check_invariant
from cs336.tokenizer.text_stream import TextStream

# One in so many slots becomes free before those that wait are given them, where steps are CUDA graphs. 3,000 questions
# on 512 slots take 1,011 steps of which 78 read prompts, for 988 of which 696 do (counted: docs/log.md).
TOGETHER = 16
NOT_FINITE = "the model's logits are not finite: its weights are damaged, or training diverged"


@dataclass(frozen=True)
class EngineConfig:
    """How an engine uses its device."""

    max_seqs: int = 64
    """That run at once; the others wait."""
    max_len: int | None = None
    """Tokens of a sequence, its prompt included. None: the model's context_length, or what fits of it. A LongRoPE that
    is read has its short factors where this is no more than its original context."""
    max_step_tokens: int | None = None
    """Computed in a step: long prompts come in chunks. None: 16384 on a GPU, 512 on a CPU."""
    page_size: int = 64
    num_pages: int | None = None
    """None: as many as fit and are of use."""
    memory_share: float | None = None
    """Of the free memory, for pages and steps. None: 0.9 on a GPU, 0.25 on a CPU."""
    prefix_cache: bool = True
    """Prompts that begin with the same tokens share what was computed of these; not where a state has no pages."""
    cuda_graphs: bool = True
    invariant: bool = False
    """A sequence's log-probabilities are, bit for bit, those of a training forward inside cs336.invariant()."""
    overlap: bool | None = None
    """Lay out a step while the one before runs. None: on a GPU."""
    speculation: Literal["ngram"] | None = None
    """Draft tokens that a step then verifies all at once, as long as that pays. ngram: what followed in the text so far
    when its last tokens were there before. No token is another for it."""
    exit_layer: int | None = None
    """Speculate with what the first so many layers, norm and head make of the text, instead (arXiv:2404.16710)."""
    draft_tokens: int = MAX_DRAFT
    """At most, for a step."""

    def __post_init__(self):
        for name in ("max_seqs", "max_len", "max_step_tokens", "page_size", "num_pages"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.max_step_tokens is not None and self.max_step_tokens < self.max_seqs:
            raise ValueError(f"max_step_tokens {self.max_step_tokens} must reach max_seqs {self.max_seqs}")
        if self.speculation not in (None, "ngram"):
            raise ValueError(f"speculation must be 'ngram' or None, got {self.speculation!r}")
        if self.speculation is not None and self.exit_layer is not None:
            raise ValueError(f"drafts come from speculation {self.speculation!r} or from exit_layer: give one of them")
        if not 1 <= self.draft_tokens <= MAX_DRAFT:
            raise ValueError(f"draft_tokens must be in 1..{MAX_DRAFT}, got {self.draft_tokens}")
        if self.memory_share is not None and not 0 < self.memory_share <= 1:
            raise ValueError(f"memory_share must be in (0, 1], got {self.memory_share}")


@dataclass(eq=False, kw_only=True)
class Sample(Sequence):
    """One continuation of a request's prompt."""

    request: "Request"
    index: int
    stream: TextStream | None
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of what was sampled, without the end."""
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """The likeliest in these places, where they are asked for."""
    end: Token | None = None
    finish_reason: str | None = None
    speculator: Speculator | None = None

    @property
    def speculates(self) -> bool:
        """Whether drafts may be made: nothing changes its logits, which drafts would have to be counted for."""
        return self.speculator is not None and self.sampled >= self.controlled

    @property
    def tokens(self) -> list[Token]:
        """Those that were sampled, without the end."""
        ids = self.token_ids[self.num_prompt :]
        tops = self.tops or itertools.repeat(())
        return [Token(*found) for found in zip(ids, self.logprobs, tops, strict=False)]


@dataclass(eq=False)
class Request:
    """A prompt, with what became of it so far. Times are of time.perf_counter."""

    id: int
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    samples: list[Sample] = field(default_factory=list)
    prompt_tokens: dict[int, Token] = field(default_factory=dict)
    """By their place, of a prompt whose log-probabilities are asked for."""
    arrived: float = field(default_factory=time.perf_counter)
    error: str | None = None

    @property
    def finished(self) -> bool:
        return all(sample.finished for sample in self.samples)

    @property
    def prompt_logprobs(self) -> list[Token | None] | None:
        if self.params.prompt_logprobs is None:
            return None
        found: list[Token | None] = [None] * len(self.prompt_token_ids)
        for place, token in self.prompt_tokens.items():  # often the last few of thousands
            found[place] = token
        return found

    def output(self) -> RequestOutput:
        """Of a request that has finished. Raises ValueError where its logits were not finite."""
        if self.error:
            raise ValueError(self.error)
        logprobs = self.params.logprobs is not None
        outputs = [
            CompletionOutput(
                s.index,
                "".join(s.pieces),
                s.token_ids[s.num_prompt :][: len(s.logprobs)],
                s.finish_reason or "cancelled",
                s.tokens if logprobs else None,
                s.end,
            )
            for s in self.samples
        ]
        ids, cached = self.prompt_token_ids, self.samples[0].cached
        return RequestOutput(self.prompt, ids, outputs, self.prompt_logprobs, cached)


class Update(NamedTuple):
    """A sample went on by a token, ended, or both."""

    sample: Sample
    text: str
    """That is certain now."""
    token: Token | None
    """None where the end itself was drawn."""
    finish_reason: str | None
    """Where it ended. The sample's own is that of the newest step, which may be ahead of this."""


@dataclass
class Stats:
    """Counted since the engine began."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts' tokens, those that were not computed."""
    sampled_tokens: int = 0
    finished: int = 0
    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT)
    """Tokens that were verified, by their place among a step's drafts."""
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFT)
    """Of these, those that were right."""

    def acceptance(self, place: int) -> float:
        """Of the drafts in that place, from 0, how many were right."""
        return self.accepted[place] / max(1, self.drafted[place])

    @property
    def hit_share(self) -> float:
        """Of the prompts' tokens, how much was found in the cache."""
        return self.cached_tokens / max(1, self.cached_tokens + self.prompt_tokens)


@dataclass(frozen=True)
class WarmUp:
    """What an engine did before its first request, so that none waits for a compiler."""

    graphs: int
    """Sizes of batch whose decoding step was captured."""
    steps: int
    """Prompts of all kinds that were run once."""
    seconds: float

    def __str__(self) -> str:
        return f"{self.graphs} graphs captured and {self.steps} prompts run in {self.seconds:.1f} s"


class Engine:
    """Continuous batching of requests on one model. Not for several threads at once: server/worker.py is.

    model: one that cs336.parallel.tensor_parallel has divided has an engine on each rank; all are asked the same.
    tokenizer: of the model; without one there are ids alone, and no stop strings.
    draft: a smaller model of the same tokenizer, which drafts what this one verifies: see drafting.py.
    Raises ValueError where the models and what they need do not fit the memory, for a tokenizer or a draft model that
    is not the model's, and for blocks that `invariant` does not have.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer=None,
        config: EngineConfig | None = None,
        *,
        draft: Transformer | None = None,
    ):
        config = EngineConfig() if config is None else config
        self.model, self.tokenizer, self.config = model, tokenizer, config
        if config.invariant:
            check_invariant(model.config)
            if ranks.is_divided(model):
                raise ValueError("a divided model's sums depend on the number of ranks: give one or ask no invariance")
        on_gpu = model.device.type == "cuda"
        if on_gpu:
            model.join_weights()
        max_len = min(config.max_len or model.config.context_length, model.config.context_length)
        step_tokens = config.max_step_tokens or max(config.max_seqs, 16384 if on_gpu else 512)
        self.vocab_size = model.config.vocab_size
        self.speculates = draft is not None or config.speculation is not None or config.exit_layer is not None
        if draft is not None:
            if config.speculation is not None or config.exit_layer is not None:
                raise ValueError("there is a draft model, and drafts of another kind are asked for: take one of them")
            check_draft(model, draft, max_len, tokenizer)
            self.vocab_size = min(self.vocab_size, draft.config.vocab_size)
        rollback = config.draft_tokens if self.speculates else 0
        captured = (
            most_captured(model.config, step_tokens) if on_gpu and config.cuda_graphs else 0
        )  # which keep memory of their own
        samples = [
            m.new_pages(1, config.page_size, 1, max_len, rollback=rollback) for m in (model, draft) if m is not None
        ]
        page_bytes, is_paged = sum(s.page_bytes for s in samples), all(s.is_paged for s in samples)
        self.memory: EngineMemory = plan_memory(
            model.config,
            width=model.compute_dtype.itemsize,
            page_bytes=page_bytes,
            slot_bytes=sum(s.nbytes for s in samples) - page_bytes,
            page_size=config.page_size,
            max_seqs=config.max_seqs,
            max_step_tokens=step_tokens + captured,
            max_len=max_len,
            shorten=config.max_len is None and is_paged,
            free=ranks.least(free_memory(model.device, config.memory_share), model),
            num_pages=config.num_pages,
        )
        self.max_len = self.memory.max_len
        self.ends = model.end_ids if tokenizer is None else tuple(ends_of(model, tokenizer))
        remembering = config.prefix_cache and is_paged  # what a recurrence has come to is in no page
        self.cache = PageCache(self.memory.num_pages, config.page_size, remembering=remembering)
        self.runner = self._runner(
            model, self._state(model, rollback), step_tokens, drafts=rollback, invariant=config.invariant
        )
        captures = self.runner.captures and not self.speculates  # steps that verify drafts of many are none
        together = max(1, config.max_seqs // TOGETHER) if captures else 1
        self.scheduler = Scheduler(self.cache, max_seqs=config.max_seqs, max_step_tokens=step_tokens, together=together)
        self.drafter: Drafter | None = None
        if draft is not None:
            self.drafter = Drafter(self._runner(draft, self._state(draft, rollback), step_tokens), shares=False)
        elif config.exit_layer is not None:
            draft = early_exit(model, config.exit_layer)
            state = first_layers(self.runner.state, config.exit_layer)
            self.drafter = Drafter(self._runner(draft, state, step_tokens), shares=True)
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self.stats = Stats()
        self._lag = int(on_gpu if config.overlap is None else config.overlap)
        self._in_flight: deque[Launched] = deque()
        share = 0.0 if draft is None else draft.config.num_parameters() / model.config.num_parameters()
        self._times = StepTimes(COST + share)
        self._measures = not ranks.is_divided(model)  # ranks take the same steps, and see other times
        self._numbers = itertools.count()
        self._seeds = ranks.generator_of_seeds(model)
        begin = time.perf_counter()
        runners = [self.runner] if self.drafter is None else [self.runner, self.drafter.runner]
        graphs, steps = (sum(r.capture() for r in runners), sum(r.warm_up(config.page_size) for r in runners))
        self.warm_up = WarmUp(graphs, steps, time.perf_counter() - begin)

    def _state(self, model: Transformer, rollback: int) -> PagedState:
        config = self.config
        return model.new_pages(
            self.memory.num_pages, config.page_size, config.max_seqs + 1, self.max_len, rollback=rollback
        )

    def _runner(
        self, model: Transformer, state: PagedState, step_tokens: int, *, drafts: int = 0, invariant: bool = False
    ) -> Runner:
        config = self.config
        return Runner(
            model,
            state,
            max_seqs=config.max_seqs,
            max_step_tokens=step_tokens,
            most_pages=-(-self.max_len // config.page_size),
            unused=() if self.tokenizer is None else tuple(unused_ids(model, self.tokenizer)),
            graphs=graph_sizes(config.max_seqs) if config.cuda_graphs else (),
            drafts=drafts,
            invariant=invariant,
        )

    # ---- requests ----

    def add(
        self,
        prompt_token_ids: Rows[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        score_from: int = 1,
    ) -> Request:
        """A new request, the last in the queue.

        score_from: the first token whose log-probability params.prompt_logprobs asks for; those before may be cached.

        Raises ValueError for an empty prompt or one that leaves no room, ids that the model does not have, a grammar
        that is none, and stop strings or a grammar without a tokenizer.
        """
        ids = list(prompt_token_ids)
        self.validate(ids, params)
        ends = params.ends(self.ends)
        guide = self._grammars.guide(params, ends)
        request = Request(next(self._numbers), prompt, ids, params)
        for index in range(params.n):
            scored = params.prompt_logprobs is not None and index == 0
            sample = Sample(
                token_ids=list(ids),
                limit=min(params.max_tokens, self.max_len - len(ids)),
                params=params,
                seed=self._seed(params, index),
                ends=ends,
                guide=guide if guide is None or index == 0 else guide.copy(),
                score_from=max(1, score_from) if scored else None,
                request=request,
                index=index,
                speculator=Speculator(self.config.draft_tokens) if self.speculates else None,
                stream=None if self.tokenizer is None else text_stream(self.tokenizer, params.stop, ids),
            )
            request.samples.append(sample)
            self.scheduler.add(sample)
        return request

    def cancel(self, request: Request) -> None:
        """End what has not ended of a request; its pages are given back at once."""
        for sample in request.samples:
            if not sample.finished:
                self._finish(sample, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether there is anything to step for."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._in_flight)

    def step(self) -> list[Update]:
        """Start the next step, and tell what the one before drew; without a lag, what this one did."""
        begin, alone = time.perf_counter(), not self._in_flight
        self._draft()
        step = self.scheduler.schedule()
        if step is not None:
            self._in_flight.append(self.runner.launch(step))
            if self.drafter is not None:
                self.drafter.follow(step)
            self.scheduler.launched()
            self.stats.steps += 1
            self.stats.prompt_tokens += sum(chunk.count for chunk in step.chunks if not chunk.drafts)
        updates: list[Update] = []
        if self._in_flight and step is None:
            updates += self._take(self._in_flight.popleft())
        while len(self._in_flight) > self._lag:
            updates += self._take(self._in_flight.popleft())
        verifies = step is not None and any(chunk.drafts for chunk in step.chunks)
        while self._in_flight and (verifies or self._drafts_next()):  # drafts follow tokens that the host has seen
            updates += self._take(self._in_flight.popleft())
        # Measured is a step by itself, and what one takes while the next is laid out.
        if self._measures and step and alone != bool(self._in_flight) and all(chunk.drafts for chunk in step.chunks):
            self._times.add(verifies, time.perf_counter() - begin, len(step.sequences))
        return updates

    def _draft(self) -> None:
        """Have the next step verify what may come next of the sequences that speculate."""
        if self._in_flight:
            return
        samples, wanted = self._speculating(), []
        if self.drafter is not None and self._measures and not self._times.knows_plain(len(self.scheduler.running)):
            return  # what drafts cost is known beside steps without them
        spare = self.scheduler.max_step_tokens - len(self.scheduler.running)
        for sample in samples:
            assert sample.speculator is not None
            assert not sample.pending
            if self.drafter is None:
                sample.drafts = sample.speculator.draft(sample.token_ids)
            elif room := self.scheduler.room(sample, min(sample.speculator.length, spare)):
                wanted.append((sample, room))
                spare -= room
        if self.drafter is not None and wanted:
            for (sample, _), drafts in zip(wanted, self.drafter.draft(wanted), strict=True):
                sample.drafts = drafts

    def update_weights(self, weights: "Transformer | Mapping[str, Tensor]") -> None:
        """Go on with other weights: a module's, whose tensors are the engine's from now on, or values by their names,
        which are copied. Nothing that was computed with the old ones is used again: requests that run begin anew with
        the tokens that they have.

        Raises ValueError for weights that are not those of the engine's model.
        """
        own, module = dict(self.model.named_parameters()), weights if isinstance(weights, Transformer) else None
        new = dict(weights.named_parameters() if isinstance(weights, Transformer) else weights)
        for name in own.keys() | new.keys():
            if name not in own or name not in new or own[name].shape != new[name].shape:
                shapes = [tuple(x[name].shape) if name in x else "none" for x in (own, new)]
                raise ValueError(f"{name} is {shapes[0]} in the engine's model and {shapes[1]} in the new weights")
            kinds = [(x[name].dtype, x[name].device) for x in (own, new)]
            if module is not None and kinds[0] != kinds[1]:
                raise ValueError(
                    f"{name} is {kinds[0][0]} on {kinds[0][1]} in the engine's model, {kinds[1][0]} on {kinds[1][1]} "
                    "in the module: give its state_dict(), which is copied"
                )
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # the old ones may be in use
        self.scheduler.forget()
        if module is None:
            with torch.no_grad():
                for name, tensor in new.items():
                    own[name].copy_(tensor)
        moved = any(own[name].data_ptr() != tensor.data_ptr() for name, tensor in new.items())
        if module is not None and moved:
            self.model.load_state_dict(module.state_dict(), assign=True)
        self.runner.state.renew()
        if (module is not None and moved) or not self.runner.state.is_paged:
            self.runner.drop_graphs()
            if self.drafter is not None and self.drafter.shares:
                self.drafter.runner.drop_graphs()

    def check(self) -> None:
        """Raises AssertionError where a page is held by no sequence, or is free and held."""
        self.cache.check([sequence.pages for sequence in self.scheduler.running])

    def _seed(self, params: SamplingParams, index: int) -> int:
        """Of a sample: without one in params a new one, but for greedy decoding, which needs none."""
        if params.seed is not None:
            return (params.seed + index) % 2**63
        return int(torch.randint(2**63 - 1, (), generator=self._seeds)) if params.temperature else 0

    # ---- what was drawn ----

    def _take(self, launched: Launched) -> list[Update]:
        launched.wait()
        for scores in launched.scores:
            for (sample, i), token in zip(scores.places, _tokens(scores.drawn), strict=True):
                assert isinstance(sample, Sample)
                if token.top:  # as many as the request of the step that wants most
                    token = token._replace(top=token.top[: sample.params.prompt_logprobs or 0])
                sample.request.prompt_tokens[i] = token
        updates, drawn = [], _tokens(launched.drawn)
        for sample, drafts in zip(launched.sequences, launched.drafts, strict=True):
            assert isinstance(sample, Sample)
            tokens = [next(drawn)]
            if drafts:
                tokens += itertools.islice(drawn, len(drafts))
                if not sample.finished:
                    tokens = self._verify(sample, drafts, tokens)
            for token in tokens:
                if not sample.finished:
                    updates.append(self._advance(sample, token))
        return updates

    def _speculating(self) -> list[Sample]:
        """Those that run and may have drafts in the next step."""
        if not self.speculates:
            return []
        samples = (s for s in self.scheduler.running if isinstance(s, Sample))
        found = [s for s in samples if s.decoding and s.speculates and not s.exhausted]
        if self.drafter is not None:
            found = [s for s in found if s.speculator is not None and s.speculator.pays]
        return found

    def _drafts_next(self) -> bool:
        """Whether to wait for the newest tokens: there will be drafts of what follows them, as far as can be seen."""
        samples = self._speculating()
        if self.drafter is not None:
            return bool(samples)
        return any(s.speculator is not None and s.speculator.draft(s.token_ids) for s in samples)

    def _verify(self, sample: Sample, drafts: Rows[int], tokens: list[Token]) -> list[Token]:
        """Of what was drawn in the places of drafts and behind them, what holds."""
        assert sample.speculator is not None
        accepted = 0
        while accepted < len(drafts) and tokens[accepted].id == drafts[accepted]:
            accepted += 1
        for i in range(len(drafts)):
            self.stats.drafted[i] += 1
            self.stats.accepted[i] += i < accepted
        sample.speculator.learn(accepted, self._times.cost(len(drafts), len(self.scheduler.running)))
        self.scheduler.reject(sample, len(drafts) - accepted)
        return tokens[: accepted + 1]

    def _advance(self, sample: Sample, token: Token) -> Update:
        self.scheduler.append(sample, token.id)
        self.stats.sampled_tokens += 1
        if token.top:  # as many as the request of the step that wants most
            token = token._replace(top=token.top[: sample.params.logprobs or 0])
        if sample.params.logprobs:
            sample.tops.append(token.top)
        text, reason, shown = "", None, None
        if math.isnan(token.logprob):
            sample.request.error, reason = NOT_FINITE, "error"
        elif token.id in sample.ends:
            sample.end, reason = token, "stop"
        else:
            sample.logprobs.append(token.logprob)
            shown = token
            text = "" if sample.stream is None else sample.stream.push(token.id)
            if sample.stream is not None and sample.stream.stopped:
                reason = "stop"
            elif sample.guide is not None:
                reason = self._follow(sample.guide, sample.request, token.id)
            if reason is None and len(sample.logprobs) >= sample.limit:
                reason = "length"
        if reason is not None:
            text += self._finish(sample, reason)
        if text:
            sample.pieces.append(text)
        return Update(sample, text, shown, reason)

    def _follow(self, guide: Guide, request: Request, token_id: int) -> str | None:
        """Why the text of a grammar ends behind this token, if it does."""
        try:
            guide.advance(token_id)
        except ValueError as error:
            request.error = str(error)
            return "error"
        return "stop" if guide.ended else None

    def _finish(self, sample: Sample, reason: str) -> str:
        """What its text stream held back."""
        self.scheduler.finish(sample)
        sample.finish_reason = reason
        self.stats.finished += 1
        self.stats.cached_tokens += sample.cached
        return "" if sample.stream is None else sample.stream.close()

    def validate(self, ids: Rows[int], params: SamplingParams) -> None:
        """Raises ValueError as `add` does; from any thread."""
        vocab_size = self.vocab_size
        if not ids:
            raise ValueError("the prompt is empty: give it at least one token")
        if strange := [token for token in ids if type(token) is not int and not isinstance(token, Integral)]:
            raise ValueError(f"a prompt's tokens are integers, got {strange[0]!r}")
        named = [*ids, *params.stop_token_ids, *(token for token, _ in params.biases)]
        if not 0 <= min(named) <= max(named) < vocab_size:
            bad = min(named) if min(named) < 0 else max(named)
            raise ValueError(f"there is no token {bad}: the model's are 0 to {vocab_size - 1}")
        if len(ids) >= self.max_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, which leaves no room in a sequence of {self.max_len}: shorten it"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: give stop_token_ids")
        self._grammars.guide(params)


def _tokens(drawn: ops.Sampled) -> Iterator[Token]:
    ids, logprobs = drawn.token_ids.tolist(), drawn.logprobs.tolist()
    if not drawn.top_token_ids.shape[1]:
        return map(Token, ids, logprobs)
    tops = zip(drawn.top_token_ids.tolist(), drawn.top_logprobs.tolist(), strict=True)
    return map(Token, ids, logprobs, (tuple(zip(*top, strict=True)) for top in tops))
