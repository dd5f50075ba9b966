"""The training API over HTTP: what is asked is answered, or refused with a sentence, and goes on after a restart."""

import asyncio
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from experiments.tiny_study import MODEL, base
from scaling.api_server import ROOT, SLOW, balances, client, listening, program, until

from cs336.cli import main
from cs336.scaling import EPOCH, fit_isoflop
from cs336.scaling.api import ApiError, Client, Simulator, Store
from cs336.scaling.api.contest import reveal
from cs336.scaling.api.protocol import RunRequest
from cs336.scaling.laws import step_law


@pytest.fixture
def idle(tmp_path):
    """A server whose runs nobody makes: (store, address)."""
    with listening(tmp_path / "api", max_waiting=5, max_body_bytes=5000) as found:
        yield found


def raw(url, method, path, body=None, headers=()):
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request(method, path, body, dict(headers))
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def refused(call, *arguments, **keys):
    with pytest.raises(ApiError) as error:
        call(*arguments, **keys)
    return error.value


def test_a_run_is_entered_and_its_budget_reserved(idle):
    store, url = idle
    ada = client(store, url)
    run = ada.submit(1e7, 1e9)
    assert (run.state, run.flops, run.reserved, run.charged, run.loss) == ("waiting", 6e16, 6e16, None, None)
    assert (run.learning_rate, run.batch_tokens) == step_law(1e7, 1e9)
    assert ada.account().left == 1e18 - 6e16
    assert ada.runs() == [run]
    assert ada.run(run.id).curve == []
    assert ada.cancel(run.id).state == "cancelled"
    assert ada.account().left == 1e18


def test_refusals(idle):
    store, url = idle
    ada, eve = client(store, url), client(store, url, "eve")
    run = ada.submit(1e7, 1e9)
    twin = refused(ada.submit, 1e7, 1e9, seed=0)
    assert (twin.status, twin.run) == (409, run.id)
    assert "you have this run already" in str(twin)
    assert eve.submit(1e7, 1e9).id != run.id  # of another user it is none
    over = refused(ada.submit, 1e9, 1e12)
    assert (over.status, over.left) == (400, 9.4e17)
    assert "9.4e+17 are left of your budget" in str(over)
    for asked, field in (
        ({"parameters": -1, "tokens": 1e9}, "parameters"),
        ({"parameters": "many", "tokens": 1e9}, "parameters"),
        ({"parameters": 1e7, "tokens": 1e9, "learning_rate": 0}, "learning_rate"),
        ({"parameters": 1e7, "tokens": 1e9, "learning_rate": 100}, "learning_rate"),
        ({"parameters": 1e7, "tokens": 1e9, "batch_tokens": 2e9}, None),
        ({"parameters": 1e7, "tokens": 1e9, "seed": -1}, "seed"),
        ({"parameters": 1e7, "tokens": 1e9, "seed": 1.5}, "seed"),
        ({"parameters": 1e7, "tokens": 1e9, "batch_tokens": True}, "batch_tokens"),
        ({"parameters": 1e7, "tokens": 1e9, "mood": "good"}, "mood"),
        ({"parameters": 1e7, "tokens": math.inf}, "tokens"),
        ({"config": 5}, "config"),
        ({"parameters": 1e7}, None),
        ({"parameters": 1e7, "tokens": 1e9, "config": {}}, None),
    ):
        with pytest.raises(ApiError) as error:
            ada._ask("POST", "/runs", asked)
        assert (error.value.status, error.value.field) == (422, field), asked
    for call in (eve.run, eve.cancel, ada.run):
        gone = refused(call, run.id if call != ada.run else "0" * 12)
        assert (gone.status, str(gone)[:16]) == (404, "you have no run ")
    assert [ada.runs("waiting"), ada.runs("done")] == [[run], []]
    for seed in range(1, 5):
        ada.submit(1e7, 1e9, seed=seed)
    assert refused(ada.submit, 1e7, 1e9, seed=5).status == 429
    assert balances(store)["ada"] == (5 * 6e16, 0, 1e18 - 5 * 6e16)


