"""The benchmark harness: what is timed, what is refused, and what is written down."""

import contextlib
import dataclasses
import gc
import itertools
import json
import time
import types
import weakref
from concurrent.futures import BrokenExecutor

import pytest
import torch

from benchmarks import check, harness, results, run
from benchmarks.ops import norms

CPU = torch.device("cpu")


def case(contenders, bytes=64):
    double = {"ref": lambda x: lambda: (2 * x,)}
    return harness.Case(
        "double", "fwd", (4, 8), torch.float32, lambda d: (torch.randn(4, 8),), double | contenders, bytes
    )


def only_row(contender):
    rows = harness.rows(case({"peer": contender}), CPU, {"peer"}, timed=False)
    assert [r["variant"] for r in rows] == ["peer"]
    return rows[0]


def test_the_judge_of_a_case_stands_for_the_reference():
    def broken(x):
        raise MemoryError("too large")

    triple = lambda x: lambda: (3 * x,)  # noqa: E731
    judged = dataclasses.replace(case({"ref": broken, "peer": triple}), right=triple)
    assert "failed" not in harness.rows(judged, CPU, {"peer"}, timed=False)[0]
    judged = dataclasses.replace(judged, right=lambda x: lambda: (2 * x,))
    assert "disagrees" in harness.rows(judged, CPU, {"peer"}, timed=False)[0]["failed"]


