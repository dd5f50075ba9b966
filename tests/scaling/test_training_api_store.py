"""The ledger of the training API: money moves once, whoever dies, and a run is claimed by one process."""

import json
import multiprocessing
import os
import signal
import sqlite3
import threading

import pytest
from scaling.api_server import balances, until, user

from cs336.scaling.api import Simulator, Store
from cs336.scaling.api.jobs import FieldError, Job, Taken
from cs336.scaling.api.process import process_mark
from cs336.scaling.api.protocol import RunRequest
from cs336.scaling.api.store import DuplicateError, FullError, OverBudgetError

FORK = multiprocessing.get_context("fork")


def job(flops, seed=0):
    return Simulator().plan(RunRequest(parameters=1e6, tokens=flops / 6e6, seed=seed))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "api")


def test_money_from_grant_to_refund(store):
    ada = user(store, amount=1e15)
    store.submit(ada, job(4e14))
    assert balances(store) == {"ada": (4e14, 0, 6e14)}
    with pytest.raises(OverBudgetError, match=r"7e\+14 FLOPs, and 6e\+14 are left") as over:
        store.submit(ada, job(7e14))
    assert over.value.left == 6e14
    with pytest.raises(DuplicateError) as twin:
        store.submit(ada, job(4e14))
    claim = store.claim()
    assert twin.value.run == claim.entry.id
    assert store.claim() is None
    store.settle(claim, "waiting", Taken(1e14, 1, 1))  # stopped: all of it is still reserved
    assert balances(store) == {"ada": (4e14, 0, 6e14)}
    claim = store.claim()
    assert claim.entry.attempts == 2
    store.settle(claim, "done", Taken(3e14, 1, 1), loss=3.5)
    assert balances(store) == {"ada": (0, 3e14, 7e14)}
    entry = store.run("ada", claim.entry.id)
    assert (entry.state, entry.loss, entry.charged, entry.pid) == ("done", 3.5, 3e14, None)
    with pytest.raises(DuplicateError):
        store.submit(ada, job(4e14))


def test_a_run_never_costs_more_than_it_reserved(store):
    ada = user(store, amount=10, kind="seconds")
    store.submit(ada, job(4e14 * 2.5))
    store.settle(store.claim(), "failed", Taken(seconds=99), error="late")
    assert balances(store) == {"ada": (0, 2.5, 7.5)}
    again = store.submit(ada, job(4e14 * 2.5))  # what has failed may be tried again
    assert [entry.state for entry in store.runs("ada")] == ["waiting", "failed"]
    store.cancel("ada", again, lambda entry: Taken())
    store.cancel("ada", again, lambda entry: Taken())
    assert balances(store) == {"ada": (0, 2.5, 7.5)}


@pytest.mark.parametrize("budget", [1e15, 1e21, 3.3e24])
def test_a_grid_that_fills_the_budget_fits(store, budget):
    """Though products of floats are off in their last digits; and then nothing more does."""
    ada = user(store, amount=budget)
    for size in range(7):
        parameters = 1e6 * 1.7**size
        asked = RunRequest(parameters=parameters, tokens=max(1.0, budget / 7 / (6 * parameters)))
        store.submit(ada, Simulator().plan(asked))
    (left,) = (account.left for account in store.accounts())
    assert 0 <= left <= 1e-9 * budget
    with pytest.raises(OverBudgetError):
        store.submit(ada, job(max(1e12, budget / 1e6)))


