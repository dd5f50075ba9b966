"""Attention's launch plans, where there is a C++ compiler: tiles, order, turns, splits and workspace of many shapes."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_shape_has_a_plan(tmp_path):
    source = pathlib.Path(__file__).with_name("attention_plan.cpp")
    command = [COMPILER, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc", source]
    subprocess.run([*command, "-o", tmp_path / "attention_plan"], check=True)
    done = subprocess.run([tmp_path / "attention_plan"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
