"""Which tokens the next step computes: continuous batching, chunked prefill, prefix hits, preemption by recomputation.

A sequence waits, runs, and leaves. A step computes one token of each sequence that decodes, and chunks of the prompts
of others, as far as its budget of tokens reaches: first of those that have begun, then of those that wait, in order.
Pages for a whole prompt are taken when it is admitted; a decoding sequence takes one when it needs it. Where there is
none, the sequence admitted last gives up its pages and waits again, to compute its tokens anew.

The scheduler knows how many tokens a sequence has, not which: a step may be laid out while the one before still runs.
"""

import math
from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

from cs336.inference.grammar import Guide
from cs336.inference.pages import Node, PageCache
from cs336.inference.sampling import SamplingParams


@dataclass(eq=False)
class Sequence:
    """One continuation of a prompt, as the scheduler sees it."""

    token_ids: list[int]
    """Prompt and what was sampled, as far as the host has seen it."""
    limit: int
    """New tokens, at most."""
    params: SamplingParams
    seed: int = 0
    ends: tuple[int, ...] = ()
    """Tokens that end it."""
    score_from: int | None = None
    """The first token of the prompt whose log-probability is asked for."""
    num_prompt: int = field(init=False)
    sampled: int = 0
    """Tokens drawn by the steps laid out so far, if not seen."""
    controlled: float = field(init=False)
    """As long as no more are sampled, this one counted, something changes its logits: see controls.py."""
    computed: int = 0
    """Tokens whose state is in the pages, once the steps laid out so far have run."""
    cached: int = 0
    """Of these, found in the cache when it was admitted first."""
    slot: int | None = None
    """Its row on the device while it runs."""
    pages: list[int] = field(default_factory=list)
    told: int = 0
    """Pages that the device has in this sequence's row."""
    known: int = 0
    """Pages that are in the prefix tree."""
    node: Node | None = None
    """Of the last of these."""
    decoding: bool = False
    """Its newest token is on the device, in its slot."""
    drafts: Rows[int] = ()
    """Tokens that may come next, for the next step to verify."""
    corrected: bool = False
    """The device does not know which of the drafts were right: its newest token is what the host has."""
    guide: Guide | None = None
    """Where it stands in its grammar, as far as the host has seen it."""
    finished: bool = False
    preemptions: int = 0

    def __post_init__(self):
        self.num_prompt = len(self.token_ids)
        changed = self.params.penalised or self.params.logit_bias or self.guide is not None
        self.controlled = math.inf if changed else self.params.min_tokens

    @property
    def pending(self) -> int:
        """Tokens sampled that the host has not seen yet."""
        return self.num_prompt + self.sampled - len(self.token_ids)

    @property
    def exhausted(self) -> bool:
        """All of its tokens are sampled, if not seen."""
        return self.sampled >= self.limit


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + count) of a sequence, of which the last may be drafts; samples: the token after them is
    drawn, and those in the places of the drafts."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    drafts: Rows[int] = ()

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.token_ids[self.start : self.start + self.count], *self.drafts]


