"""The ledger: a run is claimed once, whoever asks, and nobody's death loses it."""

import multiprocessing
import os
import signal
import sqlite3
import time

import pytest
from experiments.tiny_study import study

from cs336.experiments import Cost, Ledger
from cs336.experiments.ledger import owner

LRS = {"optimizer.lr": [1e-3, 2e-3, 3e-3, 4e-3]}
NOTHING = Cost(0, 0, 0)


def ledger(tmp_path, budget=None, vary=LRS, **keys):
    found = Ledger(tmp_path / "study", budget)
    trials = study(tmp_path, vary=vary, **keys).trials()
    found.want(trials)
    return found, trials


def states(found):
    return [entry.state for entry in found.entries()]


def test_a_run_from_claim_to_end(tmp_path):
    found, trials = ledger(tmp_path)
    claim = found.claim()
    assert (claim.entry.id, claim.entry.state, claim.entry.owner) == (trials[0].id, "running", owner())
    assert claim.entry.config == trials[0].table
    assert states(found) == ["running", "waiting", "waiting", "waiting"]
    second = found.claim()
    assert second.entry.id == trials[1].id
    found.finish(claim, {"val/loss": 3.5}, Cost(10, 20, 30))
    found.fail(second, "ValueError: no", Cost(1, 2, 3))
    done, failed, *_ = found.entries()
    assert (done.state, done.spent, done.score("val/loss"), done.owner) == ("done", Cost(10, 20, 30), 3.5, None)
    assert (failed.state, failed.error, failed.score("val/loss")) == ("failed", "ValueError: no", float("inf"))
    assert found.spent() == Cost(11, 22, 33)
    third = found.claim()
    found.stop(third, Cost(5, 5, 5))
    assert states(found) == ["done", "failed", "waiting", "waiting"]
    assert found.claim().entry.attempts == 2


def test_what_is_there_is_not_trained_again(tmp_path):
    found, _ = ledger(tmp_path)
    found.finish(found.claim(), {"val/loss": 1}, NOTHING)
    found.want(study(tmp_path, vary={"optimizer.lr": [3e-3, 9e-3, 1e-3]}).trials())
    entries = found.entries(wanted=True)
    assert [(e.options["optimizer.lr"], e.state) for e in entries] == [
        (1e-3, "done"), (3e-3, "waiting"), (9e-3, "waiting"),
    ]  # fmt: skip
    assert len(found.entries()) == 5
    assert [found.claim().entry.options["optimizer.lr"] for _ in range(2)] == [3e-3, 9e-3]
    assert found.claim() is None
    found.want(study(tmp_path, vary=LRS, changes={"micro_batch_size": 1}).trials())
    configs = {e.options["optimizer.lr"]: e.config.get("micro_batch_size") for e in found.entries()}
    assert configs == {1e-3: None, 2e-3: 1, 3e-3: None, 4e-3: 1, 9e-3: None}


def test_failed_runs_are_tried_again_only_when_asked(tmp_path):
    found, _ = ledger(tmp_path)
    found.fail(found.claim(), "no", NOTHING)
    assert found.claim().entry.number == 2
    assert found.retry() == 1
    assert found.claim().entry.number == 1


@pytest.mark.parametrize("kind", ["flops", "tokens", "seconds"])
def test_the_budget_is_never_exceeded(tmp_path, kind):
    """Runs of equal cost: two fit, whether they are done, failed, or go on."""
    seconds = {"changes": {"budget": "10s"}} if kind == "seconds" else {}
    unit = {"flops": "flops", "tokens": "tok", "seconds": "s"}[kind]
    each = getattr(study(tmp_path, **seconds).trials()[0].planned, kind)
    found, _ = ledger(tmp_path, f"{2.9 * each:.12g}{unit}", **seconds)
    one, two = found.claim(), found.claim()
    assert found.claim() is None
    found.finish(one, {}, Cost(*[each] * 3))
    assert found.claim() is None
    found.fail(two, "early", Cost(*[each / 4] * 3))  # what it had reserved and not used is there again
    three = found.claim()
    assert three is not None
    assert found.claim() is None
    found.finish(three, {}, Cost(*[each] * 3))
    assert found.claim() is None


def test_a_budget_takes_all_that_fit_exactly(tmp_path):
    each = study(tmp_path).trials()[0].planned.flops
    found, _ = ledger(tmp_path, f"{4 * each:.12g}flops")
    assert all(found.claim() for _ in range(4))


def test_a_run_that_goes_on_is_not_charged_twice(tmp_path):
    each = study(tmp_path).trials()[0].planned.flops
    found, _ = ledger(tmp_path, f"{each:.12g}flops")
    found.stop(found.claim(), Cost(each * 0.9, 1, 1))
    claim = found.claim()
    assert claim.entry.number == 1
    found.finish(claim, {}, Cost(each, 2, 2))
    assert found.spent() == Cost(each, 2, 2)
    assert found.claim() is None


