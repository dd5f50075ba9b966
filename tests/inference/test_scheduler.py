"""When those that wait are given slots: many at once where steps that only decode are cheaper than others."""

import pytest

from cs336.inference.pages import PageCache
from cs336.inference.sampling import SamplingParams
from cs336.inference.scheduler import Scheduler, Sequence

PROMPT = list(range(5))


def scheduler(max_seqs, together, num_pages=1000):
    return Scheduler(
        PageCache(num_pages, 4, remembering=False), max_seqs=max_seqs, max_step_tokens=200, together=together
    )


def add(s, limits):
    sequences = [Sequence(list(PROMPT), limit, SamplingParams()) for limit in limits]
    for sequence in sequences:
        s.add(sequence)
    return sequences


def advance(s):
    """A step, with what it draws: how many prompts it reads, and how many sequences decode."""
    step = s.schedule()
    s.launched()
    for sequence in step.sequences:
        s.append(sequence, 0)
        if sequence.exhausted:
            s.finish(sequence)
    return len(step.chunks), len(step.decodes)


def run(s):
    steps = []
    while s.running or s.waiting:
        steps.append(advance(s))
    return steps


def test_a_page_is_copied_to_once_in_a_step():
    """Copies are made at once, in any order. The page that a prompt begins in is another's when the prompt turns out to
    be one that is known, and then free for the next."""
    s = Scheduler(PageCache(1000, 4), max_seqs=4, max_step_tokens=200)
    known = [*range(8)]
    for tokens in ([known], [known, known, [*range(7), 9]]):
        for ids in tokens:
            s.add(Sequence(list(ids), 1, SamplingParams()))
        step = s.schedule()
        s.launched()
        for sequence in step.sequences:
            s.append(sequence, 0)
            s.finish(sequence)
    assert len(step.copies) == len({target for _, target in step.copies}) > 0


@pytest.mark.parametrize("together", [1, 4])
def test_more_requests_than_slots(together):
    """One of 32 ends in each step: 32 slots, and answers of 1 to 32 tokens, then of 32."""
    s = scheduler(32, together)
    add(s, [*range(1, 33), *[32] * 200])
    steps = run(s)
    assert sum(read for read, _ in steps) == 232
    reading, full = sum(read > 0 for read, _ in steps), -(-(33 * 16 + 32 * 200) // 32)
    if together == 1:
        assert len(steps) == pytest.approx(full, abs=16)
        assert reading > len(steps) - 32
    else:  # an eighth of the slots at once: a quarter of such steps, and 3 of 64 slots stand empty on average
        assert len(steps) < full * 1.15
        assert reading < len(steps) * 0.27
        assert {read for read, _ in steps[1:-32] if read} == {4}


def test_what_fits_is_not_kept_waiting():
    s = scheduler(8, 4)
    add(s, [50] * 6)
    assert advance(s) == (6, 0)
    add(s, [50])  # two slots are free, one is wanted
    assert advance(s) == (1, 6)
    add(s, [50])
    assert advance(s) == (1, 7)


def test_a_slot_is_kept_free_for_so_many_steps_at_most():
    s = scheduler(8, 4)
    add(s, [2, *[50] * 7])
    advance(s)
    add(s, [50] * 9)
    assert [advance(s) for _ in range(6)] == [(0, 8), (0, 7), (0, 7), (0, 7), (0, 7), (1, 7)]


def test_the_last_one_to_leave_lets_all_in():
    s = scheduler(8, 8)
    first = add(s, [50] * 8)
    advance(s)
    add(s, [50] * 20)
    for sequence in first[:7]:
        s.finish(sequence)
    assert advance(s) == (0, 1)
    s.finish(first[7])
    assert advance(s) == (8, 0)


def test_a_step_that_reads_anyway_takes_those_that_wait():
    s = scheduler(8, 4)
    add(s, [2, 50, 50, 50, 50, 50, 50])
    advance(s)
    long = Sequence(list(range(300)), 50, SamplingParams())
    s.add(long)  # of two chunks
    assert advance(s) == (1, 7)
    add(s, [50, 50])  # for the one slot that has become free
    assert advance(s) == (2, 6)


def test_once_a_slot_has_been_kept_each_step_looks_for_pages():
    s = scheduler(8, 4, num_pages=30)
    first = add(s, [2, *[50] * 7])  # of two pages each
    advance(s)
    s.add(Sequence(list(range(20)), 50, SamplingParams()))  # five pages, beside one for each that runs
    add(s, [50] * 4)
    assert [advance(s)[0] for _ in range(8)] == [0] * 8
    s.finish(first[1])
    s.finish(first[2])
    assert advance(s)[0] > 0


def test_more_together_than_there_are_slots():
    s = scheduler(2, 9)
    add(s, [3] * 12)
    assert advance(s) == (2, 0)
    assert sum(read for read, _ in run(s)) == 10
