"""What the others say when a rank dies, fails or hangs in its sixth collective."""

import contextlib
import json
import os
import signal
import time
import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cs336.parallel import ParallelConfig, RankError, watch
from cs336.parallel.collectives import all_reduce
from cs336.parallel.watch import held_up_by, watching


def fail():
    raise ValueError("the shard is torn")


FAULTS = {
    "dies": (lambda: os.kill(os.getpid(), signal.SIGKILL), (-signal.SIGKILL,), "rank 1: died", 0),
    "fails": (fail, (1, -signal.SIGABRT), "rank 1: ValueError: the shard is torn", 0),  # gloo aborts at exit
    "hangs": (lambda: time.sleep(1000), (1,), "rank 1: nothing went on for 6 s (parallel.timeout)", 1),
}


def on_a_rank(rank, folder, name):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(f"{folder}/store", 2))

    def tell(error):
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")

    try:
        with watching(6.0, tell):
            for i in range(100):
                if rank == 1 and i == 5:
                    FAULTS[name][0]()
                all_reduce(torch.ones(1))
    except RankError as error:
        tell(error)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The exit status of each rank, and what rank 0 said."""
    context, found = mp.get_context("forkserver"), {}
    context.set_forkserver_preload(["cs336.training", "torch._dynamo"])
    for name in FAULTS:
        folder = tmp_path_factory.mktemp(name)
        found[name] = folder, [context.Process(target=on_a_rank, args=(rank, folder, name)) for rank in range(2)]
    for _, processes in found.values():
        for process in processes:
            process.start()
    for _, processes in found.values():
        for process in processes:
            process.join(120)
    return {name: ([p.exitcode for p in ps], (folder / "0.txt").read_text()) for name, (folder, ps) in found.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_the_others_end_and_name_the_rank(ended, name):
    _, of_rank_1, message, of_rank_0 = FAULTS[name]
    statuses, said = ended[name]
    assert said == f"RankError: {message}"
    assert statuses[0] == of_rank_0
    assert statuses[1] in of_rank_1


@pytest.mark.parametrize("takes", [0.0, 1.5, 4.5])
@pytest.mark.parametrize("alive", [False, True])
def test_a_look_that_takes_long_does_not_hide_a_death(monkeypatch, takes, alive):
    """The first look, at a machine that is busy, finds a sign that was given long before."""
    now, looks = [0.0], [0]

    def multi_get(keys):
        looks[0] += 1
        now[0] += takes if looks[0] == 1 else 0.0
        signs = [9, {}, None, True], [looks[0] if alive else 1, {}, None, False]
        return [json.dumps(sign).encode() for sign in signs]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    found = object.__new__(watch._Watch)
    found.beat, found.lock, found.keys = 1.0, contextlib.nullcontext(), ["0", "1"]
    found.signs, found.seen = [json.dumps([0, {}, None, False])] * 2, [0.0, 0.0]
    found.store = types.SimpleNamespace(multi_get=multi_get)
    assert found.lost() == ("" if alive else "rank 1: died")


def test_who_is_waited_for_in_a_grid():
    """Data 2 x tensor 2: rank 3 hangs, rank 2 waits for it in their tensor group, 0 and 1 for both in data groups."""
    begun = [{"0,1": 9, "0,2": 2, "0,1,2,3": 5}, {"0,1": 9, "1,3": 2, "0,1,2,3": 5}]
    begun += [{"2,3": 8, "0,2": 1, "0,1,2,3": 5, "": 7}, {"2,3": 7, "1,3": 1, "0,1,2,3": 5}]
    assert held_up_by(begun) == [3]
    assert held_up_by([{"0,1": 3}, {"0,1": 3, "": 1}]) == []
    assert held_up_by([{"0,1": 3}, {"0,1": 2, "1,2": 2}, {"1,2": 1}]) == [2]


def test_one_process_is_not_watched():
    with watching(0.01, pytest.fail):
        time.sleep(0.1)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_is_a_time(timeout):
    with pytest.raises(ValueError, match="timeout must be more than 0 seconds and finite"):
        ParallelConfig(timeout=timeout)
