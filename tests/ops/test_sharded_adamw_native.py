"""The host's part of the native sharded step, where there is a C++ compiler: no GPU and no NCCL is needed.

The events are checked on streams that only write down what is queued; NCCL is looked for in processes that have none,
and in ones that have a library of that name which we made.
"""

import os
import pathlib
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def build(source, out, *flags):
    include = HERE.parents[1] / "csrc"
    command = [COMPILER, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-I", include, HERE / source]
    subprocess.run([*command, *flags, "-o", out], check=True)
    return out


def said(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_every_element_of_a_bucket_is_one_ranks(tmp_path):
    assert said(build("sharded_adamw_plan.cpp", tmp_path / "plan")) == ""


def test_events_order_what_conflicts_and_nothing_else(tmp_path):
    assert said(build("sharded_adamw_stream.cpp", tmp_path / "stream", "-I", HERE / "fake_cuda")) == ""


def test_nccl_is_taken_from_what_is_loaded(tmp_path):
    find = build("find_nccl.cpp", tmp_path / "find", "-ldl")
    assert said(find).startswith("NCCL is not loaded: there is no libnccl.so.2 in this process.")
    shared = ["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2"]
    whole = build("fake_nccl.cpp", tmp_path / "whole.so", *shared)
    assert said(find, whole) == "ncclGetUniqueId failed: invalid usage"
    partial = build("fake_nccl.cpp", tmp_path / "partial.so", *shared, "-DWITHOUT_ALL_REDUCE")
    assert said(find, partial) == "libnccl.so.2 has no function ncclAllReduce"
    old = build("fake_nccl.cpp", tmp_path / "old.so", *shared, "-DVERSION=2804")
    assert said(find, old) == "NCCL 2.10 or newer is needed, and version code 2804 is loaded"