def test_nobody_without_a_key(idle):
    store, url = idle
    key = store.add_user("ada", "flops", 1e18)
    wrong = ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {key}"}, {"Authorization": key})
    for header in wrong:
        for asked in ("GET /account", "GET /runs", "POST /runs", "GET /runs/x", "PUT /submission", "GET /none"):
            method, path = asked.split()
            status, body, headers = raw(url, method, path, None if method == "GET" else b"no JSON", header.items())
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer"), (asked, header)
            assert "message" in json.loads(body)["error"]
    assert Client(url, f"{key}\n").account().user == "ada"
    assert refused(Client(url, "x").account).status == 401
    assert raw(url, "GET", "/health")[:2] == (200, b'{"status":"ok"}')
    status, page, headers = raw(url, "GET", "/")
    assert (status, page[:15]) == (200, b"<!doctype html>")
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_bodies(idle):
    store, url = idle
    key = {"Authorization": f"Bearer {store.add_user('ada', 'flops', 1e18)}", "Content-Type": "application/json"}
    for body, status in (
        (b"{", 400), (b"\xff", 400), (b"", 422), (b"null", 422), (b"[1]", 422), (b'"x"', 422), (b"[" * 4000, 400),
        (b'{"parameters": 1' + b"0" * 4500 + b', "tokens": 1}', 400), (b"x" * 5001, 413),
        (json.dumps({"config": {"model": "\ud800"}}).encode(), 422), (b'{"config": {"a": NaN}}', 422),
        (json.dumps({"\ud800": 1}).encode(), 422),
    ):  # fmt: skip
        found, answer, _ = raw(url, "POST", "/runs", body, key.items())
        assert (found, "message" in json.loads(answer)["error"]) == (status, True), body[:40]

    async def chunked():
        parts = urllib.parse.urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        head = f"POST /runs HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key['Authorization']}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(6):
            writer.write(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        await writer.drain()
        status = await reader.readline()
        writer.close()
        return status

    assert b" 413 " in asyncio.run(chunked())
    assert raw(url, "GET", "/no", headers=key.items())[0] == 404
    assert raw(url, "PATCH", "/runs", headers=key.items())[0] == 405


def test_runs_are_made_and_refunded(tmp_path):
    with listening(tmp_path / "api", workers=2) as (store, url):
        ada = client(store, url)
        budgets = np.repeat([1e16, 3e16, 1e17], 5)
        sizes = np.array([EPOCH.optimum(c).parameters for c in budgets]) * np.tile([0.25, 0.5, 1, 2, 4], 3)
        ids = [ada.submit(n, c / (6 * n)).id for n, c in zip(sizes, budgets, strict=True)]
        runs = ada.wait(ids)
        assert {(run.state, run.done, run.attempts, run.error) for run in runs} == {("done", 1.0, 1, None)}
        assert [run.charged for run in runs] == [pytest.approx(c) for c in budgets]
        assert ada.account().charged == pytest.approx(budgets.sum())
        for run, n, c in zip(runs, sizes, budgets, strict=True):
            assert run.loss == pytest.approx(float(EPOCH.loss(n, c / (6 * n))), rel=0.01)
        curve = ada.run(ids[0]).curve
        assert len(curve) == 40
        assert curve[-1] == (pytest.approx(runs[0].tokens), pytest.approx(runs[0].loss))
        assert curve[0][1] > curve[-1][1] + 0.1
        points = ada.points()
        assert points.parameters == pytest.approx(sizes)
        found = fit_isoflop(points).parameter_law(1e18)
        assert found == pytest.approx(EPOCH.optimum(1e18).parameters, rel=0.25)


def test_losses_while_it_runs_then_cancelled(tmp_path):
    with listening(tmp_path / "api", SLOW, workers=1) as (store, url):
        ada = client(store, url, amount=1e20)
        run, later = ada.submit(1e8, 1e11), ada.submit(1e6, 1e8)  # 150 s, and a moment
        going = until(lambda: (found := ada.run(run.id)).curve and found)
        assert (going.state, going.attempts) == ("running", 1)
        assert 0 < going.done < 0.5
        assert going.loss == going.curve[-1][1]
        ada.cancel(run.id)
        ended, done = ada.wait([run.id, later.id], timeout=60)
        assert (ended.state, done.state) == ("cancelled", "done")
        assert 0 < ended.charged < 0.5 * ended.reserved
        assert ended.charged == pytest.approx(ended.done * ended.flops)
        assert balances(store)["ada"][2] == pytest.approx(1e20 - ended.charged - done.charged)
        assert ada.submit(1e8, 1e11).id != run.id


def test_a_run_goes_on_where_a_restart_stopped_it(tmp_path):
    directory = tmp_path / "api"
    with listening(directory, SLOW, workers=1) as (store, url):
        key = store.add_user("ada", "seconds", 100_000)
        run = Client(url, key).submit(1e7, 2e11)  # 30,000 s simulated, 30 s
        until(lambda: Client(url, key).run(run.id).curve)
    assert [entry.state for entry in store.runs("ada")] == ["waiting"]
    assert balances(store) == {"ada": (30_000, 0, 70_000)}
    before = (store.folder(run.id) / "metrics.jsonl").read_bytes()
    (store.folder(run.id) / "metrics.jsonl").write_bytes(before + b'{"step": 99, "tok')  # torn, by a kill
    with listening(directory, Simulator(time_scale=0), workers=1) as (store, url):
        (done,) = Client(url, key).wait([run.id])
        assert (done.state, done.attempts, done.charged) == ("done", 2, 30_000)
    after = (store.folder(run.id) / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    assert [json.loads(line)["step"] for line in after.splitlines()] == list(range(1, 41))


def test_configurations(idle):
    store, url = idle
    ada = client(store, url)
    config = {"model": MODEL, "budget": "640tok", "batch_size": 2, "optimizer": {"lr": 0.02}}
    run = ada.submit(config=config)
    assert (run.tokens, run.batch_tokens, run.learning_rate) == (640, 16, 0.02)
    assert run.reserved == pytest.approx(run.flops, abs=1e6)
    assert ada.run(run.id).config["model"]["d_model"] == 16
    assert (
        refused(ada.submit, config=config | {"schedule": {"kind": "cosine"}}).status == 409
    )  # the default, spelled out
    for changes, field, said in (
        ({"optimiser": {}}, "config", "did you mean optimizer?"),
        ({"model": MODEL | {"num_heads": 3}}, "config", "num_heads"),
        ({"model": {}}, "config", "missing: model.vocab_size"),
        ({"data": {"train": "/etc"}}, "config.data", "data is the operator's"),
        ({"init_from": "/etc"}, "config.init_from", "init_from is the operator's"),
        ({"branch_from": "/etc"}, "config.branch_from", "branch_from is the operator's"),
        ({"run_dir": "/tmp/x"}, "config.run_dir", "run_dir is the operator's"),
        ({"budget": "1e308steps"}, "config", "too large"),
        ({"batch_size": 10**400}, "config", ""),
        ({"budget": "1tok"}, "config", "one step takes 16"),
        ({"optimizer": {"lr": 100}}, "config", "optimizer.lr must be from 1e-09 to 1, got 100"),
        ({"optimizer": {"lr": 0}}, "config", "optimizer.lr must be from 1e-09 to 1, got 0"),
        ({"model": MODEL | {"d_ff": 10**400}}, "config", ""),
    ):
        found = refused(ada.submit, config=config | changes)
        assert (found.status, found.field) == (422, field), found
        assert said in str(found)
    timed = ada.submit(config=config | {"budget": "1s"})  # the simulator's speed says how many tokens that is
    assert timed.flops == pytest.approx(4e14)


def test_the_contest(tmp_path):
    with listening(tmp_path / "api", target=1e20) as (store, url):
        ada, eve, kim = (client(store, url, name) for name in ("ada", "eve", "kim"))
        assert ada.submission() is None
        ada.predict(3.0, 1e8, 1e10)
        ada.predict(2.9, 2e8, 1e10)
        eve.predict(2.4, 5e8, 1e10, final=True)
        assert refused(eve.predict, 2.5, 5e8, 1e10).status == 409
        assert refused(ada.predict, -1.0, 5e8, 1e10).field == "loss"
        assert (ada.submission().loss, eve.submission().final) == (2.9, True)
        board = kim.leaderboard()
        assert (board.target_flops, board.true_loss) == (1e20, None)
        assert [(row.user, row.loss, row.parameters) for row in board.rows] == [
            ("ada", None, None),
            ("eve", None, None),
        ]
        reveal(store, 2.5, 4e8)
        with pytest.raises(ValueError, match="revealed already"):
            reveal(store, 2.6)
        assert "the true run is revealed" in str(refused(kim.predict, 2.5, 4e8, 1e10))
        rows = kim.leaderboard().rows
        assert [(row.user, row.error, row.size_ratio) for row in rows] == [
            ("eve", pytest.approx(0.04), 1.25), ("ada", pytest.approx(0.16), 0.5),
        ]  # fmt: skip
    with listening(tmp_path / "late", deadline="2026-01-01T00:00") as (store, url):
        assert "the deadline was 2026-01-01" in str(refused(client(store, url).predict, 2.0, 1e8, 1e9))
    with pytest.raises(ValueError, match="deadline must be like"), listening(tmp_path / "never", deadline="soon"):
        pass


def test_the_simulator_is_the_published_laws():
    exact, noisy = Simulator(noise=0), Simulator()
    best = exact.plan(RunRequest(parameters=1e8, tokens=2e9))
    assert exact.loss(best) == float(EPOCH.loss(1e8, 2e9))
    for changes, factor in (
        ({"learning_rate": best.learning_rate / 2}, 0.01), ({"learning_rate": best.learning_rate * 2}, 0.01),
        ({"batch_tokens": best.batch_tokens / 2}, 0.004),
    ):  # fmt: skip
        off = exact.plan(RunRequest(parameters=1e8, tokens=2e9, **changes))
        assert exact.loss(off) / exact.loss(best) == pytest.approx(1 + factor * math.log(2) ** 2)
    seeds = [noisy.plan(RunRequest(parameters=1e8, tokens=2e9, seed=seed)) for seed in range(200)]
    logs = np.log([noisy.loss(job) / exact.loss(best) for job in seeds])
    assert noisy.loss(seeds[7]) == noisy.loss(seeds[7])
    assert logs.std() == pytest.approx(0.002, rel=0.2)
    assert abs(logs.mean()) < 0.0006
    wild = exact.plan(RunRequest(parameters=1, tokens=1, learning_rate=1e-9))
    assert exact.loss(wild) == pytest.approx(math.log(32768))


def test_a_client_outlasts_a_server(tmp_path, capsys):
    """Its requests wait for the next server; a second server at the directory is refused."""
    directory = tmp_path / "api"
    key = Store(directory).add_user("ada", "flops", 1e18)
    process, url = program(directory, "--workers", "1")
    assert main(["scaling", "api", "serve", str(directory), "--port", "0"]) == 2
    assert "another process is at work" in capsys.readouterr().err
    run = Client(url, key).submit(1e7, 1e9)
    process.terminate()
    assert process.wait(60) == 0
    with pytest.raises(OSError, match="refused"):
        Client(url, key).account()
    port = urllib.parse.urlsplit(url).port
    process, _ = program(directory, "--workers", "1", port=port)
    try:
        assert Client(url, key, patience=30).wait([run.id])[0].state == "done"
    finally:
        process.terminate()
        assert process.wait(60) == 0


def test_verbs(tmp_path, capsys):
    directory, key = tmp_path / "api", tmp_path / "key"
    add = ["scaling", "api", "add-user", str(directory)]
    assert main([*add, "ada", "--budget", "1e18flops", "--key-file", str(key)]) == 0
    assert key.stat().st_mode & 0o777 == 0o600
    assert main(["scaling", "api", "users", str(directory)]) == 0
    assert "ada: 1e+18 granted, 0 reserved, 0 charged, 1e+18 left (flops)" in capsys.readouterr().out

    def verb(name, *options):
        status = main(["scaling", "api", name, *options, "--url", url, "--key-file", str(key)])
        return status, "".join(capsys.readouterr())

    with listening(directory, workers=1) as (_, url):
        status, said = verb("submit", "--parameters", "1e7", "--tokens", "1e9", "--wait")
        assert (status, "done" in said) == (0, True)
        id = said.split()[0]
        assert id in verb("runs")[1]
        assert verb("status", id)[1].count("\n") == 1 + 40
        assert "done" in verb("cancel", id)[1]  # it had ended
        assert "6e+16 charged" in verb("account")[1]
        assert verb("submit", "--parameters", "1e7", "--tokens", "1e9")[0] == 2
        status, said = verb("submit", "--parameters", "1e7", "--tokens", "1e9", "--learning-rate", "100")
        assert (status, "learning_rate: Input should be less than or equal to 1 (status 422)" in said) == (2, True)
        assert verb("predict", "--loss", "2.5", "--parameters", "1e8", "--tokens", "1e9")[0] == 0
        assert "ada" in verb("leaderboard")[1]
        assert main(["scaling", "api", "reveal", str(directory), "--loss", "2"]) == 0
        assert capsys.readouterr().out == "the true loss is 2; predictions are closed, and 1 is on the leaderboard\n"
        assert "25.00 %" in verb("leaderboard")[1]
        assert verb("status", "none")[1] == "cs336: you have no run none (status 404)\n"
    assert "no directory of" in (main(["scaling", "api", "users", str(tmp_path)]), capsys.readouterr().err)[1]
    assert main([*add, "eve", "--budget", "5steps"]) == 2


def test_a_worker_of_the_simulator_and_a_client_do_without_torch():
    """Both are started often, and torch takes them seconds."""
    code = "import sys, cs336.scaling.api.worker, cs336.scaling.api.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cs336.scaling.api", sys.modules["cs336.scaling.api"])  # which is imported again meanwhile
    for name in [name for name in sys.modules if name.startswith(("fastapi", "cs336.scaling.api"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["scaling", "api", "serve", str(tmp_path)]) == 2
    assert "pip install 'cs336[serve]'" in capsys.readouterr().err


def test_runs_are_trained(tmp_path):
    """For real, in a worker process: by a size, by a configuration."""
    from cs336.scaling.api.training import Training

    table = base(tmp_path) | {"model": MODEL | {"context_length": 8}, "checkpoint_interval": 0}
    backend = Training({name: value for name, value in table.items() if name != "budget"})
    with listening(tmp_path / "api", backend, workers=1) as (store, url):
        ada, eve = client(store, url), client(store, url, "eve", 1000, "seconds")
        small = {"budget": "4steps", "model": MODEL}
        sized, run = ada.submit(1e5, 800, batch_tokens=80), ada.submit(config=small | {"seed": 1})
        assert sized.parameters == pytest.approx(1e5, rel=0.25)
        assert "the nearest has" in str(refused(ada.submit, 10, 800))
        assert refused(ada.submit, config=small | {"budget": "5s"}).field == "config.budget"
        assert refused(eve.submit, config=small).field == "config.budget"
        timed = eve.submit(config=small | {"budget": "1s"})
        assert timed.reserved == 1
        assert eve.cancel(timed.id).charged == 0
        runs = ada.wait([sized.id, run.id], timeout=120)
        assert [(r.state, r.error, r.attempts) for r in runs] == [("done", None, 1)] * 2
        assert runs[1].charged == pytest.approx(runs[1].flops, abs=1e6)
        assert 2 < runs[1].loss < 4
        assert ada.run(run.id).curve[-1][0] == 64


def test_a_restart_stops_a_run_that_is_trained_once(tmp_path):
    """Its worker ends with it: it does not claim it again, to be killed at it when the server's patience ends."""
    from cs336.scaling.api.training import Training

    table = base(tmp_path) | {"checkpoint_interval": 0}
    backend = Training({name: value for name, value in table.items() if name != "budget"})
    with listening(tmp_path / "api", backend, workers=1, grace=60.0) as (store, url):
        ada = client(store, url)
        run = ada.submit(config={"budget": "100000steps"})
        until(lambda: ada.run(run.id).curve)
    entry = store.run("ada", run.id)
    assert (entry.state, entry.attempts, entry.deaths) == ("waiting", 1, 0)


@pytest.mark.slow
def test_a_killed_worker_s_run_goes_on_from_its_checkpoint(tmp_path):
    from cs336.scaling.api.training import Training
    from cs336.training.checkpoint import list_checkpoints

    model = MODEL | {"d_model": 64, "context_length": 32, "num_layers": 2}
    table = base(tmp_path, model=model, checkpoint_interval=10)
    backend = Training({name: value for name, value in table.items() if name != "budget"})
    with listening(tmp_path / "api", backend, workers=1) as (store, url):
        ada = client(store, url)
        run = ada.submit(config={"budget": "100steps"})
        checkpoints = store.folder(run.id) / "checkpoints"
        until(lambda: list_checkpoints(checkpoints), 120)
        os.kill(store.running()[0].pid, signal.SIGKILL)
        client(store, url, "eve", 100, "seconds").submit(config={"budget": "2s"})
        (done,) = ada.wait([run.id], timeout=200)
        assert (done.state, done.attempts) == ("done", 2)
        assert done.charged == pytest.approx(done.flops, abs=1e6)
        rows = (store.folder(run.id) / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(row)["step"] for row in rows if "train/loss" in row]
        assert steps == list(range(1, 101))
        until(lambda: balances(store)["eve"][0] == 0, 200)
        (timed,) = store.runs("eve")
        assert (timed.state, 1 < timed.charged <= 2) == ("done", True)
