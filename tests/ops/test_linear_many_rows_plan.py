"""How clusters share linear layers of many rows, where there is a C++ compiler: many sizes."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_every_size_has_a_plan(tmp_path):
    source = pathlib.Path(__file__).with_name("linear_many_rows_plan.cpp")
    flags = ["-std=c++20", "-O1", "-fsanitize=address,undefined", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([COMPILER, *flags, "-I", ROOT / "csrc", source, "-o", tmp_path / "plan"], check=True)
    done = subprocess.run([tmp_path / "plan"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