def test_seconds_are_expected_at_the_pace_of_what_has_ended(tmp_path):
    found, trials = ledger(tmp_path, "100s")
    found.finish(found.claim(), {}, Cost(trials[0].planned.flops, trials[0].planned.tokens, 60))
    assert found.claim() is None  # another 60 s
    assert Ledger(tmp_path / "study", "130s").claim() is not None


def test_a_rung_is_charged_what_it_added(tmp_path):
    halving = {"kind": "halving", "rungs": 2, "eta": 2}
    found, trials = ledger(tmp_path, vary={"optimizer.lr": [1e-3, 2e-3]}, search=halving)
    of = study(tmp_path, vary={"optimizer.lr": [1e-3, 2e-3]}, search=halving)
    for _ in trials:
        found.finish(found.claim(), {"val/loss": 1}, Cost(10, 10, 10))
    more = of.trials(found.entries())
    assert len(more) == 3
    found.want(more)
    found.finish(found.claim(), {"val/loss": 1}, Cost(25, 30, 35))
    assert found.entries()[2].spent == Cost(15, 20, 25)


def _claim(directory, barrier, queue):
    barrier.wait()
    mine = []
    found = Ledger(directory)
    while claim := found.claim():
        mine.append(claim.entry.id)
        found.finish(claim, {}, Cost(1, 1, 1))
    queue.put(mine)


def test_no_run_is_claimed_twice(tmp_path):
    """Processes that begin at once, even with the file."""
    context = multiprocessing.get_context("fork")
    found, trials = ledger(tmp_path, vary={"batch_size": list(range(1, 31))})
    barrier, queue = context.Barrier(5), context.Queue()
    workers = [context.Process(target=_claim, args=(tmp_path / "study", barrier, queue)) for _ in range(5)]
    for worker in workers:
        worker.start()
    claimed = [id for _ in workers for id in queue.get(timeout=60)]
    for worker in workers:
        worker.join()
    assert sorted(claimed) == sorted(t.id for t in trials)
    assert found.spent() == Cost(30, 30, 30)


def _create(directory, barrier):
    barrier.wait()
    for _ in range(5):
        Ledger(directory).entries()


def test_a_ledger_is_made_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    (tmp_path / "new").mkdir()
    workers = [context.Process(target=_create, args=(tmp_path / "new", barrier)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8


def _claim_and_hang(directory, queue):
    claim = Ledger(directory).claim()
    queue.put(claim.entry.id)
    time.sleep(600)


def killed_owner(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_claim_and_hang, args=(tmp_path / "study", queue))
    worker.start()
    id = queue.get(timeout=60)
    return worker, id


def test_a_dead_owner_is_found_and_a_living_one_left(tmp_path):
    found, trials = ledger(tmp_path)
    worker, id = killed_owner(tmp_path)
    own = found.claim()
    assert found.recover(lambda folder: NOTHING) == []
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert found.recover(lambda folder: NOTHING, of=owner()) == []
    assert found.recover(lambda folder: NOTHING, spare={owner(worker.pid)}) == []
    (lost,) = found.recover(lambda folder: Cost(7, 8, 9) if folder == trials[0].folder else NOTHING)
    assert (lost.id, lost.owner) == (id, owner(worker.pid))
    assert states(found)[:2] == ["waiting", "running"]
    assert found.spent() == Cost(7, 8, 9)
    assert found.recover(lambda folder: NOTHING) == []
    found.finish(own, {}, NOTHING)


def test_a_run_that_kills_its_processes_is_given_up(tmp_path):
    found, _ = ledger(tmp_path, vary={"optimizer.lr": [1e-3]})
    for _ in range(3):
        assert states(found) == ["waiting"]
        claim = found.claim()
        claim.release()  # as its death would
        found.recover(lambda folder: NOTHING)
    (entry,) = found.entries()
    assert (entry.state, entry.error) == ("failed", "its process died 3 times")


def test_a_death_whose_cause_is_known_fails_at_once(tmp_path):
    found, _ = ledger(tmp_path)
    found.claim().release()
    found.recover(lambda folder: NOTHING, of=owner(), error="killed")
    assert found.entries()[0].error == "killed"


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "ledger.sqlite").write_text("something else entirely, and long enough to be looked at" * 50)
    with pytest.raises(ValueError, match="is not a ledger"):
        Ledger(tmp_path / "a")
    found, _ = ledger(tmp_path)
    with sqlite3.connect(found.path) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(ValueError, match="format 9, expected 1"):
        Ledger(tmp_path / "study")


def test_who_looks_waits_for_nobody(tmp_path):
    found, _ = ledger(tmp_path)
    before = found.entries()
    with found.transaction() as db:  # of a process that takes its time
        db.execute("UPDATE runs SET state = 'failed'")
        assert found.entries() == before
        assert found.spent() == Cost(0, 0, 0)
        assert found.affords(before[0])
    assert {entry.state for entry in found.entries()} == {"failed"}