def test_the_ledger_refuses_a_second_refund_and_any_change(store):
    ada = user(store)
    id = store.submit(ada, job(1e14))
    store.cancel("ada", id, lambda entry: Taken())
    with sqlite3.connect(store.path) as db:
        for statement in (
            f"INSERT INTO ledger (user, run, entry, amount, at) VALUES ('ada', '{id}', 'refund', 5, 0)",
            "INSERT INTO ledger (user, run, entry, amount, at) VALUES ('ada', NULL, 'reserve', 5, 0)",
            "UPDATE ledger SET amount = amount + 1",
            "DELETE FROM ledger",
            "INSERT INTO runs (id, user, identity, job, state, reserved, submitted) "
            "SELECT id || 'x', user, identity, job, 'done', 1, 0 FROM runs UNION ALL "
            "SELECT id || 'y', user, identity, job, 'done', 1, 0 FROM runs",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                db.execute(statement)
    db.close()


def test_the_books_are_checked(store):
    user(store)
    with sqlite3.connect(store.path) as db:
        db.execute("INSERT INTO ledger (user, entry, amount, at) VALUES ('ada', 'refund', 5, 0)")
    db.close()
    with pytest.raises(AssertionError, match="ada: granted"):
        store.accounts()


def test_keys_are_kept_as_hashes(store):
    key = store.add_user("ada", "flops", 1e18)
    assert store.user(key).name == "ada"
    assert store.user(key + "x") is store.user("") is store.user("\ud800") is None
    kept = b"".join(path.read_bytes() for path in store.directory.iterdir() if path.is_file())
    assert b"ada" in kept
    assert key.encode() not in kept
    assert key.removeprefix("cs336-").encode() not in kept
    assert store.add_user("eve", "flops", 1e18) != key


@pytest.mark.parametrize("name", ["", "a b", "-x", "ä", "a" * 65, "a\n"])
def test_names(store, name):
    with pytest.raises(ValueError, match="a user's name"):
        store.add_user(name, "flops", 1e18)


@pytest.mark.parametrize("amount", [0, -1, 1e5, 1e40, float("nan"), float("inf")])
def test_amounts(store, amount):
    with pytest.raises(ValueError, match="a budget must be from"):
        store.add_user("ada", "flops", amount)
    user(store)
    with pytest.raises(ValueError, match="there is a user 'ada' already"):
        user(store)


def test_the_price_must_be_known(store):
    ada, of_time = user(store), Job("1", 1e6, 6e6, None, 60.0, 1e-3, 1e3, 0)
    with pytest.raises(FieldError, match="say it in flops, tok or steps") as refused:
        store.submit(ada, of_time)
    assert refused.value.field == "config.budget"
    assert store.submit(user(store, "eve", 100, "seconds"), of_time)


def test_turns_are_taken(store):
    """A user's hundred runs do not keep another's first waiting."""
    ada, eve = user(store), user(store, "eve")
    for seed in range(3):
        store.submit(ada, job(1e14, seed))
    with pytest.raises(FullError):
        store.submit(ada, job(1e14, 3), most_waiting=3)
    store.submit(eve, job(1e14))
    claims = [store.claim() for _ in range(4)]
    assert [claim.entry.user for claim in claims] == ["ada", "eve", "ada", "ada"]
    assert [claim.entry.job.seed for claim in claims] == [0, 0, 1, 2]


def _die_at_a_run(directory):
    Store(directory).claim()
    os.kill(os.getpid(), signal.SIGKILL)


def _lose(store):
    process = FORK.Process(target=_die_at_a_run, args=(store.directory,))
    process.start()
    process.join()
    assert store.run("ada", store.running()[0].id).pid == process.pid


def test_the_death_of_a_worker_costs_nothing(store):
    user_ = user(store, amount=1e15)
    id = store.submit(user_, job(4e14))
    for attempt in (1, 2):
        _lose(store)
        assert [entry.attempts for entry in store.recover(lambda entry: Taken(1e14))] == [attempt]
        assert balances(store) == {"ada": (4e14, 0, 6e14)}
        assert store.recover(lambda entry: Taken(1e14)) == []
    _lose(store)
    store.recover(lambda entry: Taken(1e14))
    entry = store.run("ada", id)
    assert (entry.state, entry.error) == ("failed", "its process died 3 times")
    assert balances(store) == {"ada": (0, 1e14, 9e14)}


def test_stops_in_good_order_are_no_deaths(store):
    id = store.submit(user(store), job(4e14))
    for _ in range(3):
        store.settle(store.claim(), "waiting", Taken(1e14))
    for _ in range(2):
        _lose(store)
        store.recover(lambda entry: Taken(1e14))
    assert (store.run("ada", id).state, store.run("ada", id).attempts) == ("waiting", 5)
    store.settle(store.claim(), "waiting", Taken(1e14))
    _lose(store)
    store.recover(lambda entry: Taken(1e14))
    assert store.run("ada", id).state == "waiting"


def test_a_claim_that_fails_lets_go(store, monkeypatch):
    id = store.submit(user(store), job(1e14))
    with monkeypatch.context() as patch:
        patch.setattr("cs336.scaling.api.store.process_mark", lambda pid: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.claim()
    assert store.run("ada", id).attempts == 0
    assert store.claim().entry.id == id


def test_a_run_is_cancelled_wherever_it_is(store):
    ada = user(store, amount=1e15)
    id = store.submit(ada, job(4e14))
    claim = store.claim()
    assert store.recover(lambda entry: Taken()) == []  # its owner is alive
    store.cancel("ada", id, lambda entry: Taken())
    assert store.run("ada", id).state == "running"
    assert store.cancelled(id)
    store.settle(claim, "cancelled", Taken(1e14))
    assert balances(store) == {"ada": (0, 1e14, 9e14)}
    id = store.submit(ada, job(4e14))
    _lose(store)
    store.cancel("ada", id, lambda entry: Taken())
    store.recover(lambda entry: Taken(2e14))
    assert store.run("ada", id).state == "cancelled"
    assert balances(store) == {"ada": (0, 3e14, 7e14)}
    store.cancel("eve", id, lambda entry: Taken())  # whose it is not
    assert store.run("eve", id) is None


def test_many_at_once_never_spend_more_than_there_is(store):
    """Of 40 submissions at a time, 10 fit; of 20 twins one is entered."""
    ada, found = user(store, amount=1e15), []

    def submit(seed):
        try:
            found.append(store.submit(ada, job(1e14, seed)))
        except (OverBudgetError, DuplicateError) as error:
            found.append(type(error))

    threads = [threading.Thread(target=submit, args=(seed // 2,)) for seed in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, str) for one in found) == len(store.runs("ada")) == 10
    assert balances(store) == {"ada": (1e15, 0, 0)}


def test_a_process_is_known_by_its_start(tmp_path):
    process = FORK.Process(target=signal.pause)
    process.start()
    mark = process_mark(process.pid)
    assert mark is not None
    assert mark == process_mark(process.pid)
    assert mark != process_mark(os.getpid())
    process.kill()
    until(lambda: process_mark(process.pid) is None)  # before it is waited for
    process.join()


def test_another_file_is_refused(tmp_path):
    (tmp_path / "api.sqlite").write_bytes(b"no database, but longer than its header would be" * 9)
    with pytest.raises(ValueError, match="is not a training API's file"):
        Store(tmp_path)
    with sqlite3.connect(tmp_path / "other.sqlite") as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    (tmp_path / "other.sqlite").rename(tmp_path / "api.sqlite")
    with pytest.raises(ValueError, match="format 9, expected 2"):
        Store(tmp_path)


def test_nothing_is_written_behind_a_torn_line(tmp_path):
    for before in (b'{"step": 1, "tok', b'{"step": 1, "tokens": 1, "seconds": 0}\n{"st'):
        (tmp_path / "metrics.jsonl").write_bytes(before)
        Simulator(time_scale=0).run(job(4e14), tmp_path, lambda: False)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
