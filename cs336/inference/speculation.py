"""Speculation: tokens that may come next are drafted, and one step finds out how many of them do.

A step computes the newest token of a sequence and its drafts in one pass, and draws a token in the place of each and
behind the last, by the counter (seed, offset) that this place has without speculation. What is drawn behind a draft
holds if the draft was what was drawn in its place; so the tokens up to the first difference are kept, that one too.
Every token is a draw from the model's own distribution. This is rejection sampling (arXiv:2211.17192, 2302.01318) for
drafts that are certain: draft d is kept with p(d), and in its place comes else a draw from p without d.

Drafts are looked up in the text so far (arXiv:2304.04487): what followed when its last tokens were there before. Or a
smaller model makes them: see drafting.py.
"""

import statistics
from collections import deque
from collections.abc import Sequence

MAX_DRAFT = 7  # ops.paged_attention takes 8 tokens of a sequence, the newest is one of them
NGRAMS = (4, 3, 2)  # tokens to look up, the longest first: one alone is followed by anything
COST = 0.15  # of a draft, in steps, until it is measured: 8 tokens took 1.7 to 2.1 times as long as one on a CPU
CREDIT = 2.0  # steps that a request may lose before it gives up
RECENT = 16  # steps whose times are known, a kind
ENOUGH = 4  # of them, to judge by
WATCHED = 4  # drafts that were not verified, and were all right: worth a try again


class PromptLookup:
    """What followed each n-gram of one text when it was there last."""

    def __init__(self):
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0  # tokens before this one have followed the n-grams that end before them

    def draft(self, token_ids: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that may follow; of a text that has only grown since the last call."""
        for end in range(max(1, self._known), len(token_ids)):
            for n in NGRAMS:
                if n <= end:
                    self._after[tuple(token_ids[end - n : end])] = end
        self._known = len(token_ids)
        for n in NGRAMS:
            if len(token_ids) > n and (at := self._after.get(tuple(token_ids[-n:]))) is not None:
                found = list(token_ids[at : at + most])
                while len(found) < most:  # it ends where the text does: go on as it repeats itself
                    found.append(found[len(found) - (len(token_ids) - at)])
                return found
        return []


class StepTimes:
    """Of an engine's last steps that made and verified drafts, and of those that only decoded, by how many sequences
    ran: 1, 2 and 3, 4 to 7, and so on.

    guess: what a draft costs, in steps that only decode, until that is known.
    """

    def __init__(self, guess: float = COST):
        self._guess = guess
        self._seconds: dict[tuple[bool, int], deque[float]] = {}

    def add(self, verifying: bool, seconds: float, running: int = 1) -> None:
        self._of(verifying, running).append(seconds)

    def cost(self, drafted: int, running: int = 1) -> float:
        """What a step takes longer for so many drafts of a sequence, in steps that only decode."""
        verifying, plain = self._of(True, running), self._of(False, running)
        if min(len(verifying), len(plain)) < ENOUGH:
            return self._guess * drafted
        return max(0.0, statistics.median(verifying) / statistics.median(plain) - 1)

    def knows_plain(self, running: int) -> bool:
        """Whether enough steps that only decode were measured."""
        return len(self._of(False, running)) >= ENOUGH

    def _of(self, verifying: bool, running: int) -> deque[float]:
        return self._seconds.setdefault((verifying, running.bit_length()), deque(maxlen=RECENT))


class Speculator:
    """The drafts of one request: fewer after drafts that were wrong, and none once they have cost more than they
    brought, CREDIT at most. Looked-up ones are watched then, and verified again where they have come true."""

    def __init__(self, most: int):
        self.most = self.length = most
        self.credit = CREDIT
        self._lookup = PromptLookup()
        self._watched: list[int] = []  # what would have been drafted, and where
        self._start = 0

    @property
    def pays(self) -> bool:
        return self.credit > 0

    def draft(self, token_ids: Sequence[int]) -> list[int]:
        """At most `length` tokens that may follow, of a text that has only grown since the last call."""
        if not self.pays:
            self._watch(token_ids)
        return self._lookup.draft(token_ids, self.length) if self.pays else []

    def learn(self, accepted: int, cost: float) -> None:
        """So many drafts were right, each of which saved a step; to verify them took so many steps longer."""
        self.length = min(self.most, 2 * accepted + 1)
        self.credit = min(CREDIT, self.credit + accepted - cost)

    def _watch(self, token_ids: Sequence[int]) -> None:
        seen = list(token_ids[self._start : self._start + WATCHED])
        if seen != self._watched[: len(seen)] or not self._watched:
            self._watched, self._start = self._lookup.draft(token_ids, WATCHED), len(token_ids)
        elif len(seen) == WATCHED:
            self._watched, self.credit = [], CREDIT / 2
