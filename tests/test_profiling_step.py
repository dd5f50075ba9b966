"""Traces, tables and what they are made of."""

import json

import pytest
import torch

from profiling import memory, step, table
from profiling.idle import gpu_idle
from profiling.table import OpTimer


def test_a_trace_has_the_phases(tmp_path, capsys):
    step.main(["tiny", "--batch", "2", "--steps", "2", "--trace", str(tmp_path / "t.json")])
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert names.count("step") == 2
    assert {"forward", "backward", "optimizer"} <= set(names)
    assert "2 steps" in capsys.readouterr().out


def test_a_gpu_is_idle_where_nothing_runs(tmp_path):
    """Kernels of several streams overlap, and what the host does counts for nothing."""
    spans = [
        ("kernel", 100, 10),
        ("gpu_memcpy", 105, 15),
        ("kernel", 130, 20),
        ("kernel", 132, 5),
        ("gpu_memset", 160, 40),
    ]
    events = [{"cat": cat, "ts": ts, "dur": dur} for cat, ts, dur in spans]
    events += [{"cat": "cpu_op", "ts": 0, "dur": 500}, {"name": "a mark", "ts": 0}]
    trace = tmp_path / "t.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    assert gpu_idle(trace) == pytest.approx((10 + 10) / 100)
    trace.write_text(json.dumps({"traceEvents": events[-2:]}))
    assert gpu_idle(trace) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_said_what_works():
    with pytest.raises(SystemExit, match="--trace FILE works on a CPU too"):
        step.main(["tiny"])
    with pytest.raises(SystemExit, match="torch counts the memory of GPUs"):
        memory.main(["tiny"])


def test_a_table_of_a_step(capsys):
    table.main(["tiny", "--batch", "2", "--rows", "5", "--optimizer", "muon"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["op", "calls", "ms"]
    assert len(lines) == 1 + 5 + 1 + 1
    gains = [float(line.split()[-1]) for line in lines[1:6]]
    assert gains == sorted(gains, reverse=True)
    assert lines[-1].startswith("all ")


def test_what_an_op_must_move_and_do():
    timer = OpTimer(torch.device("cpu"), bandwidth=1e9, flops=lambda dtype: 1e12)
    a, b = torch.randn(64, 32), torch.randn(32, 16)
    with timer:
        c = a @ b
        c.t().view(16, 64)
        torch.add(c, c)
    mm, add = timer.rows["mm"], timer.rows["add.Tensor"]
    assert set(timer.rows) == {"mm", "add.Tensor"}  # views move nothing
    assert (mm.calls, mm.flops, mm.bytes) == (1, 2 * 64 * 32 * 16, 4 * (64 * 32 + 32 * 16 + 64 * 16))
    assert add.bytes == 4 * 2 * 64 * 16  # c is read once
    assert mm.least == pytest.approx(max(mm.bytes / 1e9, mm.flops / 1e12))
    assert mm.share == pytest.approx(mm.least / mm.seconds)


@pytest.mark.parametrize("causal", [True, False])
def test_work_of_our_attention(causal):
    from cs336.ops import registry

    timer = OpTimer(torch.device("cpu"), bandwidth=1e15, flops=lambda dtype: 1e12)
    q = torch.randn(2, 4, 8, 16)
    options = (0.25, causal, -1, -1, 0.0)
    forward, backward = (registry.OPS[f"attention_{name}"].overloads["ref"] for name in ("fwd", "bwd"))
    with timer:
        o, lse = forward(q, q, q, *options)
        backward(o, None, q, q, q, o, lse, *options, False)
    whole = 2 * 4 * 8 * 8 * 16 // (2 if causal else 1)
    assert timer.rows["cs336_ref.attention_fwd"].flops == 4 * whole
    assert timer.rows["cs336_ref.attention_bwd"].flops == 10 * whole


def alloc(addr, size, *frames):
    found = [{"filename": name, "line": 7, "name": "f"} for name in frames]
    return {"action": "alloc", "addr": addr, "size": size, "frames": found}


def free(addr):
    return {"action": "free_completed", "addr": addr, "size": 0}


def test_what_is_alive_at_the_peak():
    events = [alloc(1, 10), alloc(2, 50), free(1), alloc(3, 30), free(2), alloc(1, 40), free(9), free(3)]
    assert {(e["addr"], e["size"]) for e in memory.at_peak(events)} == {(2, 50), (3, 30)}
    assert memory.at_peak([]) == []


def test_memory_by_the_line_that_took_it():
    inside = "/x/site-packages/torch/nn/functional.py"
    events = [
        alloc(1, 3 << 20, inside, "/home/me/cs336/nn/mlp.py", "/home/me/cs336/training/learner.py"),
        alloc(2, 5 << 20, inside, "/home/me/cs336/nn/mlp.py"),
        alloc(3, 1 << 20, "/tmp/torchinductor_me/ab/c.py"),
        alloc(4, 1 << 20),
    ]
    lines = memory.lines(events, 2)
    assert lines[1].split() == ["8.0", "80.0%", "2", "cs336/nn/mlp.py:7", "f"]
    assert lines[2].split()[:4] == ["1.0", "10.0%", "1", "compiled"]
    assert lines[3].split() == ["1.0", "10.0%", "1", "1", "others"]
    assert lines[-1].split() == ["10.0", "at", "the", "peak,", "in", "4", "blocks"]