@dataclass(frozen=True)
class Step:
    decodes: list[Sequence]
    chunks: list[Chunk]
    """Those that begin a sequence last."""
    copies: list[tuple[int, int]]
    """Pages (from, to) to copy before."""

    @property
    def sequences(self) -> list[Sequence]:
        return self.decodes + [chunk.sequence for chunk in self.chunks]

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """max_seqs: that run at once. max_step_tokens: the budget of a step, at least max_seqs.

    together: where more wait than there are slots, so many slots become free before one is given away, but none is kept
    free for more than as many steps. A step that reads prompts costs a few of those that do not.
    """

    def __init__(self, cache: PageCache, *, max_seqs: int, max_step_tokens: int, together: int = 1):
        self.cache, self.max_step_tokens, self.together = cache, max_step_tokens, together
        self._kept = 0  # steps with a slot free that was wanted
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._slots = list(range(max_seqs - 1, -1, -1))
        self._step = 0
        self._borrowed: list[int] = []  # pages that the step laid out last copies from

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Step | None:
        """The next step; None where nothing can be computed before the host has seen more tokens."""
        self._step += 1
        decodes, chunks = self._decodes()
        budget = self.max_step_tokens - len(decodes) - sum(chunk.count for chunk in chunks)
        copies: list[tuple[int, int]] = []
        for sequence in self.running:
            if not sequence.decoding and not sequence.exhausted and budget > 0:
                budget -= self._chunk(sequence, budget, chunks)
        admits = self._admits(any(not chunk.drafts for chunk in chunks))
        while admits and self.waiting and self._slots and budget > 0:
            sequence = self.waiting[0]
            if sequence.pending or not self._admit(sequence, copies):
                break
            self.waiting.popleft()
            self._kept = 0
            budget -= self._chunk(sequence, budget, chunks)
        chunks.sort(key=lambda chunk: chunk.start == 0)
        return Step(decodes, chunks, copies) if decodes or chunks else None

    def _admits(self, reads: bool) -> bool:
        """Whether those that wait are looked at: at once where all fit, or where the step reads prompts anyway."""
        free = len(self._slots)
        if reads or free >= min(self.together, len(self.waiting)) or not self.running or self._kept >= self.together:
            return True
        self._kept += free > 0
        return False

    def launched(self) -> None:
        """The step laid out last is on its way: what later ones write is written after it."""
        self.cache.release(self._borrowed)
        self._borrowed = []

    def forget(self) -> None:
        """What was computed holds no more: all that run begin anew, and no page is known."""
        for sequence in reversed(list(self.running)):
            self.preempt(sequence)
        self.cache.forget()

    def append(self, sequence: Sequence, token_id: int) -> None:
        """The host sees the oldest pending token."""
        token_ids = sequence.token_ids
        token_ids.append(token_id)
        if sequence.slot is not None and len(token_ids) >= (sequence.known + 1) * self.cache.page_size:
            self._remember(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The sequence leaves, wherever it is; its pages are given back."""
        assert not sequence.finished
        sequence.finished = True
        if sequence.slot is not None:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """A running sequence waits again, before the others; it will compute its tokens anew."""
        self._leave(sequence)
        sequence.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def reject(self, sequence: Sequence, count: int) -> None:
        """The last `count` of the drafts that were just verified were wrong: their places are free again."""
        sequence.sampled -= count
        sequence.computed -= count
        sequence.corrected = True

    def _decodes(self) -> tuple[list[Sequence], list[Chunk]]:
        """The sequences that go on by one token, and those that verify drafts."""
        decodes: list[Sequence] = []
        verified: list[Chunk] = []
        size, spare = self.cache.page_size, self.max_step_tokens - len(self.running)
        for sequence in list(self.running):
            if not sequence.decoding or sequence.sampled >= sequence.limit:  # one that was preempted decodes no more
                continue
            if sequence.guide is not None and sequence.pending:  # what may come next is not known yet
                continue
            if sequence.computed < len(sequence.pages) * size or self._finds_room(sequence):
                drafts = self._fitting(sequence, spare) if sequence.drafts else ()
                if drafts:
                    spare -= len(drafts)
                    verified.append(Chunk(sequence, sequence.computed, 1 + len(drafts), True, drafts))
                else:
                    decodes.append(sequence)
                sequence.computed += 1 + len(drafts)
                sequence.sampled += 1 + len(drafts)
        return decodes, verified

    def room(self, sequence: Sequence, most: int) -> int:
        """For how many drafts behind the next token there are pages, which are taken, without another's leaving."""
        most = max(0, min(most, sequence.limit - sequence.sampled - 1))
        size, end = self.cache.page_size, sequence.computed + 1
        missing = -(-(end + most) // size) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self.cache.take(missing) or []
        return max(0, min(most, len(sequence.pages) * size - end))

    def _fitting(self, sequence: Sequence, most: int) -> Rows[int]:
        """Its drafts, as far as there is room for them."""
        drafts, sequence.drafts = sequence.drafts, ()
        return drafts[: self.room(sequence, min(most, len(drafts)))]

    def _finds_room(self, sequence: Sequence) -> bool:
        """Whether there is a page for its next token, for which those after it may have to leave, or itself."""
        while (page := self.cache.take(1)) is None:
            last = next(other for other in reversed(self.running) if not other.exhausted)
            self.preempt(last)
            if last is sequence:
                return False
        sequence.pages += page
        return True

    def _admit(self, sequence: Sequence, copies: list[tuple[int, int]]) -> bool:
        cache, total = self.cache, len(sequence.token_ids)
        most = total - 1  # one is computed, for the next to be drawn
        if sequence.score_from is not None:
            most = min(most, sequence.score_from - 1)
        match = cache.match(sequence.token_ids, most, self._step)
        missing = -(-total // cache.page_size) - len(match.pages)
        wanted = missing + len(self.running)  # each that runs soon wants one
        if match.copy is not None and cache.available < wanted:  # it is held beside those that are wanted
            cache.release([match.copy])
            match = replace(match, tokens=len(match.pages) * cache.page_size, copy=None)
        if cache.available < wanted:
            cache.release(match.pages)
            return False
        taken = cache.take(missing)
        assert taken is not None
        sequence.pages = match.pages + taken
        if match.copy is not None:
            # An earlier one's target may be free again: its prompt was another's.
            copies[:] = [copy for copy in copies if copy[1] != taken[0]]
            copies.append((match.copy, taken[0]))
            self._borrowed.append(match.copy)
        sequence.told, sequence.node, sequence.known = 0, match.node, len(match.pages)
        sequence.computed = match.tokens
        if not sequence.preemptions:
            sequence.cached = match.tokens
        sequence.slot = self._slots.pop()
        self.running.append(sequence)
        return True

    def _chunk(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        start = sequence.computed
        count = min(budget, len(sequence.token_ids) - start)
        sequence.computed += count
        last = sequence.computed == len(sequence.token_ids)
        chunks.append(Chunk(sequence, start, count, last))
        if last:
            sequence.decoding = True
            sequence.sampled += 1
        self._remember(sequence)
        return count

    def _remember(self, sequence: Sequence) -> None:
        """Tell the tree of pages that are complete, or will be once the steps laid out so far have run."""
        size = self.cache.page_size
        if not self.cache.remembering:
            return
        while (end := (sequence.known + 1) * size) <= min(sequence.computed, len(sequence.token_ids)):
            i, tokens = sequence.known, tuple(sequence.token_ids[end - size : end])
            assert sequence.node is not None
            node = self.cache.remember(sequence.node, tokens, sequence.pages[i], self._step)
            if node.page != sequence.pages[i]:
                sequence.pages[i] = node.page
                sequence.told = min(sequence.told, i)
            sequence.node, sequence.known = node, i + 1

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        self.cache.release(sequence.pages)
        sequence.slot, sequence.pages, sequence.node = None, [], None
        sequence.computed = sequence.known = sequence.told = 0
        sequence.decoding, sequence.drafts = False, ()