def test_calls_are_taken_in_turn():
    seen = []
    calls = [lambda i=i: seen.append(i) or (i,) for i in range(3)]
    harness._run(calls, 2)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_a_captured_call_keeps_its_tensors(monkeypatch):
    """A contender's own copies must outlive it: capturing the next one gives freed memory back to the device."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def bind(x):
        own = x.clone()
        alive.append(weakref.ref(own))
        return lambda: (own,)

    alive: list[weakref.ref] = []
    batch = harness._graph([bind(torch.randn(4)), bind(torch.randn(4))], 2)
    gc.collect()
    assert batch.calls == 4
    assert all(own() is not None for own in alive)


def test_contenders_take_turns(monkeypatch):
    seen = []
    batches = {
        name: harness.Batch(lambda name=name: seen.append(name) or time.sleep(5e-3), 1, "perf_counter") for name in "ab"
    }
    timings = harness.measure_in_turns(batches, CPU)
    counted = "".join(seen)[-4 * harness.MIN_SAMPLES :]  # two runs of each a turn, of which the first does not count
    turns = [counted[i : i + 4] for i in range(0, len(counted), 4)]
    assert set(turns) == {"aabb", "bbaa"}
    assert all(timing.seconds >= 5e-3 for timing in timings.values())


def test_rows_are_interleaved(monkeypatch):
    given = {}
    monkeypatch.setattr(harness, "measure_in_turns", lambda batches, device: given.update(batches) or {})
    harness.rows(case({"peer": lambda x: lambda: (x + x,), "broken": lambda x: 1 / 0}), CPU)
    assert list(given) == ["ref", "peer"]


def test_inputs_overflow_the_cache(monkeypatch):
    """Enough sets, every one drawn anew, that nothing of a set is cached when its turn comes again."""
    properties = type("properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sets = harness.draw(case({}), torch.device("cuda"))
    assert len({x.data_ptr() for (x,) in sets}) == len(sets)
    assert sum(x.nbytes for (x,) in sets) >= harness.L2_MULTIPLE * 1000
    assert sum(x.nbytes for (x,) in sets[1:]) < harness.L2_MULTIPLE * 1000
    assert not torch.equal(sets[0][0], sets[1][0])


def rows_of(tensors):
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.dim() == 2)


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_bytes_of_the_norms_are_those_of_their_rows(op):
    """Read once and written once; weights and statistics do not count."""
    for c in run.importlib.import_module(f"benchmarks.ops.bench_{op}").cases("tiny"):
        inputs = c.inputs(CPU)
        produced = 2 * inputs[0].nbytes if c.pass_.endswith("behind") else 0
        assert c.bytes == rows_of(inputs) + rows_of(c.contenders["ref"](*inputs)()) + produced


def test_bytes_of_a_step_are_those_of_its_tensors():
    module = run.importlib.import_module("benchmarks.ops.bench_adamw")
    for size in ("tiny", "full"):
        for c in module.cases(size):
            model, dtype = c.inputs.args
            numel = sum(torch.Size(s).numel() for s in module.shapes(model))
            per_parameter = 3 * dtype.itemsize + 4 * 4  # p read and written, g read; m and v in float32, both ways
            assert c.bytes == numel * per_parameter
            assert c.own_bytes == dict.fromkeys(("fused", "foreach"), numel * 7 * dtype.itemsize)


def test_a_contender_that_moves_fewer_bytes_is_credited():
    rows = {
        r["variant"]: r
        for r in harness.rows(
            dataclasses.replace(case({"peer": lambda x: lambda: (x + x,)}), own_bytes={"peer": 32}), CPU
        )
    }
    assert (rows["ref"]["bytes"], rows["peer"]["bytes"]) == (64, 32)
    assert rows["peer"]["gbps"] == pytest.approx(32 / rows["peer"]["seconds"] / 1e9, abs=0.1)


def test_a_call_behind_its_producer_sees_what_that_wrote():
    x = torch.randn(4, 8)
    call = harness.behind_producer(lambda x: lambda: (2 * x,))(x)
    want = 2 * x
    x.zero_()
    assert torch.equal(call()[0], want)


def test_peers_that_tune_themselves_wait_to_be_named(monkeypatch):
    ran = []
    monkeypatch.setattr(harness, "rows", lambda case, device, only: ran.append(only) or [])
    contenders = dict.fromkeys(("native", *norms.TUNED))
    module = type("module", (), {"cases": staticmethod(lambda size: [case(contenders)])})
    run.sweep(module, "tiny", CPU, None, float("inf"))
    run.sweep(module, "tiny", CPU, {"quack tuned"}, float("inf"))
    assert ran == [{"ref", "native"}, {"quack tuned"}]


def test_a_run_that_is_cut_short_leaves_the_rows_that_it_has(tmp_path, monkeypatch):
    def rows(case, device, only):
        if case.pass_ == "bwd":
            raise KeyboardInterrupt
        return [timed(1.0, "native")]

    monkeypatch.setattr(harness, "rows", rows)
    cases = [case({}), dataclasses.replace(case({}), pass_="bwd")]
    module = type("module", (), {"cases": staticmethod(lambda size: cases)})
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    out = tmp_path / "cpu.json"
    with pytest.raises(KeyboardInterrupt):
        run.main(["ops", "rms_norm", "--out", str(out)])
    assert results.read(out)["rms_norm"]["rows"] == [timed(1.0, "native")]


# ---- check ----


def timed(seconds, variant, spread=0.0, shape=(4, 8)):
    names = {"op": "double", "pass": "fwd", "shape": list(shape), "dtype": "float32"}
    return names | {"variant": variant, "seconds": seconds, "spread": spread}


def test_a_ratio_outside_the_band_is_a_regression():
    then = [timed(1.0, "native"), timed(2.0, "eager"), timed(1.1, "liger")]
    assert check.regressions([timed(3.0, "native"), timed(6.0, "eager")], then) == []  # a slower machine
    assert check.regressions([timed(1.0, "native"), timed(2.0 * check.BAND, "eager")], then) == []
    worse = [timed(1.0, "native"), timed(1.8, "eager"), timed(1.1, "liger")]
    assert check.regressions(worse, then) == ["BEHIND double fwd 4x8 float32: 1.80x as fast as eager, was 2.00x"]
    assert check.regressions([timed(1.0, "native", spread=0.1), *worse[1:]], then) == []  # noise


def test_a_check_that_compares_nothing_does_not_pass():
    then = [timed(1.0, "native"), timed(2.0, "eager")]
    for now in ([], [timed(1.0, "native")], [timed(1.0, "native", shape=(1,)), timed(2.0, "eager", shape=(1,))]):
        with pytest.raises(ValueError, match="no case and peer of this run"):
            check.regressions(now, then)


def test_the_driver_checks_against_the_file_of_the_device(monkeypatch, tmp_path, capsys):
    module = type("module", (), {"cases": staticmethod(lambda size: [])})
    slower = [timed(1.0, "native"), timed(1.0, "eager")]
    module.host = staticmethod(lambda device: slower)
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    then = [timed(1.0, "native"), timed(2.0, "eager")]
    results.write(tmp_path / "here.json", "rms_norm", {"gpu": None}, then)
    monkeypatch.setattr(results, "of_device", lambda device: tmp_path / "here.json")
    assert run.main(["ops", "rms_norm", "--check"]) == 1
    assert "BEHIND double fwd 4x8 float32: 1.00x as fast as eager, was 2.00x" in capsys.readouterr().out
    slower[:] = then
    assert run.main(["ops", "rms_norm", "--check", str(tmp_path / "here.json")]) == 0
    with pytest.raises(SystemExit):
        run.main(["ops", "layer_norm", "--check"])
    assert "holds no results of layer_norm" in capsys.readouterr().err


def test_the_file_of_a_device(tmp_path):
    with pytest.raises(ValueError, match="no results of a CPU"):
        results.of_device(CPU, tmp_path)
    results.write(tmp_path / "tokenizer.json", "tokenizer", {}, [])
    results.write(tmp_path / "gpu.json", "rms_norm", {"gpu": "NVIDIA H200"}, [])
    results.write(tmp_path / "here.json", "rms_norm", {"gpu": None}, [])
    assert results.of_device(CPU, tmp_path).name == "here.json"


@pytest.mark.parametrize(("seconds", "rounds"), [(harness.SAMPLE / 3.5, 4), (2 * harness.SAMPLE, 1), (1e-9, 682)])
def test_a_batch_is_whole_rounds_and_long_enough(monkeypatch, seconds, rounds):
    """Of three calls that take so long together."""
    clock = itertools.count()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: seconds * next(clock))
    batch = harness.prepare([lambda: ()] * 3, CPU)
    assert batch.calls == 3 * rounds <= harness.MAX_CALLS
    assert batch.method == "perf_counter"


def test_slow_calls_are_timed_one_by_one(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    timing = harness.measure([lambda: ()], CPU)
    assert timing == harness.Timing(seconds=1.0, spread=0.0, method="perf_counter")


def test_summary_is_median_and_quartiles():
    timing = harness.summary([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0], 2, "perf_counter")
    assert timing.seconds == 4.0 / 2
    assert timing.spread == (9.0 - 2.0) / 4.0


def test_host_seconds_names_every_call():
    timings = harness.host_seconds({"fast": lambda: None, "slow": lambda: sum(range(2000))}, CPU, blocks=3)
    assert 0 < timings["fast"].seconds < timings["slow"].seconds


def test_a_right_contender_is_timed():
    rows = {r["variant"]: r for r in harness.rows(case({"peer": lambda x: lambda: (x + x,)}), CPU)}
    for variant in ("ref", "peer"):
        row = rows[variant]
        assert row["bytes"] == 64
        assert row["shape"] == [4, 8]
        assert row["gbps"] == pytest.approx(64 / row["seconds"] / 1e9, abs=0.1)
        assert row["percent_of_roof"] == pytest.approx(100 * 64 / row["seconds"] / harness.copy_roof(CPU), abs=0.1)


def test_flops_are_measured_against_the_matrix_product():
    row = harness.result(dataclasses.replace(case({}), bytes=0, flops=1000), harness.Timing(1e-6, 0.0, "x"), CPU)
    assert row["tflops"] == 0.0
    assert row["percent_of_roof"] == pytest.approx(100 * 1e9 / harness.matmul_roof(CPU, torch.float32), abs=0.1)


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (lambda x: (3 * x,), "disagrees with ref"),
        (lambda x: (2 * x * float("nan"),), "disagrees with ref"),
        (lambda x: (2 * x, x), "returns 2 outputs, ref 1"),
        (lambda x: (2 * x[:2],), "has shape (2, 8)"),
    ],
)
def test_a_wrong_contender_is_not_timed(outputs, reason):
    row = only_row(lambda x: lambda: outputs(x))
    assert reason in row["failed"]
    assert "seconds" not in row


def test_a_missing_peer_is_skipped_by_name():
    def peer(x):
        import no_such_package_xyz

        return no_such_package_xyz

    assert only_row(peer)["skipped"] == "No module named 'no_such_package_xyz'"


def test_a_breaking_peer_is_a_failed_row():
    def peer(x):
        raise AssertionError("weight must be\nfloat32")

    assert only_row(peer)["failed"] == "AssertionError: weight must be float32"


def test_a_variant_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(harness.registry, "why_not", lambda op, variant, *args: f"{op} {variant} {len(args)}")
    with pytest.raises(NotImplementedError, match="rms_norm_fwd native 3"):
        harness.variants("rms_norm_fwd", keep=(0,))["native"](torch.empty(2, 4), torch.empty(4), 1e-5)


def test_variants_return_what_the_pass_promises():
    x, w = torch.randn(2, 4), torch.randn(4)
    (y,) = harness.variants("rms_norm_fwd", keep=(0,))["ref"](x, w, 1e-5)()
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (4,), w, 1e-5))


@pytest.mark.parametrize("op", run.OPS)
def test_cases_hold_what_they_say(op):
    module = run.importlib.import_module(f"benchmarks.ops.bench_{op}")
    for c in module.cases("tiny"):
        assert "ref" in c.contenders
        assert "compile" not in c.contenders  # compiling takes seconds
        assert c.bytes or c.flops
    full = {(c.pass_, c.shape) for c in module.cases("full")}
    assert full > {(c.pass_, c.shape) for c in module.cases("quick")}


def test_norm_shapes_have_the_size_they_are_named_for():
    shapes = list(norms.shapes("full"))
    assert len(set(shapes)) == len(shapes)
    assert {m * n * 2 >> 20 for m, n in shapes} == {1, 4, 16, 64, 256, 1024}
    assert {n for _, n in shapes} == {2**p for p in range(7, 18)}


def test_results_replace_the_run_of_the_same_name(tmp_path):
    path = tmp_path / "results" / "machine.json"
    for name, rows in (("b", [{"x": 1}]), ("a", [{"x": 2}, {"x": 3}]), ("b", [{"x": 4}])):
        results.write(path, name, {"date": name}, rows)
    runs = json.loads(path.read_text())
    assert runs == {
        "a": {"header": {"date": "a"}, "rows": [{"x": 2}, {"x": 3}]},
        "b": {"header": {"date": "b"}, "rows": [{"x": 4}]},
    }
    assert list(runs) == ["a", "b"]
    assert '   {"x": 3}\n' in path.read_text()  # a line a row


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"a": 1}', '{"a": {"rows": []}}'])
def test_a_file_of_something_else_is_kept(tmp_path, capsys, text):
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="something else than benchmark results"):
        results.write(path, "a", {}, [])
    with pytest.raises(SystemExit):
        run.main(["ops", "rms_norm", "--out", str(path)])
    assert "name another file" in capsys.readouterr().err
    assert path.read_text() == text


def test_header_says_with_what():
    header = results.header(CPU, "a command", commit="abc")
    assert header["command"] == "a command"
    assert header["commit"] == "abc"
    assert header["torch"] == torch.__version__
    assert header["gpu"] is None
    assert header["roofs"]["copy_gbps"] > 0


def test_the_driver_prints_and_writes(tmp_path, capsys):
    out = tmp_path / "cpu.json"
    assert run.main(["ops", "rms_norm", "--only", "ref,eager", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rms_norm"]["rows"]
    assert {r["variant"] for r in rows if not r["pass"].startswith("host")} == {"ref", "eager"}
    assert {r["variant"] for r in rows if r["pass"].startswith("host")} == {"cs336", "eager"}
    for c in ("rms_norm fwd 4x128", "rms_norm bwd 3x257", "rms_norm host fwd"):
        assert c in printed


def test_the_driver_stops_at_its_limit(capsys):
    assert run.main(["ops", "rms_norm", "--limit", "0"]) == 0
    assert "time limit: 8 of 8 cases not run, from rms_norm fwd 4x128 bfloat16 on" in capsys.readouterr().out


def test_compiling_ahead_only_saves_time(monkeypatch, capsys):
    class BrokenPool(run.ProcessPoolExecutor):
        def map(self, function, *jobs):
            assert jobs[0] == ("rms_norm",) * len(jobs[2])
            raise BrokenExecutor("a worker died")

    monkeypatch.setattr(run, "ProcessPoolExecutor", BrokenPool)
    run.compile_cases(["rms_norm"], "tiny", 1)  # nothing to compile
    assert capsys.readouterr().out == ""
    run.compile_cases(["rms_norm"], "full", 1)
    assert "compiling ahead stopped: a worker died" in capsys.readouterr().out


def test_our_own_failure_is_the_exit_status(monkeypatch, capsys):
    broken = lambda x: lambda: (3 * x,)  # noqa: E731
    module = type("module", (), {"cases": staticmethod(lambda size: [case({"native": broken})])})
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module)
    assert run.main(["ops", "rms_norm"]) == 1
    assert "FAILED double fwd 4x8 float32 native: output 0 disagrees with ref" in capsys.readouterr().out


def test_the_recorded_command_has_no_paths():
    argv = ["train", "tiny", "--out=/home/me/x.json", "--data", "/data/mine", "--commit", "abc", "--batch", "4"]
    assert run.command(argv) == "python -m benchmarks.run train tiny --data TOKENS --batch 4"
    assert run.command(["ops", "--out", "x.json"]) == "python -m benchmarks.run ops"


def test_unknown_ops_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["ops", "rms_nrom"])
    assert f"no benchmark of rms_nrom: expected some of {', '.join(run.OPS)}" in capsys.readouterr().err


def test_help_names_every_kind(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--help"])
    said = capsys.readouterr().out
    for kind in ("ops", "train", "ladder", "mixers", *run.DISTRIBUTED, "offline", "latency", "serve"):
        assert kind in said
