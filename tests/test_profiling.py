"""The profiling scripts explain themselves, and find the benchmark's cases."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from profiling import case

SCRIPTS = pathlib.Path(__file__).parents[1] / "profiling"


def run(script, *arguments, path):
    bash = shutil.which("bash")
    environment = {**os.environ, "PATH": str(path), "PYTHON": sys.executable}
    return subprocess.run([bash, SCRIPTS / script, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def tools(tmp_path):
    """A PATH with what the scripts need and no profiler."""
    for name in ("bash", "cat", "dirname", "realpath"):
        (tmp_path / name).symlink_to(shutil.which(name))
    return tmp_path


def fake(tools, name):
    """A profiler that prints its arguments."""
    tool = tools / name
    tool.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    tool.chmod(0o755)


@pytest.mark.parametrize("script", ["ncu.sh", "nsys.sh"])
def test_usage(script, tools):
    wanted, bare = run(script, "--help", path=tools), run(script, path=tools)
    assert (wanted.returncode, bare.returncode) == (0, 2)
    assert wanted.stdout == bare.stdout
    assert f"usage: profiling/{script}" in wanted.stdout


@pytest.mark.parametrize(("script", "arguments"), [("ncu.sh", ["rms_norm", "bwd"]), ("nsys.sh", ["out"])])
def test_a_missing_profiler_is_named(script, arguments, tools):
    answer = run(script, *arguments, path=tools)
    assert answer.returncode == 1
    assert f"{script.removesuffix('.sh')} is not on PATH" in answer.stderr
    assert "CUDA toolkit" in answer.stderr


def test_ncu_leaves_the_clocks_alone_and_filters(tools):
    fake(tools, "ncu")
    answer = run("ncu.sh", "rms_norm", "bwd", "--shape", "8192x4096", "--", "--set", "full", path=tools)
    assert answer.returncode == 0, answer.stderr
    said = answer.stdout.split("\n")
    assert said[:2] == ["--clock-control", "none"]
    assert said[said.index("--nvtx-include") + 1] == "profile/"
    assert "--section=SpeedOfLight_RooflineChart" in said
    tail = ["--set", "full", sys.executable, "-m", "profiling.case", "rms_norm", "bwd", "--shape", "8192x4096"]
    assert said[-len(tail) - 1 : -1] == tail


def test_nsys_records_what_step_marks(tools, tmp_path):
    fake(tools, "nsys")
    answer = run("nsys.sh", str(tmp_path / "out"), "tiny", "--steps", "2", path=tools)
    assert answer.returncode == 0, answer.stderr
    said = answer.stdout.split("\n")
    assert "--capture-range=cudaProfilerApi" in said
    assert f"--output={tmp_path / 'out'}" in said
    assert said[said.index("profiling.step") + 1 :][:3] == ["tiny", "--steps", "2"]
    assert said[-2] == f"{tmp_path / 'out'}.nsys-rep"


def test_cases_are_found_by_name():
    found = case.find("rms_norm", "bwd", "8192x4096")
    assert (found.op, found.pass_, found.shape) == ("rms_norm", "bwd", (8192, 4096))
    assert case.find("rms_norm", "fwd", None).pass_ == "fwd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rms_nrom", "fwd", None), "no benchmark of rms_nrom: expected one of .*layer_norm.* rms_norm"),
        (("rms_norm", "forward", None), "has no pass forward: expected one of fwd"),
        (("rms_norm", "fwd", "3x3"), "no shape 3x3: expected one of .*8192x4096"),
    ],
)
def test_unknown_names_list_the_known(arguments, message):
    with pytest.raises(ValueError, match=message):
        case.find(*arguments)
