"""kill -9 of server and workers while fifty clients are at it: no run is lost, made twice or charged twice."""

import functools
import json
import multiprocessing
import os
import random
import signal
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from scaling.api_server import balances, listening, program, until, user

from cs336.scaling.api import ApiError, Client, Simulator, Store
from cs336.scaling.api.process import process_mark
from cs336.scaling.api.protocol import RunRequest

USERS, CLIENTS, RUNS = 10, 5, 2  # clients a user, runs a client
PRICE = 6e16
OPTIONS = ("--workers", "2", "--time-scale", "1e-4")  # 15 ms a run


def one(url, key, number, outcomes, errors):
    """Submits runs, the last one of them also its neighbour's; the first client cancels that of seed 0; waits."""
    try:
        client, mine = Client(url, key, patience=120), {}
        for seed in (*range(RUNS * number, RUNS * (number + 1)), RUNS * ((number + 1) % CLIENTS)):
            try:
                mine[seed] = client.submit(1e7, 1e9, seed=seed).id
            except ApiError as refused:
                outcomes.append(refused.status)
            time.sleep(random.random() / 10)
        if number == 0 and 0 in mine:
            client.cancel(mine[0])
        client.wait(mine.values(), timeout=240)
    except Exception as error:
        errors.append(error)
        raise


def keep_busy(store, url, key, over, errors):
    """Submits runs until it is over: however fast the fifty's are made, there is one to die at."""
    try:
        client, mine = Client(url, key, patience=120), []
        while not over.is_set():
            mine.append(client.submit(1e7, 1e9, seed=1 + len(mine)).id)
            until(lambda: over.is_set() or store.num_waiting() < 8)
        client.wait(mine, timeout=240)
    except Exception as error:
        errors.append(error)
        raise


def kill_at_work(store, server=None):
    """The run whose worker was killed, which nobody cancels, and its server with it; None if there is none.

    Nobody writes meanwhile, so that the run does not end between look and kill, and is not found before both are dead.
    """
    with store.transaction():
        for entry in store.running():
            if entry.job.seed != 0 and process_mark(entry.pid) == entry.mark:
                os.kill(entry.pid, signal.SIGKILL)
                if server:
                    server.kill()
                return entry
    return None


def test_fifty_clients_and_nine_lives(tmp_path):
    directory = tmp_path / "api"
    store = Store(directory)
    budgets = {f"user{number}": 8 * PRICE for number in range(USERS)}  # of the 10 runs that a user's clients want
    keys = {name: store.add_user(name, "flops", budget) for name, budget in budgets.items()}
    budgets["busy"] = 8192 * PRICE
    busy, over = store.add_user("busy", "flops", budgets["busy"]), threading.Event()
    outcomes, errors, seen, victims = [], [], {}, []

    def owners():
        found = {entry.pid: entry.mark for entry in store.running() if entry.pid}
        seen.update(found)
        return list(found)

    with socket.socket() as kept:  # the port is nobody else's while no server listens
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        server, url = program(directory, *OPTIONS, port=port)
        threads = [threading.Thread(target=keep_busy, args=(store, url, busy, over, errors))]
        threads += [
            threading.Thread(target=one, args=(url, key, number, outcomes, errors))
            for key in keys.values()
            for number in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        try:
            for kill_server, kill_worker in ((False, True), (True, False), (True, True)):
                until(owners)
                balances(store)  # the books are right at any moment
                if kill_worker:
                    victim = until(functools.partial(kill_at_work, store, server if kill_server else None))
                    victims.append(victim.id)
                if kill_server:
                    server.kill()
                    assert server.wait() == -signal.SIGKILL
                    server.stdout.close()
                    server, again = program(directory, *OPTIONS, port=port)
                    assert again == url
                if kill_worker:
                    until(lambda found=victim: store.run(found.user, found.id).deaths)
            over.set()
            for thread in threads:
                thread.join(240)
            owners()
        finally:
            over.set()
            server.terminate()
            assert server.wait(60) == 0
            server.stdout.close()
    assert errors == []
    until(lambda: not [pid for pid, mark in seen.items() if process_mark(pid) == mark])

    made_again = set()
    for name, (reserved, charged, left) in balances(store).items():
        runs = store.runs(name, limit=10**5)
        assert reserved == 0
        assert charged + left == budgets[name]
        assert charged == sum(run.charged for run in runs)
        assert {run.state for run in runs} <= {"done", "cancelled"}
        done = [run for run in runs if run.state == "done"]
        assert name == "busy" or 7 <= len(done) <= 8
        assert len({run.job.seed for run in done}) == len(done)
        for run in done:
            assert run.charged == PRICE
            assert run.loss == Simulator().loss(run.job)
            lines = (store.folder(run.id) / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
        made_again |= {run.id for run in done if run.attempts > 1}
    assert made_again >= set(victims)
    assert {400, 409} >= set(outcomes) >= {400}


def _stuck(directory):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    claim = Store(directory).claim()
    while True:
        signal.pause()
    claim.release()


def test_what_a_dead_server_left_is_ended(tmp_path):
    """A worker that neither works nor stops is killed, and its run made."""
    store = Store(tmp_path / "api")
    ada = user(store)
    id = store.submit(ada, Simulator().plan(RunRequest(parameters=1e7, tokens=1e9)))
    process = multiprocessing.get_context("fork").Process(target=_stuck, args=(store.directory,))
    process.start()
    until(store.running)
    with listening(store.directory, workers=1, grace=0.3):
        until(lambda: store.run("ada", id).state == "done")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert store.run("ada", id).attempts == 2
    assert balances(store) == {"ada": (0, PRICE, 1e18 - PRICE)}


def test_another_process_of_that_number_is_left_alone(tmp_path):
    """A number is given again: only with the start time that was noted is it the worker."""
    store = Store(tmp_path / "api")
    id = store.submit(user(store), Simulator().plan(RunRequest(parameters=1e7, tokens=1e9)))
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    store.claim().release()
    with store.transaction() as db:
        db.execute("UPDATE runs SET pid = ?, mark = 'another boot:1'", (process.pid,))
    with listening(store.directory, workers=1, grace=0.1):
        until(lambda: store.run("ada", id).state == "done")
    assert process.is_alive()
    process.kill()
    process.join()
